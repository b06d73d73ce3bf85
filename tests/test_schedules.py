"""Every interleaving of SEAMCALLs that want the same thing: one wins, the other learns why not."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from math import factorial

import pytest

from tdxlab.abi import leaves as abi
from tdxlab.abi.outcome import GuestOutcome
from tdxlab.abi.registers import Registers
from tdxlab.abi.status import (
    OPERAND_ID_KOT,
    OPERAND_ID_R8,
    OPERAND_ID_RCX,
    OPERAND_ID_SEPT_TREE,
    OPERAND_ID_TD_EPOCH,
    TDX_EPT_ENTRY_STATE_INCORRECT,
    TDX_GPA_RANGE_ALREADY_BLOCKED,
    TDX_HKID_NOT_FREE,
    TDX_OPERAND_BUSY,
    TDX_PAGE_METADATA_INCORRECT,
    TDX_PREVIOUS_TLB_EPOCH_BUSY,
    TDX_SUCCESS,
)
from tdxlab.bare import BareMachine
from tdxlab.host import Host
from tdxlab.host_td import HostTd
from tdxlab.invariants import check
from tdxlab.journal import Journal, Words
from tdxlab.scenarios import booted_machine
from tdxlab.seam.exits import EXIT_EPT_VIOLATION
from tdxlab.steps import Operation, Schedule, exhaustive
from tdxlab.views import sept_rows

GPA = 0x4000_0000

BUSY_RCX = TDX_OPERAND_BUSY + OPERAND_ID_RCX
BUSY_TREE = TDX_OPERAND_BUSY + OPERAND_ID_SEPT_TREE
WRONG_STATE = TDX_EPT_ENTRY_STATE_INCORRECT + OPERAND_ID_RCX
WRONG_PAGE = TDX_PAGE_METADATA_INCORRECT + OPERAND_ID_RCX


class Bench:
    """A TD that runs, with tables for GPA, and calls on it as step generators."""

    def __init__(self) -> None:
        self.machine: BareMachine = booted_machine()
        self.host = Host(self.machine)
        self.td = HostTd(self.host)
        self.td.add_vcpu(lp=0)
        self.td.add_vcpu(lp=3)
        self.td.map_tables(GPA)
        self.td.finalize()
        self.pages = [self.host.take_page() for _ in range(3)]

    def call(self, lp: int, leaf: int, **registers: int) -> Operation:
        return self.machine.seamcall_steps(lp, leaf, Registers(**registers))

    def aug(self, lp: int, hpa: int) -> Operation:
        return self.call(lp, abi.TDH_MEM_PAGE_AUG, rcx=GPA, rdx=self.td.tdr, r8=hpa)

    def block(self, lp: int) -> Operation:
        return self.call(lp, abi.TDH_MEM_RANGE_BLOCK, rcx=GPA, rdx=self.td.tdr)

    def accept(self, lp: int) -> Operation:
        """The guest inside `lp` accepts GPA; returns the guest's RAX, or the exit reason."""
        yield ("TDG.MEM.PAGE.ACCEPT", GPA)
        outcome = self.machine.tdcall(lp, abi.TDG_MEM_PAGE_ACCEPT, Registers(rcx=GPA))
        assert isinstance(outcome, GuestOutcome)
        return outcome.status

    def state(self) -> str:
        rows = sept_rows(self.machine, self.td.tdr)
        return next((row.state for row in rows if (row.gpa, row.sept_level) == (GPA, 0)), "FREE")

    def outcomes(self, make: Callable[[], Sequence[Operation]]) -> Iterator[Schedule]:
        """Every interleaving, with the invariants tested after each and the machine unchanged."""
        before = self.machine.digest()
        for schedule in exhaustive(make, self.machine.journal):
            check(self.machine, "quiet")
            yield schedule
        assert self.machine.digest() == before
        assert not self.machine.journal.recording


@pytest.fixture
def bench() -> Bench:
    return Bench()


def statuses(schedule: Schedule) -> tuple[int, ...]:
    return tuple(schedule.results[number] for number in sorted(schedule.results))


# ---- the explorer itself -------------------------------------------------------------------------


def counting(words: Words, number: int, moves: int) -> Operation:
    for move in range(moves):
        words.put(number, words.view[number] + 1)
        if move < moves - 1:
            yield (number, move)
    return moves


@pytest.mark.parametrize("moves", [(1,), (2, 2), (3, 2), (2, 2, 2), (1, 4, 2)])
def test_exhaustive_finds_each_interleaving_once(moves: tuple[int, ...]) -> None:
    journal = Journal()
    words = Words(journal, len(moves))
    histories = set()
    count = 0
    for schedule in exhaustive(
        lambda: [counting(words, i, n) for i, n in enumerate(moves)], journal
    ):
        assert tuple(words.view) == moves
        assert Counter(schedule.history) == dict(enumerate(moves))
        histories.add(tuple(schedule.history))
        count += 1
    expected = factorial(sum(moves))
    for move in moves:
        expected //= factorial(move)
    assert count == len(histories) == expected
    assert not any(words.view)


