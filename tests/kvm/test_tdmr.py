"""How the memory map becomes TDMRs, PAMTs and reserved areas."""

from errno import ENOMEM, ENOSPC

import pytest

from tdxlab.arch import SIZE_1G, SIZE_2M
from tdxlab.hardware import Region
from tdxlab.kvm.pages import NO_PAGE
from tdxlab.kvm.tdmr import Tdmr, TdmrLimits, construct_tdmrs, fill_out_tdmrs, pamt_sizes

LIMITS = TdmrLimits(64, 16, (16, 16, 16))


def alloc_at(base: int):
    """An allocator that gives out ascending memory from `base` on."""
    position = [base]

    def alloc(size: int, near: Region) -> int:
        position[0] += size
        return position[0] - size

    return alloc


@pytest.mark.parametrize(
    ("memory", "expected"),
    [
        ([Region(SIZE_1G, SIZE_1G)], [(1, 1)]),
        ([Region(SIZE_1G + SIZE_2M, 4096)], [(1, 1)]),
        ([Region(SIZE_1G // 2, SIZE_1G)], [(0, 2)]),
        ([Region(0, SIZE_2M), Region(SIZE_1G // 2, SIZE_2M)], [(0, 1)]),
        ([Region(0, SIZE_2M), Region(SIZE_1G // 2, SIZE_1G)], [(0, 1), (1, 1)]),
        ([Region(0, SIZE_1G), Region(3 * SIZE_1G, 2 * SIZE_1G)], [(0, 1), (3, 2)]),
    ],
)
def test_fill_out_tdmrs_covers_memory_in_whole_gib(
    memory: list[Region], expected: list[tuple[int, int]]
) -> None:
    tdmrs = fill_out_tdmrs(memory, 64)
    assert isinstance(tdmrs, list)
    assert [(tdmr.base // SIZE_1G, tdmr.size // SIZE_1G) for tdmr in tdmrs] == expected


def test_fill_out_tdmrs_fails_with_too_many_regions() -> None:
    memory = [Region(2 * number * SIZE_1G, SIZE_1G) for number in range(3)]
    assert fill_out_tdmrs(memory, 2) == -ENOSPC
    assert len(fill_out_tdmrs(memory, 3)) == 3  # type: ignore[arg-type]


def test_pamt_sizes_of_one_gib() -> None:
    assert pamt_sizes(SIZE_1G, (16, 16, 16)) == [4 << 20, 8 << 10, 4 << 10]
    assert sum(pamt_sizes(SIZE_1G, (16, 16, 16))) == 4_206_592


def test_construct_tdmrs_carves_the_pamts_in_order() -> None:
    tdmrs = construct_tdmrs([Region(SIZE_1G, SIZE_1G)], LIMITS, alloc_at(1 << 40))
    assert isinstance(tdmrs, list)
    small, middle, big = tdmrs[0].pamts
    assert small == Region(1 << 40, 4 << 20)
    assert middle == Region(small.end, 8 << 10)
    assert big == Region(middle.end, 4 << 10)


def test_construct_tdmrs_reserves_holes_and_pamts_sorted() -> None:
    memory = [Region(SIZE_1G + SIZE_2M, SIZE_2M), Region(SIZE_1G + 8 * SIZE_2M, 64 * SIZE_2M)]
    pamt_at = SIZE_1G + 16 * SIZE_2M
    tdmrs = construct_tdmrs(memory, LIMITS, alloc_at(pamt_at))
    assert isinstance(tdmrs, list)
    [tdmr] = tdmrs
    pamt = sum(area.size for area in tdmr.pamts)
    assert [(area.base - SIZE_1G, area.size) for area in tdmr.reserved] == [
        (0, SIZE_2M),
        (2 * SIZE_2M, 6 * SIZE_2M),
        (16 * SIZE_2M, pamt),
        (72 * SIZE_2M, SIZE_1G - 72 * SIZE_2M),
    ]


def test_construct_tdmrs_reserves_the_pamt_of_another_tdmr() -> None:
    memory = [Region(0, SIZE_1G), Region(2 * SIZE_1G, SIZE_1G)]
    tdmrs = construct_tdmrs(memory, LIMITS, alloc_at(SIZE_2M))
    assert isinstance(tdmrs, list)
    assert [len(tdmr.reserved) for tdmr in tdmrs] == [2, 0]


def test_construct_tdmrs_fails_with_too_many_reserved_areas() -> None:
    memory = [Region(number * 4 * SIZE_2M, SIZE_2M) for number in range(5)]
    limits = TdmrLimits(64, 5, (16, 16, 16))
    assert construct_tdmrs(memory, limits, alloc_at(0)) == -ENOSPC
    assert isinstance(construct_tdmrs(memory, LIMITS, alloc_at(0)), list)


def test_construct_tdmrs_fails_without_room_for_a_pamt() -> None:
    assert construct_tdmrs([Region(0, SIZE_1G)], LIMITS, lambda size, near: NO_PAGE) == -ENOMEM


def test_tdmr_info_has_offsets_from_the_base() -> None:
    pamts = (Region(1 << 40, 3), Region(2 << 40, 2), Region(3 << 40, 1))
    tdmr = Tdmr(SIZE_1G, SIZE_1G, pamts, (Region(SIZE_1G + 4096, 8192),))
    words = [int.from_bytes(tdmr.info[i : i + 8], "little") for i in range(0, 96, 8)]
    assert words == [SIZE_1G, SIZE_1G, 3 << 40, 1, 2 << 40, 2, 1 << 40, 3, 4096, 8192, 0, 0]
