"""The shared-memory panel of notebook 06: use memory, log it, split it, age it, and look.

panel = SharedPanel(gpaw=48)
panel.memory.value, panel.page.value = "2M", 3
panel.write.click()                      # the guest writes
panel.log.click()                        # the VMM starts dirty logging
panel.stop.click()                       # ... and stops: large pages again

Menus and sliders choose; only buttons do something. State k is the state after k deeds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import ipywidgets
from matplotlib.figure import Figure

from tdxlab.study.panels import Panel
from tdxlab.study.plots import bars, side_by_side
from tdxlab.study.shared_lab import REGIONS, TD, DeedTape, SharedLab
from tdxlab.study.shared_tables import kind_of, letters
from tdxlab.study.shared_views import (
    SIZE_LOOKS,
    bit_strip,
    dirty_view,
    sentence,
    table_view,
)

#: What the split menu offers: words -> eager.
SPLITS = {"when logging starts": True, "at the first write": False}
#: Pages that the slider reaches.
REACH = 1024


class SharedPanel(Panel):
    """A VM with shared memory in 4 KiB, 2 MiB and 1 GiB host pages.

    gpaw: 48 or 52. kind: TD or VM of `shared_lab`. memory, split: menus; page: a slider. read,
    write, fetch, device, log, get_log, stop, age, flush, retell: buttons.
    """

    title = "Shared memory: the direct EPT"
    figure_height = 1.7

    def __init__(self, *, gpaw: int = 48, kind: str = TD) -> None:
        self.lab = SharedLab(gpaw=gpaw, kind=kind)
        tell(self.lab)
        self.lab.tape.seek(0)
        self.deeds: DeedTape = self.lab.tape
        super().__init__(self.deeds)

    # -- choosing and acting

    def controls(self) -> Sequence[ipywidgets.Widget]:
        """What to use, then the buttons that use it."""
        self.memory = ipywidgets.Dropdown(
            description="host pages", options=list(REGIONS), value="2M", layout={"width": "170px"}
        )
        self.page = ipywidgets.IntSlider(
            description="page", min=0, max=REACH - 1, value=3, layout={"width": "300px"}
        )
        self.split = ipywidgets.Dropdown(
            description="split", options=list(SPLITS.items()), layout={"width": "250px"}
        )
        for name in ("memory", "page", "split"):
            widget = getattr(self, name)
            widget.add_class(f"tdxlab-{name}")
            widget.observe(lambda _: self.act(lambda: None), names="value")
        row = ipywidgets.HBox(
            [self.memory, self.page, self.split], layout={"width": "100%", "flex_flow": "row wrap"}
        )
        return [row, *self._guest_buttons(), *self._host_buttons()]

    def _make(
        self, name: str, icon: str, tooltip: str, handler: Callable[[], object]
    ) -> ipywidgets.Button:
        css_class = f"tdxlab-{name.lower().replace(' ', '-')}"
        return self.button(name, css_class, handler, icon=icon, tooltip=tooltip)

    def _guest_buttons(self) -> list[ipywidgets.Button]:
        lab = self.lab
        self.read = self._make(
            "Read", "eye", "the guest reads the page", lambda: lab.touch(*self.chosen)
        )
        self.write = self._make(
            "Write",
            "pencil",
            "the guest writes the page",
            lambda: lab.touch(*self.chosen, write=True),
        )
        self.fetch = self._make(
            "Fetch",
            "bolt",
            "the guest runs an instruction in the page",
            lambda: lab.fetch(*self.chosen),
        )
        self.device = self._make(
            "Device", "plug", "the guest reads a device page: no memslot there", lab.device
        )
        return [self.read, self.write, self.fetch, self.device]

    def _host_buttons(self) -> list[ipywidgets.Button]:
        lab = self.lab
        self.log = self._make(
            "Start log",
            "play-circle",
            "dirty logging of this memory",
            lambda: lab.log(self.memory.value, eager=self.split.value),
        )
        self.get_log = self._make(
            "Get log",
            "download",
            "which pages were written, and watch them anew",
            lambda: lab.get_log(self.memory.value),
        )
        self.stop = self._make(
            "Stop log",
            "stop-circle",
            "no more logging: large pages again",
            lambda: lab.stop(self.memory.value),
        )
        self.age = self._make(
            "Age",
            "hourglass",
            "the host asks whether this memory was used, and makes it old",
            lambda: lab.age(self.memory.value),
        )
        self.flush = self._make("Flush", "refresh", "every vCPU flushes its TLB", lab.flush)
        self.retell = self._make("Retell", "book", "the story from its beginning", self._retell)
        return [self.log, self.get_log, self.stop, self.age, self.flush, self.retell]

    @property
    def chosen(self) -> tuple[str, int]:
        """Memory and page that the controls choose."""
        return self.memory.value, self.page.value

    def _retell(self) -> None:
        self.tape.seek(0)
        tell(self.lab)
        self.tape.seek(0)

    # -- what the base class asks for

    def views(self) -> dict[str, str]:
        """The tables on the way to the chosen page, its entry, and the dirty bitmap."""
        gpa = self.lab.gpa(*self.chosen)
        maps = {f"Direct EPT, {name}": table_view(self.lab, gpa, n) for name, n in _LEVELS.items()}
        return {
            **maps,
            "Dirty log": dirty_view(self.lab, *self.chosen),
            "The entry of the chosen page": self._entry(),
        }

    def _entry(self) -> str:
        entry = self.lab.entry(*self.chosen)
        if entry is None:
            return sentence("There is no direct EPT yet: the vCPU gets one when it runs.")
        kind = kind_of(self.lab, entry.raw, entry.level)
        return bit_strip(entry.raw, level=entry.level, kind=kind)

    def summary(self) -> str:
        """The last deed with what came of it, and how the chosen page is mapped."""
        last = self.deeds.deeds[-1:]
        came = f"{last[0].kind}: {last[0].name}. " if last else ""
        size, page = self.chosen
        return f"{came}Page {page} of the {size} memory {self._mapped()}."

    def _mapped(self) -> str:
        entry = self.lab.entry(*self.chosen)
        if entry is None or kind_of(self.lab, entry.raw, entry.level) != "leaf":
            return "is not mapped"
        size = {1: "4K", 2: "2M", 3: "1G"}[entry.level]
        logged = ", and its writes are logged" if self.lab.is_logging(self.memory.value) else ""
        return f"is mapped by a {size} leaf with {letters(entry.raw)}{logged}"

    def numbers(self) -> dict[str, int]:
        """Everything that is counted, and the dirty pages of the chosen memory."""
        return {**self.lab.counts(), "dirty": len(self.lab.dirty(self.memory.value))}

    def figure(self, figure: Figure) -> None:
        """Leaves of each size, and tables."""
        (ax,) = side_by_side(figure, 1)
        figure.subplots_adjust(bottom=0.26, top=0.86)
        counts = self.lab.counts()
        looks = list(SIZE_LOOKS.values())
        values = [counts[name] for name in ("pages_4k", "pages_2m", "pages_1g", "tables")]
        names = [look.name for look in looks]
        bars(ax, names, values, looks, unit="entries, tables", title="The direct EPT")


#: Tables that the maps show: name of their entries -> KVM's level.
_LEVELS = {"1G entries": 3, "2M entries": 2, "4K entries": 1}


def tell(lab: SharedLab) -> None:
    """The story: three sizes, then the 2M memory is logged, written, and put together again."""
    lab.touch("4K", 3, write=True)
    lab.touch("2M", 3)
    lab.touch("1G", 3)
    lab.touch("2M", 4, write=True)
    lab.log("2M", eager=False)
    lab.touch("2M", 3, write=True)
    lab.touch("2M", 4, write=True)
    lab.touch("2M", 4, write=True)
    lab.get_log("2M")
    lab.touch("2M", 4, write=True)
    lab.stop("2M")
    lab.age("2M")
    lab.touch("2M", 3)
    lab.device()
