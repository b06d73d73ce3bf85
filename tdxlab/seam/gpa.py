"""GPA operands of TDCALLs: the module reads and writes guest memory on the guest's behalf.

Source: TDX module 1.5.01, helpers.c, check_walk_and_map_guest_side_gpa.
"""

from __future__ import annotations

from typing import NamedTuple

from tdxlab.abi.outcome import GuestOutcome
from tdxlab.abi.status import TDX_OPERAND_INVALID
from tdxlab.arch import EPT_LEAF, EPT_READ, EPT_RWX, EPT_WRITE, HPA_MASK, shared_bit
from tdxlab.seam import sept
from tdxlab.seam.call import Refused
from tdxlab.seam.checks import is_private_gpa
from tdxlab.seam.exits import EXIT_EPT_VIOLATION, Guest, async_exit, inject_ve
from tdxlab.seam.td import TD_CTLS_PENDING_VE_DISABLE, Tdcs, Tdvps

_PENDING_PAGE = 6
_SUPPRESS_VE = 1 << 63


class LeaveGuest(Exception):
    """The TDCALL does not end here: a TD exit, a #VE, or the same instruction again."""

    def __init__(self, outcome: GuestOutcome) -> None:
        super().__init__(outcome)
        self.outcome = outcome


class Mapped(NamedTuple):
    """Guest memory that the module may use: HPA of the byte, and the KeyID it is read and written
    with.
    """

    hpa: int
    keyid: int


def map_private(guest: Guest, gpa: int, operand: int, *, write: bool = False) -> Mapped:
    """Find the private byte at `gpa`. write: the module will write there too.

    Refuses, in order: OPERAND_INVALID with `operand` for a GPA that is shared or too wide; a page
    that is not accepted or not there leaves the guest (#VE or TD exit), and the guest runs the
    TDCALL again.
    """
    if not is_private_gpa(gpa, guest.td_field(Tdcs.GPAW)):
        raise Refused(TDX_OPERAND_INVALID + operand)
    memory = guest.module.memory
    wanted = EPT_READ | (EPT_WRITE if write else 0)
    place = sept.walk(memory, guest.td_field(Tdcs.EPTP), gpa, 0)
    septe = place.septe
    if not septe & sept.LEAF or wanted & ~septe:
        _refuse_private(guest, gpa, septe, wanted)
    offset = gpa & ((1 << (12 + 9 * place.sept_level)) - 1)
    return Mapped(sept.leaf_hpa(place) | offset, guest.td.hkid)


def _refuse_private(guest: Guest, gpa: int, septe: int, wanted: int) -> None:
    qualification = (wanted & ~septe) | (septe & EPT_RWX) << 3
    extended = 0
    if sept.is_pending(septe):
        if not guest.td_field(Tdcs.TD_CTLS) & TD_CTLS_PENDING_VE_DISABLE:
            outcome = inject_ve(guest, EXIT_EPT_VIOLATION, qualification=qualification, gpa=gpa)
            raise LeaveGuest(outcome)
        extended = _PENDING_PAGE
    raise LeaveGuest(
        async_exit(
            guest,
            EXIT_EPT_VIOLATION,
            qualification=qualification,
            extended=extended,
            gpa=gpa & ~0xFFF,
        )
    )


def map_any(guest: Guest, gpa: int, operand: int, *, write: bool = False) -> Mapped:
    """Find the byte at `gpa`, private or shared; arguments and refusals as `map_private`.

    A shared GPA is walked through the EPT that the host gave for it; what is not there is a #VE or
    a TD exit, as bit 63 of the entry says.
    """
    bit = shared_bit(52 if guest.td_field(Tdcs.GPAW) else 48)
    if gpa >> bit != 1:
        return map_private(guest, gpa, operand, write=write)
    return _walk_shared(guest, gpa, EPT_READ | (EPT_WRITE if write else 0))


def _walk_shared(guest: Guest, gpa: int, wanted: int) -> Mapped:
    memory = guest.module.memory
    table = guest.field(Tdvps.SHARED_EPTP) & HPA_MASK
    level = guest.td_field(Tdcs.EPTP) >> 3 & 7
    while True:
        hpa, keyid = memory.split(table + (gpa >> (12 + 9 * level) & 511) * 8)
        entry = int.from_bytes(memory.read(hpa, 8, keyid), "little")
        if wanted & ~entry:
            _refuse_shared(guest, gpa, entry, wanted)
        if entry & EPT_LEAF or level == 0:
            size = 1 << (12 + 9 * level)
            return Mapped(*memory.split((entry & HPA_MASK & -size) | (gpa & (size - 1))))
        table, level = entry & HPA_MASK, level - 1


def _refuse_shared(guest: Guest, gpa: int, entry: int, wanted: int) -> None:
    qualification = wanted & ~entry
    if entry & _SUPPRESS_VE:
        page = gpa & ~0xFFF
        outcome = async_exit(guest, EXIT_EPT_VIOLATION, qualification=qualification, gpa=page)
    else:
        outcome = inject_ve(guest, EXIT_EPT_VIOLATION, qualification=qualification, gpa=gpa)
    raise LeaveGuest(outcome)
