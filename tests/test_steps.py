"""Step generators: schedules, and SEAMCALLs that others run into half-done."""

from collections.abc import Iterator

import pytest

from tdxlab import steps
from tdxlab.abi import leaves as abi
from tdxlab.abi import status as s
from tdxlab.abi.outcome import IN_GUEST
from tdxlab.abi.registers import Registers
from tdxlab.bare import BareMachine
from tdxlab.host import Host
from tdxlab.host_td import HostTd
from tdxlab.scenarios import booted_machine
from tdxlab.steps import Operation, Schedule

GPA = 0x4000_0000


def counting(name: str, moves: int, log: list[str]) -> Operation:
    """An operation that yields `moves` times and notes where it is."""
    for move in range(moves):
        log.append(f"{name}{move}")
        yield (name, move)
    return name.upper()


def test_run_drives_to_the_end_and_returns_the_result() -> None:
    log: list[str] = []
    assert steps.run(counting("a", 3, log)) == "A"
    assert log == ["a0", "a1", "a2"]


def test_run_closes_an_operation_that_waits_for_ever() -> None:
    closed: list[bool] = []

    def waiting() -> Operation:
        try:
            yield (steps.WAIT, "nobody", 7)
        finally:
            closed.append(True)

    with pytest.raises(steps.Deadlock, match="nobody"):
        steps.run(waiting())
    assert closed == [True]


def test_finished_takes_no_step_and_returns_the_result() -> None:
    assert list(steps.finished(-22)) == []
    assert steps.run(steps.finished(-22)) == -22


def test_round_robin_moves_each_in_turn() -> None:
    log: list[str] = []
    schedule = steps.round_robin([counting("a", 3, log), counting("b", 1, log)])
    assert log == ["a0", "b0", "a1", "a2"]
    assert schedule.results == {0: "A", 1: "B"}
    assert schedule.history == [0, 1, 0, 1, 0, 0]


def orders(seed: int) -> tuple[list[str], list[int]]:
    log: list[str] = []
    schedule = steps.seeded([counting(name, 3, log) for name in "abc"], seed)
    return log, schedule.history


def test_seeded_gives_one_order_for_each_seed() -> None:
    assert orders(7) == orders(7)
    assert len({tuple(orders(seed)[1]) for seed in range(20)}) > 10


def test_replay_moves_in_the_order_of_an_earlier_history() -> None:
    first, history = orders(3)
    log: list[str] = []
    schedule = Schedule([counting(name, 3, log) for name in "abc"])
    schedule.replay(history)
    assert (log, schedule.ready) == (first, [])


def test_advance_refuses_what_is_finished_or_was_never_there() -> None:
    schedule = Schedule([counting("a", 0, [])])
    assert schedule.advance(0) is False
    for number in (0, 1, -1):
        with pytest.raises(ValueError, match=rf"operation {number} cannot move; ready are \[\]"):
            schedule.advance(number)


def test_a_schedule_shows_where_each_operation_stands() -> None:
    schedule = Schedule([counting("a", 2, []), counting("b", 2, [])])
    schedule.advance(0)
    schedule.advance(0)
    schedule.advance(1)
    assert schedule.labels == {0: ("a", 1), 1: ("b", 0)}
    assert hash(schedule.labels[0])


# -- SEAMCALLs


class Scene:
    """A running TD with pages at GPA and GPA + 4096, and operations on it."""

    def __init__(self) -> None:
        self.machine = booted_machine()
        self.host = Host(self.machine)
        self.td = HostTd(self.host)
        self.td.add_vcpu(lp=0)
        self.pages = [self.td.add_page(GPA), self.td.add_page(GPA + 4096)]
        self.td.finalize()
        self.free = [self.host.take_page() for _ in range(2)]

    def start(self, lp: int, leaf: int, **registers: int) -> Operation:
        return self.machine.seamcall_steps(lp, leaf, Registers(**registers))

    def call(self, lp: int, leaf: int, **registers: int) -> int:
        return self.machine.seamcall(lp, leaf, Registers(**registers))

    def aug(self, lp: int, number: int) -> Operation:
        """Map a free page at the next GPA; `number` says which page."""
        operands = {"rcx": GPA + 0x2000, "rdx": self.td.tdr, "r8": self.free[number]}
        return self.start(lp, abi.TDH_MEM_PAGE_AUG, **operands)

    def block(self, lp: int, gpa: int = GPA) -> Operation:
        return self.start(lp, abi.TDH_MEM_RANGE_BLOCK, rcx=gpa, rdx=self.td.tdr)

    def locks(self) -> list[int]:
        """PAMT locks that are held."""
        return [row.lock for row in self.machine.module.pamt.in_use() if row.lock]


@pytest.fixture(scope="module")
def built() -> Scene:
    return Scene()


@pytest.fixture
def scene(built: Scene) -> Iterator[Scene]:
    mark = built.machine.mark()
    yield built
    built.machine.rewind(mark)
    built.machine.journal.release(mark)


