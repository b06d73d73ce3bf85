"""One attack on a tape: recorded at once, then walked through.

lab = AttackLab(gpaw=48)
lab.record("stale-tlb")                 # on a stage of its own
lab.stage.tape.seek(2)                  # stand behind its second move
lab.report.stopped_by
"""

from __future__ import annotations

from tdxlab.abi.status import is_error
from tdxlab.attacks import Report, find, make_stage, perform
from tdxlab.attacks.stage import Move, Stage
from tdxlab.study.aes_xts import AesXts


class AttackLab:
    """A stage, and an attack on it. gpaw: 48 or 52. stage, report: of the attack recorded last."""

    stage: Stage
    report: Report

    def __init__(self, *, gpaw: int = 48, name: str = "read-private") -> None:
        self.gpaw = gpaw
        self.record(name)

    def record(self, name: str, lacks: str = "nothing") -> None:
        """Try an attack on a new stage, and go back to before its first move.

        name, lacks: as for `tdxlab.attacks.attack`. Refuses others: ValueError.
        """
        self.stage = make_stage(name, gpaw=self.gpaw, lacks=lacks, cipher=AesXts())
        self.report = perform(find(name), self.stage, lacks)
        self.stage.tape.seek(0)

    @property
    def is_over(self) -> bool:
        """All moves have been made."""
        return self.stage.tape.position == len(self.stage.tape)

    def refused(self) -> int:
        """SEAMCALLs that the module has refused so far."""
        statuses = [move.status for move in self.stage.moves if move.kind == "SEAMCALL"]
        return sum(is_error(status) for status in statuses if status is not None and status > 0)

    def all_moves(self) -> tuple[Move, ...]:
        """All moves, those to come too."""
        return self.report.moves
