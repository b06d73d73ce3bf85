"""The exercises of notebook 04: what private faults cost; every answer is the model's."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from tdxlab.arch import PAGE_SHIFT, PAGE_SIZE, SIZE_1G
from tdxlab.study.exercises import Exercise, Variant
from tdxlab.study.mirror_lab import PIECES, MirrorLab
from tdxlab.study.mirror_races import busy_fault, meet
from tdxlab.study.mirror_tables import (
    ask_top_down,
    contiguous_table_count,
    sept_rd_count,
)

_LEVELS = {48: 4, 52: 5}


def _counts(lab: MirrorLab, *leaves: str) -> tuple[int, ...]:
    return tuple(lab.count(leaf) for leaf in leaves)


def _started(gpaw: int) -> MirrorLab:
    """A lab in which gfn 0 is mapped."""
    lab = MirrorLab(gpaw=gpaw)
    lab.fault(0)
    return lab


def _is_pair(given: Any, size: int = 2) -> bool:
    return isinstance(given, list | tuple) and len(given) == size


# -- 04.1: the first fault in a region

#: What is known before the fault -> number of the piece in which the fault happens.
_FRESH = ("the same 2 MiB", "another 2 MiB", "another 1 GiB", "another 512 GiB", "another 256 TiB")


def _first_fault(gpaw: int, seed: int) -> Variant:
    lab = MirrorLab(gpaw=gpaw)
    known = len(lab.pieces)
    place = (2 + seed) % known
    lab.fault(0)
    before = _counts(lab, "SEPT.ADD", "PAGE.AUG")
    lab.fault(PIECES[place].gfn if place else 1)
    add, aug = (b - a for a, b in zip(before, _counts(lab, "SEPT.ADD", "PAGE.AUG"), strict=True))

    def hint(given: Any) -> str:
        if not _is_pair(given):
            return "Give a pair: calls of SEPT.ADD, calls of PAGE.AUG."
        if given[1] != aug:
            return "Private memory is mapped in pages of 4 KiB, and one fault maps one page."
        few = "Too few" if given[0] < add else "Too many"
        return (
            f"{few} tables. Walk down from the root: which is the first entry of this gfn that the "
            f"fault on gfn 0 has not filled? Each table below it is missing. Levels: {lab.levels}."
        )

    question = (
        f"At GPAW {gpaw} the TD has used gfn 0 and nothing else. Now it uses a page in "
        f"{_FRESH[place]}. How many calls of TDH.MEM.SEPT.ADD and TDH.MEM.PAGE.AUG does this fault "
        "make? Give a pair such as (1, 2)."
    )
    return Variant(question, (add, aug), hint)


# -- 04.2: a set of pages


def _set_of_pages(gpaw: int, seed: int) -> Variant:
    dice = random.Random(seed)
    lab = MirrorLab(gpaw=gpaw)
    gfns = [0x0, 0x1, 0x1FF, 0x200, 0x40000]
    if seed:
        pieces = dice.choices([piece.gfn for piece in lab.pieces[:4]], k=5)
        gfns = sorted({first + dice.randrange(512) for first in pieces})
    lab.fault_all(gfns, name="set")
    right = _counts(lab, "SEPT.ADD", "PAGE.AUG")

    def hint(given: Any) -> str:
        if not _is_pair(given):
            return "Give a pair: calls of SEPT.ADD, calls of PAGE.AUG."
        if given[1] != right[1]:
            return f"There are {len(gfns)} pages; how many does one fault map?"
        for level in range(1, lab.levels):
            if given[0] == right[0] - len({gfn >> 9 * level for gfn in gfns}):
                return f"Tables are missing from your count: count different gfn >> {9 * level}."
        if given[0] == right[0] + 1:
            return "One too many: the root is one of the TD's control pages, nobody adds it."
        return "For k = 1 up to the root's level - 1, count the different values of gfn >> 9k; add."

    listed = ", ".join(f"{gfn:#x}" for gfn in gfns)
    question = (
        f"A fresh TD at GPAW {gpaw} uses the gfns {listed}, and no other. How many SEPT.ADD and "
        "PAGE.AUG in all? Give a pair such as (1, 2)."
    )
    return Variant(question, right, hint)


# -- 04.3: memory


def _memory(gpaw: int, seed: int) -> Variant:
    gib = random.Random(seed).choice((1, 2, 3, 4, 8, 16)) if seed else 2
    levels = _LEVELS[gpaw]
    pages = gib * SIZE_1G >> PAGE_SHIFT
    added = contiguous_table_count(pages, levels)
    right = (2 * added + 1) * PAGE_SIZE

    def hint(given: int) -> str:
        if given == right // PAGE_SIZE:
            return f"These are pages; one has {PAGE_SIZE} bytes."
        if given in (added * PAGE_SIZE, (added + 1) * PAGE_SIZE):
            return "That is one tree. Every table of the mirror has a page of its own, too."
        if given in (2 * added * PAGE_SIZE, 2 * (added + 1) * PAGE_SIZE):
            return (
                "Nearly: look at the roots. KVM allocates the mirror's root; the Secure EPT's is "
                "one of the TD's control pages and does not count here."
            )
        return (
            f"contiguous_table_count({pages}, {levels}) says how many tables are added below the "
            "root; each has one page in the mirror and one that the module gets."
        )

    question = (
        f"A TD at GPAW {gpaw} uses all of its {gib} GiB of private memory, which begin at gfn 0. "
        "How many bytes does KVM allocate for page tables of private memory, the mirror's and the "
        "Secure EPT's? The Secure EPT's root is one of the TD's control pages and does not count."
    )
    return Variant(question, right, hint)


# -- 04.4: a frozen entry

#: Where vCPU 0 is held -> (label, which one; None for the leaf's), words.
_HELD = (
    ("publish SPTE", 1, "behind its first SEPT.ADD, before it publishes the entry"),
    ("cmpxchg FROZEN_SPTE", 1, "before its very first compare-exchange"),
    ("TDH.MEM.SEPT.ADD", 2, "inside its first TDH.MEM.SEPT.ADD"),
)


def _frozen(gpaw: int, seed: int) -> Variant:
    place = seed % len(_HELD)
    second = 0x200 + seed // len(_HELD) % 2
    label, nth, held = _HELD[place]
    met = meet(_started(gpaw), 0x200, second, hold=label, nth=nth)
    right = (met.mem_calls, met.sept_add, met.page_aug)

    def hint(given: Any) -> str:
        if not _is_pair(given, 3):
            return "Give three numbers: vCPU 1's calls meanwhile, SEPT.ADD and PAGE.AUG of both."
        if given[0] != right[0]:
            if met.finished:
                return "Nothing is frozen yet, so vCPU 1 finds an empty entry. Who is first then?"
            return (
                "vCPU 1 walks the mirror and meets an entry that is FROZEN. What may it do there?"
            )
        if given[1] != right[1]:
            return "Both need the same table. It is added once; the loser frees the page it had."
        return f"vCPU 0 uses gfn 0x200, vCPU 1 gfn {second:#x}. How many pages is that?"

    question = (
        "gfn 0 is mapped, nothing else. vCPU 0 faults on gfn 0x200 and is held up "
        f"{held}. Meanwhile vCPU 1 faults on gfn {second:#x}. Then both go on until "
        "they are done. How many calls of SEPT.ADD and PAGE.AUG does vCPU 1 make while vCPU 0 is "
        "held; how many SEPT.ADD, how many PAGE.AUG have both made in the end? Three numbers."
    )
    return Variant(question, right, hint)


# -- 04.5: BUSY


def _calls(number: int) -> str:
    return "call" if number == 1 else f"{number} calls"


def _busy_calls(gpaw: int, seed: int) -> Variant:
    dice = random.Random(seed)
    leaf, busy, place = "PAGE.AUG", 2, 2
    if seed:
        leaf = dice.choice(("PAGE.AUG", "SEPT.ADD"))
        busy, place = dice.randrange(1, 5), dice.randrange(1, 4)
    gfn = PIECES[place].gfn
    lab = _started(gpaw)
    row, calm = busy_fault(lab, gfn, leaf, busy), busy_fault(lab, gfn, leaf, 0)
    right = (row.sept_add, row.page_aug, row.vp_enter)

    def hint(given: Any) -> str:
        if not _is_pair(given, 3):
            return "Give three numbers: SEPT.ADD, PAGE.AUG, VP.ENTER."
        if given[2] != right[2]:
            return (
                "KVM handles a private fault again without asking the guest; only when it is done "
                "does the vCPU enter. One entry was before the fault."
            )
        if tuple(given) == (calm.sept_add, calm.page_aug, calm.vp_enter):
            return "These are the calls without any BUSY. A call that is refused is a call, too."
        return (
            "The fault is replayed from the top. Which entries does it find published already, and "
            "which call has to be made again?"
        )

    question = (
        f"gfn 0 is mapped, nothing else. The TD uses a page in {_FRESH[place]}, and the first "
        f"{_calls(busy)} of {leaf} answer{'s' * (busy == 1)} TDX_OPERAND_BUSY. How many calls of "
        "SEPT.ADD, PAGE.AUG and VP.ENTER are made, the first entry of the guest and refused calls "
        "counted? Three numbers."
    )
    return Variant(question, right, hint)


# -- 04.6: zap and fault again


def _zap_again(gpaw: int, seed: int) -> Variant:
    dice = random.Random(seed)
    mapped, zapped, asked = (4, 2, 6) if not seed else _draw(dice)
    lab = MirrorLab(gpaw=gpaw)
    lab.fault_all(range(mapped), name="map")
    before = _counts(lab, *_ZAP, *_FAULT)
    lab.zap_all(range(mapped - zapped, mapped - zapped + asked), name="zap")
    middle = _counts(lab, *_ZAP, *_FAULT)
    lab.fault_all(range(mapped - zapped, mapped), name="again")
    after = _counts(lab, *_ZAP, *_FAULT)
    zap = sum(b - a for a, b in zip(before[:4], middle[:4], strict=True))
    add, aug = (b - a for a, b in zip(middle[4:], after[4:], strict=True))
    right = (zap, add, aug)

    def hint(given: Any) -> str:
        if not _is_pair(given, 3):
            return "Give three numbers: SEAMCALLs of the zaps, SEPT.ADD and PAGE.AUG of the faults."
        if given[0] == 4 * asked:
            return (
                "Some of these pages are not mapped. Who tells KVM so, and what does it call then?"
            )
        if given[0] != zap:
            return "One mapped page: count the calls from the first lock to the page's last line."
        if given[1] != add:
            return "A zap takes pages away. Look at the tables in lab.walk() after one."
        return "One page, one PAGE.AUG, each time it comes back."

    question = (
        f"gfns 0..{mapped - 1} are mapped. The host zaps gfns {mapped - zapped}.."
        f"{mapped - zapped + asked - 1}, one by one; then the TD uses gfns {mapped - zapped}.."
        f"{mapped - 1} again. How many SEAMCALLs do the zaps make; how many SEPT.ADD and how many "
        "PAGE.AUG do the faults make? Three numbers."
    )
    return Variant(question, right, hint)


_ZAP = ("RANGE.BLOCK", "TRACK", "PAGE.REMOVE", "PAGE.WBINVD")
_FAULT = ("SEPT.ADD", "PAGE.AUG")


def _draw(dice: random.Random) -> tuple[int, int, int]:
    """(mapped, of these zapped, zapped in all)."""
    mapped = dice.randrange(3, 8)
    zapped = dice.randrange(1, mapped)
    return mapped, zapped, zapped + dice.randrange(1, 5)


# -- 04.7: the price of looking


def _looking(gpaw: int, seed: int) -> Variant:
    dice = random.Random(seed)
    asked = [0x0, 0x1, 0x200, 0x40000] if not seed else _asked(dice)
    lab = _started(gpaw)
    before = sept_rd_count(lab)
    ask_top_down(lab, asked)
    right = sept_rd_count(lab) - before

    def hint(given: int) -> str:
        if given == len(asked):
            return "That is one call for each gfn, on its 4K entry. Here every level is asked."
        if given == lab.levels * len(asked):
            return "A walk stops where there is no table below. How deep does each one get?"
        return (
            f"gfn 0 needs {lab.levels} calls. For each other gfn: down to which level does it "
            "share its tables with gfn 0? That level is read, and below it nothing."
        )

    listed = ", ".join(f"{gfn:#x}" for gfn in asked)
    question = (
        f"Only gfn 0 is mapped, GPAW {gpaw}. Somebody without a mirror asks of the gfns {listed} "
        "whether they are mapped: with TDH.MEM.SEPT.RD of one level after the other from the root "
        "down, until the entry is no table. How many SEAMCALLs?"
    )
    return Variant(question, right, hint)


def _asked(dice: random.Random) -> Sequence[int]:
    firsts = dice.choices([piece.gfn for piece in PIECES[:4]], k=4)
    return sorted({first + dice.randrange(512) for first in firsts})


EXERCISES = (
    Exercise("04.1", _first_fault),
    Exercise("04.2", _set_of_pages),
    Exercise("04.3", _memory),
    Exercise("04.4", _frozen),
    Exercise("04.5", _busy_calls),
    Exercise("04.6", _zap_again),
    Exercise("04.7", _looking),
)
