"""Tables on PAE roots, every number from the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from tdxlab.bits import MASK64
from tdxlab.hardware import Region
from tdxlab.kvm.pae_cpu import enter_guest, mov_to_cr3, walk_pdpte
from tdxlab.kvm.pae_pdpte import (
    make_nonleaf_spte,
    make_pdpte_spte,
    make_root_pdpte,
    reserved_bits_set,
)
from tdxlab.kvm.pae_rules import complaints
from tdxlab.kvm.shadow_params import AMD, DESIGNS, INTEL, REVIEWED, MemoryMap
from tdxlab.kvm.spte import SHADOW_NONPRESENT_VALUE
from tdxlab.study.pae_lab import PAE, SPOILS, TWO_LEVELS, USED_GIB, PaeLab

#: A page directory above 4 GiB.
DIRECTORY = 0x1_4000_1000


class EntryRow(NamedTuple):
    """One value as a PDPTE. raw: the value. reserved: its illegal bits, "" for none."""

    entry: str
    raw: int
    present: bool
    reserved: str
    verdict: str


class OutcomeRow(NamedTuple):
    """One table of four entries, and what comes of it at each moment."""

    table: str
    mov_cr3: str
    intel_entry: str
    amd_entry: str
    amd_first_use: str


class SpoilRow(NamedTuple):
    """Something else in slot 3, and what the guest gets that uses GiB 3, and GiB 0."""

    stored: str
    vendor: str
    gib_3: str
    gib_0: str


class SwitchRow(NamedTuple):
    """Roots built in one round over some processes, for each design."""

    processes: int
    special: int
    rfc: int
    reviewed: int


class MemoryRow(NamedTuple):
    """Pages below 4 GiB that are out for PAE roots. processes: different CR3 values in use."""

    vcpus: int
    processes: int
    design: str
    low_pages: int


class CountRow(NamedTuple):
    """What the same story counts under each design."""

    counted: str
    special: int
    rfc: int
    reviewed: int


class BreakRow(NamedTuple):
    """A step left out, what the guest gets, and the first rule that is broken."""

    left_out: str
    guest_gets: str
    rule_broken: str


def _verdict(raw: int, maxphyaddr: int) -> str:
    return "refused" if reserved_bits_set(raw, maxphyaddr) else "fine"


def entry_rows(maxphyaddr: int) -> list[EntryRow]:
    """Values that turn up where a PDPTE stands, and what a CPU makes of them."""
    values = {
        "special root's slot": make_root_pdpte(DIRECTORY, 0),
        "RFC's link": make_pdpte_spte(DIRECTORY, 0),
        "ordinary link": make_nonleaf_spte(DIRECTORY, 0),
        "INVALID_PAE_ROOT": 0,
        "INVALID_PAGE": MASK64,
        "SHADOW_NONPRESENT_VALUE": SHADOW_NONPRESENT_VALUE,
        "highest address bit": make_root_pdpte(DIRECTORY, 1 << maxphyaddr - 1),
        "one bit too high": make_root_pdpte(DIRECTORY, 1 << min(maxphyaddr, 63)),
        "bit 63 (NX elsewhere)": make_root_pdpte(DIRECTORY, 1 << 63),
    }
    return [
        EntryRow(
            name,
            raw,
            bool(raw & 1),
            _bits_named(reserved_bits_set(raw, maxphyaddr)),
            _verdict(raw, maxphyaddr),
        )
        for name, raw in values.items()
    ]


def _bits_named(bits: int) -> str:
    """Bit numbers, highest first; runs as "63:46"."""
    runs: list[list[int]] = []
    for bit in range(63, -1, -1):
        if bits >> bit & 1:
            if runs and runs[-1][1] == bit + 1:
                runs[-1][1] = bit
            else:
                runs.append([bit, bit])
    return ", ".join(f"{high}:{low}" if high > low else str(high) for high, low in runs)


def outcome_rows(maxphyaddr: int) -> list[OutcomeRow]:
    """Five tables; `amd_first_use` is the use of GiB 3."""
    good, bad = make_root_pdpte(DIRECTORY, 0), make_nonleaf_spte(DIRECTORY, 0)
    tables: dict[str, Sequence[int]] = {
        "four present": (good,) * 4,
        "only 0 and 3 present": (good, 0, 0, good),
        "none present": (0,) * 4,
        "slot 3 illegal": (good, good, good, bad),
        "slot 1 illegal": (good, bad, good, good),
    }
    return [
        OutcomeRow(
            name,
            mov_to_cr3(table, maxphyaddr),
            enter_guest(INTEL, table, maxphyaddr),
            enter_guest(AMD, table, maxphyaddr),
            walk_pdpte(AMD, table, 3 << 30, maxphyaddr),
        )
        for name, table in tables.items()
    ]


def spoil_rows(maxphyaddr: int) -> list[SpoilRow]:
    """Every one of SPOILS in slot 3 of a special root, on both vendors."""
    rows = []
    for vendor in (INTEL, AMD):
        for what in SPOILS:
            kinds = []
            for gib in (3, 0):
                lab = PaeLab(vendor=vendor, maxphyaddr=maxphyaddr)
                lab.use(0, 0)
                lab.use(0, 3)
                lab.spoil(3, what)
                kinds.append(lab.use(0, gib))
            rows.append(SpoilRow(what, vendor, *kinds))
    return rows


# -- designs side by side


def switch_rows(guest: str = TWO_LEVELS, most: int = 6) -> list[SwitchRow]:
    """Roots built in a round over 1 to `most` processes, after two rounds."""
    return [
        SwitchRow(count, *(built_in_a_round(design, count, guest) for design in DESIGNS))
        for count in range(1, most + 1)
    ]


def built_in_a_round(design: str, processes: int, guest: str = TWO_LEVELS) -> int:
    """Roots that one round over so many processes builds when two rounds are done."""
    lab = PaeLab(design=design, guest=guest)
    for _ in range(2):
        run_round(lab, processes)
    before = lab.vm.counts["roots_built"]
    run_round(lab, processes)
    return lab.vm.counts["roots_built"] - before


def run_round(lab: PaeLab, processes: int) -> None:
    """Each process runs once and uses its page in GiB 3."""
    for process in range(processes):
        lab.use(process, 3)


def memory_rows(vcpu_counts: Sequence[int] = (1, 2, 4)) -> list[MemoryRow]:
    """All vCPUs in one process, and each in its own."""
    return [
        MemoryRow(vcpus, processes, design, low_pages(design, vcpus, processes))
        for vcpus in vcpu_counts
        for processes in sorted({1, vcpus})
        for design in DESIGNS
    ]


def low_pages(design: str, vcpus: int, processes: int) -> int:
    """Pages below 4 GiB that are out when vCPU i runs process i modulo `processes`."""
    lab = PaeLab(design=design, vcpus=vcpus)
    for vcpu in range(vcpus):
        lab.use(vcpu % processes, 3, vcpu=vcpu)
    return lab.low_pages()


_COUNTED = (
    "roots_built",
    "roots_reused",
    "sp_lookups",
    "sp_created",
    "slots_stored",
    "pdptes_checked",
    "tlb_flush_current",
    "remote_tlb_flush",
    "vm_entries",
    "roots_allocated",
)


def count_rows(guest: str = TWO_LEVELS, vendor: str = INTEL) -> list[CountRow]:
    """Four processes take turns, three rounds; everything is zapped; one more round."""
    counts = []
    for design in DESIGNS:
        lab = PaeLab(design=design, guest=guest, vendor=vendor)
        for _ in range(3):
            run_round(lab, 4)
        lab.zap_all()
        run_round(lab, 4)
        counts.append(lab.vm.counts)
    return [CountRow(name, *(count[name] for count in counts)) for name in _COUNTED]


# -- what goes wrong without


def break_rows(maxphyaddr: int) -> list[BreakRow]:
    """Steps that cannot be left out."""
    no_decryption = PaeLab(
        vendor=AMD, encrypted=True, maxphyaddr=maxphyaddr, forget=frozenset({"decrypt"})
    )
    no_clearing = PaeLab(design=REVIEWED, forget=frozenset({"clear role"}))
    return [
        _break_row("decrypting the root", no_decryption),
        _break_row("clearing pae_root in a child's role", no_clearing),
        shared_key_row(),
        stale_register_row(),
    ]


def _break_row(name: str, lab: PaeLab) -> BreakRow:
    came = [lab.use(0, gib) for gib in USED_GIB]
    broken = complaints(lab.vm)
    return BreakRow(name, " / ".join(came), broken[0] if broken else "none")


def shared_key_row() -> BreakRow:
    """Two PDPTs of a PAE guest in one page, and a root that is found by gfn and role alone."""
    lab = PaeLab(design=REVIEWED, guest=PAE, pdptes_in_key=False)
    vm = lab.vm
    other = lab.cr3(0) + 32
    for index in range(4):
        vm.write_guest(other + 8 * index, vm.read_guest(lab.cr3(1) + 8 * index, 8) or 0, 8)
    right = vm.map.guest.base + 0x40000 + 0x1000 * 2
    hpa = lab.use_cr3(other, 0)
    came = "its own page" if hpa == right else "the page of another process"
    return BreakRow("PDPTEs in the key of a PAE guest's root", came, "none")


def stale_register_row() -> BreakRow:
    """A directory is freed while another vCPU has it in a PDPTE register, and nobody kicks that."""
    lab = PaeLab(design=REVIEWED, vcpus=2, kicks=False)
    lab.use(0, 3)
    lab.use(0, 3, vcpu=1)
    lab.zap(3)
    held = lab.vm.address(lab.vm.vcpus[1].hardware[3])
    is_freed = held not in lab.vm.pages.in_use
    came = "a directory that is free memory" if is_freed else "its own directory"
    return BreakRow("kicking vCPUs at a remote flush", came, "none")


def tight_map(low: int, normal: int) -> MemoryMap:
    """So many free pages below 4 GiB and elsewhere."""
    return MemoryMap(
        dma32=(Region(0x7F3A_5000, low << 12),),
        normal=(Region(0x1_4000_1000, normal << 12),),
        guest=Region(0x1_0000_0000, 128 << 12),
    )


class TightRow(NamedTuple):
    """A host with few free pages, and what the guest's first two uses come to."""

    design: str
    low: int
    elsewhere: int
    first: str
    second: str
    lost: int


def tight_rows() -> list[TightRow]:
    """What each design makes of hosts that run out of pages; `lost`: pages nobody knows of."""
    rows = []
    for design in DESIGNS:
        for low, normal in ((3, 60), (1, 60), (3, 39), (2, 3)):
            lab = PaeLab(design=design, memory_map=tight_map(low, normal))
            first, second = lab.use(0, 0), lab.use(0, 3)
            lost = sum("pages that are out" in text for text in complaints(lab.vm))
            rows.append(TightRow(design, low, normal, first, second, lost))
    return rows
