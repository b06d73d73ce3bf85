"""Metadata: the tables, the codec, and the leaves that read and write fields."""

import struct
from collections.abc import Iterator
from itertools import pairwise

import pytest

from tdxlab.abi import leaves as abi
from tdxlab.abi.outcome import IN_GUEST
from tdxlab.abi.registers import MASK64, Registers
from tdxlab.abi.status import (
    OPERAND_ID_METADATA_FIELD,
    OPERAND_ID_OP_STATE,
    OPERAND_ID_R8,
    OPERAND_ID_R9,
    OPERAND_ID_RAX,
    OPERAND_ID_RCX,
    OPERAND_ID_RDX,
    OPERAND_ID_TDR,
    TDX_METADATA_FIELD_ID_INCORRECT,
    TDX_METADATA_FIELD_NOT_READABLE,
    TDX_METADATA_FIELD_NOT_WRITABLE,
    TDX_METADATA_FIELD_VALUE_NOT_VALID,
    TDX_METADATA_FIRST_FIELD_ID_IN_CONTEXT,
    TDX_METADATA_WR_MASK_NOT_VALID,
    TDX_OP_STATE_INCORRECT,
    TDX_OPERAND_BUSY,
    TDX_OPERAND_INVALID,
    TDX_PAGE_METADATA_INCORRECT,
    TDX_SUCCESS,
    TDX_SYS_LP_INIT_NOT_DONE,
    TDX_TD_VMCS_FIELD_NOT_INITIALIZED,
    TDX_TDCX_NUM_INCORRECT,
    TDX_VCPU_ASSOCIATED,
    TDX_VCPU_STATE_INCORRECT,
)
from tdxlab.abi.structs import EPTP_4_LEVELS, make_td_params
from tdxlab.bare import BareMachine
from tdxlab.host import Host
from tdxlab.seam.cpuid import CPUID_CONFIGURABLE, check_config
from tdxlab.seam.fields import GUEST, NULL_FIELD_ID, Field, FieldId
from tdxlab.seam.fields_system import SYSTEM_FIELDS
from tdxlab.seam.fields_td import TD_FIELDS
from tdxlab.seam.fields_vcpu import TDVPS_FIELDS, VCPU_FIELDS, VMCS_FIELDS
from tdxlab.seam.leaves.metadata import (
    dump_system,
    tdg_sys_rd,
    tdg_vm_rd,
    tdg_vm_wr,
    tdg_vp_rd,
    tdg_vp_wr,
)
from tdxlab.seam.locks import try_exclusive_hp
from tdxlab.seam.rules import OP_UNINITIALIZED, VCPU_ACTIVE, VCPU_DISABLED
from tdxlab.seam.td import Td, Tdcs, Tdr, Tdvps

BUFFER = 0x1004_0000
CMR_BUFFER = 0x1004_1000
PARAMS = 0x1001_0000
HKID = 33
DEBUG = 1

INVALID_RCX = TDX_OPERAND_INVALID + OPERAND_ID_RCX

ATTRIBUTES = 0x1110000300000000
CONFIG_FLAGS = 0x1110000300000016
TD_CTLS = 0x1110000300000017
NOTIFY_ENABLES = 0x9110000300000010
HP_LOCK_TIMEOUT = 0x9110000300000011
VM_CTLS = 0x9110000300000012
MRTD = 0x1310000300000000
RTMR = 0x1310000300000040
MIGSC_LINKS = 0x9A10000300000000
VPID = 0x0024000100000000
POSTED_VECTOR = 0x0024000100000002
POSTED_DESCRIPTOR = 0x0024000300002016
SHARED_EPTP = 0x002400030000203C
PIN_CONTROLS = 0x0024000200004000
VCPU_STATE = 0xA020000000000000
VCPU_INDEX = 0xA020000200000002
ASSOC_LPID = 0xA020000200000004
CPUID_SUPERVISOR_VE = 0xA020000000000007
PEND_NMI = 0x202000000000000B
NUM_PKGS = 0x0000000200000000
CMR_BASE = 0x9000000300000080
CPUID_CONFIG_VALUES = 0x9900000300000500


class Lab:
    """A booted machine with one TD and one vCPU."""

    def __init__(self, attributes: int = 0, config_flags: int = 0, l2_vms: int = 0) -> None:
        self.machine = BareMachine()
        self.host = Host(self.machine)
        self.host.boot()
        self._free = iter(range(self.machine.platform.tdmrs[0].base, 1 << 40, 4096))
        self.tdr = next(self._free)
        must = self.host.must
        must(0, abi.TDH_MNG_CREATE, rcx=self.tdr, rdx=HKID)
        for lp in (0, 2):
            must(lp, abi.TDH_MNG_KEY_CONFIG, rcx=self.tdr)
        for _ in range(6 + l2_vms):
            must(0, abi.TDH_MNG_ADDCX, rcx=next(self._free), rdx=self.tdr)
        self.write(
            PARAMS,
            make_td_params(
                max_vcpus=4,
                eptp_controls=EPTP_4_LEVELS,
                attributes=attributes,
                config_flags=config_flags,
                num_l2_vms=l2_vms,
            ),
        )
        must(0, abi.TDH_MNG_INIT, rcx=self.tdr, rdx=PARAMS)
        self.tdvpr = self.make_vcpu(5 + 3 * l2_vms)
        must(0, abi.TDH_VP_INIT, rcx=self.tdvpr)

    def write(self, hpa: int, data: bytes) -> None:
        self.machine.memory.write(hpa, data)

    def make_vcpu(self, pages: int) -> int:
        """The TDVPR of a vCPU with so many pages more, not initialised."""
        tdvpr = next(self._free)
        self.host.must(0, abi.TDH_VP_CREATE, rcx=tdvpr, rdx=self.tdr)
        for _ in range(pages):
            self.host.must(0, abi.TDH_VP_ADDCX, rcx=next(self._free), rdx=tdvpr)
        return tdvpr

    @property
    def words(self) -> memoryview:
        return self.machine.memory.words.view

    @property
    def td(self) -> Td:
        td = Td(self.machine.memory, self.tdr)
        td.map_tdcs(self.machine.memory)
        return td

    @property
    def page(self) -> int:
        return self.machine.memory.frame(self.tdvpr)

    def seamcall(
        self, leaf: int, *, lp: int = 0, version: int = 0, **registers: int
    ) -> tuple[int, Registers]:
        values = Registers(**registers)
        return self.machine.seamcall(lp, leaf | version << 16, values), values

    def mng_rd(self, field_id: int, version: int = 0) -> tuple[int, Registers]:
        return self.seamcall(abi.TDH_MNG_RD, version=version, rcx=self.tdr, rdx=field_id)

    def mng_wr(self, field_id: int, value: int, mask: int = MASK64) -> tuple[int, int]:
        status, registers = self.seamcall(
            abi.TDH_MNG_WR, rcx=self.tdr, rdx=field_id, r8=value, r9=mask
        )
        return status, registers.r8

    def vp_rd(self, field_id: int, version: int = 0, lp: int = 0) -> tuple[int, Registers]:
        return self.seamcall(abi.TDH_VP_RD, lp=lp, version=version, rcx=self.tdvpr, rdx=field_id)

    def vp_wr(self, field_id: int, value: int, mask: int = MASK64) -> tuple[int, int]:
        status, registers = self.seamcall(
            abi.TDH_VP_WR, rcx=self.tdvpr, rdx=field_id, r8=value, r9=mask
        )
        return status, registers.r8

    def sys_rd(self, field_id: int) -> tuple[int, Registers]:
        return self.seamcall(abi.TDH_SYS_RD, rdx=field_id)


