"""Setting SPTEs: beside others or alone, the hooks around a mirror, and what must never be."""

from collections.abc import Generator
from errno import EBUSY, EIO
from typing import Any

import pytest
from mmubench import MmuBench, tdx_bench

from tdxlab.kvm.hugepage import track_possible_nx_huge_page
from tdxlab.kvm.locks import READ, WRITE
from tdxlab.kvm.pages import NO_PAGE
from tdxlab.kvm.role import LEVEL_MASK, child_role
from tdxlab.kvm.spte import (
    DIRTY_MASK,
    FROZEN_SPTE,
    HOST_WRITABLE_MASK,
    MMU_WRITABLE_MASK,
    PT_PAGE_SIZE_MASK,
    PT_WRITABLE_MASK,
    SHADOW_NONPRESENT_VALUE,
    SPTE_MMU_PRESENT_MASK,
    make_mmio_spte,
    make_nonleaf_spte,
    make_spte,
)
from tdxlab.kvm.tdp_iter import TdpIter, gfn_root_bits
from tdxlab.kvm.tdp_set import (
    HostBug,
    handle_changed_spte,
    handle_removed_pt,
    kvm_mmu_page_as_id,
    needs_atomic_write,
    remove_external_spte,
    tdp_mmu_iter_set_spte,
    tdp_mmu_link_sp,
    tdp_mmu_set_spte,
    tdp_mmu_set_spte_atomic,
    tdp_mmu_split_huge_page,
    write_spte,
)
from tdxlab.kvm.vm import MmuPage
from tdxlab.steps import WAIT, Schedule, Step, exhaustive, run

EMPTY = SHADOW_NONPRESENT_VALUE
PFN = 0x1234
#: A 2 MiB page.
BIG_PFN = 0x1200


class Tree:
    """One root of a bench, with gfn 0 mapped, so that every table for gfns below 0x200 is there."""

    def __init__(self, *, mirror: bool) -> None:
        self.bench: MmuBench = tdx_bench() if mirror else MmuBench()
        self.vm, self.hooks = self.bench.vm, self.bench.hooks
        self.vcpu = self.bench.load()
        self.mirror = mirror
        self.bench.map(self.vcpu, 0, mirror=mirror)
        self.root = self.bench.root(self.vcpu, mirror=mirror)

    def at(self, gfn: int, level: int = 1) -> TdpIter:
        """An iterator that stands at the entry for `gfn`."""
        walk = TdpIter(self.vm, self.root, level, gfn, gfn_root_bits(self.vm, self.root))
        return next(it for it in walk.walk(gfn + 1) if it.level == level)

    def leaf(self, level: int = 1, pfn: int = PFN) -> int:
        role = self.root.role & ~LEVEL_MASK | level
        return make_spte(self.vm, role=role, access=7, pfn=pfn)

    def spte(self, gfn: int, level: int = 1) -> int:
        return self.vm.memory.words.view[self.at(gfn, level).word]

    def put(self, gfn: int, spte: int, level: int = 1) -> None:
        self.vm.memory.words.put(self.at(gfn, level).word, spte)

    def table(self, gfn: int, level: int, *, external: bool = True) -> MmuPage:
        """A new table for below the entry for `gfn` at `level`."""
        external_spt = NO_PAGE
        if self.mirror and external:
            external_spt = self.bench.pages.alloc_page("external page table")
        role = child_role(self.root.role & ~LEVEL_MASK | level)
        spt = self.bench.pages.alloc_page("page table")
        sp = MmuPage(spt, role, gfn, external_spt, self.at(gfn, level).word)
        self.vm.init_table(sp)
        return sp

    def bugs(self) -> list[str]:
        return [event[1] for event in self.bench.told("bug")]

    def warnings(self) -> list[str]:
        return [event[1] for event in self.bench.told("warn")]


@pytest.fixture
def direct() -> Tree:
    return Tree(mirror=False)


@pytest.fixture
def mirror() -> Tree:
    return Tree(mirror=True)