def test_exhaustive_without_operations_has_one_schedule() -> None:
    assert [schedule.history for schedule in exhaustive(list, Journal())] == [[]]


def test_exhaustive_goes_back_when_the_caller_stops_early(bench: Bench) -> None:
    before = bench.machine.digest()
    for schedule in exhaustive(lambda: [bench.aug(0, bench.pages[0])], bench.machine.journal):
        assert statuses(schedule) == (TDX_SUCCESS,)
        break
    del schedule
    assert bench.machine.digest() == before


def test_close_releases_the_locks_of_what_is_not_finished(bench: Bench) -> None:
    schedule = Schedule([bench.aug(0, bench.pages[0])])
    schedule.advance(0)
    schedule.close()
    check(bench.machine, "quiet")
    assert bench.machine.module.calls_suspended == 0
    assert bench.state() == "FREE"


def test_exhaustive_replays_a_history_to_the_same_state(bench: Bench) -> None:
    def make() -> list[Operation]:
        return [bench.aug(0, bench.pages[0]), bench.block(1)]

    digests = {
        tuple(schedule.history): (bench.machine.digest(), statuses(schedule))
        for schedule in bench.outcomes(make)
    }
    mark = bench.machine.mark()
    for history, (digest, expected) in digests.items():
        schedule = Schedule(make())
        schedule.replay(history)
        assert (bench.machine.digest(), statuses(schedule)) == (digest, expected)
        bench.machine.rewind(mark)


# ---- two want the same ---------------------------------------------------------------------------


def test_two_augs_of_one_gpa_one_wins(bench: Bench) -> None:
    first, second, _ = bench.pages
    seen = set()
    for schedule in bench.outcomes(lambda: [bench.aug(0, first), bench.aug(1, second)]):
        assert sorted(statuses(schedule))[0] == TDX_SUCCESS
        loser = max(statuses(schedule))
        assert loser in (BUSY_RCX, WRONG_STATE)
        assert bench.state() == "PENDING"
        seen.add((statuses(schedule).index(TDX_SUCCESS), loser))
    assert seen == {(0, BUSY_RCX), (1, BUSY_RCX), (0, WRONG_STATE), (1, WRONG_STATE)}


def test_three_augs_of_one_gpa_one_wins(bench: Bench) -> None:
    winners = set()
    for schedule in bench.outcomes(
        lambda: [bench.aug(lp, hpa) for lp, hpa in enumerate(bench.pages)]
    ):
        assert Counter(statuses(schedule))[TDX_SUCCESS] == 1
        assert set(statuses(schedule)) <= {TDX_SUCCESS, BUSY_RCX, WRONG_STATE}
        winners.add(statuses(schedule).index(TDX_SUCCESS))
    assert winners == {0, 1, 2}


def test_two_augs_of_one_page_one_wins(bench: Bench) -> None:
    page = bench.pages[0]
    other = GPA + 0x1000

    def make() -> list[Operation]:
        elsewhere = bench.call(1, abi.TDH_MEM_PAGE_AUG, rcx=other, rdx=bench.td.tdr, r8=page)
        return [bench.aug(0, page), elsewhere]

    losers = set()
    for schedule in bench.outcomes(make):
        assert Counter(statuses(schedule))[TDX_SUCCESS] == 1
        losers.add(max(statuses(schedule)))
    assert losers == {TDX_OPERAND_BUSY + OPERAND_ID_R8, TDX_PAGE_METADATA_INCORRECT + OPERAND_ID_R8}


def test_two_blocks_one_wins(bench: Bench) -> None:
    bench.td.aug(GPA)
    warning = TDX_GPA_RANGE_ALREADY_BLOCKED + OPERAND_ID_RCX
    others = set()
    for schedule in bench.outcomes(lambda: [bench.block(0), bench.block(1)]):
        assert Counter(statuses(schedule))[TDX_SUCCESS] == 1
        assert bench.state() == "PENDING_BLOCKED"
        others.add(max(statuses(schedule)))
    assert others == {warning, BUSY_TREE}


def test_two_reclaims_of_one_page_one_wins(bench: Bench) -> None:
    bench.td.aug(GPA)
    hpa = bench.td.pages[GPA][0]
    td, host = bench.td, bench.host
    host.must(0, abi.TDH_VP_FLUSH, rcx=td.vcpus[0])
    host.must(3, abi.TDH_VP_FLUSH, rcx=td.vcpus[1])
    host.must(0, abi.TDH_MNG_VPFLUSHDONE, rcx=td.tdr)
    for package in bench.machine.cpu.packages:
        host.must(host.lp_of(package), abi.TDH_PHYMEM_CACHE_WB)
    host.must(0, abi.TDH_MNG_KEY_FREEID, rcx=td.tdr)
    others = set()
    for schedule in bench.outcomes(
        lambda: [bench.call(lp, abi.TDH_PHYMEM_PAGE_RECLAIM, rcx=hpa) for lp in (0, 1)]
    ):
        assert Counter(statuses(schedule))[TDX_SUCCESS] == 1
        others.add(max(statuses(schedule)))
    assert others == {BUSY_RCX, WRONG_PAGE}


