"""The PAE-root stepper of notebook 14: a guest with processes, its root bit by bit, step by step.

    panel = PaePanel(maxphyaddr=48)
    panel.design.value, panel.guest.value = RFC, PAE
    panel.build.click()                  # a new VM
    panel.process.value, panel.gib.value = 2, 3
    panel.use.click()                    # CR3 is loaded, the guest uses its page there
    panel.store.click()                  # on to the next store into a slot

The menus and sliders choose; only buttons do something. State k is the state after k steps of the
tape.
"""

from __future__ import annotations

from collections.abc import Sequence

import ipywidgets
from matplotlib.figure import Figure

from tdxlab.kvm.shadow_params import AMD, DESIGNS, INTEL, VENDORS
from tdxlab.study.pae_lab import GUESTS, MAX_PROCESSES, SPOILS, TWO_LEVELS, PaeLab
from tdxlab.study.pae_views import bits_svg, cpu_html, pages_html, plot_counts, tree_svg
from tdxlab.study.panels import Panel
from tdxlab.study.plots import side_by_side

_STORE = "store PDPTE"
_DRAWN = (
    *("roots built", "look-ups", "slots stored"),
    *("PDPTEs checked", "shadow pages", "pages below 4 GiB"),
)

#: Beginning of a step's label -> what comes next.
MEANINGS = {
    "MOV CR3": "the guest loads CR3, and KVM makes the move for it",
    "mmu_topup_memory_caches": "KVM gets the pages that it may need while it holds mmu_lock",
    "mmu_topup_pae_root_cache": "KVM gets a page below 4 GiB, to have one ready for a root",
    "write_lock(mmu_lock)": "KVM takes mmu_lock for write",
    _STORE: "KVM is about to store into a slot",
    "load_mmu_pgd": "the CPU is told where the root is",
    "VM entry": "the vCPU is about to enter the guest",
    "guest": "the guest is about to use its page",
    "walk_addr": "a VM exit; KVM is about to walk the guest's own tables",
    "set SPTE": "KVM is about to map the page",
    "mmu_free_root_page": "KVM is about to give up its reference to the root",
    "kvm_zap_obsolete_pages": "all pages are obsolete; KVM is about to zap them",
    "kvm_mmu_commit_zap_page": "the page is unlinked; KVM is about to flush, and to free it",
    "returns": "done",
}


