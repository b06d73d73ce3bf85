"""TDSYSINFO: the two structures that TDH.SYS.INFO writes, the older way to enumerate the module.

    TDSYSINFO, 1024 bytes: versions, limits, sizes, legal TD parameters, configurable CPUID
    CMR_INFO, 32 entries of base and size, 8 bytes each; unused ones are 0

Every value is that of a metadata field.

Source: TDX module 1.5.01, tdh_sys_info.c.
Differs: an entry of the CPUID configuration lacks the bits that the module merely allows if the
processor has them; which bits those are is not known.
"""

from __future__ import annotations

from tdxlab.seam.cpuid import CPUID_CONFIGURABLE
from tdxlab.seam.fields import Target
from tdxlab.seam.fields_system import MAX_CMRS, SYSTEM_FIELDS

TDSYSINFO_SIZE = 1024
CMR_INFO_ALIGNMENT = 512

_SYS_RD_OFFSET = 18
_CPUID_OFFSET = 132

#: Offset and size in bytes, and the metadata field whose value stands there.
_LAYOUT = (
    (0, 4, "SYS_ATTRIBUTES"),
    (4, 4, "VENDOR_ID"),
    (8, 4, "BUILD_DATE"),
    (12, 2, "BUILD_NUM"),
    (14, 2, "MINOR_VERSION"),
    (16, 2, "MAJOR_VERSION"),
    (32, 2, "MAX_TDMRS"),
    (34, 2, "MAX_RESERVED_PER_TDMR"),
    (36, 2, "PAMT_4K_ENTRY_SIZE"),
    (48, 2, "TDCS_BASE_SIZE"),
    (52, 2, "TDVPS_BASE_SIZE"),
    (64, 8, "ATTRIBUTES_FIXED0"),
    (72, 8, "ATTRIBUTES_FIXED1"),
    (80, 8, "XFAM_FIXED0"),
    (88, 8, "XFAM_FIXED1"),
    (128, 4, "NUM_CPUID_CONFIG"),
)

_FIELD_BY_NAME = {field.name: field for field in SYSTEM_FIELDS}


def _value(target: Target, name: str, number: int = 0) -> int:
    return _FIELD_BY_NAME[name].source.get(target, number)


def make_tdsysinfo(target: Target) -> bytes:
    """The 1024 bytes of TDSYSINFO. target: the module's fields."""
    raw = bytearray(TDSYSINFO_SIZE)
    for offset, size, name in _LAYOUT:
        raw[offset : offset + size] = _value(target, name).to_bytes(size, "little")
    raw[_SYS_RD_OFFSET] = 1
    numbers = [
        number
        for entry in CPUID_CONFIGURABLE
        for number in (entry.leaf, entry.sub_leaf, *entry.masks)
    ]
    config = b"".join(number.to_bytes(4, "little") for number in numbers)
    raw[_CPUID_OFFSET : _CPUID_OFFSET + len(config)] = config
    return bytes(raw)


def make_cmr_info(target: Target) -> bytes:
    """The list of CMRs, 32 entries of 16 bytes. target: the module's fields."""
    return b"".join(
        _value(target, name, number).to_bytes(8, "little")
        for number in range(MAX_CMRS)
        for name in ("CMR_BASE", "CMR_SIZE")
    )
