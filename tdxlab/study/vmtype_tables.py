"""VM types side by side: what each deed does to a VM of each type, observed on real ones.

    matrix()                             # a row for each deed and type
    observe("SNP", "punch hole")         # one of them

Nothing here knows the answers: entries are counted before and after.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

from matplotlib.axes import Axes

from tdxlab.kvm.vm_types import (
    KINDS,
    LEGACY_SEV_ES,
    Offers,
    by_flags,
    kvm_caps_supported_vm_types,
    kvm_is_vm_type_supported,
)
from tdxlab.steps import run
from tdxlab.study.palette import BLACK, GREEN, ORANGE, SKY, VERMILLION, Look
from tdxlab.study.plots import Series, stacked_bars
from tdxlab.study.undone import undone
from tdxlab.study.vmtype_lab import DEEDS, NAMES, Counts, Deed, TypeLab
from tdxlab.study.zap_matrix import PAGES


class FlagRow(NamedTuple):
    """The flags of one type. no: its number. spaces: address spaces for memslots."""

    vm: str
    no: int
    has_private_mem: bool
    has_protected_state: bool
    pre_fault_allowed: bool
    has_mirrored_tdp: bool
    spaces: int


class OfferRow(NamedTuple):
    """What KVM_CAP_VM_TYPES says on one host. bitmap: in binary, type 0 at the right."""

    host: str
    bitmap: str
    types: str


class DeedRow(NamedTuple):
    """What one deed does to a VM of one type.

    answer: to user space. maps: pages that it maps, by root. private, shared: pages of that kind
    that lose their mapping; beside: pages of the other slot that do. seamcalls: but for entries.
    rmp: entries of the RMP changed. flushes: remote TLB flushes.
    """

    deed: str
    vm: str
    answer: str
    maps: str
    private: int
    shared: int
    beside: int
    seamcalls: int
    rmp: int
    flushes: int

    def words(self) -> str:
        """The row in a few words: +1 direct: a page is mapped there; -2 p: two private pages lose
        their mapping, s: shared ones, beside: of another slot.
        """
        if self.answer != "ok":
            return self.answer
        gone = {"p": self.private, "s": self.shared, "beside": self.beside}
        parts = [f"+{self.maps}"] if self.maps else []
        parts += [f"-{number} {kind}" for kind, number in gone.items() if number]
        parts += [f"{self.rmp} RMP"] if self.rmp else []
        many = "s" * (self.seamcalls > 1)
        parts += [f"{self.seamcalls} SEAMCALL{many}"] if self.seamcalls else []
        return ", ".join(parts) or "ok"


class WordRow(NamedTuple):
    """One use of a page that is not mapped. attribute: what user space has set. guest_says: what
    the guest's page tables say, "-" if they cannot. comes_to: the root that maps it, or an exit.
    """

    vm: str
    attribute: str
    guest_says: str
    comes_to: str


class StoryRow(NamedTuple):
    """One deed after another on the same VM. leaves: mapped afterwards. rmp: entries changed."""

    deed: str
    answer: str
    leaves: int
    rmp: int
    seamcalls: int


class ShortRow(NamedTuple):
    """One deed and what it does to a VM of each type, in a few words."""

    deed: str
    default: str
    sw_protected: str
    sev: str
    sev_es: str
    snp: str
    tdx: str


KIND_NAMES = {True: "private", False: "shared"}


def flag_rows(gpaw: int = 48) -> list[FlagRow]:
    """A row for each type, read from a VM that was just created; and the old way to start SEV-ES,
    from its flags.
    """
    rows = []
    for name in NAMES:
        lab = TypeLab(name, gpaw=gpaw, launched=False)
        vm = lab.gate.vm
        flags = vm.features._replace(pre_fault_allowed=vm.pre_fault_allowed)
        rows.append(FlagRow(name, lab.kind.vm_type, *flags, vm.slots.spaces))
    old = LEGACY_SEV_ES
    return [*rows, FlagRow(old.name, old.vm_type, *by_flags(old), rows[old.vm_type].spaces)]


def offer_rows() -> list[OfferRow]:
    """Hosts with different CPUs and build options."""
    hosts = {
        "neither": Offers(),
        "with the build option for tests": Offers(sw_protected=True),
        "the same without the TDP MMU": Offers(sw_protected=True, tdp=False),
        "AMD with all of it": Offers(sev=True, sev_es=True, snp=True),
        "Intel with the TDX module up": Offers(tdx=True),
    }
    rows = []
    for host, offers in hosts.items():
        bitmap = kvm_caps_supported_vm_types(offers)
        names = [k.name for k in KINDS if kvm_is_vm_type_supported(k.vm_type, bitmap)]
        rows.append(OfferRow(host, f"{bitmap:#08b}", ", ".join(names)))
    return rows


# -- the matrix


def observe(vm: str, deed: str, *, gpaw: int = 48) -> DeedRow | None:
    """The row of one deed for one type; None where such a VM cannot meet it.

    Refuses names that are not in NAMES and DEEDS: ValueError.
    """
    found = next((each for each in DEEDS if each.name == deed), None)
    if found is None or vm not in NAMES:
        deeds = ", ".join(each.name for each in DEEDS)
        raise ValueError(f"{vm!r}, {deed!r}: choose of {', '.join(NAMES)} and of {deeds}")
    return observed(_lab_for(vm, found, gpaw), found)


def _lab_for(name: str, deed: Deed, gpaw: int) -> TypeLab:
    return TypeLab(name, gpaw=gpaw, launched=not deed.early, quirk=deed.quirk)


def observed(lab: TypeLab, deed: Deed) -> DeedRow | None:
    """The row of a deed for the VM of a lab, which is unchanged afterwards."""
    if deed.private and not lab.is_private:
        return None
    with undone(lab.machine):
        before = lab.counts()
        private = {gfn for gfn in range(PAGES) if lab.is_private_gfn(gfn)}
        answer = str(run(lab.operation(deed.name)))
        return _row(lab, deed, answer, private, before, lab.counts())


def _row(
    lab: TypeLab, deed: Deed, answer: str, private: set[int], before: Counts, after: Counts
) -> DeedRow:
    gone = {gfn for _, gfn in before.leaves - after.leaves}
    new = sorted(root for root, _ in after.leaves - before.leaves)
    return DeedRow(
        deed.name,
        lab.name,
        answer,
        ", ".join(f"{new.count(root)} {root}" for root in dict.fromkeys(new)),
        len(gone & private),
        len(gone & set(range(PAGES)) - private),
        sum(gfn >= PAGES for gfn in gone),
        after.seamcalls - before.seamcalls,
        after.rmp - before.rmp,
        after.flushes - before.flushes,
    )


def matrix(*, gpaw: int = 48) -> list[DeedRow]:
    """A row for each deed and each type that can meet it."""
    labs: dict[tuple[str, bool, bool], TypeLab] = {}
    rows = []
    for deed, name in product(DEEDS, NAMES):
        key = name, deed.early, deed.quirk
        labs[key] = labs.get(key) or _lab_for(name, deed, gpaw)
        rows.append(observed(labs[key], deed))
    return [row for row in rows if row is not None]


def short_matrix(rows: Sequence[DeedRow]) -> list[ShortRow]:
    """The rows of `matrix()` with one column for each type."""
    words = {(row.deed, row.vm): row.words() for row in rows}
    return [
        ShortRow(deed, *(words.get((deed, name), "-") for name in NAMES))
        for deed in dict.fromkeys(row.deed for row in rows)
    ]


def word_rows(*, gpaw: int = 48) -> list[WordRow]:
    """Each type with private memory, each attribute, each thing that its guest can say."""
    rows = []
    for name in NAMES:
        lab = TypeLab(name, gpaw=gpaw)
        if not lab.is_private:
            continue
        for attribute, private in product((True, False), repeat=2):
            says = "-" if lab.is_mute else KIND_NAMES[private]
            came = lab.use_as(attribute=attribute, private=private)
            rows.append(WordRow(name, KIND_NAMES[attribute], says, came))
    return list(dict.fromkeys(rows))


def story_rows(vm: str, *deeds: str, gpaw: int = 48) -> list[StoryRow]:
    """The deeds one after another on a VM of one type. Refuses as `TypeLab.do`."""
    lab, rows = TypeLab(vm, gpaw=gpaw), []
    for deed in deeds:
        before = lab.counts()
        answer, after = lab.do(deed), lab.counts()
        work = after.rmp - before.rmp, after.seamcalls - before.seamcalls
        rows.append(StoryRow(deed, answer, len(after.leaves), *work))
    return rows


# -- plots

#: Pages that a deed takes the mapping of -> their look.
GONE = (
    Look("private", GREEN, BLACK, "P", ""),
    Look("shared", ORANGE, BLACK, "S", "//"),
    Look("beside", VERMILLION, BLACK, "B", "xx"),
)
#: What hardware is told -> its look.
CALLS = (Look("SEAMCALLs", SKY, BLACK, "C", "\\\\"), Look("RMP updates", ORANGE, BLACK, "R", "//"))


def plot_gone(rows: Sequence[DeedRow], ax: Axes) -> Axes:
    """Pages that lose their mapping, for each row."""
    values = ([row.private for row in rows], [row.shared for row in rows])
    series = [Series(look, each) for look, each in zip(GONE, (*values, _beside(rows)), strict=True)]
    return stacked_bars(ax, _labels(rows), series, unit="pages", title="Mappings gone")


def plot_calls(rows: Sequence[DeedRow], ax: Axes) -> Axes:
    """What the deed tells the hardware, for each row."""
    values = ([row.seamcalls for row in rows], [row.rmp for row in rows])
    series = [Series(look, each) for look, each in zip(CALLS, values, strict=True)]
    return stacked_bars(ax, _labels(rows), series, unit="calls", title="Told to the hardware")


def _beside(rows: Sequence[DeedRow]) -> list[int]:
    return [row.beside for row in rows]


def _labels(rows: Sequence[DeedRow]) -> list[str]:
    return [f"{row.deed.rpartition(': ')[2]}, {row.vm}" for row in rows]


def rows_of(rows: Sequence[DeedRow], *deeds: str, vms: Sequence[str] = NAMES) -> list[DeedRow]:
    """The rows of some deeds on some types."""
    return [row for row in rows if row.deed in deeds and row.vm in vms]
