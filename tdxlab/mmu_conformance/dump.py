"""The page tables of a VM as a trace shows them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tdxlab.arch import ENTRIES_PER_TABLE, HPA_MASK, LEVEL_BITS
from tdxlab.kvm.role import INVALID
from tdxlab.kvm.spte import SHADOW_NONPRESENT_VALUE
from tdxlab.kvm.tdp_set import kvm_mmu_page_as_id
from tdxlab.kvm.vm import MmuPage, Vm
from tdxlab.mmu_conformance.record import Row, split_spte, stride
from tdxlab.mmu_conformance.rig import root_kind

_EMPTY_TABLE = [SHADOW_NONPRESENT_VALUE] * ENTRIES_PER_TABLE
#: No SPTE at all.
_NOTHING = -1


def roots(vm: Vm) -> tuple[dict[str, Any], ...]:
    """Every root in the order of `tdp_mmu_roots`, with all entries that are not empty."""
    return tuple(_root(vm, vm.sps[hpa]) for hpa in vm.tdp_mmu_roots)


def _root(vm: Vm, root: MmuPage) -> dict[str, Any]:
    tables = dict.fromkeys((str(level) for level in range(1, root.level + 1)), 0)
    return {
        "root": root_kind(root),
        "level": root.level,
        "invalid": int(bool(root.role & INVALID)),
        "refcount": vm.root_count[root.spt],
        "as_id": kvm_mmu_page_as_id(root),
        "sptes": tuple(_rows(vm, root_kind(root), root.spt, root.level, 0, tables)),
        "pt_pages": tables,
    }


def _rows(
    vm: Vm, kind: str, spt: int, level: int, gfn: int, tables: dict[str, int]
) -> Iterator[Row]:
    """The entries of the table at `spt` and, behind each link, of what is below it. tables: counts
    the tables of each level.
    """
    tables[str(level)] += 1
    base, size = vm.table_base(spt), 1 << LEVEL_BITS * (level - 1)
    entries = vm.memory.words.view[base : base + ENTRIES_PER_TABLE].tolist()
    if entries == _EMPTY_TABLE:
        return
    row: Row = ()
    following, step, count = _NOTHING, 0, 0
    for index, spte in enumerate(entries):
        if spte == following:
            count += 1
            following += step
            continue
        yield from _folded(row, count)
        row, following = (), _NOTHING
        if spte == SHADOW_NONPRESENT_VALUE:
            continue
        first, beside = gfn + index * size, stride(spte, level)
        row, count = (kind, level, first, *split_spte(spte, level)), 1
        if beside is None:
            yield row
            yield from _rows(vm, kind, spte & HPA_MASK, level - 1, first, tables)
            row = ()
        else:
            following, step = spte + beside, beside
    yield from _folded(row, count)


def _folded(row: Row, count: int) -> Iterator[Row]:
    """A row with the number of entries it stands for."""
    if row:
        yield row if count == 1 else (*row, count)
