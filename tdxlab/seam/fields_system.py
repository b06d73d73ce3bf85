"""Metadata of the module and the platform: what TDH.SYS.RD, TDH.SYS.RDALL and TDG.SYS.RD read.

Nothing here is writable. Rows are in the module's order: class, then code.

Source: TDX module 1.5.01, global_sys_fields_lookup.c, metadata_sys.c.
Differs: build date, build number, update and internal version, the hand-off fields and the list of
allowed processors are fixed when a module is built or loaded; they read 0. The element sizes of
NUM_HANDOFF_PAGES, HANDOFF_DATA_* and the two processor lists are inferred from the names of their
neighbours and the number of sequences in a dump; they show in next ids only.
"""

from __future__ import annotations

from tdxlab.arch import PAGE_SIZE
from tdxlab.seam.cpuid import CPUID_CONFIGURABLE
from tdxlab.seam.fields import (
    HOST_AND_GUEST,
    NULL_FIELD_ID,
    ONLY_HOST,
    Field,
    Source,
    Target,
    constant,
    listed,
)
from tdxlab.seam.params import (
    ARCH_CAPABILITIES_CONFIGURABLE,
    ATTRIBUTES_FIXED0,
    ATTRIBUTES_FIXED1,
    CONFIG_FLAGS_FIXED0,
    CONFIG_FLAGS_FIXED1,
    XFAM_FIXED0,
    XFAM_FIXED1,
)
from tdxlab.seam.td import MIN_TDCX, MIN_TDVPS_PAGES, TDVPS_PAGES_PER_L2_VM
from tdxlab.seam.tdmr import MAX_RESERVED_AREAS, MAX_TDMRS, PAMT_ENTRY_SIZE

VENDOR_ID = 0x8086
MINOR_VERSION, MAJOR_VERSION = 5, 1

#: Entries of the list of CMRs; those behind the platform's last CMR are 0.
MAX_CMRS = 32
#: Entries of the two lists of CPUID configuration.
MAX_CPUID_CONFIGS = 32
_MAX_PACKAGES = 8

TDCS_BASE_SIZE = MIN_TDCX * PAGE_SIZE
TDVPS_BASE_SIZE = MIN_TDVPS_PAGES * PAGE_SIZE

#: 0 migration, 1 TD preserving, 2 service TDs, 3 TDG.VP.RD and WR, 4 locks in S-EPT entries,
#: 5 CPUID virtualisation control, 7 nested VMs, 9 TD entry, 10 host-priority locks,
#: 11 ARCH_CAPABILITIES, 16 pending EPT violations, 17 processor lists, 18 NO_RBP_MOD,
#: 19 invalidation for nested VMs.
#: Differs: bit 8, local attestation, is 0: the platform does not offer it.
TDX_FEATURES0 = 0x000F_0EBF

_CPUID_NAMES = [entry.name for entry in CPUID_CONFIGURABLE]
_NO_CPUID_NAMES = [NULL_FIELD_ID] * (MAX_CPUID_CONFIGS - len(_CPUID_NAMES))
_CPUID_VALUES = [pair for entry in CPUID_CONFIGURABLE for pair in entry.pairs]


def _packages(target: Target, _number: int) -> int:
    return target.module.platform.packages


def _package_fms(target: Target, number: int) -> int:
    platform = target.module.platform
    return platform.native_cpuid_1_eax if number < platform.packages else 0


def _cmr_base(target: Target, number: int) -> int:
    cmrs = target.module.platform.cmrs
    return cmrs[number].base if number < len(cmrs) else 0


def _cmr_size(target: Target, number: int) -> int:
    cmrs = target.module.platform.cmrs
    return cmrs[number].size if number < len(cmrs) else 0


def _host(field_id: int, name: str, source: Source, fields: int = 1, elements: int = 1) -> Field:
    return Field(field_id, name, source, ONLY_HOST, fields=fields, elements=elements)


def _all(field_id: int, name: str, source: Source, fields: int = 1) -> Field:
    return Field(field_id, name, source, HOST_AND_GUEST, fields=fields)


_PLATFORM_AND_VERSION = (
    _host(0x0000000200000000, "NUM_PKGS", Source(_packages)),
    _host(0x0000000200000001, "PKG_FMS", Source(_package_fms), fields=_MAX_PACKAGES),
    _all(0x0800000200000000, "VENDOR_ID", constant(VENDOR_ID)),
    _host(0x8800000200000001, "BUILD_DATE", constant(0)),
    _host(0x8800000100000002, "BUILD_NUM", constant(0)),
    _all(0x0800000100000003, "MINOR_VERSION", constant(MINOR_VERSION)),
    _all(0x0800000100000004, "MAJOR_VERSION", constant(MAJOR_VERSION)),
    _host(0x0800000100000005, "UPDATE_VERSION", constant(0)),
    _host(0x0800000100000006, "INTERNAL_VERSION", constant(0)),
    _host(0x8900000100000000, "MODULE_HV", constant(0)),
    _host(0x8900000100000001, "MIN_UPDATE_HV", constant(0)),
    _host(0x8900000000000002, "NO_DOWNGRADE", constant(0)),
    _host(0x8900000100000003, "NUM_HANDOFF_PAGES", constant(0)),
    _host(0x8900000000000004, "HANDOFF_DATA_VALID", constant(0)),
    _host(0x8900000100000005, "HANDOFF_DATA_HV", constant(0)),
    _host(0x8900000200000006, "HANDOFF_DATA_SIZE", constant(0)),
    _all(0x0A00000200000000, "SYS_ATTRIBUTES", constant(0)),
    _all(0x0A00000000000001, "NUM_TDX_FEATURES", constant(1)),
    _all(0x0A00000300000008, "TDX_FEATURES0", constant(TDX_FEATURES0)),
)