@pytest.fixture(scope="module")
def _shared() -> Lab:
    return Lab()


@pytest.fixture(scope="module")
def _shared_debug() -> Lab:
    return Lab(DEBUG)


@pytest.fixture
def lab(_shared: Lab) -> Iterator[Lab]:
    """A production TD; what a test changes is undone."""
    mark = _shared.machine.mark()
    yield _shared
    _shared.machine.rewind(mark)
    _shared.machine.journal.release(mark)


@pytest.fixture
def debug(_shared_debug: Lab) -> Iterator[Lab]:
    """A debug TD; what a test changes is undone."""
    mark = _shared_debug.machine.mark()
    yield _shared_debug
    _shared_debug.machine.rewind(mark)
    _shared_debug.machine.journal.release(mark)


# ---- Tables --------------------------------------------------------------------------------------

TABLES = (SYSTEM_FIELDS, TD_FIELDS, VMCS_FIELDS, TDVPS_FIELDS)


@pytest.mark.parametrize("table", TABLES)
def test_tables_ascend_and_rows_do_not_overlap(table: tuple[Field, ...]) -> None:
    for row, following in pairwise(table):
        end = row.field_code + row.total * row.stride
        if row.class_code == following.class_code:
            assert end <= following.field_code, (row.name, following.name)
        else:
            assert row.class_code < following.class_code, (row.name, following.name)


@pytest.mark.parametrize(
    ("table", "context"), [(SYSTEM_FIELDS, 0), (TD_FIELDS, 1), (VCPU_FIELDS, 2)]
)
def test_field_ids_are_of_their_context_and_of_one_element(
    table: tuple[Field, ...], context: int
) -> None:
    for row in table:
        field_id = FieldId(row.id)
        assert field_id.context == context, row.name
        assert not field_id.last_element_in_field, row.name
        assert not field_id.last_field_in_sequence, row.name
        reserved = (1 << 62) | (1 << 55) | (7 << 47) | (0xFF << 24) | (1 << 51)
        assert not field_id & reserved, row.name
        assert field_id.inc_size == (row in VMCS_FIELDS), row.name


def test_writable_rows_can_be_stored() -> None:
    for table in TABLES:
        for row in table:
            assert any(row.write) <= (row.source.put is not None), row.name


def test_field_id_describes_itself() -> None:
    assert FieldId(MRTD).describe() == "element_size_code=0x3 context=0x1 class_code=0x13"


def test_production_host_can_write_two_td_fields_only() -> None:
    writable = {row.name for row in TD_FIELDS if row.write.production_host}
    assert writable == {"HP_LOCK_TIMEOUT", "VM_CTLS"}
    for_debug = {row.name for row in TD_FIELDS if row.write.debug_host}
    assert for_debug == writable | {"NOTIFY_ENABLES"}


# ---- TDH.SYS.RD ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field_id", "value"),
    [
        (NUM_PKGS, 2),
        (0x0800000200000000, 0x8086),
        (0x0800000100000003, 5),
        (0x0800000100000004, 1),
        (0x0A00000200000000, 0),
        (0x0A00000000000001, 1),
        (0x0A00000300000008, 0xF0EBF),
        (0x9000000100000000, 32),
        (CMR_BASE, 0x1_0000_0000),
        (CMR_BASE + 1, 0),
        (0x9100000100000008, 64),
        (0x9100000100000009, 16),
        (0x9100000100000010, 16),
        (0x9100000100000012, 16),
        (0x9800000100000000, 4096),
        (0x9800000100000100, 24576),
        (0x9800000100000101, 4096),
        (0x9800000100000200, 24576),
        (0x9800000100000201, 12288),
        (0x1900000300000000, 0x8000_0000_7000_0001),
        (0x1900000300000001, 0),
        (0x1900000300000002, 0x6DBE7),
        (0x1900000300000003, 3),
        (0x9900000100000004, 12),
        (0x9900000300000006, 7),
        (0x9900000300000400, 0xFFFF_FFFF_0000_0001),
        (0x9900000300000401, 4),
        (0x9900000300000402, 0x1_0000_0004),
        (0x9900000300000409, 0xFFFF_FFFF_8000_0008),
        (0x990000030000040B, 0x23),
        (0x990000030000040C, MASK64),
        (0x990000030000041F, MASK64),
        (CPUID_CONFIG_VALUES, 0),
        (CPUID_CONFIG_VALUES + 5, 7 << 32),
        (CPUID_CONFIG_VALUES + 63, 0),
        (0x9900000300000600, 0x1180010),
        (0xA000000100000010, 512),
        (0xA000000000000020, 3),
        (0xA100000300000001, 0x7FF_0000_0001),
        (0xA200000100000000, 0x807F),
        (0xA200000300000005, 7),
    ],
)
def test_sys_rd_returns_the_value_of(lab: Lab, field_id: int, value: int) -> None:
    status, registers = lab.sys_rd(field_id)
    assert (status, registers.r8) == (TDX_SUCCESS, value)


def test_sys_rd_shows_family_model_and_stepping_of_each_package(lab: Lab) -> None:
    fms = lab.machine.platform.native_cpuid_1_eax
    values = [lab.sys_rd(0x0000000200000001 + i)[1].r8 for i in range(8)]
    assert values == [fms, fms] + [0] * 6


def test_sys_rd_ignores_rcx_and_leaves_it_alone(lab: Lab) -> None:
    status, registers = lab.seamcall(abi.TDH_SYS_RD, rcx=MASK64, rdx=NUM_PKGS, r8=9, r9=9)
    assert status == TDX_SUCCESS
    assert registers == Registers(rcx=MASK64, rdx=NUM_PKGS + 1, r8=2, r9=9)


def test_sys_rd_names_the_first_field_if_asked_with_all_ones(lab: Lab) -> None:
    for null in (MASK64, MASK64 & ~FieldId.context.mask):
        status, registers = lab.seamcall(abi.TDH_SYS_RD, rdx=null, r8=9)
        assert status == TDX_METADATA_FIRST_FIELD_ID_IN_CONTEXT
        assert (registers.rdx, registers.r8) == (NUM_PKGS, 0)


@pytest.mark.parametrize("field_id", [0x100100000, 0x9900000100000005, 0x3F00000000000000])
def test_sys_rd_refuses_an_unknown_field(lab: Lab, field_id: int) -> None:
    status, registers = lab.seamcall(abi.TDH_SYS_RD, rdx=field_id, r8=7)
    assert status == TDX_METADATA_FIELD_ID_INCORRECT
    assert (registers.rdx, registers.r8) == (MASK64, 0)


def test_sys_rd_has_no_max_vcpus_per_td(lab: Lab) -> None:
    """Later modules have it at 0x9900000100000008."""
    assert lab.sys_rd(0x9900000100000008)[0] == TDX_METADATA_FIELD_ID_INCORRECT


def test_sys_rd_refuses_an_lp_that_is_not_initialised_before_it_looks_at_the_id() -> None:
    machine = BareMachine()
    for field_id in (2, MASK64, NUM_PKGS):
        registers = Registers(rdx=field_id, r8=5)
        assert machine.seamcall(0, abi.TDH_SYS_RD, registers) == TDX_SYS_LP_INIT_NOT_DONE
        assert (registers.rdx, registers.r8) == (MASK64, 0)


