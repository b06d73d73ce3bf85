"""The slot panel: a memslot is used, deleted by a policy, and created again.

    panel = SlotPanel(gpaw=48)
    panel.policy.value = "B"
    panel.delete.click()

It shows a TD and a DEFAULT VM; the maps are those of the VM that the last deed was about. A story
is recorded before one starts: step through it, or leave it anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence

import ipywidgets
from matplotlib.figure import Figure

from tdxlab.arch import PAGE_SIZE
from tdxlab.kvm.slot_policy import SLOT_POLICIES
from tdxlab.sizes import format_size
from tdxlab.study import plots
from tdxlab.study.panels import Panel
from tdxlab.study.slot_lab import KINDS, REST, SLOT, TD, SlotDeed, SlotLab
from tdxlab.study.slot_views import (
    BLOCKED,
    MAPPED,
    bill_view,
    costs,
    place_map,
    plot_costs,
    sept_map,
    states,
)

#: Sizes to choose from, in pages.
SIZES = (16, 64, 256, 512)


class SlotPanel(Panel):
    """A TD and a DEFAULT VM, each with a slot. gpaw: 48 or 52. story: record one, and stand before
    it.

    kind, policy: which VM, and what deleting does. used: how much memory a use is about; slot_size:
    of a slot that is created; told: whether the guest knows that its memory was gone. use_slot,
    use_rest, delete, create, read: buttons.
    """

    title = "Deleting a memslot"
    figure_height = 2.4

    def __init__(self, *, gpaw: int = 48, story: bool = True) -> None:
        self.lab = SlotLab(gpaw=gpaw)
        policies = [(f"{name}: {what}", name) for name, what in SLOT_POLICIES.items()]
        self.kind = _choice("VM", [(kind, kind) for kind in KINDS], "kind", TD)
        self.policy = _choice("policy", [("Linux 6.16", None), *policies], "policy", None)
        sizes = [(format_size(pages * PAGE_SIZE), pages) for pages in SIZES]
        self.used = _choice("use", sizes, "used", 64)
        self.slot_size = _choice("new slot", sizes, "slot-size", 512)
        told = [("told", True), ("not told", False)]
        self.told = _choice("guest is", told, "told", True)
        if story:
            self._record()
        super().__init__(self.lab.tape)

    def _record(self) -> None:
        """Both VMs: use everything, delete the slot, create it again, see what is left."""
        for kind in KINDS:
            self.lab.use(kind, REST, 64)
            self.lab.use(kind, SLOT, 64)
            self.lab.delete(kind)
            self.lab.create(kind)
            self.lab.read(kind)
            self.lab.use(kind, REST, 64)
        self.lab.tape.seek(0)

    # -- what the base class asks for

    def controls(self) -> Sequence[ipywidgets.Widget]:
        """What is chosen, and the five deeds."""
        self.use_slot = self.button("Use slot", "tdxlab-use-slot", lambda: self._use(SLOT))
        self.use_rest = self.button("Use rest", "tdxlab-use-rest", lambda: self._use(REST))
        self.delete = self.button(
            "Delete slot", "tdxlab-delete", self._delete, tooltip="by the chosen policy"
        )
        self.create = self.button(
            "Create slot", "tdxlab-create", self._create, tooltip="in the chosen size"
        )
        self.read = self.button(
            "Read", "tdxlab-read", lambda: self.lab.read(self.kind.value), tooltip="its first page"
        )
        chosen = [self.kind, self.policy, self.used, self.slot_size, self.told]
        deeds = [self.use_slot, self.use_rest, self.delete, self.create, self.read]
        return [ipywidgets.HBox(chosen, layout={"flex_flow": "row wrap"}), ipywidgets.HBox(deeds)]

    def views(self) -> dict[str, str]:
        """KVM's entries for slot and rest, the module's for the slot of a TD, the last bill."""
        kind = self._shown()
        maps = {"The slot": place_map(self.lab, kind, SLOT)}
        if kind == TD:
            maps["The slot, for the module"] = sept_map(self.lab)
        maps["The rest of the VM"] = place_map(self.lab, kind, REST)
        return maps | {"The last deed": bill_view(self._last())}

    def summary(self) -> str:
        """What came last, and what is left of slot and rest."""
        kind, last, count = self._shown(), self._last(), self.numbers()
        slot = self.lab.slot(kind)
        there = f"has {slot.npages} pages" if slot else "is deleted"
        came = f"{last.kind_of_vm}: {last.name}. " if last else ""
        return (
            f"{came}The slot of the {kind} {there}; mapped: {count['slot mapped']}, blocked: "
            f"{count['slot blocked']}; of the rest mapped: {count['rest mapped']}."
        )

    def numbers(self) -> dict[str, int]:
        """Entries of the VM shown, its tables, and what all deeds have cost."""
        kind = self._shown()
        slot = list(states(self.lab, kind, SLOT).values())
        rest = list(states(self.lab, kind, REST).values())
        return {
            "slot mapped": slot.count(MAPPED),
            "slot blocked": slot.count(BLOCKED),
            "rest mapped": rest.count(MAPPED),
            "tables": self.lab.gate(kind).vm.stats["pt_pages"],
            **costs(self.lab.tape.deeds),
        }

    def figure(self, figure: Figure) -> None:
        """What all deeds have cost."""
        (ax,) = plots.side_by_side(figure, 1, left=0.2)
        plot_costs(self.lab.tape.deeds, ax)

    # -- what the buttons do

    def _use(self, place: str) -> None:
        self.lab.use(self.kind.value, place, self.used.value)

    def _delete(self) -> None:
        self.lab.delete(self.kind.value, policy=self.policy.value)

    def _create(self) -> None:
        self.lab.create(self.kind.value, self.slot_size.value, told=self.told.value)

    def _last(self) -> SlotDeed | None:
        deeds = self.lab.tape.deeds
        return deeds[-1] if deeds else None

    def _shown(self) -> str:
        last = self._last()
        return last.kind_of_vm if last else TD


def _choice(
    description: str, options: Sequence[tuple[str, object]], name: str, value: object
) -> ipywidgets.Dropdown:
    """A dropdown that only chooses."""
    label, width = _WIDTHS[name]
    made = ipywidgets.Dropdown(
        options=options,
        description=description,
        value=value,
        layout={"width": f"{width}px"},
        style={"description_width": f"{label}px"},
    )
    made.add_class(f"tdxlab-{name}")
    return made


#: Pixels of a label and of it all: every option can be read, and five stand side by side.
_WIDTHS = {
    "kind": (30, 152),
    "policy": (48, 184),
    "used": (32, 136),
    "slot-size": (62, 164),
    "told": (58, 158),
}
