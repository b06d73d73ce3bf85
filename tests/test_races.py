"""What can come of each scenario: nothing that the rules forbid, whatever the order."""

from contextlib import nullcontext
from functools import cache
from math import comb

import pytest

from tdxlab.abi.leaves import TDH_MEM_PAGE_AUG
from tdxlab.abi.status import OPERAND_ID_TD_EPOCH, TDX_OPERAND_BUSY
from tdxlab.breaks import broken
from tdxlab.crew import Actor, Fault
from tdxlab.explore import Exploration, replayed
from tdxlab.invariants import InvariantBroken, Watch
from tdxlab.invariants.pamt_rows import PamtRows
from tdxlab.kvm.tdx import TdxVcpu
from tdxlab.player import Player
from tdxlab.races import SCENARIOS, build
from tdxlab.seam import sept
from tdxlab.seam.rules import PT_TDR
from tdxlab.seam.td import Td, Tdcs
from tdxlab.steps import Operation, run

#: With two vCPUs every scenario; with three those that are explored in a moment
#: (`test_races_of_three.py` has the others).
AFFORDABLE = [
    *((name, 2) for name in SCENARIOS),
    ("same-page", 3),
    ("far-apart", 3),
    ("fault-zap", 3),
    ("fault-convert", 3),
    ("hook-failure", 3),
    ("slot-delete", 3),
]


@cache
def explored(name: str, vcpus: int) -> Exploration:
    """A scenario explored once for all tests, which leaves its machine as it was."""
    race = build(name, vcpus)
    before = race.machine.digest()
    found = race.explore()
    assert race.machine.digest() == before
    return found


@pytest.mark.parametrize(("name", "vcpus"), AFFORDABLE)
def test_explore_finds_nothing_wrong_in_any_order(name: str, vcpus: int) -> None:
    found = explored(name, vcpus)
    assert found.complete
    assert [violation.table() for violation in found.violations] == []


@pytest.mark.parametrize(
    ("name", "vcpus"),
    [
        ("same-page", 2),
        ("far-apart", 2),
        ("fault-zap", 2),
        ("fault-convert", 2),
        ("hook-failure", 2),
        ("slot-delete", 2),
        ("zap-enter", 1),
        ("two-teardowns", 2),
        ("accept-block", 1),
    ],
)
def test_explore_finds_nothing_wrong_inside_seamcalls(name: str, vcpus: int) -> None:
    outside, inside = explored(name, vcpus), build(name, vcpus, inside_seamcalls=True).explore()
    assert (inside.complete, inside.violations) == (True, ())
    assert inside.states > outside.states


def _moves(player: Player, who: str, count: int) -> list[str | None]:
    return [player.move(who) for _ in range(count)]


def test_inside_seamcalls_a_vcpu_meets_the_lock_of_a_track_and_comes_again() -> None:
    race = build("zap-enter", 1, inside_seamcalls=True)
    (vcpu,) = race.vms[0].vcpus
    assert isinstance(vcpu, TdxVcpu)
    with race.player() as player:
        assert str(_moves(player, "punch hole", 6)[-1]).startswith("TDH.MEM.TRACK")
        assert player.next_steps["punch hole"].startswith("TDH.MEM.TRACK")
        assert str(_moves(player, "vCPU 0", 5)[-1]).startswith("TDH.VP.ENTER")
        assert player.next_steps["vCPU 0"] == "wait SEAMCALL 0x0"
        assert player.move("vCPU 0") is None
        player.move("punch hole")
        assert player.move("vCPU 0") == "wait SEAMCALL 0x0"
        assert vcpu.vp_enter_ret == TDX_OPERAND_BUSY | OPERAND_ID_TD_EPOCH
        assert player.next_steps["vCPU 0"].startswith("vcpu_enter_guest")
        assert player.fault is None


def test_inside_seamcalls_a_busy_entry_remembers_that_the_host_wants_it() -> None:
    race = build("same-page", 2, inside_seamcalls=True)
    machine = race.machine
    with broken("no-freeze"), race.player() as player:
        assert str(_moves(player, "vCPU 0", 5)[-1]).startswith("TDH.MEM.PAGE.AUG")
        assert str(_moves(player, "vCPU 1", 5)[-1]).startswith("TDH.MEM.PAGE.AUG")
        assert player.next_steps["vCPU 1"] == "wait SEAMCALL 0x1"
        assert machine.trace.refusals()[TDH_MEM_PAGE_AUG] == 1
        tdr = next(row.hpa for row in machine.module.pamt.in_use() if row.page_type == PT_TDR)
        td = Td(machine.memory, tdr)
        td.map_tdcs(machine.memory)
        eptp = machine.memory.words.view[td.tdcs + Tdcs.EPTP]
        locked = [raw for _, _, raw, _ in sept.entries(machine.memory, eptp) if raw & sept.LOCKED]
        assert [bool(raw & sept.HOST_PRIORITY) for raw in locked] == [True]
        assert not sept.FREE_ENTRY & sept.HOST_PRIORITY
        player.move("vCPU 0")
        assert player.move("vCPU 1") == "wait SEAMCALL 0x1 -> RET_PF_RETRY"


