"""The benchmark's plain KVM answers as the model does, and leaves the same Secure EPT."""

import random

import pytest

from tdxlab.arch import HPA_MASK, PAGE_SIZE
from tdxlab.bench.baseline_mmu import BUSY_CLASS, EFAULT, EINVAL, FIXED, FROZEN, RETRY, SPURIOUS
from tdxlab.bench.kvm_workloads import BaselineKvm, ModelKvm, kvm_round
from tdxlab.seam import sept
from tdxlab.seam.td import Td, Tdcs

PAGES = 1536
FREE = sept.FREE_ENTRY

Entries = dict[tuple[int, int], int]


def model_entries(bench: ModelKvm) -> Entries:
    """(sept_level, gpa) -> entry without its address."""
    memory, tdr = bench.machine.memory, bench.td.tdr
    assert tdr is not None
    td = Td(memory, tdr)
    td.map_tdcs(memory)
    eptp = memory.words.view[td.tdcs + Tdcs.EPTP]
    found = sept.entries(memory, eptp)
    return {(level, gpa): septe & ~HPA_MASK for level, gpa, septe, _ in found}


def baseline_entries(bench: BaselineKvm) -> Entries:
    """The same of the baseline."""
    module = bench.module
    td = next(iter(module.tds.values()))
    found: Entries = {}
    below = [(td.root, td.top, 0)]
    while below:
        table, level, base = below.pop()
        for index, septe in enumerate(module.sept[table]):
            gpa = base | index << 12 + 9 * level
            if septe != FREE:
                found[level, gpa] = septe & ~HPA_MASK
                if level:
                    below.append(((septe & HPA_MASK) >> 12, level - 1, gpa))
    return found


def one_move(bench: ModelKvm | BaselineKvm, choose: random.Random) -> tuple[str, int]:
    """A fault or a conversion somewhere, sometimes behind the memory; what came of it."""
    gfn = choose.randrange(PAGES + 64)
    if choose.random() < 0.7:
        return "fault", bench.fault(gfn * PAGE_SIZE)
    size = choose.choice((1, 3, 64, 512)) * PAGE_SIZE
    private = choose.random() < 0.5
    return "convert", bench.convert(gfn * PAGE_SIZE, size, private=private)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_random_run_gives_the_results_and_the_entries_of_the_model(seed: int) -> None:
    model, plain = ModelKvm(PAGES, "1 GiB"), BaselineKvm(PAGES)
    seen = set()
    ours, theirs = random.Random(seed), random.Random(seed)
    for number in range(500):
        expected = one_move(model, ours)
        assert one_move(plain, theirs) == expected, number
        seen.add(expected)
        if number % 100 == 0:
            assert baseline_entries(plain) == model_entries(model)
    assert seen == {("fault", FIXED), ("fault", SPURIOUS), ("fault", EFAULT), ("convert", 0)}
    entries = model_entries(model)
    assert baseline_entries(plain) == entries
    assert plain.mmu.leaves == sum(level == 0 for level, _ in entries) > 20
    assert plain.mmu.leaves == model.td.vm.stats["pages_4k"]
    stats = model.vcpu.stats
    counted = (plain.mmu.taken, plain.mmu.fixed, plain.mmu.spurious)
    assert counted == (stats["pf_taken"], stats["pf_fixed"], stats["pf_spurious"])
    assert not plain.mmu.dead


def test_refused_conversion_is_einval_on_both_sides() -> None:
    for bench in (ModelKvm(512, "1 GiB"), BaselineKvm(512)):
        assert bench.convert(0, 0, private=False) == EINVAL


def test_fault_of_a_frozen_entry_retries_and_changes_nothing() -> None:
    plain = BaselineKvm(512)
    assert plain.fault(0) == FIXED
    mmu = plain.mmu
    table = mmu._leaf_table(1)
    assert table is not None
    table[1] = FROZEN
    assert mmu._try_fault(1) == RETRY
    assert table[1] == FROZEN
    assert mmu.leaves == 1


def test_fault_during_an_invalidation_of_its_gfn_retries() -> None:
    mmu = BaselineKvm(512).mmu
    mmu.in_progress, mmu.invalid = 1, (3, 4)
    assert mmu._try_fault(3) == RETRY
    assert mmu._try_fault(4) == FIXED


@pytest.mark.parametrize(("status", "dead"), [(BUSY_CLASS << 32, False), (0xC0 << 56, True)])
def test_refused_aug_restores_the_entry_and_kills_unless_busy(status: int, dead: bool) -> None:
    plain = BaselineKvm(512)
    assert plain.fault(0) == FIXED
    plain.module.leaves[6] = lambda regs: status
    assert plain.mmu._try_fault(1) == RETRY
    assert (plain.mmu.dead, plain.mmu.leaves) == (dead, 1)
    table = plain.mmu._leaf_table(1)
    assert table is not None
    assert table[1] == 1 << 63


def test_kvm_round_measures_faults_and_conversions() -> None:
    found = kvm_round(BaselineKvm(1024), 1024)
    assert set(found) == {"fault", "convert"}
    assert min(found.values()) > 0


def test_kvm_round_refuses_a_fault_that_fails() -> None:
    plain = BaselineKvm(1024)
    plain.mmu.dead = True
    with pytest.raises(RuntimeError, match="fault of page 1 failed"):
        kvm_round(plain, 1024)