@pytest.fixture
def locked(mirror: Tree) -> Tree:
    """The mirror, with mmu_lock held for write."""
    run(mirror.vm.mmu_lock.lock(WRITE))
    return mirror


# ---- shared: direct ------------------------------------------------------------------------------


def test_tdp_mmu_set_spte_atomic_stores_and_tells(direct: Tree) -> None:
    new = direct.leaf()
    it = direct.at(5)
    assert run(tdp_mmu_set_spte_atomic(direct.vm, it, new)) == 0
    assert direct.spte(5) == new
    assert direct.bench.events == [("spte_changed", 0, 1, 5, EMPTY, new)]
    assert direct.vm.stats["pages_4k"] == 2
    assert direct.hooks.calls == []


def test_tdp_mmu_set_spte_atomic_ebusy_and_looks_again_when_the_entry_changed(
    direct: Tree,
) -> None:
    it, other = direct.at(5), direct.leaf(pfn=7)
    direct.put(5, other)
    assert run(tdp_mmu_set_spte_atomic(direct.vm, it, direct.leaf())) == -EBUSY
    assert it.old_spte == direct.spte(5) == other
    assert direct.bench.events == []


def test_tdp_mmu_set_spte_atomic_yields_just_before_its_cmpxchg(direct: Tree) -> None:
    new = direct.leaf()
    labels = list(tdp_mmu_set_spte_atomic(direct.vm, direct.at(5), new))
    assert labels == [("cmpxchg SPTE", 5, 1, EMPTY, new)]


def test_tdp_mmu_set_spte_atomic_of_two_vcpus_one_wins(direct: Tree) -> None:
    outcomes = set()

    def make() -> list[Any]:
        return [
            tdp_mmu_set_spte_atomic(direct.vm, direct.at(5), direct.leaf(pfn=pfn)) for pfn in (1, 2)
        ]

    for schedule in exhaustive(make, direct.bench.journal):
        results = schedule.results[0], schedule.results[1]
        assert sorted(results) == [-EBUSY, 0]
        assert direct.spte(5) == direct.leaf(pfn=1 + results.index(0))
        assert direct.vm.stats["pages_4k"] == 2
        outcomes.add(results)
    assert len(outcomes) == 2


@pytest.mark.parametrize("how", ["yielded", "frozen"])
def test_tdp_mmu_set_spte_atomic_warns_of_a_stale_iterator(direct: Tree, how: str) -> None:
    if how == "frozen":
        direct.put(5, FROZEN_SPTE)
    it = direct.at(5)
    it.yielded = how == "yielded"
    run(tdp_mmu_set_spte_atomic(direct.vm, it, direct.leaf()))
    assert direct.warnings() == [
        "tdp_mmu_set_spte_atomic: the iterator yielded, or saw a frozen entry"
    ]


# ---- shared: mirror ------------------------------------------------------------------------------


def test_tdp_mmu_set_spte_atomic_freezes_a_mirror_entry_around_the_hook(mirror: Tree) -> None:
    new, seen = mirror.leaf(), []
    for step in tdp_mmu_set_spte_atomic(mirror.vm, mirror.at(5), new):
        seen.append((step[0], mirror.spte(5)))
    assert seen == [
        ("cmpxchg FROZEN_SPTE", EMPTY),
        ("set", FROZEN_SPTE),
        ("publish SPTE", FROZEN_SPTE),
    ]
    assert mirror.spte(5) == new
    assert mirror.hooks.calls == [("set", 5, 1, PFN)]
    assert mirror.bench.events == [("spte_changed", 0, 1, 5, EMPTY, new)]