def test_sys_rd_version_1_changes_no_register(lab: Lab) -> None:
    status, registers = lab.seamcall(abi.TDH_SYS_RD, version=1, rdx=NUM_PKGS, r8=5)
    assert status == TDX_OPERAND_INVALID + OPERAND_ID_RAX
    assert registers == Registers(rdx=NUM_PKGS, r8=5)


def test_sys_rd_needs_no_ready_module() -> None:
    machine = BareMachine()
    host = Host(machine)
    host.must(0, abi.TDH_SYS_INIT)
    host.must(0, abi.TDH_SYS_LP_INIT)
    assert host.must(0, abi.TDH_SYS_RD, rdx=NUM_PKGS).r8 == 2


# ---- Next ids ------------------------------------------------------------------------------------


def walk(read, null: int = MASK64) -> list[int]:  # type: ignore[no-untyped-def]
    """Every id from the first to the last, each of which can be read."""
    status, registers = read(null)
    assert status == TDX_METADATA_FIRST_FIELD_ID_IN_CONTEXT
    ids = []
    while registers.rdx != NULL_FIELD_ID:
        ids.append(registers.rdx)
        status, registers = read(registers.rdx)
        assert status == TDX_SUCCESS, hex(ids[-1])
    return ids


def elements(table: tuple[Field, ...], asker: int) -> list[int]:
    """Ids of all elements that the asker may read."""
    return [
        row.id + number * row.stride
        for row in table
        if row.read[asker] and not row.l2_vm
        for number in range(row.total)
    ]


def test_next_ids_visit_every_field_of_the_module_once(lab: Lab) -> None:
    ids = walk(lab.sys_rd)
    assert ids == elements(SYSTEM_FIELDS, 0)
    assert len(set(ids)) == len(ids) == 354


def test_next_ids_visit_every_field_of_a_td_once(lab: Lab, debug: Lab) -> None:
    for asker, place in enumerate((lab, debug)):
        ids = walk(lambda field_id, place=place: place.mng_rd(field_id, version=1))
        assert ids == elements(TD_FIELDS, asker)
        assert len(set(ids)) == len(ids)
        assert ids[0] == 0x8010000000000001
        assert ids[-1] == MIGSC_LINKS + 511


def test_next_ids_visit_every_field_of_a_vcpu_once(lab: Lab, debug: Lab) -> None:
    first = (POSTED_VECTOR, VPID)
    for asker, place in enumerate((lab, debug)):
        ids = walk(lambda field_id, place=place: place.vp_rd(field_id, version=1))
        assert ids == elements(VCPU_FIELDS, asker)
        assert len(set(ids)) == len(ids)
        assert ids[0] == first[asker]


def test_next_id_keeps_what_the_caller_put_into_the_id(lab: Lab) -> None:
    odd = CMR_BASE & ~(1 << 63) & ~FieldId.element_size_code.mask
    assert lab.sys_rd(odd)[1].rdx == odd + 1
    assert lab.sys_rd(odd + 31)[1].rdx == 0x9000000300000100
    system_id_with_context = CMR_BASE | FieldId.context.mask
    assert lab.sys_rd(system_id_with_context)[1].rdx == CMR_BASE + 1


def test_next_id_skips_rows_that_are_closed_to_the_asker(lab: Lab, debug: Lab) -> None:
    before = 0x911000010000000E
    assert lab.mng_rd(before, version=1)[1].rdx == HP_LOCK_TIMEOUT
    assert debug.mng_rd(before, version=1)[1].rdx == NOTIFY_ENABLES


# ---- Field ids -----------------------------------------------------------------------------------

RESERVED = [1 << bit for bit in (24, 31, 34, 37, 38, 46, 47, 49, 55, 62)]


@pytest.mark.parametrize("bit", RESERVED)
def test_single_element_id_refuses_reserved_and_list_bits(lab: Lab, bit: int) -> None:
    assert lab.mng_rd(MRTD | bit)[0] == TDX_METADATA_FIELD_ID_INCORRECT
    assert lab.sys_rd(NUM_PKGS | bit)[0] == TDX_METADATA_FIELD_ID_INCORRECT
    assert lab.vp_rd(VCPU_INDEX | bit)[0] == TDX_METADATA_FIELD_ID_INCORRECT
    assert lab.mng_wr(VM_CTLS | bit, 1)[0] == TDX_METADATA_FIELD_ID_INCORRECT
    assert lab.vp_wr(PEND_NMI | bit, 1)[0] == TDX_METADATA_FIELD_ID_INCORRECT


@pytest.mark.parametrize("bit", [32, 33, 50, 51, 52, 53, 54, 63])
def test_single_element_id_ignores_size_stride_context_and_architecture(lab: Lab, bit: int) -> None:
    status, registers = lab.mng_rd(ATTRIBUTES ^ 1 << bit)
    assert (status, registers.r8) == (TDX_SUCCESS, 0)
    status, registers = lab.sys_rd(NUM_PKGS ^ 1 << bit)
    assert (status, registers.r8) == (TDX_SUCCESS, 2)


def test_vmcs_field_refuses_its_upper_half(debug: Lab) -> None:
    for field_id in (VPID, POSTED_DESCRIPTOR):
        assert debug.vp_rd(field_id)[0] == TDX_SUCCESS
        assert debug.vp_rd(field_id + 1)[0] == TDX_METADATA_FIELD_ID_INCORRECT


def test_id_beyond_a_row_is_unknown(lab: Lab) -> None:
    assert lab.mng_rd(MRTD + 5)[0] == TDX_SUCCESS
    assert lab.mng_rd(MRTD + 6)[0] == TDX_METADATA_FIELD_ID_INCORRECT


# ---- TDH.MNG.RD ----------------------------------------------------------------------------------


def test_mng_rd_returns_the_fields_of_the_td(lab: Lab) -> None:
    root = lab.words[lab.td.page + Tdr.TDCX_PA + 3] & lab.machine.memory.pa_mask
    expected = {
        0x8010000000000001: 0,
        0x8010000200000002: 6,
        0x8010000300000004: 6 + 6,
        0x8010000200000005: 1,
        0x8010000300000010: lab.words[lab.td.page + Tdr.TDCX_PA],
        0x8110000100000001: HKID,
        0x8110000300000002: 3,
        0x9010000200000001: 1,
        0x9010000200000002: 1,
        0x9010000200000004: 1,
        0x1110000300000001: 3,
        0x1110000200000002: 4,
        0x1110000000000003: 0,
        0x1110000300000004: root | EPTP_4_LEVELS,
        0x111000030000000B: 1 << 48,
        0x111000010000000C: 40,
        0x911000010000000E: 64,
        HP_LOCK_TIMEOUT: 1_000_000,
        0x9210000300000000: 1,
        0x9210000100000002: 0,
        MRTD: 0,
    }
    for field_id, value in expected.items():
        status, registers = lab.mng_rd(field_id)
        assert (status, registers.r8) == (TDX_SUCCESS, value), hex(field_id)
        assert registers.rdx == field_id


def test_mng_rd_limits_the_value_to_the_elements_size(debug: Lab) -> None:
    debug.machine.memory.words.put(debug.td.tdcs + Tdcs.MAX_VCPUS, 0x1_2345_6789)
    assert debug.mng_rd(0x1110000200000002)[1].r8 == 0x2345_6789


