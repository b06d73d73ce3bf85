"""TDH.MNG.INIT: TD_PARAMS, field by field, and what becomes of it."""

from dataclasses import replace

import pytest
from leafbench import PARAMS, PLATFORM, Bench, BuiltTd
from leaffaults import (
    RCX,
    RDX,
    Fault,
    Refusals,
    check_alone,
    check_pairs,
    each,
    page_faults,
    state_faults,
)
from spoils import (
    Case,
    Spoil,
    bits,
)

from tdxlab.abi import leaves as abi
from tdxlab.abi import status as s
from tdxlab.abi.structs import make_td_params
from tdxlab.seam.td import Tdcs

ATTRIBUTES, XFAM, EXEC_CONTROLS, EPTP, MAX_VCPUS, CPUID, TSC, L2_VMS, ARCH = range(64, 73)
DEBUG, SEPT_VE_DISABLE, MIGRATABLE, PKS, PERFMON = 1, 1 << 28, 1 << 29, 1 << 30, 1 << 63
#: Extended state with AVX and AVX-512, which the recorded platform has.
AVX512 = 0xE7


def empty_td(bench: Bench, pages: int = 6) -> BuiltTd:
    td = BuiltTd(bench)
    td.configure_keys()
    td.add_tdcx(pages)
    return td


def init(bench: Bench) -> Case:
    td = empty_td(bench)
    bench.machine.store(PARAMS, make_td_params(max_vcpus=4, eptp_controls=0x1E))
    return Case(bench, td, abi.TDH_MNG_INIT, ("rcx",), rcx=td.tdr, rdx=PARAMS, r8=8)


def param(offset: int, size: int, value: int) -> Spoil:
    """A field of TD_PARAMS."""

    def spoil(case: Case) -> None:
        case.bench.machine.store(PARAMS + offset, value.to_bytes(size, "little"))

    return spoil


def illegal(name: str, offset: int, size: int, operand: int, *values: int) -> list[Fault]:
    """Values that a field must not have."""
    status = s.TDX_OPERAND_INVALID + operand
    return [Fault(f"{name} {v:#x}", param(offset, size, v), status) for v in values]


def reserved(*offsets: int) -> list[Fault]:
    """Bytes that must be 0."""
    status = s.TDX_OPERAND_INVALID + RDX
    return [Fault(f"byte {at}", param(at, 1, 0x80), status) for at in offsets]


def params_in_seamrr(case: Case) -> None:
    case.registers["rdx"] = case.bench.machine.platform.seamrr.base


def migratable_with_nested_vms(case: Case) -> None:
    case.td.add_tdcx(1)
    param(0, 8, MIGRATABLE)(case)
    param(18, 1, 1)(case)


BAD_RDX = s.TDX_OPERAND_INVALID + RDX
#: CPUID leaf 1 is the first of the twelve entries; bit 0 of its EAX is not configurable.
BAD_CPUID = Fault(
    "CPUID leaf 1 EAX bit 0",
    param(256, 4, 1),
    s.TDX_OPERAND_INVALID + CPUID,
    lambda case: {"rcx": 0xFFFF_FFFF << 32 | 1},
)
INIT = [
    *page_faults("rcx", RCX, exclusive=True, wrong="free"),
    *state_faults(1, 2, locked=False),
    Fault("RDX not aligned", bits("rdx", 0x200), BAD_RDX),
    Fault("RDX beyond 52 bits", bits("rdx", 1 << 52), BAD_RDX),
    Fault("RDX in the module's range", params_in_seamrr, BAD_RDX),
    Fault("RDX with a private KeyID", bits("rdx", 32 << 46), BAD_RDX),
    *illegal("ATTRIBUTES", 0, 8, ATTRIBUTES, 2, 1 << 31, 1 << 62),
    *illegal("ATTRIBUTES", 0, 8, ATTRIBUTES, MIGRATABLE | DEBUG, MIGRATABLE | PERFMON),
    *illegal("XFAM", 8, 8, XFAM, 0, 1, 2, 3 | 1 << 3, 3 | 1 << 14, 3 | 1 << 63),
    *illegal("XFAM", 8, 8, XFAM, 0x67, 0xE3, 3 | 1 << 11, 3 | 1 << 17),
    *illegal("MAX_VCPUS", 16, 2, MAX_VCPUS, 0),
    *illegal("NUM_L2_VMS", 18, 1, L2_VMS, 4, 255),
    Fault("too few pages for nested VMs", param(18, 1, 1), s.TDX_TDCS_NOT_ALLOCATED),
    *reserved(20, 23),
    *illegal("CONFIG_FLAGS", 32, 8, EXEC_CONTROLS, 8, 1 << 63),
    *illegal("EPTP_CONTROLS", 24, 8, EPTP, 0, 0x18, 0x16, 0x2E, 0x5E, 0x9E, 0x11E, 0x101E),
    Fault("52 bits with 4 levels", param(32, 8, 1), s.TDX_OPERAND_INVALID + EPTP),
    *illegal("TSC_FREQUENCY", 40, 2, TSC, 0, 3, 401, 0xFFFF),
    *reserved(42, 79),
    *illegal("byte 19 as", 19, 1, RDX, 2, 0x80),
    *reserved(232, 255),
    BAD_CPUID,
    *reserved(448, 1023),
    *illegal("ARCH_CAPABILITIES", 224, 8, ARCH, 1),
]


def init_with_arch_capabilities(bench: Bench) -> Case:
    case = init(bench)
    param(19, 1, 1)(case)
    return case


