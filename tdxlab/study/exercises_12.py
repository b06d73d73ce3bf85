"""The exercises of notebook 12: a hostile host; every answer is what the model does."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache
from typing import Any

from tdxlab.abi import leaves as abi
from tdxlab.abi.outcome import IN_GUEST
from tdxlab.abi.status import is_error
from tdxlab.attacks import ATTACKS, make_stage
from tdxlab.attacks.stage import DATA_GPA, SECRET, Stage
from tdxlab.attacks.verdict import MECHANISMS, NOTHING
from tdxlab.memory import LINE_SIZE
from tdxlab.study.aes_xts import BLOCK, AesXts
from tdxlab.study.attack_tables import (
    HOSTS,
    POISONED,
    VICTIM,
    block_differences,
    owners,
    try_attack,
)
from tdxlab.study.exercises import Exercise, Variant

_NOTHING = "nothing"

# -- 12.1: what stops it?

_TO_NAME = (
    "copy-through-the-module",
    "swap-for-zeros",
    "map-in-two-tds",
    "replay-in-software",
    "stale-tlb",
    "replay-on-the-bus",
    "add-after-launch",
    "corrupt-mirror",
)


def _stopper(gpaw: int, seed: int) -> Variant:
    name = _TO_NAME[seed % len(_TO_NAME)]
    right = try_attack(name, gpaw).stopped_by or _NOTHING
    known = (*MECHANISMS, _NOTHING)

    def hint(given: str) -> str:
        if str(given).strip().casefold() not in {one.casefold() for one in known}:
            return f"{given!r} is none of them; choose from {', '.join(known)}."
        return (
            "Ask who has to look, and at what: the CPU at a line, the module at an operand, a page "
            "or a table, the guest at what it is given? Then try it in the panel, move by move."
        )

    question = f"{name}: {ATTACKS[name].what} What stops it? Choose from {', '.join(known)}."
    return Variant(question, right, hint)


# -- 12.2: how much of a ciphertext changes?


def _blocks(gpaw: int, seed: int) -> Variant:
    dice = random.Random(seed)
    places = sorted(dice.sample(range(LINE_SIZE), dice.randrange(2, 5))) if seed else [3, 9, 40]
    changed = bytearray(SECRET)
    for place in places:
        changed[place] ^= 0xFF
    stage = make_stage("read-private", gpaw=gpaw, cipher=AesXts())
    right = BLOCK * sum(map(bool, block_differences(stage, bytes(changed))))

    def hint(given: int) -> str:
        if given == len(places):
            return (
                "So few would change if each byte was enciphered alone. What is enciphered as one?"
            )
        if given == LINE_SIZE:
            return "Not the whole line: look at the table of section 2 once more."
        return (
            "AES takes some bytes at a time, from the beginning of the line on. How many, the "
            "table of section 2 shows; which of these blocks have a changed byte?"
        )

    question = (
        f"The victim changes bytes {', '.join(map(str, places))} of a line (they count from 0), "
        "nothing else. How many bytes of the line's ciphertext can be others than before?"
    )
    return Variant(question, right, hint)


# -- 12.3: which status?

_TO_CALL = (
    "map-in-two-tds",
    "replace-page",
    "stale-tlb",
    "reclaim-early",
    "fake-keyid",
    "skip-cache-flush",
    "look-with-debug-calls",
    "skip-vcpu-flush",
)


def _status(gpaw: int, seed: int) -> Variant:
    name = _TO_CALL[seed % len(_TO_CALL)]
    report = try_attack(name, gpaw)
    right = report.evidence.partition(" ")[0].rstrip(",")
    call = next(move for move in report.moves if right in move.answer).name

    def hint(given: str) -> str:
        return (
            f"{given!r} is not what the module says. Is it the page, the entry, the TLBs, the key "
            "or the TD's life that is not as it has to be? The panel shows each answer."
        )

    question = (
        f"{name}: {ATTACKS[name].what} With which status does the module first refuse {call}? Give "
        "its name."
    )
    return Variant(question, right, hint)


# -- 12.4: what does the host have from it?


def _gains(gpaw: int, seed: int) -> Variant:
    dice = random.Random(seed)
    names = sorted(dice.sample(list(ATTACKS), 5)) if seed else list(_FIRST_FIVE)
    right = frozenset(name for name in names if try_attack(name, gpaw).gained == NOTHING)

    def hint(given: Any) -> str:
        answered = {str(name).strip().casefold() for name in given}
        unknown = answered - set(names)
        if unknown:
            return f"{min(unknown)} is not among them; give a set of names as they are written."
        wrong = answered - right
        if wrong:
            return f"From {min(wrong)} the host has something: see what becomes of the victim."
        return "More of them end with nothing but a refusal. Which ones only meet the module?"

    question = (
        f"From which of {', '.join(names)} does the host have nothing at all, not even a victim "
        "that is observed, or that cannot go on? Give a set of names, set() for none."
    )
    return Variant(question, right, hint)


_FIRST_FIVE = ("write-private", "map-at-two-gpas", "watch-faults", "fake-keyid", "never-run")

# -- 12.5: where does it fail?

_CALLS: dict[str, Callable[[Stage], Any]] = {
    "BLOCK": lambda stage: _call(stage, abi.TDH_MEM_RANGE_BLOCK),
    "TRACK": lambda stage: stage.seamcall(abi.TDH_MEM_TRACK, rcx=stage.tdr),
    "REMOVE": lambda stage: _call(stage, abi.TDH_MEM_PAGE_REMOVE),
    "kick": lambda stage: stage.kick(),
    "enter": lambda stage: stage.enter(),
    "AUG": lambda stage: stage.seamcall(
        abi.TDH_MEM_PAGE_AUG, rcx=DATA_GPA, rdx=stage.tdr, r8=stage.spare[0]
    ),
}

_SEQUENCES = (
    ("BLOCK", "TRACK", "REMOVE", "kick", "REMOVE"),
    ("BLOCK", "kick", "REMOVE", "TRACK"),
    ("TRACK", "kick", "BLOCK", "REMOVE"),
    ("BLOCK", "TRACK", "kick", "enter", "REMOVE"),
    ("BLOCK", "TRACK", "TRACK", "kick", "REMOVE"),
    ("AUG", "BLOCK", "TRACK", "kick", "REMOVE"),
    ("kick", "BLOCK", "TRACK", "REMOVE", "REMOVE"),
)


def _call(stage: Stage, leaf: int) -> int:
    return stage.seamcall(leaf, rcx=DATA_GPA, rdx=stage.tdr)


@cache
def _first_refused(gpaw: int, sequence: tuple[str, ...]) -> int:
    """Number of the first call that the module refuses, from 1; 0 if it refuses none."""
    stage = make_stage("stale-tlb", gpaw=gpaw)
    for number, name in enumerate(sequence, 1):
        status = _CALLS[name](stage)
        if status not in (None, IN_GUEST) and is_error(status):
            return number
    return 0


def _sequence(gpaw: int, seed: int) -> Variant:
    sequence = _SEQUENCES[seed % len(_SEQUENCES)]
    right = _first_refused(gpaw, sequence)

    def hint(given: int) -> str:
        if not 0 <= given <= len(sequence):
            return "Give the number of one of these calls, or zero if all of them are done."
        return (
            "Two things are asked of a page that is removed: its entry is blocked, and an epoch "
            "has begun since, with no vCPU inside that entered before. TRACK asks something too."
        )

    question = (
        f"The victim runs on an LP. The host does, for its data page: {', '.join(sequence)}. Which "
        "of these is the first that the module refuses? Give its number, from 1; 0 for none. "
        "(kick: the vCPU leaves; enter: it goes in again.)"
    )
    return Variant(question, right, hint)


# -- 12.6: whose is the line?

_DEEDS: dict[str, Callable[[Stage], object]] = {
    "the host stores 64 bytes": lambda stage: stage.store(stage.data_hpa, bytes(64)),
    "the host stores 8 bytes": lambda stage: stage.store(stage.data_hpa, bytes(8)),
    "the host reads": lambda stage: stage.load(stage.data_hpa),
    "the victim writes 64 bytes": lambda stage: stage.guest_write(SECRET),
    "the victim writes 8 bytes": lambda stage: stage.guest_write(SECRET[:8]),
}
_LISTS = (
    ("the host stores 64 bytes", "the victim writes 64 bytes"),
    ("the host stores 8 bytes", "the victim writes 8 bytes"),
    ("the host reads", "the victim writes 8 bytes", "the host reads"),
    ("the host stores 8 bytes", "the host stores 64 bytes"),
    ("the host stores 8 bytes", "the victim writes 64 bytes"),
    ("the victim writes 8 bytes", "the host stores 64 bytes", "the host stores 8 bytes"),
)
_WHOSE = {VICTIM: "victim", HOSTS: "host", POISONED: "poisoned"}


def _whose(gpaw: int, seed: int) -> Variant:
    deeds = _LISTS[seed % len(_LISTS)]
    stage = make_stage("write-private", gpaw=gpaw)
    for deed in deeds:
        _DEEDS[deed](stage)
    right = _WHOSE[owners(stage)[0]]

    def hint(given: str) -> str:
        if str(given).strip().casefold() not in _WHOSE.values():
            return f"{given!r} is none of {', '.join(_WHOSE.values())}."
        return (
            "Who writes a whole line takes it, whatever it was. Who writes a part of a line that "
            "is a TD's, under another key, has not read the rest: what becomes of it?"
        )

    question = (
        f"A line is the victim's. Then: {'; '.join(deeds)}. Is the line now the \"victim\"'s, the "
        '"host"\'s or "poisoned"?'
    )
    return Variant(question, right, hint)


# -- 12.7: integrity of two kinds

_ENDS = ("own", "old", "garbage", "machine check")
_CASES = (
    ("replay-on-the-bus", "MACs"),
    ("splice-on-the-bus", "MACs"),
    ("splice-on-the-bus", "nothing"),
    ("replay-in-software", "MACs"),
    ("replay-on-the-bus", "nothing"),
    ("forge-on-the-bus", "nothing"),
    ("forge-on-the-bus", "MACs"),
)


def _integrity(gpaw: int, seed: int) -> Variant:
    name, lacks = _CASES[seed % len(_CASES)]
    moves = try_attack(name, gpaw, lacks).moves
    right = _end(moves[-1].result)

    def hint(given: str) -> str:
        if str(given).strip().casefold() not in _ENDS:
            return f"{given!r} is none of {', '.join(_ENDS)}."
        return (
            "Who reads with a private key is protected by the owner bit, and by the MAC if there "
            "is one. What does each of them know: who wrote, what was written, where, when?"
        )

    has = "with a MAC" if lacks == "nothing" else "without MACs, but with the TD-owner bit"
    question = (
        f"{name}, on a machine {has} in each line: {ATTACKS[name].what} What does the victim's "
        'last read give: its "own" latest bytes, its "old" ones, "garbage" or a "machine check"?'
    )
    return Variant(question, right, hint)


def _end(result: Any) -> str:
    if not isinstance(result, bytes):
        return "machine check"
    return "old" if result == SECRET else "garbage"


EXERCISES = (
    Exercise("12.1", _stopper),
    Exercise("12.2", _blocks),
    Exercise("12.3", _status),
    Exercise("12.4", _gains),
    Exercise("12.5", _sequence),
    Exercise("12.6", _whose),
    Exercise("12.7", _integrity),
)