def test_mng_rd_shows_mrtd_after_finalisation_as_little_endian_words(lab: Lab) -> None:
    lab.host.must(0, abi.TDH_MR_FINALIZE, rcx=lab.tdr)
    words = [lab.mng_rd(MRTD + i)[1].r8 for i in range(6)]
    stored = lab.machine.memory.words.read(lab.td.tdcs + Tdcs.MRTD, 6)
    assert struct.pack("<6Q", *words) == stored
    assert words[0] == 0x3896AC51A760B038  # of a TD to which nothing was added


@pytest.mark.parametrize(
    "field_id", [NOTIFY_ENABLES, TD_CTLS, RTMR, 0x9110000000000080, 0x961000030000010A]
)
def test_mng_rd_opens_some_fields_for_a_debug_td_only(lab: Lab, debug: Lab, field_id: int) -> None:
    status, registers = lab.mng_rd(field_id, version=1)
    assert status == TDX_METADATA_FIELD_NOT_READABLE
    assert (registers.r8, registers.rdx) == (0, MASK64)
    assert debug.mng_rd(field_id)[0] == TDX_SUCCESS


@pytest.mark.parametrize(
    "field_id", [0x111000030000000D, 0x2010000300000000, 0x2110000300000000, 0x9810000300000010]
)
def test_mng_rd_opens_some_fields_for_nobody(lab: Lab, debug: Lab, field_id: int) -> None:
    for place in (lab, debug):
        assert place.mng_rd(field_id)[0] == TDX_METADATA_FIELD_NOT_READABLE


def test_mng_rd_version_0_has_no_null_id_and_keeps_rdx(lab: Lab) -> None:
    status, registers = lab.seamcall(abi.TDH_MNG_RD, rcx=lab.tdr, rdx=MASK64, r8=3)
    assert status == TDX_METADATA_FIELD_ID_INCORRECT
    assert registers == Registers(rcx=lab.tdr, rdx=MASK64)


def test_mng_rd_refuses_an_unknown_version_before_the_tdr(lab: Lab) -> None:
    for version in (2, 3, 255):
        status, registers = lab.seamcall(abi.TDH_MNG_RD, version=version, rcx=1, rdx=7, r8=5)
        assert status == TDX_OPERAND_INVALID + OPERAND_ID_RAX
        assert registers == Registers(rcx=1, rdx=MASK64)


def test_mng_rd_refuses_the_tdr_before_the_state_before_the_id(lab: Lab) -> None:
    status, registers = lab.seamcall(abi.TDH_MNG_RD, rcx=1, rdx=0x100100000, r8=5)
    assert (status, registers.r8, registers.rdx) == (INVALID_RCX, 0, 0x100100000)
    lab.machine.memory.words.put(lab.td.tdcs + Tdcs.OP_STATE, OP_UNINITIALIZED)
    assert lab.mng_rd(0x100100000, version=1)[0] == TDX_OP_STATE_INCORRECT
    status, registers = lab.mng_rd(MASK64, version=1)
    assert (status, registers.rdx) == (TDX_OP_STATE_INCORRECT, MASK64)


def test_mng_rd_refuses_a_held_op_state_lock(lab: Lab) -> None:
    assert try_exclusive_hp(lab.machine.memory.words, lab.td.tdcs + Tdcs.OP_STATE_LOCK)
    assert lab.mng_rd(MRTD)[0] == TDX_OPERAND_BUSY + OPERAND_ID_OP_STATE


def test_mng_rd_releases_its_locks(lab: Lab) -> None:
    pamt = lab.machine.module.pamt
    entries = [pamt.entry(lab.tdr, size) for size in range(3)]
    before = [pamt.words.view[entry] for entry in entries]
    for field_id in (MRTD, 0x100100000):
        lab.mng_rd(field_id)
        assert lab.words[lab.td.tdcs + Tdcs.OP_STATE_LOCK] == 0
        assert [pamt.words.view[entry] for entry in entries] == before


def test_mng_rd_cpuid_values_hold_what_the_host_configured(lab: Lab) -> None:
    words = lab.machine.memory.words
    entry = CPUID_CONFIGURABLE[2]
    words.put(lab.td.tdcs + Tdcs.CPUID_CONFIG + 2 * 2 + 1, 5 << 32)
    field_id = 0x9410000300000000 | entry.field_code
    assert entry.field_code == 0x802
    assert lab.mng_rd(field_id)[1].r8 == 0
    assert lab.mng_rd(field_id + 1)[1].r8 == 5 << 32
    for unknown in (0x9410000300000000, 0x9410000300020802):
        assert lab.mng_rd(unknown)[0] == TDX_METADATA_FIELD_ID_INCORRECT


def test_mng_rd_knows_the_roots_of_nested_vms_that_the_td_has() -> None:
    lab = Lab(l2_vms=1)
    assert lab.mng_rd(0x2510000300000000)[0] == TDX_METADATA_FIELD_NOT_READABLE
    assert lab.mng_rd(0x2910000300000000)[0] == TDX_METADATA_FIELD_ID_INCORRECT
    assert Lab().mng_rd(0x2510000300000000)[0] == TDX_METADATA_FIELD_ID_INCORRECT


# ---- TDH.MNG.WR ----------------------------------------------------------------------------------


def test_mng_wr_stores_the_open_bits_and_returns_the_old_value(lab: Lab) -> None:
    assert lab.mng_wr(VM_CTLS, 1, mask=1) == (TDX_SUCCESS, 0)
    assert lab.mng_wr(VM_CTLS + 3, 1) == (TDX_SUCCESS, 0)
    assert lab.mng_wr(VM_CTLS, 0, mask=1) == (TDX_SUCCESS, 1)
    assert [lab.mng_rd(VM_CTLS + i)[1].r8 for i in range(4)] == [0, 0, 0, 1]


def test_mng_wr_refuses_a_mask_without_an_open_bit(lab: Lab) -> None:
    for field_id, mask in ((VM_CTLS, 2), (VM_CTLS, 0), (HP_LOCK_TIMEOUT, 0), (MRTD, 1)):
        assert lab.mng_wr(field_id, 3, mask) == (TDX_METADATA_FIELD_NOT_WRITABLE, 0)
    assert lab.mng_wr(NOTIFY_ENABLES, 1) == (TDX_METADATA_FIELD_NOT_WRITABLE, 0)
    assert lab.mng_wr(TD_CTLS, 1) == (TDX_METADATA_FIELD_NOT_WRITABLE, 0)


def test_mng_wr_refuses_a_changed_closed_bit(lab: Lab) -> None:
    assert lab.mng_wr(VM_CTLS, 3, mask=3) == (TDX_METADATA_FIELD_VALUE_NOT_VALID, 0)
    assert lab.mng_wr(VM_CTLS, 3, mask=1) == (TDX_SUCCESS, 0)
    assert lab.mng_rd(VM_CTLS)[1].r8 == 1


def test_mng_wr_debug_host_may_enable_notifications(debug: Lab) -> None:
    assert debug.mng_wr(NOTIFY_ENABLES, 1) == (TDX_SUCCESS, 0)
    assert debug.mng_rd(NOTIFY_ENABLES)[1].r8 == 1


