"""Metadata of a TD: what TDH.MNG.RD and WR, and TDG.VM.RD and WR, see of the TDR and the TDCS.

Rows are in the module's order: class, then code.

Source: TDX module 1.5.01, tdr_tdcs_fields_lookup.c, metadata_td.c; for the guest's CONFIG_FLAGS,
Linux 6.16, arch/x86/coco/tdx/tdx.c.
Differs:
- The clock of a host stands still here and counts at 1 GHz: TSC_OFFSET is 0.
- Migration, service TDs, TD preserving, CPUID_VALID and the VMX MSRs are not modelled: these
  fields read 0. Element sizes of the migration counters are not known; they show in next ids only.
- CPUID_VALUES has the leaves that the host may configure, with the configured bits alone, and none
  of them is ever invalid; all other leaves answer METADATA_FIELD_ID_INCORRECT.
- A guest may read more in the real module than its masks here say; which fields is not known.
"""

from __future__ import annotations

from tdxlab.abi.status import (
    TDX_METADATA_FIELD_VALUE_NOT_VALID,
    TDX_METADATA_WR_MASK_NOT_VALID,
    TDX_SUCCESS,
)
from tdxlab.bits import MASK64
from tdxlab.seam.cpuid import CPUID_CONFIGURABLE
from tdxlab.seam.fields import (
    DEBUG_HOST_AND_GUEST,
    HOST_AND_GUEST,
    NOBODY,
    ONLY_DEBUG_HOST,
    ONLY_HOST,
    Change,
    Field,
    Masks,
    Source,
    Target,
    constant,
    in_tdcs,
    in_tdr,
)
from tdxlab.seam.td import (
    CONFIG_FLEXIBLE_PENDING_VE,
    MAX_TDCX,
    TD_CTLS_PENDING_VE_DISABLE,
    Tdcs,
    Tdr,
)

#: Ticks in a second of the host's clock, and in a unit of TSC_FREQUENCY.
NATIVE_TSC_HZ = 1_000_000_000
_TSC_UNIT_HZ = 25_000_000
_MULTIPLIER_FRACTION_BITS = 48
_MICROSECONDS = 1_000_000

NUM_CPUID_VALUES = 64

#: Microseconds.
MIN_HP_LOCK_TIMEOUT, MAX_HP_LOCK_TIMEOUT = 10_000, 100_000_000
#: The module keeps the time-out as a 32-bit number of ticks.
_TIMEOUT_TICKS = 1 << 32

_WORDS_PER_DIGEST = 6
_RTMRS = 4
_WORDS_PER_PAGE = 512


def _tsc_multiplier(target: Target, _number: int) -> int:
    """Guest ticks for one host tick, with 48 bits behind the binary point."""
    units: int = target.module.memory.words.view[target.tdcs + Tdcs.TSC_FREQUENCY]
    return (units * _TSC_UNIT_HZ << _MULTIPLIER_FRACTION_BITS) // NATIVE_TSC_HZ


def _put_hp_lock_timeout(target: Target, _number: int, microseconds: int) -> None:
    """Keep what the module's 32-bit number of ticks amounts to, in microseconds."""
    ticks = microseconds * NATIVE_TSC_HZ // _MICROSECONDS % _TIMEOUT_TICKS
    kept = ticks * _MICROSECONDS // NATIVE_TSC_HZ
    target.module.memory.words.put(target.tdcs + Tdcs.HP_LOCK_TIMEOUT, kept)


def _admit_hp_lock_timeout(_target: Target, change: Change) -> int:
    if change.mask != MASK64:
        return TDX_METADATA_WR_MASK_NOT_VALID
    if not MIN_HP_LOCK_TIMEOUT <= change.new <= MAX_HP_LOCK_TIMEOUT:
        return TDX_METADATA_FIELD_VALUE_NOT_VALID
    return TDX_SUCCESS


def _admit_td_ctls(target: Target, change: Change) -> int:
    """PENDING_VE_DISABLE stays as it is unless CONFIG_FLAGS.FLEXIBLE_PENDING_VE is set."""
    flags = target.module.memory.words.view[target.tdcs + Tdcs.CONFIG_FLAGS]
    changes = (change.old ^ change.new) & TD_CTLS_PENDING_VE_DISABLE
    if changes and not flags & CONFIG_FLEXIBLE_PENDING_VE:
        return TDX_METADATA_FIELD_VALUE_NOT_VALID
    return TDX_SUCCESS


