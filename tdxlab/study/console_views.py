"""The console's views as HTML: an answer decoded, registers before and after, the books."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from tdxlab.study.answers import Reply
from tdxlab.study.books import KEYID, SEPT, TD, VCPU, Books, Change
from tdxlab.study.palette import GREEN, GREY, SKY, VERMILLION, YELLOW

#: Kind of an answer -> colour of its bar, and the mark that says the same.
_KINDS = {
    "done": (GREEN, "✓"),
    "warning": (YELLOW, "!"),
    "refused": (VERMILLION, "✗"),
    "in the guest": (SKY, "▶"),
    "left": (GREY, "◀"),
}
_CELL = "padding:1px 8px 1px 0;text-align:left;vertical-align:top"
_BAR = "width:404px;line-height:1.5;padding-left:8px;border-left:6px solid"
_SHOWN = 9


def answer_view(reply: Reply | None) -> str:
    """Status, operand and meaning of the last call, and every register it was given or wrote."""
    if reply is None:
        return "<p>No call has been made. Choose a leaf, fill the registers, press Call.</p>"
    colour, mark = _KINDS[reply.answer.kind]
    status = reply.action.status
    raw = "" if status is None or status < 0 else f"<br><code>RAX {status:#018x}</code>"
    meaning = reply.answer.text.partition(": ")[2]
    blamed = f" blames <b>{reply.answer.operand}</b>" if reply.answer.operand else ""
    return (
        f'<div class="tdxlab-status" style="{_BAR} {colour}">'
        f"{mark} {reply.answer.kind}: <b>{escape(reply.answer.name)}</b>{blamed}{raw}<br>"
        f"<small>{escape(meaning or reply.answer.text)}</small></div>{_registers(reply)}"
    )


def _registers(reply: Reply) -> str:
    given = {name: value for name, value in reply.action.inputs.items() if name != "rax"}
    written = reply.registers
    names = [*given, *(name for name in written if name not in given)]
    if not names:
        return ""
    rows = [
        (
            name.upper(),
            f"{given.get(name, 0):#x}",
            f"{written[name]:#x}" if name in written else "=",
        )
        for name in names
    ]
    return html_table(("register", "before", "after"), rows)


def changes_view(changes: Sequence[Change]) -> str:
    """What the last call changed in the books; the first lines, and how many more there are."""
    if not changes:
        return "<p>nothing</p>"
    rows = [
        (f"{change.line.book} {change.line.what}", change.before, change.after)
        for change in changes[:_SHOWN]
    ]
    more = len(changes) - _SHOWN
    return html_table(("line", "before", "after"), rows) + (f"and {more} more" if more > 0 else "")


def books_view(books: Books) -> str:
    """KeyIDs, TDs, vCPUs and S-EPT entries in use."""
    rows = [
        (book, line.what, text)
        for book in (KEYID, TD, VCPU, SEPT)
        for line, text in books.items()
        if line.book == book
    ]
    return html_table(("book", "line", "says"), rows)


def html_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A plain table of texts."""
    top = "".join(f'<th scope="col" style="{_CELL}">{escape(name)}</th>' for name in head)
    body = "".join(
        "<tr>" + "".join(f'<td style="{_CELL}">{escape(text)}</td>' for text in row) + "</tr>"
        for row in rows
    )
    return f'<table style="font-size:12px;line-height:1.3"><tr>{top}</tr>{body}</table>'