@pytest.mark.parametrize(
    ("value", "mask", "status"),
    [
        (10_000, MASK64, TDX_SUCCESS),
        (100_000_000, MASK64, TDX_SUCCESS),
        (9_999, MASK64, TDX_METADATA_FIELD_VALUE_NOT_VALID),
        (100_000_001, MASK64, TDX_METADATA_FIELD_VALUE_NOT_VALID),
        (MASK64, MASK64, TDX_METADATA_FIELD_VALUE_NOT_VALID),
        (20_000, MASK64 >> 1, TDX_METADATA_WR_MASK_NOT_VALID),
        (9_999, 1, TDX_METADATA_WR_MASK_NOT_VALID),
    ],
)
def test_mng_wr_hp_lock_timeout_takes_whole_values_in_range(
    lab: Lab, value: int, mask: int, status: int
) -> None:
    old = 1_000_000 if status == TDX_SUCCESS else 0
    assert lab.mng_wr(HP_LOCK_TIMEOUT, value, mask) == (status, old)


def test_mng_wr_hp_lock_timeout_wraps_at_2_to_the_32_ticks(lab: Lab) -> None:
    lab.mng_wr(HP_LOCK_TIMEOUT, 4_000_000)
    assert lab.mng_rd(HP_LOCK_TIMEOUT)[1].r8 == 4_000_000
    lab.mng_wr(HP_LOCK_TIMEOUT, 5_000_000)
    assert lab.mng_rd(HP_LOCK_TIMEOUT)[1].r8 == (5_000_000_000 - (1 << 32)) // 1000


def test_mng_wr_version_1_changes_no_register(lab: Lab) -> None:
    status, registers = lab.seamcall(abi.TDH_MNG_WR, version=1, rcx=1, rdx=2, r8=3, r9=4)
    assert status == TDX_OPERAND_INVALID + OPERAND_ID_RAX
    assert registers == Registers(rcx=1, rdx=2, r8=3, r9=4)


def test_mng_wr_refuses_the_id_before_the_masks(lab: Lab) -> None:
    assert lab.mng_wr(0x100100000, 1, 0) == (TDX_METADATA_FIELD_ID_INCORRECT, 0)
    assert lab.mng_wr(MASK64, 1) == (TDX_METADATA_FIELD_ID_INCORRECT, 0)
    status, registers = lab.seamcall(abi.TDH_MNG_WR, rcx=1, rdx=0x100100000, r8=1, r9=1)
    assert (status, registers.r8) == (INVALID_RCX, 0)


def test_mng_wr_is_busy_if_another_writer_was_faster(lab: Lab) -> None:
    slow = Registers(rcx=lab.tdr, rdx=VM_CTLS, r8=1, r9=1)
    operation = lab.machine.seamcall_steps(1, abi.TDH_MNG_WR, slow)
    next(operation)
    assert lab.mng_wr(VM_CTLS, 1, 1) == (TDX_SUCCESS, 0)
    with pytest.raises(StopIteration) as end:
        next(operation)
    assert end.value.value == TDX_OPERAND_BUSY + OPERAND_ID_METADATA_FIELD
    assert slow.r8 == 0


# ---- TDH.VP.RD and WR ----------------------------------------------------------------------------


def test_vp_rd_returns_the_fields_of_the_vcpu(debug: Lab) -> None:
    pages = debug.words[debug.page + Tdvps.PAGE_PA : debug.page + Tdvps.PAGE_PA + 6]
    expected = {
        VPID: HKID << 2,
        POSTED_VECTOR: 0xFFFF,
        POSTED_DESCRIPTOR: MASK64,
        0x0024000200004026: HKID,
        0x002400030000201A: debug.mng_rd(0x1110000300000004)[1].r8,
        0x0024000300002032: 1 << 48,
        SHARED_EPTP: pages[4],
        0x9120000300000100: 0,
        VCPU_STATE: 2,
        VCPU_INDEX: 0,
        0xA020000000000003: 6,
        ASSOC_LPID: 0,
        0x202000030000000C: 3,
        0xA020000300000010 + 5: pages[5],
        0xA020000300000010 + 6: 0,
        0x1020000300000003: 48,  # RBX of a vCPU that has not run: the guest's address width
    }
    for field_id, value in expected.items():
        status, registers = debug.vp_rd(field_id)
        assert (status, registers.r8) == (TDX_SUCCESS, value), hex(field_id)


def test_vp_rd_hides_the_state_of_a_production_vcpu(lab: Lab) -> None:
    for field_id in (0, VPID, VCPU_STATE, 0xA020000300000000, 0x1020000300000000):
        status, registers = lab.vp_rd(field_id, version=1)
        assert status == TDX_METADATA_FIELD_NOT_READABLE
        assert (registers.r8, registers.rdx) == (0, MASK64)


def test_vp_rd_masks_what_a_production_host_sees(lab: Lab, debug: Lab) -> None:
    for place, seen in ((lab, 0x1234_5000), (debug, 0x1234_5E1E)):
        place.machine.memory.words.put(place.page + Tdvps.SHARED_EPTP, 0x1234_5E1E)
        assert place.vp_rd(SHARED_EPTP)[1].r8 == seen


def test_vp_rd_has_no_rsp(debug: Lab) -> None:
    assert debug.vp_rd(0x1020000300000004)[0] == TDX_METADATA_FIELD_ID_INCORRECT
    assert debug.vp_rd(0x1020000300000010)[0] == TDX_METADATA_FIELD_ID_INCORRECT


def test_vp_wr_debug_host_changes_general_registers(debug: Lab) -> None:
    rcx = debug.vp_rd(0x1020000300000001)[1].r8
    assert debug.vp_wr(0x1020000300000001, 77) == (TDX_SUCCESS, rcx)
    assert debug.vp_rd(0x1020000300000001)[1].r8 == 77


def test_vp_rd_and_wr_associate_the_vcpu_even_if_they_fail_later(lab: Lab) -> None:
    lab.host.must(0, abi.TDH_VP_FLUSH, rcx=lab.tdvpr)
    assert lab.vp_rd(0x100100000, lp=1)[0] == TDX_METADATA_FIELD_ID_INCORRECT
    assert lab.words[lab.page + Tdvps.ASSOC_LPID] == 1
    assert lab.words[lab.td.tdcs + Tdcs.NUM_ASSOC_VCPUS] == 1
    assert lab.vp_rd(0x100100000)[0] == TDX_VCPU_ASSOCIATED
    assert lab.vp_wr(0x100100000, 0)[0] == TDX_VCPU_ASSOCIATED
    assert lab.vp_rd(ASSOC_LPID, lp=1)[1].r8 == 1


def test_vp_rd_reads_a_disabled_vcpu_and_vp_wr_refuses_it(lab: Lab) -> None:
    lab.machine.memory.words.put(lab.page + Tdvps.STATE, VCPU_DISABLED)
    assert lab.vp_rd(VCPU_INDEX)[0] == TDX_SUCCESS
    assert lab.vp_wr(PEND_NMI, 1) == (TDX_VCPU_STATE_INCORRECT, 0)


def test_vp_rd_refuses_the_state_before_the_association(lab: Lab) -> None:
    lab.machine.memory.words.put(lab.page + Tdvps.STATE, VCPU_ACTIVE)
    assert lab.vp_rd(0x100100000, lp=1)[0] == TDX_VCPU_STATE_INCORRECT
    assert lab.words[lab.page + Tdvps.ASSOC_LPID] == 0


