"""Faults in the TDP MMU: tables from the top down, then the leaf, whoever interferes; lookups."""

from errno import EBUSY, EIO
from typing import Any

import pytest
from mmubench import SHARED_BIT, SLOT, MmuBench, tdx_bench

from tdxlab.kvm import caches
from tdxlab.kvm.hugepage import track_possible_nx_huge_page
from tdxlab.kvm.locks import READ
from tdxlab.kvm.page_fault import (
    KVM_PFN_NOSLOT,
    PFERR_FETCH_MASK,
    PFERR_PRIVATE_ACCESS,
    PFERR_WRITE_MASK,
    RET_PF_EMULATE,
    RET_PF_FIXED,
    RET_PF_RETRY,
    RET_PF_SPURIOUS,
    PageFault,
)
from tdxlab.kvm.role import LEVEL_MASK, Role
from tdxlab.kvm.slots import KVM_MEM_LOG_DIRTY_PAGES
from tdxlab.kvm.spte import (
    ACCESSED_MASK,
    FROZEN_SPTE,
    MMU_WRITABLE_MASK,
    PT_PAGE_SIZE_MASK,
    PT_WRITABLE_MASK,
    SHADOW_NONPRESENT_VALUE,
    SPTE_MMU_PRESENT_MASK,
    is_mmio_spte,
    make_spte,
    spte_to_pfn,
)
from tdxlab.kvm.tdp_iter import TdpIter, gfn_root_bits
from tdxlab.kvm.tdp_mmu import (
    alloc_child_sp,
    kvm_tdp_mmu_fast_pf_get_last_sptep,
    kvm_tdp_mmu_get_walk,
    kvm_tdp_mmu_gpa_is_mapped,
    kvm_tdp_mmu_map,
)
from tdxlab.kvm.vm import MmuPage, Vcpu
from tdxlab.steps import Operation, Schedule, exhaustive, run, seeded

EMPTY = SHADOW_NONPRESENT_VALUE
GFN, PFN = 0x205, 0x1405
#: Where a large page of GFN lies.
BIG_GFN, BIG_PFN = 0x200, 0x1400


class Faults:
    """A bench whose vCPUs fault at GFN, with mmu_lock held for read."""

    def __init__(self, *, mirror: bool = False, **config: Any) -> None:
        self.bench: MmuBench = tdx_bench(**config) if mirror else MmuBench(**config)
        self.vm, self.hooks = self.bench.vm, self.bench.hooks
        self.mirror = mirror
        self.vcpus = [self.bench.load(number) for number in range(2)]
        for vcpu in self.vcpus:
            assert caches.mmu_topup_memory_caches(vcpu) == 0
        run(self.vm.mmu_lock.lock(READ))
        self.root = self.bench.root(self.vcpus[0], mirror=mirror)

    def fault(
        self, *, write: bool = True, gfn: int = GFN, pfn: int = PFN, **fields: Any
    ) -> PageFault:
        """A fault whose page is known already; private in a mirror."""
        code = PFERR_WRITE_MASK if write else 0
        code |= PFERR_PRIVATE_ACCESS if self.mirror else 0
        fault = PageFault(gfn << 12, code)
        fault.gfn, fault.pfn, fault.slot = gfn, pfn, SLOT
        fault.max_level, fault.map_writable = 1, True
        for name, value in fields.items():
            setattr(fault, name, value)
        return fault

    def map(self, vcpu: int = 0, **fields: Any) -> Operation:
        return kvm_tdp_mmu_map(self.vcpus[vcpu], self.fault(**fields))

    def at(self, gfn: int = GFN, level: int = 1) -> TdpIter:
        walk = TdpIter(self.vm, self.root, level, gfn, gfn_root_bits(self.vm, self.root))
        return next(it for it in walk.walk(gfn + 1) if it.level == level)

    def spte(self, gfn: int = GFN, level: int = 1) -> int:
        return self.vm.memory.words.view[self.at(gfn, level).word]

    def put(self, spte: int, gfn: int = GFN, level: int = 1) -> None:
        self.vm.memory.words.put(self.at(gfn, level).word, spte)

    def leaf(self, pfn: int = PFN, level: int = 1, **how: Any) -> int:
        role = self.root.role & ~LEVEL_MASK | level
        return make_spte(self.vm, role=role, access=7, pfn=pfn, **how)

    def map_big(self) -> None:
        """A 2 MiB page around GFN."""
        self.bench.map(self.vcpus[0], BIG_GFN, level=2, mirror=self.mirror)
        self.put(self.leaf(BIG_PFN, 2), BIG_GFN, 2)

    def warnings(self) -> list[str]:
        return [event[1] for event in self.bench.told("warn")]

    def tables(self) -> int:
        """Tables that KVM knows, roots among them."""
        return len(self.vm.sps)


