"""Pictures of TLB tracking: who is inside since when, what the module counts, epochs over time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from tdxlab.study import plots, svg
from tdxlab.study.epoch_lab import EpochLab, EpochRow, VcpuRow
from tdxlab.study.epoch_tables import BatchRow
from tdxlab.study.palette import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SEPT_LOOKS,
    SKY,
    VERMILLION,
    WHITE,
    Look,
)

#: Where a vCPU is.
INSIDE = Look("inside", GREEN, BLACK, "I", "")
OLD = Look("inside since an older epoch", VERMILLION, BLACK, "!", "xx")
OUTSIDE = Look("outside", WHITE, BLACK, "o", "")
#: What its TLB holds of the page.
CACHED = Look("page in the TLB", ORANGE, BLACK, "T", "//")
EMPTY = Look("page not in the TLB", WHITE, BLACK, "-", "")

#: A vCPU's colour over time.
VCPU_COLOURS = (BLUE, ORANGE, PURPLE, GREEN)
_IPIS = Look("IPIs", VERMILLION, BLACK, "I", "xx")
_TRACKS = Look("TRACKs", BLUE, WHITE, "T", "")
_CALLS = Look("SEAMCALLs", GREY, BLACK, "S", "--")

_WIDTH, _ROW = 400, 30
#: A vCPU's number stands so far above its epoch, times its number + 1.
_ABOVE = 0.12


class EpochPoint(NamedTuple):
    """After one action of the tape. entered: of each vCPU the epoch that it entered in, 0 while it
    is outside.
    """

    action: int
    td_epoch: int
    entered: tuple[int, ...]


def epoch_points(lab: EpochLab) -> list[EpochPoint]:
    """From the beginning of the lab's tape to where it stands."""

    def look() -> tuple[int, tuple[int, ...]]:
        vcpus = tuple(row.epoch if row.inside else 0 for row in lab.vcpu_rows())
        return lab.row().td_epoch, vcpus

    return [EpochPoint(number, *seen) for number, seen in enumerate(lab.over_time(look))]


def why(row: EpochRow) -> str:
    """What the module's test of tracking says of the page, and why."""
    behind = row.td_epoch - row.bepoch
    left = (row.even, row.odd)[row.bepoch & 1]
    if "BLOCKED" not in row.page:
        return "the page is not blocked"
    if not behind:
        return f"not tracked: blocked in the present epoch, {row.bepoch}"
    if behind == 1 and left:
        verb = "is" if left == 1 else "are"
        return f"not tracked: {left} of epoch {row.bepoch} {verb} still inside"
    return f"tracked: nobody inside has entered before epoch {row.td_epoch}"


# -- maps


def _place(row: VcpuRow, td_epoch: int) -> Look:
    if not row.inside:
        return OUTSIDE
    return INSIDE if row.epoch == td_epoch else OLD


def lps_svg(rows: Sequence[VcpuRow], td_epoch: int) -> str:
    """A line for each LP: its vCPU, where that is, since which epoch, and its TLB."""
    body, words = [svg.text(4, 14, f"the TD is in epoch {td_epoch}", size=12)], []
    for number, row in enumerate(rows):
        y = 24 + number * _ROW
        where, tlb = _place(row, td_epoch), CACHED if row.cached else EMPTY
        since = f"epoch {row.epoch}" if row.epoch else "never entered"
        hint = f"vCPU {row.vcpu}: {where.name}, {since}, {tlb.name}"
        body += [
            svg.text(4, y + 16, f"LP {row.vcpu}"),
            svg.tile(46, y, where, size=22, hint=hint),
            svg.text(76, y + 16, f"vCPU {row.vcpu} {where.name.split()[0]}, {since}"),
            svg.tile(250, y, tlb, size=22, hint=hint),
            svg.text(280, y + 16, tlb.name),
        ]
        words.append(hint)
    height = 24 + len(rows) * _ROW + 20
    body.append(
        svg.text(4, height - 6, "I inside, ! inside since an older epoch, o outside", size=10)
    )
    return svg.drawing(_WIDTH, height, f"epoch {td_epoch}; {'; '.join(words)}", body)