@pytest.mark.parametrize("error", [-EBUSY, -EIO])
@pytest.mark.parametrize("hook", ["set", "link"])
def test_tdp_mmu_set_spte_atomic_restores_the_entry_when_a_hook_fails(
    mirror: Tree, hook: str, error: int
) -> None:
    mirror.hooks.errors[hook] = error
    gfn, level = (5, 1) if hook == "set" else (0x200, 2)
    stats = mirror.vm.stats
    if hook == "set":
        operation = tdp_mmu_set_spte_atomic(mirror.vm, mirror.at(gfn), mirror.leaf())
    else:
        sp = mirror.table(gfn, level)
        operation = tdp_mmu_link_sp(mirror.vm, mirror.at(gfn, level), sp, shared=True)
    schedule = Schedule([operation])
    labels = []
    while schedule.advance(0):
        labels.append(schedule.labels[0][0])
    assert labels[-1] == "restore SPTE"
    assert schedule.results[0] == error
    assert mirror.spte(gfn, level) == EMPTY
    assert mirror.vm.stats == stats
    assert mirror.bench.events == []


def test_tdp_mmu_set_spte_atomic_of_two_vcpus_calls_one_hook(mirror: Tree) -> None:
    outcomes = set()

    def make() -> list[Any]:
        return [
            tdp_mmu_set_spte_atomic(mirror.vm, mirror.at(5), mirror.leaf(pfn=pfn)) for pfn in (1, 2)
        ]

    for schedule in exhaustive(make, mirror.bench.journal):
        results = schedule.results[0], schedule.results[1]
        assert sorted(results) == [-EBUSY, 0]
        winner = 1 + results.index(0)
        assert mirror.spte(5) == mirror.leaf(pfn=winner)
        assert mirror.hooks.calls == [("set", 5, 1, winner)]
        mirror.hooks.calls.clear()
        outcomes.add(results)
    assert len(outcomes) == 2


def test_tdp_mmu_set_spte_atomic_keeps_the_losers_view_of_a_mirror_entry(mirror: Tree) -> None:
    it = mirror.at(5)
    mirror.put(5, mirror.leaf(pfn=7))
    assert run(tdp_mmu_set_spte_atomic(mirror.vm, it, mirror.leaf())) == -EBUSY
    assert it.old_spte == EMPTY
    assert mirror.hooks.calls == []


def test_tdp_mmu_set_spte_atomic_maps_a_large_page_by_the_hook_for_leaves(mirror: Tree) -> None:
    new = mirror.leaf(2, BIG_PFN)
    assert run(tdp_mmu_set_spte_atomic(mirror.vm, mirror.at(0x200, 2), new)) == 0
    assert mirror.hooks.calls == [("set", 0x200, 2, BIG_PFN)]


def test_tdp_mmu_set_spte_atomic_bug_and_ebusy_when_it_would_clear_a_mirror_entry(
    mirror: Tree,
) -> None:
    old = mirror.spte(0)
    assert run(tdp_mmu_set_spte_atomic(mirror.vm, mirror.at(0), EMPTY)) == -EBUSY
    assert mirror.bugs() == ["a mirror entry cannot be cleared under the shared lock"]
    assert mirror.vm.vm_dead
    assert mirror.spte(0) == old
    assert mirror.hooks.calls == []


def test_tdp_mmu_set_spte_atomic_freezes_a_mirror_entry_without_a_hook(mirror: Tree) -> None:
    assert run(tdp_mmu_set_spte_atomic(mirror.vm, mirror.at(5), FROZEN_SPTE)) == 0
    assert mirror.spte(5) == FROZEN_SPTE
    assert mirror.hooks.calls == []
    assert not mirror.vm.vm_bugged


def test_set_external_spte_present_bug_when_the_mirror_entry_was_present(mirror: Tree) -> None:
    old = mirror.spte(0)
    run(tdp_mmu_set_spte_atomic(mirror.vm, mirror.at(0), old & ~DIRTY_MASK))
    assert mirror.bugs() == ["set_external_spte_present: the mirror entry is present already"]


def test_set_external_spte_present_bug_when_a_table_has_no_external_page(mirror: Tree) -> None:
    sp = mirror.table(0x200, 2, external=False)
    run(tdp_mmu_link_sp(mirror.vm, mirror.at(0x200, 2), sp, shared=True))
    assert mirror.bugs() == ["get_external_spt: the table has no external page"]


