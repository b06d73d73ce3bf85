"""The dirty bitmaps, and how user space reads them."""

from __future__ import annotations

from errno import EINVAL, ENOENT

import pytest
from logging_scene import LEAF, LoggingScene, slot_of

from tdxlab.journal import Journal
from tdxlab.kvm.dirty import kvm_clear_dirty_log_protect, kvm_get_dirty_log_protect
from tdxlab.kvm.dirty_log import DirtyLog, mark_page_dirty_in_slot
from tdxlab.kvm.locks import READ
from tdxlab.kvm.spte import PT_WRITABLE_MASK
from tdxlab.steps import run

PROTECTED = LEAF & ~PT_WRITABLE_MASK
FLUSH = [("kvm_flush_remote_tlbs_range", 0, 0x400)]


@pytest.fixture
def scene() -> LoggingScene:
    """Small leaves at gfns 1 and 0x41, a large one at 0x200."""
    scene = LoggingScene()
    scene.touch(1, 0x41)
    scene.touch(0x200, level=2)
    return scene


# -- the bitmaps


@pytest.fixture
def log() -> DirtyLog:
    return DirtyLog(Journal())


def test_commit_begins_an_empty_bitmap(log: DirtyLog) -> None:
    log.commit(None, slot_of(), initially_set=False)
    assert log.bits(slot_of()) == []
    assert log.nr_memslots_dirty_logging == 1


def test_commit_begins_a_full_bitmap_of_just_the_slots_pages(log: DirtyLog) -> None:
    slot = slot_of(npages=70)
    log.commit(None, slot, initially_set=True)
    assert log.bits(slot) == list(range(70))
    assert log.word(slot, 1) == 0x3F
    assert log.word(slot, 2) == 0


def test_commit_keeps_the_bitmap_of_a_slot_that_moves(log: DirtyLog) -> None:
    slot = slot_of()
    log.commit(None, slot, initially_set=False)
    log.set_word(slot, 3, 1)
    log.commit(slot, slot._replace(base_gfn=0x9000), initially_set=False)
    assert log.bits(slot) == [192]
    assert log.nr_memslots_dirty_logging == 1


@pytest.mark.parametrize("deleted", [True, False])
def test_commit_drops_the_bitmap_when_logging_ends(log: DirtyLog, deleted: bool) -> None:
    slot = slot_of()
    log.commit(None, slot, initially_set=True)
    log.set_word(slot, 0, 5)
    log.commit(slot, None if deleted else slot_of(log=False), initially_set=True)
    assert log.bits(slot) == []
    assert log.nr_memslots_dirty_logging == 0


def test_bitmaps_of_slots_and_address_spaces_are_apart(log: DirtyLog) -> None:
    first, second, smm = slot_of(), slot_of(1), slot_of(as_id=1)
    log.set_word(first, 0, 1)
    log.set_word(second, 0, 2)
    log.set_word(smm, 1, 1)
    assert [log.bits(slot) for slot in (first, second, smm)] == [[0], [1], [64]]
    log.commit(second, None, initially_set=False)
    assert [log.bits(slot) for slot in (first, second, smm)] == [[0], [], [64]]


def test_bitmap_is_taken_back_by_the_journal() -> None:
    journal = Journal()
    log, slot = DirtyLog(journal), slot_of()
    mark, digest = journal.mark(), journal.digest()
    log.commit(None, slot, initially_set=True)
    log.set_word(slot, 0, 0)
    journal.rewind(mark)
    assert journal.digest() == digest
    assert log.nr_memslots_dirty_logging == 0


def test_mark_page_dirty_sets_the_bit_of_its_offset(scene: LoggingScene) -> None:
    slot = slot_of()
    mark_page_dirty_in_slot(scene.vm, slot, 0x1000)
    mark_page_dirty_in_slot(scene.vm, slot, 0x1041)
    mark_page_dirty_in_slot(scene.vm, slot, 0x1041)
    assert scene.vm.dirty.bits(slot) == [0, 0x41]


def test_mark_page_dirty_does_nothing_without_a_slot_that_logs(scene: LoggingScene) -> None:
    mark_page_dirty_in_slot(scene.vm, None, 0x1000)
    mark_page_dirty_in_slot(scene.vm, slot_of(log=False), 0x1000)
    assert scene.vm.dirty.bits(slot_of()) == []


# -- user space reads the log


def get_log(scene: LoggingScene) -> object:
    return run(kvm_get_dirty_log_protect(scene.vm, scene.slot))


def test_get_dirty_log_gives_the_pages_once_and_protects_them_again(scene: LoggingScene) -> None:
    scene.log(True)
    scene.touch(1, 0x41)
    assert get_log(scene) == (0, (1, 0x41))
    assert scene.leaves()[1] == PROTECTED
    assert scene.flushes() == FLUSH
    scene.events.clear()
    assert get_log(scene) == (0, ())
    assert scene.events == []
    assert not scene.vm.mmu_lock.held(READ)


def test_get_dirty_log_changes_nothing_under_manual_protection() -> None:
    scene = LoggingScene(manual_dirty_log_protect=1)
    scene.log(True)
    scene.touch(1)
    assert get_log(scene) == get_log(scene) == (0, (1,))
    assert scene.events == []


def test_get_and_clear_dirty_log_refuse_a_slot_that_does_not_log(scene: LoggingScene) -> None:
    assert get_log(scene) == (-ENOENT, ())
    assert run(kvm_clear_dirty_log_protect(scene.vm, scene.slot, [0x5000])) == -ENOENT


def test_clear_dirty_log_refuses_a_gfn_outside_of_the_slot(scene: LoggingScene) -> None:
    scene.log(True)
    scene.touch(1)
    assert run(kvm_clear_dirty_log_protect(scene.vm, scene.slot, [1, 0x400])) == -EINVAL
    assert scene.vm.dirty.bits(scene.slot) == [1]


def test_clear_dirty_log_protects_those_that_were_dirty() -> None:
    scene = LoggingScene(manual_dirty_log_protect=1)
    scene.log(True)
    scene.touch(1, 2, 0x41)
    assert run(kvm_clear_dirty_log_protect(scene.vm, scene.slot, [0x41, 1, 3])) == 0
    assert scene.vm.dirty.bits(scene.slot) == [2]
    assert [gfn for _, gfn, _, _ in scene.changes()] == [1, 0x41]
    assert scene.flushes() == FLUSH
    scene.events.clear()
    assert run(kvm_clear_dirty_log_protect(scene.vm, scene.slot, [1, 3])) == 0
    assert scene.events == []