@pytest.fixture
def direct() -> Faults:
    return Faults()


@pytest.fixture
def mirror() -> Faults:
    return Faults(mirror=True)


# ---- mapping -------------------------------------------------------------------------------------


def test_kvm_tdp_mmu_map_installs_tables_from_the_top_down_and_then_the_leaf(
    direct: Faults,
) -> None:
    assert run(direct.map()) == RET_PF_FIXED
    assert direct.bench.changes() == [(4, 0), (3, 0), (2, 0x200), (1, GFN)]
    assert direct.spte() == direct.leaf()
    stats = direct.vm.stats
    assert (stats["pages_4k"], stats["pt_pages"], stats["pt_pages_mirror"]) == (1, 3, 0)


def test_kvm_tdp_mmu_map_tells_the_hooks_of_a_mirror_in_the_same_order(mirror: Faults) -> None:
    assert run(mirror.map()) == RET_PF_FIXED
    assert mirror.hooks.calls == [
        ("link", 0, 4),
        ("link", 0, 3),
        ("link", 0x200, 2),
        ("set", GFN, 1, PFN),
    ]
    assert mirror.vm.stats["pt_pages_mirror"] == 3


def test_kvm_tdp_mmu_map_maps_a_shared_gpa_in_the_direct_root() -> None:
    faults = Faults(mirror=True)
    shared = PageFault((GFN | SHARED_BIT) << 12, PFERR_WRITE_MASK)
    shared.gfn, shared.pfn, shared.slot, shared.max_level = GFN, PFN, SLOT, 1
    shared.map_writable = True
    assert run(kvm_tdp_mmu_map(faults.vcpus[0], shared)) == RET_PF_FIXED
    assert faults.hooks.calls == []
    assert faults.bench.leaves(faults.bench.root(faults.vcpus[0])) == [(1, GFN)]
    assert faults.bench.leaves(faults.root) == []
    assert [event[3] for event in faults.bench.told("spte_changed")][-1] == GFN


@pytest.mark.parametrize("level", [1, 2, 4])
def test_kvm_tdp_mmu_map_retry_at_a_frozen_entry(mirror: Faults, level: int) -> None:
    mirror.bench.map(mirror.vcpus[0], GFN + 1, mirror=True)
    mirror.put(FROZEN_SPTE, level=level)
    tables = mirror.tables()
    assert run(mirror.map()) == RET_PF_RETRY
    assert mirror.hooks.calls == []
    assert mirror.tables() == tables
    assert mirror.spte(level=level) == FROZEN_SPTE


@pytest.mark.parametrize("error", [-EBUSY, -EIO])
def test_kvm_tdp_mmu_map_retry_and_frees_the_table_when_its_hook_fails(
    mirror: Faults, error: int
) -> None:
    mirror.hooks.errors["link"] = error
    tables, out = mirror.tables(), len(mirror.bench.pages.in_use)
    assert run(mirror.map()) == RET_PF_RETRY
    assert mirror.hooks.calls == [("link", 0, 4)]
    assert mirror.spte(level=4) == EMPTY
    assert mirror.tables() == tables
    assert len(mirror.bench.pages.in_use) == out - 2
    assert mirror.vm.stats["pt_pages"] == 0


