"""The experiments on the PHYMEM calls: styles, bugs and who notices them, locks, retries."""

from __future__ import annotations

from collections import Counter
from functools import cache

import pytest

from tdxlab import views
from tdxlab.abi import leaves as abi
from tdxlab.abi.registers import Registers
from tdxlab.seam.locks import EXCLUSIVE, LOCK_MASK
from tdxlab.study import phymem_styles
from tdxlab.study.phymem_bugs import (
    HARMLESS,
    IMPOSSIBLE,
    NOBODY,
    STATUS,
    TYPES,
    Bug,
    Teardown,
    all_bugs,
    bug_rows,
    call_rows,
    drawn_bugs,
    outcome,
    style_rows,
)
from tdxlab.study.phymem_locks import KINDS, LOCKS, OWNER, READER, LockScene, lock_rows, retry_rows
from tdxlab.study.phymem_scene import PhymemScene
from tdxlab.study.phymem_styles import LINUX_6_16, RAW, STYLES, TYPED, Page, Style

STYLE = pytest.mark.parametrize("style", STYLES, ids=lambda style: style.name)


@cache
def scene(gpaw: int = 48) -> PhymemScene:
    """One scene for all tests: whatever is done in it is undone."""
    return PhymemScene(gpaw=gpaw)


@cache
def lock_scene(gpaw: int = 48) -> LockScene:
    return LockScene(gpaw=gpaw)


def outcomes(bug: Bug) -> tuple[str, ...]:
    """Who notices, style by style."""
    return tuple(outcome(scene(), style, bug) for style in STYLES)


# -- the teardown without a bug


@STYLE
def test_every_style_makes_the_same_calls_and_says_the_same(style: Style) -> None:
    here = scene()
    tdr, tdcs = here.values["tdr"], here.values["tdcs"]
    teardown = Teardown(here, style)
    with here.undone():
        teardown.run()
        assert [row.hpa for row in rows_left(here)] == []
        calls = here.calls
    assert calls == [
        (abi.TDH_PHYMEM_PAGE_WBINVD, here.keyed(33, here.values["private"])),
        *[(abi.TDH_PHYMEM_CACHE_WB, resume) for resume in (0, 1, 0, 1)],
        (abi.TDH_PHYMEM_PAGE_RECLAIM, tdcs),
        (abi.TDH_PHYMEM_PAGE_RECLAIM, tdr),
        (abi.TDH_PHYMEM_PAGE_WBINVD, here.keyed(32, tdr)),
    ]
    assert teardown.said == [
        f"type 0x5 owner {tdr:#x} size 0x0",
        "type 0x4 owner 0x0 size 0x0",
    ]


def rows_left(here: PhymemScene) -> list[object]:
    """Pages that the module still has for the TD."""
    return list(views.pamt_rows(here.machine))


@STYLE
def test_a_teardown_leaves_the_scene_as_it_was(style: Style) -> None:
    here = scene()
    before = here.machine.digest()
    for bug in drawn_bugs(seed=3, count=5):
        outcome(here, style, bug)
    assert here.machine.digest() == before
    assert here.lp == 0


# -- bugs


@pytest.mark.parametrize(
    ("bug", "expected"),
    [
        (Bug("flush page", "argument", "hkid", "start"), (NOBODY, NOBODY, NOBODY, TYPES)),
        (
            Bug("flush page", "argument", "hkid", "global_hkid"),
            (NOBODY, NOBODY) + 2 * (IMPOSSIBLE,),
        ),
        (Bug("flush page", "argument", "page", "keyed"), (HARMLESS, HARMLESS, TYPES, TYPES)),
        (Bug("flush page", "exchange", "hkid", "page"), (STATUS, STATUS, TYPES, TYPES)),
        (Bug("flush TDR", "exchange", "hkid", "page"), (STATUS, STATUS) + 2 * (IMPOSSIBLE,)),
        (Bug("flush TDR", "argument", "hkid", "td_hkid"), (NOBODY, NOBODY) + 2 * (IMPOSSIBLE,)),
        (Bug("flush TDR", "argument", "page", "tdcs"), (NOBODY, NOBODY, TYPES, TYPES)),
        (Bug("reclaim page", "argument", "page", "tdr"), 4 * (STATUS,)),
        (Bug("reclaim page", "argument", "page", "pfn"), (STATUS, STATUS, TYPES, TYPES)),
        (Bug("reclaim page", "argument", "page", "keyed"), (STATUS, STATUS, TYPES, TYPES)),
        (Bug("reclaim page", "exchange", "leaf", "operand"), (STATUS,) + 3 * (IMPOSSIBLE,)),
        (Bug("reclaim page", "leaf", "reclaim", "wbinvd"), (STATUS, TYPES, TYPES, TYPES)),
        (Bug("flush TDR", "leaf", "wbinvd", "cache_wb"), (STATUS, TYPES, STATUS, TYPES)),
        (Bug("reclaim page", "output", "type", "owner"), (NOBODY, NOBODY, NOBODY, TYPES)),
        (Bug("reclaim page", "output", "type", "R9"), (NOBODY,) + 3 * (IMPOSSIBLE,)),
        (Bug("reclaim page", "output", "size", "R9"), (HARMLESS,) + 3 * (IMPOSSIBLE,)),
        (Bug("start write-back", "argument", "resume", "again"), 4 * (STATUS,)),
        (
            Bug("go on with write-back", "argument", "resume", "tdr"),
            (STATUS, STATUS, HARMLESS, TYPES),
        ),
        (Bug("go on with write-back", "retry", "", "taken for done"), 4 * (STATUS,)),
        (Bug("go on with write-back", "retry", "", "started again"), 4 * (STATUS,)),
    ],
    ids=str,
)
def test_outcome_says_who_notices_a_bug_in_each_style(bug: Bug, expected: tuple[str, ...]) -> None:
    assert outcomes(bug) == expected