def test_vp_rd_refuses_missing_pages_before_the_state(lab: Lab) -> None:
    tdvpr = lab.make_vcpu(4)
    for leaf in (abi.TDH_VP_RD, abi.TDH_VP_WR):
        assert lab.seamcall(leaf, rcx=tdvpr)[0] == TDX_TDCX_NUM_INCORRECT
    lab.host.must(0, abi.TDH_VP_ADDCX, rcx=lab.tdr + 0x100_0000, rdx=tdvpr)
    assert lab.seamcall(abi.TDH_VP_RD, rcx=tdvpr)[0] == TDX_VCPU_STATE_INCORRECT


def test_vp_rd_refuses_its_locks_in_order(lab: Lab) -> None:
    words, pamt = lab.machine.memory.words, lab.machine.module.pamt
    assert try_exclusive_hp(words, lab.td.tdcs + Tdcs.OP_STATE_LOCK)
    assert lab.vp_rd(VCPU_STATE)[0] == TDX_OPERAND_BUSY + OPERAND_ID_OP_STATE
    assert try_exclusive_hp(pamt.words, pamt.entry(lab.tdr, 0))
    assert lab.vp_rd(VCPU_STATE)[0] == TDX_OPERAND_BUSY + OPERAND_ID_TDR
    assert try_exclusive_hp(pamt.words, pamt.entry(lab.tdvpr, 0))
    assert lab.vp_rd(VCPU_STATE)[0] == TDX_OPERAND_BUSY + OPERAND_ID_RCX


def test_vp_rd_and_wr_refuse_a_tdr_before_the_id(lab: Lab) -> None:
    for leaf in (abi.TDH_VP_RD, abi.TDH_VP_WR):
        status, registers = lab.seamcall(leaf, rcx=lab.tdr, rdx=0x100100000, r8=5)
        assert status == TDX_PAGE_METADATA_INCORRECT + OPERAND_ID_RCX
        assert (registers.r8, registers.rdx) == (0, 0x100100000)


def test_vp_rd_refuses_an_unknown_version_first(lab: Lab) -> None:
    for version in (2, 3, 255):
        status, registers = lab.seamcall(abi.TDH_VP_RD, version=version, rcx=1, rdx=7, r8=5)
        assert status == TDX_OPERAND_INVALID + OPERAND_ID_RAX
        assert registers == Registers(rcx=1, rdx=MASK64)


def test_vp_wr_posted_interrupts_need_vector_then_descriptor(lab: Lab) -> None:
    refused = TDX_TD_VMCS_FIELD_NOT_INITIALIZED
    assert lab.vp_wr(PIN_CONTROLS, 0x80, 0x80) == (refused + 0x0002, 0)
    assert lab.vp_wr(POSTED_VECTOR, 0xF2, 0xFFFF) == (TDX_SUCCESS, 0xFFFF)
    assert lab.vp_wr(PIN_CONTROLS, 0x80, 0x80) == (refused + 0x2016, 0)
    assert lab.vp_wr(POSTED_DESCRIPTOR, BUFFER + 64) == (TDX_SUCCESS, MASK64)
    assert lab.vp_wr(PIN_CONTROLS, 0x80, 0x80) == (TDX_SUCCESS, 0)
    assert lab.vp_wr(PIN_CONTROLS, 0, 0x80) == (TDX_SUCCESS, 0x80)
    assert lab.vp_rd(POSTED_DESCRIPTOR)[1].r8 == BUFFER + 64


def test_vp_wr_refuses_a_vector_above_255(lab: Lab) -> None:
    assert lab.vp_wr(POSTED_VECTOR, 256, 0xFFFF) == (TDX_METADATA_FIELD_VALUE_NOT_VALID, 0)
    assert lab.vp_rd(POSTED_VECTOR)[1].r8 == 0xFFFF


def test_vp_wr_takes_shared_addresses_only(lab: Lab) -> None:
    private = BUFFER | lab.machine.memory.join(0, HKID)
    seamrr = lab.machine.platform.seamrr.base
    for address in (private, seamrr, 1 << 52):
        for field_id in (POSTED_DESCRIPTOR, SHARED_EPTP):
            status, _ = lab.vp_wr(field_id, address)
            assert status == TDX_METADATA_FIELD_VALUE_NOT_VALID, hex(address)
    assert lab.vp_wr(POSTED_DESCRIPTOR, BUFFER + 32)[0] == TDX_METADATA_FIELD_VALUE_NOT_VALID
    assert lab.vp_wr(SHARED_EPTP, BUFFER, (1 << 52) - 4096)[0] == TDX_SUCCESS
    assert lab.vp_rd(SHARED_EPTP)[1].r8 == BUFFER


def test_vp_wr_unset_descriptor_counts_as_zero_under_its_closed_bits(lab: Lab) -> None:
    assert lab.vp_wr(POSTED_DESCRIPTOR, BUFFER, MASK64 & ~63) == (TDX_SUCCESS, MASK64)
    assert lab.vp_rd(POSTED_DESCRIPTOR)[1].r8 == BUFFER
    assert lab.vp_wr(POSTED_DESCRIPTOR, BUFFER + 1)[0] == TDX_METADATA_FIELD_VALUE_NOT_VALID


def test_vp_wr_refuses_closed_fields(lab: Lab) -> None:
    for field_id in (0, VPID, VCPU_INDEX, CPUID_SUPERVISOR_VE, 0x1020000300000000):
        assert lab.vp_wr(field_id, 0, 0) == (TDX_METADATA_FIELD_NOT_WRITABLE, 0)
        assert lab.vp_wr(field_id, 0) == (TDX_METADATA_FIELD_NOT_WRITABLE, 0)


def test_vp_wr_asks_for_an_nmi(lab: Lab) -> None:
    assert lab.vp_wr(PEND_NMI, 1) == (TDX_SUCCESS, 0)
    assert lab.vp_wr(PEND_NMI, 0x100) == (TDX_METADATA_FIELD_VALUE_NOT_VALID, 0)
    assert lab.words[lab.page + Tdvps.PEND_NMI] == 1


# ---- TDH.SYS.RDALL -------------------------------------------------------------------------------


def parse(raw: bytes) -> tuple[dict[int, int], list[FieldId]]:
    """Value by element id, and the sequence headers, of a list."""
    words = struct.unpack(f"<{len(raw) // 8}Q", raw)
    size, count = words[0] & 0xFFFF, words[0] >> 16
    assert size == len(raw)
    values, headers, place = {}, [], 1
    for _ in range(count):
        header = FieldId(words[place])
        headers.append(header)
        total = (header.last_element_in_field + 1) * (header.last_field_in_sequence + 1)
        first = header.with_(last_element_in_field=0, last_field_in_sequence=0)
        values |= {first + i: words[place + 1 + i] for i in range(total)}
        place += 1 + total
    assert place == len(words)
    return values, headers


def test_sys_rdall_writes_36_sequences_in_3128_bytes(lab: Lab) -> None:
    lab.write(BUFFER, b"\xaa" * 4096)
    status, registers = lab.seamcall(abi.TDH_SYS_RDALL, rcx=5, rdx=BUFFER, r8=MASK64)
    assert status == TDX_SUCCESS
    assert registers == Registers(rcx=5, rdx=BUFFER, r8=MASK64)
    raw = lab.machine.memory.read(BUFFER, 4096)
    assert struct.unpack_from("<3Q", raw) == (0x240C38, 0x0000020200000000, 2)
    assert raw[3128:] == b"\xaa" * (4096 - 3128)
    values, headers = parse(raw[:3128])
    assert len(headers) == 36
    for field_id in walk(lab.sys_rd):
        same = [value for key, value in values.items() if (key ^ field_id) << 1 & MASK64 == 0]
        assert same == [lab.sys_rd(field_id)[1].r8], hex(field_id)