def test_two_creates_with_one_keyid_one_wins(bench: Bench) -> None:
    keyid = bench.host.take_keyid()
    others = set()
    for schedule in bench.outcomes(
        lambda: [
            bench.call(lp, abi.TDH_MNG_CREATE, rcx=bench.pages[lp], rdx=keyid) for lp in (0, 1)
        ]
    ):
        assert Counter(statuses(schedule))[TDX_SUCCESS] == 1
        others.add(max(statuses(schedule)))
    assert others == {TDX_OPERAND_BUSY + OPERAND_ID_KOT, TDX_HKID_NOT_FREE}


def test_two_tdmr_inits_never_do_the_same_step() -> None:
    machine = BareMachine()
    host = Host(machine)
    host.boot(tdmr_init=False)
    base = machine.platform.tdmrs[0].base
    seen = set()
    for schedule in exhaustive(
        lambda: [
            machine.seamcall_steps(lp, abi.TDH_SYS_TDMR_INIT, Registers(rcx=base)) for lp in (0, 1)
        ],
        machine.journal,
    ):
        steps = (machine.module.tdmrs[base].initialised_to - base) // (4 << 20)
        assert steps == Counter(statuses(schedule))[TDX_SUCCESS]
        check(machine, "quiet")
        seen.add(tuple(sorted(statuses(schedule))))
    assert seen == {(TDX_SUCCESS, TDX_SUCCESS), (TDX_SUCCESS, BUSY_RCX)}


# ---- host against guest --------------------------------------------------------------------------


def test_block_against_accept_the_guest_wins_waits_or_leaves(bench: Bench) -> None:
    bench.td.aug(GPA)
    bench.td.enter(1, lp=3)
    seen = set()
    for schedule in bench.outcomes(lambda: [bench.block(0), bench.accept(3)]):
        blocked, accepted = statuses(schedule)
        assert blocked == TDX_SUCCESS
        seen.add((accepted, bench.state()))
    assert seen == {
        (TDX_SUCCESS, "BLOCKED"),
        (BUSY_RCX, "PENDING_BLOCKED"),
        (EXIT_EPT_VIOLATION, "PENDING_BLOCKED"),
    }


def test_remove_against_entry_the_page_is_gone_for_the_guest(bench: Bench) -> None:
    """A vCPU that enters while a page is blocked, tracked and removed never uses it afterwards."""
    td = bench.td
    td.aug(GPA)
    td.enter(1, lp=3)
    td.accept(3, GPA)
    bench.machine.touch(3, GPA)
    td.kick(3)

    def make() -> list[Operation]:
        return [zap(bench), enter_and_touch(bench, 3)]

    seen = set()
    for schedule in bench.outcomes(make):
        removed, guest_saw = statuses(schedule)
        seen.add((removed == TDX_SUCCESS, guest_saw))
    assert (True, "violation") in seen
    assert (False, "page") in seen


def zap(bench: Bench) -> Operation:
    """BLOCK, TRACK, REMOVE, with others in between; returns the last status."""
    for leaf, operands in (
        (abi.TDH_MEM_RANGE_BLOCK, {"rcx": GPA, "rdx": bench.td.tdr}),
        (abi.TDH_MEM_TRACK, {"rcx": bench.td.tdr}),
        (abi.TDH_MEM_PAGE_REMOVE, {"rcx": GPA, "rdx": bench.td.tdr}),
    ):
        status = yield from bench.call(0, leaf, **operands)
        yield ("zap", leaf)
    return status


def enter_and_touch(bench: Bench, lp: int) -> Operation:
    """The vCPU enters and reads GPA; returns what it saw."""
    yield from bench.call(lp, abi.TDH_VP_ENTER, rcx=bench.td.vcpus[1])
    yield ("inside", lp)
    if not bench.machine.cpu.vcpu_inside(lp):
        return "not entered"
    return "violation" if isinstance(bench.machine.touch(lp, GPA), GuestOutcome) else "page"


def test_two_tracks_with_a_vcpu_inside_never_skip_its_epoch(bench: Bench) -> None:
    """The second TRACK is refused while a vCPU of the epoch before is inside, whoever is first."""
    bench.td.enter(0, lp=0)
    others = set()
    for schedule in bench.outcomes(
        lambda: [bench.call(lp, abi.TDH_MEM_TRACK, rcx=bench.td.tdr) for lp in (1, 2)]
    ):
        assert Counter(statuses(schedule))[TDX_SUCCESS] == 1
        others.add(max(statuses(schedule)))
    assert others == {TDX_PREVIOUS_TLB_EPOCH_BUSY, TDX_OPERAND_BUSY + OPERAND_ID_TD_EPOCH}
