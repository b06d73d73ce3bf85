"""Tables, plots and diagrams show the numbers of the machine."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from matplotlib.axes import Axes
from matplotlib.container import BarContainer

from tdxlab import views
from tdxlab.abi import leaves as abi
from tdxlab.abi.registers import Registers
from tdxlab.scenarios import life_of_a_td
from tdxlab.study import diagram, palette, plots, tables
from tdxlab.study.show import Picture, Table, text_table
from tdxlab.tape import Tape

#: Positions on the tape of `life_of_a_td` at GPAW 48.
CREATED, FINALIZED, PENDING, ACCEPTED, REMOVED, KEY_FREED = 11, 40, 44, 47, 53, 58


@pytest.fixture(scope="module")
def tape() -> Tape:
    return life_of_a_td()


@pytest.fixture
def ax() -> Axes:
    return plots.side_by_side(plots.Canvas().figure, 1)[0]


def widths(ax: Axes) -> list[list[float]]:
    """The widths of all bars: a list for each colour of the stack."""
    bars = [found for found in ax.containers if isinstance(found, BarContainer)]
    return [[patch.get_width() for patch in found.patches] for found in bars]


def labels(ax: Axes) -> list[str]:
    return [label.get_text() for label in ax.get_yticklabels()]


# -- tables


def test_sept_occupancy_counts_entries_per_level_and_state(tape: Tape) -> None:
    tape.seek(PENDING)
    (tdr,) = views.tds(tape.machine)
    assert tables.sept_occupancy(tape.machine) == [
        (tdr, "PML4", "NL_MAPPED", 1),
        (tdr, "1G", "NL_MAPPED", 1),
        (tdr, "2M", "NL_MAPPED", 1),
        (tdr, "4K", "MAPPED", 1),
        (tdr, "4K", "PENDING", 1),
    ]
    assert tables.sept_states(tape.machine) == {"NL_MAPPED": 3, "MAPPED": 1, "PENDING": 1}


def test_pamt_pages_has_a_row_for_each_used_type(tape: Tape) -> None:
    tape.seek(FINALIZED)
    found = dict(tables.pamt_pages(tape.machine))
    assert found == {"PT_REG": 1, "PT_TDR": 1, "PT_TDCX": 11, "PT_TDVPR": 1, "PT_EPT": 3}
    tape.seek(0)
    assert dict(tables.pamt_pages(tape.machine)) == dict.fromkeys(found, 0)


def test_tds_follows_the_life_cycle(tape: Tape) -> None:
    states = []
    for position in (1, CREATED, FINALIZED, KEY_FREED):
        tape.seek(position)
        (row,) = tables.tds(tape.machine)
        states.append((row.lifecycle, row.op_state, row.vcpus))
    assert states == [
        ("TD_HKID_ASSIGNED", "-", 0),
        ("TD_KEYS_CONFIGURED", "INITIALIZED", 0),
        ("TD_KEYS_CONFIGURED", "RUNNABLE", 1),
        ("TD_TEARDOWN", "-", 0),
    ]


def test_keyids_names_the_owner_until_the_keyid_is_free(tape: Tape) -> None:
    tape.seek(KEY_FREED - 2)
    (tdr,) = views.tds(tape.machine)
    assert tables.keyids(tape.machine) == [(32, "RESERVED", 0, 0), (33, "FLUSHED", tdr, 1)]
    tape.seek(KEY_FREED)
    assert [row.keyid for row in tables.keyids(tape.machine)] == [32]


def test_seamcalls_counts_calls_and_refusals_of_the_machine(tape: Tape) -> None:
    tape.seek(0)
    before = {row.leaf: row for row in tables.seamcalls(tape.machine)}
    tape.machine.seamcall(0, abi.TDH_MNG_CREATE, Registers(rcx=1))
    after = {row.leaf: row for row in tables.seamcalls(tape.machine)}
    assert after.pop("TDH.MNG.CREATE") == ("TDH.MNG.CREATE", "td", 1, 1)
    assert after == before
    tape.seek(1)
    tape.seek(0)


def test_seamcalls_of_a_tape_agree_with_the_machine_counters(tape: Tape) -> None:
    tape.seek(0)
    boot = sum(row.calls for row in tables.seamcalls(tape.machine))
    for position in (CREATED, ACCEPTED, len(tape)):
        tape.seek(position)
        calls = sum(row.calls for row in tables.seamcalls(tape.machine)) - boot
        assert sum(row.calls for row in tables.seamcalls_per_leaf(tape)) == calls
        assert sum(row.calls for row in tables.seamcalls_per_phase(tape)) == calls
        assert tables.seamcalls_over_time(tape)[-1][::2] == (position, calls)
    assert all(row.refused == 0 for row in tables.seamcalls_per_leaf(tape))


def test_rows_keep_their_places_while_a_tape_is_stepped_through(tape: Tape) -> None:
    tape.seek(0)
    leaves = [row.leaf for row in tables.seamcalls_per_leaf(tape)]
    phases = [row.phase for row in tables.seamcalls_per_phase(tape)]
    tape.seek(len(tape))
    assert [row.leaf for row in tables.seamcalls_per_leaf(tape)] == leaves
    assert [row.phase for row in tables.seamcalls_per_phase(tape)] == phases


def test_hardware_lists_every_counter(tape: Tape) -> None:
    tape.seek(len(tape))
    found = dict(tables.hardware(tape.machine))
    assert found["td_entry"] == found["td_exit"] == 2
    assert found["movdir64b"] >= 64 * 19


def test_text_table_aligns_and_shows_addresses_in_hex() -> None:
    rows = [tables.TdRow(0x1000, 33, "TD_TEARDOWN", "-", 0, 16, 1)]
    assert text_table(rows) == (
        "   tdr  keyid  lifecycle    op_state  vcpus  pages  epoch\n"
        "0x1000     33  TD_TEARDOWN  -             0     16      1"
    )
    assert repr(Table([])) == "(none)"
    assert "<td>0x1000</td>" in Table(rows)._repr_html_()


# -- plots


def test_occupancy_stacks_the_states_of_each_level(tape: Tape, ax: Axes) -> None:
    tape.seek(PENDING)
    plots.occupancy(tables.sept_occupancy(tape.machine), ax)
    assert labels(ax) == ["PML4", "1G", "2M", "4K"]
    assert widths(ax) == [[1, 1, 1, 0], [0, 0, 0, 1], [0, 0, 0, 1]]
    assert [patch.get_x() for patch in ax.patches][-1] == 1
    assert ax.get_xlabel() == "entries: T NL_MAPPED, M MAPPED, P PENDING"


def test_pamt_types_shows_the_table(tape: Tape, ax: Axes) -> None:
    tape.seek(FINALIZED)
    rows = tables.pamt_pages(tape.machine)
    plots.pamt_types(rows, ax)
    assert widths(ax) == [[row.pages for row in rows]]
    assert labels(ax) == ["R PT_REG", "D PT_TDR", "C PT_TDCX", "V PT_TDVPR", "E PT_EPT"]
    assert ax.get_xlabel() == "4 KiB pages"


def test_bars_are_moved_in_place_and_built_anew_for_other_categories(tape: Tape, ax: Axes) -> None:
    tape.seek(CREATED)
    plots.calls_per_phase(tables.seamcalls_per_phase(tape), ax)
    first = list(ax.patches)
    tape.seek(len(tape))
    rows = tables.seamcalls_per_phase(tape)
    plots.calls_per_phase(rows, ax)
    assert list(ax.patches) == first
    assert widths(ax) == [[row.calls for row in rows]]
    assert [text.get_text().strip() for text in ax.texts] == [str(row.calls) for row in rows]
    plots.calls_per_phase(rows[:2], ax)
    assert widths(ax) == [[row.calls for row in rows[:2]]]


def test_calls_per_leaf_colours_bars_by_group(tape: Tape, ax: Axes) -> None:
    rows = tables.seamcalls_per_leaf(tape)
    plots.calls_per_leaf(rows, ax)
    hatches = [palette.GROUP_LOOKS[row.group].hatch for row in rows]
    assert [patch.get_hatch() or "" for patch in ax.patches] == hatches
    assert len(set(hatches)) > 3


def test_calls_over_time_marks_the_present_position(tape: Tape, ax: Axes) -> None:
    for position in (ACCEPTED, CREATED):
        tape.seek(position)
        rows = tables.seamcalls_over_time(tape)
        plots.calls_over_time(rows, ax)
        curve, cursor = ax.lines
        assert list(curve.get_ydata()) == [row.calls for row in rows]
        assert list(cursor.get_xdata()) == [position]


def test_sept_diagram_shows_counts_and_marks_one_state(ax: Axes) -> None:
    for counts, current in (({"MAPPED": 2}, "PENDING"), ({"PENDING": 7}, "MAPPED")):
        diagram.sept_diagram(counts, ax, current=current)
        boxes = {text.get_text().split()[1]: text for text in ax.texts[-len(diagram.SEPT_PLACES) :]}
        assert {n: int(b.get_text().split()[2]) for n, b in boxes.items()} == {
            name: counts.get(name, 0) for name in diagram.SEPT_PLACES
        }
        thick = [name for name, box in boxes.items() if _frame_width(box) > 1]
        assert thick == [current]


def _frame_width(box: object) -> float:
    frame = box.get_bbox_patch()  # type: ignore[attr-defined]
    return float(frame.get_linewidth())


def test_sept_arrows_come_from_the_module_tables() -> None:
    arrows = {(arrow.start, arrow.end): arrow.label for arrow in diagram.sept_arrows()}
    assert arrows["PENDING", "MAPPED"] == "PAGE.ACCEPT"
    assert arrows["MAPPED", "BLOCKED"] == "RANGE.BLOCK"
    assert arrows["BLOCKED", "FREE"] == "PAGE.REMOVE"
    assert ("FREE", "BLOCKED") not in arrows


def test_picture_carries_its_numbers_as_text(tape: Tape) -> None:
    rows = tables.pamt_pages(tape.machine)
    made = plots.picture(plots.pamt_types, rows)
    assert isinstance(made, Picture)
    assert made._repr_png_().startswith(b"\x89PNG")
    assert repr(made) == text_table(rows)


# -- palette


@pytest.mark.parametrize(
    "looks",
    [palette.SEPT_LOOKS, palette.PAGE_TYPE_LOOKS, palette.GROUP_LOOKS, palette.HALF_LOOKS],
)
def test_every_state_has_a_letter_of_its_own_that_can_be_read(
    looks: dict[str, palette.Look],
) -> None:
    letters = [look.letter for look in looks.values()]
    assert len(set(letters)) == len(letters)
    assert all(letters)
    assert all(palette.contrast(look.colour, look.ink) >= 4.5 for look in looks.values())


def test_states_that_occur_differ_in_colour_and_hatch() -> None:
    def pairs(names: Sequence[str]) -> set[tuple[str, str]]:
        return {palette.SEPT_LOOKS[name][1::3] for name in names}  # type: ignore[misc]

    names = list(diagram.SEPT_PLACES)
    assert len(pairs(names)) == len(names)


def test_contrast_of_black_on_white_is_21() -> None:
    assert palette.contrast(palette.BLACK, palette.WHITE) == pytest.approx(21)
