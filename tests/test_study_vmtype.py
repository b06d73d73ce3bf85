"""VM types side by side: the lab, the matrix and the trials against the facts about Linux 6.16."""

from __future__ import annotations

import pytest
from matplotlib.figure import Figure

from tdxlab.kvm import vm_types
from tdxlab.kvm.rmp import SnpGmem
from tdxlab.study.vmtype_lab import DEEDS, NAMES, TypeLab, words_of
from tdxlab.study.vmtype_tables import (
    DeedRow,
    flag_rows,
    matrix,
    observe,
    offer_rows,
    plot_calls,
    plot_gone,
    rows_of,
    short_matrix,
    story_rows,
    word_rows,
)
from tdxlab.study.vmtype_views import beliefs_html, pages_svg
from tdxlab.study.vmtype_ways import (
    CRASH,
    REAL,
    TrialRow,
    broken_rows,
    nonsense_rows,
    plot_wrong,
    trial_rows,
    wrong_rows,
)

#: Deed -> what it comes to, DEFAULT to TDX. "-" where such a VM cannot meet it.
EXPECTED = {
    "a slot with guest_memfd": ("-EINVAL", "ok", "-EINVAL", "-EINVAL", "ok", "ok"),
    "a read-only slot": ("ok", "ok", "ok", "-EINVAL", "-EINVAL", "-EINVAL"),
    "a private slot, dirty-logged": ("-EINVAL",) * 6,
    "a slot for SMM": ("ok", "-EINVAL", "ok", "ok", "-EINVAL", "-EINVAL"),
    "attribute PRIVATE": ("-EINVAL", "ok", "-EINVAL", "-EINVAL", "ok", "ok"),
    "pre-fault at creation": (*("ok",) * 4, "-EOPNOTSUPP", "-EOPNOTSUPP"),
    "pre-fault later": ("ok",) * 6,
    "use a private page as shared": (*("ok",) * 4, "memory fault", "memory fault"),
    "becomes shared": ("-", "ok", "-", "-", "ok", "ok"),
    "punch hole": ("-", "ok", "-", "-", "ok", "ok"),
}
#: Zap -> pages gone for a DEFAULT, an SW_PROTECTED, an SNP VM and a TD: private, shared, beside.
GONE = {
    "slot deleted": ((0, 4, 4), (2, 2, 0), (2, 2, 0), (2, 2, 0)),
    "slot deleted, quirk off": ((0, 4, 0), (2, 2, 0), (2, 2, 0), (2, 2, 0)),
    "MMU notifier: munmap": ((0, 4, 0), (2, 2, 0), (2, 2, 0), (0, 2, 0)),
    "becomes shared": (None, (2, 2, 0), (2, 2, 0), (2, 0, 0)),
    "becomes private": (None, (2, 2, 0), (2, 2, 0), (0, 2, 0)),
    "punch hole": (None, (2, 2, 0), (2, 2, 0), (2, 0, 0)),
    "zap_all_fast": ((0, 4, 4), (2, 2, 4), (2, 2, 4), (0, 2, 2)),
    "VM destroyed": ((0, 4, 4), (2, 2, 4), (2, 2, 4), (2, 2, 4)),
}


@pytest.fixture(scope="module")
def rows() -> list[DeedRow]:
    return matrix()


@pytest.fixture(scope="module")
def trials() -> dict[tuple[str, str], TrialRow]:
    return {(row.vm, row.way): row for row in trial_rows()}


# -- flags


def test_flag_rows_tell_what_a_new_vm_has() -> None:
    rows = {row.vm: row for row in flag_rows()}
    assert [row.spaces for row in rows.values()] == [2, 1, 2, 2, 1, 1, 2]
    assert [row.pre_fault_allowed for row in rows.values()] == [True] * 4 + [False] * 2 + [True]
    assert [row.no for row in rows.values()] == [0, 1, 2, 3, 4, 5, 0]
    assert not rows["DEFAULT, old SEV-ES"].has_protected_state


def test_offer_rows_have_a_bit_for_each_name() -> None:
    for row in offer_rows():
        assert row.bitmap.count("1") == len(row.types.split(", "))
    types = {row.host: row.types for row in offer_rows()}
    assert types["with the build option for tests"] == "DEFAULT, SW_PROTECTED"
    assert types["the same without the TDP MMU"] == "DEFAULT"
    assert types["AMD with all of it"] == "DEFAULT, SEV, SEV_ES, SNP"
    assert types["Intel with the TDX module up"] == "DEFAULT, TDX"


# -- the matrix


@pytest.mark.parametrize("deed", EXPECTED)
def test_matrix_answers_as_linux_does(deed: str, rows: list[DeedRow]) -> None:
    answers = {row.vm: row.answer for row in rows_of(rows, deed)}
    assert tuple(answers.get(name, "-") for name in NAMES) == EXPECTED[deed]


