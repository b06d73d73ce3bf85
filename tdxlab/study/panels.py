"""The panel that every notebook's panel is made of: buttons, a position, two views, a sentence.

    class MyPanel(Panel):
        title = "..."
        def views(self) -> dict[str, str]: ...      # heading -> SVG or HTML; two views of one event
        def summary(self) -> str: ...               # one sentence on the present state
        def numbers(self) -> dict[str, int]: ...    # what a re-run and a reader compare
        def figure(self, figure: Figure) -> None: ...   # optional: bars and curves

A panel stands on a tape. What it shows is a function of the tape's first `position` actions alone:
hooks read `self.machine` and `self.tape`, keep nothing, and are called after every event.

* Buttons have effects, sliders only choose. The one exception is the position slider, which seeks;
  it may skip positions when it is fast, and ends in the right state all the same.
* A subclass makes its own controls in `controls()`, buttons with `self.button(...)`. It sets the
  attributes that its hooks read before `super().__init__(tape)`. A handler acts through the tape.
* What a handler raises is shown in the panel and in its text, never printed or lost.
* `panel.step.click()` in a cell does what a click in the browser does.

Everything can be reached with Tab, Space and the arrow keys. The sentence is a live region, which a
screen reader says when it changes.
Differs: ipywidgets replaces the element of the live region together with its text; whether that is
announced depends on the screen reader. It names neither a slider's handle nor an image: what the
figure shows is in the numbers below it. And it keeps a second change of the same control back until
the kernel has answered the first, but never a click: who changes a menu twice and presses a button
while the kernel is busy may get the first choice.
"""

from __future__ import annotations

import hashlib
import traceback
from base64 import b64encode
from collections.abc import Callable, Sequence
from html import escape
from threading import RLock
from typing import Any

import ipywidgets
from matplotlib.figure import Figure

from tdxlab.abi.leaves import GUEST_LEAVES, HOST_LEAVES
from tdxlab.scenarios import answer
from tdxlab.study.plots import Canvas
from tdxlab.tape import Action, Tape

PLAY_MILLISECONDS = 700
_WIDE = {"width": "100%", "max_width": "900px"}
_TIGHT = "line-height:1.4"
#: Where the focus is, told more strongly than by default; views are drawn for a light page.
_STYLE = (
    "<style>.tdxlab-panel :focus-visible,.tdxlab-panel .jupyter-widgets input:focus-visible"
    "{outline:2px solid #0072b2!important;outline-offset:1px}"
    ".tdxlab-panel .tdxlab-view{background:#fff;color:#212121}"
    ".tdxlab-panel .tdxlab-view p"
    "{margin:4px 0;padding-right:12px;line-height:1.4;box-sizing:border-box}</style>"
)
_DIGEST_DIGITS = 12


