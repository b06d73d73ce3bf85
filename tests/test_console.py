"""The SEAMCALL console without its widgets: books, things, the guide, answers and tables."""

from __future__ import annotations

import pytest
from matplotlib.figure import Figure

from tdxlab import views
from tdxlab.abi import leaves as abi
from tdxlab.abi.registers import Registers
from tdxlab.arch import sept_levels
from tdxlab.seam.rules import OP_RUNNABLE
from tdxlab.study.books import KEYID, PAMT, SEPT, TD, Line, compare, read_books
from tdxlab.study.console import BUILD, STAGES, TEAR_DOWN, Desk, desk_before, find_leaf
from tdxlab.study.console_tables import (
    keys_over_calls,
    page_bill,
    pages_chart,
    pages_over_calls,
    pamt_drawing,
    story,
)
from tdxlab.study.tables import USED_PAGE_TYPES
from tdxlab.study.things import free_page, resolve

BASE = 0x1_0000_0000


@pytest.fixture(params=[48, 52])
def gpaw(request: pytest.FixtureRequest) -> int:
    return int(request.param)


# -- the guide


@pytest.mark.parametrize("packages", [1, 2, 4])
def test_guide_builds_a_td_that_runs_and_takes_it_apart(gpaw: int, packages: int) -> None:
    desk = Desk(gpaw, packages)
    replies = desk.run(*BUILD)
    assert {reply.answer.kind for reply in replies} == {"done", "in the guest"}
    (tdr,) = views.tds(desk.machine)
    assert views.td_info(desk.machine, tdr)["op_state"] == OP_RUNNABLE
    assert desk.machine.cpu.vcpu_inside(0) != 0
    assert len(replies) == 17 + packages + sept_levels(gpaw)
    replies = desk.run(*TEAR_DOWN)
    assert {reply.answer.kind for reply in replies} == {"done", "left"}
    assert list(views.pamt_rows(desk.machine)) == []
    assert [row.state for row in views.key_rows(desk.machine)] == ["RESERVED"]


def test_guide_is_right_after_a_detour() -> None:
    desk = desk_before("keys", 48)
    desk.call("TDH.MNG.KEY.CONFIG", lp=3, rcx="TDR")
    desk.call("TDH.MNG.ADDCX", rcx="free page", rdx="TDR")
    step = desk.next()
    assert step is not None
    assert (step.leaf, step.lp) == ("TDH.MNG.KEY.CONFIG", 0)
    desk.run(*BUILD)
    assert desk.next() is None


@pytest.mark.parametrize("stage", STAGES)
def test_desk_before_stands_at_the_stage(stage: str) -> None:
    desk = desk_before(stage, 48)
    step = desk.next("build" if stage in BUILD else "tear down")
    assert step is not None
    assert step.stage == stage


def test_desk_before_refuses_an_unknown_stage() -> None:
    with pytest.raises(ValueError, match="finalize"):
        desk_before("finalise", 48)


def test_skipping_stages_is_running_them() -> None:
    run, skipped = Desk(48), Desk(48)
    run.run(*BUILD)
    skipped.skip(*BUILD)
    assert run.machine.digest() == skipped.machine.digest()
    assert {action.phase for action in skipped.tape.actions} == set(BUILD)


def test_two_desks_are_alike() -> None:
    assert desk_before("flush", 52).machine.digest() == desk_before("flush", 52).machine.digest()


# -- things


def test_things_follow_the_machine() -> None:
    desk = Desk(48)
    assert desk.held["free page"] == BASE
    assert "TDR" not in desk.held
    desk.run("create")
    assert (desk.held["TDR"], desk.held["free page"]) == (BASE, BASE + 0x1000)
    assert (desk.held["TD's KeyID"], desk.held["free KeyID"]) == (33, 34)
    desk.tape.seek(0)
    assert desk.held["free page"] == BASE


def test_things_offer_a_gpa_for_each_level(gpaw: int) -> None:
    held = Desk(gpaw).held
    gpas = [held[f"GPA, level {level}"] for level in range(sept_levels(gpaw))]
    assert gpas == [0x4000_0000, 0x4000_0001, 0x4000_0002, 3, 4][: sept_levels(gpaw)]
    assert f"GPA, level {sept_levels(gpaw)}" not in held


def test_things_number_pages_of_a_type() -> None:
    held = desk_before("enter", 48).held
    assert held["TDCX 6"] == BASE + 0x6000
    assert held["TDVPR"] == BASE + 0x7000
    assert held["TDCX 7"] == BASE + 0x8000


