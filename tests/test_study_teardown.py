"""Teardowns on a tape: both orders, the ledger, what leaks, the formulas, the published times."""

from __future__ import annotations

from collections import Counter

import pytest
from matplotlib.figure import Figure

from tdxlab.abi.status import TDX_OPERAND_BUSY, TDX_RND_NO_ENTROPY
from tdxlab.arch import SIZE_1G
from tdxlab.study import teardown_lab
from tdxlab.study.show import text_table
from tdxlab.study.teardown_lab import (
    CACHE_WB,
    FREE,
    FREEID,
    IN_USE,
    KEYID_FIRST,
    KEYID_LAST,
    LEAKED,
    ORDERS,
    PHASES,
    PRIVATE,
    RELEASE,
    TDCS,
    TDCX,
    TDR,
    TDVPR,
    Failure,
    TeardownLab,
    leaf_number,
)
from tdxlab.study.teardown_tables import (
    FAILURES,
    cost_rows,
    leak_rows,
    leak_text,
    order_rows,
    published,
    role_rows,
    sizes_of,
    tables_for,
    time_rows,
)
from tdxlab.study.teardown_tries import CALLS, try_call, try_free_table, try_remove, try_rows
from tdxlab.study.teardown_views import (
    cause_table,
    host_svg,
    key_table,
    ledger_drawing,
    module_svg,
    plot_costs,
    plot_orders,
    plot_times,
)

BUSY = TDX_OPERAND_BUSY
RECLAIM = "TDH.PHYMEM.PAGE.RECLAIM"
SHAPES = [
    {},
    {"pages": 1, "vcpus": 1, "packages": 1},
    {"pages": 24, "vcpus": 4, "packages": 4},
    {"pages": 5, "vcpus": 3, "packages": 2, "spread": True},
    {"pages": 2, "vcpus": 4, "packages": 3},
]


@pytest.fixture
def lab() -> TeardownLab:
    return TeardownLab(gpaw=48)


# -- counting


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("gpaw", [48, 52])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cost_rows_formula_and_count_agree(shape: dict[str, int], gpaw: int, order: str) -> None:
    lab = TeardownLab(gpaw=gpaw, **shape)
    before = dict(lab.machine.seamcalls)
    lab.destroy(order)
    rows = cost_rows(lab)
    assert [row for row in rows if row.expected != row.counted] == []
    made = sum(lab.machine.seamcalls.values()) - sum(before.values())
    assert rows[-1].counted == made == sum(lab.calls().values())
    assert sorted(row.phase for row in rows[:-1]) == sorted(PHASES)


def test_cost_rows_total_follows_its_own_formula(lab: TeardownLab) -> None:
    n, v, p, t, c, d = sizes_of(lab)
    assert (n, v, p, t, c, d) == (6, 2, 2, 3, 5, 6)
    for order, calls in ((KEYID_LAST, 4), (KEYID_FIRST, 1)):
        lab.destroy(order)
        assert cost_rows(lab)[-1].counted == calls * n + t + v * (c + 2) + d + p + 4


