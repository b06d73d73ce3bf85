"""What a notebook's `parameters` cell is made of."""

from __future__ import annotations

import os

from tdxlab.arch import GPAW_CHOICES

#: Environment variable that overrides every notebook's GPAW.
GPAW_VARIABLE = "TDXLAB_GPAW"


def gpaw(default: int) -> int:
    """The guest physical address width to use: TDXLAB_GPAW if it is set, else `default`.

    default: 48 or 52. Refuses, from either source, any other width: ValueError.
    """
    text = os.environ.get(GPAW_VARIABLE, "")
    value = int(text) if text.isdecimal() else text or default
    if value not in GPAW_CHOICES:
        where = f"the environment variable {GPAW_VARIABLE}" if text else "the parameters cell"
        raise ValueError(f"GPAW {value} in {where}; choose 48 or 52")
    return int(value)
