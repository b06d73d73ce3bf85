"""What a host may do differently when it builds a TD, and whether anybody could tell.

Each change turns one recipe into another. `verdicts` builds both and compares MRTD and the report.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from tdxlab.seam.td import ATTRIBUTES_SEPT_VE_DISABLE
from tdxlab.study.measured_launch import TD_INFO, Recipe, build
from tdxlab.study.measurement_log import (
    CHUNKS,
    PAGE_BY_PAGE,
    PAGE_SIZE,
    SECTION_FIRST,
    Image,
    Page,
    flip_byte,
    measure_chunks,
    move_page,
    replaced,
    swap_with_next,
)

PENDING_GPA = 0x5000_0000
_MOST_PAGES_UP = 64


class Change(NamedTuple):
    """A change that a reader can choose.

    name: what is done. number: what the number means, "" if there is none; least, most: its range.
    apply: (recipe, place of the page, number) -> the other recipe; refuses with a ValueError.
    on_page: True if it is done to one page, False if it is about the whole TD.
    """

    name: str
    apply: Callable[[Recipe, int, int], Recipe]
    number: str = ""
    least: int = 0
    most: int = 0
    on_page: bool = True


def _on_image(edit: Callable[[Image, int, int], Image]) -> Callable[[Recipe, int, int], Recipe]:
    """An edit of an image as a change of the whole recipe."""
    return lambda recipe, place, number: recipe._replace(image=edit(recipe.image, place, number))


def _move_up(image: Image, place: int, pages: int) -> Image:
    return move_page(image, place, _page(image, place).gpa + pages * PAGE_SIZE)


def _add_behind(image: Image, place: int, chunks: int) -> Image:
    """A new page at the next free GPA behind the one at `place`, with its first chunks measured."""
    page, taken = _page(image, place), {page.gpa for page in image}
    gpa = next(g for g in range(page.gpa, page.gpa << 1, PAGE_SIZE) if g not in taken)
    new = Page(page.section, gpa, b"a page more", tuple(range(chunks)))
    return replaced(image, place, page, new)


def _page(image: Image, place: int) -> Page:
    replaced(image, place)
    return image[place]


def _other_order(recipe: Recipe, _place: int, _number: int) -> Recipe:
    order = SECTION_FIRST if recipe.order == PAGE_BY_PAGE else PAGE_BY_PAGE
    return recipe._replace(order=order)


def _add_pending(recipe: Recipe, _place: int, _number: int) -> Recipe:
    gpa = PENDING_GPA + len(recipe.pending) * PAGE_SIZE
    return recipe._replace(pending=(*recipe.pending, gpa))


def _other_attributes(recipe: Recipe, _place: int, _number: int) -> Recipe:
    return recipe._replace(attributes=recipe.attributes ^ ATTRIBUTES_SEPT_VE_DISABLE)


FLIP = Change("flip a byte", _on_image(flip_byte), "byte", 0, PAGE_SIZE - 1)
LEAVE_OUT = Change("leave the page out", _on_image(lambda image, place, _: replaced(image, place)))
ADD = Change("add a page behind it", _on_image(_add_behind), "chunks", 0, CHUNKS)
SWAP = Change(
    "swap with the next page", _on_image(lambda image, place, _: swap_with_next(image, place))
)
MOVE = Change("move the page up", _on_image(_move_up), "pages", 1, _MOST_PAGES_UP)
COVER = Change(
    "measure the first chunks only",
    _on_image(lambda image, place, number: measure_chunks(image, place, tuple(range(number)))),
    "chunks",
    0,
    CHUNKS,
)
BACKWARDS = Change(
    "measure its chunks backwards",
    _on_image(
        lambda image, place, _: measure_chunks(image, place, _page(image, place).chunks[::-1])
    ),
)
OTHER_ORDER = Change("all adds of a section first", _other_order, on_page=False)
VCPU = Change("one more vCPU", lambda r, *_: r._replace(vcpus=r.vcpus + 1), on_page=False)
PENDING = Change("map a page for the guest to accept", _add_pending, on_page=False)
ATTRIBUTES = Change("set SEPT_VE_DISABLE", _other_attributes, on_page=False)
HOST_PAGES = Change(
    "use other host pages", lambda r, *_: r._replace(skip=r.skip + 1), on_page=False
)
WIDTH = Change(
    "the other address width", lambda r, *_: r._replace(gpaw=100 - r.gpaw), on_page=False
)

#: Every change, in the order in which a reader is offered them.
CHANGES = (
    *(FLIP, LEAVE_OUT, ADD, SWAP, MOVE, COVER, BACKWARDS, OTHER_ORDER),
    *(VCPU, PENDING, ATTRIBUTES, HOST_PAGES, WIDTH),
)


class Trial(NamedTuple):
    """A change with its page and number, and a sentence for it."""

    what: str
    change: Change
    place: int = 0
    number: int = 0

    def apply(self, recipe: Recipe) -> Recipe:
        """The recipe after the change."""
        return self.change.apply(recipe, self.place, self.number)


#: One trial of everything, on `SMALL_IMAGE`: pages 0 and 1 are measured, 2 and 3 are only added.
TRIALS = (
    Trial("flip byte 300 of page 0, measured", FLIP, 0, 300),
    Trial("flip byte 300 of page 2, not measured", FLIP, 2, 300),
    Trial("leave page 3 out", LEAVE_OUT, 3),
    Trial("add a page, not measured", ADD, 3, 0),
    Trial("add pages 2 and 3 in the other order", SWAP, 2),
    Trial("move page 2 up by one page", MOVE, 2, 1),
    Trial("measure 15 chunks of page 0 instead of 16", COVER, 0, 15),
    Trial("measure the chunks of page 0 backwards", BACKWARDS, 0),
    Trial("add both BFV pages, then measure both", OTHER_ORDER),
    Trial("create two vCPUs instead of one", VCPU),
    Trial("map a page for the guest to accept", PENDING),
    Trial("set SEPT_VE_DISABLE in ATTRIBUTES", ATTRIBUTES),
    Trial("put everything into other host pages", HOST_PAGES),
    Trial("give the guest the other address width", WIDTH),
)


class Verdict(NamedTuple):
    """What one trial did to MRTD and to TDINFO: "changes" or "stays"; agree: True if the module's
    MRTD equals the one from the log.
    """

    what: str
    mrtd: str
    tdinfo: str
    agree: bool


def verdicts(recipe: Recipe, trials: Iterable[Trial] = TRIALS) -> list[Verdict]:
    """Build a TD from `recipe`, and one more for each trial; compare."""
    mrtd, info = _measure(recipe)[:2]
    rows = []
    for trial in trials:
        other_mrtd, other_info, agree = _measure(trial.apply(recipe))
        rows.append(Verdict(trial.what, said(mrtd, other_mrtd), said(info, other_info), agree))
    return rows


def _measure(recipe: Recipe) -> tuple[str, bytes, bool]:
    """MRTD, TDINFO and whether the log agrees."""
    built = build(recipe)
    return built.mrtd(), built.report()[TD_INFO:], built.agrees()


def said(before: object, after: object) -> str:
    """What became of a value: "stays" or "changes"."""
    return "stays" if before == after else "changes"