def test_tables_for_agrees_with_a_table_for_each_region_that_is_touched() -> None:
    assert [tables_for(gib * SIZE_1G // 4096, 48) for gib in (1, 4, 16)] == [514, 2053, 8209]
    assert tables_for(1, 52) == tables_for(1, 48) + 1 == 4
    for pages in (1, 512, 513, 1 << 18, (1 << 18) + 1):
        gfns = {0, pages - 1, *range(0, pages, 512)}
        wanted = sum(len({gfn >> 9 * k for gfn in gfns}) for k in range(1, 5))
        assert tables_for(pages, 52) == wanted


def test_order_rows_differ_by_three_calls_a_page(lab: TeardownLab) -> None:
    for row in order_rows([1, 4, 64], like=lab):
        assert row.keyid_last - row.keyid_first == 3 * row.pages
        assert row.pages == row.memory_gib << 18


# -- the ledger


@pytest.mark.parametrize("order", ORDERS)
def test_destroy_gives_everything_back_in_both_orders(lab: TeardownLab, order: str) -> None:
    lab.destroy(order)
    assert {(row.host, row.module, row.cause) for row in lab.ledger()} == {(FREE, "PT_NDA", "")}
    assert not lab.keyid_is_lost()
    assert lab.key_lines()[1][1:] == (FREE, "FREE", 0)
    assert lab.td.vm.vm_bugged == ""
    assert lab.machine.module.halted is None
    assert lab.machine.create_td(vcpus=1, memory="64 KiB").touch(0).ok


def test_ledger_has_every_page_of_the_td_at_the_beginning(lab: TeardownLab) -> None:
    rows = lab.ledger()
    assert {row.host for row in rows} == {IN_USE}
    roles = Counter(row.role for row in rows)
    assert (roles[PRIVATE], roles[TDVPR], roles[TDCX], roles[TDCS], roles[TDR]) == (6, 2, 10, 6, 1)
    owned = {hpa for hpa, role in lab.roles.items() if role != TDR}
    assert lab.machine.module is not None
    assert sum(row.pages for row in role_rows(lab)) == len(owned) + 1 == 28


@pytest.mark.parametrize("order", ORDERS)
def test_positions_give_the_same_state_from_both_sides(lab: TeardownLab, order: str) -> None:
    lab.destroy(order, Failure(RECLAIM, 2, BUSY))
    forwards = []
    for position in range(0, len(lab.tape) + 1, 3):
        lab.tape.seek(position)
        forwards.append((lab.machine.digest(), lab.calls(), lab.ledger()))
    for position in reversed(range(0, len(lab.tape) + 1, 9)):
        lab.tape.seek(position)
        assert (lab.machine.digest(), lab.calls(), lab.ledger()) == forwards[position // 3]
    lab.tape.seek(0)
    assert lab.machine.host.hardware is lab.machine


def test_go_to_stands_before_the_first_call_of_a_phase(lab: TeardownLab) -> None:
    for order in ORDERS:
        lab.destroy(order)
        expected = {row.phase: row.expected for row in cost_rows(lab)}
        done: list[str] = []
        for phase in lab.phases():
            lab.go_to(phase)
            counted = lab.calls_per_phase()
            assert {name for name, calls in counted.items() if calls} == set(done)
            assert all(counted[name] == expected[name] for name in done)
            done.append(phase)


def test_go_to_refuses_a_phase_that_does_not_come(lab: TeardownLab) -> None:
    lab.destroy(KEYID_LAST, Failure("TDH.MNG.VPFLUSHDONE", 1, BUSY))
    with pytest.raises(ValueError, match="no phase 'FREEID' in this"):
        lab.go_to(FREEID)


@pytest.mark.parametrize("wrong", [{"pages": 0}, {"pages": 25}, {"vcpus": 5}, {"packages": 0}])
def test_lab_refuses_sizes_out_of_range(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="choose 1 to"):
        TeardownLab(**wrong)


def test_destroy_refuses_unknown_orders_and_leaves(lab: TeardownLab) -> None:
    with pytest.raises(ValueError, match="choose one of KeyID last, KeyID first"):
        lab.destroy("KeyID never")
    with pytest.raises(ValueError, match=r"no leaf 'TDH.NO'"):
        lab.destroy(KEYID_LAST, Failure("TDH.NO", 1, BUSY))
    assert leaf_number("TDH.MEM.TRACK") == 38


# -- failures


def leaks(order: str, failure: Failure) -> tuple[str, bool]:
    lab = TeardownLab(gpaw=48)
    lab.destroy(order, failure)
    return leak_text(lab.leaked()), lab.keyid_is_lost()


ALL_BUT_PRIVATE = "2 TDVPR, 10 TDCX, 6 TDCS, 3 S-EPT, TDR"


@pytest.mark.parametrize(
    ("failure", "last", "first"),
    [
        (Failure("TDH.MEM.TRACK", 1, BUSY), "", ""),
        (Failure("TDH.MEM.PAGE.REMOVE", 1, BUSY, 2), "1 private, TDR", ""),
        (Failure("TDH.PHYMEM.PAGE.WBINVD", 3, BUSY), "1 private", ""),
        (Failure("TDH.VP.FLUSH", 2, BUSY), ALL_BUT_PRIVATE, ALL_BUT_PRIVATE),
        (Failure("TDH.PHYMEM.CACHE.WB", 2, 0), ALL_BUT_PRIVATE, f"6 private, {ALL_BUT_PRIVATE}"),
        (Failure("TDH.MNG.KEY.FREEID", 1, BUSY), ALL_BUT_PRIVATE, f"6 private, {ALL_BUT_PRIVATE}"),
        (Failure("TDH.MNG.VPFLUSHDONE", 1, BUSY), ALL_BUT_PRIVATE, ""),
        (Failure(RECLAIM, 6, BUSY), "1 TDVPR, TDR", "1 private, TDR"),
        (Failure(RECLAIM, 22, BUSY), "TDR", "1 TDCS, TDR"),
        (Failure(RECLAIM, 1, TDX_RND_NO_ENTROPY, 9), "", ""),
        (Failure(RECLAIM, 1, TDX_RND_NO_ENTROPY, 10), "1 TDCX, TDR", "1 private, TDR"),
    ],
    ids=str,
)
def test_destroy_leaks_what_cannot_be_given_back(failure: Failure, last: str, first: str) -> None:
    for order, expected in ((KEYID_LAST, last), (KEYID_FIRST, first)):
        leaked, lost = leaks(order, failure)
        assert leaked == expected
        assert lost == (ALL_BUT_PRIVATE in expected)


def test_a_leaked_page_is_never_handed_out_again() -> None:
    lab = TeardownLab(gpaw=48)
    lab.destroy(KEYID_LAST, Failure("TDH.MNG.KEY.FREEID", 1, BUSY))
    leaked = set(lab.leaked_pages())
    assert leaked == {row.hpa for row in lab.ledger() if row.host == LEAKED}
    pages = lab.machine.host.pages
    assert leaked.isdisjoint(pages.alloc_page("next") for _ in range(300))
    other = lab.machine.create_td(vcpus=1, memory="64 KiB")
    assert other.tdx.hkid != lab.keyid


def test_leak_rows_do_every_failure_and_leave_the_last_teardown(lab: TeardownLab) -> None:
    rows = leak_rows(lab)
    assert len(rows) == len(FAILURES)
    assert rows[0][1:] == (0, "nothing", "free", "fine")
    assert {row.keyid for row in rows} == {"lost", "free"}
    assert lab.failure == FAILURES[-1]


def test_failure_says_what_fails() -> None:
    assert str(Failure("TDH.MEM.TRACK", 2, BUSY, None)) == (
        "TDH.MEM.TRACK number 2 and all after it: TDX_OPERAND_BUSY"
    )


def test_a_skipped_package_is_what_the_module_still_waits_for(lab: TeardownLab) -> None:
    lab.destroy(KEYID_LAST, Failure("TDH.PHYMEM.CACHE.WB", 2, 0))
    assert lab.key_lines()[1] == (lab.keyid, lab.td.vm.name, "FLUSHED", 1)
    assert dict(lab.tally.refused.items()) == {"TDX_WBCACHE_NOT_COMPLETE": 1}
    lab.go_to(CACHE_WB)
    assert lab.key_lines()[1].to_write_back == 2


# -- tries


def test_try_rows_never_allow_both_ways_at_once(lab: TeardownLab) -> None:
    lab.destroy(KEYID_FIRST)
    rows = try_rows(lab)
    assert [row.td for row in rows] == [
        "TD_KEYS_CONFIGURED",
        "TD_KEYS_CONFIGURED",
        "TD_BLOCKED",
        "TD_BLOCKED",
        "TD_TEARDOWN",
    ]
    done = [(row.block == "TDX_SUCCESS", row.reclaim == "TDX_SUCCESS") for row in rows]
    assert done == [(True, False)] * 2 + [(False, False)] * 2 + [(False, True)]
    assert [(row.remove, row.free_table) for row in rows][::4] == [
        ("fine", "VM dead"),
        ("VM dead", "fine"),
    ]


def test_tries_leave_nothing_behind(lab: TeardownLab) -> None:
    lab.destroy(KEYID_FIRST)
    lab.go_to(RELEASE)
    before = lab.machine.digest(), lab.td.vm.vm_bugged
    answers = {leaf: try_call(lab, leaf) for leaf in CALLS}
    assert answers[RECLAIM] == "TDX_SUCCESS"
    assert "without a KeyID" in try_remove(lab)
    assert try_free_table(lab) == "fine"
    assert (lab.machine.digest(), lab.td.vm.vm_bugged) == before


# -- published times


def test_published_has_three_tds_in_both_orders() -> None:
    rows = published()
    assert [(row.vcpus, row.memory_gb, row.seconds) for row in rows] == [
        (4, 18, 72),
        (4, 18, 24),
        (32, 107, 517),
        (32, 107, 134),
        (64, 400, 5539),
        (64, 400, 467),
    ]
    assert [row.order for row in rows] == [KEYID_LAST, KEYID_FIRST] * 3
    assert all("KVM_TDX_TERMINATE_VM" in row.source for row in rows)


def test_time_rows_are_calibrated_with_the_smallest_td_of_each_order(lab: TeardownLab) -> None:
    rows = time_rows(lab)
    assert [row.modelled_s for row in rows[:2]] == [72, 24]
    assert [row.ratio for row in rows[:2]] == ["1.00", "1.00"]
    for row, first in zip(rows[2:], rows[:2] * 2, strict=True):
        exact = first.published_s * row.seamcalls / first.seamcalls
        assert row.modelled_s == round(exact)
    assert float(rows[4].ratio) > 3 > 1.2 > float(rows[5].ratio)


# -- drawings


def test_drawings_say_what_they_show(lab: TeardownLab) -> None:
    lab.destroy(KEYID_LAST, Failure(RECLAIM, 1, BUSY))
    rows = lab.ledger()
    assert 'aria-label="Page ledger of the host: 26 free, 2 leaked"' in host_svg(rows)
    assert 'aria-label="The same pages in the PAMT: 26 PT_NDA' in module_svg(rows)
    assert "TDX_TD_ASSOCIATED_PAGES_EXIST" in cause_table(rows)
    assert "nothing is leaked" in cause_table([])
    assert f'<td style="text-align:left">{lab.keyid:#x}</td>' in key_table(lab.key_lines())
    text = repr(ledger_drawing(lab))
    assert "TDCX       LFFFFFFFFF" in text
    assert text.count("L") == 2 + len(["the legend"])


def test_plots_draw_the_numbers_of_their_tables(lab: TeardownLab) -> None:
    lab.destroy(KEYID_LAST)
    lab.go_to(FREEID)
    ax = plot_costs(cost_rows(lab), Figure().subplots())
    widths = [patch.get_width() for patch in ax.patches]
    costs = cost_rows(lab)[:-1]
    assert widths == [value for row in costs for value in (row.expected, row.counted)]
    assert ax.get_xlabel() == "SEAMCALLs"

    orders = order_rows([1, 4], like=lab)
    ax = plot_orders(orders, Figure().subplots())
    last, first = (list(line.get_ydata()) for line in ax.lines)
    assert last == [row.keyid_last / 1e6 for row in orders]
    assert first == [row.keyid_first / 1e6 for row in orders]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("private memory, GiB", "SEAMCALLs, millions")

    times = time_rows(lab)
    ax = plot_times(times, Figure().subplots())
    seconds = [value for row in times for value in (row.published_s, row.modelled_s)]
    assert [patch.get_width() for patch in ax.patches] == seconds
    assert sum("illustrative" in label.get_text() for label in ax.get_yticklabels()) == len(times)


# -- damage is noticed


def test_a_tally_that_forgets_failed_calls_is_noticed(
    lab: TeardownLab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teardown_lab, "is_error", lambda status: False)
    lab.destroy(KEYID_LAST, Failure(RECLAIM, 1, BUSY))
    assert dict(lab.tally.refused.items()) == {}
    assert "TDX_OPERAND_BUSY" in text_table(leak_rows(lab, failures=FAILURES[:1]))
