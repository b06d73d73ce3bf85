"""Zaps in batches: the same pages, fewer TLB flushes; what meets a blocked entry; failures."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import islice, repeat
from typing import Any

import pytest

from tdxlab import invariants, steps
from tdxlab.abi.leaves import (
    TDH_MEM_PAGE_REMOVE,
    TDH_MEM_RANGE_BLOCK,
    TDH_MEM_TRACK,
    TDH_PHYMEM_PAGE_WBINVD,
)
from tdxlab.abi.status import OPERAND_ID_RCX, TDX_OPERAND_BUSY, TDX_PAGE_METADATA_INCORRECT
from tdxlab.accesses import Read
from tdxlab.arch import PAGE_SIZE, SIZE_2M
from tdxlab.crew import Actor
from tdxlab.kvm.batching import BatchedRemoval
from tdxlab.kvm.blocked import is_blocked_spte, make_blocked_spte
from tdxlab.kvm.injection import FailNth
from tdxlab.kvm.locks import WRITE
from tdxlab.kvm.spte import FROZEN_SPTE, MMIO_MISCONFIG_VALUE, SHADOW_NONPRESENT_VALUE
from tdxlab.kvm.tdp_iter import for_each_tdp_pte
from tdxlab.kvm.zap import kvm_zap_gfn_range
from tdxlab.machine import Machine
from tdxlab.races import build
from tdxlab.vmm_td import Td

PAGES = 24
_LEAVES = {
    "BLOCK": "TDH.MEM.RANGE.BLOCK",
    "TRACK": "TDH.MEM.TRACK",
    "REMOVE": "TDH.MEM.PAGE.REMOVE",
    "WBINVD": "TDH.PHYMEM.PAGE.WBINVD",
}
_BUSY = TDX_OPERAND_BUSY | OPERAND_ID_RCX


class Bench:
    """A TD with pages in two regions of 2 MiB, and the calls that an operation makes."""

    def __init__(self, gpaw: int = 48, gpas: list[int] | None = None) -> None:
        self.machine = Machine(gpaw=gpaw, memory="1 GiB", lps=4, packages=1)
        self.td: Td = self.machine.create_td(vcpus=2, memory=2 * SIZE_2M)
        self.gpas = list(range(0, PAGES * PAGE_SIZE, PAGE_SIZE)) if gpas is None else gpas
        for gpa in self.gpas:
            assert self.td.touch(gpa).ok

    def counts(self) -> dict[str, int]:
        calls = self.machine.seamcalls
        host = self.machine.host.counts
        return {name: calls[leaf] for name, leaf in _LEAVES.items()} | {"kicks": host["kick"]}

    def punch(self) -> dict[str, int]:
        """Take everything away; returns how often each thing was done."""
        before = self.counts()
        self.td.punch_hole(0, 2 * SIZE_2M)
        return {name: count - before[name] for name, count in self.counts().items()}

    def word(self, gpa: int) -> int:
        """Where the mirror's 4K entry for `gpa` stands."""
        vm, gfn = self.td.vm, gpa // PAGE_SIZE
        root = vm.sps[vm.vcpus[0].mirror_root_hpa]
        return next(it.word for it in for_each_tdp_pte(vm, root, gfn, gfn + 1) if it.level == 1)

    def spte(self, gpa: int) -> int:
        return self.machine.memory.words.view[self.word(gpa)]


@pytest.fixture(scope="module")
def shared_bench() -> Bench:
    return Bench()


@pytest.fixture
def bench(shared_bench: Bench) -> Iterator[Bench]:
    mark = shared_bench.machine.mark()
    yield shared_bench
    shared_bench.machine.rewind(mark)
    shared_bench.machine.journal.forget(mark)


