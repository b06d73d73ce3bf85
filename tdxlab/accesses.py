"""What a guest's program can do to memory, and what it is answered.

A program is a list of accesses, or a generator that yields them and is sent what came of each.
GPAs are what the CPU puts on its address bus: in a TD the SHARED bit says which memory is meant.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any, NamedTuple

from tdxlab.arch import PAGE_SIZE


class Read(NamedTuple):
    """Read `size` bytes at `gpa`; answered with the bytes."""

    gpa: int
    size: int = 8


class Write(NamedTuple):
    """Write `data` at `gpa`."""

    gpa: int
    data: bytes = b"\1"


class Fetch(NamedTuple):
    """Run an instruction at `gpa`."""

    gpa: int


class Accept(NamedTuple):
    """TDG.MEM.PAGE.ACCEPT of the page at `gpa`. sept_level: 0 (4 KiB) or 1 (2 MiB). Answered with
    the status.
    """

    gpa: int
    sept_level: int = 0


class MapGpa(NamedTuple):
    """Ask the host to convert `size` bytes at `gpa`: to shared memory with the SHARED bit set in
    `gpa`, to private memory without it. Answered with a MapGpaAnswer.
    """

    gpa: int
    size: int


class Hlt(NamedTuple):
    """Wait for an interrupt. timer: the guest's own timer gives it at once; False: only the VMM can
    (`Td.interrupt`, from another thread).
    """

    timer: bool = True


Access = Read | Write | Fetch | Accept | MapGpa | Hlt
Program = Iterable[Access] | Generator[Access, Any, Any]


class MapGpaAnswer(NamedTuple):
    """What the host said to MapGPA: `status` 0 for success; `gpa`: where it stopped, the end of the
    range if it did all.
    """

    status: int
    gpa: int


def require_kinds(access: Access) -> None:
    """Refuse, with a ValueError, an access with a value of the wrong kind."""
    if type(access) is Write and type(access.gpa) is int and type(access.data) is bytes:
        return
    for name, value in zip(access._fields, access, strict=True):
        if not isinstance(value, bytes | bytearray if name == "data" else int):
            kind = "bytes, such as b'hello'" if name == "data" else "an int"
            raise ValueError(f"{access!r}: {name} is {value!r}; give {kind}")


def pages_of(gpa: int, size: int) -> Iterator[tuple[int, int]]:
    """(start, length) of the part of `size` bytes at `gpa` in each page that they touch."""
    end = gpa + size
    while gpa < end:
        length = min(end, (gpa | PAGE_SIZE - 1) + 1) - gpa
        yield gpa, length
        gpa += length


def accesses_of(program: Program) -> Iterator[tuple[Access, Callable[[Any], None]]]:
    """(access, function that takes the answer) for each access of a list or a generator."""
    if not isinstance(program, Generator):
        for access in program:
            yield access, _ignore
        return
    answers: list[Any] = [None]
    while True:
        try:
            access = program.send(answers[0])
        except StopIteration:
            return
        yield access, lambda answer: answers.__setitem__(0, answer)


def _ignore(_answer: Any) -> None:
    """A list of accesses takes no answers."""
