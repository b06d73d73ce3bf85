"""Metadata fields: the 64-bit name of an element, and the row that a table has for each field.

    63       62 61    56 55 54     52 51  50  49 47 46   38 37  34 33  32 31 24 23        0
    non_arch  0   class   0  context   wm  inc   0   fields  elems  size    0    field code

The tables themselves are in fields_system.py, fields_td.py and fields_vcpu.py; metadata.py looks
things up in them.

Source: TDX module 1.5.01, tdx_api_defs.h (md_field_id_t), metadata_generic.c.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from tdxlab.abi.status import TDX_SUCCESS
from tdxlab.bits import MASK64, Bits, Word

if TYPE_CHECKING:
    from tdxlab.seam.module import Module

#: "No field": what a caller gives to ask for the first field, and gets after the last one.
NULL_FIELD_ID = MASK64

CONTEXT_SYSTEM, CONTEXT_TD, CONTEXT_VCPU = 0, 1, 2


class FieldId(Word):
    """Names one element of a field, or, in a list, a sequence of fields."""

    field_code = Bits(23, 0)
    reserved_31_24 = Bits(31, 24)
    element_size_code = Bits(33, 32)  # 0, 1, 2, 3: elements of 1, 2, 4, 8 bytes
    last_element_in_field = Bits(37, 34)  # lists only: elements - 1
    last_field_in_sequence = Bits(46, 38)  # lists only: fields - 1
    reserved_49_47 = Bits(49, 47)
    inc_size = Bits(50)  # field codes go up in steps of inc_size + 1
    write_mask_valid = Bits(51)  # lists only
    context = Bits(54, 52)
    reserved_55 = Bits(55)
    class_code = Bits(61, 56)
    reserved_62 = Bits(62)
    non_arch = Bits(63)


# -- who asks

PRODUCTION_HOST, DEBUG_HOST, GUEST = 0, 1, 2


class Masks(NamedTuple):
    """The bits that each asker may read, or write; 0: the field is closed to that asker."""

    production_host: int = 0
    debug_host: int = 0
    guest: int = 0


NOBODY = Masks()
ONLY_HOST = Masks(MASK64, MASK64)
ONLY_DEBUG_HOST = Masks(debug_host=MASK64)
HOST_AND_GUEST = Masks(MASK64, MASK64, MASK64)
DEBUG_HOST_AND_GUEST = Masks(debug_host=MASK64, guest=MASK64)
ONLY_GUEST = Masks(guest=MASK64)


# -- where values are


class Target(NamedTuple):
    """Whose fields are meant.

    tdr, tdcs, tdvps: word indices of the frames of the TDR, of the first TDCS page and of the
    TDVPR, 0 where the context has none.
    """

    module: Module
    tdr: int = 0
    tdcs: int = 0
    tdvps: int = 0


Get = Callable[[Target, int], int]
Put = Callable[[Target, int, int], None]


class Source(NamedTuple):
    """How the elements of one row, numbered from 0, are read and stored."""

    get: Get
    put: Put | None = None


def _stored(base: Callable[[Target], int], word: int) -> Source:
    """Consecutive words of a page, one for each element."""

    def get(target: Target, number: int) -> int:
        value: int = target.module.memory.words.view[base(target) + word + number]
        return value

    def put(target: Target, number: int, value: int) -> None:
        target.module.memory.words.put(base(target) + word + number, value)

    return Source(get, put)


def in_tdr(word: int) -> Source:
    """Words of the TDR from `word` on."""
    return _stored(lambda target: target.tdr, word)


def in_tdcs(word: int) -> Source:
    """Words of the first TDCS page from `word` on."""
    return _stored(lambda target: target.tdcs, word)


def in_tdvps(word: int) -> Source:
    """Words of the TDVPR from `word` on."""
    return _stored(lambda target: target.tdvps, word)


def constant(value: int) -> Source:
    """The same value in every element."""
    return Source(lambda _target, _number: value)


def listed(*values: int) -> Source:
    """One value for each element; the elements behind the last value are 0."""
    return Source(lambda _target, number: values[number] if number < len(values) else 0)


# -- rows


class Change(NamedTuple):
    """A write of one element that the masks allow.

    old, new: the element before and after. mask: R9, the bits that the caller asked to write.
    """

    old: int
    new: int
    mask: int


Admit = Callable[[Target, Change], int]


def admit_all(_target: Target, _change: Change) -> int:
    """The field takes every value."""
    return TDX_SUCCESS


class Field(NamedTuple):
    """One row of a table: `fields` fields of `elements` elements each.

    id: of the first element. admit: the field's own test of a change; returns a status.
    ones_mean_unset: an address that is all ones until it is set, and counts as 0 in a write.
    l2_vm: the row is there only if the TD has at least so many nested VMs.
    """

    id: int
    name: str
    source: Source
    read: Masks
    write: Masks = NOBODY
    fields: int = 1
    elements: int = 1
    admit: Admit = admit_all
    ones_mean_unset: bool = False
    l2_vm: int = 0

    @property
    def class_code(self) -> int:
        """The group of fields, 0 to 63."""
        return FieldId(self.id).class_code

    @property
    def field_code(self) -> int:
        """The code of the first element."""
        return FieldId(self.id).field_code

    @property
    def size_code(self) -> int:
        """0, 1, 2, 3 for elements of 1, 2, 4, 8 bytes."""
        return FieldId(self.id).element_size_code

    @property
    def size_mask(self) -> int:
        """The bits of one element."""
        return (1 << (8 << self.size_code)) - 1

    @property
    def stride(self) -> int:
        """Distance of the codes of two neighbouring elements: 1 or 2."""
        return FieldId(self.id).inc_size + 1

    @property
    def total(self) -> int:
        """Elements in the row."""
        return self.fields * self.elements

    def covers(self, field_id: FieldId) -> bool:
        """True if class and code of `field_id` lie in this row."""
        offset = field_id.field_code - self.field_code
        return field_id.class_code == self.class_code and 0 <= offset < self.total * self.stride
