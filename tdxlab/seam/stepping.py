"""The zero-step filter: a host that keeps a guest faulting at one instruction is stopped from
learning more that way.

Each private EPT-violation exit at the RIP of the last entry counts. From the seventh on the GPA is
logged; while the log is not empty TDH.VP.ENTER first walks to every logged GPA and does not enter
until all of them are mapped.

Source: TDX module 1.5.01, td_exit_stepping.c.
Differs: the single-step filter is left out; the interrupts of the recorded traces are all delivered
at once. RIP is a number that the caller gives or that a TDCALL advances by its length.
"""

from __future__ import annotations

from tdxlab.arch import EPT_RWX
from tdxlab.memory import Memory
from tdxlab.seam import sept
from tdxlab.seam.td import Tdcs, Tdvps

#: Exits that only count before GPAs are logged, and the length of the log.
THRESHOLD = 6
LOG_LENGTH = 32


def reset_if_moved(memory: Memory, page: int) -> None:
    """A VM exit with RIP moved since the last entry empties the log and the count."""
    words = memory.words
    if words.view[page + Tdvps.RIP] != words.view[page + Tdvps.RIP_AT_ENTRY]:
        for word in (Tdvps.EPF_COUNTER, Tdvps.EPF_COUNT):
            if words.view[page + word]:
                words.put(page + word, 0)


def note_violation(memory: Memory, page: int, gpa: int) -> None:
    """A private EPT violation is about to exit to the host. gpa: as the CPU reported it."""
    words, view = memory.words, memory.words.view
    if view[page + Tdvps.EPF_COUNTER] < THRESHOLD:
        words.put(page + Tdvps.EPF_COUNTER, view[page + Tdvps.EPF_COUNTER] + 1)
        return
    length = view[page + Tdvps.EPF_COUNT]
    if length < LOG_LENGTH and gpa not in logged(memory, page):
        words.put(page + Tdvps.EPF_GPAS + length, gpa)
        words.put(page + Tdvps.EPF_COUNT, length + 1)


def logged(memory: Memory, page: int) -> list[int]:
    """The logged GPAs, oldest first; empty while the filter is not armed."""
    first = page + Tdvps.EPF_GPAS
    return list(memory.words.view[first : first + memory.words.view[page + Tdvps.EPF_COUNT]])


def still_failing(memory: Memory, page: int, tdcs: int) -> int | None:
    """The first logged GPA that the guest could not read, write and execute; None if all are
    mapped.
    """
    eptp = memory.words.view[tdcs + Tdcs.EPTP]
    for gpa in logged(memory, page):
        septe = sept.walk(memory, eptp, gpa, 0).septe
        if not septe & sept.LEAF or septe & EPT_RWX != EPT_RWX:
            return gpa
    return None
