"""The Secure EPT lab: what the matrices predict, what the module answers, and the drawings."""

from __future__ import annotations

import random
import re
from xml.etree import ElementTree

import pytest

from tdxlab.abi.status import (
    TDX_EPT_ENTRY_STATE_INCORRECT,
    TDX_EPT_INVALID_PROMOTE_CONDITIONS,
    TDX_EPT_PAGE_NOT_FREE,
    TDX_EPT_WALK_FAILED,
    TDX_GPA_RANGE_NOT_BLOCKED,
    TDX_PREVIOUS_TLB_EPOCH_BUSY,
    TDX_TLB_TRACKING_NOT_DONE,
    Status,
    status_name,
)
from tdxlab.arch import SIZE_2M
from tdxlab.seam import sept
from tdxlab.seam.rules import SEPT_STATE_BY_NAME, SEPT_STATES
from tdxlab.study import sept_diagram as diagram
from tdxlab.study import sept_entry as entry
from tdxlab.study.sept_lab import FIRST_GPA, NO_TABLE, Answer, Seen, SeptLab, finish
from tdxlab.study.sept_moves import (
    ILLEGAL,
    LATER,
    LEGAL,
    MIGRATION_ONLY,
    MOVES,
    REACHED,
    Move,
    accepted_states,
    edges,
    find_move,
)

#: What the module may still say where the matrices say LEGAL: it looks at the 512 entries below, or
#: at who is inside.
MORE_THAN_THE_ENTRY = {
    "SEPT.REMOVE": TDX_EPT_PAGE_NOT_FREE,
    "PAGE.PROMOTE": TDX_EPT_INVALID_PROMOTE_CONDITIONS,
    "TRACK": TDX_PREVIOUS_TLB_EPOCH_BUSY,
}
DETAILS = ~Status.details.mask


def code(answer: Answer) -> int:
    assert answer.status is not None
    return answer.status & DETAILS


def _hold_against(move: Move, verdict: str, answer: Answer) -> None:
    """The module's answer fits what the matrices said."""
    if verdict == LATER:
        assert code(answer) in (TDX_GPA_RANGE_NOT_BLOCKED, TDX_TLB_TRACKING_NOT_DONE)
    elif verdict == ILLEGAL:
        assert answer.status != 0
        assert answer.before == answer.after
    elif move.leaf is not None and move.name != "VP.ENTER" and answer.status != 0:
        assert code(answer) == MORE_THAN_THE_ENTRY[move.name], answer


def _walk(gpaw: int, seed: int, length: int) -> set[tuple[str, str, str]]:
    """A random walk with every answer held against the matrices; returns the changes it saw."""
    lab, dice = SeptLab(gpaw=gpaw), random.Random(seed)
    places = [(FIRST_GPA, 0), (FIRST_GPA + 4096, 0), (FIRST_GPA, 1), (FIRST_GPA, 2)]
    seen = set()
    for _ in range(length):
        gpa, level = dice.choice(places)
        verdicts = lab.prospects(gpa, level)
        legal = [
            m for m in MOVES if verdicts[m.name].verdict != ILLEGAL and m.name != "MR.FINALIZE"
        ]
        move = dice.choice(MOVES if dice.random() < 0.2 else legal)
        if (move.side == "guest" or move.name == "kick") and not lab.is_inside:
            continue
        if move.name == "VP.ENTER" and lab.is_inside:
            continue
        answer = lab.do(move.name, gpa, level)
        if move.name not in ("read", "write"):
            _hold_against(move, verdicts[move.name].verdict, answer)
        if answer.before != answer.after and NO_TABLE not in (answer.before, answer.after):
            seen.add((answer.before, answer.after, move.name))
        lab.build(level=2 if dice.random() < 0.8 else 0)
    return seen


@pytest.mark.parametrize("gpaw", [48, 52])
def test_prospect_is_what_the_module_answers_on_random_walks(gpaw: int) -> None:
    seen = set().union(*(_walk(gpaw, seed, 400) for seed in range(8)))
    drawn = {(edge.before, edge.after, edge.move) for edge in edges()}
    assert seen <= drawn
    assert len(seen) >= 18


@pytest.mark.parametrize("edge", list(edges()), ids=lambda e: f"{e.before}-{e.move}-{e.after}")
def test_every_edge_of_the_diagram_can_be_walked(edge: object) -> None:
    assert isinstance(edge, tuple)
    before, after, name, needs_build = edge
    assert _try_edge(before, after, name, running=False) or not needs_build
    assert _try_edge(before, after, name, running=True) is not needs_build


def _try_edge(before: str, after: str, name: str, *, running: bool) -> bool:
    """Bring an entry into `before`, make the move; True if `after` is reached."""
    lab = SeptLab()
    move = find_move(name)
    level = 0 if move.takes_level(0, lab.top) and not before.startswith("NL") else 1
    lab.build(level=level)
    _bring(lab, before, after, name, level)
    if running:
        lab.do("MR.FINALIZE")
    if "BLOCKED" in before:
        lab.do("RANGE.BLOCK", level=level)
        lab.do("TRACK")
    if move.side == "guest":
        if not running:
            return False
        lab.do("VP.ENTER")
    answer = lab.do(name, level=level)
    assert answer.before == before
    return answer.after == after