@pytest.mark.parametrize("error", [-EBUSY, -EIO])
def test_kvm_tdp_mmu_map_retry_and_keeps_the_tables_when_the_leafs_hook_fails(
    mirror: Faults, error: int
) -> None:
    mirror.hooks.errors["set"] = error
    assert run(mirror.map()) == RET_PF_RETRY
    assert mirror.spte() == EMPTY
    assert mirror.vm.stats["pt_pages"] == 3
    assert mirror.vm.stats["pages_4k"] == 0
    mirror.hooks.errors.clear()
    mirror.hooks.calls.clear()
    assert run(mirror.map()) == RET_PF_FIXED
    assert mirror.hooks.calls == [("set", GFN, 1, PFN)]


def test_kvm_tdp_mmu_map_splits_a_large_page_that_is_in_the_way(direct: Faults) -> None:
    direct.map_big()
    assert run(direct.map()) == RET_PF_SPURIOUS
    assert [spte_to_pfn(direct.spte(gfn)) for gfn in (BIG_GFN, GFN)] == [BIG_PFN, PFN]
    stats = direct.vm.stats
    assert (stats["pages_2m"], stats["pages_4k"]) == (0, 512)


def test_kvm_tdp_mmu_map_retry_when_somebody_else_split_the_large_page(direct: Faults) -> None:
    direct.map_big()
    tables = direct.tables()
    schedule = Schedule([direct.map()])
    schedule.advance(0)
    direct.put(EMPTY, BIG_GFN, 2)
    assert not schedule.advance(0)
    assert schedule.results[0] == RET_PF_RETRY
    assert direct.tables() == tables


def test_kvm_tdp_mmu_map_bug_when_a_large_page_is_in_a_mirror(mirror: Faults) -> None:
    mirror.map_big()
    run(mirror.map())
    assert mirror.bench.told("bug")[0] == ("bug", "kvm_tdp_mmu_map: a large page in a mirror")
    assert mirror.vm.vm_dead


def test_kvm_tdp_mmu_map_retry_when_the_gfn_cannot_be_walked() -> None:
    faults = Faults(mirror=True)
    fault = faults.fault(gfn=SHARED_BIT << 1)
    fault.addr = (SHARED_BIT << 1 | SHARED_BIT) << 12
    assert run(kvm_tdp_mmu_map(faults.vcpus[0], fault)) == RET_PF_RETRY
    assert len(faults.warnings()) == 1
    assert faults.warnings()[0].startswith("tdp_iter_start")


@pytest.mark.parametrize("mode", ["mirror", "direct"])
def test_kvm_tdp_mmu_map_of_two_vcpus_installs_everything_once(mode: str) -> None:
    """However their steps mix: nothing is installed twice, and the loser's table goes back."""
    faults = Faults(mirror=mode == "mirror")
    faults.bench.map(faults.vcpus[0], 0, mirror=faults.mirror)
    out = len(faults.bench.pages.in_use)
    seen = set()
    for schedule in exhaustive(lambda: [faults.map(0), faults.map(1)], faults.bench.journal):
        results = [schedule.results[0], schedule.results[1]]
        assert RET_PF_FIXED in results
        assert results.count(RET_PF_FIXED) == 1
        assert set(results) <= {RET_PF_FIXED, RET_PF_SPURIOUS, RET_PF_RETRY}
        assert faults.spte() == faults.leaf()
        stats = faults.vm.stats
        assert (stats["pages_4k"], stats["pt_pages"]) == (2, 4)
        in_use = len(faults.bench.pages.in_use)
        cached = sum(len(v.page_cache) + len(v.external_spt_cache) for v in faults.vcpus)
        tables = faults.tables() + sum(sp.external_spt > 0 for sp in faults.vm.sps.values())
        assert in_use == cached + tables <= out
        if faults.mirror:
            assert sorted(faults.hooks.calls) == [("link", 0x200, 2), ("set", GFN, 1, PFN)]
            faults.hooks.calls.clear()
        seen |= {ret for ret in results if ret != RET_PF_FIXED}
    assert seen == {RET_PF_RETRY, RET_PF_SPURIOUS}


