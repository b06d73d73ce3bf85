"""The zap matrix, observed, against what Linux 6.16 does: who takes what, from which tree, how."""

from __future__ import annotations

import pytest

from tdxlab.kvm import zap
from tdxlab.kvm.roots import KVM_VALID_ROOTS
from tdxlab.study import zap_matrix
from tdxlab.study.plots import Canvas, side_by_side
from tdxlab.study.zap_matrix import (
    CAUSES,
    DEFAULT,
    NO_QUIRK,
    SW_PROTECTED,
    TDX,
    VM_TYPES,
    ZapRow,
    losses,
    make_scene,
    matrix,
    observe,
    short_matrix,
)

BOTH, MIRROR, DIRECT = "direct + mirror", "mirror", "direct"

#: (cause, VM) -> roots, leaves or tree, lock, remote flushes. From the sources named in zap.py.
EXPECTED = {
    ("slot deleted", TDX): (BOTH, "leaves", "write", 1),
    ("slot deleted", SW_PROTECTED): (DIRECT, "leaves", "write", 1),
    ("slot deleted", DEFAULT): (DIRECT, "tree", "read", 0),
    ("slot deleted", NO_QUIRK): (DIRECT, "leaves", "write", 1),
    ("slot created", TDX): ("-", "-", "-", 0),
    ("slot created", DEFAULT): ("-", "-", "-", 0),
    ("MMU notifier: munmap", TDX): (DIRECT, "leaves", "write", 1),
    ("MMU notifier: munmap", SW_PROTECTED): (DIRECT, "leaves", "write", 1),
    ("MMU notifier: munmap", DEFAULT): (DIRECT, "leaves", "write", 1),
    ("process exits", TDX): (DIRECT, "tree", "write", 0),
    ("process exits", SW_PROTECTED): (DIRECT, "tree", "write", 0),
    ("process exits", DEFAULT): (DIRECT, "tree", "write", 0),
    ("becomes shared", TDX): (MIRROR, "leaves", "write", 1),
    ("becomes shared", SW_PROTECTED): (DIRECT, "leaves", "write", 1),
    ("becomes private", TDX): (DIRECT, "leaves", "write", 1),
    ("becomes private", SW_PROTECTED): (DIRECT, "leaves", "write", 1),
    ("punch hole", TDX): (MIRROR, "leaves", "write", 1),
    ("punch hole", SW_PROTECTED): (DIRECT, "leaves", "write", 1),
    ("guest_memfd closed", TDX): (MIRROR, "leaves", "write", 1),
    ("guest_memfd closed", SW_PROTECTED): (DIRECT, "leaves", "write", 1),
    ("memory failure", TDX): (MIRROR, "leaves", "write", 1),
    ("memory failure", SW_PROTECTED): (DIRECT, "leaves", "write", 1),
    ("zap_all_fast", TDX): (DIRECT, "tree", "read", 0),
    ("zap_all_fast", SW_PROTECTED): (DIRECT, "tree", "read", 0),
    ("zap_all_fast", DEFAULT): (DIRECT, "tree", "read", 0),
    ("zap_gfn_range, two pages", TDX): (BOTH, "leaves", "write", 1),
    ("zap_gfn_range, two pages", DEFAULT): (DIRECT, "leaves", "write", 1),
    ("MMU context reset", TDX): ("-", "-", "-", 0),
    ("MMU context reset", DEFAULT): ("-", "-", "-", 0),
}


@pytest.fixture(scope="module")
def rows() -> dict[tuple[str, str], ZapRow]:
    """Every row, by cause and VM."""
    return {(row.cause, row.vm): row for row in matrix(*VM_TYPES)}


@pytest.mark.parametrize("key", EXPECTED, ids=" / ".join)
def test_cause_takes_from_the_roots_in_the_way_of_linux(
    key: tuple[str, str], rows: dict[tuple[str, str], ZapRow]
) -> None:
    row = rows[key]
    assert (row.roots, row.takes, row.lock, row.flushes) == EXPECTED[key]


@pytest.mark.parametrize("cause", ["slot deleted", "becomes shared", "punch hole"])
def test_each_private_leaf_of_a_td_costs_four_seamcalls(
    cause: str, rows: dict[tuple[str, str], ZapRow]
) -> None:
    row = rows[cause, TDX]
    assert (row.private, row.seamcalls, row.private_data) == (4, 16, "lost")
    assert rows[cause, SW_PROTECTED].seamcalls == 0


