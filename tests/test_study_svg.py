"""Maps and trees: what is drawn where, what they say in words, and how fast they are."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from tdxlab import views
from tdxlab.arch import PAGE_SIZE, SIZE_2M
from tdxlab.scenarios import life_of_a_td
from tdxlab.study import svg
from tdxlab.study.palette import SEPT_LOOKS
from tdxlab.views import PamtRow, SeptRow

BASE = 0x1_0000_0000
SPACE = "{http://www.w3.org/2000/svg}"


def tiles(drawn: str) -> dict[tuple[int, int], str]:
    """(x, y) of each hinted tile -> its letter."""
    found = {}
    for group in ElementTree.fromstring(drawn).iter(f"{SPACE}g"):
        if group.find(f"{SPACE}title") is not None:
            square, letter = group.find(f"{SPACE}rect"), group.find(f"{SPACE}text")
            assert square is not None
            assert letter is not None
            assert letter.text
            found[int(square.attrib["x"]), int(square.attrib["y"])] = letter.text
    return found


def test_entry_map_puts_each_entry_at_its_place() -> None:
    cells = {0: SEPT_LOOKS["MAPPED"], 33: SEPT_LOOKS["PENDING"], 511: SEPT_LOOKS["NL_BLOCKED"]}
    drawn = tiles(svg.entry_map(cells, title="table"))
    assert drawn == {svg.map_place(i): look.letter for i, look in cells.items()}
    left, top = svg.map_place(0)
    assert svg.map_place(33) == (left + svg.CELL, top + svg.CELL)
    assert svg.map_place(511) == (left + 31 * svg.CELL, top + 15 * svg.CELL)


def test_entry_map_says_in_words_what_it_shows() -> None:
    cells = dict.fromkeys(range(3), SEPT_LOOKS["MAPPED"]) | {9: SEPT_LOOKS["PENDING"]}
    root = ElementTree.fromstring(svg.entry_map(cells, title="a <table>"))
    assert root.attrib["role"] == "img"
    assert root.attrib["aria-label"] == "a <table>: 3 MAPPED, 1 PENDING, the rest free"
    assert "no entry in use" in svg.entry_map({}, title="empty")


@pytest.mark.parametrize("index", [-1, 512])
def test_entry_map_refuses_an_index_outside(index: int) -> None:
    with pytest.raises(ValueError, match=r"it has 0\.\.511"):
        svg.entry_map({index: SEPT_LOOKS["MAPPED"]}, title="table")


def test_pamt_map_shows_small_and_large_pages() -> None:
    rows = [
        PamtRow("4K", BASE + 5 * PAGE_SIZE, "PT_EPT", 0, 0, 0),
        PamtRow("4K", BASE + SIZE_2M, "PT_TDR", 0, 0, 0),
    ]
    assert tiles(svg.pamt_map(rows, BASE)) == {svg.map_place(5): "E"}
    large = [PamtRow("2M", BASE, "PT_REG", 0, 0, 0)]
    assert list(tiles(svg.pamt_map(large, BASE)).values()) == ["R"] * 512
    assert tiles(svg.pamt_map(large, BASE + SIZE_2M)) == {}


def test_sept_table_map_shows_the_entries_of_one_page_only() -> None:
    rows = [
        SeptRow(0, 0, 0, "MAPPED", 0x5000 + 8 * 3),
        SeptRow(0, 0, 0, "PENDING", 0x6000),
    ]
    assert tiles(svg.sept_table_map(rows, 0x5000)) == {svg.map_place(3): "M"}


@pytest.mark.parametrize("gpaw", [48, 52])
def test_sept_tree_shows_every_entry_and_links_each_table(gpaw: int) -> None:
    tape = life_of_a_td(gpaw=gpaw)
    tape.seek(tape.position - 46)
    (tdr,) = views.tds(tape.machine)
    rows = list(views.sept_rows(tape.machine, tdr))
    levels = 4 if gpaw == 48 else 5
    drawn = svg.sept_tree(rows, levels=levels, title="tree")
    assert sorted(tiles(drawn).values()) == sorted(SEPT_LOOKS[row.state].letter for row in rows)
    assert len(re.findall("M[0-9]+ [0-9]+L", drawn)) == levels - 1


def test_sept_tree_counts_what_it_leaves_out() -> None:
    rows = [SeptRow(0, n * PAGE_SIZE, 0, "MAPPED", 0x5000 + 8 * n) for n in range(30)]
    drawn = svg.sept_tree(rows, levels=4, title="tree", most=12)
    assert len(tiles(drawn)) == 12
    assert "and 18 more entries" in drawn
