"""The exercises of notebook 01: guest physical addresses; every answer is computed by the model."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

from tdxlab.arch import PAGE_SHIFT, PAGE_SIZE, shared_bit
from tdxlab.kvm.params import gfn_shared_bit
from tdxlab.study.exercises import Exercise, Variant
from tdxlab.study.gpa_lab import edge_gpas, gate
from tdxlab.study.gpa_split import (
    EXAMPLE_GFN,
    EXAMPLE_GPA,
    Split,
    bit_range,
    last_slot_gfn,
    level_name,
    reach_rows,
    split,
)


class Hex(int):
    """A number that is written in hex."""

    def __str__(self) -> str:
        return f"{int(self):#x}"


def _page_of(draw: Random, gpaw: int, *, shared: bool) -> Split:
    """Some byte of a half."""
    half = 1 << shared_bit(gpaw)
    return split(draw.randrange(half) + half * shared, gpaw)


# -- 01.1: one fault


def _one_fault(gpaw: int, seed: int) -> Variant:
    draw = Random(seed)
    example = split(EXAMPLE_GPA, gpaw)
    at = (
        _page_of(draw, gpaw, shared=bool(draw.getrandbits(1)))
        if seed
        else split(example.alias, gpaw)
    )

    def hint(given: Any) -> str:
        if len(given) != 2:
            return 'Give a pair: "mirror" or "direct", and the gfn as a number.'
        if str(given[0]).strip().casefold() != at.root:
            return (
                f"Look at bit {shared_bit(gpaw)} of the GPA: what does a 1 there mean, and which "
                "root does KVM keep for that half?"
            )
        if given[1] == at.raw_gfn:
            return "That frame number still has the shared bit. fault->gfn is without it."
        return f"A frame is {PAGE_SIZE} bytes: shift the GPA, then take the shared bit away."

    question = (
        f"A guest of GPAW {gpaw} faults at GPA {at.gpa:#x}. Which root does KVM walk, and what is "
        'fault->gfn? Give a pair such as ("mirror", 0x1000).'
    )
    return Variant(question, (at.root, Hex(at.gfn)), hint)


# -- 01.2: an index in the direct root


def _direct_index(gpaw: int, seed: int) -> Variant:
    draw = Random(seed)
    gfn = draw.randrange(gfn_shared_bit(gpaw)) if seed else EXAMPLE_GFN
    plain = split(gfn << PAGE_SHIFT, gpaw)
    level = draw.choice((plain.levels, plain.levels, plain.levels - 1)) if seed else plain.levels
    right = split(plain.alias, gpaw).index(level)

    def hint(given: int) -> str:
        if given == plain.index(level):
            return "That is the index in the mirror root. Put gfn_direct_bits in before you look."
        high, low = bit_range(gpaw, level)
        return (
            f"Set bit {shared_bit(gpaw)} of the GPA; bits {high}:{low} of what you get are the "
            "index."
        )

    question = (
        f"KVM looks up gfn {gfn:#x} in the direct root of a TD of GPAW {gpaw}. Which index does it "
        f"use at level {level} ({level_name(level)})?"
    )
    return Variant(question, right, hint)


# -- 01.3: a GPA from its walk


def _compose(gpaw: int, seed: int) -> Variant:
    draw = Random(seed)
    at = _page_of(draw, gpaw, shared=bool(draw.getrandbits(1)) if seed else True)
    levels = range(at.levels, 0, -1)
    walk = ", ".join(f"{level_name(level)} {at.index(level)}" for level in levels)

    def hint(given: int) -> str:
        if not 0 <= given < 1 << gpaw:
            return f"A GPA of this guest is below {1 << gpaw:#x}; yours is {given:#x}."
        other = split(given, gpaw)
        wrong = [level_name(level) for level in levels if other.index(level) != at.index(level)]
        if wrong:
            return (
                f"The walk of {given:#x} differs at {', '.join(wrong)}. Each index moves left by "
                "12 bits for the offset and by 9 more for each level below its own."
            )
        return "Every index is right; look at the offset."

    question = (
        f"A walk uses these entries: {walk}; and the byte {at.offset:#x} of the page. Which GPA of "
        f"a guest of GPAW {gpaw} is it? (Type it into the panel to see its walk.)"
    )
    return Variant(question, Hex(at.gpa), hint)


# -- 01.4: what the module takes


def _refused(gpaw: int, seed: int) -> Variant:
    draw = Random(seed)
    half = 1 << shared_bit(gpaw)
    some = draw.randrange(1, half >> PAGE_SHIFT) << PAGE_SHIFT
    edges = edge_gpas(gpaw)
    gpas = [
        *edges.values(), some, some | half, 1 << gpaw, some | 1 << gpaw, 1 << 47, 1 << 40, 1 << 48
    ]  # fmt: skip
    chosen = draw.sample(list(dict.fromkeys(gpas)), 5)
    letters = dict(zip("abcde", chosen, strict=True))
    rows = gate(letters.items(), gpaw)
    right = {row.what for row in rows if not row.taken}

    def hint(given: Any) -> str:
        answered = {str(letter).strip().casefold() for letter in given}
        unknown = answered - set(letters)
        if unknown:
            return f"Answer with a set of letters a to e; {min(unknown)!r} is none of them."
        odd = min(answered ^ right)
        gpa = letters[odd]
        return (
            f"Look again at {odd}, {gpa:#x}: its highest bit is number {gpa.bit_length() - 1}. "
            "Ask the module: gate([('it', gpa)], GPAW)."
        )

    listed = "\n".join(f"  {letter}) {gpa:#x}" for letter, gpa in letters.items())
    question = (
        f"Which of these GPAs does the module refuse as TDX_OPERAND_INVALID, when a host asks for "
        f"their 4K entry in the Secure EPT of a TD of GPAW {gpaw}? A set of letters.\n{listed}"
    )
    return Variant(question, right, hint)


# -- 01.5: memslots


def _slot(gpaw: int, seed: int) -> Variant:
    hosts = [row.maxphyaddr for row in reach_rows(gpaw, tuple(range(44, 53)))]
    maxphyaddr = Random(seed).choice(hosts) if seed else hosts[-1]
    right = last_slot_gfn(maxphyaddr, gpaw)

    def hint(given: int) -> str:
        if given == (1 << maxphyaddr - PAGE_SHIFT) - 1:
            return "That is max_gfn, but it has the shared bit, and no gfn of KVM's may have it."
        if given == gfn_shared_bit(gpaw) - 1:
            return "The shared bit allows it, but the host does not: max_gfn is smaller."
        if given == right + 1:
            return "That is the first gfn that is too great."
        return "Two limits hold at once: max_gfn of the host, and no shared bit. Take the smaller."

    question = (
        f"On a host with MAXPHYADDR {maxphyaddr}, what is the greatest gfn that a memslot of a TD "
        f"of GPAW {gpaw} may contain?"
    )
    return Variant(question, Hex(right), hint)


# -- 01.6: how far a walk goes


def _reached(gpaw: int, seed: int) -> Variant:
    draw = Random(seed)
    rows = reach_rows(gpaw, tuple(range(44, 53)))
    chosen = sorted(draw.sample(rows, min(4, len(rows) - 1)))
    right = {row.maxphyaddr for row in chosen if row.whole_walk == "reaches it"}

    def hint(given: Any) -> str:
        odd = min(set(given) ^ right, key=str)
        if odd not in {row.maxphyaddr for row in chosen}:
            return f"{odd!r} is none of the hosts asked for."
        return (
            f"Look again at {odd}: max_gfn there is 2^{odd - PAGE_SHIFT} - 1, and the shared half "
            f"begins at gfn {gfn_shared_bit(gpaw):#x}."
        )

    hosts = ", ".join(str(row.maxphyaddr) for row in chosen)
    question = (
        "A walk over a whole direct root begins at gfn 0, adds no bits, and ends behind the host's "
        f"max_gfn. For which MAXPHYADDR out of {hosts} does it get to the shared half of a TD of "
        f"GPAW {gpaw}? A set of numbers; set() if for none."
    )
    return Variant(question, right, hint)


# -- 01.7: what to flush


def _flush(gpaw: int, seed: int) -> Variant:
    draw = Random(seed)
    first = draw.randrange(1, gfn_shared_bit(gpaw) >> 1) if seed else EXAMPLE_GFN
    count = draw.choice((1, 2, 8, 512)) if seed else 16
    start = split(split(first << PAGE_SHIFT, gpaw).alias, gpaw).gpa
    end = start + count * PAGE_SIZE

    def hint(given: Any) -> str:
        if len(given) != 2:
            return "Give a pair of GPAs: the first byte, and the first byte behind the range."
        plain = (first << PAGE_SHIFT, (first + count) << PAGE_SHIFT)
        if tuple(given) == plain:
            return (
                "Those are the private aliases: their translations stay, and nobody removed them."
            )
        if given[0] == start >> PAGE_SHIFT:
            return "Those are frame numbers; the CPU is asked for bytes."
        if given[0] != start:
            return "The guest used these frames with its shared bit set: where did they begin?"
        return f"The start is right. {count} pages of {PAGE_SIZE} bytes follow."

    question = (
        f"KVM has taken {count} shared mappings away, beginning at gfn {first:#x}; the TD has GPAW "
        f"{gpaw}. CPUs keep translations by GPA. Which GPAs have to be flushed? Give a pair: first "
        "byte, first byte behind."
    )
    return Variant(question, (Hex(start), Hex(end)), hint)


_MAKERS: tuple[Callable[[int, int], Variant], ...] = (
    _one_fault,
    _direct_index,
    _compose,
    _refused,
    _slot,
    _reached,
    _flush,
)

EXERCISES = tuple(Exercise(f"01.{n}", make) for n, make in enumerate(_MAKERS, start=1))
