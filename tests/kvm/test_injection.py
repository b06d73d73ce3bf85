"""Failures on purpose: which calls fail, that nothing else does, and that a rewind counts back."""

import pytest
from td_scene import TdScene, boot

from tdxlab.abi import leaves as abi
from tdxlab.abi.status import TDX_OPERAND_BUSY
from tdxlab.kvm.injection import FailNth
from tdxlab.kvm.seamcalls import tdh_mem_track, tdh_mng_rd
from tdxlab.steps import run

NUM_TDCX_FIELD = 0x9010_0001_0000_0005


def ready() -> TdScene:
    """A TD that can run."""
    td = TdScene(boot())
    td.finalize()
    return td


def tracked(td: TdScene, times: int) -> list[int]:
    """Statuses of that many calls of MEM.TRACK."""
    return [run(tdh_mem_track(td.host, td.tdx.td)) for _ in range(times)]


@pytest.mark.parametrize(
    ("n", "count", "failing"),
    [(1, 1, {0}), (2, 1, {1}), (2, 2, {1, 2}), (3, None, {2, 3, 4}), (6, 1, set())],
)
def test_fail_nth_answers_the_chosen_calls_and_no_others(
    n: int, count: int | None, failing: set[int]
) -> None:
    td = ready()
    before = td.count().get("TDH.MEM.TRACK", 0)
    with FailNth(td.host, abi.TDH_MEM_TRACK, n=n, status=TDX_OPERAND_BUSY, count=count) as made:
        statuses = tracked(td, 5)
    assert {k for k, status in enumerate(statuses) if status == TDX_OPERAND_BUSY} == failing
    assert [status for k, status in enumerate(statuses) if k not in failing] == [0] * (
        5 - len(failing)
    )
    assert (made.calls, made.answered) == (5, len(failing))
    assert td.count()["TDH.MEM.TRACK"] - before == 5 - len(failing)


def test_fail_nth_leaves_other_leaves_alone() -> None:
    td = ready()
    with FailNth(td.host, abi.TDH_MEM_TRACK, status=TDX_OPERAND_BUSY, count=None) as made:
        run(tdh_mng_rd(td.host, td.tdx.td, NUM_TDCX_FIELD))
    assert made.calls == 0
    assert td.count()["TDH.MNG.RD"] > 0


def test_fail_nth_is_gone_behind_the_with_even_after_an_error() -> None:
    td = ready()
    hardware = td.host.hardware
    with (
        pytest.raises(ZeroDivisionError),
        FailNth(td.host, abi.TDH_MEM_TRACK, status=TDX_OPERAND_BUSY, count=None),
    ):
        raise ZeroDivisionError
    assert td.host.hardware is hardware
    assert tracked(td, 1) == [0]


def test_fail_nth_stands_in_front_of_another_one() -> None:
    td = ready()
    with (
        FailNth(td.host, abi.TDH_MEM_TRACK, n=1, status=TDX_OPERAND_BUSY) as inner,
        FailNth(td.host, abi.TDH_MEM_TRACK, n=1, status=1) as outer,
    ):
        assert tracked(td, 3) == [1, TDX_OPERAND_BUSY, 0]
    assert (inner.calls, outer.calls) == (2, 3)


def test_fail_nth_counter_goes_back_with_a_rewind() -> None:
    td = ready()
    with FailNth(td.host, abi.TDH_MEM_TRACK, n=2, status=TDX_OPERAND_BUSY) as made:
        mark = td.host.journal.mark()
        assert tracked(td, 3) == [0, TDX_OPERAND_BUSY, 0]
        td.host.journal.rewind(mark)
        assert made.calls == 0
        assert tracked(td, 3) == [0, TDX_OPERAND_BUSY, 0]


def test_fail_nth_lets_kvm_clear_store_and_kick() -> None:
    td = ready()
    hpa = td.host.pages.alloc_page("test")
    with FailNth(td.host, abi.TDH_MEM_TRACK, status=TDX_OPERAND_BUSY):
        td.host.hardware.store(hpa, b"data")
        assert td.machine.memory.read(hpa, 4) == b"data"
        td.host.hardware.clear(hpa)
        assert td.machine.memory.read(hpa, 4) == bytes(4)
        td.fault_in([0x10])


@pytest.mark.parametrize(
    ("wrong", "says"),
    [({"n": 0}, "counted from 1"), ({"count": 0}, "or None"), ({"status": 1 << 64}, "RAX")],
)
def test_fail_nth_refuses_numbers_out_of_range(wrong: dict[str, int], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        FailNth(boot(), abi.TDH_MEM_TRACK, **{"status": 1, **wrong})
