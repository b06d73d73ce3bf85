"""The exercises of notebook 10: taking a TD apart; every answer is the model's."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from tdxlab.abi.status import TDX_OPERAND_BUSY, TDX_PAGE_METADATA_INCORRECT, TDX_SUCCESS
from tdxlab.arch import PAGE_SIZE, SIZE_1G
from tdxlab.study.exercises import Exercise, Variant
from tdxlab.study.phymem_bugs import HARMLESS, OUTCOMES, Bug, all_bugs, bug_rows
from tdxlab.study.phymem_locks import KINDS, LOCKS, OWNER, READER, LockScene
from tdxlab.study.phymem_scene import PhymemScene
from tdxlab.study.phymem_styles import STYLES
from tdxlab.study.teardown_lab import (
    CACHE_WB,
    FLUSH,
    FREEID,
    KEYID_FIRST,
    KEYID_LAST,
    RELEASE,
    TABLES,
    Failure,
    TeardownLab,
)
from tdxlab.study.teardown_tables import cost_rows, sizes_of, tables_for
from tdxlab.study.teardown_tries import CALLS, try_call

_RECLAIM = "TDH.PHYMEM.PAGE.RECLAIM"

# -- 10.1 and 10.2: counting


def _lab_of(gpaw: int, seed: int) -> TeardownLab:
    dice = random.Random(seed)
    if not seed:
        return TeardownLab(gpaw=gpaw, pages=10, vcpus=3, packages=2)
    pages, vcpus, packages = dice.randrange(4, 24), dice.randrange(1, 5), dice.randrange(1, 5)
    return TeardownLab(gpaw=gpaw, pages=pages, vcpus=vcpus, packages=packages)


def _said(lab: TeardownLab) -> str:
    sizes = sizes_of(lab)
    return (
        f"GPAW {lab.gpaw}, N = {sizes.pages} private pages in one 2 MiB region, "
        f"V = {sizes.vcpus} vCPUs that have all run, P = {sizes.packages} packages, "
        f"T = {sizes.tables} tables, c = {sizes.tdcx}, d = {sizes.tdcs}"
    )


def _count_all(gpaw: int, seed: int) -> Variant:
    lab = _lab_of(gpaw, seed)
    lab.destroy(KEYID_LAST)
    right = sum(lab.calls_per_phase().values())

    def hint(given: int) -> str:
        off = given - right
        for row in cost_rows(lab)[:-1]:
            if abs(off) == row.counted:
                side = "twice" if off > 0 else "not at all"
                return f"The difference is as large as the phase {row.phase}: it counts {side}?"
        return (
            "Add up the formulas of all phases. A TeardownLab with these sizes counts them one by "
            "one: Table(cost_rows(lab)) after lab.destroy()."
        )

    question = f"How many SEAMCALLs does Linux 6.16 make to tear this TD down? {_said(lab)}."
    return Variant(question, right, hint)


def _saved(gpaw: int, seed: int) -> Variant:
    gib = random.Random(seed).choice((2, 8, 16, 32, 100)) if seed else 4
    pages = gib * SIZE_1G // PAGE_SIZE
    right = 3 * pages

    def hint(given: int) -> str:
        if given == pages:
            return "That is how many pages there are. How many calls does each of them save?"
        return (
            "Tables, control pages and vCPUs cost the same in both orders. Compare the row of the "
            f"{RELEASE} in cost_rows for the two orders, and multiply by the number of pages."
        )

    question = (
        f"A TD has {gib} GiB of private memory in 4 KiB pages. How many SEAMCALLs fewer does the "
        "teardown with the KeyID first make?"
    )
    return Variant(question, right, hint)


# -- 10.3: tables


def _tables(gpaw: int, seed: int) -> Variant:
    gib = random.Random(seed).choice((1, 2, 8, 16, 32, 512)) if seed else 4
    right = tables_for(gib * SIZE_1G // PAGE_SIZE, gpaw)

    def hint(given: int) -> str:
        if given == right + 1:
            return "The root is one of the TDCS pages: it is not counted among the tables."
        return (
            "Count from below: one table for each 2 MiB, one for each GiB, and so on up to the "
            f"level below the root; at GPAW {gpaw} the root is at level {4 if gpaw == 48 else 5}."
        )

    question = (
        f"GPAW {gpaw}; {gib} GiB of private memory in a row from GPA 0, all of it in use. How many "
        "Secure EPT pages does the teardown reclaim?"
    )
    return Variant(question, right, hint)


# -- 10.4: what is legal when

_POINTS = {
    "has its KeyID, and its vCPUs were just flushed": (KEYID_FIRST, "VPFLUSHDONE"),
    "was given back its KeyID (FREEID succeeded)": (KEYID_FIRST, RELEASE),
    "is past VPFLUSHDONE, and all packages have written back": (KEYID_FIRST, FREEID),
    "is past VPFLUSHDONE, and no package has written back": (KEYID_FIRST, CACHE_WB),
    "has its KeyID, and its vCPUs were not flushed": (KEYID_FIRST, FLUSH),
}


def _legal(gpaw: int, seed: int) -> Variant:
    point = list(_POINTS)[seed % len(_POINTS)]
    order, phase = _POINTS[point]
    lab = TeardownLab(gpaw=gpaw, pages=2, vcpus=1, packages=1)
    lab.destroy(order)
    lab.go_to(phase)
    right = frozenset(leaf for leaf in CALLS if try_call(lab, leaf) == "TDX_SUCCESS")

    def hint(given: Any) -> str:
        answered = {str(leaf).strip().upper() for leaf in given}
        unknown = answered - set(CALLS)
        if unknown:
            return (
                f"{min(unknown)} is not among the leaves; give a set of names as they are written."
            )
        wrong = answered - right
        if wrong:
            leaf = min(wrong)
            return f"{leaf} would answer {try_call(lab, leaf)}."
        return f"{len(right - answered)} more would be done. Which life cycle is the TD in?"

    question = (
        f"A TD {point}. Which of {', '.join(CALLS)} would be done now, for the TD or one of its "
        "private pages? Give a set, set() for none."
    )
    return Variant(question, right, hint)


# -- 10.5 to 10.7: failures


def _pick(gpaw: int, seed: int, failures: Sequence[Failure]) -> tuple[TeardownLab, Failure]:
    """A small TD torn down with one of the failures, KeyID last."""
    dice = random.Random(seed)
    failure = failures[seed % len(failures)]
    pages, vcpus = (dice.randrange(2, 9), dice.randrange(1, 4)) if seed else (4, 1)
    lab = TeardownLab(gpaw=gpaw, pages=pages, vcpus=vcpus, packages=2)
    lab.destroy(KEYID_LAST, failure)
    return lab, failure


_LEAKS = (
    Failure("TDH.MNG.KEY.FREEID", 1, TDX_OPERAND_BUSY),
    Failure("TDH.MEM.PAGE.REMOVE", 2, TDX_PAGE_METADATA_INCORRECT),
    Failure("TDH.MEM.PAGE.REMOVE", 1, TDX_OPERAND_BUSY),
    Failure("TDH.PHYMEM.PAGE.WBINVD", 1, TDX_PAGE_METADATA_INCORRECT),
    Failure("TDH.VP.FLUSH", 1, TDX_OPERAND_BUSY),
    Failure("TDH.PHYMEM.CACHE.WB", 2, TDX_SUCCESS),
)


def _leak(gpaw: int, seed: int) -> Variant:
    lab, failure = _pick(gpaw, seed, _LEAKS)
    right = (sum(lab.leaked().values()), "lost" if lab.keyid_is_lost() else "free")

    def hint(given: Sequence[Any]) -> str:
        if len(given) != 2:
            return 'Give a pair such as (2, "free"): pages, and what the host has of the KeyID.'
        if str(given[1]).strip().casefold() != right[1]:
            return (
                "The KeyID comes back at the success of TDH.MNG.KEY.FREEID and at nothing else. "
                "Does it succeed here? Look at lab.key_lines() at the end."
            )
        return (
            "Which pages does the module still own, or KVM still count? Without a KeyID given back "
            "nothing can be reclaimed; a TDR needs that all other pages have gone before."
        )

    question = (
        f"{_said(lab)}; KeyID last. This fails: {failure}. How many of the TD's pages are leaked, "
        'and is the KeyID "free" or "lost"? Give a pair such as (2, "free").'
        f"{' (TDX_SUCCESS here: KVM is told so, but nothing was done.)' * (not failure.status)}"
    )
    return Variant(question, right, hint)


def _reclaims(gpaw: int, seed: int) -> Variant:
    lab = TeardownLab(gpaw=gpaw, pages=4, vcpus=1, packages=1)
    numbers = (7, 3, 6, 8, 10, 12)
    number = numbers[seed % len(numbers)] if seed < len(numbers) else seed % 13 + 1
    lab.destroy(KEYID_LAST, Failure(_RECLAIM, number, TDX_OPERAND_BUSY))
    right = frozenset("S-EPT" if role in TABLES else role for role in lab.leaked())

    def hint(given: Any) -> str:
        answered = {str(role).strip() for role in given}
        if len(answered) < len(right):
            return "One failure can cause a second one: what does the module ask of the last page?"
        return (
            "Count along the order of the phases: the pages of the vCPU (TDCX before TDVPR), the "
            f"tables, TDCS, TDR. Or step through a TeardownLab to RECLAIM number {number}."
        )

    question = (
        f"{_said(lab)}; KeyID last. RECLAIM number {number} answers TDX_OPERAND_BUSY. Which kinds "
        'of pages are leaked? Give a set of "private", "TDVPR", "TDCX", "S-EPT", "TDCS", "TDR".'
    )
    return Variant(question, right, hint)


_CASCADES = (
    Failure("TDH.PHYMEM.CACHE.WB", 1, TDX_SUCCESS),
    Failure("TDH.VP.FLUSH", 1, TDX_OPERAND_BUSY),
    Failure(_RECLAIM, 2, TDX_OPERAND_BUSY),
    Failure("TDH.MEM.PAGE.REMOVE", 1, TDX_PAGE_METADATA_INCORRECT),
)


def _cascade(gpaw: int, seed: int) -> Variant:
    lab, failure = _pick(gpaw, seed, _CASCADES)
    phases = list(lab.phases())
    right = next(status for status in lab.tally.refused if status != _name(failure))

    def hint(given: str) -> str:
        return (
            f"{given!r} is not what the module answers. The first failure leaves something undone; "
            f"look for the phase after it, of {', '.join(phases)}, that asks for it, or read "
            "lab.tally.refused after the teardown."
        )

    question = (
        f"{_said(lab)}; KeyID last. This fails: {failure}. Later the module itself refuses a call. "
        "With which status? Give its name."
    )
    return Variant(question, right, hint)


def _name(failure: Failure) -> str:
    return str(failure).rpartition(": ")[2]


# -- 10.8 and 10.9: the PHYMEM calls


def _busy(gpaw: int, seed: int) -> Variant:
    scene, dice = LockScene(gpaw=gpaw), random.Random(seed + 2)
    cases = [(kind, lock, hold) for kind in KINDS for lock in LOCKS for hold in (READER, OWNER)]
    letters = dict(zip("abcde", dice.sample(cases, 5), strict=True))
    right = frozenset(x for x, case in letters.items() if "BUSY" in scene.reclaim(*case))

    def hint(given: Any) -> str:
        answered = {str(letter).strip().casefold() for letter in given}
        unknown = answered - set(letters)
        if unknown:
            return f"{min(unknown)!r} is not among a to e; give a set of letters."
        return (
            f"{len(answered - right)} too many, {len(right - answered)} missing. A reader is in "
            "the way of a lock that is taken exclusively, an owner in the way of any; a lock that "
            "is not taken at all can be held by anybody. The rows of lock_rows tell."
        )

    listed = "\n".join(
        f"  {letter}) {kind}: {'a reader' if hold == READER else 'an owner'} holds {_held(lock)}"
        for letter, (kind, lock, hold) in letters.items()
    )
    question = (
        "In which of these cases does RECLAIM of the page answer TDX_OPERAND_BUSY? Give a set of "
        f'letters such as {{"a", "b"}}, set() for none.\n{listed}'
    )
    return Variant(question, right, hint)


def _held(lock: str) -> str:
    return "the 4K entry of its TDR" if lock == "TDR" else f"its {lock} entry"


def _noticed(gpaw: int, seed: int) -> Variant:
    scene, dice = PhymemScene(gpaw=gpaw), random.Random(seed + 2)
    bug, outcomes = _telling_bug(scene, dice)
    names = [style.name for style in STYLES]

    def hint(given: Sequence[Any]) -> str:
        said = [str(word).strip().casefold() for word in given]
        if len(said) != len(names) or set(said) - set(OUTCOMES):
            return f"Give {len(names)} of the words {', '.join(OUTCOMES)}, one for each style."
        wrong = [name for name, a, b in zip(names, said, outcomes, strict=True) if a != b]
        return (
            f"Not for {', '.join(wrong)}. What does this caller have in its hands, what does the "
            "function declare, and what does the module check? bug_rows(scene, [bug]) tells, with "
            "the bug of all_bugs() that is printed like this one."
        )

    question = (
        f'A bug: "{bug}". Who notices it in the styles {", ".join(names)}? Give a tuple of four '
        f"texts, each of {', '.join(map(repr, OUTCOMES))}. (start is 0 and again is 1.)"
    )
    return Variant(question, outcomes, hint)


def _telling_bug(scene: PhymemScene, dice: random.Random) -> tuple[Bug, tuple[str, ...]]:
    """A bug that not all styles treat alike, and what each makes of it."""
    outcomes: tuple[str, ...] = ()
    for bug in dice.sample(all_bugs(), k=40):
        outcomes = bug_rows(scene, [bug])[0][1:]
        if len(set(outcomes)) > 1 and HARMLESS not in outcomes:
            break
    return bug, outcomes


EXERCISES = (
    Exercise("10.1", _count_all),
    Exercise("10.2", _saved),
    Exercise("10.3", _tables),
    Exercise("10.4", _legal),
    Exercise("10.5", _leak),
    Exercise("10.6", _reclaims),
    Exercise("10.7", _cascade),
    Exercise("10.8", _busy),
    Exercise("10.9", _noticed),
)