def test_free_page_passes_over_a_large_page() -> None:
    desk = desk_before("vCPU", 48)
    assert free_page(desk.machine) == BASE + 0x7000
    held = desk.held
    assert held["free 2 MiB"] == BASE + 0x20_0000


@pytest.mark.parametrize(("value", "number"), [(7, 7), ("TDR", 5), ("0x1_000", 0x1000), ("31", 31)])
def test_resolve_takes_names_and_numbers(value: int | str, number: int) -> None:
    assert resolve(value, {"TDR": 5}) == number


def test_resolve_names_what_is_near() -> None:
    with pytest.raises(ValueError, match="there is TDVPR, TDR"):
        resolve("TDRVP", {"TDR": 5, "TDVPR": 6, "source page": 7})


# -- books


def test_books_say_what_create_changed() -> None:
    reply = Desk(48).call("TDH.MNG.CREATE", rcx="free page", rdx="free KeyID")
    assert [(c.line.book, c.line.what, c.before, c.after) for c in reply.changes] == [
        (PAMT, "0x100000000", "PT_NDA", "PT_TDR"),
        (KEYID, "33", "FREE", "ASSIGNED"),
        (TD, "life cycle", "-", "TD_HKID_ASSIGNED"),
    ]


def test_books_show_the_locks_of_a_running_vcpu() -> None:
    desk = desk_before("leave", 48)
    books = read_books(desk.machine)
    assert books[Line(PAMT, 0, f"{BASE:#x}")] == "PT_TDR, shared by 1"
    assert "on LP 0" in books[Line("vCPU", BASE, f"{BASE + 0x7000:#x}")]


def test_books_show_a_block_and_its_epoch() -> None:
    desk = desk_before("finalize", 48)
    reply = desk.call("TDH.MEM.RANGE.BLOCK", rcx="GPA, level 0", rdx="TDR")
    assert [(c.line.book, c.after) for c in reply.changes] == [
        (PAMT, f"PT_REG of TD {BASE:#x}, blocked in epoch 1"),
        (SEPT, "BLOCKED"),
    ]


def test_compare_leaves_out_entries_that_nobody_can_read() -> None:
    desk = desk_before("flush", 48)
    before = read_books(desk.machine)
    desk.run("flush", "write back")
    changed = {change.line.book for change in compare(before, read_books(desk.machine))}
    assert SEPT in {line.book for line in before}
    assert changed == {KEYID, TD, "vCPU"}


def test_compare_of_equal_books_is_empty() -> None:
    books = read_books(desk_before("enter", 48).machine)
    assert compare(books, dict(books)) == []


# -- calls and answers


def test_refusal_says_status_operand_and_changes_nothing() -> None:
    desk = Desk(48)
    digest = desk.machine.memory.words.read(0, 8)
    reply = desk.call("TDH.MNG.CREATE", rcx="free page", rdx="shared KeyID")
    assert (reply.answer.kind, reply.status, reply.answer.operand) == (
        "refused",
        "TDX_OPERAND_INVALID",
        "RDX",
    )
    assert reply.changes == []
    assert desk.machine.memory.words.read(0, 8) == digest
    assert repr(reply).splitlines()[0] == "TDH.MNG.CREATE on LP 0  RCX=0x100000000 RDX=0x1f"


def test_warning_is_no_refusal() -> None:
    desk = desk_before("keys", 48)
    desk.call("TDH.MNG.KEY.CONFIG", rcx="TDR")
    reply = desk.call("TDH.MNG.KEY.CONFIG", lp=1, rcx="TDR")
    assert (reply.answer.kind, reply.status) == ("warning", "TDX_KEY_CONFIGURED")


def test_reply_shows_registers_that_were_written() -> None:
    desk = desk_before("S-EPT", 48)
    reply = desk.call(
        "TDH.MEM.PAGE.ADD", rcx="GPA, level 0", rdx="TDR", r8="free page", r9="source page"
    )
    assert reply.status == "TDX_EPT_WALK_FAILED"
    assert reply.registers["rdx"] & 7 == 3
    assert "registers now" in repr(reply)


def test_last_reply_is_a_function_of_the_position() -> None:
    desk = desk_before("init", 48)
    digest = desk.machine.digest()
    at_end = repr(desk.last_reply())
    assert desk.machine.digest() == digest
    desk.tape.seek(1)
    assert "PT_NDA -> PT_TDR" in repr(desk.last_reply())
    desk.tape.seek(0)
    assert desk.last_reply() is None
    desk.tape.seek(len(desk.tape))
    assert repr(desk.last_reply()) == at_end