@pytest.mark.parametrize("seed", range(20))
def test_kvm_tdp_mmu_map_of_two_vcpus_from_an_empty_root(seed: int) -> None:
    faults = Faults(mirror=True)

    def until_done(vcpu: int) -> Operation:
        while (yield from faults.map(vcpu)) == RET_PF_RETRY:
            yield ("retry", vcpu)

    seeded([until_done(0), until_done(1)], seed)
    assert [call[0] for call in faults.hooks.calls] == ["link", "link", "link", "set"]
    assert faults.vm.stats["pt_pages"] == 3
    assert faults.vm.stats["pages_4k"] == 1
    assert faults.warnings() == []


# ---- the leaf ------------------------------------------------------------------------------------


def test_kvm_tdp_mmu_map_spurious_when_the_access_is_allowed(
    direct: Faults,
) -> None:
    run(direct.map())
    direct.bench.events.clear()
    assert run(direct.map(1)) == RET_PF_SPURIOUS
    assert direct.bench.events == []


def test_kvm_tdp_mmu_map_warns_when_another_page_is_mapped(
    direct: Faults,
) -> None:
    run(direct.map())
    assert run(direct.map(pfn=PFN + 1)) == RET_PF_SPURIOUS
    assert direct.warnings() == ["a spurious fault found another page than the one mapped"]
    assert spte_to_pfn(direct.spte()) == PFN


def test_kvm_tdp_mmu_map_spurious_when_a_prefetch_finds_any_leaf(
    direct: Faults,
) -> None:
    run(direct.map(write=False, map_writable=False))
    read_only = direct.spte()
    assert run(direct.map(prefetch=True)) == RET_PF_SPURIOUS
    assert direct.spte() == read_only


def test_kvm_tdp_mmu_map_marks_a_prefetched_page_as_not_accessed(
    direct: Faults,
) -> None:
    run(direct.map(prefetch=True))
    assert not direct.spte() & ACCESSED_MASK


def test_kvm_tdp_mmu_map_gives_write_permission_to_a_present_leaf(
    direct: Faults,
) -> None:
    run(direct.map(write=False, map_writable=False))
    assert not direct.spte() & PT_WRITABLE_MASK
    direct.bench.events.clear()
    assert run(direct.map()) == RET_PF_FIXED
    assert direct.spte() & PT_WRITABLE_MASK
    assert [event[0] for event in direct.bench.events] == ["spte_changed"]
    assert direct.vm.stats["pages_4k"] == 1


def test_kvm_tdp_mmu_map_spurious_when_nothing_would_change(
    direct: Faults,
) -> None:
    run(direct.map(write=False, map_writable=False))
    assert run(direct.map(map_writable=False)) == RET_PF_SPURIOUS


def test_kvm_tdp_mmu_map_warns_and_flushes_when_permission_goes(
    direct: Faults,
) -> None:
    run(direct.map())
    direct.put(direct.spte() & ~PT_WRITABLE_MASK)
    assert run(direct.map(map_writable=False)) == RET_PF_FIXED
    assert direct.warnings() == ["a fault took write permission away"]
    assert direct.bench.told("kvm_flush_remote_tlbs_range") == [
        ("kvm_flush_remote_tlbs_range", GFN, 1)
    ]
    assert not direct.spte() & MMU_WRITABLE_MASK


def test_kvm_tdp_mmu_map_retry_when_it_lost(direct: Faults) -> None:
    run(direct.map())
    direct.put(EMPTY)
    schedule = Schedule([direct.map()])
    schedule.advance(0)
    other = direct.leaf(PFN + 7)
    direct.put(other)
    assert not schedule.advance(0)
    assert schedule.results[0] == RET_PF_RETRY
    assert direct.spte() == other