@pytest.mark.parametrize(
    ("bug", "text"),
    [
        (Bug("a", "argument", "page", "pfn"), "a: pfn given for page"),
        (Bug("a", "exchange", "hkid", "page"), "a: hkid and page exchanged"),
        (Bug("a", "leaf", "reclaim", "wbinvd"), "a: wbinvd called instead of reclaim"),
        (Bug("a", "output", "type", "R9"), "a: type taken from R9"),
        (Bug("a", "retry", "", "started again"), "a: started again"),
    ],
)
def test_a_bug_says_what_it_is(bug: Bug, text: str) -> None:
    assert str(bug) == text


def test_all_bugs_are_different_and_of_every_kind_and_site() -> None:
    bugs = all_bugs()
    assert len(bugs) == len(set(bugs)) == len(set(map(str, bugs)))
    assert {bug.site for bug in bugs} == set(RAW.sites)
    counts = Counter(bug.kind for bug in bugs)
    assert counts == {"argument": 72, "exchange": 8, "leaf": 12, "output": 9, "retry": 2}


@pytest.mark.parametrize("gpaw", [48, 52])
def test_style_rows_count_every_bug_once_for_each_style(gpaw: int) -> None:
    bugs = all_bugs()
    rows = style_rows(scene(gpaw), bugs)
    assert all(sum(row[2:]) == len(bugs) for row in rows if row.kind == "all")
    for style in STYLES:
        of_style = [row for row in rows if row.style == style.name]
        assert [
            sum(column) for column in zip(*(row[2:] for row in of_style[:-1]), strict=True)
        ] == [*of_style[-1][2:]]
    nobody = [row.nobody for row in rows if row.kind == "all"]
    assert nobody[0] > nobody[1] > nobody[2] > nobody[3] == 0
    exchanges = {row.style: row for row in rows if row.kind == "exchange"}
    assert exchanges["raw"].status == sum(bug.kind == "exchange" for bug in bugs)


def test_what_linux_takes_for_true_is_all_that_is_harmless_in_it() -> None:
    bugs = [bug for bug in all_bugs() if outcome(scene(), LINUX_6_16, bug) == HARMLESS]
    assert {(bug.site, bug.place) for bug in bugs} == {("go on with write-back", "resume")}


def test_types_leave_the_right_kind_and_the_missing_retry_to_the_module() -> None:
    left = [bug for bug in all_bugs() if outcome(scene(), TYPED, bug) == STATUS]
    assert {bug.kind for bug in left} == {"argument", "retry"}
    assert {bug.other for bug in left if bug.place == "page"} == {"private", "tdr", "tdcs"}


def test_drawn_bugs_depend_on_the_seed_alone() -> None:
    assert drawn_bugs(seed=5, count=10) == drawn_bugs(seed=5, count=10)
    assert drawn_bugs(seed=5, count=10) != drawn_bugs(seed=6, count=10)
    assert len(set(drawn_bugs(seed=0, count=10))) == 10
    for count in (-1, len(all_bugs()) + 1):
        with pytest.raises(ValueError, match=f"{count} bugs; there are 0 to {len(all_bugs())}"):
            drawn_bugs(seed=0, count=count)


def test_tables_have_a_column_for_each_style() -> None:
    (row,) = bug_rows(scene(), [Bug("reclaim page", "argument", "page", "pfn")])
    assert row == ("reclaim page: pfn given for page", STATUS, STATUS, TYPES, TYPES)
    written = {row.site: row[1:] for row in call_rows()}
    assert written["flush TDR"] == (
        "seamcall(41, tdr | KeyID global_hkid)",
        "wbinvd(global_hkid, tdr)",
        "wbinvd_tdr(td)",
        "wbinvd_tdr(td)",
    )
    assert list(written) == list(RAW.sites)


