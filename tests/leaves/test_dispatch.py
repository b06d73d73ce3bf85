"""The dispatcher: what is refused before any leaf is reached, with no register touched."""

import pytest
from leafbench import Bench

from tdxlab.abi import leaves as abi
from tdxlab.abi import status as s
from tdxlab.abi.registers import REGISTER_NAMES, Registers

INVALID_RAX = s.TDX_OPERAND_INVALID
VERSIONED = {3, 11, 23, 26, 30}
EARLY = {31, 32, 33, 34, 35, 37, 44, 45, 53}
FILLED = Registers(**{name: 0x1111 * n for n, name in enumerate(REGISTER_NAMES, start=1)})


def refused(bench: Bench, rax: int, status: int) -> None:
    values, before = FILLED.copy(), bench.digest()
    assert bench.machine.seamcall(0, rax, values) == status
    assert values == FILLED
    assert bench.digest() == before


@pytest.mark.parametrize("bit", [24, 31, 32, 63])
@pytest.mark.parametrize("leaf", [0, 3, 33, 44])
def test_dispatch_refuses_reserved_bits_of_rax(bench: Bench, bit: int, leaf: int) -> None:
    refused(bench, leaf | 1 << bit, INVALID_RAX)


@pytest.mark.parametrize("version", [1, 2, 255])
def test_dispatch_refuses_versions_of_leaves_that_have_none(bench: Bench, version: int) -> None:
    for leaf in sorted(set(abi.HOST_LEAVES) - VERSIONED):
        refused(bench, leaf | version << 16, INVALID_RAX)


@pytest.mark.parametrize("leaf", sorted(VERSIONED))
def test_dispatch_leaves_versions_to_the_leaves_that_have_them(bench: Bench, leaf: int) -> None:
    values = FILLED.copy()
    assert bench.machine.seamcall(0, leaf | 255 << 16, values) == INVALID_RAX
    assert values != FILLED, "the leaf clears outputs before it refuses"


@pytest.mark.parametrize("leaf", [42, 46, 47, 54, 63, 97, 200, 65535])
def test_dispatch_refuses_leaves_that_do_not_exist(bench: Bench, leaf: int) -> None:
    refused(bench, leaf, INVALID_RAX)


def test_dispatch_lets_only_system_leaves_through_before_the_module_is_ready() -> None:
    bench = Bench(boot=False)
    for leaf in (*sorted(set(abi.HOST_LEAVES) - EARLY), 42, 255):
        refused(bench, leaf, s.TDX_SYS_NOT_READY)


def test_dispatch_refuses_rax_before_it_looks_at_the_state() -> None:
    bench = Bench(boot=False)
    refused(bench, 2 | 1 << 16, INVALID_RAX)
    refused(bench, 2 | 1 << 24, INVALID_RAX)


def test_leaves_that_are_not_modelled_answer_like_unknown_ones(bench: Bench) -> None:
    for leaf, entry in abi.HOST_LEAVES.items():
        if not entry.modelled:
            refused(bench, leaf, INVALID_RAX)
