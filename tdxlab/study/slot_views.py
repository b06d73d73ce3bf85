"""Pictures of a memslot that comes and goes: its entries, the bill, and curves over its size."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes

from tdxlab import views
from tdxlab.arch import PAGE_SIZE
from tdxlab.kvm.blocked import is_blocked_spte
from tdxlab.kvm.spte import is_present_leaf
from tdxlab.kvm.tdp_iter import for_each_tdp_pte
from tdxlab.kvm.vm import INVALID_PAGE
from tdxlab.study import plots, slot_costs
from tdxlab.study.console_views import html_table
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
    YELLOW,
    Look,
)
from tdxlab.study.slot_formulas import USED, DelayPoint, PrivateRow
from tdxlab.study.slot_lab import MOST_PAGES, PLACES, TD, SlotDeed, SlotLab
from tdxlab.study.svg import entry_map
from tdxlab.vmm_td import Td

MAPPED = Look("mapped", GREEN, BLACK, "M", "")
BLOCKED = Look("blocked", VERMILLION, BLACK, "B", "xx")

#: What deeds have cost -> how it is drawn, in this order.
COST_LOOKS: dict[str, Look] = {
    look.name: look
    for look in (
        Look("visited, write lock", VERMILLION, BLACK, "W", "xx"),
        Look("visited, read lock", GREEN, BLACK, "R", ""),
        Look("visited again, freed", SKY, BLACK, "A", "\\\\"),
        Look("faults", ORANGE, BLACK, "F", "//"),
        Look("SEAMCALLs", GREY, BLACK, "S", "--"),
        Look("kicks", YELLOW, BLACK, "K", ".."),
    )
}

_LOCK = Look("T: visited with the write lock", VERMILLION, BLACK, "T", "")
_WORK = Look("F: all that it visits", GREY, BLACK, "F", "")
_FAULTS = (SKY, BLUE, PURPLE)
_STYLES = ("--", "-.", ":")


# -- maps


def states(lab: SlotLab, kind: str, place: str) -> dict[int, Look]:
    """Page of a place -> how its entry is drawn, in the mirror of a TD or the EPT of another VM.
    A leaf of 2M counts for all its pages.
    """
    vm = lab.gate(kind).vm
    vcpu = vm.vcpus[0]
    root = vcpu.mirror_root_hpa if kind == TD else vcpu.root_hpa
    if root == INVALID_PAGE:
        return {}
    first = PLACES[place] // PAGE_SIZE
    cells = {}
    for it in for_each_tdp_pte(vm, vm.sps[root], first, first + MOST_PAGES):
        if is_present_leaf(it.old_spte, it.level):
            for page in range(slot_costs.per_entry(it.level)):
                cells[it.gfn - first + page] = MAPPED
        elif it.level == 1 and is_blocked_spte(it.old_spte):
            cells[it.gfn - first] = BLOCKED
    return cells


def place_map(lab: SlotLab, kind: str, place: str) -> str:
    """The 512 entries of a place as KVM has them."""
    tree = "mirror" if kind == TD else "EPT"
    return entry_map(states(lab, kind, place), title=f"{kind}, {place}: 512 pages in the {tree}")


def sept_map(lab: SlotLab) -> str:
    """The TD's slot as the module has it: states of 512 Secure EPT entries."""
    gate = lab.gate(TD)
    assert isinstance(gate, Td)
    assert gate.tdr is not None
    start = PLACES["slot"]
    rows = views.sept_rows(lab.machine, gate.tdr)
    cells = {
        (row.gpa - start) // PAGE_SIZE: SEPT_LOOKS[row.state]
        for row in rows
        if row.sept_level == 0 and start <= row.gpa < start + MOST_PAGES * PAGE_SIZE
    }
    return entry_map(cells, title="TD, slot: 512 pages in the Secure EPT")


