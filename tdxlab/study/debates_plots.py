"""The pictures of the debates; tested by their numbers."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes

from tdxlab.study.debates_protocols import FORGIVE, FREEZE, HOPE, LOCK, ProtocolRow
from tdxlab.study.palette import BLACK, GREEN, ORANGE, SKY, VERMILLION, Look
from tdxlab.study.plots import bars

#: Protocol -> its look.
PROTOCOL_LOOKS = {
    FREEZE: Look(FREEZE, GREEN, BLACK, "F", ""),
    LOCK: Look(LOCK, ORANGE, BLACK, "L", "//"),
    HOPE: Look(HOPE, VERMILLION, BLACK, "O", "xx"),
    FORGIVE: Look(FORGIVE, SKY, BLACK, "R", ".."),
}


def plot_rounds(rows: Sequence[ProtocolRow], ax: Axes) -> Axes:
    """Rounds until all vCPUs are done, for each protocol and number of vCPUs of D15."""
    names = [f"{PROTOCOL_LOOKS[row.protocol].letter} {row.protocol}, {row.vcpus}" for row in rows]
    looks = [PROTOCOL_LOOKS[row.protocol] for row in rows]
    values = [row.rounds for row in rows]
    return bars(ax, names, values, looks, unit="rounds", title="D15: protocol, vCPUs")
