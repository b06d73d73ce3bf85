"""The rows of the console in which registers are filled: by the name of a thing, or by hand."""

from __future__ import annotations

from html import escape
from typing import Any

import ipywidgets

from tdxlab.study.things import BY_HAND, resolve


class RegisterRow:
    """One register: its name, a choice of things, its value in hex, and what the leaf reads there.

    `things` chooses a thing and fills in its value; `text` takes any number and sets the choice to
    BY_HAND. The value follows the chosen thing when that moves on.
    """

    def __init__(self, register: str) -> None:
        self.register = register
        self._held: dict[str, int] = {}
        self._is_busy = False
        name = ipywidgets.HTML(f"<code>{register.upper()}</code>", layout={"width": "36px"})
        self.things = ipywidgets.Dropdown(options=[BY_HAND], layout={"width": "210px"})
        self.things.add_class(f"tdxlab-{register}-thing")
        self.text = ipywidgets.Text(value="0x0", layout={"width": "180px"})
        self.text.add_class(f"tdxlab-{register}")
        self._meaning = ipywidgets.HTML()
        self.things.observe(self._chosen, names="value")
        self.text.observe(self._typed, names="value")
        self.widget = ipywidgets.HBox([name, self.things, self.text, self._meaning])

    def show(self, meaning: str | None) -> None:
        """Say what the leaf reads here; hide the row if it reads nothing (None)."""
        self.widget.layout.display = "none" if meaning is None else ""
        self._meaning.value = f"<small>{escape(meaning or '')}</small>"

    def offer(self, held: dict[str, int]) -> None:
        """Offer these things. The choice stays while its thing is there; the number stays else."""
        self._held = held
        choice = self.things.value
        self._is_busy = True
        if self.things.options != (BY_HAND, *held):
            self.things.options = (BY_HAND, *held)
        self._is_busy = False
        self.choose(choice if choice in held else BY_HAND)

    def choose(self, thing: str) -> None:
        """Fill in a thing by its name; BY_HAND keeps the number that is there."""
        self._is_busy = True
        self.things.value = thing if thing in self._held else BY_HAND
        if thing in self._held:
            self.text.value = f"{self._held[thing]:#x}"
        self._is_busy = False

    def fill(self, value: int | str) -> None:
        """Fill in a number, or a thing by its name. Refuses an unknown name: ValueError."""
        if isinstance(value, str) and value in self._held:
            self.choose(value)
        else:
            self.text.value = f"{resolve(value, self._held):#x}"
            self.choose(BY_HAND)

    @property
    def value(self) -> int:
        """The number to put into the register. Refuses a text that is none: ValueError."""
        return resolve(self.text.value.strip(), self._held)

    def _chosen(self, change: dict[str, Any]) -> None:
        if not self._is_busy:
            self.choose(change["new"])

    def _typed(self, _change: dict[str, Any]) -> None:
        if not self._is_busy:
            self.choose(BY_HAND)
