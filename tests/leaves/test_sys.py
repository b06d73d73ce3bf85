"""TDH.SYS.INIT, LP.INIT, CONFIG, KEY.CONFIG, TDMR.INIT, LP.SHUTDOWN, SHUTDOWN, UPDATE."""

import pytest
from leafbench import NDA, RSVD, Bench, BuiltTd
from leaffaults import (
    R8,
    RCX,
    RDX,
    Fault,
    Refusals,
    check,
    check_alone,
    check_pairs,
    each,
)
from spoils import (
    Case,
    Held,
    Spoil,
    bits,
    condition,
    hold,
    register,
)

from tdxlab.abi import leaves as abi
from tdxlab.abi import status as s
from tdxlab.abi.registers import Registers
from tdxlab.hardware import Platform, Region, TdmrPlan
from tdxlab.host import TDMR_INFO_BUFFER, Host
from tdxlab.seam.system import Sys

GIB = 1 << 30
FIRST, SECOND, PAMTS, CMR_END = 4 * GIB, 5 * GIB, 6 * GIB, 7 * GIB
#: Two TDMRs of 1 GiB, then the PAMTs; four LPs in two packages.
PLATFORM = Platform(
    low_memory=Region(0, GIB),
    cmrs=(Region(FIRST, GIB), Region(SECOND, 2 * GIB)),
    tdmrs=(TdmrPlan(FIRST, GIB, (Region(0x1000, 0x2000),)), TdmrPlan(SECOND, GIB)),
    pamt_region=PAMTS,
    seamrr=Region(CMR_END, 1 << 25),
)
PENDING, INIT_DONE, CONFIG_DONE, READY, SHUTDOWN = range(5)


def brought_to(state: int) -> Bench:
    """A machine whose module is in the given state, its TDMRs not initialised."""
    bench = Bench(PLATFORM, boot=False)
    Host(bench.machine)._write_tdmr_infos()
    if state >= INIT_DONE:
        bench.must(abi.TDH_SYS_INIT)
        for lp in range(4):
            bench.must(abi.TDH_SYS_LP_INIT, lp=lp)
    if state >= CONFIG_DONE:
        bench.must(abi.TDH_SYS_CONFIG, rcx=TDMR_INFO_BUFFER, rdx=2, r8=32)
    if state >= READY:
        for lp in (1, 2):
            bench.must(abi.TDH_SYS_KEY_CONFIG, lp=lp)
    return bench


def sys_word(bench: Bench, word: int) -> int:
    return bench.machine.module.system.view[word]


def system(word: int, value: int) -> Spoil:
    def spoil(case: Case) -> None:
        case.bench.machine.module.system.put(word, value)

    return spoil


def states(status: int, *values: int) -> list[Fault]:
    """The module is in another state."""
    return [Fault(f"module state {v}", system(Sys.STATE, v), status) for v in values]


def global_lock(value: int, after: int) -> Fault:
    def spoil(case: Case) -> Held:
        return hold(case.bench.machine.module.system, Sys.LOCK, value, after)

    return Fault(f"global lock {value}", spoil, s.TDX_SYS_BUSY)


def sys_init(bench: Bench) -> Case:
    clears = ("rcx", "rdx", "r8", "r9", "r10")
    fresh = brought_to(PENDING)
    return Case(fresh, None, abi.TDH_SYS_INIT, clears, rdx=2, r8=8, r9=9, r10=10, r11=11)


def lp_init(bench: Bench) -> Case:
    fresh = Bench(PLATFORM, boot=False)
    fresh.must(abi.TDH_SYS_INIT)
    return Case(fresh, None, abi.TDH_SYS_LP_INIT, ("rcx", "rdx", "r8"), rcx=1, rdx=2, r8=3, r9=4)


def config(bench: Bench) -> Case:
    fresh, leaf = brought_to(INIT_DONE), abi.TDH_SYS_CONFIG
    return Case(fresh, None, leaf, rcx=TDMR_INFO_BUFFER, rdx=2, r8=32, r9=9)


