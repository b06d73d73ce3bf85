"""A machine without an operating system: what belongs together, and the doors between host, module
and guest.

    machine = BareMachine()                               # default_platform()
    status = machine.seamcall(0, leaf, registers)     # the host calls the module
    outcome = machine.tdcall(0, leaf, registers)      # the guest inside LP 0 does
    machine.touch(0, gpa, write=True)                 # ... or uses memory

Two machines share nothing; both can live in one notebook.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from difflib import get_close_matches
from types import MappingProxyType

from tdxlab.abi.leaves import HOST_LEAVES
from tdxlab.abi.outcome import GuestOutcome
from tdxlab.abi.registers import Registers
from tdxlab.arch import EPT_EXECUTE, EPT_READ, EPT_WRITE, HPA_MASK, PAGE_SIZE
from tdxlab.arguments import explained
from tdxlab.cpu import Cpu, EptMisconfiguration, EptViolation, Translation, Walked
from tdxlab.hardware import Platform, default_platform
from tdxlab.journal import Journal, Mark
from tdxlab.memory import MachineCheck, Memory
from tdxlab.seam.exits import (
    EXIT_EPT_MISCONFIGURATION,
    EXIT_EPT_VIOLATION,
    EXIT_EXCEPTION,
    EXIT_INTERRUPT,
    EXIT_TDCALL,
    Guest,
    inject_ve,
)
from tdxlab.seam.guest import DEFAULT_INTERRUPTION
from tdxlab.seam.module import Module
from tdxlab.seam.td import GPR_NAMES, Td, Tdcs, Tdvps
from tdxlab.steps import Operation
from tdxlab.trace import Trace

_LINEAR_ADDRESS_VALID = 1 << 7 | 1 << 8
#: Interruption information of a machine check: a hardware exception on vector 18.
_MACHINE_CHECK = 0x8000_0312
_LEAF_NAMES = tuple(leaf.name for leaf in HOST_LEAVES.values())


class LeafCounts(Counter[str]):
    """Name of a leaf -> calls; a misspelt name is a KeyError, not 0."""

    def __missing__(self, name: str) -> int:
        if name in _LEAF_NAMES or name.startswith("leaf "):
            return 0
        near = get_close_matches(name, _LEAF_NAMES, 1) or ["TDH.MEM.PAGE.AUG"]
        raise KeyError(f"no leaf is named {name!r}; did you mean {near[0]}?")


class BareMachine:
    """Host RAM, processors and a TDX module that nobody has initialised yet.

    platform: the hardware, `default_platform()` if None. encrypted: False for a machine whose
    memory reads the same under every KeyID.
    """

    def __init__(self, platform: Platform | None = None, *, encrypted: bool = True) -> None:
        self.platform = platform or default_platform()
        self.journal = Journal()
        self.trace = Trace(self.journal)
        self.memory = Memory(
            self.journal,
            self.trace,
            self.platform.ram,
            keyid_bits=self.platform.keyid_bits,
            first_private=self.platform.private_keyids[0],
            encrypted=encrypted,
        )
        self.cpu = Cpu(self.journal, self.trace, self.memory, self.platform.package_of)
        self.module = Module(self.journal, self.platform, self.memory, self.cpu, self.trace)

    # -- the host

    @explained
    def seamcall(self, lp: int, rax: int, registers: Registers) -> int:
        """SEAMCALL on `lp`, at once. rax: leaf number | version << 16. registers: in and out.
        Returns RAX; IN_GUEST after TDH.VP.ENTER. Refuses an LP that does not exist or runs a guest:
        ValueError.
        """
        return self.module.seamcall(lp, rax, registers)

    def seamcall_steps(self, lp: int, rax: int, registers: Registers) -> Operation:
        """SEAMCALL as a step generator: yields once between its checks and its effects."""
        return self.module.seamcall_steps(lp, rax, registers)

    @explained
    def store(self, hpa: int, data: bytes) -> None:
        """The host stores `data` at `hpa` under KeyID 0; a control page of the module does not
        survive it. Refuses addresses without RAM: ValueError.
        """
        self.memory.require_ram(hpa, len(data))
        self.memory.write(hpa, data)
        self.module.notice_store(hpa, len(data))

    @explained
    def clear(self, hpa: int) -> None:
        """The host clears the page at `hpa`: 64 MOVDIR64B stores under KeyID 0, which end poison
        too.

        Refuses an address that is not 4 KiB aligned or has no RAM: ValueError.
        """
        if hpa % PAGE_SIZE:
            raise ValueError(
                f"{hpa:#x} is not the address of a page; did you mean {hpa & -PAGE_SIZE:#x}?"
            )
        self.memory.require_ram(hpa, PAGE_SIZE)
        self.memory.clear_page(hpa)
        self.module.notice_page(hpa)

    # -- the guest

    @explained
    def vm_exit(
        self,
        lp: int,
        reason: int,
        registers: Registers,
        *,
        rax: int = 0,
        qualification: int = 0,
        gpa: int = 0,
        rip: int | None = None,
        interruption: int = DEFAULT_INTERRUPTION,
    ) -> GuestOutcome:
        """A VM exit of the vCPU inside `lp`; as `Module.vm_exit`."""
        return self.module.vm_exit(
            lp,
            reason,
            registers,
            rax=rax,
            qualification=qualification,
            gpa=gpa,
            rip=rip,
            interruption=interruption,
        )

    @explained
    def interrupt(self, lp: int) -> GuestOutcome:
        """An external interrupt takes the vCPU out of `lp`."""
        rax, registers = self.guest_registers(lp)
        return self.vm_exit(lp, EXIT_INTERRUPT, registers, rax=rax)

    @explained
    def kick(self, lp: int) -> GuestOutcome:
        """The host sends an IPI to `lp`, and the vCPU leaves."""
        self.module.require_guest(lp)
        self.cpu.send_ipi(lp)
        return self.interrupt(lp)

    @explained
    def tdcall(self, lp: int, rax: int, registers: Registers) -> GuestOutcome:
        """TDCALL by the vCPU inside `lp`. rax: leaf number | version << 16."""
        return self.vm_exit(lp, EXIT_TDCALL, registers, rax=rax)

    @explained
    def guest_registers(self, lp: int) -> tuple[int, Registers]:
        """(RAX, registers) of the vCPU inside `lp` as the module last saved or loaded them."""
        self.module.require_guest(lp)
        page = self.memory.frame(self.cpu.vcpu_inside(lp))
        values = self.memory.words.view[page + Tdvps.GPRS : page + Tdvps.GPRS + len(GPR_NAMES)]
        rax, rcx, rdx, rbx, _, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15 = values.tolist()
        numbered = (r8, r9, r10, r11, r12, r13, r14, r15)
        return rax, Registers(rcx, rdx, *numbered, rbx, rbp, rsi, rdi)

    @explained
    def touch(
        self,
        lp: int,
        gpa: int,
        *,
        write: bool = False,
        fetch: bool = False,
        rip: int | None = None,
    ) -> Translation | GuestOutcome:
        """The guest inside `lp` reads, writes or executes (`fetch`) one byte at `gpa`.

        Returns the translation, or what an EPT violation led to: a TD exit, or an exception that
        waits for the guest (`take_exception`). A page translated once stays in the LP's TLB.
        Private memory is found in the Secure EPT, shared memory in the EPT that the host has given
        for it.
        Refuses an LP without a guest, a negative GPA, a GPA beyond the guest's address width:
        ValueError.
        Differs: before the host gives one, every shared access is a violation; the CPU would walk
        the page that TDH.VP.INIT put in its place.
        """
        access = EPT_EXECUTE if fetch else EPT_READ | EPT_WRITE if write else EPT_READ
        return self._access(lp, gpa, access, rip)[0]

    def _access(
        self, lp: int, gpa: int, access: int, rip: int | None = None
    ) -> tuple[Translation | GuestOutcome, int]:
        """As `touch`; also the KeyID of the memory: the TD's own, or 0 for shared memory."""
        self.module.require_guest(lp)
        td = Td(self.memory, self.cpu.tdr_inside(lp))
        td.map_tdcs(self.memory)
        view = self.memory.words.view
        gpaw = 52 if view[td.tdcs + Tdcs.GPAW] else 48
        if not 0 <= gpa < 1 << gpaw:
            raise ValueError(
                f"GPA {gpa:#x} is not in this guest's address space; "
                f"allowed are 0..{(1 << gpaw) - 1:#x} (GPAW {gpaw})"
            )
        root, keyid = view[td.tdcs + Tdcs.EPTP], td.hkid
        tag, level = root & HPA_MASK, root >> 3 & 7
        if gpa >> gpaw - 1:
            root, keyid = self._shared_root(lp), 0
        result: Walked = EptViolation(gpa, access, True)
        if root:
            result = self.cpu.access(lp, root & HPA_MASK, level, gpa, access, tag=tag)
        if isinstance(result, Translation):
            return result, keyid
        return self._not_translated(lp, result, rip), keyid

    def _shared_root(self, lp: int) -> int:
        """HPA of the EPT for shared memory that the host gave the vCPU inside `lp`, 0 for none."""
        view = self.memory.words.view
        page = self.memory.frame(self.cpu.vcpu_inside(lp))
        root, initial = view[page + Tdvps.SHARED_EPTP], view[page + Tdvps.PAGE_PA + 4]
        return 0 if root == initial & HPA_MASK else root

    def _not_translated(
        self, lp: int, result: EptViolation | EptMisconfiguration, rip: int | None
    ) -> GuestOutcome:
        """The CPU's answer to an access that the EPT does not serve: a #VE if the entry allows one
        and the guest has read the last one's information, else a VM exit.
        """
        rax, registers = self.guest_registers(lp)
        if isinstance(result, EptMisconfiguration):
            reason = EXIT_EPT_MISCONFIGURATION
            return self.vm_exit(lp, reason, registers, rax=rax, gpa=result.gpa, rip=rip)
        qualification = result.qualification | _LINEAR_ADDRESS_VALID
        if not result.suppress_ve:
            guest = Guest(self.module, lp, rax, registers)
            if not guest.field(Tdvps.VE_VALID):
                reason = EXIT_EPT_VIOLATION
                return inject_ve(guest, reason, qualification=qualification, gpa=result.gpa)
        return self.vm_exit(
            lp,
            EXIT_EPT_VIOLATION,
            registers,
            rax=rax,
            qualification=qualification,
            gpa=result.gpa,
            rip=rip,
        )

    @explained
    def read_guest(self, lp: int, gpa: int, size: int) -> bytes | GuestOutcome:
        """The guest inside `lp` reads `size` bytes of one page at `gpa`.

        Returns the bytes, or what the access led to; see `touch`. A poisoned line ends the TD.
        Refuses what `touch` refuses, and bytes of more than one page: ValueError.
        """
        _require_one_page(gpa, size)
        found, keyid = self._access(lp, gpa, EPT_READ)
        if isinstance(found, GuestOutcome):
            return found
        try:
            return self.memory.read(found.hpa, size, keyid)
        except MachineCheck:
            return self._machine_check(lp)

    @explained
    def write_guest(self, lp: int, gpa: int, data: bytes) -> Translation | GuestOutcome:
        """The guest inside `lp` writes `data` into one page at `gpa`; as `read_guest`."""
        _require_one_page(gpa, len(data))
        found, keyid = self._access(lp, gpa, EPT_READ | EPT_WRITE)
        if isinstance(found, Translation):
            self.memory.write(found.hpa, data, keyid)
        return found

    def _machine_check(self, lp: int) -> GuestOutcome:
        rax, registers = self.guest_registers(lp)
        return self.vm_exit(lp, EXIT_EXCEPTION, registers, rax=rax, interruption=_MACHINE_CHECK)

    @explained
    def take_exception(self, lp: int) -> int:
        """The vector of the exception that waits for the guest inside `lp`, 0 for none. The guest
        is in its handler from then on.
        """
        self.module.require_guest(lp)
        word = self.memory.frame(self.cpu.vcpu_inside(lp)) + Tdvps.PENDING_EVENT
        event = self.memory.words.view[word]
        if event:
            self.memory.words.put(word, 0)
        return event & 0xFF

    # -- the lab bench

    @property
    def seamcalls(self) -> Mapping[str, int]:
        """Name of each leaf that was called, such as "TDH.MEM.PAGE.AUG" -> calls since the machine
        was made; 0 for one that was not. A number that is no leaf's is "leaf 250".

        Refuses other names: KeyError.
        """
        counts = LeafCounts()
        for leaf, calls in self.trace.seamcalls().items():
            counts[HOST_LEAVES[leaf].name if leaf in HOST_LEAVES else f"leaf {leaf}"] = calls
        return MappingProxyType(counts)

    def mark(self) -> Mark:
        """Remember the present state; changes are recorded from now on."""
        return self.journal.mark()

    def rewind(self, mark: Mark) -> None:
        """Go back to the state at `mark`."""
        self.journal.rewind(mark)

    def digest(self, *, counters: bool = True) -> str:
        """SHA-256 of the whole machine: equal digests, equal machines.

        counters: False leaves out how often things were called and counted.
        """
        return self.journal.digest(without=None if counters else self.trace.words)


def _require_one_page(gpa: int, size: int) -> None:
    if not 0 < size <= PAGE_SIZE - gpa % PAGE_SIZE:
        raise ValueError(
            f"{size} bytes at GPA {gpa:#x} are not within one page; "
            f"allowed are 1..{PAGE_SIZE - gpa % PAGE_SIZE} bytes there"
        )