LATE = [
    *illegal("configurable ARCH_CAPABILITIES", 224, 8, ARCH, 1, 1 << 63),
    Fault("migratable with nested VMs", migratable_with_nested_vms, BAD_RDX),
]
TABLES = [
    Refusals(abi.TDH_MNG_INIT, init, INIT),
    Refusals(abi.TDH_MNG_INIT, init_with_arch_capabilities, LATE),
]


@each(TABLES)
def test_tdh_mng_init_refuses(bench: Bench, table: Refusals, number: int) -> None:
    check_alone(bench, table, number)


@each(TABLES)
def test_tdh_mng_init_refuses_the_earlier_of_two_faults(
    bench: Bench, table: Refusals, number: int
) -> None:
    check_pairs(bench, table, number)


def test_tdh_mng_init_refused_can_be_repeated(bench: Bench) -> None:
    case = init(bench)
    param(16, 2, 0)(case)
    assert case.call()[0] == s.TDX_OPERAND_INVALID + MAX_VCPUS
    param(16, 2, 1)(case)
    case.succeed()


@pytest.mark.parametrize(
    ("offset", "size", "value"),
    [
        (0, 8, DEBUG | SEPT_VE_DISABLE | PKS | PERFMON),
        (0, 8, MIGRATABLE),
        (8, 8, 3 | 1 << 2),
        (8, 8, AVX512),
        (8, 8, 3 | 3 << 11),
        (8, 8, 3 | 3 << 17),
        (16, 2, 65535),
        (24, 8, 0x26),
        (32, 8, 6),
        (40, 2, 4),
        (40, 2, 400),
        (80, 8, (1 << 64) - 1),
        (176, 8, (1 << 64) - 1),
    ],
)
def test_tdh_mng_init_accepts(bench: Bench, offset: int, size: int, value: int) -> None:
    case = init(bench)
    param(offset, size, value)(case)
    case.succeed()


def test_tdh_mng_init_takes_configurable_arch_capabilities_when_told_to(bench: Bench) -> None:
    case = init_with_arch_capabilities(bench)
    param(224, 8, 0x118_0010)(case)
    case.succeed()


def test_tdh_mng_init_reads_its_parameters_under_the_shared_keyid_it_names(bench: Bench) -> None:
    case = init(bench)
    raw = make_td_params(max_vcpus=9, eptp_controls=0x1E)
    bench.machine.memory.write(PARAMS, raw, keyid=7)
    case.registers["rdx"] |= 7 << 46
    case.succeed()
    assert case.td.read(case.td.tdcs_word(Tdcs.MAX_VCPUS)) == 9


@pytest.mark.parametrize(("flags", "eptp", "gpaw"), [(0, 0x1E, 0), (0, 0x26, 0), (1, 0x26, 1)])
def test_tdh_mng_init_sets_the_td_up(bench: Bench, flags: int, eptp: int, gpaw: int) -> None:
    td = empty_td(bench)
    owner = bytes(range(144))
    raw = bytearray(make_td_params(max_vcpus=4, eptp_controls=eptp, config_flags=flags, xfam=7))
    raw[80:224] = owner
    bench.machine.store(PARAMS, bytes(raw))
    values = bench.must(abi.TDH_MNG_INIT, rcx=td.tdr, rdx=PARAMS)
    assert (values.rcx, values.rdx) == (0, PARAMS)
    fields = {
        Tdcs.XFAM: 7,
        Tdcs.MAX_VCPUS: 4,
        Tdcs.GPAW: gpaw,
        Tdcs.EPTP: eptp | td.cx[3],
        Tdcs.TSC_FREQUENCY: 40,
        Tdcs.NUM_VCPUS: 0,
    }
    assert {word: td.read(td.tdcs_word(word)) for word in fields} == fields
    assert bench.words.read(td.tdcs_word(Tdcs.MRCONFIGID), 18) == owner
    assert (td.op_state, td.epoch, td.inside, td.associated) == (1, 1, (0, 0), 0)
    assert bench.words.read(td.tdcs_word(Tdcs.RTMR), 24) == bytes(192)
    assert bench.pamt(td.tdr).lock == 0


@pytest.mark.parametrize(
    ("width", "eptp", "status"),
    [(48, 0x26, s.TDX_OPERAND_INVALID + EPTP), (48, 0x1E, 0), (49, 0x26, 0)],
)
def test_tdh_mng_init_allows_five_levels_from_49_physical_address_bits_on(
    width: int, eptp: int, status: int
) -> None:
    case = init(Bench(replace(PLATFORM, max_pa_bits=width)))
    param(24, 8, eptp)(case)
    assert case.call()[0] == status


@pytest.mark.parametrize("is_disabled", [False, True])
def test_tdh_mng_init_takes_the_ve_switch_from_the_attributes(
    bench: Bench, is_disabled: bool
) -> None:
    td = bench.td(attributes=SEPT_VE_DISABLE if is_disabled else 0)
    assert td.read(td.tdcs_word(Tdcs.TD_CTLS)) == is_disabled


def test_tdh_mng_init_needs_a_page_more_for_each_nested_vm(bench: Bench) -> None:
    td = empty_td(bench, 8)
    for vms, status in ((3, s.TDX_TDCS_NOT_ALLOCATED), (2, 0)):
        raw = make_td_params(max_vcpus=4, eptp_controls=0x1E, num_l2_vms=vms)
        bench.machine.store(PARAMS, raw)
        assert bench.call(abi.TDH_MNG_INIT, rcx=td.tdr, rdx=PARAMS)[0] == status