def key_config(bench: Bench) -> Case:
    return Case(brought_to(CONFIG_DONE), None, abi.TDH_SYS_KEY_CONFIG, rcx=1, rdx=2)


def tdmr_init(bench: Bench) -> Case:
    return Case(brought_to(READY), None, abi.TDH_SYS_TDMR_INIT, ("rdx",), rcx=SECOND, rdx=2)


def shutdown(bench: Bench) -> Case:
    return Case(brought_to(READY), None, abi.TDH_SYS_SHUTDOWN, rdx=2)


def update(bench: Bench) -> Case:
    return Case(brought_to(INIT_DONE), None, abi.TDH_SYS_UPDATE, rcx=1, rdx=2)


def in_seamrr(case: Case) -> None:
    case.registers["rcx"] = CMR_END


def initialised(case: Case) -> None:
    tdmrs = case.bench.machine.module.tdmrs
    tdmrs.put(SECOND, tdmrs[SECOND]._replace(initialised_to=SECOND + GIB))


LP_DONE = system(Sys.lp_word(0, Sys.LP_INITIALISED), 1)
ONE_LP_MISSING = system(Sys.INIT_LPS, 3)
NO_ENTROPY = Fault("no entropy", condition("entropy_fails", True), s.TDX_RND_NO_ENTROPY)
BAD_RCX, BAD_RDX, BAD_R8 = (s.TDX_OPERAND_INVALID + n for n in (RCX, RDX, R8))
EXCLUSIVE = [global_lock(1, 1), global_lock(2, 2)]
TABLES = [
    Refusals(
        abi.TDH_SYS_INIT,
        sys_init,
        [
            *EXCLUSIVE,
            Fault("attributes", register("rcx", 1), BAD_RCX),
            *states(s.TDX_SYS_INIT_NOT_PENDING, INIT_DONE, CONFIG_DONE, READY),
            NO_ENTROPY,
        ],
    ),
    Refusals(
        abi.TDH_SYS_LP_INIT,
        lp_init,
        [
            global_lock(1, 3),
            *states(s.TDX_SYS_LP_INIT_NOT_PENDING, PENDING, CONFIG_DONE, READY),
            Fault("LP done", LP_DONE, s.TDX_SYS_LP_INIT_DONE),
            NO_ENTROPY,
        ],
    ),
    Refusals(
        abi.TDH_SYS_CONFIG,
        config,
        [
            *EXCLUSIVE,
            *states(s.TDX_SYS_CONFIG_NOT_PENDING, PENDING, CONFIG_DONE, READY),
            Fault("one LP missing", ONE_LP_MISSING, s.TDX_SYS_CONFIG_NOT_PENDING),
            Fault("RCX not aligned", bits("rcx", 0x100), BAD_RCX),
            Fault("RCX beyond 52 bits", bits("rcx", 1 << 52), BAD_RCX),
            Fault("RCX in the module's range", in_seamrr, BAD_RCX),
            Fault("RCX with a private KeyID", bits("rcx", 32 << 46), BAD_RCX),
            Fault("65 TDMRs", register("rdx", 65), BAD_RDX),
            Fault("no TDMR", register("rdx", 0), BAD_RDX),
            *(Fault(f"KeyID {n:#x}", register("r8", n), BAD_R8) for n in (0, 31, 64, 0x10020)),
        ],
    ),
    Refusals(
        abi.TDH_SYS_KEY_CONFIG,
        key_config,
        [
            *EXCLUSIVE,
            *states(s.TDX_SYS_KEY_CONFIG_NOT_PENDING, PENDING, INIT_DONE, READY),
            Fault("package done", system(Sys.KEYED_PACKAGES, 1), s.TDX_KEY_CONFIGURED),
            Fault("PCONFIG busy", condition("pconfig_result", 5), s.TDX_OPERAND_BUSY + 187),
            Fault("PCONFIG fails", condition("pconfig_result", 2), s.TDX_KEY_GENERATION_FAILED),
        ],
    ),
    Refusals(
        abi.TDH_SYS_TDMR_INIT,
        tdmr_init,
        [
            Fault("RCX not 1 GiB aligned", bits("rcx", 0x1000), BAD_RCX),
            Fault("RCX with a KeyID", bits("rcx", 1 << 46), BAD_RCX),
            Fault("RCX beyond 52 bits", bits("rcx", 1 << 52), BAD_RCX),
            Fault("RCX no TDMR's base", register("rcx", PAMTS), BAD_RCX),
            Fault("complete", initialised, s.TDX_TDMR_ALREADY_INITIALIZED),
        ],
    ),
    Refusals(
        abi.TDH_SYS_SHUTDOWN,
        shutdown,
        [Fault("hand-off version", register("rcx", 1), BAD_RCX), *EXCLUSIVE],
    ),
    Refusals(
        abi.TDH_SYS_UPDATE,
        update,
        [
            *EXCLUSIVE,
            Fault("module state 0", system(Sys.STATE, PENDING), s.TDX_SYS_STATE_INCORRECT),
            Fault("one LP missing", ONE_LP_MISSING, s.TDX_SYS_STATE_INCORRECT),
            Fault("no hand-off data", lambda case: None, s.TDX_SYS_INVALID_HANDOFF),
        ],
    ),
]


