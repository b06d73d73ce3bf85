"""Invariants hold through a TD's life, and each one notices the damage that it is there for."""

from collections.abc import Callable

import pytest

from tdxlab.arch import HPA_MASK
from tdxlab.bare import BareMachine
from tdxlab.host import Host
from tdxlab.host_td import HostTd
from tdxlab.invariants import (
    INVARIANTS,
    SCOPES,
    InvariantBroken,
    check,
    keys_and_locks,
    pages,
    running,
)
from tdxlab.scenarios import booted_machine, life_of_a_td
from tdxlab.seam import sept
from tdxlab.seam.rules import HKID_FLUSHED, PT_EPT, PT_REG, VCPU_READY
from tdxlab.seam.system import Sys
from tdxlab.seam.td import NO_LP, Td, Tdcs, Tdr, Tdvps

PAGE = 0x4000_0000
BIG_PAGE = 0x8000_0000
FREE_HPA = 0x1_3000_0000


class Bench:
    """A machine with one TD: a vCPU inside LP 0 that has used one page, and a 2 MiB page."""

    def __init__(self) -> None:
        self.machine = booted_machine()
        self.host = Host(self.machine)
        self.td = HostTd(self.host)
        self.td.add_vcpu(lp=0)
        self.td.add_page(PAGE)
        self.td.add_page(PAGE + 0x1000)
        self.td.aug(BIG_PAGE, 1)
        self.td.finalize()
        self.td.enter(0, lp=0)
        self.machine.touch(0, PAGE)
        self.words = self.machine.memory.words
        self.pamt = self.machine.module.pamt
        inside = Td(self.machine.memory, self.td.tdr)
        inside.map_tdcs(self.machine.memory)
        self.tdr, self.tdcs = inside.page, inside.tdcs
        self.tdvpr = self.machine.memory.frame(self.td.vcpus[0])

    def put(self, index: int, value: int) -> None:
        self.words.put(index, value)

    def add(self, index: int, amount: int) -> None:
        self.words.put(index, self.words.view[index] + amount)

    def place(self, gpa: int, sept_level: int = 0) -> sept.Place:
        eptp = self.words.view[self.tdcs + Tdcs.EPTP]
        return sept.walk(self.machine.memory, eptp, gpa, sept_level)

    def entry(self, gpa: int, size: int = 0) -> int:
        return self.pamt.entry(self.td.pages[gpa][0], size)


def map_another_page(bench: Bench) -> None:
    place = bench.place(PAGE)
    bench.put(place.word, place.septe & ~HPA_MASK | FREE_HPA)


def link_a_private_page_as_a_table(bench: Bench) -> None:
    bench.pamt.set_type(bench.entry(PAGE), PT_EPT)


def map_a_page_twice(bench: Bench) -> None:
    bench.put(bench.place(PAGE).word, bench.place(PAGE + 0x1000).septe)


def lose_a_page(bench: Bench) -> None:
    bench.put(bench.place(PAGE + 0x1000).word, sept.FREE_ENTRY)


def forget_a_child(bench: Bench) -> None:
    bench.add(bench.tdr + Tdr.CHLDCNT, -1)


def give_a_page_to_nobody(bench: Bench) -> None:
    bench.pamt.give(bench.pamt.entry(FREE_HPA, 0), PT_REG, FREE_HPA + 0x1000)


def use_a_part_of_a_big_page(bench: Bench) -> None:
    part = bench.td.pages[BIG_PAGE][0] + 0x5000
    bench.pamt.give(bench.pamt.entry(part, 0), PT_REG, bench.td.tdr)


def translate_to_a_page_that_left(bench: Bench) -> None:
    bench.put(bench.place(PAGE).word, sept.FREE_ENTRY)
    bench.pamt.set_type(bench.entry(PAGE), 0)
    bench.add(bench.tdr + Tdr.CHLDCNT, -1)


def count_a_vcpu_out_too_early(bench: Bench) -> None:
    bench.put(bench.tdcs + Tdcs.REFCOUNT + 1, 0)


def count_a_vcpu_twice(bench: Bench) -> None:
    bench.add(bench.tdcs + Tdcs.REFCOUNT, 1)


def count_a_control_page_twice(bench: Bench) -> None:
    bench.add(bench.tdvpr + Tdvps.NUM_PAGES, 1)


def miscount_associated_vcpus(bench: Bench) -> None:
    bench.add(bench.tdcs + Tdcs.NUM_ASSOC_VCPUS, 1)


def flush_a_keyid_in_use(bench: Bench) -> None:
    bench.machine.module.keys.states.put(bench.td.keyid, HKID_FLUSHED)


