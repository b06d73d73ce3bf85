"""The exercises of notebook 07: converting memory; every answer is what the model does."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

from tdxlab.arch import PAGE_SIZE, SIZE_2M
from tdxlab.guest import MapGpa
from tdxlab.machine import Machine
from tdxlab.sizes import format_size
from tdxlab.study.convert_lab import (
    PRIVATE,
    PRIVATE_CONTENT,
    SHARED,
    SHARED_CONTENT,
    ZEROS,
    ConvertLab,
)
from tdxlab.study.convert_views import short_name
from tdxlab.study.exercises import Exercise, Variant
from tdxlab.study.zap_matrix import SW_PROTECTED, TDX, observe

# -- 07.1: the matrix

_CAUSES = (
    "becomes shared",
    "MMU notifier: munmap",
    "slot deleted",
    "becomes private",
    "punch hole",
    "zap_all_fast",
)
_ROOTS = {"mirror", "direct"}


@cache
def _observed(vm_type: str, cause: str) -> Any:
    """A row of the matrix."""
    return observe(vm_type, cause)


def _which_roots(gpaw: int, seed: int) -> Variant:
    cause = _CAUSES[seed % len(_CAUSES)]
    right = frozenset(_observed(TDX, cause).roots.split(" + "))

    def hint(given: Any) -> str:
        words = {str(word).strip().casefold() for word in given}
        if not words <= _ROOTS:
            return f"Roots are {' and '.join(sorted(_ROOTS))}; give a set of one or both."
        if words < right:
            return "One more root loses entries. Which memory do the pages of the other one back?"
        return (
            "Ask which kind of memory the cause speaks of: an HVA is shared memory, a page of a "
            f"guest_memfd private memory. Look at observe(TDX, {cause!r})."
        )

    question = f'A TD; "{cause}". Which roots lose entries? Give a set of "mirror" and "direct".'
    return Variant(question, right, hint)


# -- 07.2: SEAMCALLs


@cache
def _calls_to_shared(gpaw: int, pages: int, used: int) -> int:
    """SEAMCALLs that touch the Secure EPT when `pages` pages become shared, `used` of them used."""
    machine = Machine(gpaw=gpaw, memory="1 GiB", lps=2, packages=1)
    td = machine.create_td(memory=2 * SIZE_2M)
    td.touch(0, used * PAGE_SIZE)
    before = dict(machine.seamcalls)
    td.convert(0, pages * PAGE_SIZE, to=SHARED)
    return sum(
        calls - before.get(leaf, 0)
        for leaf, calls in machine.seamcalls.items()
        if leaf != "TDH.VP.ENTER"
    )


def _count_calls(gpaw: int, seed: int) -> Variant:
    dice = random.Random(seed)
    pages, used = (dice.randrange(20, 60), dice.randrange(5, 20)) if seed else (512, 100)
    right = _calls_to_shared(gpaw, pages, used)

    def hint(given: int) -> str:
        if given == right // used * pages:
            return "That is for pages that are all mapped. What is there to do for the others?"
        if given % used == 0 and given:
            return (
                f"{given // used} for each page that is mapped? Step through one page in the "
                "panel and count; none of the calls is shared by two pages."
            )
        return "Nothing depends on the size alone: count what has to be done for one mapped page."

    question = (
        f"{pages} private pages become shared with one MapGPA; the guest had used {used} of them. "
        "How many SEAMCALLs is that, without TDH.VP.ENTER?"
    )
    return Variant(question, right, hint)


# -- 07.3: exits


@cache
def _exits(gpaw: int, size: int) -> int:
    td = Machine(gpaw=gpaw, memory="1 GiB", lps=2, packages=1).create_td(memory="64 MiB")
    return len(td.run([MapGpa(td.guest.shared_mask, size)]).exits)


def _count_exits(gpaw: int, seed: int) -> Variant:
    dice = random.Random(seed)
    size = (dice.randrange(2, 12) * SIZE_2M + dice.choice((0, PAGE_SIZE))) if seed else 5 * SIZE_2M
    size += 0 if seed else PAGE_SIZE
    right = _exits(gpaw, size)

    def hint(given: int) -> str:
        if given == size // PAGE_SIZE:
            return "One exit speaks of many pages. What is the most that KVM asks for at once?"
        if abs(given - right) == 1:
            return "Nearly. What happens to the part that is left over?"
        return "Compare the sizes in chunk_rows(GPAW) with their exits."

    question = (
        f"The guest asks with one MapGPA for {format_size(size)}. How many KVM_EXIT_HYPERCALLs "
        "does the VMM see?"
    )
    return Variant(question, right, hint)


# -- 07.4: content


class _Story(NamedTuple):
    """What happens to a page in which the guest has written private data."""

    words: str
    play: Callable[[ConvertLab], object]


def _there_and_back(lab: ConvertLab, *, punch: bool = False) -> None:
    lab.convert(0, 1, to=SHARED, punch=punch)
    lab.access(0, 1, write=True)
    lab.convert(0, 1, to=PRIVATE, punch=punch)


def _twice(lab: ConvertLab, *, punch: bool = False) -> None:
    _there_and_back(lab, punch=punch)
    lab.access(0, 1, write=True)
    lab.convert(0, 1, to=SHARED, punch=punch)


_KEEPS = "the VMM discards nothing"
_PUNCHES = "the VMM discards the unused copy each time"
_STORIES = (
    _Story(f"it becomes shared, is written, becomes private ({_KEEPS})", _there_and_back),
    _Story(
        f"it becomes shared, is written, becomes private, is written, becomes shared ({_KEEPS})",
        _twice,
    ),
    _Story(
        f"it becomes shared, is written, becomes private, is written, becomes shared ({_PUNCHES})",
        lambda lab: _twice(lab, punch=True),
    ),
    _Story(
        "the guest asks for it to become private, which it is already",
        lambda lab: lab.convert(0, 1, to=PRIVATE),
    ),
    _Story(
        "the guest reads it with the shared bit set, without MapGPA",
        lambda lab: lab.access_unasked(0, 1, to=SHARED),
    ),
)
_CONTENTS = (PRIVATE_CONTENT, SHARED_CONTENT, ZEROS)


@cache
def _content_after(gpaw: int, number: int) -> str:
    lab = ConvertLab(gpaw=gpaw)
    _STORIES[number].play(lab)
    return lab.rows()[0].guest_reads


def _what_is_read(gpaw: int, seed: int) -> Variant:
    number = seed % len(_STORIES)
    right = _content_after(gpaw, number)

    def hint(given: str) -> str:
        if str(given).strip().casefold() not in _CONTENTS:
            return f"{given!r} is none of the contents; choose from {', '.join(_CONTENTS)}."
        return (
            "Follow the two copies apart: the page of the guest_memfd and the VMM's page. Which of "
            "them is cleared, and when? The panel's last row shows both."
        )

    question = (
        f"The guest has written a private page; then {_STORIES[number].words}. What does the guest "
        f"read there next: {', '.join(_CONTENTS)}?"
    )
    return Variant(question, right, hint)


# -- 07.5: back again


@cache
def _calls_back(gpaw: int, pages: int, again: int) -> tuple[int, int]:
    """(SEPT.ADD, PAGE.AUG) when `pages` pages went to shared and back, and `again` are used."""
    lab = ConvertLab(gpaw=gpaw)
    lab.convert(0, pages, to=SHARED)
    lab.convert(0, pages, to=PRIVATE)
    before = lab.seamcalls()
    lab.access(0, again)
    calls = {short_name(leaf): n - before[leaf] for leaf, n in lab.seamcalls().items()}
    return calls["SEPT.ADD"], calls["PAGE.AUG"]


def _count_back(gpaw: int, seed: int) -> Variant:
    dice = random.Random(seed)
    pages = dice.randrange(8, 17) if seed else 16
    again = dice.randrange(2, 8) if seed else 5
    right = _calls_back(gpaw, pages, again)

    def hint(given: Any) -> str:
        if len(given) != 2:
            return "Give a pair: SEPT.ADDs, then PAGE.AUGs."
        if given[0] != right[0]:
            return "Were the tables of the Secure EPT taken away together with the pages?"
        return "The conversion maps nothing; each first access maps the page that it needs."

    question = (
        f"{pages} pages that the guest had used become shared, and private again. Then the guest "
        f"uses {again} of them. How many TDH.MEM.SEPT.ADD and how many TDH.MEM.PAGE.AUG does this "
        "last step take? Give a pair."
    )
    return Variant(question, right, hint)


# -- 07.6: two types of VM


def _other_vm(gpaw: int, seed: int) -> Variant:
    causes = ("MMU notifier: munmap", "becomes shared", "slot deleted", "punch hole")
    cause = causes[seed % len(causes)]
    row = _observed(SW_PROTECTED, cause)
    right = (row.private + row.shared, row.private_data == "kept")

    def hint(given: Any) -> str:
        if len(given) != 2 or not isinstance(given[1], bool):
            return "Give a pair: how many pages lose their mapping, and True if the data is kept."
        if given[0] != right[0]:
            return "How many roots does this VM have, and can KVM tell the kinds apart in them?"
        return (
            "Losing a mapping is one thing, losing the page behind it another. Which of the two "
            "does the cause take away?"
        )

    question = (
        f'An SW_PROTECTED VM uses 4 private and 4 shared pages of a slot; "{cause}" strikes the '
        "whole slot. How many of the 8 pages lose their mapping, and is the data of the private "
        "ones kept (True or False)? Give a pair."
    )
    return Variant(question, right, hint)


# -- 07.7: without asking


@cache
def _unasked(gpaw: int, pages: int, to: str) -> tuple[str, int]:
    """(kind of exit, number) when the guest uses pages as the other kind without MapGPA."""
    lab = ConvertLab(gpaw=gpaw)
    if to == PRIVATE:
        lab.convert(0, pages, to=SHARED)
    exits = [type(exit_).__name__ for exit_ in lab.access_unasked(0, pages, to=to).exits]
    return exits[0], len(exits)


def _implicit(gpaw: int, seed: int) -> Variant:
    dice = random.Random(seed)
    pages, to = (dice.randrange(2, 16), dice.choice((SHARED, PRIVATE))) if seed else (6, SHARED)
    right = _unasked(gpaw, pages, to)
    was = PRIVATE if to == SHARED else SHARED

    def hint(given: Any) -> str:
        if len(given) != 2:
            return 'Give a pair such as ("HypercallExit", 1).'
        if str(given[0]).strip().casefold() != right[0].casefold():
            return "No hypercall was made, so no hypercall exit comes. What does KVM find instead?"
        return "Each fault speaks of one page. What does the guest do when it comes back?"

    question = (
        f"The guest uses {pages} {was} pages as {to} memory without having asked, and the VMM "
        "converts what it must. Which exits does the VMM see, and how many? Give a pair of a class "
        "of tdxlab.kvm.exits and a number."
    )
    return Variant(question, right, hint)


EXERCISES = (
    Exercise("07.1", _which_roots),
    Exercise("07.2", _count_calls),
    Exercise("07.3", _count_exits),
    Exercise("07.4", _what_is_read),
    Exercise("07.5", _count_back),
    Exercise("07.6", _other_vm),
    Exercise("07.7", _implicit),
)
