"""Races on a tape, and the tables and drawings that notebook 05 makes of them."""

from __future__ import annotations

import pytest
from matplotlib.figure import Figure

from tdxlab.breaks import BREAKS
from tdxlab.races import SCENARIOS
from tdxlab.study import race_plots, race_tables
from tdxlab.study.protocol import LOCKED, PROTOCOLS, WAITS, WANTED, Rule
from tdxlab.study.protocol_search import explore, shortest
from tdxlab.study.race_lab import ENTRIES, RULES, RaceLab, first_words, moves_of, step_of
from tdxlab.study.race_views import COLUMNS, ENTRY_LOOKS, MEETING, lanes, pictures, step_look


@pytest.fixture
def lab() -> RaceLab:
    return RaceLab()


def test_move_records_what_was_done_and_by_whom(lab: RaceLab) -> None:
    lab.play([0, 1, 0])
    assert [(who, step) for who, step, _ in moves_of(lab.tape)] == [
        ("vCPU 0", "start"),
        ("vCPU 1", "start"),
        ("vCPU 0", "faultin_pfn"),
    ]
    assert (lab.tape.position, len(lab.tape)) == (3, 3)


def test_seek_goes_back_and_forth_to_the_same_states(lab: RaceLab) -> None:
    lab.run_on()
    seen = []
    for position in range(len(lab.tape) + 1):
        lab.tape.seek(position)
        seen.append((lab.race.machine.digest(), lab.entries(), lab.actors()))
    for position in (3, 14, 0, 9, 8):
        lab.tape.seek(position)
        assert (lab.race.machine.digest(), lab.entries(), lab.actors()) == seen[position]
    with pytest.raises(ValueError, match=f"position 99; this tape has 0..{len(lab.tape)}"):
        lab.tape.seek(99)


def test_move_forgets_what_was_recorded_ahead(lab: RaceLab) -> None:
    lab.play([0, 0, 0])
    lab.tape.seek(1)
    lab.play([1])
    assert [action.phase for action in lab.tape.actions] == ["vCPU 0", "vCPU 1"]


def test_run_on_lets_all_move_in_turn_to_the_end(lab: RaceLab) -> None:
    lab.run_on()
    assert [action.phase for action in lab.tape.actions[:4]] == ["vCPU 0", "vCPU 1"] * 2
    assert lab.tape.player.ended
    assert lab.verdict == ""


def test_run_on_passes_over_one_that_waits() -> None:
    lab = RaceLab("fault-zap", vcpus=1)
    lab.play([0, 0, 0])  # the fault holds mmu_lock for read
    lab.run_on()
    assert lab.tape.player.ended
    assert [row.comes_next for row in lab.actors()] == ["RET_PF_FIXED", "done"]


def test_play_refuses_a_number_that_nobody_has_and_a_move_that_cannot_be(lab: RaceLab) -> None:
    with pytest.raises(ValueError, match=r"nobody has the number 2; choose 0\.\.1"):
        lab.play([2])
    lab.play([0] * 4 + [1] * 3)
    with pytest.raises(ValueError, match="vCPU 1 starts over when another has changed something"):
        lab.play([1])


def test_race_lab_refuses_an_unknown_scenario_and_an_unknown_rule() -> None:
    with pytest.raises(ValueError, match="no scenario 'x' here; choose one of same-page"):
        RaceLab("x")
    with pytest.raises(ValueError, match="no rule 'x' here; choose one of no-freeze"):
        RaceLab(rule="x")


def test_find_violation_stands_before_the_move_that_goes_wrong() -> None:
    for scenario, vcpus, rule, moves in (
        ("same-page", 2, "no-freeze", 11),
        ("hook-failure", 2, "no-restore", 11),
        ("fault-zap", 1, "no-retry", 9),
    ):
        lab = RaceLab(scenario, vcpus=vcpus, rule=rule)
        lab.find_violation()
        assert (len(lab.tape), lab.verdict) == (moves, "")
        lab.tape.seek(moves)
        assert first_words(lab.verdict).startswith(BREAKS[rule].found)


def test_find_violation_says_so_where_there_is_none(lab: RaceLab) -> None:
    with pytest.raises(ValueError, match="no schedule of same-page goes wrong with all rules kept"):
        lab.find_violation()


def test_shortest_refuses_to_look_for_ever() -> None:
    with pytest.raises(ValueError, match="nothing goes wrong in 50 states; choose fewer vCPUs"):
        shortest(PROTOCOLS["same-page"](2), Rule.ALL, most=50)


def test_shortest_is_as_short_as_an_exploration_finds() -> None:
    for rule in (Rule.NO_FREEZE, Rule.OVERWRITE_FROZEN):
        protocol = PROTOCOLS["same-page"](2)
        assert shortest(protocol, rule) == explore(protocol, rule).verdicts[0].schedule