def _host(field_id: int, name: str, source: Source, fields: int = 1, elements: int = 1) -> Field:
    return Field(field_id, name, source, ONLY_HOST, fields=fields, elements=elements)


def _debug(field_id: int, name: str, source: Source, fields: int = 1) -> Field:
    return Field(field_id, name, source, ONLY_DEBUG_HOST, fields=fields)


def _closed(field_id: int, name: str, fields: int = 1, l2_vm: int = 0) -> Field:
    """A field that nobody can read or write through these functions."""
    return Field(field_id, name, constant(0), NOBODY, fields=fields, l2_vm=l2_vm)


_TDR = (
    _host(0x8010000000000001, "FATAL", in_tdr(Tdr.FATAL)),
    _host(0x8010000200000002, "NUM_TDCX", in_tdr(Tdr.NUM_TDCX)),
    _host(0x8010000300000004, "CHLDCNT", in_tdr(Tdr.CHLDCNT)),
    _host(0x8010000200000005, "LIFECYCLE_STATE", in_tdr(Tdr.LIFECYCLE)),
    _host(0x8010000300000010, "TDCX_PA", in_tdr(Tdr.TDCX_PA), fields=MAX_TDCX),
    _host(0x8010000300000020, "TD_UUID", in_tdr(Tdr.UUID), elements=4),
    _host(0x8110000100000001, "HKID", in_tdr(Tdr.HKID)),
    _host(0x8110000300000002, "PKG_CONFIG_BITMAP", in_tdr(Tdr.PKG_CONFIG_BITMAP)),
    _host(0x8210000100000000, "HANDOFF_VERSION", constant(0)),
    _host(0x8210000300000001, "SEAMDB_INDEX", constant(0)),
    _closed(0x8210000300000002, "SEAMDB_NONCE", fields=4),
)

_MANAGEMENT = (
    _host(0x9010000200000001, "NUM_VCPUS", in_tdcs(Tdcs.NUM_VCPUS)),
    _host(0x9010000200000002, "NUM_ASSOC_VCPUS", in_tdcs(Tdcs.NUM_ASSOC_VCPUS)),
    _host(0x9010000200000004, "OP_STATE", in_tdcs(Tdcs.OP_STATE)),
    _host(0x9010000100000005, "NUM_L2_VMS", in_tdcs(Tdcs.NUM_L2_VMS)),
)

_EXECUTION_CONTROLS = (
    _host(0x1110000300000000, "ATTRIBUTES", in_tdcs(Tdcs.ATTRIBUTES)),
    _host(0x1110000300000001, "XFAM", in_tdcs(Tdcs.XFAM)),
    _host(0x1110000200000002, "MAX_VCPUS", in_tdcs(Tdcs.MAX_VCPUS)),
    _host(0x1110000000000003, "GPAW", in_tdcs(Tdcs.GPAW)),
    _host(0x1110000300000004, "EPTP", in_tdcs(Tdcs.EPTP)),
    _host(0x111000030000000A, "TSC_OFFSET", constant(0)),
    _host(0x111000030000000B, "TSC_MULTIPLIER", Source(_tsc_multiplier)),
    _host(0x111000010000000C, "TSC_FREQUENCY", in_tdcs(Tdcs.TSC_FREQUENCY)),
    _closed(0x111000030000000D, "VIRTUAL_TSC"),
    _host(0x911000010000000E, "NUM_CPUID_VALUES", constant(NUM_CPUID_VALUES)),
    Field(
        0x9110000300000010,
        "NOTIFY_ENABLES",
        in_tdcs(Tdcs.NOTIFY_ENABLES),
        read=Masks(debug_host=MASK64, guest=1),
        write=Masks(debug_host=1, guest=1),
    ),
    Field(
        0x9110000300000011,
        "HP_LOCK_TIMEOUT",
        Source(in_tdcs(Tdcs.HP_LOCK_TIMEOUT).get, _put_hp_lock_timeout),
        read=ONLY_HOST,
        write=ONLY_HOST,
        admit=_admit_hp_lock_timeout,
    ),
    Field(
        0x9110000300000012,
        "VM_CTLS",
        in_tdcs(Tdcs.VM_CTLS),
        read=ONLY_HOST,
        write=Masks(production_host=1, debug_host=1),
        fields=4,
    ),
    Field(
        0x1110000300000016,
        "CONFIG_FLAGS",
        in_tdcs(Tdcs.CONFIG_FLAGS),
        read=HOST_AND_GUEST,
    ),
    Field(
        0x1110000300000017,
        "TD_CTLS",
        in_tdcs(Tdcs.TD_CTLS),
        read=DEBUG_HOST_AND_GUEST,
        write=Masks(guest=TD_CTLS_PENDING_VE_DISABLE),
        admit=_admit_td_ctls,
    ),
    _debug(0x9110000000000080, "CPUID_VALID", constant(0), fields=NUM_CPUID_VALUES),
    _host(0x9210000300000000, "TD_EPOCH", in_tdcs(Tdcs.TD_EPOCH)),
    _host(0x9210000100000001, "REFCOUNT", in_tdcs(Tdcs.REFCOUNT), elements=2),
)

