"""Locks: the words themselves, who shares with whom, and what a leaf leaves of them."""

from collections.abc import Callable, Mapping

import pytest
from leafbench import RAW, SOURCE, Bench, BuiltTd

from tdxlab.abi import leaves as abi
from tdxlab.abi import status as s
from tdxlab.journal import Journal, Words
from tdxlab.seam import locks
from tdxlab.seam.td import Tdcs

GPA = 0x4000_0000
REST = 0xAAAA_BBBB_CCCC_0000

#: (operation, lock word before, whether it succeeds, lock word afterwards).
#: Host-priority locks: bit 0 exclusive, bit 1 host priority, readers from 4 on. Plain locks: bit 0
#: exclusive, readers from 2 on.
ATTEMPTS = [
    (locks.try_shared_hp, 0, True, 4),
    (locks.try_shared_hp, 2, True, 4),
    (locks.try_shared_hp, 4, True, 8),
    (locks.try_shared_hp, 6, True, 8),
    (locks.try_shared_hp, 1, False, 7),
    (locks.try_exclusive_hp, 0, True, 1),
    (locks.try_exclusive_hp, 2, True, 1),
    (locks.try_exclusive_hp, 1, False, 3),
    (locks.try_exclusive_hp, 4, False, 6),
    (locks.try_promote_hp, 4, True, 1),
    (locks.try_promote_hp, 6, True, 1),
    (locks.try_promote_hp, 8, False, 10),
    (locks.guest_try_shared_hp, 0, True, 4),
    (locks.guest_try_shared_hp, 4, True, 8),
    (locks.guest_try_shared_hp, 2, False, 2),
    (locks.guest_try_shared_hp, 1, False, 1),
    (locks.guest_try_exclusive_hp, 0, True, 1),
    (locks.guest_try_exclusive_hp, 2, False, 2),
    (locks.guest_try_exclusive_hp, 4, False, 4),
    (locks.try_shared, 0, True, 2),
    (locks.try_shared, 2, True, 4),
    (locks.try_shared, 1, False, 3),
    (locks.try_exclusive, 0, True, 1),
    (locks.try_exclusive, 1, False, 1),
    (locks.try_exclusive, 2, False, 2),
]
RELEASES = [
    (locks.release_shared_hp, 8, 4),
    (locks.release_shared_hp, 6, 2),
    (locks.release_exclusive_hp, 1, 0),
    (locks.release_exclusive_hp, 3, 2),
    (locks.release_exclusive_hp, 7, 2),
    (locks.release_shared, 4, 2),
    (locks.release_exclusive, 1, 0),
    (locks.release_exclusive, 3, 0),
]


@pytest.mark.parametrize(
    ("attempt", "before", "succeeds", "after"),
    ATTEMPTS,
    ids=[f"{row[0].__name__} at {row[1]}" for row in ATTEMPTS],
)
def test_an_attempt_leaves_the_lock_word(
    attempt: Callable[[Words, int], bool], before: int, succeeds: bool, after: int
) -> None:
    words = Words(Journal(), 2)
    words.put(1, REST | before)
    assert attempt(words, 1) is succeeds
    assert words.view[1] == REST | after


@pytest.mark.parametrize(
    ("release", "before", "after"),
    RELEASES,
    ids=[f"{row[0].__name__} at {row[1]}" for row in RELEASES],
)
def test_a_release_leaves_the_lock_word(
    release: Callable[[Words, int], None], before: int, after: int
) -> None:
    words = Words(Journal(), 2)
    words.put(1, REST | before)
    release(words, 1)
    assert words.view[1] == REST | after


# -- leaves