@pytest.mark.parametrize("gfn", [0x400, 0x201])
def test_set_external_spte_present_warns_of_a_table_from_elsewhere(mirror: Tree, gfn: int) -> None:
    sp = mirror.table(0x200, 2)._replace(gfn=gfn)
    mirror.vm.sps.put(sp.spt, sp)
    run(tdp_mmu_link_sp(mirror.vm, mirror.at(0x200, 2), sp, shared=True))
    assert mirror.warnings() == ["get_external_spt: the table does not belong under this entry"]
    assert not mirror.vm.vm_bugged


# ---- exclusive -----------------------------------------------------------------------------------


def test_tdp_mmu_iter_set_spte_stores_without_a_yield(direct: Tree) -> None:
    it = direct.at(5)
    assert list(tdp_mmu_iter_set_spte(direct.vm, it, direct.leaf())) == []
    assert direct.spte(5) == direct.leaf()
    assert it.old_spte == EMPTY


def test_tdp_mmu_iter_set_spte_warns_after_a_yield(direct: Tree) -> None:
    it = direct.at(5)
    it.yielded = True
    run(tdp_mmu_iter_set_spte(direct.vm, it, direct.leaf()))
    assert direct.warnings() == ["tdp_mmu_iter_set_spte: the iterator yielded"]


@pytest.mark.parametrize(("old", "new"), [(FROZEN_SPTE, EMPTY), (EMPTY, FROZEN_SPTE)])
def test_tdp_mmu_set_spte_warns_of_frozen_entries(direct: Tree, old: int, new: int) -> None:
    word = direct.at(5).word
    run(tdp_mmu_set_spte(direct.vm, 0, word, old, new, 5, 1, mirror=False))
    expected = "tdp_mmu_set_spte: frozen entries exist under the shared lock only"
    assert direct.warnings()[0] == expected
    assert direct.spte(5) == new


def test_tdp_mmu_set_spte_bug_when_it_would_install_a_mirror_entry(locked: Tree) -> None:
    run(tdp_mmu_iter_set_spte(locked.vm, locked.at(5), locked.leaf()))
    assert locked.bugs() == [
        "tdp_mmu_set_spte: a mirror entry is installed under the exclusive lock"
    ]


def test_tdp_mmu_set_spte_clears_a_mirror_leaf_and_then_removes_its_page(locked: Tree) -> None:
    pfn = locked.spte(0) >> 12 & (1 << 40) - 1
    seen = [
        (step[0], locked.spte(0)) for step in tdp_mmu_iter_set_spte(locked.vm, locked.at(0), EMPTY)
    ]
    assert seen == [("remove", EMPTY)]
    assert locked.hooks.calls == [("remove", 0, 1, pfn)]
    assert locked.vm.stats["pages_4k"] == 0


@pytest.mark.parametrize("error", [-EBUSY, -EIO])
def test_remove_external_spte_bug_when_the_hook_fails(locked: Tree, error: int) -> None:
    locked.hooks.errors["remove"] = error
    run(tdp_mmu_iter_set_spte(locked.vm, locked.at(0), EMPTY))
    assert locked.bugs() == [f"remove_external_spte: gfn 0x0 could not be removed ({error})"]
    assert locked.vm.vm_dead
    assert locked.spte(0) == EMPTY


@pytest.mark.parametrize("mode", [None, READ])
def test_remove_external_spte_demands_the_exclusive_lock(mirror: Tree, mode: str | None) -> None:
    if mode is not None:
        run(mirror.vm.mmu_lock.lock(mode))
    with pytest.raises(AssertionError):
        run(remove_external_spte(mirror.vm, 0, mirror.spte(0), 1))
    assert mirror.hooks.calls == []


def test_remove_external_spte_leaves_links_to_others(locked: Tree) -> None:
    run(remove_external_spte(locked.vm, 0, locked.spte(0, 2), 2))
    assert locked.hooks.calls == []


