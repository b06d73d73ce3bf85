"""Addresses taken apart as KVM does it, what the module says to them, and the pictures of both."""

from __future__ import annotations

import random

import pytest

from tdxlab.kvm.page_fault import PFERR_PRIVATE_ACCESS, PageFault
from tdxlab.kvm.params import MmuParams, gfn_shared_bit
from tdxlab.kvm.roots import tdp_mmu_get_root_for_fault
from tdxlab.kvm.tdp_iter import for_each_tdp_pte, for_each_tdp_pte_min_level_all
from tdxlab.study import gpa_lab, gpa_split, gpa_views, plots
from tdxlab.study.gpa_split import EXAMPLE_GPA, Split, split
from tests.kvm.mmubench import MmuBench, tdx_bench

WIDTHS = pytest.mark.parametrize("gpaw", [48, 52])


def some_gpas(gpaw: int) -> list[Split]:
    """Edges of the space, the example in both halves, and any others."""
    draw = random.Random(gpaw)
    edges = gpa_lab.edge_gpas(gpaw).values()
    gpas = [EXAMPLE_GPA, EXAMPLE_GPA | 1 << gpaw - 1, *edges, (1 << gpaw) - 1]
    return [split(gpa, gpaw) for gpa in [*gpas, *(draw.randrange(1 << gpaw) for _ in range(20))]]


def bench(gpaw: int) -> MmuBench:
    return tdx_bench(root_level=4 if gpaw == 48 else 5, gfn_direct_bits=gfn_shared_bit(gpaw))


# -- taking apart


def test_split_gives_the_known_example() -> None:
    at = split(0x8000_1234_5678, 48)
    assert (at.is_shared, at.gfn, at.raw_gfn, at.offset) == (True, 0x12345, 0x8_0001_2345, 0x678)
    assert (at.addr, at.alias) == (0x8000_1234_5000, 0x1234_5678)
    assert [at.index(level) for level in (4, 3, 2, 1)] == [256, 0, 145, 325]
    assert (at.table, at.root, at.role) == ("shared EPT", "direct", 0x3784)
    assert split(0x8000_1234_5678, 52).root == "mirror"
    assert [split(1 << 51, 52).index(level) for level in (5, 4)] == [8, 0]
    assert [split(gpa, 52).role for gpa in (0, 1 << 51)] == [0x83785, 0x3785]


@WIDTHS
def test_split_chooses_the_root_that_kvm_chooses(gpaw: int) -> None:
    """KVM's own code, asked about the same addresses."""
    kvm = bench(gpaw)
    vcpu = kvm.load()
    for at in some_gpas(gpaw):
        code = 0 if at.is_shared else PFERR_PRIVATE_ACCESS
        root = tdp_mmu_get_root_for_fault(vcpu, PageFault(at.addr, code))
        assert (root.is_mirror, root.role) == (at.root == "mirror", at.role)


@WIDTHS
def test_index_is_the_one_that_kvm_walks_by(gpaw: int) -> None:
    for at in some_gpas(gpaw):
        kvm = bench(gpaw)
        vcpu, mirror = kvm.load(), not at.is_shared
        kvm.map(vcpu, at.gfn, mirror=mirror)
        walk = for_each_tdp_pte(kvm.vm, kvm.root(vcpu, mirror=mirror), at.gfn, at.gfn + 1)
        visited = {it.level: it.word & 511 for it in walk}
        assert visited == {level: at.index(level) for level in range(1, at.levels + 1)}


@pytest.mark.parametrize(("maxphyaddr", "gpaw"), [(46, 48), (47, 48), (48, 48), (51, 52), (52, 52)])
def test_reach_row_says_what_a_walk_over_the_whole_root_finds(maxphyaddr: int, gpaw: int) -> None:
    kvm = bench(gpaw)
    vcpu = kvm.load()
    kvm.vm.params = MmuParams(maxphyaddr=maxphyaddr)
    walk = for_each_tdp_pte_min_level_all(kvm.vm, kvm.root(vcpu), 4 if gpaw == 48 else 5)
    is_reached = any(it.gfn >= gfn_shared_bit(gpaw) for it in walk)
    row = gpa_split.reach_row(maxphyaddr, gpaw)
    assert row.whole_walk == ("reaches it" if is_reached else "stops below")


@WIDTHS
def test_alias_has_the_same_gfn_and_only_another_index_in_the_root(gpaw: int) -> None:
    for at in some_gpas(gpaw):
        other = split(at.alias, gpaw)
        assert (other.gfn, other.offset, other.half) != (at.gfn, at.offset, at.half)
        assert (other.gfn, other.offset) == (at.gfn, at.offset)
        differ = [level for level in range(1, 6) if other.index(level) != at.index(level)]
        assert differ == [at.levels]
        assert split(other.alias, gpaw) == at


@WIDTHS
def test_with_index_changes_that_index_alone(gpaw: int) -> None:
    at = split(EXAMPLE_GPA, gpaw)
    for level in range(1, at.levels + 1):
        last = gpa_split.last_index(gpaw, level)
        moved = at.with_index(level, last)
        assert moved.index(level) == last
        assert moved.with_index(level, at.index(level)) == at
        with pytest.raises(ValueError, match=rf"index {last + 1} at level {level}.*0\.\.{last}"):
            at.with_index(level, last + 1)