@pytest.mark.parametrize(
    ("name", "vcpus", "rule"),
    [
        ("fault-zap", 2, "no-retry"),
        ("slot-delete", 2, None),
        ("zap-enter", 1, "no-kick"),
        ("zap-enter", 2, "no-track"),
        ("two-teardowns", 2, None),
        ("accept-block", 1, None),
    ],
)
def test_explore_finds_the_same_where_actors_look_at_everything(
    name: str, vcpus: int, rule: str | None
) -> None:
    race = build(name, vcpus)
    plain = race._replace(actors=tuple(actor._replace(own=()) for actor in race.actors))
    with nullcontext() if rule is None else broken(rule):
        found, wanted = race.explore() if rule else explored(name, vcpus), plain.explore()
    assert found[:5] == wanted[:5]


def test_explore_counts_the_schedules_of_vcpus_that_never_meet() -> None:
    alone = explored("far-apart", 1)
    moves = alone.transitions
    assert alone.schedules == 1
    assert explored("far-apart", 2).schedules == comb(2 * moves, moves)


def test_explore_counts_more_schedules_where_vcpus_meet() -> None:
    met, apart = (explored(name, 2) for name in ("same-page", "far-apart"))
    assert met.schedules is not None
    assert apart.schedules is not None
    assert met.schedules > apart.schedules


def test_explore_of_a_guest_that_meets_a_zap_enters_it_again() -> None:
    race = build("zap-enter", 1)
    labels = set()
    found = race.explore()
    assert found.violations == ()
    for actor in race.actors:
        labels |= {step[0] for step in _steps_alone(actor.start())}
    assert {"TDH.VP.ENTER", "TDH.MEM.TRACK", "kvm_make_all_cpus_request"} <= labels


def _steps_alone(operation: object) -> list[tuple[object, ...]]:
    return list(operation)  # type: ignore[call-overload, no-any-return]


def test_two_teardowns_one_after_the_other_leave_nothing_behind() -> None:
    race = build("two-teardowns", 2)
    for actor in race.actors:
        assert actor.allowed(run(actor.start()))
    assert race.machine.host.vm_list == ()
    assert race.check(True) is None


def test_explore_of_a_scenario_stops_where_its_budget_ends() -> None:
    found = build("two-teardowns", 2).explore(budget=400)
    assert (found.complete, found.schedules, found.violations) == (False, None, ())


def test_check_names_a_vm_that_was_declared_buggy() -> None:
    race = build("same-page", 1)
    race.vms[0].bug("for a test")
    assert race.check(False) == Fault("vm_bugged", "TD 1: for a test")


def test_explore_names_a_result_that_the_scenario_does_not_allow() -> None:
    race = build("same-page", 1)
    (actor,) = race.actors
    race = race._replace(actors=(actor._replace(allowed=lambda result: False),))
    (violation,) = race.explore().violations
    assert violation.invariant == "result"
    with replayed(race.actors, race.machine.journal, violation.schedule) as fault:
        assert fault is not None
        assert fault.explanation == violation.explanation


def test_a_fault_without_a_memslot_is_named_by_its_errno() -> None:
    race = build("slot-delete", 1)
    with Player(race.actors, race.machine.journal) as player:
        for who in ("delete slot", "vCPU 0"):
            while player.next_steps[who]:
                label = player.move(who)
    assert label is not None
    assert label.endswith(" -> -EFAULT")


def test_explore_names_a_warning() -> None:
    race = build("same-page", 1)

    def warning() -> Operation:
        yield ("step",)
        race.vms[0].warn("for a test")

    race = race._replace(actors=(Actor("thread", warning),))
    (violation,) = race.explore().violations
    assert (violation.invariant, violation.explanation) == ("Warned", "thread: for a test")


def test_build_refuses_an_unknown_scenario_and_too_many_vcpus() -> None:
    with pytest.raises(ValueError, match="no scenario 'other'; choose one of same-page, fresh"):
        build("other")
    with pytest.raises(ValueError, match="4 vCPUs; same-page is made for 1 to 3"):
        build("same-page", 4)


def test_scenarios_say_what_they_are() -> None:
    assert len(SCENARIOS) == 11
    assert all(scenario.what for scenario in SCENARIOS.values())
    assert SCENARIOS["tlb-tracking"].what.endswith(", and gives it to another TD")


def test_watch_finds_the_pamt_entries_that_a_check_finds_at_every_move() -> None:
    race = build("zap-enter", 1, inside_seamcalls=True)
    machine = race.machine
    rows, moving = PamtRows(machine), PamtRows(machine)
    with race.player() as player:
        while player.movable:
            player.move(player.movable[0])
            in_use = list(machine.module.pamt.in_use())
            assert rows.now() == moving.now() == in_use
            moving.move_on()
            assert moving.now() == in_use
        assert player.ended
    rows.close()
    moving.close()
    assert not machine.journal.recording
    watch = Watch(machine)
    watch.check("alive")
    machine.module.pamt.words.put(machine.module.pamt.entry(0x1_0000_0000, 0), 0xFF << 16)
    with pytest.raises(InvariantBroken):
        watch.check("always")
    watch.close()


@pytest.mark.parametrize("size", [0, 1, 2])
def test_covers_is_the_other_way_round_of_entry(size: int) -> None:
    pamt = build("same-page", 1).machine.module.pamt
    hpa = 0x1_0000_0000 + (0x34567 << 12) & -(1 << 12 + 9 * size)
    assert pamt.covers(pamt.entry(hpa, size)) == (hpa, size)
    with pytest.raises(ValueError, match="no entry of the PAMT has the index"):
        pamt.covers(len(pamt.words) + 2)
