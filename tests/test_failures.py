"""Failures by hand: of SEAMCALLs, hooks and allocations, at a chosen call or step."""

from collections.abc import Iterator
from errno import EBUSY, EINVAL, EIO, ENOMEM

import pytest

from tdxlab import Machine
from tdxlab.abi.status import TDX_OPERAND_BUSY
from tdxlab.failures import ALLOC_PAGE, Failure, Pace, in_place_of
from tdxlab.invariants import check
from tdxlab.vmm_errors import IoctlError
from tdxlab.vmm_td import Td

AUG = "TDH.MEM.PAGE.AUG"
PAGE = 0x1000


@pytest.fixture(scope="module")
def booted() -> Machine:
    return Machine(memory="1 GiB", lps=2, packages=1)


@pytest.fixture
def machine(booted: Machine) -> Iterator[Machine]:
    """The machine that all tests share, as it was."""
    mark = booted.mark()
    yield booted
    booted.rewind(mark)
    booted.journal.forget(mark)


@pytest.fixture
def td(machine: Machine) -> Td:
    td = machine.create_td(memory="64 KiB")
    assert td.touch(0).ok
    return td


@pytest.mark.parametrize(
    ("n", "times", "extra", "calls"), [(1, 1, 1, 4), (2, 2, 2, 5), (3, 3, 3, 6), (9, 1, 0, 3)]
)
def test_failing_lets_the_chosen_seamcalls_fail(
    machine: Machine, td: Td, n: int, times: int, extra: int, calls: int
) -> None:
    """A busy AUG comes again: three pages need three AUGs and one for each that failed."""
    before = machine.seamcalls[AUG]
    with machine.failing(Failure(AUG, n, TDX_OPERAND_BUSY, times)) as (aug,):
        assert td.touch(PAGE, 3 * PAGE).ok
    assert (aug.answered, aug.calls) == (extra, calls)
    assert machine.seamcalls[AUG] - before == 3


def test_failing_is_over_behind_the_with(machine: Machine, td: Td) -> None:
    hardware, alloc_page = machine.host.hardware, machine.host.pages.alloc_page
    hooks = [td.tdx.set_external_spte, td.tdx.free_external_spt]
    failures = (
        Failure(AUG, times=None, answer=TDX_OPERAND_BUSY),
        Failure(ALLOC_PAGE, times=None),
        Failure("set_external_spte", answer=-EIO),
        Failure("free_external_spt", answer=-EIO),
    )
    with machine.failing(*failures, td=td):
        assert machine.host.pages.alloc_page("test") == -1
        assert machine.host.hardware is not hardware
    assert machine.host.hardware is hardware
    assert machine.host.pages.alloc_page == alloc_page
    assert [td.tdx.set_external_spte, td.tdx.free_external_spt] == hooks
    assert td.touch(PAGE).ok


def test_failing_lets_an_allocation_fail(machine: Machine, td: Td) -> None:
    free = machine.host.pages.free
    with machine.failing(Failure(ALLOC_PAGE)) as (pages,):
        result = td.touch(PAGE)
    assert (result.error, pages.answered) == (-ENOMEM, 1)
    assert machine.host.pages.free == free
    assert td.touch(PAGE).ok


def test_failing_lets_a_large_allocation_fail(machine: Machine) -> None:
    with machine.failing(Failure(ALLOC_PAGE, n=2)):
        pages = [machine.host.pages.alloc_huge_page(1 << 21, "test") for _ in range(3)]
    assert [page == -1 for page in pages] == [False, True, False]


def test_failing_lets_a_vm_creation_fail_with_its_errno(machine: Machine) -> None:
    free = machine.host.pages.free
    with machine.failing(Failure(ALLOC_PAGE, n=3)), pytest.raises(IoctlError) as refused:
        machine.create_td()
    assert refused.value.errno == ENOMEM
    assert (machine.host.pages.free, machine.host.vm_list) == (free, ())


@pytest.mark.parametrize(
    ("hook", "answer", "dead"),
    [
        ("set_external_spte", -EBUSY, False),
        ("set_external_spte", -EIO, True),
        ("link_external_spt", -EBUSY, False),
        ("link_external_spt", -EIO, True),
    ],
)
def test_failing_lets_a_hook_that_installs_fail(
    machine: Machine, hook: str, answer: int, dead: bool
) -> None:
    td = machine.create_td(memory="64 KiB")
    with machine.failing(Failure(hook, answer=answer), td=td) as (made,):
        result = td.touch(PAGE)
    assert made.answered == 1
    assert (result.ok, td.vm.vm_dead) == (not dead, dead)
    check(machine, "alive")