def test_kvm_tdp_mmu_map_replaces_a_table_and_flushes(direct: Faults) -> None:
    run(direct.map())
    direct.bench.events.clear()
    assert run(direct.map(gfn=BIG_GFN, pfn=BIG_PFN, goal_level=2)) == RET_PF_FIXED
    assert direct.spte(BIG_GFN, 2) & PT_PAGE_SIZE_MASK
    assert direct.bench.told("kvm_flush_remote_tlbs_range") == [
        ("kvm_flush_remote_tlbs_range", BIG_GFN, 512)
    ]
    stats = direct.vm.stats
    assert (stats["pages_2m"], stats["pages_4k"], stats["pt_pages"]) == (1, 0, 2)


def test_kvm_tdp_mmu_map_emulates_what_has_no_slot(direct: Faults) -> None:
    mmio: dict[str, Any] = {"slot": None, "pfn": KVM_PFN_NOSLOT}
    assert run(direct.map(**mmio)) == RET_PF_EMULATE
    assert is_mmio_spte(direct.vm, direct.spte())
    assert direct.vcpus[0].stats["pf_mmio_spte_created"] == 1
    assert direct.vm.stats["pages_4k"] == 0
    assert run(direct.map(**mmio)) == RET_PF_EMULATE
    assert direct.warnings() == []


@pytest.mark.parametrize("writable", [True, False])
def test_kvm_tdp_mmu_map_marks_a_writable_page_dirty(direct: Faults, writable: bool) -> None:
    slot = SLOT._replace(flags=KVM_MEM_LOG_DIRTY_PAGES)
    direct.vm.dirty.commit(None, slot, initially_set=False)
    run(direct.map(slot=slot, map_writable=writable, write=writable))
    number, bit = divmod(GFN, 64)
    assert direct.vm.dirty.word(slot, number) >> bit & 1 == writable


# ---- tables --------------------------------------------------------------------------------------


def test_alloc_child_sp_takes_a_page_of_each_cache_for_a_mirror(mirror: Faults) -> None:
    vcpu = mirror.vcpus[0]
    tables, external = vcpu.page_cache, vcpu.external_spt_cache
    it = mirror.at(level=4)
    sp = alloc_child_sp(vcpu, it)
    assert (sp.spt, sp.external_spt) == (tables[-1], external[-1])
    assert (sp.level, sp.gfn, sp.is_mirror, sp.ptep) == (3, 0, True, it.word)
    assert vcpu.page_cache == tables[:-1]
    assert vcpu.external_spt_cache == external[:-1]
    assert mirror.vm.sps[sp.spt] == sp


def test_alloc_child_sp_has_no_external_page_in_a_direct_tree(direct: Faults) -> None:
    sp = alloc_child_sp(direct.vcpus[0], direct.at(level=4))
    assert sp.external_spt == -1
    assert not sp.is_mirror
    assert Role(sp.role).with_(level=4) == Role(direct.root.role)


def fetch_in_a_large_page(faults: Faults, *, req_level: int = 2) -> PageFault:
    """A fetch that must be mapped at 4 KiB although a large page would be possible."""
    fault = faults.fault(write=False, req_level=req_level)
    fault.error_code |= PFERR_FETCH_MASK
    fault.nx_huge_page_workaround_enabled = True
    return fault


@pytest.mark.parametrize(("req_level", "tracked"), [(1, 0), (2, 1), (3, 2)])
def test_kvm_tdp_mmu_map_tracks_tables_that_stand_for_large_pages(
    direct: Faults, req_level: int, tracked: int
) -> None:
    fault = fetch_in_a_large_page(direct, req_level=req_level)
    assert run(kvm_tdp_mmu_map(direct.vcpus[0], fault)) == RET_PF_FIXED
    assert direct.vm.stats["nx_lpage_splits"] == tracked
    assert direct.vm.sp_of(direct.spte(level=2)).nx_huge_page_disallowed
    assert len(direct.vm.possible_nx_huge_pages) == tracked


