"""The tables that host and module share: registers, leaves, completion status."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tdxlab.abi import leaves, status
from tdxlab.abi.registers import MASK64, NULL_PA, REGISTER_NAMES, Registers
from tdxlab.abi.status import Status
from tdxlab.seam.module import LEAVES
from tdxlab.seam.tdcalls import HANDLERS

words = st.integers(0, MASK64)
codes = st.sampled_from(sorted(status.STATUS_NAMES))

# ---- Registers -----------------------------------------------------------------------------------


def test_registers_start_at_zero() -> None:
    assert Registers().as_dict() == dict.fromkeys(REGISTER_NAMES, 0)
    assert len(REGISTER_NAMES) == 14
    assert "rax" not in REGISTER_NAMES


@given(st.fixed_dictionaries(dict.fromkeys(REGISTER_NAMES, words)))
def test_registers_round_trip_through_a_dict(values: dict[str, int]) -> None:
    assert Registers(**values).as_dict() == values


@pytest.mark.parametrize("name", REGISTER_NAMES)
def test_registers_differ_when_one_register_differs(name: str) -> None:
    registers = Registers(rcx=1, r15=2)
    twin = registers.copy()
    assert registers == twin
    setattr(twin, name, 0xDEAD)
    assert registers != twin
    assert getattr(registers, name) != 0xDEAD


def test_registers_repr_shows_what_is_not_zero_in_hex() -> None:
    assert repr(Registers(r8=NULL_PA, rcx=16)) == "Registers(rcx=0x10, r8=0xffffffffffffffff)"
    assert repr(Registers()) == "Registers()"


def test_registers_refuse_an_unknown_register() -> None:
    with pytest.raises(AttributeError):
        Registers().rax = 1  # type: ignore[attr-defined]
    with pytest.raises(TypeError, match="unhashable"):
        hash(Registers())


# ---- Status --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TDX_SUCCESS", 0),
        ("TDX_OPERAND_INVALID", 0xC000010000000000),
        ("TDX_OPERAND_BUSY", 0x8000020000000000),
        ("TDX_PREVIOUS_TLB_EPOCH_BUSY", 0x8000020100000000),
        ("TDX_PAGE_METADATA_INCORRECT", 0xC000030000000000),
        ("TDX_TD_FATAL", 0xE000060400000000),
        ("TDX_TD_KEYS_NOT_CONFIGURED", 0x8000081000000000),
        ("TDX_EPT_WALK_FAILED", 0xC0000B0000000000),
        ("TDX_GPA_RANGE_ALREADY_BLOCKED", 0x00000B0700000000),
        ("TDX_TLB_TRACKING_NOT_DONE", 0xC0000B0800000000),
        ("TDX_EPT_ENTRY_STATE_INCORRECT", 0xC0000B0D00000000),
        ("UNINITIALIZE_ERROR", 0xFFFFFFFFFFFFFFFF),
    ],
)
def test_status_codes_have_the_modules_values(name: str, value: int) -> None:
    assert getattr(status, name) == value
    assert status.status_name(value) == name


def test_status_codes_are_distinct_and_leave_room_for_details() -> None:
    constants = [n for n in vars(status) if n.startswith(("TDX_", "TD_VMCS", "UNINITIALIZE"))]
    assert len(status.STATUS_NAMES) == len(constants) == 166
    assert sorted(status.STATUS_NAMES.values()) == sorted(constants)
    assert all(code & status.DETAILS_MASK == 0 for code in status.STATUS_NAMES)


def test_status_codes_use_documented_bits_only() -> None:
    known = sum(field.mask for field in Status.fields())
    for code, name in status.STATUS_NAMES.items():
        if name != "UNINITIALIZE_ERROR":
            assert code & ~known == 0, name
            assert Status(code).class_ in status.CLASS_MEANINGS, name


def test_status_class_and_code_alone_identify_a_name() -> None:
    both = Status.class_.mask | Status.code.mask
    assert len({code & both for code in status.STATUS_NAMES}) == len(status.STATUS_NAMES)


@given(codes, st.integers(0, status.DETAILS_MASK))
def test_status_name_ignores_details(code: int, details: int) -> None:
    assert status.status_name(code + details) == status.STATUS_NAMES[code]


@given(codes)
def test_status_name_ignores_a_fatal_or_hint_flag_that_was_added(code: int) -> None:
    assert status.status_name(code | Status.fatal.mask) == status.STATUS_NAMES[code]
    assert status.status_name(code | Status.host_hint.mask) == status.STATUS_NAMES[code]


@given(words)
def test_describe_says_something_of_every_word(word: int) -> None:
    assert status.describe(word).startswith(status.status_name(word))
    assert status.operand_name(word) != ""


@given(words)
def test_status_flags_agree_with_the_fields(word: int) -> None:
    fields = Status(word)
    assert status.is_error(word) == bool(fields.error)
    assert status.is_fatal(word) == bool(fields.fatal)
    assert status.is_recoverable(word) == bool(fields.error and not fields.non_recoverable)


def test_status_flags_of_real_codes() -> None:
    assert not status.is_error(status.TDX_SUCCESS)
    assert not status.is_error(status.TDX_GPA_RANGE_ALREADY_BLOCKED + status.OPERAND_ID_RCX)
    assert not status.is_error(status.TDX_NON_RECOVERABLE_VCPU)
    assert status.is_recoverable(status.TDX_OPERAND_BUSY + status.OPERAND_ID_TDR)
    assert not status.is_recoverable(status.TDX_TLB_TRACKING_NOT_DONE)
    assert not status.is_recoverable(status.TDX_SUCCESS)
    fatal = {name for code, name in status.STATUS_NAMES.items() if status.is_fatal(code)}
    assert fatal == {
        "TDX_TD_FATAL",
        "TDX_NON_RECOVERABLE_TD",
        "TDX_NON_RECOVERABLE_TD_NON_ACCESSIBLE",
        "TDX_NON_RECOVERABLE_TD_WRONG_APIC_MODE",
        "TDX_NON_RECOVERABLE_TD_CORRUPTED_MD",
        "UNINITIALIZE_ERROR",
    }


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        (0x8000020000000080, "TDR"),
        (0x8000020000000092, "SEPT_TREE"),
        (0xC000010000000000, "RAX"),
        (0xC000010000000001, "RCX"),
        (0xC000010000000043, "EPTP_CONTROLS"),
        (0xC0000100000000FF, "operand 255"),
        (0xC0000B0300000000, None),
        (0xC000092000000001, None),
        (0xC000060800000000, None),
        (0x0000000000000001, None),
    ],
)
def test_operand_name(word: int, expected: str | None) -> None:
    assert status.operand_name(word) == expected


def test_operand_ids_are_distinct_and_named() -> None:
    constants = {n: v for n, v in vars(status).items() if n.startswith("OPERAND_ID_")}
    assert len(constants) == len(set(constants.values())) == len(status.OPERAND_NAMES)
    assert all(
        status.OPERAND_NAMES[v] == n.removeprefix("OPERAND_ID_") for n, v in constants.items()
    )


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        (0, "TDX_SUCCESS: done"),
        (48, "TDX_SUCCESS (exit reason 48, EPT violation): the vCPU has left the guest"),
        (77 | 1 << 26, "TDX_SUCCESS (exit reason 77, TDCALL): the vCPU has left the guest"),
        (
            0x8000020000000080,
            "TDX_OPERAND_BUSY (TDR): somebody else holds the lock; try again",
        ),
        (
            0x4000000100000002,
            "TDX_NON_RECOVERABLE_VCPU (exit reason 2, triple fault): "
            "this vCPU can never run again; the TD lives",
        ),
        (
            0xC00009200000003B,
            "TDX_INCONSISTENT_MSR (MSR 0x3b): the MSR changed or differs between processors",
        ),
        (
            0xC0000A1200010203,
            "TDX_PAMT_OVERLAP (TDMR 3, PAMT level 2, overlapped TDMR 1): "
            "the PAMT overlaps another PAMT or usable memory",
        ),
        (
            0x00000B0A00000001,
            "TDX_PAGE_ALREADY_ACCEPTED (level 1): the guest accepted this page before",
        ),
        (
            0xC0000B0F00020001,
            "TDX_L2_SEPT_WALK_FAILED (VM 2, level 1): about the Secure EPT; not modelled",
        ),
        (0xC0000E0100000000, "TDX_INCORRECT_MBMD_MAC: about migration; not modelled"),
        (0x1234567800000000, "unknown status 0x1234567800000000"),
    ],
)
def test_describe(word: int, expected: str) -> None:
    assert status.describe(word) == expected


@given(st.integers(0, 255), st.integers(0, 255), st.integers(0, 255))
def test_with_bytes_packs_what_describe_unpacks(b0: int, b1: int, b2: int) -> None:
    word = status.with_bytes(status.TDX_PAMT_OVERLAP, b0, b1, b2)
    assert f"(TDMR {b0}, PAMT level {b1}, overlapped TDMR {b2})" in status.describe(word)


# ---- Leaves --------------------------------------------------------------------------------------

ALL_LEAVES = [*leaves.HOST_LEAVES.values(), *leaves.GUEST_LEAVES.values()]


@pytest.mark.parametrize("row", ALL_LEAVES, ids=lambda row: row.name)
def test_leaf_constant_has_the_rows_number(row: leaves.Leaf) -> None:
    assert getattr(leaves, row.name.replace(".", "_")) == row.number


@pytest.mark.parametrize(
    ("prefix", "table"), [("TDH_", leaves.HOST_LEAVES), ("TDG_", leaves.GUEST_LEAVES)]
)
def test_leaf_tables_hold_every_constant_once(prefix: str, table: dict[int, leaves.Leaf]) -> None:
    constants = {name: value for name, value in vars(leaves).items() if name.startswith(prefix)}
    assert len(constants) == len(set(constants.values())) == len(table)
    assert len({row.name for row in table.values()}) == len(table)


@pytest.mark.parametrize("row", ALL_LEAVES, ids=lambda row: row.name)
def test_leaf_row_is_told_in_the_interfaces_words(row: leaves.Leaf) -> None:
    assert {*row.inputs, *row.outputs} <= set(REGISTER_NAMES)
    assert row.group in leaves.GROUPS.values()
    assert row.summary
    if not row.modelled:
        assert not row.inputs
        assert not row.outputs


def test_leaf_numbers_of_the_real_module() -> None:
    numbers = {row.name: row.number for row in leaves.HOST_LEAVES.values()}
    assert (numbers["TDH.VP.ENTER"], numbers["TDH.MEM.PAGE.AUG"]) == (0, 6)
    assert (numbers["TDH.MNG.CREATE"], numbers["TDH.MEM.TRACK"]) == (9, 38)
    assert (numbers["TDH.VP.WR"], numbers["TDH.SYS.SHUTDOWN"]) == (43, 52)
    assert leaves.TDG_MEM_PAGE_ACCEPT == 6
    assert 42 not in leaves.HOST_LEAVES


def test_leaf_versions_beyond_zero() -> None:
    def with_versions(table: dict[int, leaves.Leaf]) -> set[int]:
        return {row.number for row in table.values() if row.versions != (0,)}

    assert with_versions(leaves.HOST_LEAVES) == {23, 3, 30, 11, 26}
    assert with_versions(leaves.GUEST_LEAVES) == {7}


def test_leaves_that_are_not_modelled_are_of_migration_and_service_tds() -> None:
    groups = {row.group for row in leaves.HOST_LEAVES.values() if not row.modelled}
    assert groups == {"migration", "service td"}
    assert {row.number for row in leaves.HOST_LEAVES.values() if row.modelled} == set(LEAVES)
    assert {row.number for row in leaves.GUEST_LEAVES.values() if row.modelled} == set(HANDLERS)


def test_rax_holds_leaf_and_version() -> None:
    rax = leaves.Rax(leaves.TDH_MEM_SEPT_ADD).with_(version=1)
    assert rax == 0x10003
    assert (rax.leaf, rax.version, rax.must_be_zero) == (3, 1, 0)
    assert sum(field.mask for field in leaves.Rax.fields()) == MASK64