_MEMORY = (
    _host(0x9000000100000000, "NUM_CMRS", constant(MAX_CMRS)),
    _host(0x9000000300000080, "CMR_BASE", Source(_cmr_base), fields=MAX_CMRS),
    _host(0x9000000300000100, "CMR_SIZE", Source(_cmr_size), fields=MAX_CMRS),
    _host(0x9100000100000008, "MAX_TDMRS", constant(MAX_TDMRS)),
    _host(0x9100000100000009, "MAX_RESERVED_PER_TDMR", constant(MAX_RESERVED_AREAS)),
    _host(0x9100000100000010, "PAMT_4K_ENTRY_SIZE", constant(PAMT_ENTRY_SIZE)),
    _host(0x9100000100000011, "PAMT_2M_ENTRY_SIZE", constant(PAMT_ENTRY_SIZE)),
    _host(0x9100000100000012, "PAMT_1G_ENTRY_SIZE", constant(PAMT_ENTRY_SIZE)),
    _host(0x9800000100000000, "TDR_BASE_SIZE", constant(PAGE_SIZE)),
    _host(0x9800000100000100, "TDCS_BASE_SIZE", constant(TDCS_BASE_SIZE)),
    _host(0x9800000100000101, "TDCS_SIZE_PER_L2_VM", constant(PAGE_SIZE)),
    _host(0x9800000100000200, "TDVPS_BASE_SIZE", constant(TDVPS_BASE_SIZE)),
    _host(
        0x9800000100000201,
        "TDVPS_SIZE_PER_L2_VM",
        constant(TDVPS_PAGES_PER_L2_VM * PAGE_SIZE),
    ),
)

_CONFIGURABILITY = (
    _host(0x1900000300000000, "ATTRIBUTES_FIXED0", constant(ATTRIBUTES_FIXED0)),
    _host(0x1900000300000001, "ATTRIBUTES_FIXED1", constant(ATTRIBUTES_FIXED1)),
    _host(0x1900000300000002, "XFAM_FIXED0", constant(XFAM_FIXED0)),
    _host(0x1900000300000003, "XFAM_FIXED1", constant(XFAM_FIXED1)),
    _host(0x9900000100000004, "NUM_CPUID_CONFIG", constant(len(CPUID_CONFIGURABLE))),
    _host(0x9900000300000006, "CONFIG_FLAGS_FIXED0", constant(CONFIG_FLAGS_FIXED0)),
    _host(0x9900000300000007, "CONFIG_FLAGS_FIXED1", constant(CONFIG_FLAGS_FIXED1)),
    _host(
        0x9900000300000400,
        "CPUID_CONFIG_LEAVES",
        listed(*_CPUID_NAMES, *_NO_CPUID_NAMES),
        fields=MAX_CPUID_CONFIGS,
    ),
    _host(
        0x9900000300000500,
        "CPUID_CONFIG_VALUES",
        listed(*_CPUID_VALUES),
        fields=MAX_CPUID_CONFIGS,
        elements=2,
    ),
    _host(
        0x9900000300000600,
        "IA32_ARCH_CAPABILITIES_CONFIG_MASK",
        constant(ARCH_CAPABILITIES_CONFIGURABLE),
    ),
    _host(0x9900000100000800, "NUM_FMS_ALLOWED", constant(0)),
    _host(0x9900000100000801, "NUM_FMS_DENIED", constant(0)),
    _host(0x9900000200000810, "FMS_ALLOWED", constant(0), fields=64),
    _host(0x9900000200000850, "FMS_DENIED", constant(0), fields=64),
)

_MIGRATION_AND_NESTED_VMS = (
    _all(0xA000000300000000, "MIGRATION_ATTRIBUTES", constant(0)),
    _all(0x2000000100000001, "MIGRATION_VERSIONS", constant(0), fields=4),
    _host(0xA000000100000010, "MAX_MIGS", constant(512)),
    _host(0xA000000000000020, "NUM_IMMUTABLE_STATE_PAGES", constant(3)),
    _host(0xA000000000000021, "NUM_TD_STATE_PAGES", constant(2)),
    _host(0xA000000000000022, "NUM_VP_STATE_PAGES", constant(5)),
    _host(0xA100000100000000, "MAX_SERV_TDS", constant(1)),
    _host(0xA100000300000001, "SERVTD_ATTR_FIXED0", constant(0x7FF_0000_0001)),
    _host(0xA100000300000002, "SERVTD_ATTR_FIXED1", constant(0)),
    _all(0xA200000100000000, "L2_ATTRIBUTES_MASK", constant(0x807F)),
    _host(0xA200000300000001, "L2_VM_CTLS_FIXED0", constant(1)),
    _host(0xA200000300000002, "L2_VM_CTLS_FIXED1", constant(0)),
    _host(0xA200000300000003, "L2_VCPU_CTLS_FIXED0", constant(3)),
    _host(0xA200000300000004, "L2_VCPU_CTLS_FIXED1", constant(0)),
    _host(0xA200000300000005, "L2_DEBUG_CTLS_FIXED0", constant(7)),
    _host(0xA200000300000006, "L2_DEBUG_CTLS_FIXED1", constant(0)),
)

SYSTEM_FIELDS: tuple[Field, ...] = (
    *_PLATFORM_AND_VERSION,
    *_MEMORY,
    *_CONFIGURABILITY,
    *_MIGRATION_AND_NESTED_VMS,
)
