"""State of the module as a whole: where its own life cycle stands, which LPs and packages are
ready, the TDMRs.

Source: TDX module 1.5.01, tdx_global_data.h.
"""

from __future__ import annotations

from typing import NamedTuple

from tdxlab.hardware import Region


class Sys:
    """Words of the module's global data."""

    STATE = 0
    LOCK = 1
    INIT_LPS = 2
    KEYED_PACKAGES = 3  # bitmap
    TDMR_MUTEXES = 4  # bitmap, in the order of the TDMRs
    LPS = 8  # two words for each LP, from here on

    LP_INITIALISED, LP_LAST_VCPU, WORDS_PER_LP = 0, 1, 2

    @staticmethod
    def lp_word(lp: int, word: int) -> int:
        """Index of LP_INITIALISED or LP_LAST_VCPU of an LP."""
        return Sys.LPS + lp * Sys.WORDS_PER_LP + word


class Tdmr(NamedTuple):
    """A configured TDMR: base, size, reserved areas as HPA ranges, and up to which HPA it is
    initialised.
    """

    base: int
    size: int
    reserved: tuple[Region, ...]
    initialised_to: int

    @property
    def end(self) -> int:
        """First HPA behind the TDMR."""
        return self.base + self.size
