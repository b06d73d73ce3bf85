"""The software inside a VM: what it does to memory, and how a TD's kernel copes with the answers.

A program is a list of accesses, or a generator that yields them and is sent what came of each:

    def program():
        yield Write(0x1000, b"hello")
        data = yield Read(0x1000, 5)

GPAs are what the CPU puts on its address bus: in a TD the SHARED bit says which memory is meant.

Source: Linux 6.16, arch/x86/coco/tdx/tdx.c (the guest's side of TDX: accept, MapGPA, #VE).
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, Protocol

from tdxlab.abi import leaves as abi
from tdxlab.abi.outcome import GuestOutcome
from tdxlab.abi.registers import Registers
from tdxlab.abi.status import TDX_PAGE_ALREADY_ACCEPTED, TDX_SUCCESS
from tdxlab.accesses import (
    Accept,
    Access,
    Fetch,
    Hlt,
    MapGpa,
    MapGpaAnswer,
    Program,
    Read,
    Write,
    accesses_of,
    pages_of,
    require_kinds,
)
from tdxlab.arch import PAGE_SHIFT, PAGE_SIZE, SIZE_2M
from tdxlab.bare import BareMachine
from tdxlab.cpu import Translation
from tdxlab.journal import Journal, Table
from tdxlab.steps import Step


class GuestPanic(Exception):
    """The guest's kernel gives up; `why` says at what."""

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.why = why


__all__ = [
    "Accept",
    "Access",
    "Fetch",
    "Guest",
    "GuestCpu",
    "GuestPanic",
    "Hlt",
    "Instructions",
    "MapGpa",
    "MapGpaAnswer",
    "Motion",
    "Program",
    "Read",
    "Write",
]

#: The guest in motion: yields TD exits (GuestOutcome) and, between accesses, steps; goes on after
#: the next entry.
Motion = Generator[GuestOutcome | Step, None, Any]

# -- numbers of the guest-host interface. Source: asm/shared/tdx.h

TDVMCALL_HLT = 12
TDVMCALL_MMIO = 48
TDVMCALL_MAP_GPA = 0x10001
TDVMCALL_REPORT_FATAL_ERROR = 0x10003
TDVMCALL_STATUS_SUCCESS = 0
TDVMCALL_STATUS_RETRY = 1

_PASS_R10_TO_R15 = 0xFC00
_VECTOR_VE = 20
_EXIT_TRIPLE_FAULT = 2
_EXIT_EPT_VIOLATION = 48
#: Attempts of MapGPA without progress before the guest gives up. Source: tdx.c, tdx_map_gpa.
_MAX_RETRIES_PER_PAGE = 3


class Instructions(Protocol):
    """What the instructions of a guest inside an LP can do, `BareMachine`'s doors."""

    def touch(
        self, lp: int, gpa: int, *, write: bool = False, fetch: bool = False
    ) -> Translation | GuestOutcome:
        """Use one byte."""
        ...

    def read_guest(self, lp: int, gpa: int, size: int) -> bytes | GuestOutcome:
        """Read bytes of one page."""
        ...

    def write_guest(self, lp: int, gpa: int, data: bytes) -> Translation | GuestOutcome:
        """Write bytes of one page."""
        ...

    def interrupt(self, lp: int) -> GuestOutcome:
        """An interrupt takes the guest out of `lp`."""
        ...


class Guest:
    """The kernel inside one VM, and what it knows of its memory.

    door: what its instructions do. gpaw: width of a TD's GPAs, 0 for a VM that is no TD. width:
    bits of a GPA. accepts: the kernel accepts a private page before it first uses it, as Linux
    does; without that the first use of a page ends in a #VE or the TD's death. accepted, shared:
    frames that it has accepted, and converted to shared memory.
    """

    def __init__(
        self,
        journal: Journal,
        door: Instructions,
        *,
        gpaw: int = 0,
        width: int = 48,
        accepts: bool = True,
    ) -> None:
        self.door = door
        self.gpaw = gpaw
        self.width = gpaw or width
        self.accepts = accepts
        self.shared_mask = 1 << gpaw - 1 if gpaw else 0
        self.accepted = Table(journal)
        self.shared = Table(journal)

    def is_private(self, gpa: int) -> bool:
        """True for a GPA of a TD without the SHARED bit."""
        return bool(self.gpaw) and not gpa & self.shared_mask

    def require(self, access: Access) -> None:
        """Refuse, with a ValueError, what is no access, or uses bytes that no GPA can name."""
        if not isinstance(access, Access):
            raise ValueError(
                f"{access!r} is no access of a guest; "
                "a program yields Read, Write, Fetch, Accept, MapGpa or Hlt"
            )
        require_kinds(access)
        if isinstance(access, Read | Write):
            size = access.size if isinstance(access, Read) else len(access.data)
            self.require_gpa(access.gpa, size)
        elif isinstance(access, Fetch):
            self.require_gpa(access.gpa, 1)

    def require_gpa(self, gpa: int, size: int) -> None:
        """Refuse, with a ValueError, bytes outside of the guest's address space."""
        if size < 1 or not 0 <= gpa <= (1 << self.width) - size:
            raise ValueError(
                f"{size} bytes at GPA {gpa:#x} are not in this guest's address space; give at "
                f"least 1 byte in 0..{(1 << self.width) - 1:#x} ({self.width} bits)"
            )

    def alias(self, gpa: int) -> int:
        """The GPA by which the kernel's page tables map the byte: with the SHARED bit where it has
        converted the page.
        """
        return gpa | self.shared_mask if gpa >> PAGE_SHIFT in self.shared else gpa

    def note_conversion(self, gpa: int, size: int) -> None:
        """The host has converted these bytes: the page tables get the SHARED bit, or lose it, and
        nothing there is accepted. gpa: as in MapGpa.
        """
        first = (gpa & ~self.shared_mask) >> PAGE_SHIFT
        to_shared = bool(gpa & self.shared_mask)
        for gfn in range(first, first + (size >> PAGE_SHIFT)):
            if gfn in self.accepted:
                self.accepted.drop(gfn)
            if to_shared:
                self.shared.put(gfn, None)
            elif gfn in self.shared:
                self.shared.drop(gfn)