def take_a_key_from_a_package(bench: Bench) -> None:
    bench.put(bench.tdr + Tdr.PKG_CONFIG_BITMAP, 1)


def unlock_a_running_vcpu(bench: Bench) -> None:
    index = bench.pamt.entry(bench.td.vcpus[0], 0)
    bench.pamt.words.put(index, bench.pamt.words.view[index] & ~0xFFFF)


def leave_a_page_locked(bench: Bench) -> None:
    index = bench.pamt.entry(FREE_HPA, 0)
    bench.pamt.words.put(index, bench.pamt.words.view[index] | 1)


def leave_an_entry_locked(bench: Bench) -> None:
    place = bench.place(PAGE)
    bench.put(place.word, place.septe | sept.LOCKED)


def leave_the_module_locked(bench: Bench) -> None:
    bench.machine.module.system.put(Sys.LOCK, 1)


def leave_the_tree_locked(bench: Bench) -> None:
    bench.put(bench.tdcs + Tdcs.SEPT_LOCK, 2)


def run_a_vcpu_that_is_not_active(bench: Bench) -> None:
    bench.put(bench.tdvpr + Tdvps.STATE, VCPU_READY)


def run_a_vcpu_on_a_strange_lp(bench: Bench) -> None:
    bench.put(bench.tdvpr + Tdvps.ASSOC_LPID, NO_LP - 1)


DAMAGES: list[tuple[Callable[[Bench], None], int, str]] = [
    (map_another_page, 3, "always"),
    (link_a_private_page_as_a_table, 3, "always"),
    (map_a_page_twice, 3, "always"),
    (lose_a_page, 3, "always"),
    (forget_a_child, 4, "always"),
    (give_a_page_to_nobody, 5, "always"),
    (use_a_part_of_a_big_page, 12, "always"),
    (translate_to_a_page_that_left, 6, "always"),
    (count_a_vcpu_out_too_early, 7, "always"),
    (count_a_vcpu_twice, 7, "quiet"),
    (count_a_control_page_twice, 8, "quiet"),
    (miscount_associated_vcpus, 8, "quiet"),
    (flush_a_keyid_in_use, 10, "always"),
    (take_a_key_from_a_package, 10, "always"),
    (unlock_a_running_vcpu, 11, "quiet"),
    (leave_a_page_locked, 11, "quiet"),
    (leave_an_entry_locked, 11, "quiet"),
    (leave_the_module_locked, 11, "quiet"),
    (leave_the_tree_locked, 11, "quiet"),
    (run_a_vcpu_that_is_not_active, 13, "quiet"),
    (run_a_vcpu_on_a_strange_lp, 13, "quiet"),
]


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench()


@pytest.mark.parametrize(
    ("damage", "number", "scope"), DAMAGES, ids=lambda x: getattr(x, "__name__", x)
)
def test_check_raises_for_the_invariant_that_a_damage_breaks(
    bench: Bench, damage: Callable[[Bench], None], number: int, scope: str
) -> None:
    check(bench.machine, "alive")
    mark = bench.machine.mark()
    damage(bench)
    if scope == "quiet":
        check(bench.machine, "always")
    with pytest.raises(InvariantBroken) as broken:
        check(bench.machine, scope)
    bench.machine.rewind(mark)
    bench.machine.journal.release(mark)
    assert broken.value.number == number
    assert str(broken.value).startswith(f"invariant {number} ({broken.value.name}): ")


def test_invariants_of_the_module_each_have_a_damage() -> None:
    parts = (pages.__name__, running.__name__, keys_and_locks.__name__)
    numbers = {i.number for i in INVARIANTS if i.faults.__module__ in parts}
    assert {number for _, number, _ in DAMAGES} == numbers


@pytest.mark.parametrize("gpaw", [48, 52])
def test_check_passes_through_the_life_of_a_td(gpaw: int) -> None:
    tape = life_of_a_td(gpaw=gpaw)
    for position in range(len(tape) + 1):
        tape.seek(position)
        check(tape.machine, "alive")


def test_check_changes_nothing() -> None:
    tape = life_of_a_td()
    for position in range(0, len(tape) + 1, 3):
        tape.seek(position)
        before = tape.machine.digest()
        check(tape.machine, "alive")
        assert tape.machine.digest() == before


@pytest.mark.parametrize("machine", [BareMachine, booted_machine])
def test_check_passes_on_a_machine_without_tds(machine: Callable[[], BareMachine]) -> None:
    check(machine(), "alive")


def test_check_refuses_a_scope_that_does_not_exist() -> None:
    with pytest.raises(ValueError, match=r"'sometimes'.*always, quiet, alive"):
        check(BareMachine(), "sometimes")  # type: ignore[arg-type]
    assert SCOPES == ("always", "quiet", "alive")
