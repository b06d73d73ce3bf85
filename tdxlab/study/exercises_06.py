"""The exercises of notebook 06: shared memory; every answer is what the model does."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache
from typing import Any

from tdxlab.arch import ENTRIES_PER_TABLE
from tdxlab.study.exercises import Exercise, Variant
from tdxlab.study.shared_lab import DEVICE_GPA, TD, VM, Outcome, SharedLab, level_name
from tdxlab.study.shared_tables import call_rows, kind_of, letters

Deeds = tuple[Callable[[SharedLab], Outcome], ...]


# -- 06.1: what will a write do?

_BEFORE: dict[str, Deeds] = {
    "2M, first write splits": (
        lambda lab: lab.touch("2M", 5, write=True),
        lambda lab: lab.log("2M", eager=False),
    ),
    "2M, not logged": (lambda lab: lab.touch("2M", 5),),
    "2M, split at the start": (lambda lab: lab.touch("2M", 5), lambda lab: lab.log("2M")),
    "4K, logged": (lambda lab: lab.touch("4K", 5), lambda lab: lab.log("4K")),
    "2M, logged in vain": (
        lambda lab: lab.touch("2M", 5),
        lambda lab: lab.log("2M", eager=False),
        lambda lab: lab.stop("2M"),
    ),
    "2M, written since": (
        lambda lab: lab.touch("2M", 5),
        lambda lab: lab.log("2M"),
        lambda lab: lab.touch("2M", 5, write=True),
    ),
    "1G, first write splits": (
        lambda lab: lab.touch("1G", 5),
        lambda lab: lab.log("1G", eager=False),
    ),
}
_ENDS = ("no fault", "fast", "slow")


@cache
def _next_write(gpaw: int, seed: int) -> Variant:
    name = list(_BEFORE)[seed % len(_BEFORE)]
    size = name[:2]
    lab = SharedLab(gpaw=gpaw)
    for deed in _BEFORE[name]:
        deed(lab)
    entry = lab.entry(size, 5)
    assert entry is not None
    logged = "is" if lab.is_logging(size) else "is not"
    gained = lab.touch(size, 5, write=True).gained
    answer = _ENDS[1 + ("fast" not in gained)] if "faults" in gained else _ENDS[0]

    def hint(given: str) -> str:
        if str(given).strip().casefold() not in _ENDS:
            return f"{given!r} is none of the three; choose from {', '.join(_ENDS)}."
        return (
            "Ask in this order: is W set? If not, is MW set, so that W may come back? And would "
            "that let a large page be written whose writes are logged one by one?"
        )

    question = (
        f"A page is mapped by a {level_name(entry.level)} leaf with {letters(entry.raw)}. Its slot "
        f'{logged} dirty-logged. What does the next write meet: "no fault", a "fast" one, which '
        'only gives W back, or a "slow" one?'
    )
    return Variant(question, answer, hint)


# -- 06.2: how many faults?


@cache
def _faults(gpaw: int, seed: int) -> Variant:
    dice = random.Random(seed)
    size, step, pages = ("2M", 128, 24)
    if seed:
        size = dice.choice(["2M", "4K"])
        step, pages = dice.choice([16, 32, 64, 128, 256]), dice.randrange(12, 40)
    answer = SharedLab(gpaw=gpaw).touch(size, 0, pages, step=step, write=True).gained["faults"]

    def hint(given: int) -> str:
        where = "fewer" if given > answer else "more"
        return (
            f"There are {where}. The last page written is number {(pages - 1) * step}. How many "
            f"host pages of {size} does the walk from 0 to there meet, and how often does each "
            "of them have to be mapped?"
        )

    question = (
        f"The guest writes {pages} pages, numbers 0, {step}, {2 * step} and so on, of a fresh "
        f"shared memory in {size} host pages. How many EPT violations does that take?"
    )
    return Variant(question, answer, hint)


# -- 06.3: what splitting costs


@cache
def _split(gpaw: int, seed: int) -> Variant:
    dice = random.Random(seed)
    large = dice.randrange(2, 9) if seed else 3
    unused = dice.randrange(1, 9)
    lab = SharedLab(gpaw=gpaw)
    lab.touch("2M", 0, large, step=ENTRIES_PER_TABLE)
    gained = lab.log("2M").gained
    answer = (gained["tables"], gained["pages_4k"])

    def hint(given: Any) -> str:
        if len(tuple(given)) != 2:
            return "Two numbers are asked for: tables, then 4K leaves."
        tables, leaves = given
        wrong = [
            "a split replaces one 2M entry by one table" * (tables != answer[0]),
            "every entry of a new table is filled" * (leaves != answer[1]),
        ]
        said = "; ".join(filter(None, wrong)) or "compare with SharedLab"
        return f"Mind that {said}, and that what is not mapped is not split."

    question = (
        f"The guest has used {large} of the first {large + unused} large pages of a memory in 2M "
        "host pages. Dirty logging starts, with eager split. How many tables and how many 4K "
        "leaves are there more? Give a pair such as (1, 1)."
    )
    return Variant(question, answer, hint)


# -- 06.4: the second log


@cache
def _second_log(gpaw: int, seed: int) -> Variant:
    dice = random.Random(seed)
    first = sorted(dice.sample(range(10), 3))
    again = sorted({first[0], *dice.sample(range(10), 2)})
    read = next(page for page in range(10) if page not in again)
    lab = SharedLab(gpaw=gpaw)
    lab.touch("2M", 0)
    lab.log("2M", eager=bool(seed % 2))
    _write(lab, first)
    lab.get_log("2M")
    _write(lab, again)
    lab.touch("2M", read)
    answer = frozenset(lab.dirty("2M"))

    def hint(given: Any) -> str:
        found = frozenset(given)
        if read in found and read not in answer:
            return f"Page {read} was only read since; reads leave no trace in the log."
        if found - frozenset(again):
            return "KVM_GET_DIRTY_LOG clears what it returns: only later writes count."
        return "A page that was in the first log is write-protected again, and noticed again."

    question = (
        f"A 2M memory is logged. The guest writes pages {_words(first)}. KVM_GET_DIRTY_LOG. The "
        f"guest writes pages {_words(again)} and reads page {read}. What does the next "
        "KVM_GET_DIRTY_LOG return? Give a set."
    )
    return Variant(question, answer, hint)


def _write(lab: SharedLab, pages: list[int]) -> None:
    for page in pages:
        lab.touch("2M", page, write=True)


def _words(pages: list[int]) -> str:
    return ", ".join(map(str, pages))


# -- 06.5: SEAMCALLs


@cache
def _seamcalls(gpaw: int, seed: int) -> Variant:
    dice = random.Random(seed)
    pages = dice.randrange(8, 200) if seed else 40
    is_shared = bool(seed % 2)
    kind = "shared" if is_shared else "private"
    rows = [row for row in call_rows(SharedLab(gpaw=gpaw), pages) if row.leaf != "TDH.VP.ENTER"]
    answer = sum(row.shared if is_shared else row.private for row in rows)

    def hint(given: int) -> str:
        if is_shared:
            return (
                "No SEAMCALL maps a shared page: KVM writes the direct EPT itself. One call tells "
                "the module where that EPT is."
            )
        return (
            f"That is too {'many' if given > answer else 'few'}. Count one call for each page, one "
            "for each table of the Secure EPT below its root, and the one that gives the vCPU its "
            "direct EPT."
        )

    question = (
        f"The guest of a fresh TD writes {pages} {kind} pages that follow each other, within one "
        "2 MiB range, its first use of any memory. How many SEAMCALLs does that take, "
        "TDH.VP.ENTER not counted?"
    )
    return Variant(question, answer, hint)


# -- 06.6: devices


@cache
def _mmio(gpaw: int, seed: int) -> Variant:
    dice = random.Random(seed)
    kind = TD if seed % 2 == 0 else VM
    over = dice.random() < 0.5 if seed else True
    reads, after = (dice.randrange(2, 5), dice.randrange(2, 5)) if seed else (2, 3)
    lab = SharedLab(gpaw=gpaw, kind=kind)
    faults = [lab.device(times=reads), lab.add_slot(0 if over else 9), lab.device(times=after)]
    last = lab.walk(DEVICE_GPA)[-1]
    answer = (
        sum(one.gained.get("faults", 0) for one in faults),
        kind_of(lab, last.raw, last.level),
    )
    where = "at that very page" if over else "at another page"

    def hint(given: Any) -> str:
        if len(tuple(given)) != 2:
            return "A number of faults and the kind of the entry are asked for."
        if kind == TD:
            return (
                "In a TD the MMIO entry has suppress-#VE clear: after the first access the guest "
                "gets a #VE and asks with a hypercall. Who then looks at the memslots' generation?"
            )
        return (
            "A default VM's MMIO entry exits as a misconfiguration every time, and KVM compares "
            "generations. An entry that is out of date is a fault, and is made anew."
        )

    question = (
        f"The guest of a {kind} reads a device page {reads} times. The VMM adds a page of RAM "
        f"{where}. The guest reads {after} times more. How many faults does KVM count (pf_taken), "
        'and what is the entry at the end, "MMIO" or "leaf"? Give a pair such as (1, "leaf").'
    )
    return Variant(question, answer, hint)


# -- 06.7: ageing

_STORIES: dict[str, Callable[[SharedLab], Outcome]] = {
    "reads": lambda lab: lab.touch("4K", 0),
    "flush": lambda lab: lab.flush(),
    "age": lambda lab: lab.age("4K", 0, 1),
}


@cache
def _young(gpaw: int, seed: int) -> Variant:
    dice = random.Random(seed)
    kind = VM if seed % 2 == 0 else TD
    story = ["reads", "age", "reads", "flush", "reads"]
    if seed:
        story = ["reads", "age", *dice.choices(["reads", "flush", "age"], k=2), "reads"]
    lab = SharedLab(gpaw=gpaw, kind=kind)
    answer = []
    for name in story:
        _STORIES[name](lab)
        answer.append(lab.is_young("4K", 0))
    told = {"reads": "the guest reads", "flush": "KVM flushes the TLB", "age": "the host ages it"}

    def hint(given: Any) -> str:
        if len(tuple(given)) != len(answer):
            return f"{len(answer)} answers are asked for, one after each deed."
        wrong = next(n for n, (a, b) in enumerate(zip(given, answer, strict=True)) if a != b)
        cpu = (
            "A TD's EPTs have A and D off, so nobody but KVM sets A, and KVM only when it maps."
            if kind == TD
            else "The CPU sets A when it walks, and it walks only where the TLB knows nothing."
        )
        return f"Deed {wrong + 1} ({told[story[wrong]]}) is the first that differs. {cpu}"

    question = (
        f"One page of a {kind}: {'; '.join(told[name] for name in story)}. Is the page young "
        "after each of these? Give a list of True and False."
    )
    return Variant(question, tuple(answer), hint)


EXERCISES = (
    Exercise("06.1", _next_write),
    Exercise("06.2", _faults),
    Exercise("06.3", _split),
    Exercise("06.4", _second_log),
    Exercise("06.5", _seamcalls),
    Exercise("06.6", _mmio),
    Exercise("06.7", _young),
)
