"""What the host lays out in memory for the module to read: TD_PARAMS and TDMR_INFO.

Source: TDX module 1.5.01, tdx_api_defs.h (td_params_t, tdmr_info_entry_t).
"""

from __future__ import annotations

from collections.abc import Sequence

TD_PARAMS_SIZE = 1024
TDMR_INFO_SIZE = 320

#: EPTP_CONTROLS for a write-back S-EPT of 4 or 5 levels.
EPTP_4_LEVELS = 0x1E
EPTP_5_LEVELS = 0x26

#: x87 and SSE state, which every TD has.
XFAM_MINIMUM = 3

#: CONFIG_FLAGS: the guest's addresses have 52 bits instead of 48.
CONFIG_FLAGS_GPAW_52 = 1

TSC_FREQUENCY_1_GHZ = 40


def make_td_params(
    *,
    max_vcpus: int,
    eptp_controls: int,
    attributes: int = 0,
    xfam: int = XFAM_MINIMUM,
    num_l2_vms: int = 0,
    config_flags: int = 0,
    tsc_frequency: int = TSC_FREQUENCY_1_GHZ,
) -> bytes:
    """1024 bytes of TD_PARAMS; all fields not named here are zero.

    eptp_controls: EPTP_4_LEVELS or EPTP_5_LEVELS. config_flags: CONFIG_FLAGS_GPAW_52 or 0.
    tsc_frequency: in units of 25 MHz.
    """
    raw = bytearray(TD_PARAMS_SIZE)
    for offset, size, value in (
        (0, 8, attributes),
        (8, 8, xfam),
        (16, 2, max_vcpus),
        (18, 1, num_l2_vms),
        (24, 8, eptp_controls),
        (32, 8, config_flags),
        (40, 2, tsc_frequency),
    ):
        raw[offset : offset + size] = value.to_bytes(size, "little")
    return bytes(raw)


def make_tdmr_info(
    base: int,
    size: int,
    *,
    pamt_1g: tuple[int, int],
    pamt_2m: tuple[int, int],
    pamt_4k: tuple[int, int],
    reserved: Sequence[tuple[int, int]] = (),
) -> bytes:
    """320 bytes of TDMR_INFO. PAMTs: (HPA, bytes). reserved: (offset from base, bytes)."""
    words = [base, size, *pamt_1g, *pamt_2m, *pamt_4k]
    for area in reserved:
        words += area
    raw = b"".join(word.to_bytes(8, "little") for word in words)
    return raw.ljust(TDMR_INFO_SIZE, b"\0")
