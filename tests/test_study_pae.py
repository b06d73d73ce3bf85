"""The tables and drawings of notebook 14, and its lab."""

from __future__ import annotations

import re

import pytest
from matplotlib.figure import Figure

from tdxlab.kvm.pae_rules import complaints
from tdxlab.kvm.shadow_params import AMD, DESIGNS, INTEL, REVIEWED, RFC, SPECIAL
from tdxlab.study import pae_tables
from tdxlab.study.pae_lab import GUESTS, PAE, PAGING_OFF, SPOILS, TWO_LEVELS, PaeLab
from tdxlab.study.pae_views import (
    bit_look,
    bits_svg,
    pdpte_drawing,
    plot_counts,
    plot_memory,
    plot_switches,
    tree_svg,
)

# -- the lab


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("guest", GUESTS)
def test_use_reaches_the_page_of_each_process(design: str, guest: str) -> None:
    lab = PaeLab(design=design, guest=guest, vcpus=2)
    uses = [(0, 0)] if guest == PAGING_OFF else [(0, 0), (5, 3), (2, 0)]
    assert {lab.use(*use, vcpu=1) for use in uses} == {"ok"}
    assert complaints(lab.vm) == []


def test_seek_leads_back_to_every_state() -> None:
    lab = PaeLab()
    lab.use(0, 3)
    end = lab.vm.digest()
    lab.tape.seek(4)
    middle = lab.vm.digest()
    lab.tape.seek(0)
    lab.tape.seek(len(lab.tape))
    assert lab.vm.digest() == end
    lab.tape.seek(4)
    assert lab.vm.digest() == middle != end


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda lab: lab.use(6, 0), "process 6; choose 0 to 5"),
        (lambda lab: lab.use(0, 4), "GiB 4; choose 0 to 3"),
        (lambda lab: lab.use(0, 0, vcpu=1), "vCPU 1; choose 0 to 0"),
        (lambda lab: lab.zap(1), "links no page directory"),
        (lambda lab: lab.spoil(0, "all ones"), "no root to spoil"),
        (lambda lab: lab.spoil(0, "jam"), "choose from"),
        (lambda lab: PaeLab(guest="PDP-11"), "choose from paging off"),
        (lambda lab: PaeLab(encrypted=True), "choose AMD"),
    ],
)
def test_lab_refuses_what_is_not_there(call: object, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        call(PaeLab())  # type: ignore[operator]


@pytest.mark.parametrize("what", SPOILS)
def test_spoil_leaves_the_rules_broken_or_the_root_wrong(what: str) -> None:
    lab = PaeLab(vendor=AMD)
    lab.use(0, 3)
    before = lab.slots()
    lab.spoil(3, what)
    assert lab.slots()[:3] == before[:3]
    assert lab.slots()[3] != before[3]


def test_registers_are_those_of_a_running_intel_vcpu() -> None:
    lab = PaeLab()
    assert lab.registers() == []
    lab.use(0, 3)
    assert lab.registers() == [row.raw for row in lab.slots()]
    amd = PaeLab(vendor=AMD)
    amd.use(0, 3)
    assert amd.registers() == []


# -- tables


@pytest.mark.parametrize("maxphyaddr", [36, 46, 48, 52])
def test_entry_rows_judge_every_kind(maxphyaddr: int) -> None:
    verdicts = {row.entry: row.verdict for row in pae_tables.entry_rows(maxphyaddr)}
    refused = {name for name, verdict in verdicts.items() if verdict == "refused"}
    assert refused == {
        "ordinary link",
        "INVALID_PAGE",
        "one bit too high",
        "bit 63 (NX elsewhere)",
    }


def test_outcome_rows_show_that_absent_is_legal() -> None:
    rows = {row.table: row for row in pae_tables.outcome_rows(46)}
    assert rows["none present"][1:] == ("fine", "fine", "fine", "#PF")
    assert rows["slot 3 illegal"][1:] == ("#GP", "VM entry fails", "fine", "#PF")
    assert rows["slot 1 illegal"][1:] == ("#GP", "VM entry fails", "fine", "fine")


def test_spoil_rows_tell_the_vendors_apart() -> None:
    rows = {(row.vendor, row.stored): row[2:] for row in pae_tables.spoil_rows(48)}
    assert rows[INTEL, "all ones"] == ("VM entry fails", "VM entry fails")
    assert rows[AMD, "all ones"] == ("illegal shadow table", "ok")
    assert rows[INTEL, "0"] == ("faults for ever", "ok")


def test_switch_rows_keep_roots_of_2_level_guests_alone() -> None:
    assert [row[1:] for row in pae_tables.switch_rows()] == [
        *((0, 0, 0), (2, 0, 0), (3, 0, 0), (4, 0, 0), (5, 5, 5), (6, 6, 6))
    ]
    assert all(len(set(row[1:])) == 1 for row in pae_tables.switch_rows(PAE))


def test_memory_rows_count_roots_and_pages_kept_ready() -> None:
    for row in pae_tables.memory_rows():
        shared = row.processes + row.vcpus
        assert row.low_pages == (row.vcpus if row.design == SPECIAL else shared)


def test_count_rows_store_less_without_the_default_entry() -> None:
    rows = {row.counted: row for row in pae_tables.count_rows()}
    assert rows["slots_stored"].special > rows["slots_stored"].rfc > rows["slots_stored"].reviewed
    assert rows["vm_entries"].special == rows["vm_entries"].rfc == rows["vm_entries"].reviewed


def test_break_rows_show_each_step_to_be_needed() -> None:
    rows = {row.left_out: row for row in pae_tables.break_rows(48)}
    assert "ok" not in " ".join(row.guest_gets for row in rows.values()).split(" / ")
    assert rows["PDPTEs in the key of a PAE guest's root"].guest_gets.startswith("the page of anot")
    assert "free memory" in rows["kicking vCPUs at a remote flush"].guest_gets


def test_break_rows_come_from_the_steps_and_not_from_the_story() -> None:
    lab = PaeLab(design=REVIEWED, guest=PAE)
    vm = lab.vm
    for index in range(4):
        entry = vm.read_guest(lab.cr3(1) + 8 * index, 8) or 0
        vm.write_guest(lab.cr3(0) + 32 + 8 * index, entry, 8)
    assert lab.use_cr3(lab.cr3(0) + 32, 0) == vm.map.guest.base + 0x42000


def test_tight_rows_lose_nothing() -> None:
    rows = pae_tables.tight_rows()
    assert {row.lost for row in rows} == {0}
    single = {row.design: row.first for row in rows if (row.low, row.elsewhere) == (1, 60)}
    assert single == {SPECIAL: "ok", RFC: "-ENOMEM", REVIEWED: "-ENOMEM"}


# -- drawings


def test_bit_look_knows_every_kind_of_bit() -> None:
    entry = 0x8001_4000_1831
    names = {bit: bit_look(entry, bit, 48, 47).name for bit in (0, 1, 4, 5, 11, 12, 47, 48)}
    assert names == {
        0: "present",
        1: "reserved, clear",
        4: "PWT, PCD",
        5: "reserved, set",
        11: "ignored, set",
        12: "address",
        47: "C-bit",
        48: "reserved, clear",
    }
    assert bit_look(entry & ~1, 5, 48).name == "reserved, set, and P = 0"


def test_bits_svg_says_which_slots_are_refused() -> None:
    svg = bits_svg([0x1001, 0x1003, 0, 1 << 63], 46)
    assert 'role="img"' in svg
    assert "slot 0 fine, slot 1 refused, slot 2 fine, slot 3 fine" in svg
    assert len(re.findall("<rect", svg)) >= 4 * 64


def test_pdpte_drawing_has_words_too() -> None:
    assert "refused, reserved bits 0x26" in repr(pdpte_drawing(0x1_4000_1827, 48))
    assert repr(pdpte_drawing(0, 48)).endswith("fine")


def test_tree_svg_counts_directories_and_tables() -> None:
    lab = PaeLab(design=SPECIAL, guest=TWO_LEVELS)
    lab.use(0, 3)
    svg = tree_svg(lab)
    assert "Root: 4 of 4 slots present; 4 page directories, 1 tables" in svg
    assert svg.count("M112 ") == 4


def test_plots_draw_the_numbers_of_their_tables() -> None:
    (ax,) = [Figure().subplots()]
    rows = pae_tables.switch_rows(most=2)
    plot_switches(rows, ax)
    assert [patch.get_width() for patch in ax.patches] == [0, 0, 0, 2, 0, 0]
    assert ax.get_xlabel() == "roots built"
    memory = pae_tables.memory_rows((1, 2))
    plot_memory(memory, ax)
    assert [patch.get_width() for patch in ax.patches] == [row.low_pages for row in memory]
    plot_counts({"a": 3, "b": 4}, RFC, ax)
    assert [patch.get_width() for patch in ax.patches] == [3, 4]