def test_a_seamcall_yields_once_with_its_locks_held_and_nothing_done(scene: Scene) -> None:
    call = scene.aug(0, 0)
    assert next(call) == ("TDH.MEM.PAGE.AUG", scene.td.tdr, GPA + 0x2000, 0, scene.free[0])
    assert scene.locks()
    assert scene.machine.memory.page(scene.free[0]) == bytes(4096)
    assert scene.machine.module.pamt.describe(scene.free[0], 0).page_type == 0
    with pytest.raises(StopIteration) as end:
        next(call)
    assert end.value.value == 0
    assert scene.locks() == []


def test_a_refused_seamcall_does_not_yield(scene: Scene) -> None:
    call = scene.start(0, abi.TDH_MEM_TRACK, rcx=scene.pages[0])
    with pytest.raises(StopIteration) as end:
        next(call)
    assert end.value.value == s.TDX_PAGE_METADATA_INCORRECT + 1


@pytest.mark.parametrize(
    ("leaf", "operands", "status"),
    [
        (abi.TDH_MEM_PAGE_AUG, {"rcx": GPA + 0x2000, "r8": 1}, s.TDX_OPERAND_BUSY + 1),
        (abi.TDH_MEM_PAGE_AUG, {"rcx": GPA + 0x3000, "r8": 0}, s.TDX_OPERAND_BUSY + 8),
        (abi.TDH_MEM_PAGE_AUG, {"rcx": GPA + 0x3000, "r8": 1}, 0),
        (abi.TDH_MEM_RANGE_BLOCK, {"rcx": GPA}, s.TDX_OPERAND_BUSY + 146),
        (abi.TDH_MEM_SEPT_RD, {"rcx": GPA}, 0),
        (abi.TDH_MEM_SEPT_RD, {"rcx": GPA + 0x2000}, s.TDX_OPERAND_BUSY + 1),
        (abi.TDH_MNG_VPFLUSHDONE, {}, s.TDX_OPERAND_BUSY + 1),
        (abi.TDH_MEM_TRACK, {}, 0),
    ],
    ids=[
        "the same GPA",
        "the same page",
        "another GPA and page",
        "the tree alone",
        "the tree shared",
        "the same entry",
        "the TD alone",
        "the TD shared",
    ],
)
def test_another_lp_in_the_middle_of_an_aug_meets_its_locks(
    scene: Scene, leaf: int, operands: dict[str, int], status: int
) -> None:
    first = scene.aug(0, 0)
    next(first)
    operands = dict(operands)
    if "r8" in operands:
        operands["r8"] = scene.free[operands["r8"]]
    tdr = {"rdx": scene.td.tdr} if "rcx" in operands else {"rcx": scene.td.tdr}
    assert scene.call(1, leaf, **operands | tdr) == status
    assert steps.run(first) == 0


def test_a_block_in_the_middle_keeps_everybody_out_of_the_tree(scene: Scene) -> None:
    schedule = steps.round_robin([scene.block(0), scene.block(1, GPA + 4096), scene.aug(2, 0)])
    busy = s.TDX_OPERAND_BUSY + 146
    assert schedule.results == {0: 0, 1: busy, 2: busy}


def test_two_tracks_one_after_the_other_succeed_and_at_once_one_is_busy(scene: Scene) -> None:
    def calls() -> list[Operation]:
        return [scene.start(lp, abi.TDH_MEM_TRACK, rcx=scene.td.tdr) for lp in (0, 1)]

    assert steps.round_robin(calls()).results == {0: 0, 1: s.TDX_OPERAND_BUSY + 169}
    one_by_one = Schedule(calls())
    one_by_one.replay([0, 0, 1, 1])
    assert one_by_one.results == {0: 0, 1: 0}


def test_shutdown_is_refused_while_another_lp_is_inside_the_module(scene: Scene) -> None:
    first = scene.aug(0, 0)
    next(first)
    assert scene.call(1, abi.TDH_SYS_SHUTDOWN) == s.TDX_SYS_BUSY
    assert steps.run(first) == 0
    assert scene.call(1, abi.TDH_SYS_SHUTDOWN) == 0


def test_an_entry_in_the_middle_of_a_track_finds_the_epoch_busy(scene: Scene) -> None:
    track = scene.start(1, abi.TDH_MEM_TRACK, rcx=scene.td.tdr)
    next(track)
    status = scene.call(0, abi.TDH_VP_ENTER, rcx=scene.td.vcpus[0])
    assert status == s.TDX_OPERAND_BUSY + 169
    steps.run(track)
    assert scene.call(0, abi.TDH_VP_ENTER, rcx=scene.td.vcpus[0]) == IN_GUEST


def test_two_machines_share_nothing() -> None:
    one, other = BareMachine(), BareMachine()
    before = other.digest()
    one.seamcall(0, abi.TDH_SYS_INIT, Registers())
    assert other.digest() == before
    assert one.digest() != before
