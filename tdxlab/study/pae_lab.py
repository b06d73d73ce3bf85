"""A guest with a few processes under shadow paging, on a tape of steps.

    lab = PaeLab(design=SPECIAL, guest=TWO_LEVELS)
    lab.use(process=2, gib=3)        # CR3 is loaded, the guest uses its page there
    lab.zap(gib=3)                   # KVM zaps the page directory behind a slot
    lab.tape.seek(5)                 # ... stands in the middle

Each process has a page of its own in the first and in the last GiB; the PDPTEs of the two GiB
between are absent in a PAE guest.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any, NamedTuple, cast

from tdxlab.bare import BareMachine
from tdxlab.bits import MASK64
from tdxlab.hardware import Region
from tdxlab.kvm.pae_cpu import FINE
from tdxlab.kvm.pae_guest import RWU
from tdxlab.kvm.pae_pdpte import (
    PDPTES,
    X86_CR0_PG,
    X86_CR0_WP,
    X86_CR4_PAE,
    X86_CR4_PSE,
    make_nonleaf_spte,
    reserved_bits_set,
)
from tdxlab.kvm.role import Role
from tdxlab.kvm.shadow import kvm_mmu_zap_all_fast, zap_page
from tdxlab.kvm.shadow_params import AMD, INTEL, SPECIAL, MemoryMap, ShadowParams
from tdxlab.kvm.shadow_roots import design_of
from tdxlab.kvm.shadow_run import access, set_cr0, set_cr3, set_cr4, start
from tdxlab.kvm.shadow_vm import ShadowPage, ShadowVcpu
from tdxlab.kvm.tdp_set import HostBug
from tdxlab.step_tape import StepTape
from tdxlab.steps import Operation, Step, run

PAGING_OFF, TWO_LEVELS, PAE = "paging off", "2 levels", "PAE"
GUESTS = (PAGING_OFF, TWO_LEVELS, PAE)
MAX_PROCESSES = 6
#: GiB in which each process has a page.
USED_GIB = (0, 3)

#: What can be put into a slot on purpose -> how it is made of what stands there.
SPOILS: dict[str, Callable[[int], int]] = {
    "an ordinary non-leaf SPTE": lambda directory: make_nonleaf_spte(directory, 0),
    "all ones": lambda directory: MASK64,
    "the accessed bit set": lambda directory: directory | 0x21,
    "not present, else all ones": lambda directory: MASK64 - 1,
    "0": lambda directory: 0,
}

#: What a use comes to when KVM follows a slot that leads nowhere.
HOST_CRASH = "the host crashes"

_SIZE = 0x1000
_MAP = MemoryMap(
    dma32=(Region(0x7F3A_5000, 16 * _SIZE),),
    normal=(
        Region(0x1_4000_1000, 2 * _SIZE),
        Region(0x5555_5000, _SIZE),
        Region(0x2_0000_3000, 200 * _SIZE),
    ),
    guest=Region(0x1_0000_0000, 128 * _SIZE),
)
_CR3, _DIRECTORIES, _TABLES, _DATA = 0x1000, 0x10000, 0x20000, 0x40000


class SlotRow(NamedTuple):
    """One entry of a root as it stands in memory. bad: its reserved bits that are set."""

    slot: int
    raw: int
    present: bool
    bad: int


class PageRow(NamedTuple):
    """One shadow page. gfn: in hexadecimal. links: how many entries link it."""

    hpa: int
    level: int
    gfn: str
    quadrant: int
    roots: int
    links: int
    state: str


class PaeLab:
    """A VM whose guest has processes, and the tape that it is on.

    design: of DESIGNS. vendor: INTEL or AMD. guest: of GUESTS. maxphyaddr: 36 to 52. encrypted: the
    host has a C-bit, its highest address bit (AMD only). vcpus: 1 or more. Refuses what does not
    exist: ValueError.
    """

    def __init__(
        self,
        *,
        design: str = SPECIAL,
        vendor: str = INTEL,
        guest: str = TWO_LEVELS,
        maxphyaddr: int = 46,
        encrypted: bool = False,
        vcpus: int = 1,
        memory_map: MemoryMap = _MAP,
        **more: Any,
    ) -> None:
        if guest not in GUESTS:
            raise ValueError(f"there is no guest {guest!r}; choose from {', '.join(GUESTS)}")
        if encrypted and vendor != AMD:
            raise ValueError("memory encryption with a C-bit is AMD's; choose AMD, or no C-bit")
        c_bit = maxphyaddr - 1 if encrypted else None
        self.params = ShadowParams(maxphyaddr, c_bit, vendor, design, **more)
        self.guest = guest
        self.vm = start(self.params, vcpus=vcpus, memory_map=memory_map)
        self._write_tables()
        for vcpu in self.vm.vcpus:
            self._turn_on(vcpu)
        self.tape = StepTape(cast(BareMachine, self.vm))

    # -- the guest's tables

    def _write_tables(self) -> None:
        for process in range(MAX_PROCESSES):
            for gib in USED_GIB:
                self._write_path(process, gib)

    def _write_path(self, process: int, gib: int) -> None:
        """The entries that lead to a process's page in a GiB."""
        vm, number = self.vm, 2 * process + USED_GIB.index(gib)
        directory, table = _DIRECTORIES + _SIZE * number, _TABLES + _SIZE * number
        page = _DATA + _SIZE * number
        if self.guest == PAE:
            vm.write_guest(self.cr3(process) + 8 * gib, directory | 1, 8)
            vm.write_guest(directory, table | RWU, 8)
            vm.write_guest(table, page | RWU, 8)
        elif self.guest == TWO_LEVELS:
            vm.write_guest(self.cr3(process) + 4 * (gib << 8), table | RWU, 4)
            vm.write_guest(table, page | RWU, 4)

    def _turn_on(self, vcpu: ShadowVcpu) -> None:
        run(set_cr3(vcpu, self.cr3(0)))
        if self.guest != PAGING_OFF:
            run(set_cr4(vcpu, X86_CR4_PAE if self.guest == PAE else X86_CR4_PSE))
            run(set_cr0(vcpu, X86_CR0_WP | X86_CR0_PG))

    def cr3(self, process: int) -> int:
        """CR3 of a process."""
        return _CR3 + _SIZE * process

    # -- what can be done

    def use(self, process: int = 0, gib: int = 0, *, vcpu: int = 0) -> str:
        """The guest runs a process, which uses its page in a GiB; says what came of it.

        Refuses a process, GiB or vCPU that is not there: ValueError.
        """
        for name, value, count in (
            ("process", process, MAX_PROCESSES),
            ("GiB", gib, PDPTES),
            ("vCPU", vcpu, len(self.vm.vcpus)),
        ):
            if not 0 <= value < count:
                raise ValueError(f"{name} {value}; choose 0 to {count - 1}")
        name = f"process {process} uses GiB {gib}"
        return self._perform(name, lambda: self._use(process, gib, vcpu), lp=vcpu)

    def _use(self, process: int, gib: int, number: int) -> Generator[Step, None, str]:
        vcpu = self.vm.vcpus[number]
        if vcpu.cr3 != self.cr3(process):
            yield ("MOV CR3", self.cr3(process))
            loaded = yield from set_cr3(vcpu, self.cr3(process))
            if loaded != FINE:
                return str(loaded)
        came = yield from access(vcpu, gib << 30)
        return came.kind

    def _perform(self, name: str, operation: Callable[[], Operation], *, lp: int = 0) -> str:
        """Record an operation of KVM's. Refuses to go on after a crash: ValueError."""
        done = self.tape.actions[: self.tape.position]
        if any(HOST_CRASH in action.name for action in done):
            raise ValueError("the host has crashed: go back, or build a new VM")
        return str(self.tape.perform(name, lambda: _until_a_crash(operation()), lp=lp))

    def use_cr3(self, cr3: int, va: int) -> int:
        """Run with CR3 at process 0's value first, then at another; HPA that `va` leads to then."""
        vcpu = self.vm.vcpus[0]
        run(access(vcpu, va))
        run(set_cr3(vcpu, cr3))
        hpa: int = run(access(vcpu, va)).hpa
        return hpa

    def zap(self, gib: int) -> str:
        """KVM zaps the page directory behind a slot of vCPU 0's root.

        Refuses a slot that links nothing: ValueError.
        """
        slot = self._slots()[gib]
        sp = self.vm.sps.get(self.vm.address(slot))
        if sp is None:
            raise ValueError(f"slot {gib} links no page directory; let the guest use GiB {gib}")
        name = f"zap the directory of GiB {gib}"
        return self._perform(name, lambda: zap_page(self.vm, sp.spt))

    def zap_all(self) -> str:
        """KVM makes everything obsolete at once."""
        return self._perform("zap everything", lambda: kvm_mmu_zap_all_fast(self.vm))

    def spoil(self, gib: int, what: str) -> None:
        """A bug of KVM's: something else is stored into a slot of vCPU 0's root, which leaves the
        guest for it. Refuses a root that is not there, and what is not in SPOILS: ValueError.
        """
        if what not in SPOILS:
            raise ValueError(f"cannot store {what!r}; choose from {', '.join(SPOILS)}")
        if not any(self._slots()) or self.vm.vcpus[0].root.hpa < 0:
            raise ValueError("there is no root to spoil; let the guest use a page first")
        self._perform(f"store {what} into slot {gib}", lambda: self._spoil(gib, what))

    def _spoil(self, gib: int, what: str) -> Generator[Step, None, None]:
        vm, vcpu = self.vm, self.vm.vcpus[0]
        vm.exit_guest(vcpu)
        value = SPOILS[what](vm.address(self._slots()[gib]))
        yield ("store PDPTE", gib, value)
        vm.write(vcpu.root.hpa + 8 * gib, value)

    # -- what there is to see

    def _slots(self) -> tuple[int, ...]:
        return design_of(self.vm).slots(self.vm.vcpus[0]) or (0,) * PDPTES

    def slots(self) -> list[SlotRow]:
        """The four entries of vCPU 0's root in memory; zeros while there is none."""
        return [
            SlotRow(slot, raw, bool(raw & 1), reserved_bits_set(raw, self.params.maxphyaddr))
            for slot, raw in enumerate(self._slots())
        ]

    def pages(self) -> list[PageRow]:
        """Every shadow page: upper levels first, then by gfn and quadrant."""
        return [
            PageRow(
                sp.spt,
                sp.level,
                hex(sp.gfn),
                quadrant_of(sp),
                sp.root_count,
                len(sp.parents),
                "invalid" if sp.is_invalid else "out of sync" if sp.unsync else "in use",
            )
            for sp in sorted(self.vm.sps.values(), key=_place)
        ]

    def registers(self) -> list[int]:
        """The PDPTE registers of vCPU 0 on Intel; [] while it is out, and on AMD."""
        vcpu = self.vm.vcpus[0]
        has_them = vcpu.in_guest and self.params.vendor == INTEL
        return list(vcpu.hardware) if has_them else []

    def low_pages(self) -> int:
        """Pages below 4 GiB that are out for PAE roots, used or kept ready."""
        return len(self.vm.pages.dma32.in_use)


def _until_a_crash(operation: Operation) -> Generator[Step, None, Any]:
    """The operation; HOST_CRASH if KVM follows an entry that leads nowhere in it."""
    try:
        return (yield from operation)
    except HostBug:
        return HOST_CRASH


def quadrant_of(sp: ShadowPage) -> int:
    """The quadrant of a page that shadows entries of 4 bytes, else 0."""
    role = Role(sp.role)
    return role.quadrant if role.has_4_byte_gpte else 0


def _place(sp: ShadowPage) -> tuple[int, int, int, int]:
    return -sp.level, sp.gfn, quadrant_of(sp), sp.spt
