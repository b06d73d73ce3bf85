"""The conversion panel of notebook 07: choose pages, direction and batch; convert; step through.

panel = ConvertPanel(gpaw=48)
panel.first.value, panel.pages.value = 4, 2
panel.convert.click()                    # the guest asks with MapGPA, the VMM converts
panel.read.click()                       # the first access
panel.change.click()                     # on to the next step at which something changes

The sliders choose; only buttons do something. State k is the state after k steps of the tape.
"""

from __future__ import annotations

from collections.abc import Sequence

import ipywidgets
from matplotlib.figure import Figure

from tdxlab.study.convert_lab import LEAVES, PAGES, PRIVATE, SHARED, ConvertLab
from tdxlab.study.convert_steps import meaning
from tdxlab.study.convert_views import CALL_LOOKS, short_name, strips
from tdxlab.study.panels import Panel
from tdxlab.study.plots import bars, side_by_side

#: What the batch control offers: words -> pages for each MapGPA.
BATCHES = {"all in one MapGPA": 0, "1 page each": 1, "2 pages each": 2, "4 pages each": 4}


class ConvertPanel(Panel):
    """A TD of 16 pages whose guest converts some of them.

    gpaw: 48 or 52. first, pages: sliders; to, batch: menus; punch: a box. convert, read, write,
    unasked, change, retell: buttons.
    """

    title = "Converting memory"
    figure_height = 1.9

    def __init__(self, *, gpaw: int = 48) -> None:
        self.lab = ConvertLab(gpaw=gpaw)
        tell(self.lab)
        self.lab.tape.seek(0)
        super().__init__(self.lab.tape)

    # -- choosing and acting

    def controls(self) -> Sequence[ipywidgets.Widget]:
        """What to convert and how, then the buttons that do it."""
        wide = {"width": "300px"}
        self.first = ipywidgets.IntSlider(
            description="first page", min=0, max=PAGES - 1, value=4, layout=wide
        )
        self.pages = ipywidgets.IntSlider(
            description="pages", min=1, max=PAGES, value=2, layout=wide
        )
        self.to = ipywidgets.Dropdown(
            description="to", options=[SHARED, PRIVATE], layout={"width": "200px"}
        )
        self.batch = ipywidgets.Dropdown(
            description="batch", options=list(BATCHES.items()), layout={"width": "290px"}
        )
        self.punch = ipywidgets.Checkbox(
            description="VMM discards the other copy (punch hole)",
            indent=False,
            layout={"width": "300px"},
        )
        for name in ("first", "pages", "to", "batch", "punch"):
            widget = getattr(self, name)
            widget.add_class(f"tdxlab-{name}")
            widget.observe(lambda _: self.act(lambda: None), names="value")
        choice = [self.first, self.pages, self.to, self.batch, self.punch]
        row = ipywidgets.HBox(choice, layout={"width": "100%", "flex_flow": "row wrap"})
        return [row, *self._buttons()]

    def _buttons(self) -> list[ipywidgets.Button]:
        make = self.button
        self.convert = make(
            "Convert", "tdxlab-convert", self._convert, icon="exchange", tooltip="MapGPA"
        )
        self.read = make("Read", "tdxlab-read", self._read, icon="eye", tooltip="the guest reads")
        self.write = make(
            "Write",
            "tdxlab-write",
            self._write,
            icon="pencil",
            tooltip="the guest writes",
        )
        self.unasked = make(
            "Read without MapGPA",
            "tdxlab-unasked",
            self._unasked,
            icon="bolt",
            tooltip="the guest uses the pages as the other kind and asks nobody",
        )
        self.change = make(
            "Next change",
            "tdxlab-change",
            self._next_change,
            icon="forward",
            tooltip="on to the next step at which a map or a count changes",
        )
        self.retell = make(
            "Tell the story again", "tdxlab-retell", self._retell, icon="book", tooltip="start anew"
        )
        return [self.convert, self.read, self.write, self.unasked, self.change, self.retell]

    @property
    def chosen(self) -> range:
        """The pages that the sliders choose; those behind the last one do not count."""
        first = self.first.value
        return range(first, min(first + self.pages.value, PAGES))

    def _convert(self) -> None:
        pages = self.chosen
        self.lab.convert(
            pages.start,
            len(pages),
            to=self.to.value,
            batch=self.batch.value,
            punch=self.punch.value,
        )

    def _read(self) -> None:
        self.lab.access(self.chosen.start, len(self.chosen))

    def _write(self) -> None:
        self.lab.access(self.chosen.start, len(self.chosen), write=True)

    def _unasked(self) -> None:
        pages = self.chosen
        self.lab.access_unasked(pages.start, len(pages), to=self.to.value, punch=self.punch.value)

    def _next_change(self) -> None:
        if self.tape.position == len(self.tape):
            raise ValueError("this is the end of the tape: go back, or convert something")
        here = self._state()
        for position in range(self.tape.position + 1, len(self.tape) + 1):
            self.tape.seek(position)
            if self._state() != here:
                return

    def _state(self) -> tuple[object, ...]:
        return (*self.lab.rows(), *self.numbers().values())

    def _retell(self) -> None:
        self.tape.seek(0)
        tell(self.lab)
        self.tape.seek(0)

    # -- what the base class asks for

    def views(self) -> dict[str, str]:
        """The tables and the contents of all pages."""
        return strips(self.lab.rows(), self.chosen)

    def summary(self) -> str:
        """What comes next, as part of what, and what is lost."""
        lost = self.lab.lost()
        gone = f"{lost} of {PAGES} pages have lost their private data"
        return f"{meaning(self.tape.last)}. {gone}."

    def numbers(self) -> dict[str, int]:
        """Pages by kind and by table, and what was counted."""
        rows = self.lab.rows()
        calls = {short_name(leaf): n for leaf, n in self.lab.seamcalls().items()}
        return {
            "private": sum(row.attribute == PRIVATE for row in rows),
            "mirror leaves": sum(row.mirror == "mapped" for row in rows),
            "S-EPT leaves": sum(row.external != "FREE" for row in rows),
            "direct leaves": sum(row.direct == "mapped" for row in rows),
            "guest_memfd pages": sum(row.guest_memfd == "page" for row in rows),
            **calls,
            **self.lab.counts(),
            "private data lost": self.lab.lost(),
        }

    def figure(self, figure: Figure) -> None:
        """SEAMCALLs of each leaf since the beginning."""
        (ax,) = side_by_side(figure, 1, left=0.14)
        figure.subplots_adjust(bottom=0.24, top=0.86)
        names = [short_name(leaf) for leaf in LEAVES]
        looks = [CALL_LOOKS[name] for name in names]
        calls = list(self.lab.seamcalls().values())
        labels = [f"{look.letter} {name}" for look, name in zip(looks, names, strict=True)]
        bars(ax, labels, calls, looks, unit="SEAMCALLs", title="SEAMCALLs since the beginning")


def tell(lab: ConvertLab) -> None:
    """The story: two pages become shared, are used, and become private again."""
    lab.convert(4, 2, to=SHARED)
    lab.access(4, 2, write=True)
    lab.convert(4, 2, to=PRIVATE)
    lab.access(4, 2)
