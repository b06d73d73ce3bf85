"""Drawings of a VM of any type: where each page is mapped, and what code believes of the VM."""

from __future__ import annotations

from collections.abc import Callable

from matplotlib.axes import Axes

from tdxlab.arch import PAGE_SHIFT, SIZE_2M
from tdxlab.kvm.vm_types import WAYS, VmFeatures, wrong_answers
from tdxlab.study.palette import BLACK, BLUE, GREEN, ORANGE, PURPLE, SKY, WHITE, YELLOW, Look
from tdxlab.study.plots import bars
from tdxlab.study.show import Table
from tdxlab.study.svg import drawing, text, tile
from tdxlab.study.vmtype_lab import TypeLab
from tdxlab.study.zap_matrix import PAGES

_CELL, _LEFT, _TOP, _ROW, _GAP = 20, 118, 34, 26, 18
_SLOTS = (0, SIZE_2M >> PAGE_SHIFT)
#: Rows of a table stand close, so that the panel fits a small screen.
_TIGHT = 'style="padding:2px 8px"'

PRIVATE = Look("private", GREEN, BLACK, "P", "")
SHARED = Look("shared", ORANGE, BLACK, "S", "//")
DIRECT = Look("direct", SKY, BLACK, "D", "\\\\")
MIRROR = Look("mirror", BLUE, WHITE, "M", "")
ASSIGNED = Look("RMP: the guest's", PURPLE, BLACK, "R", "..")
IN_FILE = Look("guest_memfd has it", YELLOW, BLACK, "F", "xx")
NOTHING = Look("none", WHITE, BLACK, "", "")

#: Counts of the panel -> how they are drawn.
_BARS = {
    "direct": DIRECT,
    "mirror": MIRROR,
    "RMP entries": ASSIGNED,
    "RMP updates": ASSIGNED,
    "SEAMCALLs": MIRROR,
    "flushes": SHARED,
}


def pages_svg(lab: TypeLab) -> str:
    """Every page of both slots: its attribute, where it is mapped, whose it is."""
    leaves, owned = lab.counts().leaves, lab.owned()
    rows: dict[str, Callable[[int], Look]] = {
        "attribute": lambda gfn: PRIVATE if lab.is_private_gfn(gfn) else SHARED,
        "direct root": lambda gfn: DIRECT if ("direct", gfn) in leaves else NOTHING,
        "mirror": lambda gfn: MIRROR if ("mirror", gfn) in leaves else NOTHING,
        "RMP": lambda gfn: ASSIGNED if gfn in owned else NOTHING,
        "guest_memfd": lambda gfn: IN_FILE if _in_file(lab, gfn) else NOTHING,
    }
    body = []
    for number, slot in enumerate(_SLOTS):
        x = _LEFT + number * (PAGES * _CELL + _GAP)
        body.append(text(x, 13, f"slot {number}, gfn {slot:#x} on", size=11))
        body += [text(x + i * _CELL + 6, 28, str(i), size=10, colour="#555") for i in range(PAGES)]
    for place, (name, look_of) in enumerate(rows.items()):
        y = _TOP + place * _ROW
        body.append(text(2, y + 15, name, size=11))
        body += [_page(lab, gfn, y, look_of(gfn)) for gfn in _gfns()]
    width = _LEFT + 2 * PAGES * _CELL + _GAP + 4
    return drawing(width, _TOP + len(rows) * _ROW + 4, _said(lab), body)


def _gfns() -> list[int]:
    return [slot + page for slot in _SLOTS for page in range(PAGES)]


def _page(lab: TypeLab, gfn: int, y: int, look: Look) -> str:
    slot = int(gfn >= _SLOTS[1])
    x = _LEFT + slot * (PAGES * _CELL + _GAP) + (gfn - _SLOTS[slot]) * _CELL
    return tile(x, y, look, size=_CELL - 2, hint=f"gfn {gfn:#x}: {look.name}")


def _in_file(lab: TypeLab, gfn: int) -> bool:
    backing = lab.gate.backing_of(gfn << PAGE_SHIFT)
    if backing is None or backing.gmem < 0 or not lab.gate.guest_memory.is_open(backing.gmem):
        return False
    folio = lab.gate.guest_memory.folio(backing.gmem, gfn - (backing.gpa >> PAGE_SHIFT))
    return folio is not None


def _said(lab: TypeLab) -> str:
    leaves, owned = lab.counts().leaves, lab.owned()
    direct = sum(root == "direct" for root, _ in leaves)
    private = sum(lab.is_private_gfn(gfn) for gfn in _gfns())
    return (
        f"Pages of the {lab.name} VM: {private} private by attribute, {direct} mapped in the "
        f"direct root, {len(leaves) - direct} in the mirror, {len(owned)} assigned in the RMP"
    )


def beliefs_html(lab: TypeLab) -> str:
    """What each way answers about the VM as it is now; wrong answers are marked."""
    vm = lab.gate.vm
    kind = lab.kind._replace(launched=vm.pre_fault_allowed)
    columns = {"flags now": vm.features._replace(pre_fault_allowed=vm.pre_fault_allowed)}
    columns |= {f"by {name}": way(kind) for name, way in WAYS.items() if name != "flags"}
    wrong = {f"by {name}": wrong_answers(kind, way) for name, way in WAYS.items()}
    head = "".join(f'<th scope="col" {_TIGHT}>{name}</th>' for name in ("question", *columns))
    body = ""
    for question in VmFeatures._fields:
        cells = "".join(
            _answer(getattr(answers, question), question in wrong.get(name, ()))
            for name, answers in columns.items()
        )
        body += f'<tr><th scope="row" {_TIGHT}>{question}</th>{cells}</tr>'
    return f'<table style="font-size:12px;line-height:1.35"><tr>{head}</tr>{body}</table>'


def _answer(said: bool, is_wrong: bool) -> str:
    return f"<td {_TIGHT}>{'yes' if said else 'no'}{' <b>(wrong)</b>' if is_wrong else ''}</td>"


def history_html(lab: TypeLab) -> str:
    """The deeds that are done, and what each came to."""
    rows = lab.history()
    if not rows:
        return '<p style="line-height:1.4">nothing yet</p>'
    return str(Table(rows)._repr_html_()).replace(
        "<table>", '<table style="font-size:12px;line-height:1.35">'
    )


def plot_counts(numbers: dict[str, int], name: str, ax: Axes) -> Axes:
    """Counts of one VM as bars. numbers: of the panel."""
    values = [numbers[each] for each in _BARS]
    looks = list(_BARS.values())
    return bars(ax, list(_BARS), values, looks, unit="count", title=f"counts: {name}")