def _bring(lab: SeptLab, before: str, after: str, name: str, level: int) -> None:
    """An entry at `level` in the state before `before` was blocked, while the TD is built."""
    base = (
        before.replace("NL_BLOCKED", "NL_MAPPED")
        .replace("_BLOCKED", "")
        .replace("BLOCKED", "MAPPED")
    )
    merged = after if name == "PAGE.PROMOTE" else base
    if base == "NL_MAPPED" and name != "PAGE.PROMOTE":
        lab.do("SEPT.ADD", level=level)
    elif base != "FREE" and level == 0:
        lab.do("PAGE.ADD" if base == "MAPPED" else "PAGE.AUG")
    elif base != "FREE":
        lab.do("PAGE.AUG", level=1)
        if merged == "MAPPED":
            _force_mapped(lab)
        if base == "NL_MAPPED":
            lab.do("PAGE.DEMOTE", level=1)


def _force_mapped(lab: SeptLab) -> None:
    """Make the 2 MiB page MAPPED, which only a guest's acceptance could, before the TD runs."""
    place = lab.entry(level=1)
    assert place is not None
    mapped = sept.make_leaf(SEPT_STATE_BY_NAME["MAPPED"].bits, sept.leaf_hpa(place))
    lab.machine.memory.words.put(place.word, mapped)


@pytest.mark.parametrize("move", [m for m in MOVES if m.leaf and m.side == "host" and m.levels])
def test_levels_of_a_move_are_those_that_the_module_takes(move: Move) -> None:
    lab = SeptLab()
    for level in range(lab.top + 1):
        answer = lab.do(move.name, 0, level)
        is_refused = status_name(answer.status or 0) == "TDX_OPERAND_INVALID"
        assert is_refused is not move.takes_level(level, lab.top), answer


def test_find_move_takes_short_and_full_names_and_names_the_choices() -> None:
    assert find_move("PAGE.AUG") is find_move("TDH.MEM.PAGE.AUG")
    with pytest.raises(ValueError, match=r"PAGE\.AUG"):
        find_move("AUG")


def test_accepted_states_are_the_matrix_row() -> None:
    assert accepted_states("PAGE.AUG") == ("FREE", "REMOVED")
    assert accepted_states("PAGE.ACCEPT") == ("PENDING", "PENDING_EXPORTED_DIRTY")
    with pytest.raises(ValueError, match="no entry"):
        accepted_states("TRACK")


def test_reached_and_migration_states_are_all_states() -> None:
    assert len(REACHED) == 7
    assert set(REACHED) | set(MIGRATION_ONLY) == {state.name for state in SEPT_STATES}


# -- the lab


@pytest.mark.parametrize(("gpaw", "tables"), [(48, 3), (52, 4)])
def test_build_adds_the_tables_above_an_entry(gpaw: int, tables: int) -> None:
    lab = SeptLab(gpaw=gpaw)
    assert lab.state() == NO_TABLE
    assert len(lab.build()) == tables
    assert lab.build() == []
    assert lab.state() == "FREE"
    assert lab.states() == {"NL_MAPPED": tables, "FREE": 512 * (tables + 1) - tables}


def test_read_equals_sept_rd() -> None:
    lab = SeptLab()
    lab.build()
    lab.do("PAGE.AUG")
    for level in range(lab.top + 1):
        answer = lab.do("SEPT.RD", FIRST_GPA & -(1 << 12 + 9 * level), level)
        assert answer.seen == lab.read(FIRST_GPA, level)


def test_a_child_of_a_blocked_table_keeps_its_state_and_is_out_of_reach() -> None:
    lab = SeptLab()
    lab.build()
    lab.do("PAGE.ADD")
    lab.do("RANGE.BLOCK", level=1)
    answer = lab.do("PAGE.REMOVE")
    assert code(answer) == TDX_EPT_WALK_FAILED
    assert answer.seen == Seen(0, 0x8101)
    assert (answer.before, answer.after) == ("MAPPED", "MAPPED")
    assert lab.read() is None


def test_free_page_follows_the_pamt_and_steps_back() -> None:
    lab = SeptLab()
    lab.build()
    first, big = lab.free_page(), lab.free_page(SIZE_2M)
    lab.do("PAGE.AUG")
    assert lab.free_page() == first + 4096
    lab.tape.seek(len(lab.tape) - 1)
    assert (lab.free_page(), lab.free_page(SIZE_2M)) == (first, big)


def test_begin_holds_the_entry_until_finish() -> None:
    lab = SeptLab()
    lab.build()
    lab.do("PAGE.AUG")
    held = lab.begin("SEPT.RD")
    assert lab.raw().lock == 1
    answer = lab.do("SEPT.RD")
    assert status_name(answer.status or 0) == "TDX_OPERAND_BUSY"
    assert lab.raw().host_priority == 1
    assert finish(held).startswith("TDX_SUCCESS")
    assert (lab.raw().lock, lab.raw().host_priority) == (0, 1)
    lab.do("SEPT.RD")
    assert lab.raw().host_priority == 0


