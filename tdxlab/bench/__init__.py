"""The benchmark: the model's speed as ratios to a plain-Python baseline, measured in one run.

A ratio above 1 means that the model is faster than `baseline.py` and, through KVM,
`baseline_mmu.py`. Both sides take turns, so that a machine that slows down slows both; the best of
three rounds counts. Figures without a ratio are reported beside a goal and are never asserted.

What a fault spends its time on (of 17 us): 7 in the module, 3 to find the page, 7 to lock, walk,
freeze, publish and count. Each of the eight generators that are suspended inside each other costs
about 0.1 us to make and 0.03 us for every step that passes through it; a conversion, with nine
steps a page, pays that most. Next come the words themselves: a `memoryview` item takes 0.03 us to
read and 0.04 us to write where a list takes a fifth of that, which is the price of 8 bytes an
entry and of a journal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple, TextIO

from tdxlab.bench import figures
from tdxlab.bench.kvm_workloads import BaselineKvm, ModelKvm, kvm_round
from tdxlab.bench.workloads import PAGES, BaselineBench, ModelBench, full_round

ROUNDS = 3

#: Least ratio of the model's speed to the baseline's: the module alone, then through KVM.
GOALS = {"AUG": 0.4, "zap": 0.4, "RECLAIM": 0.3, "fault": 0.4, "convert": 0.4}

_SIDES: tuple[tuple[str, type[ModelBench | BaselineBench], type[ModelKvm | BaselineKvm]], ...] = (
    ("model", ModelBench, ModelKvm),
    ("baseline", BaselineBench, BaselineKvm),
)


class Ratio(NamedTuple):
    """One kind of work: CPU microseconds a page on both sides."""

    work: str
    model: float
    baseline: float

    @property
    def ratio(self) -> float:
        """Speed of the model divided by speed of the baseline."""
        return self.baseline / self.model


def ratios(
    pages: int = PAGES, rounds: int = ROUNDS, progress: Callable[[str], None] = lambda _: None
) -> list[Ratio]:
    """Measure all work on both sides, `pages` pages each, best slice of `rounds` rounds."""
    best: dict[str, dict[str, float]] = {"model": {}, "baseline": {}}
    for number in range(1, rounds + 1):
        for side, make, make_kvm in _SIDES:
            progress(f"round {number} of {rounds}: {side}")
            found = full_round(make(pages), pages) | kvm_round(make_kvm(pages), pages)
            for work, seconds in found.items():
                best[side][work] = min(seconds, best[side].get(work, seconds))
    micro = 1e6
    return [
        Ratio(work, best["model"][work] * micro, best["baseline"][work] * micro) for work in GOALS
    ]


def table(measured: list[Ratio]) -> Iterator[str]:
    """The ratios as lines."""
    yield f"{'work':<10}{'model':>12}{'baseline':>12}{'ratio':>8}{'goal':>8}"
    for row in measured:
        left = f"{row.work:<10}{row.model:>9.2f} us{row.baseline:>9.2f} us"
        yield f"{left}{row.ratio:>8.2f}{'>= ' + str(GOALS[row.work]):>8}"


def main(out: TextIO, err: TextIO | None = None) -> int:
    """`tdxlab bench`: print ratios and figures to `out`, progress to `err` if it is a terminal;
    returns 0."""

    def progress(text: str) -> None:
        if err is not None and err.isatty():
            print(f"\r{text:<60}", end="", file=err, flush=True)

    print("\n".join(table(ratios(progress=progress))), file=out)
    print(file=out)
    for measure in figures.ALL:
        progress(measure.__name__.replace("_", " "))
        print(measure(), file=out, flush=True)
    progress("")
    return 0