def test_sys_rdall_can_begin_inside_a_row(lab: Lab) -> None:
    status, registers = lab.seamcall(abi.TDH_SYS_RDALL, rdx=BUFFER, r8=CMR_BASE + 30)
    assert (status, registers.r8) == (TDX_SUCCESS, MASK64)
    size, first = struct.unpack("<2Q", lab.machine.memory.read(BUFFER, 16))
    assert FieldId(first).with_(last_field_in_sequence=0) == CMR_BASE + 30
    assert FieldId(first).last_field_in_sequence == 1
    assert size & 0xFFFF == len(dump_system(lab.machine.module, 0, CMR_BASE + 30))


@pytest.mark.parametrize(
    "start",
    [
        0,  # NUM_PKGS with a wrong element size
        0x100100000,
        CPUID_CONFIG_VALUES + 1,  # the second element of its field
        CMR_BASE & ~(1 << 32),
    ],
)
def test_sys_rdall_refuses_a_start_that_is_no_field(lab: Lab, start: int) -> None:
    lab.write(BUFFER, b"\xaa" * 4096)
    status, registers = lab.seamcall(abi.TDH_SYS_RDALL, rdx=BUFFER, r8=start)
    assert (status, registers.r8) == (TDX_METADATA_FIELD_ID_INCORRECT, MASK64)
    assert lab.machine.memory.read(BUFFER, 4096) == b"\xaa" * 4096


def test_sys_rdall_begins_with_the_first_element_of_any_field(lab: Lab) -> None:
    assert lab.seamcall(abi.TDH_SYS_RDALL, rdx=BUFFER, r8=CPUID_CONFIG_VALUES + 2)[0] == TDX_SUCCESS


def test_sys_rdall_refuses_the_lp_then_the_page_then_the_start(lab: Lab) -> None:
    registers = Registers(rdx=1, r8=0)
    machine = BareMachine()
    assert machine.seamcall(0, abi.TDH_SYS_RDALL, registers) == TDX_SYS_LP_INIT_NOT_DONE
    assert registers == Registers(rdx=1, r8=MASK64)
    private = BUFFER | lab.machine.memory.join(0, HKID)
    for page in (BUFFER + 8, private, 1 << 52, lab.machine.platform.seamrr.base):
        status, registers = lab.seamcall(abi.TDH_SYS_RDALL, rdx=page, r8=0)
        assert status == TDX_OPERAND_INVALID + OPERAND_ID_RDX
        assert registers == Registers(rdx=page, r8=MASK64)


def test_dump_for_the_guest_has_only_what_the_guest_may_read(lab: Lab) -> None:
    values, _ = parse(dump_system(lab.machine.module, GUEST, MASK64))
    assert set(values) == set(elements(SYSTEM_FIELDS, GUEST))
    assert 0x0800000200000000 in values
    assert NUM_PKGS not in values


# ---- TDH.SYS.INFO --------------------------------------------------------------------------------


def test_sys_info_writes_both_structures(lab: Lab) -> None:
    lab.write(BUFFER, b"\xaa" * 4096)
    status, registers = lab.seamcall(
        abi.TDH_SYS_INFO, rcx=BUFFER, rdx=2048, r8=CMR_BUFFER, r9=99, r10=7
    )
    assert status == TDX_SUCCESS
    assert registers == Registers(rcx=BUFFER, rdx=1024, r8=CMR_BUFFER, r9=32, r10=7)
    raw = lab.machine.memory.read(BUFFER, 4096)
    assert raw[1024:] == b"\xaa" * 3072
    assert struct.unpack_from("<III3H?", raw) == (0, 0x8086, 0, 0, 5, 1, True)
    assert struct.unpack_from("<3H", raw, 32) == (64, 16, 16)
    assert struct.unpack_from("<HHHB", raw, 48) == (24576, 0, 24576, 0)
    fixed = (0x8000_0000_7000_0001, 0, 0x6DBE7, 3)
    assert struct.unpack_from("<4Q", raw, 64) == fixed
    assert struct.unpack_from("<7I", raw, 128) == (12, 1, 0xFFFF_FFFF, 0, 0, 0, 0)
    assert struct.unpack_from("<6I", raw, 132 + 2 * 24) == (4, 1, 0, 0, 0, 7)
    assert struct.unpack_from("<2I", raw, 132 + 11 * 24) == (0x23, 0)
    assert not any(raw[132 + 12 * 24 : 1024])
    (cmr,) = lab.machine.platform.cmrs
    cmrs = lab.machine.memory.read(CMR_BUFFER, 512)
    assert struct.unpack_from("<2Q", cmrs) == (cmr.base, cmr.size)
    assert not any(cmrs[16:])


@pytest.mark.parametrize(
    ("operands", "operand", "zeroed"),
    [
        ({"rcx": BUFFER + 512, "rdx": 0, "r8": 1}, OPERAND_ID_RCX, False),
        ({"rcx": BUFFER, "rdx": 1023, "r8": 1}, OPERAND_ID_RDX, False),
        ({"rcx": BUFFER, "rdx": 1024, "r8": CMR_BUFFER + 256}, OPERAND_ID_R8, True),
        ({"rcx": BUFFER, "rdx": 1024, "r8": CMR_BUFFER, "r9": 31}, OPERAND_ID_R9, True),
    ],
)
def test_sys_info_refuses_its_operands_in_order(
    lab: Lab, operands: dict[str, int], operand: int, zeroed: bool
) -> None:
    lab.write(BUFFER, b"\xaa" * 1024)
    status, registers = lab.seamcall(abi.TDH_SYS_INFO, **operands)
    assert status == TDX_OPERAND_INVALID + operand
    assert (registers.rcx, registers.r8) == (operands["rcx"], operands["r8"])
    assert (registers.rdx, registers.r9) == (0, 0)
    expected = bytes(1024) if zeroed else b"\xaa" * 1024
    assert lab.machine.memory.read(BUFFER, 1024) == expected


def test_sys_info_refuses_the_lp_first() -> None:
    registers = Registers(rcx=1, rdx=2, r8=0x20, r9=3)
    assert BareMachine().seamcall(0, abi.TDH_SYS_INFO, registers) == TDX_SYS_LP_INIT_NOT_DONE
    assert registers == Registers(rcx=1, r8=0x20)


# ---- The guest -----------------------------------------------------------------------------------


def guest_call(function, lab: Lab, version: int = 0, **registers: int):  # type: ignore[no-untyped-def]
    """(RAX, registers) of a guest function."""
    values = Registers(**registers)
    return function(lab.machine.module, lab.td, lab.page, values, version), values


def test_tdg_vm_rd_uses_the_guests_masks(lab: Lab) -> None:
    assert guest_call(tdg_vm_rd, lab, rdx=TD_CTLS)[0] == TDX_SUCCESS
    assert guest_call(tdg_vm_rd, lab, rdx=RTMR + 23)[0] == TDX_SUCCESS
    status, registers = guest_call(tdg_vm_rd, lab, rdx=HP_LOCK_TIMEOUT, r8=5)
    assert status == TDX_METADATA_FIELD_NOT_READABLE
    assert registers == Registers(rdx=HP_LOCK_TIMEOUT)


