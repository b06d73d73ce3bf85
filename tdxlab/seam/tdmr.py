"""TDMR_INFO: how the host describes its TDMRs to TDH.SYS.CONFIG, and what the module tests in it.

Source: TDX module 1.5.01, tdh_sys_config.c; tdx_api_defs.h, tdmr_info_entry_t.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from tdxlab.abi.status import (
    OPERAND_ID_RCX,
    TDX_INVALID_PAMT,
    TDX_INVALID_RESERVED_IN_TDMR,
    TDX_INVALID_TDMR,
    TDX_NON_ORDERED_RESERVED_IN_TDMR,
    TDX_NON_ORDERED_TDMR,
    TDX_PAMT_OUTSIDE_CMRS,
    TDX_PAMT_OVERLAP,
    TDX_TDMR_OUTSIDE_CMRS,
)
from tdxlab.abi.structs import TDMR_INFO_SIZE
from tdxlab.arch import PA_LIMIT, PAGE_SIZE, SIZE_1G
from tdxlab.hardware import Region
from tdxlab.seam.call import Call, Refused
from tdxlab.seam.page_checks import require_shared_hpa

MAX_TDMRS = 64
MAX_RESERVED_AREAS = 16
PAMT_ENTRY_SIZE = 16
POINTERS_ALIGNMENT = 512
INFO_ALIGNMENT = 512

#: PAMT levels as the statuses count them.
_4K, _2M, _1G = 0, 1, 2


class TdmrInfo(NamedTuple):
    """One TDMR_INFO: base and size in bytes; reserved: 16 areas with HPA bases, unused ones empty;
    pamts: by level 4K, 2M, 1G.
    """

    base: int
    size: int
    reserved: tuple[Region, ...]
    pamts: tuple[Region, Region, Region]

    @classmethod
    def parse(cls, raw: bytes) -> TdmrInfo:
        """Read the 320 bytes of a TDMR_INFO."""
        words = [int.from_bytes(raw[i : i + 8], "little") for i in range(0, TDMR_INFO_SIZE, 8)]
        base, size = words[0], words[1]
        pamt_1g, pamt_2m, pamt_4k = (Region(words[i], words[i + 1]) for i in (2, 4, 6))
        reserved = tuple(Region(base + words[i], words[i + 1]) for i in range(8, 40, 2))
        return cls(base, size, reserved, (pamt_4k, pamt_2m, pamt_1g))

    def offset(self, area: Region) -> int:
        """Offset of a reserved area from the TDMR's base, as the host gave it."""
        return area.base - self.base

    def available(self) -> Iterator[Region]:
        """The parts that are not reserved, ascending."""
        start = self.base
        for area in self.reserved:
            if area.size:
                if area.base > start:
                    yield Region(start, area.base - start)
                start = area.end
        if start < self.base + self.size:
            yield Region(start, self.base + self.size - start)


def read_and_check(call: Call, pointers: int, count: int) -> list[TdmrInfo]:
    """Read `count` TDMR_INFOs through the array at HPA `pointers`; each is checked before the next
    pointer is read.
    """
    memory = call.module.memory
    infos: list[TdmrInfo] = []
    for number in range(count):
        hpa, keyid = memory.split(pointers + 8 * number)
        pointer = int.from_bytes(memory.read(hpa, 8, keyid), "little")
        require_shared_hpa(call, pointer, INFO_ALIGNMENT, OPERAND_ID_RCX)
        hpa, keyid = memory.split(pointer)
        info = TdmrInfo.parse(memory.read(hpa, TDMR_INFO_SIZE, keyid))
        _check(call, infos, info)
        infos.append(info)
    return infos


def _details(status: int, *numbers: int) -> int:
    """A status with up to four packed bytes of details, the first one lowest."""
    return status + sum(number << 8 * place for place, number in enumerate(numbers))


def _check(call: Call, earlier: list[TdmrInfo], info: TdmrInfo) -> None:
    """All tests on one TDMR, given those before it.

    Refuses, in order: NON_ORDERED_TDMR, INVALID_TDMR; reserved areas; PAMTs; PAMT_OVERLAP;
    PAMT_OUTSIDE_CMRS; TDMR_OUTSIDE_CMRS.
    """
    i = len(earlier)
    _check_extent(call, earlier, info, i)
    _check_reserved(info, i)
    _check_pamts(call, info, i)
    _check_pamt_overlaps(earlier, info, i)
    cmrs = _merged(call.module.platform.cmrs)
    for level in (_1G, _2M, _4K):
        if not _is_inside(info.pamts[level], cmrs):
            raise Refused(_details(TDX_PAMT_OUTSIDE_CMRS, i, level))
    if not all(_is_inside(part, cmrs) for part in info.available()):
        raise Refused(_details(TDX_TDMR_OUTSIDE_CMRS, i))