@pytest.mark.parametrize("deed", GONE)
def test_matrix_takes_the_mappings_that_the_cause_means(deed: str, rows: list[DeedRow]) -> None:
    gone = {row.vm: (row.private, row.shared, row.beside) for row in rows_of(rows, deed)}
    found = tuple(gone.get(name) for name in ("DEFAULT", "SW_PROTECTED", "SNP", "TDX"))
    assert found == GONE[deed]
    if deed == "slot deleted":
        assert gone["SEV"] == gone["SEV_ES"] == (0, 4, 0)


@pytest.mark.parametrize("deed", GONE)
def test_matrix_flushes_once_where_leaves_go_and_not_where_trees_do(
    deed: str, rows: list[DeedRow]
) -> None:
    flushes = {row.vm: row.flushes for row in rows_of(rows, deed)}
    once = deed not in ("zap_all_fast", "VM destroyed")
    expected = dict.fromkeys(flushes, int(once))
    if deed == "slot deleted":
        expected["DEFAULT"] = 0
    if deed == "VM destroyed":
        expected["TDX"] = 2  # as the files of both slots are closed, before the trees go
    assert flushes == expected


def test_private_page_is_mapped_in_the_mirror_of_a_td_alone(rows: list[DeedRow]) -> None:
    maps = {row.vm: row.maps for row in rows_of(rows, "use a private page")}
    assert maps == dict.fromkeys(NAMES[:5], "1 direct") | {"TDX": "1 mirror"}
    assert {row.maps for row in rows_of(rows, "use a shared page")} == {"1 direct"}


def test_rmp_changes_with_pages_and_seamcalls_go_with_mappings(rows: list[DeedRow]) -> None:
    rmp = {row.deed: row.rmp for row in rows if row.vm == "SNP" and row.rmp}
    assert rmp == {
        "pre-fault later": 1,
        "use a private page": 1,
        "punch hole": 2,
        "VM destroyed": 4,
    }
    assert {row.vm for row in rows if row.rmp} == {"SNP"}
    assert {row.vm for row in rows if row.seamcalls} == {"TDX"}
    assert {row.seamcalls for row in rows_of(rows, *list(GONE)[:1], vms=["TDX"])} == {8}


def test_short_matrix_says_it_in_words(rows: list[DeedRow]) -> None:
    short = {row.deed: row for row in short_matrix(rows)}
    assert list(short) == [deed.name for deed in DEEDS]
    assert short["use a private page"].tdx == "+1 mirror, 1 SEAMCALL"
    assert short["punch hole"].snp == "-2 p, -2 s, 2 RMP"
    assert short["punch hole"].sev == "-"
    assert short["a read-only slot"].default == "ok"


def test_observe_gives_the_row_of_the_matrix(rows: list[DeedRow]) -> None:
    assert [observe("SNP", "punch hole")] == rows_of(rows, "punch hole", vms=["SNP"])
    assert [observe("TDX", "pre-fault at creation")] == rows_of(
        rows, "pre-fault at creation", vms=["TDX"]
    )
    assert observe("SEV", "punch hole") is None


@pytest.mark.parametrize(("vm", "deed"), [("SEV-SNP", "punch hole"), ("SNP", "earthquake")])
def test_observe_refuses_what_it_does_not_know(vm: str, deed: str) -> None:
    with pytest.raises(ValueError, match="choose of DEFAULT, SW_PROTECTED"):
        observe(vm, deed)


def test_word_rows_ask_attribute_and_access() -> None:
    came = {row[:3]: row.comes_to for row in word_rows()}
    assert len(came) == 10
    assert came["SW_PROTECTED", "private", "-"] == came["SW_PROTECTED", "shared", "-"] == "direct"
    for vm, root in (("SNP", "direct"), ("TDX", "mirror")):
        assert came[vm, "private", "private"] == root
        assert came[vm, "shared", "shared"] == "direct"
        assert came[vm, "private", "shared"] == came[vm, "shared", "private"] == "memory fault"


def test_story_rows_add_up() -> None:
    use, unmap = "use a private page", "MMU notifier: munmap"
    rows = story_rows("SNP", use, unmap, use, "punch hole")
    assert [row.rmp for row in rows] == [1, 0, 0, 3]
    assert [row.leaves for row in rows] == [9, 4, 5, 4]


def test_matrix_counts_what_the_hooks_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SnpGmem, "invalidate", lambda *_: None)
    row = observe("SNP", "punch hole")
    assert row is not None
    assert row.rmp == 0