def test_tdg_vm_rd_version_1_walks_from_field_to_field(lab: Lab) -> None:
    ids = walk(lambda field_id: guest_call(tdg_vm_rd, lab, version=1, rdx=field_id))
    assert ids == elements(TD_FIELDS, GUEST)


def test_tdg_vm_rd_refuses_the_version_then_rcx_then_the_id(lab: Lab) -> None:
    status, registers = guest_call(tdg_vm_rd, lab, version=2, rcx=1, rdx=0, r8=5)
    assert status == TDX_OPERAND_INVALID + OPERAND_ID_RAX
    assert registers == Registers(rcx=1, rdx=MASK64)
    status, registers = guest_call(tdg_vm_rd, lab, rcx=1, rdx=0x100100000, r8=5)
    assert status == INVALID_RCX
    assert registers == Registers(rcx=1, rdx=0x100100000)
    assert guest_call(tdg_vm_rd, lab, rdx=MASK64)[0] == TDX_METADATA_FIELD_ID_INCORRECT


def test_tdg_vm_wr_changes_pending_ve_disable_only_if_it_is_flexible(lab: Lab) -> None:
    write = {"rdx": TD_CTLS, "r8": 1, "r9": 1}
    assert guest_call(tdg_vm_wr, lab, **write)[0] == TDX_METADATA_FIELD_VALUE_NOT_VALID
    unchanged = {"rdx": TD_CTLS, "r8": 0, "r9": 1}
    assert guest_call(tdg_vm_wr, lab, **unchanged)[0] == TDX_SUCCESS
    flexible = Lab(config_flags=2)
    status, registers = guest_call(tdg_vm_wr, flexible, **write)
    assert (status, registers.r8) == (TDX_SUCCESS, 0)
    assert flexible.words[flexible.td.tdcs + Tdcs.TD_CTLS] == 1
    status, registers = guest_call(tdg_vm_wr, flexible, **unchanged)
    assert (status, registers.r8) == (TDX_SUCCESS, 1)
    assert guest_call(tdg_vm_rd, flexible, rdx=CONFIG_FLAGS)[1].r8 == 2


def test_tdg_vm_wr_refuses_rcx_then_the_id_then_the_mask(lab: Lab) -> None:
    assert guest_call(tdg_vm_wr, lab, rcx=1, rdx=0x100100000, r8=5)[0] == INVALID_RCX
    status, registers = guest_call(tdg_vm_wr, lab, rdx=0x100100000, r8=5, r9=1)
    assert (status, registers.r8) == (TDX_METADATA_FIELD_ID_INCORRECT, 0)
    status, registers = guest_call(tdg_vm_wr, lab, rdx=HP_LOCK_TIMEOUT, r8=5, r9=MASK64)
    assert (status, registers.r8) == (TDX_METADATA_FIELD_NOT_WRITABLE, 0)


def test_tdg_vm_wr_turns_on_notifications(lab: Lab) -> None:
    assert guest_call(tdg_vm_wr, lab, rdx=NOTIFY_ENABLES, r8=1, r9=1)[0] == TDX_SUCCESS
    assert lab.words[lab.td.tdcs + Tdcs.NOTIFY_ENABLES] == 1


def test_tdg_vp_rd_and_wr_see_the_vcpu_that_asks(lab: Lab) -> None:
    status, registers = guest_call(tdg_vp_rd, lab, rdx=VCPU_INDEX)
    assert (status, registers.r8, registers.rdx) == (TDX_SUCCESS, 0, CPUID_SUPERVISOR_VE)
    status, registers = guest_call(tdg_vp_wr, lab, rdx=CPUID_SUPERVISOR_VE, r8=1, r9=MASK64)
    assert (status, registers.r8) == (TDX_SUCCESS, 0)
    assert guest_call(tdg_vp_rd, lab, rdx=CPUID_SUPERVISOR_VE)[1].r8 == 1
    ids = walk(lambda field_id: guest_call(tdg_vp_rd, lab, rdx=field_id))
    assert ids == elements(VCPU_FIELDS, GUEST)


def test_tdg_vp_rd_and_wr_refuse_rcx_then_the_id(lab: Lab) -> None:
    status, registers = guest_call(tdg_vp_rd, lab, rcx=1, rdx=0x100100000, r8=5)
    assert status == INVALID_RCX
    assert registers == Registers(rcx=1, rdx=MASK64)
    status, registers = guest_call(tdg_vp_wr, lab, rcx=1, rdx=0x100100000, r8=5)
    assert status == INVALID_RCX
    assert registers == Registers(rcx=1, rdx=0x100100000)
    for function in (tdg_vp_rd, tdg_vp_wr):
        status, _ = guest_call(function, lab, rdx=0x100100000, r9=1)
        assert status == TDX_METADATA_FIELD_ID_INCORRECT


def test_tdg_sys_rd_shows_what_the_guest_may_know_of_the_module(lab: Lab) -> None:
    ids = walk(lambda field_id: guest_call(tdg_sys_rd, lab, rdx=field_id))
    assert ids == elements(SYSTEM_FIELDS, GUEST)
    status, registers = guest_call(tdg_sys_rd, lab, rcx=9, rdx=NUM_PKGS, r8=5)
    assert status == TDX_METADATA_FIELD_NOT_READABLE
    assert registers == Registers(rcx=9, rdx=MASK64)


def test_tdcall_reaches_the_metadata_of_the_td_inside(lab: Lab) -> None:
    lab.host.must(0, abi.TDH_MR_FINALIZE, rcx=lab.tdr)
    assert lab.seamcall(abi.TDH_VP_ENTER, rcx=lab.tdvpr)[0] == IN_GUEST
    outcome = lab.machine.tdcall(0, abi.TDG_VM_RD | 1 << 16, Registers(rdx=MASK64))
    assert not outcome.exited
    assert outcome.status == TDX_METADATA_FIRST_FIELD_ID_IN_CONTEXT
    assert outcome.registers.rdx == NOTIFY_ENABLES
    outcome = lab.machine.tdcall(0, abi.TDG_VP_RD, Registers(rdx=VCPU_INDEX, r8=9))
    assert (outcome.status, outcome.registers.r8) == (TDX_SUCCESS, 0)
    assert lab.vp_rd(VCPU_INDEX, lp=1)[0] == TDX_VCPU_STATE_INCORRECT
    status, registers = lab.seamcall(abi.TDH_MNG_RD, lp=1, rcx=lab.tdr, rdx=ATTRIBUTES)
    assert (status, registers.r8) == (TDX_SUCCESS, 0)


# ---- CPUID configuration -------------------------------------------------------------------------


def test_check_config_names_the_first_illegal_entry() -> None:
    legal = [(0, 0, 0, 0)] * 12
    assert check_config(legal) is None
    assert check_config([(1, 0, 0, 0), *legal[1:]]) == 0xFFFF_FFFF_0000_0001
    leaf_4_1 = [*legal[:2], (0, 0, 0, 1), *legal[3:]]
    assert check_config(leaf_4_1) is None
    assert check_config([*legal[:2], (0, 0, 0, 8), (1, 1, 1, 1), *legal[4:]]) == 0x1_0000_0004
    assert check_config([*legal[:11], (0, 0, 1, 0)]) == 0x23