class Panel:
    """A tape with reset, back, step, play and scrub, and views of the state it stands at.

    tape: the panel's own; nobody else moves it. title: shown above. figure_height: inches, 0 for
    a panel without a figure.
    reset, back, step: buttons; play: a toggle; scrub: the position slider.
    error: what the last handler raised, "" if nothing.
    """

    title = "Panel"
    figure_height = 2.6

    def __init__(self, tape: Tape) -> None:
        self.tape = tape
        self.error = ""
        self._alone = RLock()
        self.reset = self.button(
            "Reset", "tdxlab-reset", lambda: self.tape.seek(0), icon="fast-backward"
        )
        self.back = self.button("Back", "tdxlab-back", self._go_back, icon="step-backward")
        self.step = self.button("Step", "tdxlab-step", self._go_on, icon="step-forward")
        self.play, self.scrub = self._player()
        self._canvas = Canvas(self.figure_height) if self.figure_height else None
        self._problem = _html("tdxlab-error")
        self._sentence = _html("tdxlab-summary")
        self._line = _html("tdxlab-trace")
        self._numbers = _html("tdxlab-numbers")
        self._views = ipywidgets.HBox(layout={"flex_flow": "row wrap", **_WIDE})
        self._image = ipywidgets.Image(format="png", layout={"max_width": "100%"})
        self._image.add_class("tdxlab-figure")
        self.widget = self._layout(list(self.controls()))
        self.draw()

    # -- what a subclass says

    def views(self) -> dict[str, str]:
        """Heading -> SVG or HTML of each view, in the order shown; two of them fit a row."""
        return {}

    def summary(self) -> str:
        """The present state in one sentence."""
        return ""

    def numbers(self) -> dict[str, int]:
        """Name -> count: the numbers behind the views."""
        return {}

    def figure(self, figure: Figure) -> None:
        """Draw bars and curves on the panel's one figure (see `plots.side_by_side`)."""

    def controls(self) -> Sequence[ipywidgets.Widget]:
        """The subclass's own controls, shown in a row below the common ones."""
        return ()

    # -- what a subclass uses

    @property
    def machine(self) -> Any:
        """The machine that the tape is in."""
        return self.tape.machine

    def button(
        self,
        description: str,
        css_class: str,
        handler: Callable[[], object],
        *,
        icon: str = "",
        tooltip: str = "",
    ) -> ipywidgets.Button:
        """A button that calls `handler` and then redraws the panel.

        css_class: by which tests and styles find it.
        """
        layout = {"width": "auto"}
        made = ipywidgets.Button(description=description, icon=icon, tooltip=tooltip, layout=layout)
        made.add_class(css_class)
        made.on_click(lambda _: self.act(handler))
        return made

    def act(self, handler: Callable[[], object]) -> None:
        """Call `handler` and redraw; what either raises is shown in the panel.

        One at a time: what the browser reports may arrive in another thread than the cells'.
        """
        with self._alone:
            self.error = ""
            self._problem.value = ""
            for part in (handler, self.draw):
                try:
                    part()
                except Exception as problem:
                    self._show_problem(problem)

    def draw(self) -> None:
        """Show the present state everywhere."""
        self._put_slider(self.tape.position, max(len(self.tape), 1))
        self._clock.max = len(self.tape)
        self._sentence.value = _live(f"{self._where()}: {self.summary()}")
        line = escape(trace_line(self.tape.last))
        self._line.value = f'<div style="{_TIGHT}"><code>{line}</code></div>'
        self._numbers.value = _number_list(self.numbers())
        self._draw_views(self.views())
        if self._canvas is not None:
            self._image.value = self.png()

    def say(self, sentence: str) -> None:
        """Say how far a long action has come; the panel's own sentence is back when it is over."""
        self._sentence.value = _live(sentence)

    # -- moving along the tape

    def _go_back(self) -> None:
        if self.tape.position == 0:
            raise ValueError("this is the beginning: there is no step to take back")
        self.tape.seek(self.tape.position - 1)

    def _go_on(self) -> None:
        if self.tape.position == len(self.tape):
            raise ValueError("this is the end of the tape: go back, or reset")
        self.tape.seek(self.tape.position + 1)

    def _player(self) -> tuple[ipywidgets.ToggleButton, ipywidgets.IntSlider]:
        """The play button and the slider. The clock between them runs in the browser: the button
        starts and stops it, its ticks move the slider, and it goes along when the slider moves.

        Where the clock is, the browser alone knows: it is late here, and an answer, such as one
        that fits it to another end of the tape, would move the slider back in the browser.
        """
        play = ipywidgets.ToggleButton(
            description="Play", icon="play", tooltip="run to the end", layout={"width": "auto"}
        )
        play.add_class("tdxlab-play")
        scrub = ipywidgets.IntSlider(
            description="position", tooltip="steps done so far", layout={"flex": "1 1 240px"}
        )
        scrub.add_class("tdxlab-scrub")
        scrub.observe(self._scrubbed, names="value")
        self._clock = ipywidgets.Play(interval=PLAY_MILLISECONDS, layout={"display": "none"})
        self._clock.keys.remove("value")
        # A link begins with its first end's value: a page that is loaded anew asks the slider.
        self._ties = (
            ipywidgets.jslink((play, "value"), (self._clock, "playing")),
            ipywidgets.jslink((scrub, "value"), (self._clock, "value")),
        )
        return play, scrub

    def _put_slider(self, position: int, end: int) -> None:
        """Move the slider so that its value is within its bounds after every message.

        The browser would cut any other value down to the bounds, and tell us the result as if a
        reader had moved the slider.
        """
        self.scrub.max = max(end, self.scrub.max)
        self.scrub.value = position
        self.scrub.max = end

    def _scrubbed(self, change: dict[str, Any]) -> None:
        if change["new"] != self.tape.position:
            self.act(lambda: self.tape.seek(change["new"]))

    # -- how it looks

    def _layout(self, own: list[ipywidgets.Widget]) -> ipywidgets.VBox:
        heading = ipywidgets.HTML(f"{_STYLE}<strong>{escape(self.title)}</strong>")
        common = [self.reset, self.back, self.step, self.play, self.scrub, self._clock]
        rows = [heading, ipywidgets.HBox(common, layout={"flex_flow": "row wrap", **_WIDE})]
        if own:
            rows.append(ipywidgets.HBox(own, layout={"flex_flow": "row wrap", **_WIDE}))
        rows += [self._problem, self._sentence, self._line, self._views]
        rows += [self._image] if self._canvas is not None else []
        box = ipywidgets.VBox([*rows, self._numbers], layout=_WIDE)
        box.add_class("tdxlab-panel")
        return box

    def _draw_views(self, views: dict[str, str]) -> None:
        if len(self._views.children) != len(views):
            self._views.children = [_html("tdxlab-view") for _ in views]
        for widget, (heading, content) in zip(self._views.children, views.items(), strict=True):
            widget.value = (
                f'<div style="{_TIGHT}"><strong>{escape(heading)}</strong></div>{content}'
            )

    def _show_problem(self, problem: Exception) -> None:
        """A mistake of the user is a sentence; anything else also says where it happened."""
        is_mistake = isinstance(problem, ValueError)
        self.error = str(problem) if is_mistake else f"{type(problem).__name__}: {problem}"
        details = ""
        if not is_mistake:
            lines = escape("".join(traceback.format_exception(problem)))
            details = f"<details><summary>where it happened</summary><pre>{lines}</pre></details>"
        self._problem.value = (
            f'<div role="alert" style="border-left:4px solid #d55e00;padding-left:8px">'
            f"{escape(self.error)}{details}</div>"
        )

    def _where(self) -> str:
        return f"Step {self.tape.position} of {len(self.tape)}"

    # -- outside the browser

    def png(self) -> bytes:
        """The panel's figure at the present state; b"" for a panel without one."""
        if self._canvas is None:
            return b""
        self.figure(self._canvas.figure)
        return self._canvas.png()

    def text(self) -> str:
        """The panel in words: sentence, trace line, numbers, and a digest of every view."""
        lines = [self.title, f"{self._where()}: {self.summary()}", trace_line(self.tape.last)]
        lines += [f"{name}: {value}" for name, value in self.numbers().items()]
        lines += [f"{heading}: view {digest(view)}" for heading, view in self.views().items()]
        lines += [f"error: {self.error}"] if self.error else []
        return "\n".join(line for line in lines if line)

    def __repr__(self) -> str:
        return self.text()

    def _repr_mimebundle_(self, **_: object) -> dict[str, Any]:
        bundle: dict[str, Any] = {
            "text/plain": self.text(),
            "application/vnd.jupyter.widget-view+json": {
                "version_major": 2,
                "version_minor": 0,
                "model_id": self.widget.model_id,
            },
        }
        if self._canvas is not None:
            bundle["image/png"] = b64encode(self._image.value).decode()
        return bundle