def test_do_says_what_cannot_be_asked() -> None:
    lab = SeptLab()
    for name in ("PAGE.ACCEPT", "read", "kick"):
        answer = lab.do(name)
        assert answer.is_refused
        assert answer.outcome.startswith("not done: LP 0 runs the host")
    assert len(lab.tape) == 0
    with pytest.raises(ValueError, match=r"no move 'AUG'"):
        lab.do("AUG")


def test_table_lists_512_states_of_the_right_table() -> None:
    lab = SeptLab()
    lab.build()
    lab.do("PAGE.AUG", FIRST_GPA + 5 * 4096)
    states = lab.table()
    assert len(states) == 512
    assert [i for i, state in enumerate(states) if state != "FREE"] == [5]
    assert SeptLab().table() == []


# -- the drawings


def view_of(lab: SeptLab, level: int = 0) -> diagram.View:
    verdicts = {name: found.verdict for name, found in lab.prospects(level=level).items()}
    return diagram.View(lab.state(level=level), level, lab.top, lab.op_state == 1, verdicts)


def test_diagram_marks_the_state_and_the_ways_on() -> None:
    lab = SeptLab()
    lab.build()
    lab.play("PAGE.AUG", "MR.FINALIZE", "VP.ENTER")
    svg = diagram.diagram(lab.states(), view_of(lab))
    root = ElementTree.fromstring(svg)
    assert root.attrib["role"] == "img"
    assert re.findall(r'class="tdxlab-current" data-state="(\w+)"', svg) == ["PENDING"]
    ways = set(re.findall(r'data-arrow="([\w-]+)"[^>]*class="tdxlab-open"', svg))
    assert ways == {"PENDING-MAPPED", "PENDING-PENDING_BLOCKED"}
    assert "1 PENDING" in root.attrib["aria-label"]


def test_diagram_dashes_what_tracking_holds_up() -> None:
    lab = SeptLab()
    lab.build()
    lab.play("PAGE.ADD", "MR.FINALIZE", "RANGE.BLOCK")
    kinds = {(arrow.before, arrow.after): arrow.kind for arrow in diagram.arrows_for(view_of(lab))}
    assert kinds["BLOCKED", "FREE"] == "later"
    lab.do("TRACK")
    kinds = {(arrow.before, arrow.after): arrow.kind for arrow in diagram.arrows_for(view_of(lab))}
    assert kinds["BLOCKED", "FREE"] == "open"
    assert kinds["PENDING_BLOCKED", "FREE"] == "quiet"


def test_diagram_shows_every_state_that_exists() -> None:
    lab = SeptLab()
    svg = diagram.diagram(lab.states(), view_of(lab, 3))
    for name in MIGRATION_ONLY:
        assert f"<title>{name}</title>" in svg


def test_diagram_leaves_out_what_the_level_forbids() -> None:
    lab = SeptLab()
    small = {move for arrow in diagram.arrows_for(view_of(lab, 0)) for move in arrow.moves}
    big = {move for arrow in diagram.arrows_for(view_of(lab, 1)) for move in arrow.moves}
    assert "SEPT.ADD" not in small
    assert "PAGE.ADD" not in big
    assert {"SEPT.ADD", "PAGE.AUG"} <= big


def test_field_rows_cover_the_declared_bits_and_show_what_is_hidden() -> None:
    raw = sept.make_leaf(SEPT_STATE_BY_NAME["BLOCKED"].bits, 0x1_0000_0000) | sept.HOST_PRIORITY
    seen = Seen(*sept.report(raw, 0))
    rows = {row.name: row for row in entry.field_rows(raw, seen.rcx)}
    assert rows["HPA"][2:4] == (0x1_0000_0000, "0x100000000")
    assert entry.hidden_fields(raw, seen) == ["TDHP", "TDB"]
    assert entry.state_bits_text(raw) == "TDP 0 TDB 1 TDBW 0 TDEX 0 D 0 PS 1 IPAT 1"


def test_bit_strip_fills_exactly_the_ones() -> None:
    raw = sept.FREE_ENTRY
    svg = entry.bit_strip(raw)
    ones = {int(number) for number in re.findall(r"<title>bit (\d+): 1</title>", svg)}
    assert sum(1 << number for number in ones) == raw
    filled = re.findall(r'fill="(#\w+)" stroke="#777"[^>]*><title>bit (\d+)', svg)
    assert {int(number) for colour, number in filled if colour != "#fff"} == ones


def test_entry_state_incorrect_names_the_state_in_rdx() -> None:
    lab = SeptLab()
    lab.build()
    lab.do("PAGE.AUG")
    answer = lab.do("PAGE.AUG")
    assert code(answer) == TDX_EPT_ENTRY_STATE_INCORRECT
    assert answer.seen is not None
    assert (answer.seen.level, answer.seen.state) == (0, "PENDING")
    assert LEGAL not in {lab.prospects()["PAGE.AUG"].verdict}