def test_write_spte_takes_what_others_wrote_meanwhile_where_they_may(direct: Tree) -> None:
    word, clean = direct.at(0).word, direct.leaf() & ~DIRTY_MASK
    direct.vm.memory.words.put(word, clean | DIRTY_MASK)
    assert write_spte(direct.vm, word, clean, EMPTY, 1) == clean | DIRTY_MASK
    direct.vm.memory.words.put(word, direct.leaf())
    assert write_spte(direct.vm, word, EMPTY, EMPTY, 1) == EMPTY
    assert direct.spte(0) == EMPTY


def test_needs_atomic_write_for_leaves_that_change_without_the_lock(direct: Tree) -> None:
    leaf, link = direct.leaf(), direct.spte(0, 2)
    assert not needs_atomic_write(leaf, 1)
    assert needs_atomic_write(leaf & ~DIRTY_MASK, 1)
    assert needs_atomic_write(leaf & ~PT_WRITABLE_MASK, 1)
    assert needs_atomic_write(leaf & ~DIRTY_MASK | PT_PAGE_SIZE_MASK, 2)
    assert not needs_atomic_write(link & ~DIRTY_MASK, 2)
    assert not needs_atomic_write(leaf & ~DIRTY_MASK & ~SPTE_MMU_PRESENT_MASK, 1)


# ---- what a change brings with it ----------------------------------------------------------------


def changed(tree: Tree, old: int, new: int, *, gfn: int = 0, level: int = 1) -> None:
    run(handle_changed_spte(tree.vm, 0, gfn, old, new, level, shared=False))


def test_handle_changed_spte_stops_the_host_when_a_leaf_changes_its_page(direct: Tree) -> None:
    with pytest.raises(HostBug, match=r"gfn 0x5: a present leaf changed its page"):
        changed(direct, direct.leaf(), direct.leaf(pfn=PFN + 1), gfn=5)
    assert direct.bench.events == []


def test_handle_changed_spte_does_nothing_without_a_change(direct: Tree) -> None:
    changed(direct, direct.leaf(), direct.leaf())
    assert direct.bench.events == []
    assert direct.vm.stats["pages_4k"] == 1


def test_handle_changed_spte_warns_of_a_gfn_that_is_not_aligned(direct: Tree) -> None:
    changed(direct, EMPTY, direct.leaf(2, BIG_PFN), gfn=0x201, level=2)
    assert direct.warnings() == ["handle_changed_spte: gfn 0x201 is not aligned to level 2"]


def test_handle_changed_spte_warns_when_an_absent_entry_changes_for_no_reason(
    direct: Tree,
) -> None:
    changed(direct, EMPTY, EMPTY | 1 << 40)
    assert len(direct.warnings()) == 1
    assert direct.warnings()[0].startswith("unexpected change of a non-present SPTE")


@pytest.mark.parametrize("kind", ["frozen", "to MMIO", "from MMIO"])
def test_handle_changed_spte_lets_absent_entries_be_frozen_or_mmio(direct: Tree, kind: str) -> None:
    mmio = make_mmio_spte(direct.vm, 0, 3)
    old, new = {
        "frozen": (EMPTY, FROZEN_SPTE),
        "to MMIO": (EMPTY, mmio),
        "from MMIO": (mmio, EMPTY),
    }[kind]
    changed(direct, old, new)
    assert direct.warnings() == []
    assert direct.bench.events == [("spte_changed", 0, 1, 0, old, new)]
    assert direct.vm.stats["pages_4k"] == 1


@pytest.mark.parametrize(
    ("cleared", "wrong"),
    [
        (MMU_WRITABLE_MASK, "writable, but not MMU-writable"),
        (HOST_WRITABLE_MASK, "MMU-writable, but not host-writable"),
    ],
)
def test_handle_changed_spte_warns_of_inconsistent_write_bits(
    direct: Tree, cleared: int, wrong: str
) -> None:
    changed(direct, EMPTY, direct.leaf() & ~cleared)
    assert direct.warnings() == [f"check_spte_writable_invariants: {wrong}"]


