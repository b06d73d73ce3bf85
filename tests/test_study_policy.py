"""Tables, plots and recordings of zap policies, by their numbers."""

from __future__ import annotations

import pytest
from matplotlib.figure import Figure

from tdxlab.conversion import CONVERSION_RULES
from tdxlab.conversions import AsQemu, KeepsBoth, PreFaults
from tdxlab.policies import AllAtOnce, KernelPolicy, RegionOnly, WaitsForEver
from tdxlab.policy import RULES
from tdxlab.policy_results import ConversionResult, Result
from tdxlab.policy_run import run
from tdxlab.stopping import Violation
from tdxlab.study import policy_tables as tables
from tdxlab.study.policy_lab import (
    BLOCKED,
    CLOSED,
    EMPTY,
    FREE,
    MAPPED,
    OVER,
    Page,
    PolicyTape,
    record,
)
from tdxlab.study.policy_views import board_html, external_svg, memory_svg, mirror_svg
from tdxlab.workloads import Event, Workload

ONE = tables.one_zap(2)


def test_record_shows_each_page_after_each_call() -> None:
    recording = record(KernelPolicy(), ONE)
    names = [frame.op.name for frame in recording.frames]
    per_page = ["BLOCK", "TRACK", "KICK", "REMOVE", "WRITEBACK"]
    assert names == ["touch", "shared", *per_page, *per_page, OVER]
    tape = PolicyTape(recording)
    seen = []
    for position in range(len(tape) + 1):
        tape.seek(position)
        seen.append(tape.pages())
    mapped, blocked = Page(MAPPED, "MAPPED", "private"), Page(BLOCKED, "BLOCKED", "private")
    out = Page(EMPTY, FREE, "private")
    assert seen[1] == {}
    assert seen[2] == {0: mapped, 1: mapped}
    assert seen[3] == {0: blocked, 1: mapped}
    assert seen[6] == {0: out, 1: mapped}
    assert seen[8] == {0: out, 1: blocked}
    assert seen[-1] == {}
    assert recording.result == run(KernelPolicy(), ONE)


def test_record_adds_calls_up() -> None:
    frames = record(AllAtOnce(), ONE).frames
    assert [(f.seamcalls, f.out, f.event) for f in frames] == [
        (0, 0, 1),
        (0, 0, 2),
        (1, 0, 2),
        (2, 0, 2),
        (3, 0, 2),
        (3, 0, 2),
        (4, 1, 2),
        (5, 1, 2),
        (6, 2, 2),
        (7, 2, 2),
        (7, 2, 2),
    ]


def test_record_says_how_far_it_has_come() -> None:
    told: list[tuple[int, int]] = []
    record(AllAtOnce(), ONE, progress=lambda done, events: told.append((done, events)))
    assert told == [(0, 2), (1, 2)]


def test_record_shows_pages_below_a_closed_table() -> None:
    tape = PolicyTape(record(RegionOnly(), tables.one_zap(mapped=2)))
    tape.seek(len(tape))
    assert tape.pages() == {gfn: Page(MAPPED, CLOSED, "private") for gfn in (0, 1)}
    assert "2 NL_BLOCKED" in external_svg(tape.pages())
    assert "2 mapped" in mirror_svg(tape.pages())


def test_record_shows_what_a_conversion_does_to_memory() -> None:
    events = (Event("touch", 0, 3), Event("shared", 1, 2), Event("private", 1, 1))
    tape = PolicyTape(record(KeepsBoth(), Workload("w", "", 0, 1, 0, events)))
    names, seen = [], []
    for position in range(1, len(tape) + 1):
        tape.seek(position)
        assert tape.frame is not None
        names.append(tape.frame.op.name)
        seen.append({gfn: page.memory for gfn, page in tape.pages().items()})
    set_shared, set_private = (
        ["shared", "MapGPA", "SET SHARED"],
        ["private", "MapGPA", "SET PRIVATE"],
    )
    assert names == ["touch", *set_shared, *set_private, OVER]
    assert seen[1:4] == [dict.fromkeys(range(3), "private")] * 3
    assert seen[4:] == [{0: "private", 1: "twice", 2: "twice"}] * 4
    assert tape.pages()[1].external == "MAPPED"
    last = tape.frame
    assert (last.calls, last.entries, last.out) == (2, 2 * 2 + 3, 2)
    tape.seek(6)
    assert tape.last is not None
    assert tape.last.inputs == {"gfn": 1, "pages": 1}


