"""What came of lives in which something failed, one by one and as a table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from tdxlab.failures import Failure

#: What KVM has told when something failed; BUG: the host crashed.
BUG = "BUG"
KVM_BUG_ON, WARN_ON, TO_USER, NOTHING = "KVM_BUG_ON", "WARN_ON", "an error", "nothing"


class Run(NamedTuple):
    """One life with failures. gpaw: 48 or 52. seed, number: of a random life, None for others."""

    gpaw: int
    failures: tuple[Failure, ...]
    way: str = ""
    seed: int | None = None
    number: int | None = None

    def __str__(self) -> str:
        what = "; ".join(str(failure) for failure in self.failures) or "nothing fails"
        random_one = "" if self.seed is None else f"seed {self.seed}, run {self.number}: "
        return f"GPAW {self.gpaw}, {random_one}{what}"

    @property
    def command(self) -> str:
        """How to see it again."""
        start = f"tdxlab faults --gpaw {self.gpaw}"
        if self.seed is not None:
            return f"{start} --seed {self.seed} --only {self.number}"
        return f"{start} --leaf {self.failures[0].target}" if self.failures else start


class Verdict(NamedTuple):
    """What came of one run.

    deeds: what the life consisted of. struck: calls that failed on purpose; 0 where the life never
    came to them. deed: what the TD was at when the first failed, or at its end. outcome: GONE,
    UNFINALISED, DEAD, LOOPS, USABLE or CRASHED, of lives.py; of a TD that failed while it was taken
    apart: GONE. said: how the kernel told of it: BUG, KVM_BUG_ON, WARN_ON, TO_USER, NOTHING. leaks:
    (what a page was for, pages), by name. keyid_lost: the host can never use the TD's KeyID again.
    looped: deed that only a signal ended. broken: what does not balance, "" if all is well.
    """

    run: Run
    deeds: tuple[str, ...]
    struck: int
    deed: str
    outcome: str
    said: str
    leaks: tuple[tuple[str, int], ...]
    keyid_lost: bool
    looped: str
    broken: str

    @property
    def leaked(self) -> str:
        """The leaks in words."""
        parts = [f"{role} x {count}" for role, count in self.leaks]
        return ", ".join(["KeyID"] * self.keyid_lost + parts) or "none"


class Row(NamedTuple):
    """Systematic runs of one leaf that came to the same. ways: of failing. calls: number of each
    call that failed, as text. runs: how many. leaks: (what pages were for, fewest, most pages). The
    rest as in `Verdict`.
    """

    leaf: str
    ways: tuple[str, ...]
    calls: str
    runs: int
    outcome: str
    said: str
    leaks: tuple[tuple[str, int, int], ...]
    keyid_lost: bool

    @property
    def leaked(self) -> str:
        """The leaks in words."""
        parts = [
            f"{role} x {least}" if least == most else f"{role} x {least}-{most}"
            for role, least, most in self.leaks
        ]
        return ", ".join(["KeyID"] * self.keyid_lost + parts) or "none"


def rows(verdicts: Iterable[Verdict]) -> list[Row]:
    """Systematic runs as a table: leaf x ways of failing -> outcome, leaks."""
    groups: dict[tuple[Any, ...], list[Verdict]] = {}
    for found in verdicts:
        if found.run.seed is None and found.run.failures:
            roles = tuple(role for role, _ in found.leaks)
            key = (found.run.failures[0].target, found.run.way)
            came = (found.outcome, found.said, roles, found.keyid_lost)
            groups.setdefault(key + came, []).append(found)
    merged: dict[Row, list[str]] = {}
    for (leaf, way, outcome, said, roles, keyid_lost), group in groups.items():
        calls = as_ranges(sorted({found.run.failures[0].n for found in group}))
        leaks = tuple((role, *_range(group, role)) for role in roles)
        row = Row(leaf, (), calls, len(group), outcome, said, leaks, keyid_lost)
        merged.setdefault(row, []).append(way)
    return [
        row._replace(ways=tuple(ways), runs=row.runs * len(ways)) for row, ways in merged.items()
    ]


def _range(group: Sequence[Verdict], role: str) -> tuple[int, int]:
    counts = [dict(found.leaks)[role] for found in group]
    return min(counts), max(counts)


def as_ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers as people write them: "1-3, 7"."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][-1] == number - 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(f"{p[0]}-{p[-1]}" if len(p) > 1 else f"{p[0]}" for p in parts)
