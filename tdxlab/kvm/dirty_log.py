"""Which pages of which slots were written: the dirty bitmaps.

A slot has a bitmap while it has the flag KVM_MEM_LOG_DIRTY_PAGES. User space asks for it, sends the
pages that it names elsewhere, and has KVM watch the pages anew; how pages are watched stands in
`tdxlab.kvm.dirty`.

Source: Linux 6.16, virt/kvm/kvm_main.c; include/linux/kvm_host.h.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from tdxlab.bits import MASK64
from tdxlab.journal import Field, Fields, Journal, Journalled, Table

if TYPE_CHECKING:
    from tdxlab.kvm.slots import Slot
    from tdxlab.kvm.vm import Vm

#: Pages that one word of a bitmap stands for. Source: BITS_PER_LONG.
BITS_PER_WORD = 64

#: Flags of KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2. Source: include/uapi/linux/kvm.h.
KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE = 1
KVM_DIRTY_LOG_INITIALLY_SET = 2


class DirtyLog(Journalled):
    """The dirty bitmaps of one VM. A word that nobody wrote yet takes no room.

    nr_memslots_dirty_logging: slots that have a bitmap now.
    Differs: no dirty ring; a bitmap never fails to be allocated.
    """

    nr_memslots_dirty_logging = Field(0)

    def __init__(self, journal: Journal) -> None:
        self.fields = Fields(journal, self)
        #: (as_id, slot id) of the bitmaps in which every bit was set when logging began -> None
        self._initially_set = Table(journal)
        #: (as_id, slot id, number of the word) -> 64 bits
        self._words = Table(journal)

    def commit(self, old: Slot | None, new: Slot | None, *, initially_set: bool) -> None:
        """`old` has been replaced by `new`: begin a bitmap, keep it, or drop it.

        initially_set: a bitmap that begins has every bit set.
        Source: kvm_prepare_memory_region, kvm_commit_memory_region, kvm_free_memslot.
        """
        was_logging = old is not None and old.is_dirty_tracked
        if new is not None and new.is_dirty_tracked:
            if not was_logging:
                self.nr_memslots_dirty_logging += 1
                if initially_set:
                    self._initially_set.put((new.as_id, new.slot_id), None)
        elif old is not None and was_logging:
            self.nr_memslots_dirty_logging -= 1
            self._drop(old)

    def _drop(self, slot: Slot) -> None:
        name = (slot.as_id, slot.slot_id)
        if name in self._initially_set:
            self._initially_set.drop(name)
        for key in [key for key in self._words if key[:2] == name]:
            self._words.drop(key)

    def word(self, slot: Slot, number: int) -> int:
        """Word `number` of the slot's bitmap: bit i stands for gfn base_gfn + 64 * number + i."""
        name = (slot.as_id, slot.slot_id)
        value = self._words.get((*name, number))
        if value is not None:
            return int(value)
        if name not in self._initially_set:
            return 0
        pages = min(BITS_PER_WORD, slot.npages - number * BITS_PER_WORD)
        return MASK64 >> BITS_PER_WORD - pages if pages > 0 else 0

    def set_word(self, slot: Slot, number: int, value: int) -> None:
        """Overwrite one word of the slot's bitmap."""
        self._words.put((slot.as_id, slot.slot_id, number), value)

    def words(self, slot: Slot) -> Iterator[tuple[int, int]]:
        """(number, value) of every word of the slot's bitmap that is not zero, ascending."""
        name = (slot.as_id, slot.slot_id)
        if name in self._initially_set:
            numbers = range(-(-slot.npages // BITS_PER_WORD))
            yield from ((number, word) for number in numbers if (word := self.word(slot, number)))
            return
        mine = ((key[2], word) for key, word in self._words.items() if key[:2] == name)
        yield from sorted((number, word) for number, word in mine if word)

    def bits(self, slot: Slot) -> list[int]:
        """Offsets, in pages from base_gfn, of the slot's dirty pages, ascending."""
        return [
            number * BITS_PER_WORD + bit
            for number, word in self.words(slot)
            for bit in range(BITS_PER_WORD)
            if word >> bit & 1
        ]


def mark_page_dirty_in_slot(vm: Vm, slot: Slot | None, gfn: int) -> None:
    """Set the page's bit, if the slot has a bitmap. Source: mark_page_dirty_in_slot."""
    if slot is None or not slot.is_dirty_tracked:
        return
    number, bit = divmod(gfn - slot.base_gfn, BITS_PER_WORD)
    word = vm.dirty.word(slot, number)
    if not word >> bit & 1:
        vm.dirty.set_word(slot, number, word | 1 << bit)


def kvm_dirty_log_manual_protect_and_init_set(vm: Vm) -> bool:
    """User space clears the log itself, and it begins with every bit set.

    Source: kvm_host.h, kvm_dirty_log_manual_protect_and_init_set.
    """
    return bool(vm.config.manual_dirty_log_protect & KVM_DIRTY_LOG_INITIALLY_SET)