def test_call_refuses_unknown_leaves_registers_and_things() -> None:
    desk = Desk(48)
    with pytest.raises(ValueError, match=r"TDH\.MNG\.CREATE"):
        desk.call("TDH.MNG.CREAT")
    with pytest.raises(ValueError, match="no modelled leaf"):
        find_leaf("TDH.SERVTD.BIND")
    with pytest.raises(ValueError, match="eax"):
        desk.call("TDH.MNG.CREATE", eax=1)
    with pytest.raises(ValueError, match="nothing here is called 'TDR'"):
        desk.call("TDH.MNG.KEY.CONFIG", rcx="TDR")
    assert len(desk.tape) == 0


def test_call_does_what_a_plain_seamcall_does() -> None:
    by_name, plain = Desk(48), Desk(48)
    by_name.call("TDH.MNG.CREATE", rcx="free page", rdx="free KeyID")
    plain.machine.seamcall(0, abi.TDH_MNG_CREATE, Registers(rcx=BASE, rdx=33))
    assert by_name.machine.digest() == plain.machine.digest()


def test_bad_parameters_are_refused(gpaw: int) -> None:
    reply = desk_before("init", gpaw).call("TDH.MNG.INIT", rcx="TDR", rdx="bad TD_PARAMS")
    assert (reply.status, reply.answer.operand) == ("TDX_OPERAND_INVALID", "EPTP_CONTROLS")


# -- tables


def test_story_counts_runs_of_a_leaf(gpaw: int) -> None:
    rows = story(Desk(gpaw), *STAGES)
    calls = {(row.stage, row.leaf): row.calls for row in rows}
    assert calls["control pages", "TDH.MNG.ADDCX"] == 6
    assert calls["S-EPT", "TDH.MEM.SEPT.ADD"] == sept_levels(gpaw) - 1
    assert calls["reclaim", "TDH.PHYMEM.PAGE.RECLAIM"] == 13 + sept_levels(gpaw)
    (keys,) = (row for row in rows if row.stage == "keys")
    assert (keys.lps, keys.answers) == ("0, 2", "SUCCESS")
    assert rows[-1].pages == 0


def test_pages_over_calls_end_where_the_tape_stands() -> None:
    desk = desk_before("enter", 48)
    rows = pages_over_calls(desk.tape)
    assert [row.call for row in rows] == list(range(len(desk.tape) + 1))
    assert {kind: getattr(rows[-1], kind) for kind in USED_PAGE_TYPES} == {
        "PT_REG": 1,
        "PT_TDR": 1,
        "PT_TDCX": 11,
        "PT_TDVPR": 1,
        "PT_EPT": 3,
    }
    assert desk.tape.position == len(desk.tape)


def test_keys_over_calls_follow_one_keyid_round() -> None:
    desk = Desk(48)
    desk.run(*STAGES)
    rows = keys_over_calls(desk.tape)
    assert [(row.keyid, row.state, row.waits_for) for row in rows] == [
        (32, "RESERVED", "-"),
        (33, "ASSIGNED", "-"),
        (33, "FLUSHED", "0, 1"),
        (33, "FLUSHED", "1"),
        (33, "FLUSHED", "-"),
        (33, "FREE", "-"),
    ]


def test_page_bill_adds_up(gpaw: int) -> None:
    desk = desk_before("enter", gpaw)
    *parts, total = page_bill(desk.machine, BASE)
    assert [row.pages for row in parts] == [1, 6, 1, 5, sept_levels(gpaw) - 1, 1]
    assert total.pages == sum(row.pages for row in parts)


def test_pamt_drawing_counts_what_it_draws() -> None:
    drawn = pamt_drawing(desk_before("enter", 48).machine)
    assert "11" in repr(drawn)
    assert "1 PT_TDR, 11 PT_TDCX, 1 PT_TDVPR, 3 PT_EPT, 1 PT_REG" in drawn.svg


def test_pages_chart_stacks_the_numbers_of_the_table() -> None:
    rows = pages_over_calls(desk_before("enter", 48).tape)
    ax = pages_chart(rows, Figure().subplots())
    tops = [patch.get_paths()[0].vertices[:, 1].max() for patch in ax.collections]
    assert tops == [1, 12, 13, 16, 17]
    assert ax.get_ylabel() == "4 KiB pages"