#: Leaves on a TD with one 4 KiB page pending at GPA: operands, "tdr" and "free" standing for HPAs.
SHARERS: dict[int, dict[str, int | str]] = {
    abi.TDH_MEM_SEPT_ADD: {"rcx": GPA + (1 << 21) | 1, "rdx": "tdr", "r8": "free"},
    abi.TDH_MEM_PAGE_AUG: {"rcx": GPA + 0x1000, "rdx": "tdr", "r8": "free"},
    abi.TDH_MEM_PAGE_REMOVE: {"rcx": GPA, "rdx": "tdr"},
    abi.TDH_MEM_PAGE_RELOCATE: {"rcx": GPA, "rdx": "tdr", "r8": "free"},
    abi.TDH_MEM_SEPT_RD: {"rcx": GPA, "rdx": "tdr"},
}
EXCLUSIVES: dict[int, dict[str, int | str]] = {
    abi.TDH_MEM_RANGE_BLOCK: {"rcx": GPA, "rdx": "tdr"},
}
OTHERS: dict[int, dict[str, int | str]] = {
    abi.TDH_MEM_TRACK: {"rcx": "tdr"},
    abi.TDH_VP_CREATE: {"rcx": "free", "rdx": "tdr"},
    abi.TDH_MNG_RD: {"rcx": "tdr", "rdx": 0x9010000200000004},
}
ALL = SHARERS | EXCLUSIVES | OTHERS


def td_with_a_page(bench: Bench) -> BuiltTd:
    td = bench.td()
    td.aug(GPA)
    return td


def call(td: BuiltTd, leaf: int) -> int:
    pages = {"tdr": td.tdr, "free": td.bench.spare()}
    operands = ALL[leaf].items()
    named = {name: pages[v] if isinstance(v, str) else v for name, v in operands}
    return td.bench.call(leaf, **named)[0]


