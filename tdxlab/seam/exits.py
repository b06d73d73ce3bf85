"""From the guest to the host and back: saving registers, TD exits, #VE.

Source: TDX module 1.5.01, td_exit.c (async_tdexit_internal, td_vmexit_to_vmm), tdh_vp_enter.c,
td_other_exits.c (tdx_inject_ve).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tdxlab.abi.outcome import GuestOutcome
from tdxlab.abi.registers import Registers
from tdxlab.abi.status import TDX_NON_RECOVERABLE_TD_NON_ACCESSIBLE, TDX_SUCCESS
from tdxlab.seam import epochs
from tdxlab.seam.call import Call
from tdxlab.seam.locks import release_shared_hp
from tdxlab.seam.rules import VCPU_READY
from tdxlab.seam.td import (
    EXIT_FAULT_LIKE,
    EXIT_TRAP_LIKE,
    EXIT_VMCALL,
    GPR_NAMES,
    Td,
    Tdr,
    Tdvps,
)

if TYPE_CHECKING:
    from tdxlab.seam.module import Module

#: VM exit reasons (Intel SDM volume 3, appendix on basic exit reasons).
EXIT_EXCEPTION = 0
EXIT_INTERRUPT = 1
EXIT_TRIPLE_FAULT = 2
EXIT_HLT = 12
EXIT_EPT_VIOLATION = 48
EXIT_EPT_MISCONFIGURATION = 49
EXIT_TDCALL = 77

VECTOR_INVALID_OPCODE = 6
VECTOR_DOUBLE_FAULT = 8
VECTOR_GENERAL_PROTECTION = 13
VECTOR_PAGE_FAULT = 14
VECTOR_VE = 20
_EVENT_VALID = 1 << 31

TDCALL_LENGTH = 4

#: Bits of a VMCALL mask that select general registers for the host: RDX, RBX, RBP, RSI, RDI, R8 to
#: R15.
_SELECTABLE = 0xFFEC
_HINT = 1 << 60


class Guest:
    """The vCPU inside an LP, as an exit handler sees it.

    td: its TD, TDCS mapped; tdvpr: HPA of the TDVPR; page: word index of its frame. registers: the
    guest's, rax apart.
    """

    __slots__ = ("lp", "module", "page", "rax", "registers", "td", "tdvpr")

    def __init__(self, module: Module, lp: int, rax: int, registers: Registers) -> None:
        memory = module.memory
        self.module = module
        self.lp = lp
        self.tdvpr = module.cpu.vcpu_inside(lp)
        self.page = memory.frame(self.tdvpr)
        self.td = Td(memory, module.cpu.tdr_inside(lp))
        self.td.map_tdcs(memory)
        self.rax = rax
        self.registers = registers

    def field(self, word: int) -> int:
        """A word of the TDVPR (Tdvps.*)."""
        return self.module.memory.words.view[self.page + word]

    def set_field(self, word: int, value: int) -> None:
        """Write a word of the TDVPR."""
        self.module.memory.words.put(self.page + word, value)

    def td_field(self, word: int) -> int:
        """A word of the first TDCS page (Tdcs.*)."""
        return self.module.memory.words.view[self.td.tdcs + word]

    def save_registers(self) -> None:
        """Keep the guest's registers in the TDVPS, as every VM exit does."""
        words, first = self.module.memory.words, self.page + Tdvps.GPRS
        values = self.registers.gprs(self.rax)
        saved = words.view[first : first + len(values)].tolist()
        if saved == values:
            return
        for number, value in enumerate(values):
            if saved[number] != value:
                words.put(first + number, value)

    def resume(self) -> GuestOutcome:
        """The guest goes on with its registers as they are."""
        self.save_registers()
        return GuestOutcome(False, self.rax, self.registers)

    def advance(self) -> None:
        """Step over the TDCALL instruction."""
        self.set_field(Tdvps.RIP, self.field(Tdvps.RIP) + TDCALL_LENGTH)


def async_exit(
    guest: Guest,
    reason: int,
    *,
    status: int = TDX_SUCCESS,
    qualification: int = 0,
    extended: int = 0,
    gpa: int = 0,
    interruption: int = 0,
    vcpu_state: int = VCPU_READY,
) -> GuestOutcome:
    """TD exit that the guest did not ask for: the host sees the reason and nothing of the guest's
    registers.

    gpa: page aligned, or 0. vcpu_state: the state the vCPU is left in. Returns the outcome with the
    host's registers.
    """
    if vcpu_state == VCPU_READY:
        guest.set_field(Tdvps.LAST_TD_EXIT, EXIT_FAULT_LIKE)
    guest.set_field(Tdvps.STATE, vcpu_state)
    host = Registers(rcx=qualification, rdx=extended, r8=gpa, r9=interruption)
    return _leave(guest, status | reason, host)