# -- the lab


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: TypeLab("SEV-SNP"), "choose from DEFAULT"),
        (lambda: TypeLab("SEV").do("fly"), "is no deed; choose from"),
        (lambda: TypeLab("SEV").do("punch hole"), "type SEV has no guest_memfd"),
        (lambda: TypeLab("SNP").do("pre-fault at creation"), "past that"),
        (lambda: TypeLab("SNP").do("slot deleted, quirk off"), "build one with it off"),
    ],
)
def test_lab_refuses_what_is_not_there(call: object, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        call()  # type: ignore[operator]


def test_lab_refuses_deeds_on_a_destroyed_vm() -> None:
    lab = TypeLab("SNP")
    lab.do("VM destroyed")
    with pytest.raises(ValueError, match="the VM is destroyed: go back"):
        lab.do("use a private page")


def test_a_page_used_as_shared_leaves_a_vmm_that_converts() -> None:
    lab = TypeLab("SNP")
    assert lab.do("use a private page as shared") == "memory fault"
    assert lab.gate.converts


def test_history_ends_at_the_position_of_the_tape() -> None:
    lab = TypeLab("SNP")
    lab.do("use a private page")
    lab.do("a read-only slot")
    assert lab.history() == [("use a private page", "ok"), ("a read-only slot", "-EINVAL")]
    lab.tape.seek(len(lab.tape) - 2)
    assert lab.history() == [("use a private page", "not ended yet")]
    lab.tape.seek(0)
    assert lab.history() == []
    assert lab.counts() == lab.start


def test_words_of_name_an_errno_as_the_documents_do() -> None:
    assert [words_of(value) for value in (0, 4096, -22, -95)] == [
        *("ok", "ok"),
        *("-EINVAL", "-EOPNOTSUPP"),
    ]


@pytest.mark.parametrize(
    ("name", "tiles"),
    [
        ("DEFAULT", {"P": 0, "S": 16, "D": 8, "M": 0, "R": 0, "F": 0}),
        ("SNP", {"P": 8, "S": 8, "D": 8, "M": 0, "R": 4, "F": 4}),
        ("TDX", {"P": 8, "S": 8, "D": 4, "M": 4, "R": 0, "F": 4}),
    ],
)
def test_pages_svg_draws_a_tile_for_each_page_and_place(name: str, tiles: dict[str, int]) -> None:
    svg = pages_svg(TypeLab(name))
    assert {letter: svg.count(f">{letter}<") for letter in tiles} == tiles


def test_views_say_what_they_show() -> None:
    lab = TypeLab("SNP")
    svg = pages_svg(lab)
    assert 'role="img"' in svg
    assert "8 private by attribute, 8 mapped in the direct root, 0 in the mirror, 4 assign" in svg
    assert beliefs_html(lab).count("(wrong)") == 3
    assert beliefs_html(TypeLab("SNP", launched=False)).count("(wrong)") == 3


# -- three ways


def test_wrong_rows_blame_flags_for_nothing_that_exists() -> None:
    rows = wrong_rows(REAL)
    assert [row.flags for row in rows] == [0] * 6
    assert {row.vm for row in rows if row.type} == {"SNP", "TDX"}
    assert {row.vm for row in rows if row.mask} == {"SW_PROTECTED", "SEV_ES", "SNP", "TDX"}


def test_type_breaks_sev_with_private_memory_and_flags_do_not(
    trials: dict[tuple[str, str], TrialRow],
) -> None:
    name = "SEV with private memory"
    assert trials[name, "flags"].as_true
    assert trials[name, "flags"][2:5] == ("ok", "direct", "direct")
    assert trials[name, "type"][2:4] == ("-EINVAL", "-EFAULT")


def test_another_mirror_crashes_the_host_where_the_type_is_asked_for_it(
    trials: dict[tuple[str, str], TrialRow],
) -> None:
    name = "another mirror, shared bit"
    assert trials[name, "truth"].private == "mirror"
    assert trials[name, "truth"].hooks > 0
    assert trials[name, "flags"].private == CRASH


def test_a_mirror_without_shared_bit_leaves_a_converted_page_mapped(
    trials: dict[tuple[str, str], TrialRow],
) -> None:
    row = trials["a mirror, no shared bit", "truth"]
    assert (row.private, row.hooks, row.to_shared) == ("direct", 0, "stays")


def test_real_types_are_as_true_with_flags(trials: dict[tuple[str, str], TrialRow]) -> None:
    assert all(trials[kind.name, "flags"].as_true for kind in REAL)
    broken = broken_rows([trials[kind.name, "type"] for kind in REAL])
    assert [(row.vm, row.pre_fault) for row in broken] == [
        ("SNP", "-EOPNOTSUPP"),
        ("TDX", "-EOPNOTSUPP"),
    ]


def test_trials_notice_a_mask_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vm_types, "_PRIVATE_MEM", 0)
    rows = {row.way: row for row in trial_rows(REAL[1:2])}
    assert not rows["type"].as_true
    assert rows["flags"].as_true


def test_nonsense_rows_leave_a_td_two_combinations() -> None:
    assert {row.vm: row.sensible for row in nonsense_rows()} == dict.fromkeys(NAMES[:5], 8) | {
        "TDX": 2
    }


# -- plots


def test_plots_draw_the_numbers_of_their_tables(rows: list[DeedRow]) -> None:
    ax = Figure().subplots()
    some = rows_of(rows, "slot deleted", vms=["DEFAULT", "TDX"])
    plot_gone(some, ax)
    assert [patch.get_width() for patch in ax.patches] == [0, 2, 4, 2, 4, 0]
    plot_calls(rows_of(rows, "punch hole"), ax)
    assert [patch.get_width() for patch in ax.patches] == [0, 0, 8, 0, 2, 0]
    wrong = wrong_rows(REAL[4:])
    plot_wrong(wrong, ax)
    assert [patch.get_width() for patch in ax.patches] == [0, 0, 1, 1, 2, 1]
    assert "F flags" in ax.get_xlabel()
