"""Measurement: MRTD, the hash of what the host built, and the RTMRs, which the guest extends.

    MRTD = SHA384( for each TDH.MEM.PAGE.ADD   name16 | gpa as 8 bytes | 104 zeros
                   for each TDH.MR.EXTEND      name16 | gpa as 8 bytes | 104 zeros | the 256 bytes )
    RTMR = SHA384( RTMR | 48 bytes )

Neither the order of S-EPT pages nor the TD's attributes enter MRTD: those are fields of the report.

Source: TDX module 1.5.01, tdh_mem_page_add.c, tdh_mr_extend.c, tdh_mr_finalize.c,
tdg_mr_rtmr_extend.c.
"""

from __future__ import annotations

import hashlib

from tdxlab.journal import Table

CHUNK_SIZE = 256
RTMR_COUNT = 4
DIGEST_SIZE = 48
_BLOCK_SIZE = 128

PAGE_ADD_NAME = b"MEM.PAGE.ADD"
EXTEND_NAME = b"MR.EXTEND"


def measured_block(name: bytes, gpa: int) -> bytes:
    """The 128 bytes that name an update: the call, then the GPA."""
    return (name.ljust(16, b"\0") + gpa.to_bytes(8, "little")).ljust(_BLOCK_SIZE, b"\0")


def start(contexts: Table, tdcs_hpa: int) -> None:
    """Begin the MRTD of the TD whose first TDCS page is at `tdcs_hpa`."""
    contexts.put(tdcs_hpa, hashlib.sha384())


def update(contexts: Table, tdcs_hpa: int, data: bytes) -> None:
    """Feed whole blocks to the MRTD. The context before stays as it was, so that a rewind finds
    it.
    """
    context = contexts[tdcs_hpa].copy()
    context.update(data)
    contexts.put(tdcs_hpa, context)


def finish(contexts: Table, tdcs_hpa: int) -> bytes:
    """The 48 bytes of MRTD over everything fed so far."""
    digest: bytes = contexts[tdcs_hpa].digest()
    return digest


def extend_rtmr(rtmr: bytes, value: bytes) -> bytes:
    """The RTMR after an extension by `value` (48 bytes each)."""
    return hashlib.sha384(rtmr + value).digest()