@pytest.mark.parametrize("gpaw", [48, 52])
def test_zap_counts_are_those_of_the_formula_for_any_layout_and_batch(gpaw: int) -> None:
    dice = random.Random(gpaw)
    for _ in range(3):
        n = dice.randrange(1, 60)
        gpas = [gfn * PAGE_SIZE for gfn in sorted(dice.sample(range(1024), n))]
        bench = Bench(gpaw, gpas)
        mark = bench.machine.mark()
        for batch in (1, dice.randrange(2, 40), n, 512):
            bench.td.zap_in_batches(batch)
            flushes = -(-n // batch)
            wanted = dict.fromkeys(("BLOCK", "REMOVE", "WBINVD"), n)
            assert bench.punch() == wanted | dict.fromkeys(("TRACK", "kicks"), flushes)
            invariants.check(bench.machine, "alive")
            bench.machine.rewind(mark)


@pytest.mark.parametrize("batch", [0, 1, 5])
def test_ipis_go_to_every_vcpu_inside_once_a_batch(bench: Bench, batch: int) -> None:
    """vCPU 1 never leaves by itself, and comes back after each kick."""
    bench.td.zap_in_batches(batch)
    reading = bench.td.run_steps(repeat(Read(0x100000)), vcpu=1)
    assert bench.td.touch(0x100000).ok
    for step in reading:
        if step[0] == "guest":
            break
    before = bench.machine.host.counts
    punching = bench.machine.host.on_cpu(2, bench.td.punch_hole_steps(0, PAGES * PAGE_SIZE))
    for _ in punching:
        for _ in islice(reading, 16):
            pass
    reading.close()
    now = bench.machine.host.counts
    rounds = -(-PAGES // max(batch, 1))
    assert now["kick"] - before["kick"] == rounds
    # one more for the remote flush of the shared EPT, at the end of the zap
    assert now["ipi"] - before["ipi"] == rounds + 1


def test_zap_ends_in_the_same_state_with_and_without_batches(bench: Bench) -> None:
    mark, states = bench.machine.mark(), []
    for batch in (0, 7):
        bench.td.zap_in_batches(batch)
        bench.punch()
        vm = bench.td.vm
        states.append((vm.stats, bench.machine.tables(bench.td), bench.machine.host.pages.in_use))
        assert {bench.spte(gpa) for gpa in bench.gpas} == {SHADOW_NONPRESENT_VALUE}
        bench.machine.rewind(mark)
    assert states[0] == states[1]


def test_entries_are_blocked_until_they_are_removed(bench: Bench) -> None:
    bench.td.zap_in_batches(4)
    seen = set()
    thread = bench.machine.host.on_cpu(2, bench.td.punch_hole_steps(0, PAGES * PAGE_SIZE))
    for step in thread:
        invariants.check(bench.machine, "always")
        seen.add(sum(is_blocked_spte(bench.spte(gpa)) for gpa in bench.gpas))
        if step[0] == "TDH.MEM.TRACK":
            with pytest.raises(invariants.InvariantBroken, match="blocked, and nobody removes"):
                _check_entries(bench.machine)
    assert seen == {0, 1, 2, 3, 4}
    invariants.check(bench.machine, "alive")


def _check_entries(machine: Machine) -> None:
    """What the invariant on half-changed entries says, whatever others do."""
    for invariant in invariants.INVARIANTS:
        if invariant.name == "nothing is frozen":
            for fault in invariant.faults(invariants.Picture.of(machine)):
                raise invariants.InvariantBroken(invariant.number, invariant.name, fault)


def test_a_fault_on_a_blocked_entry_retries_and_asks_the_module_for_nothing() -> None:
    race = build("same-page", 1)
    faulting = race.actors[0]
    words = race.machine.memory.words
    vm = race.vms[0]
    root = vm.sps[vm.vcpus[0].mirror_root_hpa]
    place = next(it for it in for_each_tdp_pte(vm, root, 5, 6) if it.level == 1)
    words.put(place.word, make_blocked_spte(0x1234))
    aug = race.machine.seamcalls["TDH.MEM.PAGE.AUG"]
    assert faulting.again(steps.run(faulting.start()))
    assert words.view[place.word] == make_blocked_spte(0x1234)
    assert race.machine.seamcalls["TDH.MEM.PAGE.AUG"] == aug
    assert vm.vm_bugged == ""
    words.put(place.word, SHADOW_NONPRESENT_VALUE)
    assert not faulting.again(steps.run(faulting.start()))


def interrupted_zap(bench: Bench) -> dict[str, int]:
    """A zap of everything in batches of eight gives the lock up with four pages blocked; another
    zap, of the first eight gfns, gets it. Returns what both did.
    """
    bench.td.zap_in_batches(8)
    vm, given = bench.td.vm, iter([True])
    vm.need_resched = lambda: is_blocked_spte(bench.spte(3 * PAGE_SIZE)) and next(given, False)
    before = bench.counts()
    try:
        first = bench.machine.host.on_cpu(2, bench.td.punch_hole_steps(0, PAGES * PAGE_SIZE))
        for _ in first:
            if not vm.mmu_lock.held(WRITE) and is_blocked_spte(bench.spte(3 * PAGE_SIZE)):
                break
        states = [is_blocked_spte(bench.spte(gfn * PAGE_SIZE)) for gfn in range(5)]
        assert states == [True] * 4 + [False]
        second = bench.td.set_memory_attributes_steps(0, 8 * PAGE_SIZE, private=False)
        assert steps.run(bench.machine.host.on_cpu(3, second)) == 0
        assert not any(is_blocked_spte(bench.spte(gpa)) for gpa in bench.gpas)
        assert steps.run(first) == 0
    finally:
        vm.need_resched = None
    assert vm.vm_bugged == ""
    invariants.check(bench.machine, "alive")
    return {name: count - before[name] for name, count in bench.counts().items()}


def test_the_lock_may_go_in_the_middle_and_another_zap_takes_over(bench: Bench) -> None:
    made = interrupted_zap(bench)
    assert made["BLOCK"] == made["REMOVE"] == made["WBINVD"] == PAGES


def test_a_zap_whose_pages_have_all_been_removed_by_another_tracks_nothing() -> None:
    made = interrupted_zap(Bench(gpas=[gfn * PAGE_SIZE for gfn in range(4)]))
    assert (made["BLOCK"], made["TRACK"], made["REMOVE"]) == (4, 1, 4)


@pytest.mark.parametrize("leaf", [TDH_MEM_RANGE_BLOCK, TDH_MEM_TRACK, TDH_MEM_PAGE_REMOVE])
def test_a_busy_operand_costs_a_second_call_and_a_kick(bench: Bench, leaf: int) -> None:
    """The call that met it never reached the module: it is not among those counted."""
    bench.td.zap_in_batches(8)
    with FailNth(bench.machine.host, leaf, status=_BUSY):
        made = bench.punch()
    assert made["kicks"] == 3 + 1
    assert sum(made.values()) == 3 * PAGES + 3 + 3 + 1
    invariants.check(bench.machine, "alive")


@pytest.mark.parametrize("leaf", [TDH_MEM_RANGE_BLOCK, TDH_MEM_PAGE_REMOVE, TDH_PHYMEM_PAGE_WBINVD])
def test_a_failure_ends_the_vm_and_leaks_that_page_alone(bench: Bench, leaf: int) -> None:
    bench.td.zap_in_batches(8)
    with FailNth(bench.machine.host, leaf, n=3, status=TDX_PAGE_METADATA_INCORRECT):
        bench.td.punch_hole(0, PAGES * PAGE_SIZE)
    assert "TDX_PAGE_METADATA_INCORRECT" in bench.td.vm.vm_bugged
    assert len(bench.machine.host.pages.leaked) == 1
    assert {bench.spte(gpa) for gpa in bench.gpas} == {SHADOW_NONPRESENT_VALUE}


@pytest.mark.parametrize("batch", [0, 2])
def test_explore_finds_nothing_wrong_where_a_fault_meets_a_zap_of_two_pages(batch: int) -> None:
    race = build("fault-zap", 1)
    faulting, vm, host = race.actors[0], race.vms[0], race.machine.host
    steps.run(faulting.start())
    vm.zap_batch = batch
    zap = Actor("zap", lambda: host.on_cpu(3, kvm_zap_gfn_range(vm, 0, 6)))
    before = race.machine.seamcalls
    found = race._replace(actors=(faulting, zap)).explore()
    assert found.complete
    assert [violation.table() for violation in found.violations] == []
    steps.run(zap.start())
    calls = race.machine.seamcalls
    tracks = calls["TDH.MEM.TRACK"] - before["TDH.MEM.TRACK"]
    assert (calls["TDH.MEM.RANGE.BLOCK"], tracks) == (2, 1 if batch else 2)


def test_pages_that_were_only_premapped_are_emptied_at_once() -> None:
    machine = Machine(memory="1 GiB", lps=2, packages=1)
    td = machine.create_td(memory=SIZE_2M, image=bytes(3 * PAGE_SIZE), launch=False)
    td.zap_in_batches(2)
    backing = td.backings[-1]
    td.punch_hole(backing.gpa, backing.size)
    assert machine.seamcalls["TDH.MEM.RANGE.BLOCK"] == 3
    assert machine.seamcalls["TDH.MEM.TRACK"] == 0
    td.finalize()
    invariants.check(machine, "alive")


def test_a_td_that_removes_in_batches_leaves_nothing_behind() -> None:
    bench = Bench()
    bench.td.zap_in_batches(16)
    bench.td.destroy()
    assert bench.machine.host.vm_list == ()
    assert bench.machine.seamcalls["TDH.MEM.TRACK"] == 2
    invariants.check(bench.machine, "alive")


def test_a_blocked_entry_is_told_from_all_others() -> None:
    for pfn in (0, 1, (1 << 40) - 1):
        spte = make_blocked_spte(pfn)
        assert is_blocked_spte(spte)
        assert spte != FROZEN_SPTE
    others = (0, SHADOW_NONPRESENT_VALUE, FROZEN_SPTE, MMIO_MISCONFIG_VALUE, FROZEN_SPTE | 0x1000)
    assert not any(map(is_blocked_spte, others))


@pytest.mark.parametrize(
    ("pages", "problem"),
    [
        (-1, "a batch of -1 pages; choose 1..512"),
        (513, "a batch of 513 pages; choose 1..512"),
        ("8", "pages is '8'; give an int"),
        (2.5, "pages is 2.5; give an int"),
    ],
)
def test_zap_in_batches_refuses_other_sizes(bench: Bench, pages: Any, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        bench.td.zap_in_batches(pages)
    assert bench.td.vm.zap_batch == 0


def test_a_rewind_takes_the_choice_back(bench: Bench) -> None:
    mark = bench.machine.mark()
    bench.td.zap_in_batches(9)
    bench.machine.rewind(mark)
    assert bench.td.vm.zap_batch == 0
    assert isinstance(bench.td.tdx, BatchedRemoval)