@each(TABLES)
def test_sys_leaf_refuses(bench: Bench, table: Refusals, number: int) -> None:
    check_alone(bench, table, number)


@each(TABLES)
def test_sys_leaf_refuses_the_earlier_of_two_faults(
    bench: Bench, table: Refusals, number: int
) -> None:
    check_pairs(bench, table, number)


# -- what they do


def test_a_boot_leads_from_state_to_state() -> None:
    bench = Bench(PLATFORM, boot=False)
    assert sys_word(bench, Sys.STATE) == PENDING
    values = bench.must(abi.TDH_SYS_INIT, rdx=1, r8=1, r9=1, r10=1, r11=11)
    assert values == Registers(r11=11)
    assert sys_word(bench, Sys.STATE) == INIT_DONE
    for lp in (2, 0, 3, 1):
        assert bench.must(abi.TDH_SYS_LP_INIT, lp=lp, rcx=1, rdx=1, r8=1) == Registers()
    Host(bench.machine)._write_tdmr_infos()
    operands = {"rcx": TDMR_INFO_BUFFER, "rdx": 2, "r8": 32}
    assert bench.must(abi.TDH_SYS_CONFIG, **operands) == Registers(**operands)
    assert sys_word(bench, Sys.STATE) == CONFIG_DONE
    assert bench.machine.module.keys.states.view[32] == 3
    bench.must(abi.TDH_SYS_KEY_CONFIG, lp=3)
    assert bench.call(abi.TDH_SYS_KEY_CONFIG, lp=2)[0] == s.TDX_KEY_CONFIGURED
    assert sys_word(bench, Sys.STATE) == CONFIG_DONE
    bench.must(abi.TDH_SYS_KEY_CONFIG, lp=0)
    assert sys_word(bench, Sys.STATE) == READY
    assert bench.call(abi.TDH_SYS_KEY_CONFIG)[0] == s.TDX_SYS_KEY_CONFIG_NOT_PENDING


def test_tdh_sys_tdmr_init_opens_a_block_with_its_last_step() -> None:
    bench = brought_to(READY)
    for _ in range(255):
        assert bench.must(abi.TDH_SYS_TDMR_INIT, rcx=FIRST).rdx == FIRST
    status, _ = bench.call(abi.TDH_PHYMEM_PAGE_RDMD, rcx=FIRST)
    assert status == s.TDX_OPERAND_ADDR_RANGE_ERROR + RCX
    assert bench.must(abi.TDH_SYS_TDMR_INIT, rcx=FIRST).rdx == FIRST + GIB
    types = [bench.must(abi.TDH_PHYMEM_PAGE_RDMD, rcx=FIRST + n * 4096).rcx for n in range(4)]
    assert types == [NDA, RSVD, RSVD, NDA]
    status, values = bench.call(abi.TDH_SYS_TDMR_INIT, rcx=FIRST, rdx=2)
    assert (status, values.rdx) == (s.TDX_TDMR_ALREADY_INITIALIZED, 0)
    status, _ = bench.call(abi.TDH_PHYMEM_PAGE_RDMD, rcx=SECOND)
    assert status == s.TDX_OPERAND_ADDR_RANGE_ERROR + RCX


