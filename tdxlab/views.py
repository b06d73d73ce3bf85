"""Looking at a machine from the lab bench: what no host could see, as plain tables.

Everything here only reads. Addresses are HPAs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from tdxlab.arch import HPA_MASK
from tdxlab.bare import BareMachine
from tdxlab.seam import sept
from tdxlab.seam.measure import DIGEST_SIZE
from tdxlab.seam.pamt import SIZE_NAMES, PamtEntry
from tdxlab.seam.rules import (
    HKID_STATE_NAMES,
    PAGE_TYPE_NAMES,
    PT_TDR,
    SEPT_STATE_BY_BITS,
    SEPT_STATE_MASK,
)
from tdxlab.seam.td import SEPT_ROOT_PAGE, Tdcs, Tdr

#: TDCS pages that a TD must have before its TDCS can be looked at.
_READABLE_TDCX = SEPT_ROOT_PAGE + 1

_TDR_FIELDS = {
    "fatal": Tdr.FATAL,
    "num_tdcx": Tdr.NUM_TDCX,
    "chldcnt": Tdr.CHLDCNT,
    "lifecycle_state": Tdr.LIFECYCLE,
    "hkid": Tdr.HKID,
    "pkg_config_bitmap": Tdr.PKG_CONFIG_BITMAP,
}
_TDCS_FIELDS = {
    "op_state": Tdcs.OP_STATE,
    "num_vcpus": Tdcs.NUM_VCPUS,
    "num_assoc_vcpus": Tdcs.NUM_ASSOC_VCPUS,
    "td_epoch": Tdcs.TD_EPOCH,
    "refcount0": Tdcs.REFCOUNT,
    "refcount1": Tdcs.REFCOUNT + 1,
}


class SeptRow(NamedTuple):
    """One S-EPT entry that is not free. entry_hpa: where the entry itself lies."""

    sept_level: int
    gpa: int
    raw: int
    state: str
    entry_hpa: int


class PamtRow(NamedTuple):
    """One PAMT entry in use. size: "4K", "2M" or "1G"; page_type: such as "PT_REG"."""

    size: str
    hpa: int
    page_type: str
    owner: int
    bepoch: int
    lock: int


class KeyRow(NamedTuple):
    """One KeyID that is not free. pending_packages: bitmap of packages that still have to be
    written back.
    """

    keyid: int
    state: str
    pending_packages: int


def tds(machine: BareMachine) -> list[int]:
    """TDRs of all TDs that are there, in whatever state, ascending."""
    return [row.hpa for row in machine.module.pamt.in_use() if row.page_type == PT_TDR]


def td_info(machine: BareMachine, tdr: int) -> dict[str, int]:
    """The fields of a TD: those of its TDR, and those of its TDCS once four pages of it are
    there.
    """
    view = machine.memory.words.view
    page = machine.memory.frame(tdr)
    info = {name: view[page + word] for name, word in _TDR_FIELDS.items()}
    if info["num_tdcx"] >= _READABLE_TDCX:
        tdcs = _tdcx(machine, tdr, 0)
        info |= {name: view[tdcs + word] for name, word in _TDCS_FIELDS.items()}
    return info


def _tdcx(machine: BareMachine, tdr: int, index: int) -> int:
    """Word index of the frame of a TDCS page."""
    memory = machine.memory
    pa = memory.words.view[memory.frame(tdr) + Tdr.TDCX_PA + index]
    return memory.frame(pa & memory.pa_mask & HPA_MASK)


def mrtd(machine: BareMachine, tdr: int) -> str:
    """MRTD of a TD as 96 hex digits; zeros before TDH.MR.FINALIZE."""
    return machine.memory.words.read(_tdcx(machine, tdr, 0) + Tdcs.MRTD, DIGEST_SIZE // 8).hex()


def sept_rows(machine: BareMachine, tdr: int) -> Iterator[SeptRow]:
    """Every S-EPT entry of a TD that is not free, parents first; below blocked tables too.

    A TD without its root table or without parameters has none.
    """
    view, page = machine.memory.words.view, machine.memory.frame(tdr)
    if view[page + Tdr.NUM_TDCX] < _READABLE_TDCX:
        return
    eptp = view[_tdcx(machine, tdr, 0) + Tdcs.EPTP]
    if not eptp:
        return
    for level, gpa, raw, entry_hpa in sept.entries(machine.memory, eptp):
        state = SEPT_STATE_BY_BITS.get(raw & SEPT_STATE_MASK)
        yield SeptRow(level, gpa, raw, state.name if state else "?", entry_hpa)


def pamt_rows(machine: BareMachine) -> Iterator[PamtRow]:
    """Every PAMT entry in use, or locked; 1G, 2M, 4K of each TDMR."""
    for entry in machine.module.pamt.in_use():
        yield _pamt_row(entry)


def _pamt_row(entry: PamtEntry) -> PamtRow:
    page_type = PAGE_TYPE_NAMES.get(entry.page_type, str(entry.page_type))
    size = SIZE_NAMES[entry.size]
    return PamtRow(size, entry.hpa, page_type, entry.owner, entry.bepoch, entry.lock)


def key_rows(machine: BareMachine) -> Iterator[KeyRow]:
    """Every KeyID that is not free."""
    for keyid, state, pending in machine.module.keys.in_use():
        yield KeyRow(keyid, HKID_STATE_NAMES[state].removeprefix("HKID_"), pending)