class PaePanel(Panel):
    """A VM with shadow paging that the controls describe.

    maxphyaddr: 36 to 52. design, vendor, guest, what: menus; encrypted: a box; process, gib:
    sliders. build, use, zap, zap_all, spoil, store: buttons.
    """

    title = "PAE roots: a stepper"
    figure_height = 2.4

    def __init__(self, *, maxphyaddr: int = 48) -> None:
        self.maxphyaddr = maxphyaddr
        self.lab = PaeLab(maxphyaddr=maxphyaddr)
        self.lab.use(0, 3)
        self.lab.tape.seek(0)
        super().__init__(self.lab.tape)

    # -- choosing and acting

    def controls(self) -> Sequence[ipywidgets.Widget]:
        """What to build, what to use, the buttons."""
        self.design = _menu("design", DESIGNS, "200px")
        self.vendor = _menu("CPU", VENDORS, "160px")
        self.guest = _menu("guest", GUESTS, "180px", TWO_LEVELS)
        self.encrypted = ipywidgets.Checkbox(
            description="C-bit (AMD)", indent=False, layout={"width": "120px"}
        )
        self.process = _slider("process", MAX_PROCESSES - 1)
        self.gib = _slider("GiB", 3, 3)
        self.what = _menu("store", tuple(SPOILS), "300px")
        for name in ("design", "vendor", "guest", "encrypted", "process", "gib", "what"):
            getattr(self, name).add_class(f"tdxlab-{name}")
        row = {"width": "100%", "flex_flow": "row wrap"}
        built = [self.design, self.vendor, self.guest, self.encrypted]
        return [
            ipywidgets.HBox([*built, self._build_button()], layout=row),
            ipywidgets.HBox([self.process, self.gib, *self._use_buttons()], layout=row),
            ipywidgets.HBox([self.what, *self._other_buttons()], layout=row),
        ]

    def _build_button(self) -> ipywidgets.Button:
        self.build = self.button(
            "Build a new VM", "tdxlab-build", self._build, icon="cubes", tooltip="start anew"
        )
        return self.build

    def _use_buttons(self) -> list[ipywidgets.Button]:
        make = self.button
        self.use = make(
            "Use", "tdxlab-use", self._use, icon="bolt", tooltip="the process uses its page there"
        )
        self.store = make(
            "Next store", "tdxlab-store", self._next_store, icon="forward", tooltip="into a slot"
        )
        return [self.use, self.store]

    def _other_buttons(self) -> list[ipywidgets.Button]:
        make = self.button
        self.spoil = make(
            "Into slot", "tdxlab-spoil", self._spoil, icon="bug", tooltip="slot of the chosen GiB"
        )
        self.zap = make(
            "Zap directory", "tdxlab-zap", self._zap, icon="trash", tooltip="of the chosen GiB"
        )
        self.zap_all = make(
            "Zap everything", "tdxlab-zapall", self._zap_all, icon="fire", tooltip="all obsolete"
        )
        return [self.spoil, self.zap, self.zap_all]

    def _build(self) -> None:
        if self.encrypted.value and self.vendor.value == INTEL:
            raise ValueError(f"a C-bit is {AMD}'s: choose that CPU, or clear the box")
        self.lab = PaeLab(
            design=self.design.value,
            vendor=self.vendor.value,
            guest=self.guest.value,
            maxphyaddr=self.maxphyaddr,
            encrypted=self.encrypted.value,
        )
        self.tape = self.lab.tape

    def _use(self) -> None:
        self.lab.use(self.process.value, self.gib.value)

    def _zap(self) -> None:
        self.lab.zap(self.gib.value)

    def _zap_all(self) -> None:
        self.lab.zap_all()

    def _spoil(self) -> None:
        self.lab.spoil(self.gib.value, self.what.value)

    def _next_store(self) -> None:
        """To the position just before the next store into a slot, and behind the last one."""
        actions, here = self.tape.actions, self.tape.position
        for position in range(here + 1, len(actions) + 1):
            if actions[position - 1].name.startswith(_STORE):
                self.tape.seek(position)
                return
        raise ValueError("nothing is stored into a slot from here on: go back, or use a page")

    # -- what the base class asks for

    def views(self) -> dict[str, str]:
        """The root bit by bit, what hangs on it, what the CPU holds, and the shadow pages."""
        params = self.lab.params
        raws = [row.raw for row in self.lab.slots()]
        return {
            "The four entries in memory": bits_svg(raws, params.maxphyaddr, params.c_bit),
            "What hangs on them": tree_svg(self.lab),
            "What the CPU holds of them": cpu_html(self.lab),
            "Shadow pages": pages_html(self.lab),
        }

    def summary(self) -> str:
        """Where the operation stands, and what the root is like."""
        action = self.tape.last
        params = self.lab.params
        what = f"{params.design}, {params.vendor}, guest with {self.lab.guest}"
        if action is None:
            return f"{what}: the guest has not run yet"
        rows = self.lab.slots()
        bad = sum(bool(row.bad) for row in rows)
        state = f"{sum(row.present for row in rows)} of 4 slots present"
        return (
            f"{what}. {action.phase}: {self._meaning(action.name)}. {state}"
            f"{f', {bad} of them illegal' if bad else ''}."
        )

    def _meaning(self, label: str) -> str:
        meaning = next((text for name, text in MEANINGS.items() if label.startswith(name)), label)
        if label.startswith("returns"):
            came = label.removeprefix("returns ").strip("'")
            return "done" if came == "None" else came
        return meaning

    def numbers(self) -> dict[str, int]:
        """Counts since the VM was built."""
        counts, rows = self.lab.vm.counts, self.lab.slots()
        return {
            "roots built": counts["roots_built"],
            "roots kept": counts["roots_reused"],
            "look-ups": counts["sp_lookups"],
            "slots stored": counts["slots_stored"],
            "PDPTEs checked": counts["pdptes_checked"],
            "VM entries": counts["vm_entries"],
            "entries failed": counts["entry_failures"],
            "present": sum(row.present for row in rows),
            "illegal": sum(bool(row.bad) for row in rows),
            "shadow pages": len(self.lab.vm.sps),
            "pages below 4 GiB": self.lab.low_pages(),
        }

    def figure(self, figure: Figure) -> None:
        """The counts as bars."""
        (ax,) = side_by_side(figure, 1, left=0.2)
        numbers = self.numbers()
        plot_counts({name: numbers[name] for name in _DRAWN}, self.lab.params.design, ax)


def _slider(name: str, most: int, value: int = 0) -> ipywidgets.IntSlider:
    layout = {"width": "230px"}
    return ipywidgets.IntSlider(description=name, min=0, max=most, value=value, layout=layout)


def _menu(
    name: str, options: Sequence[str], width: str, value: str | None = None
) -> ipywidgets.Dropdown:
    return ipywidgets.Dropdown(
        description=name, options=list(options), value=value or options[0], layout={"width": width}
    )