def test_tdh_sys_shutdown_ends_everything_but_lp_shutdown(bench: Bench) -> None:
    td = BuiltTd(bench)
    bench.must(abi.TDH_SYS_SHUTDOWN, rdx=2)
    for leaf in (*abi.HOST_LEAVES, 42, 255):
        expected = 0 if leaf == abi.TDH_SYS_LP_SHUTDOWN else s.TDX_SYS_SHUTDOWN
        assert bench.call(leaf, rcx=td.tdr)[0] == expected


@pytest.mark.parametrize("state", range(4))
def test_tdh_sys_lp_shutdown_succeeds_in_every_state(state: int) -> None:
    bench = brought_to(state)
    before = bench.digest()
    assert bench.must(abi.TDH_SYS_LP_SHUTDOWN, rcx=5) == Registers(rcx=5)
    assert bench.digest() == before


# -- TDMR_INFO

#: (TDMR, changed words of its TDMR_INFO, status, numbers in its low bytes), in the module's order.
#: Words: 0 base, 1 size; base and size of the PAMT 2, 3 (1G), 4, 5 (2M), 6, 7 (4K); then offset
#: and size of each reserved area.
BAD_TDMRS = [
    (0, {0: (1 << 64) - GIB, 1: 2 * GIB}, s.TDX_INVALID_TDMR, (0,)),
    (0, {0: FIRST + 4096}, s.TDX_INVALID_TDMR, (0,)),
    (0, {1: GIB + 4096}, s.TDX_INVALID_TDMR, (0,)),
    (0, {1: 0}, s.TDX_INVALID_TDMR, (0,)),
    (0, {0: 1 << 52}, s.TDX_INVALID_TDMR, (0,)),
    (0, {0: 1 << 46}, s.TDX_INVALID_TDMR, (0,)),
    (0, {0: (1 << 46) - GIB, 1: 2 * GIB}, s.TDX_INVALID_TDMR, (0,)),
    (0, {9: 0, 10: 0x4000, 11: 0x1000}, s.TDX_NON_ORDERED_RESERVED_IN_TDMR, (0, 0)),
    (0, {8: (1 << 64) - 0x1000, 9: 0x2000}, s.TDX_INVALID_RESERVED_IN_TDMR, (0, 0)),
    (0, {10: 0, 11: 0x1000}, s.TDX_NON_ORDERED_RESERVED_IN_TDMR, (0, 1)),
    (0, {10: 0x2000, 11: 0x1000}, s.TDX_NON_ORDERED_RESERVED_IN_TDMR, (0, 1)),
    (0, {8: 0x800}, s.TDX_INVALID_RESERVED_IN_TDMR, (0, 0)),
    (0, {9: 0x800}, s.TDX_INVALID_RESERVED_IN_TDMR, (0, 0)),
    (0, {8: GIB}, s.TDX_INVALID_RESERVED_IN_TDMR, (0, 0)),
    (0, {2: (1 << 64) - 0x1000, 3: 0x2000}, s.TDX_INVALID_PAMT, (0, 2)),
    (0, {4: PAMTS + 0x800}, s.TDX_INVALID_PAMT, (0, 1)),
    (0, {5: 0x1000}, s.TDX_INVALID_PAMT, (0, 1)),
    (0, {6: 1 << 46}, s.TDX_INVALID_PAMT, (0, 0)),
    (0, {7: 0x3F_F000}, s.TDX_INVALID_PAMT, (0, 0)),
    (0, {4: PAMTS + 0x4000, 5: 0x2000, 6: PAMTS + 0x4000}, s.TDX_PAMT_OVERLAP, (0, 0, 0)),
    (0, {2: PAMTS + 0x2000}, s.TDX_PAMT_OVERLAP, (0, 1, 0)),
    (0, {6: FIRST + 0x3000}, s.TDX_PAMT_OVERLAP, (0, 0, 0)),
    (0, {2: 0x3000_0000}, s.TDX_PAMT_OUTSIDE_CMRS, (0, 2)),
    (0, {4: 0x3000_0000}, s.TDX_PAMT_OUTSIDE_CMRS, (0, 1)),
    (1, {0: 3 * GIB}, s.TDX_NON_ORDERED_TDMR, (1,)),
    (1, {0: FIRST}, s.TDX_NON_ORDERED_TDMR, (1,)),
    (1, {2: PAMTS}, s.TDX_PAMT_OVERLAP, (1, 2, 0)),
    (1, {0: CMR_END}, s.TDX_TDMR_OUTSIDE_CMRS, (1,)),
]