@pytest.mark.parametrize("answer", [-EIO, -EINVAL])
def test_failing_leaks_the_page_that_a_hook_does_not_remove(
    machine: Machine, td: Td, answer: int
) -> None:
    with machine.failing(Failure("remove_external_spte", answer=answer), td=td):
        td.punch_hole(0, PAGE)
    assert "remove_external_spte failed on purpose" in td.vm.vm_bugged
    assert len(machine.host.pages.leaked) == 1
    check(machine, "alive")


@pytest.mark.parametrize("answer", [-EIO, -EINVAL])
def test_failing_leaks_the_table_that_a_hook_does_not_free(
    machine: Machine, td: Td, answer: int
) -> None:
    with machine.failing(Failure("free_external_spt", n=2, answer=answer), td=td):
        td.destroy()
    assert bool(td.vm.vm_bugged) == (answer == -EINVAL)
    assert len(machine.host.pages.leaked) == 2  # and the TDR, which has a child
    check(machine, "alive")


def test_failing_counts_only_what_comes_after_a_step(machine: Machine, td: Td) -> None:
    """Stepped by hand: the AUG of the second page is the first one after the step."""
    pace = Pace(machine.journal)
    late = Failure(AUG, n=1, answer=TDX_OPERAND_BUSY, step=100)
    with machine.failing(late, pace=pace) as (aug,):
        td.run_thread(pace.watch(td.run_steps([])))
        assert td.touch(PAGE).ok
        assert (pace.steps < 100, aug.calls) == (True, 0)
        pace.steps = 100
        assert td.touch(2 * PAGE).ok
        assert (aug.calls, aug.answered) == (2, 1)


def test_failing_goes_back_with_a_rewind(machine: Machine, td: Td) -> None:
    mark = machine.mark()
    failures = Failure(AUG, n=2, answer=TDX_OPERAND_BUSY), Failure(ALLOC_PAGE, n=900)
    with machine.failing(*failures) as made:
        inside = machine.mark()
        assert td.touch(PAGE, 2 * PAGE).ok
        assert [one.calls for one in made] == [3, 2]
        machine.rewind(inside)
        assert [one.calls for one in made] == [0, 0]
    machine.rewind(mark)


@pytest.mark.parametrize(
    ("failure", "says"),
    [
        (Failure("TDH.MEM.FLY"), "no leaf 'TDH.MEM.FLY'.*link_external_spt.*alloc_page"),
        (Failure("link_external_spt", answer=-EBUSY), "say of which one"),
        (Failure(AUG, n=0), "counted from 1"),
        (Failure(AUG, times=0), "or None"),
        (Failure(AUG, answer=-1), "does not fit RAX"),
        (Failure(AUG, step=3), "a Pace"),
        (Failure(ALLOC_PAGE, n=0), "counted from 1"),
    ],
)
def test_failing_refuses_what_cannot_fail(machine: Machine, failure: Failure, says: str) -> None:
    hardware = machine.host.hardware
    with pytest.raises(ValueError, match=says), machine.failing(failure):
        pass
    assert machine.host.hardware is hardware


def test_failing_refuses_an_answer_that_a_hook_does_not_give(machine: Machine, td: Td) -> None:
    failure = Failure("remove_external_spte", answer=-EBUSY)
    with pytest.raises(ValueError, match="-EIO or -EINVAL"), machine.failing(failure, td=td):
        pass


@pytest.mark.parametrize(
    ("failure", "text"),
    [
        (Failure("free_external_spt", 2, -EIO), "free_external_spt number 2: -EIO"),
        (Failure(ALLOC_PAGE, 3, times=None), "alloc_page number 3 and all after it: no page"),
        (Failure(ALLOC_PAGE, 3, times=2, step=7), "number 3, 2 in a row after step 7: no page"),
        (Failure(AUG, 1, TDX_OPERAND_BUSY), "TDH.MEM.PAGE.AUG number 1: TDX_OPERAND_BUSY"),
    ],
)
def test_failure_reads_as_a_sentence(failure: Failure, text: str) -> None:
    assert text in str(failure)


def test_in_place_of_puts_back_what_stood_there_already() -> None:
    class Thing:
        def name(self) -> str:
            return "its own"

    thing = Thing()
    with in_place_of(thing, {"name": lambda: "first"}):
        with in_place_of(thing, {"name": lambda: "second"}):
            assert thing.name() == "second"
        assert thing.name() == "first"
    assert thing.name() == "its own"
    assert not vars(thing)
