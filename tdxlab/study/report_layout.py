"""The 1024 bytes of a TD report, field by field, and who decides what stands there.

Source: TDX module 1.5.01, tdx_api_defs.h (td_report_t, td_info_t), tdg_mr_report.c.
"""

from __future__ import annotations

from typing import NamedTuple

_HOST_AT_INIT = "host, TDH.MNG.INIT"
_GUEST_EXTENDS = "guest, RTMR.EXTEND"


class Field(NamedTuple):
    """One field. offset, size: bytes, from the start of the report. decided_by: who fills it."""

    part: str
    name: str
    offset: int
    size: int
    decided_by: str


#: The fields with a meaning; bytes between them are zero.
FIELDS = (
    Field("REPORTMACSTRUCT", "type, sub-type, version", 0, 4, "module"),
    Field("REPORTMACSTRUCT", "CPU SVN", 16, 16, "CPU"),
    Field("REPORTMACSTRUCT", "SHA-384 of TEE_TCB_INFO", 32, 48, "CPU"),
    Field("REPORTMACSTRUCT", "SHA-384 of TDINFO", 80, 48, "module"),
    Field("REPORTMACSTRUCT", "report data", 128, 64, "guest, MR.REPORT"),
    Field("REPORTMACSTRUCT", "MAC", 224, 32, "CPU"),
    Field("TEE_TCB_INFO", "TEE_TCB_INFO", 256, 256, "CPU"),
    Field("TDINFO", "ATTRIBUTES", 512, 8, _HOST_AT_INIT),
    Field("TDINFO", "XFAM", 520, 8, _HOST_AT_INIT),
    Field("TDINFO", "MRTD", 528, 48, "host, ADD and EXTEND"),
    Field("TDINFO", "MRCONFIGID", 576, 48, _HOST_AT_INIT),
    Field("TDINFO", "MROWNER", 624, 48, _HOST_AT_INIT),
    Field("TDINFO", "MROWNERCONFIG", 672, 48, _HOST_AT_INIT),
    *(Field("TDINFO", f"RTMR {n}", 720 + 48 * n, 48, _GUEST_EXTENDS) for n in range(4)),
    Field("TDINFO", "SERVTD_HASH", 912, 48, "service TDs"),
)


class ReportRow(NamedTuple):
    """A field of one report. first_bytes: in hex, at most eight of them."""

    part: str
    field: str
    offset: int
    size: int
    decided_by: str
    first_bytes: str


def field(report: bytes, name: str) -> bytes:
    """The bytes of one field. Refuses an unknown name: ValueError."""
    for one in FIELDS:
        if one.name == name:
            return report[one.offset : one.offset + one.size]
    raise ValueError(f"a report has no {name!r}; its fields: {', '.join(f.name for f in FIELDS)}")


def report_rows(report: bytes) -> list[ReportRow]:
    """Every field of a report."""
    return [
        ReportRow(
            one.part,
            one.name,
            one.offset,
            one.size,
            one.decided_by,
            field(report, one.name)[:8].hex(),
        )
        for one in FIELDS
    ]
