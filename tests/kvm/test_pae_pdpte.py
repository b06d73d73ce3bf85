"""The four entries: bits, checks, constructors, quadrants."""

from __future__ import annotations

import pytest

from tdxlab.bits import MASK64
from tdxlab.kvm.pae_pdpte import (
    X86_CR0_PDPTR_BITS,
    X86_CR4_PDPTR_BITS,
    Pdpte,
    is_legal_table,
    make_nonleaf_spte,
    make_pdpte_spte,
    make_root_pdpte,
    pdpte_index,
    pdptr_rsvd_bits,
    reserved_bits_set,
    spte_address,
    written_sptes,
)

DIRECTORIES = (0x1_4000_1000, 0x1_4000_2000, 0x5555_5000, 0x2_0000_3000)


def test_pdptr_rsvd_bits_are_what_kvm_checks_at_46_bits() -> None:
    assert pdptr_rsvd_bits(46) == 0xFFFF_C000_0000_01E6


@pytest.mark.parametrize("maxphyaddr", range(36, 53))
def test_pdptr_rsvd_bits_leave_only_the_known_fields_at_every_width(maxphyaddr: int) -> None:
    known = 1 | 3 << 3 | 7 << 9 | (1 << maxphyaddr) - (1 << 12)
    assert pdptr_rsvd_bits(maxphyaddr) == MASK64 & ~known


@pytest.mark.parametrize("maxphyaddr", [0, 35, 53])
def test_pdptr_rsvd_bits_refuses_other_widths(maxphyaddr: int) -> None:
    with pytest.raises(ValueError, match="choose 36 to 52"):
        pdptr_rsvd_bits(maxphyaddr)


@pytest.mark.parametrize(
    ("value", "maxphyaddr", "bad"),
    [
        (0, 46, 0),
        (1 << 63, 46, 0),
        (0xFFE, 46, 0),
        (MASK64, 46, 0xFFFF_C000_0000_01E6),
        (0x1_4000_1003, 46, 1 << 1),
        (0x1_4000_1021, 46, 1 << 5),
        (0x1_4000_1E01, 46, 0),
        (0x1_4000_1019, 46, 0),
        (0x8000_0001_4000_1001, 46, 1 << 63),
        (0x8001_4000_1001, 46, 1 << 47),
        (0x8001_4000_1001, 48, 0),
    ],
)
def test_reserved_bits_set_judges_one_entry(value: int, maxphyaddr: int, bad: int) -> None:
    assert reserved_bits_set(value, maxphyaddr) == bad


def test_is_legal_table_asks_all_four_entries() -> None:
    good = [make_root_pdpte(directory, 0) for directory in DIRECTORIES]
    assert is_legal_table(good, 46)
    assert is_legal_table([0, 0, 0, 0], 46)
    for place in range(4):
        assert not is_legal_table([*good[:place], MASK64, *good[place + 1 :]], 46)


@pytest.mark.parametrize(
    ("directory", "plain", "rfc", "encrypted"),
    [
        (0x1_4000_1000, 0x140001001, 0x140001801, 0x800140001001),
        (0x1_4000_2000, 0x140002001, 0x140002801, 0x800140002001),
        (0x5555_5000, 0x55555001, 0x55555801, 0x800055555001),
        (0x2_0000_3000, 0x200003001, 0x200003801, 0x800200003001),
    ],
)
def test_make_pdpte_gives_each_design_its_bits(
    directory: int, plain: int, rfc: int, encrypted: int
) -> None:
    assert make_root_pdpte(directory, 0) == plain
    assert make_pdpte_spte(directory, 0) == rfc
    assert make_root_pdpte(directory, 1 << 47) == encrypted
    for entry in (plain, rfc, encrypted):
        assert spte_address(entry, 1 << 47) == directory


def test_make_nonleaf_spte_is_no_legal_pdpte() -> None:
    assert make_nonleaf_spte(0x1_4000_1000, 0) == 0x1_4000_1827
    assert reserved_bits_set(0x1_4000_1827, 46) == 0x26


def test_pdpte_describes_itself() -> None:
    assert Pdpte(0x1_4000_1801).describe() == "present=0x1 ignored=0x4 address=0x140001000"


def test_pdpte_index_is_the_gibibyte() -> None:
    assert [pdpte_index(va) for va in (0, 0x3FFF_FFFF, 0x4000_0000, 0xC012_3456)] == [0, 0, 1, 3]


@pytest.mark.parametrize(
    ("offset", "level", "quadrant", "entries"),
    [
        (0xC00, 2, 3, (0, 1)),
        (0x3FC, 2, 0, (510, 511)),
        (0x400, 2, 1, (0, 1)),
        (0x7FC, 1, 0, (511,)),
        (0x800, 1, 1, (0,)),
    ],
)
def test_written_sptes_finds_the_entries_of_one_quadrant_alone(
    offset: int, level: int, quadrant: int, entries: tuple[int, ...]
) -> None:
    for asked in range(4 if level == 2 else 2):
        found = written_sptes(offset, level=level, quadrant=asked)
        assert found == (entries if asked == quadrant else ())


@pytest.mark.parametrize(("level", "most"), [(1, 2), (2, 4)])
def test_written_sptes_gives_every_gpte_its_own_entries(level: int, most: int) -> None:
    found = [
        (quadrant, entry)
        for offset in range(0, 4096, 4)
        for quadrant in range(most)
        for entry in written_sptes(offset, level=level, quadrant=quadrant)
    ]
    assert sorted(found) == [(quadrant, entry) for quadrant in range(most) for entry in range(512)]


def test_pdptr_bits_are_the_two_sets_of_kvm() -> None:
    assert X86_CR0_PDPTR_BITS == 1 << 30 | 1 << 29 | 1 << 31
    assert X86_CR4_PDPTR_BITS == 1 << 5 | 1 << 7 | 1 << 4 | 1 << 20