def test_entries_show_a_lock_in_the_module_and_who_was_refused() -> None:
    lab = RaceLab(rule="no-freeze")
    lab.play([0] * 5)
    assert lab.entries()[0].external == LOCKED
    lab.play([1] * 5)
    assert lab.entries()[0].external == WANTED
    assert [row.comes_next for row in lab.actors()] == ["TDH.MEM.PAGE.AUG inside", WAITS]
    with pytest.raises(ValueError, match="vCPU 1 stands at 'wait SEAMCALL 0x1': let another one"):
        lab.play([1])
    lab.play([0, 1])
    assert [row.retries for row in lab.actors()] == [0, 1]


def test_step_of_tells_the_two_steps_of_a_seamcall_apart() -> None:
    call = "TDH.MEM.PAGE.AUG 0x5000 0x0"
    assert step_of(call) == step_of(call, ["start"]) == "TDH.MEM.PAGE.AUG"
    assert step_of(call, [call]) == "TDH.MEM.PAGE.AUG inside"
    assert step_of(call, [f"{call} -> RET_PF_RETRY"]) == "TDH.MEM.PAGE.AUG"


def test_first_words_leave_addresses_out() -> None:
    long = "vm_bugged: TD 1: SEAMCALL TDH_X failed: 0xc (TDX_Y (RCX): why), rcx 0x8, rdx 0x2"
    assert first_words(long) == "vm_bugged: TDH_X TDX_Y"
    assert first_words("") == ""


def test_rules_and_scenarios_exist() -> None:
    assert set(ENTRIES) <= set(SCENARIOS)
    assert RULES[0] == ""
    assert {rule.value for rule in Rule} <= set(RULES)


# -- tables


def test_step_rows_are_the_moves_of_one_fault() -> None:
    rows = race_tables.step_rows()
    assert [row.move for row in rows] == list(range(1, 8))
    assert (rows[3].step, rows[-1].result) == ("cmpxchg FROZEN_SPTE", "RET_PF_FIXED")


def test_hold_rows_let_nobody_call_while_the_entry_is_frozen() -> None:
    rows = race_tables.hold_rows()
    for row in rows:
        expected = {"empty": "RET_PF_FIXED", "FROZEN": "RET_PF_RETRY", "present": "RET_PF_SPURIOUS"}
        assert row.vcpu_1 == expected[row.mirror]
        assert row.seamcalls == (row.mirror == "empty")
    assert sum(row.mirror == "FROZEN" for row in rows) == 3


def test_break_rows_find_what_the_rules_are_for() -> None:
    rules = ["early-publish", "no-restore", "overwrite-frozen"]
    for row in race_tables.break_rows(rules):
        assert row.found.startswith(BREAKS[row.broken_by].found)
        assert row.moves > 5
    assert [row.broken_by for row in race_tables.meaning_rows(rules)] == rules


def test_binomial_row_is_counted_as_computed() -> None:
    (row,) = race_tables.binomial_rows()
    assert row.formula == row.counted == 3432


# -- plots and drawings


def test_states_by_depth_draws_the_numbers_of_its_table() -> None:
    rows = race_tables.depth_rows()
    ax = race_plots.states_by_depth(rows, Figure().subplots())
    for line, vcpus in zip(ax.lines, (1, 2, 3), strict=True):
        assert list(line.get_ydata()) == [row.states for row in rows if row.vcpus == vcpus]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("moves from the beginning", "states")
    assert ax.get_yscale() == "log"


def test_states_per_scenario_draws_the_numbers_of_its_table() -> None:
    rows = [race_tables.ScenarioRow("far-apart", 2, 3432, 256, 436, 0)]
    ax = race_plots.states_per_scenario(rows, Figure().subplots())
    assert [patch.get_width() for patch in ax.patches] == [256]


def test_pictures_say_in_words_what_they_show() -> None:
    lab = RaceLab(rule="no-freeze")
    lab.find_violation()
    lab.tape.seek(len(lab.tape))
    drawn = pictures(lab)
    assert all('role="img"' in view and "aria-label=" in view for view in drawn.values())
    assert "vCPU 0 has made 6 moves" in next(iter(drawn.values()))
    assert "mirror empty, S-EPT mapped" in drawn[MEETING]
    assert ">X<" in next(iter(drawn.values()))


def test_lanes_show_the_moves_around_the_position() -> None:
    lab = RaceLab()
    lab.run_on()
    moves = moves_of(lab.tape) * 4
    shown = [lanes(moves, position, lab.actors(), "") for position in (0, 30, len(moves))]
    assert [one.count("opacity") for one in shown] == [COLUMNS, COLUMNS // 2, 0]


def test_every_step_and_every_value_has_a_look_of_its_own() -> None:
    steps = [*race_tables.MEANINGS, "read SPTE", "cmpxchg SPTE", WAITS]
    letters = {step_look(step).letter for step in steps}
    assert len(letters) == len(steps) - 2  # both SEAMCALLs look alike, outside and inside
    mirror, external = list(ENTRY_LOOKS.values())[:3], list(ENTRY_LOOKS.values())[3:]
    for looks in (mirror, external):
        assert len({look.letter for look in looks}) == len(looks)
