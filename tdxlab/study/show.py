"""Things that a notebook cell can end with: a table, a drawing, a picture.

Each shows itself richly where it can and always has a `text/plain` with the numbers behind it: what
readers without pictures get, and what a re-run compares.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

#: Columns whose values are addresses, shown in hex.
ADDRESS_COLUMNS = frozenset({"tdr", "owner", "hpa", "gpa", "entry_hpa", "raw"})


def cell_text(column: str, value: object) -> str:
    """A value as a table shows it: addresses in hex, everything else as it prints."""
    if column in ADDRESS_COLUMNS and isinstance(value, int):
        return f"{value:#x}"
    return str(value)


def text_table(rows: Sequence[Any]) -> str:
    """NamedTuples of one class as aligned text; numbers stand at the right. "(none)" without rows.

    Equal to what `Table` prints.
    """
    if not rows:
        return "(none)"
    columns: tuple[str, ...] = rows[0]._fields
    body = [
        [cell_text(name, value) for name, value in zip(columns, row, strict=True)] for row in rows
    ]
    is_number = [isinstance(value, int) for value in rows[0]]
    widths = [max(map(len, texts)) for texts in zip(columns, *body, strict=True)]
    lines = [
        "  ".join(
            text.rjust(width) if right else text.ljust(width)
            for text, width, right in zip(texts, widths, is_number, strict=True)
        ).rstrip()
        for texts in (columns, *body)
    ]
    return "\n".join(lines)


class Table:
    """Rows (NamedTuples of one class) that a notebook shows as a table."""

    def __init__(self, rows: Iterable[Any]) -> None:
        self.rows = list(rows)

    def __repr__(self) -> str:
        return text_table(self.rows)

    def _repr_html_(self) -> str:
        if not self.rows:
            return "<p>(none)</p>"
        columns: tuple[str, ...] = self.rows[0]._fields
        head = "".join(f'<th scope="col">{escape(name)}</th>' for name in columns)
        body = "".join(f"<tr>{_html_cells(columns, row)}</tr>" for row in self.rows)
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _html_cells(columns: Sequence[str], row: Sequence[object]) -> str:
    return "".join(
        f"<td>{escape(cell_text(name, value))}</td>"
        for name, value in zip(columns, row, strict=True)
    )


class Drawing:
    """An SVG string with the text that says the same."""

    def __init__(self, svg: str, text: str) -> None:
        self.svg = svg
        self.text = text

    def __repr__(self) -> str:
        return self.text

    def _repr_svg_(self) -> str:
        return self.svg


class Picture:
    """A PNG with the text that says the same."""

    def __init__(self, png: bytes, text: str) -> None:
        self.png = png
        self.text = text

    def __repr__(self) -> str:
        return self.text

    def _repr_png_(self) -> bytes:
        return self.png