@pytest.mark.parametrize(("level", "name"), [(1, "pages_4k"), (2, "pages_2m"), (3, "pages_1g")])
def test_handle_changed_spte_counts_leaves_of_each_level(
    direct: Tree, level: int, name: str
) -> None:
    before = direct.vm.stats[name]
    leaf = direct.leaf(level, pfn=0)
    changed(direct, EMPTY, leaf, level=level)
    assert direct.vm.stats[name] == before + 1
    changed(direct, leaf, leaf & ~DIRTY_MASK, level=level)
    assert direct.vm.stats[name] == before + 1
    changed(direct, leaf, EMPTY, level=level)
    assert direct.vm.stats[name] == before


@pytest.mark.parametrize("new", ["empty", "leaf", "link"])
def test_handle_changed_spte_takes_the_table_of_a_vanished_link_apart(
    direct: Tree, new: str
) -> None:
    link = direct.spte(0, 2)
    sp = direct.vm.sp_of(link)
    other = direct.table(0, 2)
    values = {
        "empty": EMPTY,
        "leaf": direct.leaf(2, BIG_PFN),
        "link": make_nonleaf_spte(direct.vm, other.spt, ad_disabled=False),
    }
    changed(direct, link, values[new], level=2)
    assert direct.vm.stats["pages_4k"] == 0
    assert direct.vm.rcu_pending == 1
    assert direct.vm.memory.words.view[direct.vm.table_base(sp.spt)] == FROZEN_SPTE
    direct.vm.rcu_barrier()
    assert sp.spt not in direct.vm.sps


def test_handle_changed_spte_keeps_a_table_whose_link_changed_its_bits(direct: Tree) -> None:
    link = direct.spte(0, 2)
    changed(direct, link, link & ~PT_WRITABLE_MASK, level=2)
    assert direct.vm.rcu_pending == 0


# ---- tables that go ------------------------------------------------------------------------------


def test_handle_removed_pt_removes_pages_before_tables_from_the_bottom_up(locked: Tree) -> None:
    for gfn in (3, 0x1FF):
        locked.put(gfn, locked.leaf(pfn=gfn))
        locked.vm.update_page_stats(1, 1)
    run(tdp_mmu_iter_set_spte(locked.vm, locked.at(0, 3), EMPTY))
    assert [call[:3] for call in locked.hooks.calls] == [
        ("remove", 0, 1),
        ("remove", 3, 1),
        ("remove", 0x1FF, 1),
        ("free", 0, 1),
        ("free", 0, 2),
    ]
    assert locked.bench.changes() == [(3, 0), (2, 0), (1, 0), (1, 3), (1, 0x1FF)]
    stats = locked.vm.stats
    assert (stats["pages_4k"], stats["pt_pages"], stats["pt_pages_mirror"]) == (0, 1, 1)


def test_handle_removed_pt_frees_both_pages_of_a_table_after_a_grace_period(locked: Tree) -> None:
    sp = locked.vm.sp_of(locked.spte(0, 2))
    run(tdp_mmu_iter_set_spte(locked.vm, locked.at(0, 2), EMPTY))
    assert locked.bench.pages.use_of(sp.external_spt)
    locked.vm.rcu_barrier()
    assert not locked.bench.pages.use_of(sp.spt)
    assert not locked.bench.pages.use_of(sp.external_spt)
    assert not locked.bench.pages.leaked


def test_handle_removed_pt_warns_and_leaks_what_the_hook_cannot_free(locked: Tree) -> None:
    locked.hooks.errors["free"] = -EIO
    sp = locked.vm.sp_of(locked.spte(0, 2))
    run(tdp_mmu_iter_set_spte(locked.vm, locked.at(0, 2), EMPTY))
    locked.vm.rcu_barrier()
    assert locked.warnings() == [
        f"free_external_spt failed ({-EIO}): the page {sp.external_spt:#x} is leaked"
    ]
    assert locked.bench.pages.leaked == {sp.external_spt: "free_external_spt failed"}
    assert not locked.bench.pages.use_of(sp.spt)
    assert not locked.vm.vm_bugged