def fatal_exit(guest: Guest, reason: int, status: int) -> GuestOutcome:
    """TD exit after which the TD is dead: TDR.fatal is set and the vCPU stays as it was."""
    guest.module.memory.words.put(guest.td.page + Tdr.FATAL, 1)
    return _leave(guest, status | reason, Registers())


def inaccessible_exit(guest: Guest, reason: int) -> GuestOutcome:
    """TD exit of a TD whose memory cannot be used any more: the vCPU is not even counted out of its
    epoch.
    """
    guest.module.memory.words.put(guest.td.page + Tdr.FATAL, 1)
    return _leave(guest, TDX_NON_RECOVERABLE_TD_NON_ACCESSIBLE | reason, Registers(), counted=False)


def vmcall_exit(guest: Guest) -> GuestOutcome:
    """TD exit by TDG.VP.VMCALL: the host sees the registers that the guest's RCX selects."""
    mask = guest.registers.rcx
    host = Registers(rcx=mask)
    for number, name in enumerate(GPR_NAMES):
        if mask & _SELECTABLE & 1 << number:
            setattr(host, name, getattr(guest.registers, name))
    guest.set_field(Tdvps.LAST_TD_EXIT, EXIT_VMCALL)
    guest.set_field(Tdvps.VMCALL_MASK, mask)
    guest.set_field(Tdvps.STATE, VCPU_READY)
    return _leave(guest, EXIT_TDCALL, host)


def _leave(guest: Guest, status: int, host: Registers, *, counted: bool = True) -> GuestOutcome:
    """The LP is the host's again: the epoch is left, the locks on TDR and TDVPR are released."""
    module, pamt = guest.module, guest.module.pamt
    guest.save_registers()
    if counted:
        epochs.part(module.memory.words, guest.td.tdcs, guest.field(Tdvps.VCPU_EPOCH))
    release_shared_hp(pamt.words, pamt.entry(guest.td.tdr, 0))
    for size in (0, 1, 2):
        release_shared_hp(pamt.words, pamt.entry(guest.tdvpr, size))
    module.set_last_vcpu(guest.lp, guest.tdvpr)
    module.cpu.leave(guest.lp)
    return GuestOutcome(True, status, host)


def load_guest_registers(call: Call, page: int, *, hint: bool) -> None:
    """On entry: what the host answers to a VMCALL goes to the guest; after a trap-like exit its
    hint does.

    page: word index of the TDVPR's frame.
    """
    words = call.module.memory.words
    first = page + Tdvps.GPRS
    kind = words.view[page + Tdvps.LAST_TD_EXIT]
    if kind == EXIT_TRAP_LIKE:
        rax = words.view[first] & ~_HINT
        words.put(first, rax | _HINT if hint else rax)
    if kind != EXIT_VMCALL:
        return
    mask = words.view[page + Tdvps.VMCALL_MASK]
    words.put(first, TDX_SUCCESS)
    words.put(first + GPR_NAMES.index("rcx"), mask)
    for number, name in enumerate(GPR_NAMES):
        if mask & _SELECTABLE & 1 << number:
            words.put(first + number, getattr(call.registers, name))
    words.put(page + Tdvps.LAST_TD_EXIT, EXIT_FAULT_LIKE)


def inject_ve(guest: Guest, reason: int, *, qualification: int = 0, gpa: int = 0) -> GuestOutcome:
    """Tell the guest with a #VE; it reads the reason with TDG.VP.VEINFO.GET. RIP is not advanced.

    With the last #VE's information still unread the guest gets a double fault instead.
    Source: TDX module 1.5.01, td_other_exits.c, tdx_inject_ve.
    """
    if guest.field(Tdvps.VE_VALID):
        guest.set_field(Tdvps.PENDING_EVENT, _EVENT_VALID | VECTOR_DOUBLE_FAULT)
        return guest.resume()
    for word, value in (
        (Tdvps.VE_VALID, (1 << 64) - 1),
        (Tdvps.VE_REASON, reason),
        (Tdvps.VE_QUALIFICATION, qualification),
        (Tdvps.VE_GLA, 0),
        (Tdvps.VE_GPA, gpa),
        (Tdvps.VE_INFO, 0),
    ):
        guest.set_field(word, value)
    guest.set_field(Tdvps.PENDING_EVENT, _EVENT_VALID | VECTOR_VE)
    return guest.resume()


def inject_exception(guest: Guest, vector: int) -> GuestOutcome:
    """Queue an exception for the guest; RIP is not advanced."""
    guest.set_field(Tdvps.PENDING_EVENT, _EVENT_VALID | vector)
    return guest.resume()