def test_split_refuses_what_the_guest_cannot_form() -> None:
    for gpa in (-1, 1 << 48):
        with pytest.raises(ValueError, match=r"allowed are 0\.\.0xffffffffffff \(GPAW 48\)"):
            split(gpa, 48)
    with pytest.raises(ValueError, match="choose 48 or 52"):
        split(0, 50)
    with pytest.raises(ValueError, match=r"KVM's gfns of this TD are 0\.\.0x7ffffffff"):
        gpa_split.walk_rows(1 << 35, 48)


def test_rows_show_both_widths_and_every_kind_of_vm() -> None:
    root = gpa_split.level_rows(52)[0]
    assert root == (5, "PML5", "51:48", "256 TiB", "0..7", "8..15")
    assert gpa_split.level_rows(48)[0] == (4, "PML4", "47:39", "512 GiB", "0..255", "256..511")
    assert [row.size for row in gpa_split.half_rows()] == ["128 TiB"] * 2 + ["2 PiB"] * 2
    rows = {row.vm: row for row in gpa_split.vm_rows(1 << 47 | 0x5678)}
    assert {name: row.fault_gfn for name, row in rows.items()} == {
        "DEFAULT": "0x800000005",
        "SW_PROTECTED": "0x800000005",
        "TDX, GPAW 48": "0x5",
        "TDX, GPAW 52": "0x800000005",
    }
    assert [row.root for row in rows.values()] == ["direct", "direct", "direct", "mirror"]
    assert gpa_split.vm_rows(1 << 48)[2].private == "#PF in the guest"
    assert gpa_split.last_slot_gfn(46, 48) == (1 << 34) - 1
    assert gpa_split.last_slot_gfn(52, 48) == (1 << 35) - 1


# -- what the model's machine says


@WIDTHS
def test_touch_tells_the_host_the_page_and_its_shared_bit(gpaw: int) -> None:
    lab = gpa_lab.GpaLab(gpaw=gpaw)
    found = lab.touch(EXAMPLE_GPA)
    assert found.host_is_told == "-"
    assert found.outcome.endswith("678")
    for at in some_gpas(gpaw):
        if at.addr == EXAMPLE_GPA & ~0xFFF:
            continue
        assert lab.touch(at.gpa)[1:] == (at.half, "TD exit: EPT violation", f"{at.addr:#x}")
        assert lab.last_gpa == at.gpa
    with pytest.raises(ValueError, match="is not an address of this guest"):
        lab.touch(1 << gpaw)


@WIDTHS
def test_gate_takes_exactly_the_private_half(gpaw: int) -> None:
    gpas = [at.addr for at in some_gpas(gpaw)] + [1 << gpaw, 1 << 52, 1 << 52 | 0x1000]
    for row in gpa_lab.gate(((hex(gpa), gpa) for gpa in gpas), gpaw):
        assert row.taken == (row.gpa < 1 << gpaw - 1)


def test_width_rows_are_the_module_s_answers_to_every_combination() -> None:
    taken = {row[:3] for row in gpa_lab.width_rows((48, 49, 52)) if row.answer == "TDX_SUCCESS"}
    wide = {(host, *legal) for host in (49, 52) for legal in ((48, 4), (48, 5), (52, 5))}
    assert taken == wide | {(48, 48, 4)}


# -- pictures


def test_root_map_shades_the_halves_and_frames_the_index() -> None:
    drawn = gpa_views.root_map(52, split(1 << 51, 52))
    assert "number 8; private: 0..7, shared: 8..15, out of reach: 496" in drawn.text
    x, y = gpa_views.map_place(8)
    assert f'class="tdxlab-chosen" x="{x}" y="{y}"' in drawn.svg
    assert f"M{x} {y}h{8 * gpa_views.CELL}v" in drawn.svg
    assert "tdxlab-chosen" not in gpa_views.root_map(48).svg


@WIDTHS
def test_bit_fields_show_every_bit_of_the_address(gpaw: int) -> None:
    at = split((1 << gpaw - 1) | EXAMPLE_GPA, gpaw)
    drawn = gpa_views.bit_fields(at)
    shown = sum(1 << bit for bit in range(gpaw) if f"<title>bit {bit}: 1</title>" in drawn)
    assert shown == at.gpa
    assert drawn.count("<title>bit") == gpaw
    assert 'aria-label="0x' in drawn


def test_walk_picture_greys_the_table_that_is_not_walked() -> None:
    shared, private = (gpa_views.walk_picture(split(gpa, 48)) for gpa in (1 << 47, 0))
    assert "Secure EPT (KVM&#x27;s mirror root): not looked at" in shared
    assert "shared EPT (KVM&#x27;s direct root): walked" in shared
    assert "Secure EPT (KVM&#x27;s mirror root): walked" in private
    assert "[256]" in shared


def test_halves_move_their_lines_and_keep_their_bars() -> None:
    (ax,) = plots.side_by_side(plots.Canvas(1.2).figure, 1)
    for gpa in (0, 3 << 46):
        marks = [gpa_views.Mark(48, "chosen", gpa), gpa_views.Mark(48, "alias", gpa ^ 1 << 47)]
        gpa_views.halves(marks, ax)
        places = [line.get_xdata()[0] for line in ax.lines]
        assert places == [mark.gpa / 2**40 for mark in marks]
        assert [bar.get_width() for bar in ax.patches] == [128, 128]