def test_leaf_zaps_never_hit_more_than_the_range(rows: dict[tuple[str, str], ZapRow]) -> None:
    assert {row.hits for row in rows.values() if row.takes == "leaves"} == {"range"}
    assert {row.hits for row in rows.values() if row.takes == "tree"} == {"more"}


def test_private_data_of_a_td_is_lost_where_the_mirror_is_struck_and_only_there(
    rows: dict[tuple[str, str], ZapRow],
) -> None:
    for (cause, vm), row in rows.items():
        if vm == TDX:
            assert (row.private_data == "lost") == ("mirror" in row.roots), cause


def test_sw_protected_vm_loses_mappings_of_both_kinds_and_keeps_the_data(
    rows: dict[tuple[str, str], ZapRow],
) -> None:
    for cause in ("MMU notifier: munmap", "becomes shared", "becomes private", "slot deleted"):
        row = rows[cause, SW_PROTECTED]
        assert (row.private, row.shared, row.private_data) == (4, 4, "kept")
    for cause in ("punch hole", "guest_memfd closed", "memory failure"):
        assert rows[cause, SW_PROTECTED].private_data == "lost"


def test_no_mirror_table_goes_before_the_vm_does(rows: dict[tuple[str, str], ZapRow]) -> None:
    trees = [row.cause for row in rows.values() if row.takes == "tree" and MIRROR in row.roots]
    assert trees == ["VM destroyed"]


def test_a_vm_without_private_memory_has_no_row_for_it(
    rows: dict[tuple[str, str], ZapRow],
) -> None:
    impossible = {cause.name for cause in CAUSES if cause.file}
    assert len(impossible) == 5
    assert not {cause for cause, vm in rows if vm in (DEFAULT, NO_QUIRK)} & impossible


def test_matrix_leaves_the_machine_as_it_was() -> None:
    scene = make_scene(TDX)
    before = scene.machine.digest()
    for cause in CAUSES:
        assert zap_matrix._observe(scene, TDX, cause) is not None
        assert scene.machine.digest() == before
        assert scene.vm.listener is None


def test_observe_gives_the_row_of_the_matrix(rows: dict[tuple[str, str], ZapRow]) -> None:
    assert observe(TDX, "becomes shared") == rows["becomes shared", TDX]
    assert observe(DEFAULT, "punch hole") is None


@pytest.mark.parametrize(("vm", "cause"), [("SNP", "punch hole"), (TDX, "earthquake")])
def test_observe_refuses_what_it_does_not_know(vm: str, cause: str) -> None:
    with pytest.raises(ValueError, match="choose a VM type of TDX"):
        observe(vm, cause)


def test_short_matrix_says_the_same_in_words(rows: dict[tuple[str, str], ZapRow]) -> None:
    short = {row.cause: row for row in short_matrix(list(rows.values()))}
    assert len(short) == len(CAUSES)
    assert short["becomes shared"].tdx == "M leaves, write, flush 1, 16 SEAMCALLs, data lost"
    assert short["becomes shared"].default == "not possible"
    assert short["slot created"].sw_protected == "nothing"


def test_losses_plot_shows_the_pages_of_each_row(rows: dict[tuple[str, str], ZapRow]) -> None:
    some = [rows["becomes shared", TDX], rows["MMU notifier: munmap", SW_PROTECTED]]
    (ax,) = side_by_side(Canvas().figure, 1)
    losses(some, ax)
    widths = [[patch.get_width() for patch in bars.patches] for bars in ax.containers]
    assert widths == [[4, 0], [0, 4], [0, 4]]
    assert ax.get_xlabel() == "pages: L private, data lost, K private, data kept, S shared"
    assert [label.get_text() for label in ax.get_yticklabels()] == [
        "becomes shared, TDX",
        "munmap, SW_PROTECTED",
    ]


def test_filter_that_is_ignored_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zap, "kvm_gfn_range_filter_to_root_types", lambda *_: KVM_VALID_ROOTS)
    row = observe(TDX, "MMU notifier: munmap")
    assert row is not None
    assert (row.roots, row.private_data) == (BOTH, "lost")
