"""TD_PARAMS: the 1024 bytes by which the host describes a TD, and what is legal in them.

Source: TDX module 1.5.01, tdx_api_defs.h (td_params_t), helpers.c (verify_td_attributes,
check_xfam, verify_and_set_td_eptp_controls), td_control_structures.h.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from tdxlab.abi.structs import TD_PARAMS_SIZE
from tdxlab.seam.td import (
    ATTRIBUTES_DEBUG,
    ATTRIBUTES_MIGRATABLE,
    ATTRIBUTES_PERFMON,
    CONFIG_GPAW,
)

#: Attributes that may be 1: DEBUG, SEPT_VE_DISABLE, MIGRATABLE, PKS, PERFMON.
ATTRIBUTES_FIXED0 = 0x8000_0000_7000_0001
ATTRIBUTES_FIXED1 = 0
XFAM_FIXED0 = 0x6DBE7
XFAM_FIXED1 = 3
CONFIG_FLAGS_FIXED0 = 7
CONFIG_FLAGS_FIXED1 = 0
ARCH_CAPABILITIES_CONFIGURABLE = 0x118_0010

#: Microseconds that a guest may wait for a lock that the host wants.
DEFAULT_HP_LOCK_TIMEOUT = 1_000_000

_TSC_LOWEST, _TSC_HIGHEST = 4, 400

_XFAM_AVX = 1 << 2
_XFAM_AVX512 = 7 << 5
#: Groups of state components that come together or not at all.
_XFAM_GROUPS = (_XFAM_AVX512, 3 << 11, 3 << 17)

_EPTP_WRITE_BACK = 6
_EPTP_RESERVED = ~(7 | 7 << 3)
_FOUR_LEVELS, _FIVE_LEVELS = 3, 4
_MIN_PA_BITS_FOR_FIVE_LEVELS = 49


@dataclass(frozen=True)
class TdParams:
    """The fields of TD_PARAMS, and the raw bytes behind them."""

    raw: bytes
    attributes: int
    xfam: int
    max_vcpus: int
    num_l2_vms: int
    msr_config_ctls: int
    eptp_controls: int
    config_flags: int
    tsc_frequency: int
    arch_capabilities: int

    @classmethod
    def parse(cls, raw: bytes) -> Self:
        """Read the fields out of 1024 bytes."""
        assert len(raw) == TD_PARAMS_SIZE

        def field(offset: int, size: int) -> int:
            return int.from_bytes(raw[offset : offset + size], "little")

        return cls(
            raw,
            attributes=field(0, 8),
            xfam=field(8, 8),
            max_vcpus=field(16, 2),
            num_l2_vms=field(18, 1),
            msr_config_ctls=field(19, 1),
            eptp_controls=field(24, 8),
            config_flags=field(32, 8),
            tsc_frequency=field(40, 2),
            arch_capabilities=field(224, 8),
        )

    def nonzero(self, start: int, stop: int) -> bool:
        """True if a byte from `start` up to before `stop` is not zero."""
        return any(self.raw[start:stop])

    def bytes_at(self, offset: int, size: int) -> bytes:
        """`size` raw bytes at `offset`."""
        return self.raw[offset : offset + size]

    @property
    def cpuid_config(self) -> list[tuple[int, int, int, int]]:
        """(EAX, EBX, ECX, EDX) of each of the 12 CPUID configuration entries."""
        words = [int.from_bytes(self.raw[i : i + 4], "little") for i in range(256, 448, 4)]
        return [(words[i], words[i + 1], words[i + 2], words[i + 3]) for i in range(0, 48, 4)]


def are_attributes_legal(attributes: int) -> bool:
    """Only the bits of ATTRIBUTES_FIXED0; a migratable TD is neither a debug TD nor monitors
    performance.
    """
    if attributes & ~ATTRIBUTES_FIXED0:
        return False
    is_migratable = attributes & ATTRIBUTES_MIGRATABLE
    return not (is_migratable and attributes & (ATTRIBUTES_DEBUG | ATTRIBUTES_PERFMON))


def is_xfam_legal(xfam: int, native_xfam: int) -> bool:
    """x87 and SSE always; only supported components; groups whole; AVX-512 needs AVX."""
    if xfam & ~(XFAM_FIXED0 & native_xfam) or xfam & XFAM_FIXED1 != XFAM_FIXED1:
        return False
    if any(xfam & group not in (0, group) for group in _XFAM_GROUPS):
        return False
    return not (xfam & _XFAM_AVX512 and not xfam & _XFAM_AVX)


def are_config_flags_legal(flags: int) -> bool:
    """Only the bits of CONFIG_FLAGS_FIXED0."""
    return not flags & ~CONFIG_FLAGS_FIXED0


def are_eptp_controls_legal(controls: int, config_flags: int, max_pa_bits: int) -> bool:
    """Write-back; 4 or 5 levels and nothing else; 5 levels need 49 address bits, and a 52-bit guest
    needs 5 levels.

    max_pa_bits: physical address width that CPUID reports.
    """
    levels = controls >> 3 & 7
    if controls & 7 != _EPTP_WRITE_BACK or controls & _EPTP_RESERVED:
        return False
    if levels not in (_FOUR_LEVELS, _FIVE_LEVELS):
        return False
    if levels == _FIVE_LEVELS and max_pa_bits < _MIN_PA_BITS_FOR_FIVE_LEVELS:
        return False
    return not (config_flags & CONFIG_GPAW and levels != _FIVE_LEVELS)


def is_tsc_frequency_legal(frequency: int) -> bool:
    """4 to 400 units of 25 MHz."""
    return _TSC_LOWEST <= frequency <= _TSC_HIGHEST