def test_handle_removed_pt_bug_when_a_mirrors_table_goes_under_the_shared_lock(
    locked: Tree,
) -> None:
    run(handle_removed_pt(locked.vm, locked.vm.sp_of(locked.spte(0, 2)), shared=True))
    assert locked.bugs()[0] == "handle_removed_pt: a mirror's table goes under the shared lock"


def test_handle_removed_pt_freezes_every_entry_beside_others(direct: Tree) -> None:
    sp = direct.vm.sp_of(direct.spte(0, 2))
    it = direct.at(0, 2)
    steps = list(tdp_mmu_set_spte_atomic(direct.vm, it, EMPTY))
    assert [step[0] for step in steps] == ["cmpxchg SPTE", *["xchg FROZEN_SPTE"] * 512]
    base = direct.vm.table_base(sp.spt)
    assert set(direct.vm.memory.words.view[base : base + 512]) == {FROZEN_SPTE}


def test_handle_removed_pt_alone_freezes_what_is_present_only(direct: Tree) -> None:
    sp = direct.vm.sp_of(direct.spte(0, 2))
    run(tdp_mmu_iter_set_spte(direct.vm, direct.at(0, 2), EMPTY))
    base = direct.vm.table_base(sp.spt)
    assert direct.vm.memory.words.view[base] == FROZEN_SPTE
    assert set(direct.vm.memory.words.view[base + 1 : base + 512]) == {EMPTY}


def test_handle_removed_pt_waits_for_who_has_an_entry_frozen(direct: Tree) -> None:
    word, leaf = direct.at(5).word, direct.leaf()
    direct.put(5, FROZEN_SPTE)
    schedule = Schedule([tdp_mmu_set_spte_atomic(direct.vm, direct.at(0, 2), EMPTY)])
    while schedule.advance(0) and schedule.labels[0][0] != WAIT:
        pass
    assert schedule.labels[0] == (WAIT, "frozen SPTE", 5, 1)
    for _ in range(3):
        schedule.advance(0)
    assert schedule.labels[0] == (WAIT, "frozen SPTE", 5, 1)
    direct.vm.memory.words.put(word, leaf)
    direct.vm.update_page_stats(1, 1)
    while schedule.advance(0):
        assert schedule.labels[0][0] != WAIT
    assert ("spte_changed", 0, 1, 5, leaf, FROZEN_SPTE) in direct.bench.events
    assert direct.vm.stats["pages_4k"] == 0


def test_handle_removed_pt_beside_a_fault_in_the_same_table(direct: Tree) -> None:
    """Whoever comes first: the page that is mapped meanwhile goes with the table, or its fault
    retries.
    """
    results = set()
    for late in (1, 3, 8, 400):
        mark = direct.bench.journal.mark()
        zap = tdp_mmu_set_spte_atomic(direct.vm, direct.at(0, 2), EMPTY)
        fault = tdp_mmu_set_spte_atomic(direct.vm, direct.at(5), direct.leaf())
        schedule = Schedule([zap, fault])
        schedule.advance(1)
        for _ in range(late):
            schedule.advance(0)
        assert not schedule.advance(1)
        while 0 in schedule.ready:
            schedule.advance(0)
        assert direct.vm.stats["pages_4k"] == 0
        results.add((late, schedule.results[1]))
        direct.bench.journal.rewind(mark)
        direct.bench.journal.forget(mark)
    assert results == {(1, 0), (3, 0), (8, -EBUSY), (400, -EBUSY)}


def test_handle_removed_pt_forgets_that_the_table_stood_for_a_large_page(direct: Tree) -> None:
    sp = direct.vm.sp_of(direct.spte(0, 2))._replace(nx_huge_page_disallowed=True)
    direct.vm.sps.put(sp.spt, sp)
    track_possible_nx_huge_page(direct.vm, sp)
    assert direct.vm.stats["nx_lpage_splits"] == 1
    run(tdp_mmu_iter_set_spte(direct.vm, direct.at(0, 2), EMPTY))
    assert direct.vm.stats["nx_lpage_splits"] == 0
    assert not direct.vm.possible_nx_huge_pages