def books_svg(row: EpochRow) -> str:
    """What the module keeps: the TD's epoch, its two counters, and the page."""
    look = SEPT_LOOKS[row.page]
    body = [svg.text(4, 14, "TDCS", size=12)]
    words = [f"TD epoch {row.td_epoch}"]
    for number, (name, count) in enumerate((("even", row.even), ("odd", row.odd))):
        x, is_now = 4 + number * 190, row.td_epoch & 1 == number
        colour, stroke = (SKY, 3) if is_now else (WHITE, 1)
        body.append(
            f'<rect x="{x}" y="22" width="180" height="34" fill="{colour}" stroke="#444" '
            f'stroke-width="{stroke}"/>'
        )
        now = ", the present one" if is_now else ""
        body.append(svg.text(x + 8, 36, f"{name} epochs{now}", size=10))
        body.append(svg.text(x + 8, 51, f"{count} inside"))
        words.append(f"{count} inside of {name} epochs{now}")
    body += [
        svg.text(4, 78, "the page", size=12),
        svg.tile(4, 86, look, size=22, hint=row.page),
        svg.text(34, 102, f"{row.page}, BEPOCH {row.bepoch}"),
        svg.text(4, 128, why(row)),
    ]
    words += [f"page {row.page}, BEPOCH {row.bepoch}", why(row)]
    return svg.drawing(_WIDTH, 136, "; ".join(words), body)


# -- curves


def plot_epochs(rows: Sequence[EpochPoint], ax: Axes) -> Axes:
    """The TD's epoch as a step, and for each vCPU while it is inside its number at the epoch that
    it entered in, a little above it. rows: of `epoch_points`, one at least.
    """
    vcpus = len(rows[0].entered)
    key = f"epochs of {vcpus} vCPUs"
    if ax.get_gid() != key:
        _start_epochs(ax, vcpus, key)
    actions, epochs = [row.action for row in rows], [row.td_epoch for row in rows]
    steps, *dots = ax.lines
    steps.set_data(actions, epochs)
    for vcpu, line in enumerate(dots):
        inside = [(row.action, row.entered[vcpu]) for row in rows if row.entered[vcpu]]
        above = _ABOVE * (vcpu + 1)
        line.set_data([action for action, _ in inside], [epoch + above for _, epoch in inside])
    ax.set_ylim(0.8, max(2, *epochs) + 0.8)
    ax.set_xlim(-0.5, max(8, *actions) + 0.5)
    return ax


def _start_epochs(ax: Axes, vcpus: int, key: str) -> None:
    """Axes with a line without points for the TD and for each vCPU."""
    ax.clear()
    ax.set_gid(key)
    ax.plot([], [], drawstyle="steps-post", color=BLACK, linewidth=1.5, label="the TD")
    for vcpu in range(vcpus):
        colour, marker = VCPU_COLOURS[vcpu], f"${vcpu}$"
        ax.plot([], [], color=colour, marker=marker, linestyle="", label=f"vCPU {vcpu} inside")
    _label(ax, "epochs over time", "action", "epoch entered in")
    ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend(fontsize=plots.FONT, frameon=False, ncols=vcpus + 1, loc="upper left")


def plot_batches(rows: Sequence[BatchRow], ax: Axes) -> Axes:
    """IPIs, TRACKs and SEAMCALLs of a zap against the size of its batches. rows: of
    `batch_rows`.
    """
    ax.clear()
    sizes = [row.batch for row in rows]
    for look, values in (
        (_CALLS, [row.seamcalls for row in rows]),
        (_IPIS, [row.ipis for row in rows]),
        (_TRACKS, [row.tracks for row in rows]),
    ):
        ax.plot(sizes, values, color=look.colour, marker=f"${look.letter}$", label=look.name)
    ax.set_xscale("log", base=2)
    pages, others = (rows[0].pages, rows[0].others) if rows else (0, 0)
    title = f"{pages} pages taken away while {others} vCPUs run"
    _label(ax, title, "pages in a batch", "how many")
    ax.legend(fontsize=plots.FONT, frameon=False)
    return ax


def _label(ax: Axes, title: str, x: str, y: str) -> None:
    ax.set_title(title, fontsize=plots.FONT + 1, loc="left")
    ax.set_xlabel(x, fontsize=plots.FONT)
    ax.set_ylabel(y, fontsize=plots.FONT)
    ax.tick_params(labelsize=plots.FONT)


def epoch_picture(lab: EpochLab) -> Any:
    """`plot_epochs` of a lab's tape, for the end of a cell."""
    return plots.picture(plot_epochs, epoch_points(lab))