def tdmr_info(number: int, words: dict[int, int]) -> Spoil:
    def spoil(case: Case) -> None:
        info = TDMR_INFO_BUFFER + 4096 * (number + 1)
        for word, value in words.items():
            case.bench.machine.store(info + 8 * word, value.to_bytes(8, "little"))

    return spoil


def bad_tdmr(row: tuple[int, dict[int, int], int, tuple[int, ...]]) -> Fault:
    number, words, status, numbers = row
    name = f"TDMR {number} { ({n: hex(v) for n, v in words.items()}) }"
    return Fault(name, tdmr_info(number, words), s.with_bytes(status, *numbers), keeps=False)


@pytest.mark.parametrize("row", BAD_TDMRS, ids=lambda row: bad_tdmr(row).name)
def test_tdh_sys_config_refuses_a_tdmr(
    row: tuple[int, dict[int, int], int, tuple[int, ...]], bench: Bench
) -> None:
    check(config(bench), bad_tdmr(row))


@pytest.mark.parametrize("first", [0, 7, 14, 19, 22])
def test_tdh_sys_config_refuses_by_the_earlier_test_of_a_tdmr(bench: Bench, first: int) -> None:
    """Extent, reserved areas, PAMTs, overlaps, CMRs, the next TDMR: one of each later kind."""
    for later in (7, 14, 22, 24, 27):
        if later > first:
            check(config(bench), bad_tdmr(BAD_TDMRS[first]), bad_tdmr(BAD_TDMRS[later]))


def test_tdh_sys_config_finds_the_pamt_of_an_earlier_tdmr_in_a_later_one(bench: Bench) -> None:
    check(config(bench), bad_tdmr((0, {2: SECOND}, s.TDX_PAMT_OVERLAP, (0, 2, 1))))


@pytest.mark.parametrize("pointer", [0x100, 32 << 46, CMR_END, 1 << 52])
def test_tdh_sys_config_refuses_a_pointer_and_keeps_the_keyid_reserved(
    bench: Bench, pointer: int
) -> None:
    case = config(bench)
    case.bench.machine.store(TDMR_INFO_BUFFER + 8, pointer.to_bytes(8, "little"))
    case.registers["r8"] = 40
    assert case.call()[0] == BAD_RCX
    assert case.bench.machine.module.keys.states.view[40] == 3
    assert sys_word(case.bench, Sys.STATE) == INIT_DONE
    Host(case.bench.machine)._write_tdmr_infos()
    case.registers["r8"] = 32
    case.succeed()


def test_tdh_sys_config_takes_tdmrs_across_cmrs_that_touch(bench: Bench) -> None:
    case = config(bench)
    tdmr_info(0, {1: 2 * GIB, 3: 0x1000, 5: 0x4000, 4: PAMTS + 0x10_0000})(case)
    tdmr_info(0, {6: PAMTS + 0x100_0000, 7: 0x80_0000, 2: PAMTS + 0x20_0000})(case)
    case.registers["rdx"] = 1
    case.succeed()
    assert list(case.bench.machine.module.tdmrs) == [FIRST]
