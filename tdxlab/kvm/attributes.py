"""Memory attributes: which gfns of a VM are private.

State only; `set_attributes.py` changes it. PRIVATE is the only attribute there is on x86; a gfn
that nobody spoke of is shared.

Source: Linux 6.16, virt/kvm/kvm_main.c (mem_attr_array), include/uapi/linux/kvm.h.
Differs: Linux keeps one entry per private gfn in an xarray. Here a uniform range is one entry
whatever its size: `_toggles` holds the 2 MiB boundaries at which private and shared change, and
only a 2 MiB range that is not uniform has a bitmap of its own in `_mixed`.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator

from tdxlab.journal import Field, Fields, Journal, Journalled, Table

#: The attribute, and its value in the ioctl. Source: include/uapi/linux/kvm.h.
KVM_MEMORY_ATTRIBUTE_PRIVATE = 1 << 3

_SHIFT = 9
_GFNS = 1 << _SHIFT


class MemAttributes(Journalled):
    """Private or shared, for every gfn of one VM."""

    _toggles: Field[tuple[int, ...]] = Field(())

    def __init__(self, journal: Journal) -> None:
        self.fields = Fields(journal, self)
        #: number of a 2 MiB range -> bitmap of its private gfns, if it has both kinds
        self._mixed = Table(journal)

    def is_private(self, gfn: int) -> bool:
        """Source: kvm_host.h, kvm_mem_is_private."""
        chunk = gfn >> _SHIFT
        bitmap = self._mixed.get(chunk)
        if bitmap is None:
            return bisect_right(self._toggles, chunk) & 1 == 1
        return bool(bitmap >> (gfn & _GFNS - 1) & 1)

    def get(self, gfn: int) -> int:
        """Attributes of one gfn: KVM_MEMORY_ATTRIBUTE_PRIVATE or 0.

        Source: kvm_host.h, kvm_get_memory_attributes.
        """
        return KVM_MEMORY_ATTRIBUTE_PRIVATE if self.is_private(gfn) else 0

    def range_has_attrs(self, start: int, end: int, mask: int, attrs: int) -> bool:
        """True if all gfns in [start, end) agree with `attrs` in the bits of `mask`.

        Source: kvm_main.c, kvm_range_has_memory_attributes.
        """
        mask &= KVM_MEMORY_ATTRIBUTE_PRIVATE
        if attrs & ~mask:
            return False
        return not mask or self._all(start, end, bool(attrs))

    def runs(self, start: int, end: int) -> Iterator[tuple[int, int, bool]]:
        """(first gfn, gfn behind the last, private) of each uniform piece of [start, end)."""
        begin, private = start, self.is_private(start)
        for gfn in self._possible_changes(start, end):
            if self.is_private(gfn) != private:
                yield begin, gfn, private
                begin, private = gfn, not private
        if begin < end:
            yield begin, end, private

    def store(self, start: int, end: int, *, private: bool) -> None:
        """Give all gfns in [start, end) the attribute, or take it from them. No zapping."""
        first, last = -(-start >> _SHIFT), end >> _SHIFT
        if first > last:
            self._store_part(start, end, private)
            return
        if start < first << _SHIFT:
            self._store_part(start, first << _SHIFT, private)
        if first < last:
            self._store_uniform(first, last, private)
        if last << _SHIFT < end:
            self._store_part(last << _SHIFT, end, private)

    def _all(self, start: int, end: int, private: bool) -> bool:
        """True if every gfn in [start, end) is of that kind."""
        if self._mixed_in(-(-start >> _SHIFT), end >> _SHIFT):
            return False
        return all(kind == private for _, _, kind in self.runs(start, end))

    def _possible_changes(self, start: int, end: int) -> Iterator[int]:
        """Ascending gfns in (start, end), among them every one that differs from the gfn before."""
        first, last = start >> _SHIFT, -(-end >> _SHIFT)
        toggles = self._toggles
        chunks = set(toggles[bisect_left(toggles, first) : bisect_left(toggles, last)])
        mixed = self._mixed_in(first, last)
        chunks.update(mixed)
        chunks.update(chunk + 1 for chunk in mixed)
        for chunk in sorted(chunks):
            base = chunk << _SHIFT
            count = _GFNS if chunk in self._mixed else 1
            yield from range(max(base, start + 1), min(base + count, end))

    def _mixed_in(self, first: int, last: int) -> list[int]:
        """Numbers in [first, last) of ranges with a bitmap."""
        if last - first < len(self._mixed):
            return [chunk for chunk in range(first, last) if chunk in self._mixed]
        return [chunk for chunk in self._mixed if first <= chunk < last]

    def _store_part(self, start: int, end: int, private: bool) -> None:
        """Change a part of one 2 MiB range."""
        chunk = start >> _SHIFT
        uniform = (1 << _GFNS) - 1 if self.is_private(chunk << _SHIFT) else 0
        bitmap = self._mixed.get(chunk, uniform)
        part = (1 << end - start) - 1 << (start & _GFNS - 1)
        bitmap = bitmap | part if private else bitmap & ~part
        if bitmap in (0, (1 << _GFNS) - 1):
            self._store_uniform(chunk, chunk + 1, bool(bitmap))
        else:
            self._mixed.put(chunk, bitmap)

    def _store_uniform(self, first: int, last: int, private: bool) -> None:
        """Change the whole 2 MiB ranges in [first, last)."""
        for chunk in self._mixed_in(first, last):
            self._mixed.drop(chunk)
        toggles = self._toggles
        low, high = bisect_left(toggles, first), bisect_right(toggles, last)
        middle = ((first,) if low & 1 != private else ()) + ((last,) if high & 1 != private else ())
        if toggles[low:high] != middle:
            self._toggles = toggles[:low] + middle + toggles[high:]