def digest(view: str) -> str:
    """A short digest of a view: equal views, equal digests."""
    return hashlib.sha256(view.encode()).hexdigest()[:_DIGEST_DIGITS]


def trace_line(action: Action | None) -> str:
    """One action in one line: what was called on which LP with which registers, and the answer."""
    if action is None:
        return "nothing has happened yet"
    given = " ".join(f"{_upper(name)}={value:#x}" for name, value in action.inputs.items())
    came = [answer(action)] + [
        f"{name.upper()}={value:#x}"
        for name, value in action.outputs.items()
        if value and value != action.inputs.get(name)
    ]
    line = f"LP {action.lp}  {action.kind} {action.name}  {given}"
    return f"{line}  ->  {' '.join(came)}" if any(came) else line


def _upper(name: str) -> str:
    return name.upper() if name.startswith("r") else name


def operand_rows(action: Action) -> list[tuple[str, int, str]]:
    """(register, value, meaning) of each input of a SEAMCALL or TDCALL; [] for other actions."""
    leaves = {"SEAMCALL": HOST_LEAVES, "TDCALL": GUEST_LEAVES}.get(action.kind)
    if leaves is None:
        return []
    leaf = leaves.get(action.inputs["rax"] & 0xFFFF)
    meanings = {"rax": "leaf number"} | (leaf.inputs if leaf else {})
    return [
        (name.upper(), action.inputs.get(name, 0), meaning) for name, meaning in meanings.items()
    ]


def _html(css_class: str) -> ipywidgets.HTML:
    made = ipywidgets.HTML(layout={"max_width": "100%"})
    made.add_class(css_class)
    return made


def _live(sentence: str) -> str:
    return (
        f'<div role="status" aria-live="polite" aria-atomic="true" style="{_TIGHT}">'
        f"{escape(sentence)}</div>"
    )


def _number_list(numbers: dict[str, int]) -> str:
    """The numbers in a row, each findable by its name."""
    return "".join(
        '<span style="display:inline-block;margin-right:12px">'
        f'{escape(name)} <b data-number="{escape(name)}">{value}</b></span>'
        for name, value in numbers.items()
    )
