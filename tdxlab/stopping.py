"""How a policy that somebody wrote is stopped: when it breaks a rule, and when it never ends."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator
from types import FrameType
from typing import Any, NamedTuple, NoReturn

#: Lines that a policy may run between two of its calls.
MOST_LINES = 200_000


class Violation(NamedTuple):
    """What a policy did wrong. rule: short name of the rule; explanation: in words."""

    rule: str
    explanation: str

    def __str__(self) -> str:
        return f"{self.rule}: {self.explanation}"


class Stopped(BaseException):
    """A policy broke a rule, and is not to go on: no `except Exception` of its own holds it."""

    def __init__(self, violation: Violation) -> None:
        super().__init__(str(violation))
        self.violation = violation


class LineLimit:
    """Counts the lines of Python that run between `start` and `stop`, and raises Stopped at too
    many. what: "zap", for example, in words; most: lines.

    Where a debugger or a profiler of lines is at work already, it counts nothing.
    Differs: a loop inside of one call of a built-in function is one line, and can be endless.
    """

    def __init__(self, what: str, most: int = MOST_LINES) -> None:
        self._what = what
        self._most = most
        self._lines = 0
        self._is_on = False
        #: why the policy is not to go on, None as long as it is
        self.stopped: Stopped | None = None

    def start(self) -> None:
        """Count from 0."""
        self._lines = 0
        if sys.gettrace() is None:
            self._is_on = True
            sys.settrace(self._enter)

    def stop(self) -> None:
        """Count no more."""
        if self._is_on:
            self._is_on = False
            sys.settrace(None)

    def insist(self, stopped: Stopped) -> NoReturn:
        """Raise, and raise again at the policy's next line, should it catch that: a bare `except`
        in a loop holds nobody for ever. The first reason stays.
        """
        self.stopped = self.stopped or stopped
        self.start()
        raise self.stopped

    def run(self, function: Callable[..., object], *arguments: object) -> None:
        """Call a function that somebody wrote. Raises Stopped if it broke a rule on the way, ran
        too many lines, raised something, or has a `yield` in it and so did nothing.
        """
        self.start()
        try:
            if isinstance(function(*arguments), Generator):
                text = "it has a `yield` in it: calling it does nothing"
                raise Stopped(Violation("policy", text))
        except (Exception, SystemExit) as mistake:
            what = f"{type(mistake).__name__}: {mistake}"
            where = line_of(mistake, function)
            raise Stopped(Violation("policy", f"it raised {what}{where}")) from None
        finally:
            self.stop()
        if self.stopped is not None:
            raise self.stopped

    def _enter(self, frame: FrameType, event: str, arg: Any) -> Callable[..., Any] | None:
        return self._line if self.stopped is None else None

    def _line(self, frame: FrameType, event: str, arg: Any) -> Callable[..., Any]:
        if event == "line":
            if self.stopped is not None:
                raise self.stopped
            self._lines += 1
            if self._lines > self._most:
                text = f"the {self._what} has no end: {self._most} lines ran without a call"
                self.stopped = Stopped(Violation("end", text))
                raise self.stopped
        return self._line


def line_of(mistake: BaseException, function: Callable[..., Any]) -> str:
    """Where in `function` an exception came up: " (line 3 of zap)", counted from its `def`; "" if
    it did not.
    """
    code = getattr(function, "__code__", None)
    traceback = mistake.__traceback__
    while traceback is not None:
        if traceback.tb_frame.f_code is code:
            line = traceback.tb_lineno - traceback.tb_frame.f_code.co_firstlineno + 1
            return f" (line {line} of {traceback.tb_frame.f_code.co_name})"
        traceback = traceback.tb_next
    return ""