def test_a_wrapper_that_checks_nothing_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(phymem_styles, "require", lambda value, _: value)
    assert outcomes(Bug("reclaim page", "output", "type", "size")) == 4 * (NOBODY,)


@pytest.mark.parametrize("value", [Page(0x1000), 0x1000, True])
def test_require_takes_the_declared_type_and_no_other(value: object) -> None:
    assert phymem_styles.require(value, type(value)) is value
    with pytest.raises(TypeError, match="is no KeyId"):
        phymem_styles.require(value, phymem_styles.KeyId)


# -- locks

#: Page -> how its 1G, 2M and 4K entries and its TDR's 4K entry are locked.
#: Source: TDX module 1.5.01, pamt_manager.c, helpers.c.
EXPECTED = {
    "TDR": ("shared", "shared", "exclusive", "exclusive"),
    "TDCS page": ("shared", "shared", "exclusive", "shared"),
    "TDVPR": ("shared", "shared", "exclusive", "shared"),
    "S-EPT page": ("shared", "shared", "exclusive", "shared"),
    "private 4K": ("shared", "shared", "exclusive", "shared"),
    "private 2M": ("shared", "exclusive", "-", "shared"),
    "private 1G": ("exclusive", "-", "-", "shared"),
}


@pytest.mark.parametrize("gpaw", [48, 52])
def test_lock_rows_find_the_locks_that_the_module_takes(gpaw: int) -> None:
    here = lock_scene(gpaw)
    before = here.machine.digest()
    assert {row.page: row[1:5] for row in lock_rows(here)} == EXPECTED
    assert here.machine.digest() == before


def test_the_pages_of_the_scene_are_of_the_kinds_that_they_are_said_to_be() -> None:
    here = lock_scene()
    types = []
    for kind in KINDS:
        registers = Registers(rcx=here.pages[kind])
        here.machine.seamcall(0, abi.TDH_PHYMEM_PAGE_RDMD, registers)
        types.append((registers.rcx, registers.r8))
    assert types == [(4, 0), (5, 0), (6, 0), (8, 0), (3, 0), (3, 1), (3, 2)]


@pytest.mark.parametrize("kind", KINDS[1:])
def test_the_locks_are_held_while_reclaim_works(kind: str) -> None:
    here = lock_scene()
    words = here.machine.module.pamt.words
    registers = Registers(rcx=here.pages[kind])
    mark = here.machine.mark()
    operation = here.machine.seamcall_steps(0, abi.TDH_PHYMEM_PAGE_RECLAIM, registers)
    next(operation)
    held = [words.view[here.entry(kind, lock)] & LOCK_MASK for lock in LOCKS]
    operation.close()
    here.machine.rewind(mark)
    here.machine.journal.release(mark)
    names = ["-" if not word else "exclusive" if word & EXCLUSIVE else "shared" for word in held]
    assert tuple(names) == EXPECTED[kind]


def test_reclaim_blames_the_operand_whose_lock_is_held() -> None:
    here = lock_scene()
    assert here.reclaim("private 4K", "4K", READER) == "TDX_OPERAND_BUSY RCX"
    assert here.reclaim("private 4K", "TDR", OWNER) == "TDX_OPERAND_BUSY TDR"
    assert here.reclaim("private 4K", "2M", READER) == "TDX_SUCCESS"
    assert here.reclaim("TDR") == "TDX_TD_ASSOCIATED_PAGES_EXIST"


# -- retries


def test_retry_rows_show_who_calls_again() -> None:
    rows = {
        (row.leaf.rpartition(".")[2], row.in_a_row, row.answer[4:]): row for row in retry_rows()
    }
    seen = {key: (row.again, row.leaked) for key, row in rows.items()}
    assert seen == {
        ("RECLAIM", 9, "RND_NO_ENTROPY"): (9, 0),
        ("RECLAIM", 10, "RND_NO_ENTROPY"): (9, 2),
        ("RECLAIM", 1, "OPERAND_BUSY"): (0, 2),
        ("WBINVD", 1, "OPERAND_BUSY"): (0, 1),
        ("BLOCK", 1, "OPERAND_BUSY"): (1, 0),
        ("BLOCK", 2, "OPERAND_BUSY"): (1, 2),
        ("WB", 1, "INTERRUPTED_RESUMABLE"): (2, 0),
    }
    assert all((row.by == "nobody") == (row.again == 0) for row in rows.values())