def _check_extent(call: Call, earlier: list[TdmrInfo], info: TdmrInfo, i: int) -> None:
    invalid, not_ordered = _details(TDX_INVALID_TDMR, i), _details(TDX_NON_ORDERED_TDMR, i)
    if _overflows(info.base, info.size):
        raise Refused(invalid)
    if earlier and info.base < earlier[-1].base + earlier[-1].size:
        raise Refused(not_ordered)
    if info.base % SIZE_1G or info.size % SIZE_1G or info.size == 0:
        raise Refused(invalid)
    if not (_is_hpa(call, info.base) and _is_hpa(call, info.base + info.size - 1)):
        raise Refused(invalid)


def _overflows(base: int, size: int) -> bool:
    return base + size >= 1 << 64


def _is_hpa(call: Call, pa: int) -> bool:
    """True for a physical address below 2**52 without KeyID bits."""
    return pa < PA_LIMIT and not pa & call.module.memory.keyid_mask


def _check_reserved(info: TdmrInfo, i: int) -> None:
    behind = 0
    for j, area in enumerate(info.reserved):
        invalid = _details(TDX_INVALID_RESERVED_IN_TDMR, i, j)
        not_ordered = _details(TDX_NON_ORDERED_RESERVED_IN_TDMR, i, j)
        offset = info.offset(area)
        if not area.size:
            if any(later.size for later in info.reserved[j + 1 :]):
                raise Refused(not_ordered)
            return
        if _overflows(offset, area.size):
            raise Refused(invalid)
        if offset < behind:
            raise Refused(not_ordered)
        if offset % PAGE_SIZE or area.size % PAGE_SIZE or offset + area.size > info.size:
            raise Refused(invalid)
        behind = offset + area.size


def _check_pamts(call: Call, info: TdmrInfo, i: int) -> None:
    for level in (_1G, _2M, _4K):
        pamt = info.pamts[level]
        needed = (info.size >> (12 + 9 * level)) * PAMT_ENTRY_SIZE
        if (
            _overflows(*pamt)
            or pamt.base % PAGE_SIZE
            or pamt.size % PAGE_SIZE
            or not (_is_hpa(call, pamt.base) and _is_hpa(call, pamt.end - 1))
            or pamt.size < needed
        ):
            raise Refused(_details(TDX_INVALID_PAMT, i, level))


def _check_pamt_overlaps(earlier: list[TdmrInfo], info: TdmrInfo, i: int) -> None:
    for j, other in enumerate(earlier):
        for level in (_4K, _2M, _1G):
            if any(info.pamts[level].overlaps(*pamt) for pamt in other.pamts):
                raise Refused(_details(TDX_PAMT_OVERLAP, i, level, j))
    for level, with_level in ((_4K, _2M), (_4K, _1G), (_2M, _1G)):
        if info.pamts[level].overlaps(*info.pamts[with_level]):
            raise Refused(_details(TDX_PAMT_OVERLAP, i, level, i))
    for level in (_4K, _2M, _1G):
        for j, other in enumerate([*earlier, info]):
            if any(part.overlaps(*info.pamts[level]) for part in other.available()):
                raise Refused(_details(TDX_PAMT_OVERLAP, i, level, j))
    for j, other in enumerate(earlier):
        for level in (_4K, _2M, _1G):
            if any(part.overlaps(*other.pamts[level]) for part in info.available()):
                raise Refused(_details(TDX_PAMT_OVERLAP, j, level, i))


def _merged(regions: tuple[Region, ...]) -> list[Region]:
    """Ranges that touch become one."""
    merged: list[Region] = []
    for region in sorted(regions):
        if merged and merged[-1].end == region.base:
            merged[-1] = Region(merged[-1].base, merged[-1].size + region.size)
        else:
            merged.append(region)
    return merged


def _is_inside(region: Region, ranges: list[Region]) -> bool:
    return any(r.base <= region.base and region.end <= r.end for r in ranges)