_MEASUREMENT = (
    _host(0x1310000300000000, "MRTD", in_tdcs(Tdcs.MRTD), elements=_WORDS_PER_DIGEST),
    _host(0x1310000300000010, "MRCONFIGID", in_tdcs(Tdcs.MRCONFIGID), elements=_WORDS_PER_DIGEST),
    _host(0x1310000300000018, "MROWNER", in_tdcs(Tdcs.MROWNER), elements=_WORDS_PER_DIGEST),
    _host(
        0x1310000300000020,
        "MROWNERCONFIG",
        in_tdcs(Tdcs.MROWNERCONFIG),
        elements=_WORDS_PER_DIGEST,
    ),
    Field(
        0x1310000300000040,
        "RTMR",
        in_tdcs(Tdcs.RTMR),
        read=DEBUG_HOST_AND_GUEST,
        fields=_RTMRS,
        elements=_WORDS_PER_DIGEST,
    ),
)

#: One row for each leaf, two elements each, by ascending code.
_CPUID = tuple(
    _host(0x9410000300000000 | code, "CPUID_VALUES", in_tdcs(word), elements=2)
    for code, word in sorted(
        (entry.field_code, Tdcs.CPUID_CONFIG + 2 * index)
        for index, entry in enumerate(CPUID_CONFIGURABLE)
    )
)

_MSRS = (
    _debug(0x961000030000010A, "IA32_ARCH_CAPABILITIES", in_tdcs(Tdcs.ARCH_CAPABILITIES)),
    _debug(0x9610000300000480, "IA32_VMX_MSRS", constant(0), fields=18),
)

_MIGRATION = (
    _host(0x9810000000000001, "MIG_DEC_KEY_SET", constant(0)),
    _host(0x9810000000000002, "EXPORT_COUNT", constant(0)),
    _host(0x9810000000000003, "IMPORT_COUNT", constant(0)),
    _host(0x9810000000000004, "MIG_EPOCH", constant(0)),
    _host(0x9810000000000005, "BW_EPOCH", constant(0)),
    _host(0x9810000000000006, "TOTAL_MB_COUNT", constant(0)),
    _closed(0x9810000300000010, "MIG_KEYS", fields=16),
    _host(0x9810000100000020, "MIG_VERSIONS", constant(0), fields=2),
    _host(0x9810000100000030, "MIG_COUNTERS", constant(0), fields=3),
    _host(0x9810000100000034, "MIG_COUNTER_4", constant(0)),
    _host(0x9810000300000040, "PREIMPORT_UUID", constant(0), elements=4),
    _host(0x9910000300000000, "SERVTD_HASH", in_tdcs(Tdcs.SERVTD_HASH), elements=_WORDS_PER_DIGEST),
    _host(0x9910000100000006, "SERVTD_NUM", constant(0)),
    _host(0x9910000300000080, "SERVTD_BINDINGS", constant(0), fields=16),
    _host(0x9A10000300000000, "MIGSC_LINKS", constant(0), fields=_WORDS_PER_PAGE),
)

_PAGES = (
    _closed(0x2010000300000000, "MSR_BITMAPS", fields=_WORDS_PER_PAGE),
    _closed(0x2110000300000000, "SEPT_ROOT", fields=_WORDS_PER_PAGE),
    _closed(0x2510000300000000, "L2_SEPT_ROOT_1", fields=_WORDS_PER_PAGE, l2_vm=1),
    _closed(0x2910000300000000, "L2_SEPT_ROOT_2", fields=_WORDS_PER_PAGE, l2_vm=2),
    _closed(0x2D10000300000000, "L2_SEPT_ROOT_3", fields=_WORDS_PER_PAGE, l2_vm=3),
)

TD_FIELDS: tuple[Field, ...] = (
    *_TDR,
    *_MANAGEMENT,
    *_EXECUTION_CONTROLS,
    *_MEASUREMENT,
    *_CPUID,
    *_MSRS,
    *_MIGRATION,
    *_PAGES,
)