def test_policy_tape_finds_the_next_event_and_its_ends() -> None:
    tape = PolicyTape(record(KernelPolicy(), ONE))
    assert (tape.frame, tape.last) == (None, None)
    found = []
    for _ in range(3):
        tape.seek(tape.next_event())
        found.append(tape.position)
    assert found == [1, 2, len(tape)]
    with pytest.raises(ValueError, match="no event comes any more"):
        tape.next_event()
    with pytest.raises(ValueError, match="this tape has 0"):
        tape.seek(len(tape) + 1)


def test_maps_say_what_they_show() -> None:
    pages = {
        0: Page(BLOCKED, "PENDING_BLOCKED", ""),
        3: Page(MAPPED, "MAPPED", "private"),
        4: Page(EMPTY, FREE, "twice"),
        5: Page(EMPTY, FREE, "shared"),
    }
    assert "1 blocked, 1 mapped" in mirror_svg(pages)
    assert "1 PENDING_BLOCKED, 1 MAPPED" in external_svg(pages)
    assert "1 private, 1 twice, 1 shared" in memory_svg(pages)


def test_board_ranks_those_who_keep_the_rules_first() -> None:
    good = Result("good", "boot", 1, 9, 0, 0, 0, 0, 0, 0, 0, 1)
    bad = good._replace(policy="bad", block=1, violation=Violation("end", "none"))
    html = board_html([bad, good])
    assert html.index("good") < html.index("bad") < html.index("<td", html.index("bad"))
    assert "end" in html
    conversions = ConversionResult("late", "boot", 1, 0, 7, 0, 0, 0, 0, 0, 0, 0, 0, 0)
    html = board_html([conversions, bad, good])
    assert html.index("bad") < html.index("late")
    assert '7</td><td style="' in html[html.index("late") :]


def test_workload_rows_count_zaps() -> None:
    rows = {row.workload: row for row in tables.workload_rows()}
    assert list(rows) == ["boot", "steady", "storm", "teardown"]
    assert rows["storm"].most == 512
    assert rows["teardown"].zaps == 4


def test_rule_rows_are_the_rules() -> None:
    assert [row.rule for row in tables.rule_rows()] == [*RULES, "invariant 14"]


def test_wrong_rows_find_every_one_out() -> None:
    rows = tables.wrong_rows(48)
    assert all(row.rule != "-" for row in rows)
    assert rows[-1][:3] == (WaitsForEver().title, "one zap", "end")


def test_wrong_conversion_rows_find_every_one_out() -> None:
    rows = tables.wrong_conversion_rows(48)
    assert all(row.rule != "-" for row in rows)
    assert {row.rule for row in rows} == {"answered", "alive", "data", "end"}
    assert [row.rule for row in tables.conversion_rule_rows()] == [*CONVERSION_RULES]


def test_conversion_formula_is_what_is_counted() -> None:
    for policy, pre_faults in ((AsQemu, False), (PreFaults, True)):
        result = run(policy, tables.there_and_back())
        requests, pages = 3, 20 + 8 + 16
        calls, entries = tables.conversion_formula(pages, requests, pre_faults=pre_faults)
        assert (result.calls, result.entries) == (calls, entries)


def test_region_rows_cost_three_calls_more() -> None:
    without, closed = tables.region_rows(48)
    assert closed.seamcalls - without.seamcalls == 3
    assert (closed.unblock, closed.track, closed.block) == (1, 2, 513)


def test_formula_counts_a_last_batch_that_is_not_full() -> None:
    assert tables.formula(10, 4, 3) == (33, 9)
    assert tables.formula(10, 10, 0) == (31, 0)


def test_plots_show_their_numbers() -> None:
    rows = tables.batch_rows(48, 4, 1)
    assert [row.by_formula for row in rows] == [row.seamcalls for row in rows]
    ax = tables.plot_batches(rows, Figure().subplots())
    drawn = {str(line.get_label()): [int(y) for y in line.get_ydata()] for line in ax.lines}
    assert drawn == {
        "cost": [row.cost for row in rows],
        "most pages blocked at a time": [1, 2, 4],
    }
    result = Result("p", "w", 4, 4, 0, 1, 5, 4, 1, 2, 1, 4)
    bars = tables.plot_costs([result], Figure().subplots())
    widths = [container.patches[0].get_width() for container in bars.containers]  # type: ignore[attr-defined]
    assert widths == [4, 0, 1, 5, 4, 2]
    assert sum(widths) == result.cost
    converted = run(AsQemu(), "teardown")
    row = tables.result_row(converted)
    assert (row.policy, row.cost, row.calls) == ("QEMU", converted.cost, converted.calls)
    bars = tables.plot_costs([converted], Figure().subplots())
    widths = [container.patches[0].get_width() for container in bars.containers]  # type: ignore[attr-defined]
    assert sum(widths) == converted.cost
