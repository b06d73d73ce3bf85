"""Reading and writing metadata: from a field id to an element, by the module's checks in order.

    field id -> is one element meant? -> which row of the table? -> what may this asker read, write?

An `Access` is one asker's way into one table. Its methods refuse by `Refused`; nothing that they
refuse carries an operand id.

Source: TDX module 1.5.01, metadata_generic.c, metadata_sys.c, metadata_td.c, metadata_vp.c.
Differs: rows of nested VMs' state in a vCPU are not there, whatever the TD's number of such VMs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from tdxlab.abi.status import (
    TDX_METADATA_FIELD_ID_INCORRECT,
    TDX_METADATA_FIELD_NOT_READABLE,
    TDX_METADATA_FIELD_NOT_WRITABLE,
    TDX_METADATA_FIELD_VALUE_NOT_VALID,
    TDX_SUCCESS,
)
from tdxlab.bits import Bits, Word
from tdxlab.seam.call import Refused
from tdxlab.seam.fields import (
    CONTEXT_SYSTEM,
    CONTEXT_TD,
    CONTEXT_VCPU,
    DEBUG_HOST,
    NULL_FIELD_ID,
    PRODUCTION_HOST,
    Change,
    Field,
    FieldId,
    Target,
)
from tdxlab.seam.fields_system import SYSTEM_FIELDS
from tdxlab.seam.fields_td import TD_FIELDS
from tdxlab.seam.fields_vcpu import VCPU_FIELDS
from tdxlab.seam.td import ATTRIBUTES_DEBUG, Td, Tdcs

if TYPE_CHECKING:
    from tdxlab.seam.module import Module

#: Bits that must be zero where one element is meant.
_NOT_OF_ONE_ELEMENT = (
    FieldId.reserved_31_24.mask
    | FieldId.last_element_in_field.mask
    | FieldId.last_field_in_sequence.mask
    | FieldId.reserved_49_47.mask
    | FieldId.reserved_55.mask
    | FieldId.reserved_62.mask
)


class ListHeader(Word):
    """The first 8 bytes of a list of sequences."""

    size = Bits(15, 0)  # bytes in use, the header included
    sequences = Bits(31, 16)


class Element(NamedTuple):
    """One element of a row, by its number from 0."""

    field: Field
    number: int


class Access:
    """One asker's way into one table. table: rows in the module's order. context: 0, 1, 2.

    asker: PRODUCTION_HOST, DEBUG_HOST or GUEST. target: whose fields the table describes here.
    """

    __slots__ = ("asker", "context", "table", "target")

    def __init__(self, table: tuple[Field, ...], context: int, asker: int, target: Target) -> None:
        self.table = table
        self.context = context
        self.asker = asker
        self.target = target

    def field_id(self, raw: int) -> FieldId:
        """`raw` (u64) as a field id of this context: what the caller put there is overwritten."""
        return FieldId(raw).with_(context=self.context)

    def is_null(self, raw: int) -> bool:
        """True if all bits are 1; those of the context do not count."""
        return raw | FieldId.context.mask == NULL_FIELD_ID

    def first_id(self) -> int:
        """The id of the first element that the asker may read."""
        return next((row.id for row in self.table if row.read[self.asker]), NULL_FIELD_ID)

    def find(self, field_id: FieldId) -> Element:
        """The element with this class and code; all else in the id is ignored.

        Refuses, with METADATA_FIELD_ID_INCORRECT: no such element; the upper half of a VMCS field.
        Source: metadata_generic.c, md_find_entry_idx.
        """
        for row in self.table:
            if row.covers(field_id):
                number, half = divmod(field_id.field_code - row.field_code, row.stride)
                if half == 0:
                    return Element(row, number)
        raise Refused(TDX_METADATA_FIELD_ID_INCORRECT)

    def find_single(self, raw: int) -> Element:
        """The one element that `raw` (u64) names.

        Refuses, with METADATA_FIELD_ID_INCORRECT: reserved bits or numbers of elements or fields
        that are not zero; then as `find`.
        Source: metadata_generic.c, md_check_as_single_element_id.
        """
        if raw & _NOT_OF_ONE_ELEMENT:
            raise Refused(TDX_METADATA_FIELD_ID_INCORRECT)
        return self.find(self.field_id(raw))

    def find_first_of_list(self, raw: int) -> Element:
        """Where a list that starts at `raw` (u64) begins; all ones begin with the first field.

        Refuses, with METADATA_FIELD_ID_INCORRECT: as `find`; an element that is not the first of
        its field; a wrong element size.
        """
        if self.is_null(raw):
            return self.find(FieldId(self.first_id()))
        field_id = self.field_id(raw)
        row, number = element = self.find(field_id)
        if number % row.elements or field_id.element_size_code != row.size_code:
            raise Refused(TDX_METADATA_FIELD_ID_INCORRECT)
        return element

    def require_readable(self, element: Element) -> None:
        """Refuses: METADATA_FIELD_NOT_READABLE."""
        if not element.field.read[self.asker]:
            raise Refused(TDX_METADATA_FIELD_NOT_READABLE)

    def read(self, element: Element) -> int:
        """What the asker sees of the element's value; closed bits are 0."""
        return self._value(element) & element.field.read[self.asker]

    def _value(self, element: Element) -> int:
        row, number = element
        return row.source.get(self.target, number) & row.size_mask

    def next_id(self, element: Element, raw: int) -> int:
        """The id that follows `raw`, the caller's name of `element`; NULL_FIELD_ID after the last.

        Inside a row the caller's own id is counted up, so that what else it contains stays.
        Source: metadata_generic.c, md_get_next_item_with_iterator.
        """
        row, number = element
        if number + 1 < row.total:
            return self.field_id(raw) + row.stride
        place = self.table.index(row) + 1
        rest = (row.id for row in self.table[place:] if row.read[self.asker])
        return next(rest, NULL_FIELD_ID)

    def require_change(self, element: Element, value: int, mask: int) -> Change:
        """Test a write of the bits `mask` of `value` (u64 each); nothing is written yet.

        Refuses, in order: METADATA_FIELD_NOT_WRITABLE, if no bit of the mask is open to the asker;
        METADATA_FIELD_VALUE_NOT_VALID, if a closed bit of the mask would change; what the field's
        own test refuses.
        Source: metadata_generic.c, md_get_rd_wr_mask; metadata_td.c, metadata_vp.c.
        """
        row = element.field
        old = self._value(element)
        if row.ones_mean_unset and old == row.size_mask:
            old = 0
        write_mask = row.write[self.asker] & row.size_mask
        if not write_mask & mask:
            raise Refused(TDX_METADATA_FIELD_NOT_WRITABLE)
        if (old ^ value) & mask & ~write_mask:
            raise Refused(TDX_METADATA_FIELD_VALUE_NOT_VALID)
        open_bits = write_mask & mask
        change = Change(old, (old & ~open_bits) | (value & open_bits), mask)
        status = row.admit(self.target, change)
        if status != TDX_SUCCESS:
            raise Refused(status)
        return change

    def write(self, element: Element, change: Change) -> None:
        """Carry out a change that `require_change` has tested."""
        put = element.field.source.put
        assert put is not None, "a row with a write mask can be stored"
        put(self.target, element.number, change.new)

    def dump(self, first: Element) -> bytes:
        """All readable fields from `first` on as a list: a header, then the sequences.

        A sequence is the id of its first field with the numbers of elements and fields, then 8
        bytes for each element. It goes on while class, number of elements and size stay the same
        and codes are consecutive.
        Source: TDX module 1.5.01, tdh_sys_rdall.c, metadata_generic.c.
        """
        sequences: list[list[int]] = []
        expected: tuple[int, ...] = ()
        for row, number in self._fields_from(first):
            kind = (row.class_code, row.elements, row.size_code)
            code = row.field_code + number * row.stride
            if (*kind, code) == expected:
                name = FieldId(sequences[-1][0])
                fields = name.last_field_in_sequence + 1
                sequences[-1][0] = name.with_(last_field_in_sequence=fields)
            else:
                last = row.elements - 1
                name = FieldId(row.id).with_(field_code=code, last_element_in_field=last)
                sequences.append([name])
            elements = range(number, number + row.elements)
            sequences[-1].extend(self.read(Element(row, i)) for i in elements)
            expected = (*kind, code + row.elements * row.stride)
        words = [word for sequence in sequences for word in sequence]
        header = ListHeader(0).with_(size=8 * (len(words) + 1), sequences=len(sequences))
        return b"".join(word.to_bytes(8, "little") for word in (header, *words))

    def _fields_from(self, first: Element) -> Iterator[Element]:
        """The first element of each readable field, from `first` on."""
        start = self.table.index(first.field)
        for row in self.table[start:]:
            if row.read[self.asker]:
                skipped = first.number if row is first.field else 0
                for number in range(skipped, row.total, row.elements):
                    yield Element(row, number)


