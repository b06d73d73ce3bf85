"""What guests do in a scene: memory accesses, TDCALLs and exits that make sense now."""

from collections.abc import Callable
from typing import Any

from tdxlab.abi import leaves as abi
from tdxlab.abi.outcome import GuestOutcome
from tdxlab.abi.registers import Registers
from tdxlab.seam import exits
from tdxlab.seam.rules import MAPPED_BITS, PENDING_BITS
from tests.scene import SMALL_GPAS, UNEXPECTED_EXIT
from tests.walker import Walker

#: A VMCALL mask that passes R10 to R15.
_SIX_REGISTERS = 0xFC00

#: Exits that need no operands, and do not end the TD.
_PLAIN_EXITS = (
    exits.EXIT_INTERRUPT,
    exits.EXIT_HLT,
    *(3, 10, 18, 30, 32),
)

Deed = Callable[[Walker, int], Any]


def _mapped_gpa(w: Walker, lp: int) -> int:
    entry = w.pick(w.scene.guest_td(lp).entries(0, 1, frozenset({MAPPED_BITS})))
    gpa: int = entry.gpa
    return gpa


def touch(w: Walker, lp: int) -> Any:
    """Read or write one byte somewhere in the universe, shared addresses too."""
    td = w.scene.guest_td(lp)
    gpa = w.choose((*SMALL_GPAS, td.limit, td.limit + 0x1000))
    return w.machine.touch(lp, gpa, write=w.choose((False, True)))


def accept(w: Walker, lp: int) -> GuestOutcome:
    """Accept a page that waits for it."""
    entry = w.pick(w.scene.guest_td(lp).entries(0, 1, frozenset({PENDING_BITS})))
    return w.machine.tdcall(lp, abi.TDG_MEM_PAGE_ACCEPT, Registers(rcx=entry.operand))


def accept_anywhere(w: Walker, lp: int) -> GuestOutcome:
    """Accept whatever is or is not at an address."""
    operand = w.choose(SMALL_GPAS[:5]) | w.choose((0, 1, 2))
    return w.machine.tdcall(lp, abi.TDG_MEM_PAGE_ACCEPT, Registers(rcx=operand))


def extend_rtmr(w: Walker, lp: int) -> GuestOutcome:
    """Measure bytes of a page."""
    registers = Registers(rcx=_mapped_gpa(w, lp), rdx=w.choose(range(5)))
    return w.machine.tdcall(lp, abi.TDG_MR_RTMR_EXTEND, registers)


def report(w: Walker, lp: int) -> GuestOutcome:
    """Have a report written."""
    registers = Registers(rcx=_mapped_gpa(w, lp), rdx=_mapped_gpa(w, lp))
    return w.machine.tdcall(lp, abi.TDG_MR_REPORT, registers)


def dump_system_fields(w: Walker, lp: int) -> GuestOutcome:
    """Have the module's fields written."""
    registers = Registers(rdx=_mapped_gpa(w, lp), r8=(1 << 64) - 1)
    return w.machine.tdcall(lp, abi.TDG_SYS_RDALL, registers)


def vmcall(w: Walker, lp: int) -> GuestOutcome:
    """Ask the host for something."""
    return w.machine.tdcall(lp, abi.TDG_VP_VMCALL, Registers(rcx=_SIX_REGISTERS, r10=1))


def plain_tdcall(w: Walker, lp: int) -> GuestOutcome:
    """A TDCALL that takes no operand, or zeros."""
    leaf = w.choose(
        (
            abi.TDG_VP_INFO,
            abi.TDG_VP_VEINFO_GET,
            abi.TDG_VP_CPUIDVE_SET,
            abi.TDG_VM_RD,
            abi.TDG_VP_RD,
            abi.TDG_SYS_RD,
            abi.TDG_VM_WR,
            abi.TDG_VP_WR,
        )
    )
    return w.machine.tdcall(lp, leaf, Registers())


def leave(w: Walker, lp: int) -> GuestOutcome:
    """An exit that needs no operands."""
    return w.machine.vm_exit(lp, w.choose(_PLAIN_EXITS), Registers())


def triple_fault(w: Walker, lp: int) -> GuestOutcome:
    """The vCPU is dead."""
    return w.machine.vm_exit(lp, exits.EXIT_TRIPLE_FAULT, Registers())


def die(w: Walker, lp: int) -> GuestOutcome:
    """An exit that nobody expects kills a TD that is no debug TD."""
    return w.machine.vm_exit(lp, UNEXPECTED_EXIT, Registers())


#: The likely ones are there more than once.
DEEDS: tuple[Deed, ...] = (
    *(touch, touch, touch, accept, accept, accept, accept_anywhere),
    *(extend_rtmr, report, dump_system_fields, vmcall, plain_tdcall, leave, leave),
)
RARE_DEEDS: tuple[Deed, ...] = (triple_fault, die)