def bill_view(deed: SlotDeed | None) -> str:
    """What the last deed cost, as a table."""
    if deed is None:
        return '<p style="line-height:1.4">nothing has been done yet</p>'
    bill = deed.bill
    rows = [(name, str(value)) for name, value in costs([deed]).items() if value]
    rows += [(name, str(value)) for name, value in bill.calls]
    named = {
        "SPTEs cleared": bill.cleared,
        "tables freed": bill.freed,
        "remote TLB flushes": bill.flushes,
        "pages accepted": bill.accepts,
    }
    rows += [(name, str(value)) for name, value in named.items() if value]
    return html_table((f"{deed.kind_of_vm}: {deed.name}", ""), rows or [("nothing", "")])


def costs(deeds: Sequence[SlotDeed]) -> dict[str, int]:
    """What deeds cost together, by the names of COST_LOOKS."""
    bills = [deed.bill for deed in deeds]
    sums = (
        sum(bill.write_lock for bill in bills),
        sum(bill.read_lock for bill in bills),
        sum(bill.rescanned for bill in bills),
        sum(bill.faults for bill in bills),
        sum(bill.seamcalls for bill in bills),
        sum(bill.kicks for bill in bills),
    )
    return dict(zip(COST_LOOKS, sums, strict=True))


# -- bars and curves


def plot_costs(deeds: Sequence[SlotDeed], ax: Axes) -> Axes:
    """What all deeds of a tape have cost so far."""
    values = costs(deeds)
    looks = list(COST_LOOKS.values())
    names = [f"{look.letter} {look.name}" for look in looks]
    title = "Since the beginning"
    return plots.bars(ax, names, list(values.values()), looks, unit="how many", title=title)


def plot_private(rows: Sequence[PrivateRow], ax: Axes) -> Axes:
    """SEAMCALLs of deleting private pages, way by way. rows: of `private_rows`."""
    looks = [_LOCK if row.way.startswith("T") else BLOCKED_WAY for row in rows]
    calls = [row.seamcalls for row in rows]
    title = f"Deleting {rows[0].slot} of private pages" if rows else ""
    return plots.bars(ax, [row.way for row in rows], calls, looks, unit="SEAMCALLs", title=title)


BLOCKED_WAY = Look("B", YELLOW, BLACK, "B", "..")


def plot_delay(rows: Sequence[DelayPoint], ax: Axes) -> Axes:
    """What holds up vCPUs that use other memory, against the size of the slot; a ring where the two
    policies meet. rows: of `delay_points`.
    """
    ax.clear()
    sizes = [row.pages for row in rows]
    lock = [row.lock for row in rows]
    ax.plot(sizes, lock, color=_LOCK.colour, marker="$T$", label=_LOCK.name)
    ax.plot(
        sizes,
        [row.work for row in rows],
        color=_WORK.colour,
        marker="$F$",
        label=f"{_WORK.name}, {USED[1]} in use",
    )
    for field, used, colour, style in zip(_RESTS, USED, _FAULTS, _STYLES, strict=True):
        faults = [getattr(row, field) for row in rows]
        ax.plot(sizes, faults, style, color=colour, label=f"F: faults, {used} in use")
        meet = crossing(sizes, lock, faults)
        if meet is not None:
            ax.plot([meet], faults[:1], "o", color=BLACK, markerfacecolor=WHITE, markersize=8)
    ax.set_xscale("log", base=2)
    ax.set_xticks(sizes[::2], [row.slot for row in rows[::2]])
    ax.set_yscale("log")
    ax.set_title("Deleting one slot: what holds up the others", fontsize=plots.FONT + 1, loc="left")
    ax.set_xlabel("size of the slot", fontsize=plots.FONT)
    ax.set_ylabel("entries visited, or worth as much", fontsize=plots.FONT)
    ax.tick_params(labelsize=plots.FONT)
    ax.legend(fontsize=plots.FONT, frameon=False, loc="lower right")
    ax.spines[["top", "right"]].set_visible(False)
    return ax


_RESTS = ("small", "middle", "large")


def crossing(sizes: Sequence[float], rising: Sequence[int], flat: Sequence[int]) -> float | None:
    """Where a rising curve meets a flat one, between two points in proportion; None if nowhere."""
    for here in range(1, len(sizes)):
        low, high, level = rising[here - 1], rising[here], flat[here]
        if low < level <= high:
            part = (level - low) / (high - low)
            return sizes[here - 1] + part * (sizes[here] - sizes[here - 1])
    return None
