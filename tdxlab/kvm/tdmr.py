"""TDMRs: how Linux cuts its memory into regions that the module will manage, and where the module's
metadata of them goes.

Source: Linux 6.16, arch/x86/virt/vmx/tdx/tdx.c (fill_out_tdmrs, tdmrs_set_up_pamt_all,
tdmrs_populate_rsvd_areas_all).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from errno import ENOMEM, ENOSPC
from typing import NamedTuple

from tdxlab.abi.structs import make_tdmr_info
from tdxlab.arch import PAGE_SIZE, SIZE_1G, SIZE_2M
from tdxlab.hardware import Region
from tdxlab.kvm.pages import NO_PAGE

#: Page sizes that a PAMT has entries for, in the order in which Linux carves them out.
_PAMT_PAGE_SIZES = (PAGE_SIZE, SIZE_2M, SIZE_1G)


class TdmrLimits(NamedTuple):
    """What the module says of TDMRs. max_tdmrs, max_reserved_per_tdmr: how many. pamt_entry_sizes:
    bytes of one entry for 4 KiB, 2 MiB and 1 GiB.
    """

    max_tdmrs: int
    max_reserved_per_tdmr: int
    pamt_entry_sizes: tuple[int, int, int]


class Tdmr(NamedTuple):
    """One TDMR: base and size in bytes, its PAMTs for 4 KiB, 2 MiB and 1 GiB, and its reserved
    areas with addresses.
    """

    base: int
    size: int
    pamts: tuple[Region, ...] = ()
    reserved: tuple[Region, ...] = ()

    @property
    def end(self) -> int:
        """First byte address behind it."""
        return self.base + self.size

    @property
    def info(self) -> bytes:
        """The TDMR_INFO that TDH.SYS.CONFIG reads; offsets of reserved areas count from the
        base.
        """
        pamt_4k, pamt_2m, pamt_1g = self.pamts
        areas = [(area.base - self.base, area.size) for area in self.reserved]
        return make_tdmr_info(
            self.base,
            self.size,
            pamt_1g=pamt_1g,
            pamt_2m=pamt_2m,
            pamt_4k=pamt_4k,
            reserved=areas,
        )


def construct_tdmrs(
    memory: Sequence[Region],
    limits: TdmrLimits,
    alloc: Callable[[int, Region], int],
) -> list[Tdmr] | int:
    """The TDMRs for all of `memory` (ascending regions), with PAMTs and reserved areas.

    alloc: gives the HPA of so many contiguous bytes near a region, or NO_PAGE.
    Returns -ENOSPC for too many TDMRs or reserved areas, -ENOMEM without room for a PAMT.
    """
    plain = fill_out_tdmrs(memory, limits.max_tdmrs)
    if isinstance(plain, int):
        return plain
    tdmrs = []
    for tdmr in plain:
        pamts = _set_up_pamt(tdmr, limits, alloc)
        if not pamts:
            return -ENOMEM
        tdmrs.append(tdmr._replace(pamts=pamts))
    filled = [tdmr._replace(reserved=_reserved_areas(tdmr, tdmrs, memory)) for tdmr in tdmrs]
    if any(len(tdmr.reserved) > limits.max_reserved_per_tdmr for tdmr in filled):
        return -ENOSPC
    return filled


def fill_out_tdmrs(memory: Sequence[Region], max_tdmrs: int) -> list[Tdmr] | int:
    """One TDMR for each region, widened to whole GiB, without overlaps; or -ENOSPC."""
    tdmrs: list[Tdmr] = []
    for region in memory:
        start, end = region.base & -SIZE_1G, -(-region.end // SIZE_1G) * SIZE_1G
        if tdmrs:
            if end <= tdmrs[-1].end:
                continue
            start = max(start, tdmrs[-1].end)
        if len(tdmrs) == max_tdmrs:
            return -ENOSPC
        tdmrs.append(Tdmr(start, end - start))
    return tdmrs


def pamt_sizes(size: int, entry_sizes: Sequence[int]) -> list[int]:
    """Bytes of the three PAMTs of a TDMR of `size` bytes, whole pages each."""
    return [
        -(-(size // page_size) * entry_size // PAGE_SIZE) * PAGE_SIZE
        for page_size, entry_size in zip(_PAMT_PAGE_SIZES, entry_sizes, strict=True)
    ]


def _set_up_pamt(
    tdmr: Tdmr, limits: TdmrLimits, alloc: Callable[[int, Region], int]
) -> tuple[Region, ...]:
    """The three PAMTs one behind the other in one piece of memory; empty without one."""
    sizes = pamt_sizes(tdmr.size, limits.pamt_entry_sizes)
    base = alloc(sum(sizes), Region(tdmr.base, tdmr.size))
    if base == NO_PAGE:
        return ()
    return tuple(Region(base + sum(sizes[:number]), size) for number, size in enumerate(sizes))


def _reserved_areas(
    tdmr: Tdmr, tdmrs: Sequence[Tdmr], memory: Sequence[Region]
) -> tuple[Region, ...]:
    """What of a TDMR the module must not use: where no memory is, and every PAMT; ascending."""
    areas = _holes(tdmr, memory)
    for other in tdmrs:
        whole = Region(other.pamts[0].base, sum(pamt.size for pamt in other.pamts))
        start, end = max(whole.base, tdmr.base), min(whole.end, tdmr.end)
        if start < end:
            areas.append(Region(start, end - start))
    return tuple(sorted(areas))


def _holes(tdmr: Tdmr, memory: Sequence[Region]) -> list[Region]:
    holes = []
    position = tdmr.base
    for region in memory:
        if region.end <= tdmr.base or region.base >= tdmr.end:
            continue
        if region.base > position:
            holes.append(Region(position, region.base - position))
        position = region.end
    if position < tdmr.end:
        holes.append(Region(position, tdmr.end - position))
    return holes