def by_name(leaves: Mapping[int, object]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("leaf", leaves, ids=[abi.HOST_LEAVES[n].name for n in leaves])


def every_lock(td: BuiltTd) -> list[int]:
    """All lock words of the machine and of the TD."""
    bench = td.bench
    module = bench.machine.module
    words = [td.read(td.tdcs_word(w)) for w in (Tdcs.SEPT_LOCK, Tdcs.EPOCH_LOCK)]
    words += [td.read(td.tdcs_word(w)) for w in (Tdcs.OP_STATE_LOCK, Tdcs.RTMR_LOCK)]
    words += [module.keys.lock.view[0], module.system.view[1], module.keys.wbt.view[0]]
    return words + [row.lock for row in module.pamt.in_use()]


@by_name(ALL)
def test_a_leaf_that_succeeds_releases_every_lock(bench: Bench, leaf: int) -> None:
    td = td_with_a_page(bench)
    assert call(td, leaf) == 0
    assert not any(every_lock(td))
    assert not td.septe(GPA) & (1 << 11 | 1 << 52)


@by_name(ALL)
def test_a_leaf_shares_the_tdr_and_the_op_state_with_other_readers(bench: Bench, leaf: int) -> None:
    td = td_with_a_page(bench)
    pamt, index = bench.machine.module.pamt, td.tdcs_word(Tdcs.OP_STATE_LOCK)
    tdr_entry = pamt.entry(td.tdr, 0)
    pamt.words.put(tdr_entry, pamt.words.view[tdr_entry] | 4)
    bench.words.put(index, 4)
    assert call(td, leaf) == 0
    assert (bench.pamt(td.tdr).lock, bench.words.view[index]) == (4, 4)


@by_name(SHARERS)
def test_a_leaf_shares_the_tree_with_other_readers(bench: Bench, leaf: int) -> None:
    td = td_with_a_page(bench)
    tree = td.tdcs_word(Tdcs.SEPT_LOCK)
    bench.words.put(tree, 2)
    assert call(td, leaf) == 0
    assert bench.words.view[tree] == 2


@by_name(OTHERS)
def test_a_leaf_that_does_not_walk_does_not_look_at_the_tree(bench: Bench, leaf: int) -> None:
    td = td_with_a_page(bench)
    bench.words.put(td.tdcs_word(Tdcs.SEPT_LOCK), 1)
    assert call(td, leaf) == 0


@by_name(EXCLUSIVES)
def test_a_leaf_wants_the_tree_alone(bench: Bench, leaf: int) -> None:
    td = td_with_a_page(bench)
    bench.words.put(td.tdcs_word(Tdcs.SEPT_LOCK), 2)
    assert call(td, leaf) == s.TDX_OPERAND_BUSY + 146


@by_name(ALL)
def test_a_host_that_gets_a_lock_clears_its_own_wish(bench: Bench, leaf: int) -> None:
    td = td_with_a_page(bench)
    pamt, index = bench.machine.module.pamt, td.tdcs_word(Tdcs.OP_STATE_LOCK)
    for size in (0, 1, 2):
        entry = pamt.entry(td.tdr, size)
        pamt.words.put(entry, pamt.words.view[entry] | 2)
    bench.words.put(index, 2)
    assert call(td, leaf) == 0
    assert [bench.pamt(td.tdr, size).lock for size in (0, 1, 2)] == [0, 0, 0]
    assert bench.words.view[index] == 0


def test_a_host_that_gets_an_entry_clears_its_wish_and_lets_the_guest_in(bench: Bench) -> None:
    td = td_with_a_page(bench)
    td.start()
    td.enter()
    index, _ = td.locate(GPA)
    bench.words.put(index, bench.words.view[index] | 1 << 11)
    operands = {"rcx": GPA, "rdx": td.tdr}
    assert bench.call(abi.TDH_MEM_SEPT_RD, lp=1, **operands)[0] == s.TDX_OPERAND_BUSY + 1
    bench.words.put(index, bench.words.view[index] & ~(1 << 11))
    assert td.tdcall(abi.TDG_MEM_PAGE_ACCEPT, rcx=GPA).status == s.TDX_OPERAND_BUSY + 1
    bench.must(abi.TDH_MEM_SEPT_RD, lp=1, **operands)
    assert td.septe(GPA) & ~0xF_FFFF_FFFF_F000 == RAW["PENDING"]
    td.accept(GPA)


def test_one_page_as_two_operands_is_busy_with_itself(bench: Bench) -> None:
    td = td_with_a_page(bench)
    status, _ = bench.call(abi.TDH_VP_CREATE, rcx=td.tdr, rdx=td.tdr)
    assert status == s.TDX_OPERAND_BUSY + 1
    td.map_tables(GPA)
    operands = {"rcx": GPA + 0x1000, "rdx": td.tdr, "r8": td.tdr, "r9": SOURCE}
    assert bench.call(abi.TDH_MEM_PAGE_AUG, **operands)[0] == s.TDX_OPERAND_BUSY + 8


def test_a_whole_life_ends_with_every_lock_free(bench: Bench) -> None:
    td = td_with_a_page(bench)
    td.start()
    td.enter()
    td.accept(GPA)
    bench.machine.interrupt(0)
    bench.must(abi.TDH_VP_FLUSH, rcx=td.vcpus[0])
    td.end()
    assert not any(every_lock(td))


def test_locks_held_around_a_2m_page_make_its_parts_busy(bench: Bench) -> None:
    """A 4 KiB user of a page inside a 2 MiB page wants the 2 MiB entry: alone if it would change
    the page, as a reader if it looks.
    """
    td = bench.td()
    hpa = td.aug(GPA, 1)
    pamt = bench.machine.module.pamt
    entry = pamt.entry(hpa, 1)
    pamt.words.put(entry, pamt.words.view[entry] | 4)
    operands = {"rcx": hpa + 0x3000, "rdx": td.tdr}
    assert bench.call(abi.TDH_VP_CREATE, **operands)[0] == s.TDX_OPERAND_BUSY + 1
    assert bench.pamt(hpa, 1).lock == 6
    bench.must(abi.TDH_PHYMEM_PAGE_RDMD, rcx=hpa + 0x3000)
    assert bench.pamt(hpa, 1).lock == 4