class GuestCpu:
    """One vCPU of a guest as its software sees it. lp: where it is inside at present.

    answers: to the accesses of its program. emulated: bytes that the host's emulator read for the
    instruction that the vCPU left at. timer_set: a timer will soon interrupt it.
    """

    def __init__(self, guest: Guest) -> None:
        self.guest = guest
        self.lp = -1
        self.emulated: bytes | None = None
        self.answers: list[Any] = []
        self.timer_set = False

    def execute(self, program: Program) -> Motion:
        """Run `program`; `answers` has what came of its accesses, in order."""
        for access, reply in accesses_of(program):
            self.guest.require(access)
            yield ("guest", access)
            answer = yield from self.perform(access)
            self.answers.append(answer)
            reply(answer)

    def perform(self, access: Access) -> Motion:
        """One access, until it is done."""
        if isinstance(access, Write):
            return (yield from self._write(access.gpa, access.data))
        if isinstance(access, Read):
            return (yield from self._read(access.gpa, access.size))
        if isinstance(access, Fetch):
            return (yield from self._fetch(access.gpa))
        if isinstance(access, Accept):
            return (yield from self._accept(access.gpa, access.sept_level))
        if isinstance(access, MapGpa):
            return (yield from self._map_gpa(access.gpa, access.size))
        return (yield from self._hlt(access.timer))

    # -- memory

    def _read(self, gpa: int, size: int) -> Motion:
        door = self.guest.door
        pieces = []
        for start, length in pages_of(gpa, size):
            yield from self._prepare(start)
            found = door.read_guest(self.lp, start, length)
            while isinstance(found, GuestOutcome):
                found = (yield from self._interrupted(found, start, length, None)) or (
                    door.read_guest(self.lp, start, length)
                )
            pieces.append(found)
        return b"".join(pieces)

    def _write(self, gpa: int, data: bytes) -> Motion:
        door = self.guest.door
        for start, length in pages_of(gpa, len(data)):
            yield from self._prepare(start)
            piece = data[start - gpa : start - gpa + length]
            found: Any = door.write_guest(self.lp, start, piece)
            while isinstance(found, GuestOutcome):
                found = (yield from self._interrupted(found, start, length, piece)) or (
                    door.write_guest(self.lp, start, piece)
                )

    def _fetch(self, gpa: int) -> Motion:
        yield from self._prepare(gpa)
        door = self.guest.door
        found: Any = door.touch(self.lp, gpa, fetch=True)
        while isinstance(found, GuestOutcome):
            found = (yield from self._interrupted(found, gpa, 1, b"")) or (
                door.touch(self.lp, gpa, fetch=True)
            )

    def _prepare(self, gpa: int) -> Motion:
        """Accept the page of `gpa` if it is private and new to the kernel. A page that is used as
        shared memory has to be accepted before it is private again.
        """
        guest = self.guest
        if not guest.accepts or not guest.gpaw:
            return
        gfn = (gpa & ~guest.shared_mask) >> PAGE_SHIFT
        if gpa & guest.shared_mask:
            if gfn in guest.accepted:
                guest.accepted.drop(gfn)
        elif gfn not in guest.accepted:
            yield from self._accept(gfn << PAGE_SHIFT, 0)

    def _interrupted(
        self, outcome: GuestOutcome, gpa: int, size: int, data: bytes | None
    ) -> Motion:
        """An access led elsewhere. Returns what was read if somebody has emulated it, None if it
        has to be done again.
        """
        if not outcome.exited:
            return (yield from self._exception(gpa, size, data))
        self.emulated = None
        yield outcome
        emulated, self.emulated = self.emulated, None
        return emulated

    # -- a TD's kernel

    def _machine(self) -> BareMachine:
        door = self.guest.door
        if not isinstance(door, BareMachine):
            raise GuestPanic("invalid opcode: TDCALL outside of a TD")
        return door

    def _tdcall(self, leaf: int, registers: Registers) -> Motion:
        """One TDCALL, again after an exit or an interrupt; returns (RAX, registers)."""
        machine = self._machine()
        while True:
            outcome = machine.tdcall(self.lp, leaf, registers.copy())
            if outcome.exited:
                yield outcome
            elif outcome.status == leaf and machine.cpu.conditions.interrupt_pending:
                yield machine.interrupt(self.lp)
            else:
                return outcome.status, outcome.registers

    def _vmcall(self, *values: int) -> Motion:
        """TDG.VP.VMCALL with R10 = 0 and R11, R12, ... = values; returns the host's registers."""
        machine = self._machine()
        names = ("r11", "r12", "r13", "r14", "r15")
        registers = Registers(rcx=_PASS_R10_TO_R15, **dict(zip(names, values, strict=False)))
        yield machine.tdcall(self.lp, abi.TDG_VP_VMCALL, registers)
        return machine.guest_registers(self.lp)[1]

    def _accept(self, gpa: int, sept_level: int) -> Motion:
        """Accept a page; a page that was accepted before is as good. Returns the status."""
        registers = Registers(rcx=gpa | sept_level)
        status, _ = yield from self._tdcall(abi.TDG_MEM_PAGE_ACCEPT, registers)
        if status in (TDX_SUCCESS, TDX_PAGE_ALREADY_ACCEPTED + sept_level):
            gfn = gpa >> PAGE_SHIFT
            for number in range(gfn, gfn + (1 << 9 * sept_level)):
                self.guest.accepted.put(number, None)
        return status

    def _map_gpa(self, gpa: int, size: int) -> Motion:
        """Have the host convert memory; what became private is accepted at once.

        Source: tdx.c, tdx_map_gpa, tdx_enc_status_changed.
        """
        start, end, retries = gpa, gpa + size, 0
        while True:
            registers = yield from self._vmcall(TDVMCALL_MAP_GPA, start, end - start)
            if registers.r10 != TDVMCALL_STATUS_RETRY:
                break
            retries = retries + 1 if registers.r11 == start else 0
            if not start <= registers.r11 < end or retries > _MAX_RETRIES_PER_PAGE:
                break
            start = registers.r11
        if registers.r10 != TDVMCALL_STATUS_SUCCESS:
            return MapGpaAnswer(registers.r10, registers.r11)
        self.guest.note_conversion(gpa, size)
        if self.guest.accepts and self.guest.is_private(gpa):
            yield from self._accept_range(gpa, size)
        return MapGpaAnswer(registers.r10, end)

    def _accept_range(self, gpa: int, size: int) -> Motion:
        """Accept memory in the largest pages that the host gives.

        Source: arch/x86/coco/tdx/tdx-shared.c, tdx_accept_memory. Differs: 1 GiB is not tried; no
        module accepts that.
        """
        end = gpa + size
        while gpa < end:
            if gpa % SIZE_2M == 0 and end - gpa >= SIZE_2M:
                status = yield from self._accept(gpa, 1)
                if status == TDX_SUCCESS:
                    gpa += SIZE_2M
                    continue
            status = yield from self._accept(gpa, 0)
            if status not in (TDX_SUCCESS, TDX_PAGE_ALREADY_ACCEPTED):
                raise GuestPanic(f"page {gpa:#x} cannot be accepted: status {status:#x}")
            gpa += PAGE_SIZE

    def _hlt(self, timer: bool) -> Motion:
        """Idle. A TD's kernel asks the host instead of waiting for the #VE.

        Source: tdx.c, tdx_halt.
        """
        if self.guest.gpaw:
            self.timer_set = timer
            yield from self._vmcall(TDVMCALL_HLT)

    def _exception(self, gpa: int, size: int, data: bytes | None) -> Motion:
        """A #VE: MMIO in shared memory is done by the host; private memory that the kernel has not
        accepted is a reason to panic.

        Source: tdx.c, virt_exception_kernel, handle_mmio, ve_raise_fault.
        """
        machine = self._machine()
        vector = machine.take_exception(self.lp)
        if vector != _VECTOR_VE:
            raise GuestPanic(f"exception {vector} at an access to GPA {gpa:#x}")
        _, info = yield from self._tdcall(abi.TDG_VP_VEINFO_GET, Registers())
        if info.rcx != _EXIT_EPT_VIOLATION or self.guest.is_private(info.r9):
            raise GuestPanic(f"#VE at GPA {gpa:#x}: private memory that was never accepted")
        value = int.from_bytes(data or b"", "little")
        answer = yield from self._vmcall(TDVMCALL_MMIO, size, int(data is not None), gpa, value)
        if answer.r10 != TDVMCALL_STATUS_SUCCESS:
            raise GuestPanic(f"the host refused MMIO at GPA {gpa:#x}")
        if data is not None:
            return data or b"\0"
        return int(answer.r11).to_bytes(8, "little")[:size]

    def report_panic(self) -> Motion:
        """A TD's kernel tells the host of its end, another one's CPU shuts down; the host is not
        expected to go on.

        Source: tdx.c, tdx_panic.
        """
        if self.guest.gpaw:
            yield from self._vmcall(TDVMCALL_REPORT_FATAL_ERROR, 0)
        yield GuestOutcome(True, _EXIT_TRIPLE_FAULT, Registers())
