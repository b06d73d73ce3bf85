"""Tables and drawings of attacks: who reads what, whose lines are, counts, pictures, bars."""

from __future__ import annotations

import re

import pytest
from matplotlib.figure import Figure

from tdxlab import dram
from tdxlab.attacks import ATTACKS, make_stage
from tdxlab.attacks.stage import DATA, SECRET, Stage
from tdxlab.attacks.verdict import GAINS, MECHANISMS
from tdxlab.memory import LINE_SIZE, MachineCheck
from tdxlab.study import attack_tables as tables
from tdxlab.study import attack_views as drawn
from tdxlab.study.aes_xts import AesXts
from tdxlab.study.attack_lab import AttackLab

WIDTHS = pytest.mark.parametrize("gpaw", [48, 52])


@pytest.fixture
def stage() -> Stage:
    return make_stage("read-private", cipher=AesXts())


@WIDTHS
def test_reader_rows_tell_who_gets_the_secret(gpaw: int) -> None:
    rows = tables.reader_rows(make_stage("read-private", gpaw=gpaw, cipher=AesXts()))
    alike = {row.reader: row.alike for row in rows}
    assert alike["the victim"] == LINE_SIZE
    assert all(count < 8 for reader, count in alike.items() if reader != "the victim")
    sees = [row.sees for row in rows]
    assert sees[1] == sees[4] != sees[2]
    assert sees[3] == "machine check"


def test_peek_poisons_nothing(stage: Stage) -> None:
    before = stage.machine.digest()
    assert isinstance(tables.peek(stage, stage.data_hpa, stage.keyid + 1), MachineCheck)
    assert stage.machine.digest() == before


def test_block_rows_count_changed_bytes_in_blocks_of_16(stage: Stage) -> None:
    same, one, address, key = (row[1:] for row in tables.block_rows(stage))
    assert same == (0, 0, 0, 0)
    assert [bool(count) for count in one] == [False, True, False, False]
    assert all(count > 8 for count in (*address, *key))


def test_owners_tell_whose_each_line_is(stage: Stage) -> None:
    assert tables.owners(stage) == [tables.VICTIM] * tables.LINES
    hpa, memory = stage.data_hpa, stage.machine.memory
    stage.store(hpa, bytes(8))
    stage.store(hpa + 64, bytes(64))
    memory.write(hpa + 128, bytes(64), stage.keyid + 1)
    held = dram.probe(memory, hpa + 256)
    dram.inject(memory, hpa + 192, held)
    expected = [tables.POISONED, tables.HOSTS, tables.OTHERS, tables.FORGED, tables.VICTIM]
    assert tables.owners(stage)[:5] == expected
    assert "1 victim's" not in drawn.owner_svg(stage)
    assert "60 victim" in drawn.owner_svg(stage)
    assert repr(drawn.owner_drawing(stage)).startswith("PHOFVVVVVVVVVVVV\n")


def test_mechanism_rows_have_every_attack_once() -> None:
    rows = tables.mechanism_rows(48)
    assert [row.mechanism for row in rows] == [*MECHANISMS, tables.NOT_STOPPED]
    names = [name for row in rows for name in row.names.split(", ")]
    assert sorted(names) == sorted(ATTACKS)
    assert all(row.attacks == len(row.names.split(", ")) for row in rows)


def test_stopper_rows_count_what_all_rows_say() -> None:
    rows, everything = tables.stopper_rows(52), tables.all_rows(52)
    assert sum(sum(row[1:]) for row in rows) == len(ATTACKS)
    assert {row.the_host_has for row in everything} <= set(GAINS)
    for row in rows:
        assert row.nothing == sum(
            one.stopped_by == row.stopped_by and one.the_host_has == "nothing" for one in everything
        )


def test_lack_rows_name_what_was_missing() -> None:
    rows = {(row.attack, row.without): row for row in tables.lack_rows(48)}
    assert rows["swap-for-zeros", "a careful guest"].stopped_by == "guest acceptance"
    assert rows["read-private", "encryption and integrity"].the_host_has == "the secret"
    assert ("replay-on-the-bus", "MACs") not in rows


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("stale-tlb", ["PT_REG", "BLOCKED", "0", "alive"]),
        ("swap-for-zeros", ["nobody's", "PENDING", "none", "alive"]),
        ("write-private", ["PT_REG", "MAPPED", "0", "dead"]),
        ("overwrite-secure-ept", ["PT_REG", "MAPPED", "0", "dead"]),
        ("corrupt-mirror", ["PT_REG", "MAPPED", "0", "alive"]),
    ],
)
def test_place_rows_tell_what_module_and_cpu_have(name: str, expected: list[str]) -> None:
    lab = AttackLab(name=name)
    lab.stage.tape.seek(len(lab.stage.tape))
    values = [row.value for row in tables.place_rows(lab.stage)]
    assert [value.split(" of ")[0] for value in values] == expected


def test_line_svg_marks_the_bytes_of_the_secret(stage: Stage) -> None:
    svg = drawn.line_svg(stage)
    said = re.search(r'aria-label="([^"]*)"', svg)
    assert said is not None
    held = stage.machine.memory.ciphertext(stage.data_hpa)
    alike = sum(a == b for a, b in zip(held, SECRET, strict=True))
    assert "as the victim would read it: 64 of 64 bytes" in said[1]
    assert f"{alike} of 64 bytes" in said[1]
    assert svg.count('fill="#009e73"') == LINE_SIZE + alike
    stage.store(stage.data_hpa, bytes(64))
    assert "machine check: no byte of it" in drawn.line_svg(stage)


def test_plot_pages_shows_the_bytes(stage: Stage) -> None:
    axes = drawn.plot_pages(stage, Figure().subplots(1, 2))
    shown = [bytes(int(dot) for dot in ax.images[0].get_array().ravel()) for ax in axes]
    assert shown == [DATA, tables.held_page(stage.machine.memory, stage.data_hpa)]
    assert axes[0].get_xlabel() == "byte of the line"
    stage.guest_write(bytes(64))
    again = drawn.plot_pages(stage, axes)
    assert len(again[1].images) == 1
    held = tables.held_page(stage.machine.memory, stage.data_hpa)
    assert bytes(int(dot) for dot in again[1].images[0].get_array().ravel()) == held


def test_page_picture_says_how_much_order_is_left(stage: Stage) -> None:
    text = repr(drawn.page_picture(stage))
    lines = {DATA[place : place + LINE_SIZE] for place in range(0, 4096, LINE_SIZE)}
    assert f"written: {len(set(DATA))} different bytes, {len(lines)} different lines" in text
    assert "held: 256 different bytes, 64 different lines of 64" in text


def test_plot_stoppers_has_a_bar_for_each_mechanism() -> None:
    rows = tables.stopper_rows(48)
    ax = drawn.plot_stoppers(rows, Figure().subplots())
    widths = [[patch.get_width() for patch in bars] for bars in ax.containers]
    assert widths == [list(column) for column in zip(*(row[1:] for row in rows), strict=True)]
    assert [label.get_text() for label in ax.get_yticklabels()] == [row.stopped_by for row in rows]
    assert ax.get_xlabel().startswith("attacks")


def test_move_list_tells_no_answer_before_its_move() -> None:
    lab = AttackLab(name="stale-tlb")
    assert drawn.move_list(lab.all_moves(), 0).count("&rarr;") == 0
    assert drawn.move_list(lab.all_moves(), 3).count("&rarr;") == 3