# -- who may look at what


def system_access(module: Module, asker: int = PRODUCTION_HOST) -> Access:
    """The module's own fields; no asker may write them."""
    return Access(SYSTEM_FIELDS, CONTEXT_SYSTEM, asker, Target(module))


def host_of(module: Module, td: Td) -> int:
    """DEBUG_HOST for a TD with ATTRIBUTES.DEBUG, else PRODUCTION_HOST."""
    attributes = module.memory.words.view[td.tdcs + Tdcs.ATTRIBUTES]
    return DEBUG_HOST if attributes & ATTRIBUTES_DEBUG else PRODUCTION_HOST


def td_access(module: Module, td: Td, asker: int) -> Access:
    """The fields of a TD whose TDCS is mapped, without the rows of nested VMs that it lacks."""
    l2_vms = module.memory.words.view[td.tdcs + Tdcs.NUM_L2_VMS]
    table = tuple(row for row in TD_FIELDS if row.l2_vm <= l2_vms)
    return Access(table, CONTEXT_TD, asker, Target(module, td.page, td.tdcs))


def vcpu_access(module: Module, td: Td, page: int, asker: int) -> Access:
    """The fields of a vCPU; page: word index of the TDVPR's frame."""
    target = Target(module, td.page, td.tdcs, page)
    return Access(VCPU_FIELDS, CONTEXT_VCPU, asker, target)
