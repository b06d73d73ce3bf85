"""The measured-image panel of notebook 11: change an image, predict, launch, compare two MRTDs.

Each launch builds a TD from the start, on the panel's tape: real SEAMCALLs on a fresh machine. The
buttons of every panel then walk through that build, call by call.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import ipywidgets
from matplotlib.figure import Figure

from tdxlab.study import measurement_views as drawn
from tdxlab.study.launch_changes import CHANGES, Change, said
from tdxlab.study.measured_launch import (
    MEASURED_LEAVES,
    Recipe,
    build,
    build_on,
    records_done,
    running_digest,
)
from tdxlab.study.measurement_log import EXTEND, PAGE_ADD, SMALL_IMAGE, Image, Record, mrtd
from tdxlab.study.panels import Panel
from tdxlab.study.plots import side_by_side
from tdxlab.study.tables import played

PREDICTIONS = ("changes", "stays")
_NEIGHBOURS = 3


class MeasurePanel(Panel):
    """An image, the build of a TD from it, and its measurement.

    gpaw: 48 or 52. image: the one to begin with.
    change, page, number, predict: what to do to the image, and what the reader expects of MRTD.
    launch: does it; original: back to the first image. recipe: of the build on the tape.
    """

    title = "Measured image: what does MRTD see?"
    figure_height = 2.2

    def __init__(self, *, gpaw: int = 48, image: Image = SMALL_IMAGE) -> None:
        self.original_recipe = Recipe(image, gpaw=gpaw)
        self.built = build(self.original_recipe)
        self._set_off()
        super().__init__(self.built.tape)

    def _set_off(self) -> None:
        """Nothing was changed yet."""
        self.mrtd_before = self.mrtd_after = self.built.mrtd()
        self.last_change = ""
        self.predicted = ""

    @property
    def recipe(self) -> Recipe:
        """What the host did."""
        return self.built.recipe

    # -- controls

    def controls(self) -> Sequence[ipywidgets.Widget]:
        self.change = self._slider(
            ipywidgets.SelectionSlider, "change", options=[change.name for change in CHANGES]
        )
        self.page = self._slider(ipywidgets.SelectionSlider, "page", options=[("", 0)])
        self.number = self._slider(ipywidgets.IntSlider, "number", width="280px")
        self.choice = ipywidgets.HTML(layout={"flex": "1 1 100%"})
        self.choice.add_class("tdxlab-choice")
        self.predict = ipywidgets.ToggleButtons(
            options=[(f"MRTD {what}", what) for what in PREDICTIONS],
            value=None,
            style={"button_width": "120px"},
        )
        self.predict.add_class("tdxlab-predict")
        self.launch = self.button("Launch", "tdxlab-launch", self._launch, icon="rocket")
        self.original = self.button("Original image", "tdxlab-original", self._start_over)
        self._offer_pages()
        self._offer_numbers()
        self.change.observe(lambda _: self._offer_numbers(), names="value")
        for slider in (self.page, self.number):
            slider.observe(lambda _: self._show_choice(), names="value")
        sliders = (self.change, self.page, self.number)
        return (*sliders, self.choice, self.predict, self.launch, self.original)

    def _slider(
        self, kind: type[ipywidgets.Widget], name: str, *, width: str = "210px", **more: object
    ) -> ipywidgets.Widget:
        """A slider that chooses. What it stands at is read in the line below, not beside it."""
        is_number = kind is ipywidgets.IntSlider
        slider = kind(
            description=name,
            readout=is_number,
            layout={"width": width},
            style={"description_width": "initial"},
            **more,
        )
        slider.add_class(f"tdxlab-{name}")
        return slider

    @property
    def chosen(self) -> Change:
        """The change that is chosen."""
        return next(change for change in CHANGES if change.name == self.change.value)

    def choose(self, change: str, *, page: int = 0, number: int = 0, expect: str | None) -> None:
        """Put the controls where a reader would. change: its name; expect: of MRTD, "changes" or
        "stays".
        """
        self.change.value = change
        self.page.value, self.number.value, self.predict.value = page, number, expect

    def position_of(self, leaf: str) -> int:
        """The position behind the first call of a leaf, such as "TDH.MR.EXTEND"."""
        return [action.name for action in self.tape.actions].index(leaf) + 1

    def _offer_pages(self) -> None:
        """The pages of the image as it is now; the choice stays where it can."""
        image, place = self.recipe.image, self.page.value
        names = [f"{number} {page.section} {page.gpa:#x}" for number, page in enumerate(image)]
        self.page.options = [(name, number) for number, name in enumerate(names or ["no page"])]
        self.page.value = min(place, max(len(image) - 1, 0))

    def _offer_numbers(self) -> None:
        """The range of the number that the chosen change takes."""
        change = self.chosen
        self.page.disabled = not change.on_page
        self.number.disabled = not change.number
        self.number.description = change.number or "number"
        self.number.max = max(change.most, self.number.min)
        self.number.min = change.least
        self.number.max = change.most
        self._show_choice()

    def _show_choice(self) -> None:
        """Say what the sliders stand at."""
        sentence = f"Chosen: {self._sentence_of(self.chosen, self.page.label)}"
        self.choice.value = f'<div role="status" aria-live="polite">{escape(sentence)}</div>'

    # -- what the buttons do

    def _launch(self) -> None:
        """Build a TD from the changed recipe; the tape then holds that build."""
        if self.predict.value is None:
            raise ValueError("first say what becomes of MRTD: choose changes or stays")
        change, place = self.chosen, self.page.value
        recipe = change.apply(self.recipe, place, self.number.value)
        before = self.mrtd_after
        self._build(recipe)
        self.mrtd_before, self.mrtd_after = before, self.built.mrtd()
        self.last_change = self._sentence_of(change, str(place))
        self.predicted = str(self.predict.value)
        self.predict.value = None

    def _start_over(self) -> None:
        self._build(self.original_recipe)
        self._set_off()

    def _build(self, recipe: Recipe) -> None:
        self.built = build_on(self.tape, recipe)
        self._offer_pages()
        self._show_choice()

    def _sentence_of(self, change: Change, page: str) -> str:
        """The change in words, such as "flip a byte (page 0, byte 300)"."""
        details = [f"page {page}"] if change.on_page else []
        details += [f"{change.number} {self.number.value}"] if change.number else []
        return f"{change.name} ({', '.join(details)})" if details else change.name

    # -- what is shown

    @property
    def done(self) -> int:
        """Records that are hashed at the present position."""
        return records_done(played(self.tape))

    @property
    def record(self) -> Record | None:
        """The record that the last call added, None if it added none."""
        action = self.tape.last
        feeds = action is not None and action.name in MEASURED_LEAVES
        return self.built.log[self.done - 1] if feeds else None

    def digests(self) -> tuple[str, str, str]:
        """(the module's running digest, the same from the log, the MRTD field) now, as hex."""
        running = running_digest(self.machine, self.built.td.tdr)
        from_log = mrtd(self.built.log[: self.done]) if running else ""
        return running or "", from_log, self.built.mrtd() if running else ""

    def views(self) -> dict[str, str]:
        log, image, done = self.built.log, self.recipe.image, self.done
        different = drawn.different_cells(image, self.original_recipe.image)
        picture = drawn.image_map(image, log, done, different)
        last = self.tape.last
        what = f"{last.name} feeds nothing" if last else "no call yet"
        return {
            "Image and log": picture + _log_html(log, done),
            "Bytes of the last call": drawn.record_html(done, len(log), self.record, what),
            "MRTD, computed twice": self._digest_html(),
        }

    def _digest_html(self) -> str:
        names = ("module, hashed so far", "hashlib, same records", "MRTD field")
        values = (*self.digests(), self.mrtd_before)
        rows = zip((*names, "MRTD before the change"), values, strict=True)
        return f'<table style="line-height:1.4">{"".join(map(_digest_row, rows))}</table>'

    def summary(self) -> str:
        module, from_log, field = self.digests()
        if not module:
            return "TDH.MNG.INIT has not started the hash yet."
        same = "agree" if module == from_log else "DISAGREE"
        sofar = f"{self.done} of {len(self.built.log)} records, module and hashlib {same}"
        if self.tape.position < len(self.tape) or not int(field, 16):
            return f"{self._last_call()} {sofar}; the MRTD field is still zero."
        return f"MRTD is {field[:16]}...; {sofar}. {self._outcome()}"

    def _last_call(self) -> str:
        record, action = self.record, self.tape.last
        if record is None:
            return f"{action.name if action else 'Nothing'} feeds nothing to the hash."
        where = f"chunk {record.chunk} of " if record.chunk is not None else "GPA of "
        return f"{record.call} hashed {len(record.data)} bytes, {where}page {record.page}."

    def _outcome(self) -> str:
        """What the last change did, and whether the reader had said so."""
        if not self.last_change:
            return "Choose a change and say what becomes of MRTD."
        came = said(self.mrtd_before, self.mrtd_after)
        verdict = "as" if came == self.predicted else "other than"
        return f"Last change: {self.last_change}. MRTD {came}, {verdict} predicted."

    def numbers(self) -> dict[str, int]:
        log = self.built.log[: self.done]
        module, from_log, _ = self.digests()
        return {
            "records": len(log),
            "PAGE.ADD": sum(record.call == PAGE_ADD for record in log),
            "EXTEND": sum(record.call == EXTEND for record in log),
            "bytes hashed": sum(len(record.data) for record in log),
            "pages": len(self.recipe.image),
            "agree": int(module == from_log),
            "MRTD changed": int(self.mrtd_before != self.mrtd_after),
        }

    def figure(self, figure: Figure) -> None:
        bars, curve = side_by_side(figure, 2, left=0.16, between=0.3)
        figure.subplots_adjust(bottom=0.24, top=0.86)
        log, actions = self.built.log, self.tape.actions
        drawn.page_bytes_bars(drawn.bytes_by_page(self.recipe.image, log, self.done), bars)
        whole = drawn.bytes_over_calls(actions, log)[-1]
        points = drawn.bytes_over_calls(played(self.tape), log)
        drawn.bytes_curve(points, curve, calls=whole.calls, hashed=whole.hashed)


def _digest_row(row: tuple[str, str]) -> str:
    name, value = row
    shown = escape(value or "not started")
    return (
        f'<tr><th scope="row" style="text-align:left;padding-right:10px">{escape(name)}</th>'
        f'<td><code data-digest="{escape(name)}" style="font-size:11px">{shown}</code></td></tr>'
    )


def _log_html(log: Sequence[Record], done: int) -> str:
    """The records around the last one, numbered from 1; the last one is marked."""
    first = max(min(done - _NEIGHBOURS, len(log) - 2 * _NEIGHBOURS), 0)
    lines = []
    for number, record in enumerate(log[first : first + 2 * _NEIGHBOURS], start=first + 1):
        line = f"{number:>3}  {record.call:<12}  {record.gpa:#010x}  {len(record.data)} bytes"
        lines.append(f"> {line}" if number == done else f"  {line}")
    if len(log) > len(lines):
        lines.append(f"    of {len(log)} records")
    body = escape("\n".join(lines) or "the log is empty")
    return f'<pre style="font-size:11px;line-height:1.3;margin:4px 0 0">{body}</pre>'