def test_track_possible_nx_huge_page_counts_a_table_once_and_the_newest_last(
    direct: Faults,
) -> None:
    first, second = MmuPage(0x1000, 1, 0), MmuPage(0x2000, 1, 0)
    for sp in (first, second, first):
        track_possible_nx_huge_page(direct.vm, sp)
    assert direct.vm.stats["nx_lpage_splits"] == 2
    assert direct.vm.possible_nx_huge_pages == {0x1000: 1, 0x2000: 2}


# ---- lookups -------------------------------------------------------------------------------------


def walked(faults: Faults, vcpu: Vcpu, gpa: int) -> list[int]:
    return sorted(kvm_tdp_mmu_get_walk(vcpu, gpa, faults.root), reverse=True)


def test_kvm_tdp_mmu_get_walk_ends_where_the_tables_end(direct: Faults) -> None:
    vcpu = direct.vcpus[0]
    assert walked(direct, vcpu, GFN << 12) == [4]
    run(direct.map())
    assert walked(direct, vcpu, GFN << 12) == [4, 3, 2, 1]
    assert walked(direct, vcpu, GFN + 0x200 << 12) == [4, 3, 2]
    assert kvm_tdp_mmu_get_walk(vcpu, GFN << 12, direct.root)[1] == direct.spte()


def test_kvm_tdp_mmu_get_walk_ends_at_a_large_page(direct: Faults) -> None:
    direct.map_big()
    assert walked(direct, direct.vcpus[0], GFN << 12) == [4, 3, 2]


def test_kvm_tdp_mmu_get_walk_finds_nothing_for_a_gpa_with_the_shared_bit() -> None:
    faults = Faults(mirror=True)
    vcpu = faults.vcpus[0]
    root = faults.bench.root(vcpu)
    assert kvm_tdp_mmu_get_walk(vcpu, (GFN | SHARED_BIT) << 12, root) == {}


def test_kvm_tdp_mmu_gpa_is_mapped_by_a_leaf_of_any_size(direct: Faults) -> None:
    vcpu = direct.vcpus[0]
    assert not kvm_tdp_mmu_gpa_is_mapped(vcpu, GFN << 12)
    direct.map_big()
    assert kvm_tdp_mmu_gpa_is_mapped(vcpu, GFN << 12)
    direct.put(FROZEN_SPTE, BIG_GFN, 2)
    assert not kvm_tdp_mmu_gpa_is_mapped(vcpu, GFN << 12)


def test_kvm_tdp_mmu_gpa_is_mapped_in_the_mirror_for_a_private_gpa(mirror: Faults) -> None:
    run(mirror.map())
    assert kvm_tdp_mmu_gpa_is_mapped(mirror.vcpus[0], GFN << 12)
    assert not kvm_tdp_mmu_gpa_is_mapped(mirror.vcpus[0], GFN + 1 << 12)


def test_kvm_tdp_mmu_gpa_is_mapped_never_for_a_shared_gpa_of_a_td(mirror: Faults) -> None:
    """The walk takes a gfn without the SHARED bit, and nobody takes it away: as in Linux."""
    assert not kvm_tdp_mmu_gpa_is_mapped(mirror.vcpus[0], (GFN | SHARED_BIT) << 12)
    assert mirror.warnings()[0].startswith("tdp_iter_start")


def test_kvm_tdp_mmu_fast_pf_get_last_sptep_gives_the_lowest_entry(direct: Faults) -> None:
    vcpu = direct.vcpus[0]
    assert kvm_tdp_mmu_fast_pf_get_last_sptep(vcpu, GFN) == (direct.at(level=4).word, EMPTY, 4)
    run(direct.map())
    expected = direct.at().word, direct.spte(), 1
    assert kvm_tdp_mmu_fast_pf_get_last_sptep(vcpu, GFN) == expected
    assert direct.spte() & SPTE_MMU_PRESENT_MASK


def test_kvm_tdp_mmu_fast_pf_get_last_sptep_none_when_the_gfn_cannot_be_walked() -> None:
    faults = Faults(mirror=True)
    assert kvm_tdp_mmu_fast_pf_get_last_sptep(faults.vcpus[0], SHARED_BIT) is None