def test_kvm_mmu_page_as_id_is_1_for_smm(direct: Tree) -> None:
    assert kvm_mmu_page_as_id(direct.root) == 0
    assert kvm_mmu_page_as_id(direct.root._replace(role=direct.root.role | 1 << 24)) == 1


# ---- tables that come ----------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [True, False])
def test_tdp_mmu_link_sp_links_and_counts(direct: Tree, shared: bool) -> None:
    sp = direct.table(0x200, 2)
    before = direct.vm.stats["pt_pages"]
    assert run(tdp_mmu_link_sp(direct.vm, direct.at(0x200, 2), sp, shared=shared)) == 0
    assert direct.vm.sp_of(direct.spte(0x200, 2)) == sp
    assert direct.vm.stats["pt_pages"] == before + 1
    assert direct.vm.stats["pt_pages_mirror"] == 0


def test_tdp_mmu_link_sp_gives_the_external_page_to_the_hook(mirror: Tree) -> None:
    sp = mirror.table(0x200, 2)
    given: list[tuple[int, int, int]] = []

    def link(gfn: int, level: int, external_spt: int) -> Generator[Step, None, int]:
        yield ("link",)
        given.append((gfn, level, external_spt))
        return 0

    mirror.hooks.link_external_spt = link  # type: ignore[method-assign]
    assert run(tdp_mmu_link_sp(mirror.vm, mirror.at(0x200, 2), sp, shared=True)) == 0
    assert given == [(0x200, 2, sp.external_spt)]
    assert mirror.vm.stats["pt_pages_mirror"] == mirror.vm.stats["pt_pages"] == 4


def test_tdp_mmu_link_sp_counts_nothing_when_it_lost(direct: Tree) -> None:
    sp, it = direct.table(0x200, 2), direct.at(0x200, 2)
    direct.put(0x200, direct.leaf(2, BIG_PFN), 2)
    before = direct.vm.stats
    assert run(tdp_mmu_link_sp(direct.vm, it, sp, shared=True)) == -EBUSY
    assert direct.vm.stats == before


@pytest.mark.parametrize("shared", [True, False])
def test_tdp_mmu_split_huge_page_maps_the_same_pages(direct: Tree, shared: bool) -> None:
    direct.bench.map(direct.vcpu, 0x200, level=2)
    sp = direct.table(0x200, 2)
    assert run(tdp_mmu_split_huge_page(direct.vm, direct.at(0x200, 2), sp, shared=shared)) == 0
    children = [direct.spte(gfn) for gfn in (0x200, 0x201, 0x3FF)]
    assert [child >> 12 & (1 << 40) - 1 for child in children] == [0x200, 0x201, 0x3FF]
    assert not any(child & PT_PAGE_SIZE_MASK for child in children)
    stats = direct.vm.stats
    assert (stats["pages_2m"], stats["pages_4k"]) == (0, 513)


def test_tdp_mmu_split_huge_page_counts_nothing_when_it_lost(direct: Tree) -> None:
    direct.bench.map(direct.vcpu, 0x200, level=2)
    sp, it = direct.table(0x200, 2), direct.at(0x200, 2)
    direct.put(0x200, EMPTY, 2)
    before = direct.vm.stats
    assert run(tdp_mmu_split_huge_page(direct.vm, it, sp, shared=True)) == -EBUSY
    assert direct.vm.stats == before


def test_tdp_mmu_split_huge_page_of_two_vcpus_one_wins(direct: Tree) -> None:
    direct.bench.map(direct.vcpu, 0x200, level=2)
    tables = [direct.table(0x200, 2) for _ in range(2)]

    def make() -> list[Any]:
        return [
            tdp_mmu_split_huge_page(direct.vm, direct.at(0x200, 2), sp, shared=True)
            for sp in tables
        ]

    for schedule in exhaustive(make, direct.bench.journal):
        results = [schedule.results[0], schedule.results[1]]
        assert sorted(results) == [-EBUSY, 0]
        assert direct.vm.sp_of(direct.spte(0x200, 2)) == tables[results.index(0)]
        assert direct.vm.stats["pages_4k"] == 513
