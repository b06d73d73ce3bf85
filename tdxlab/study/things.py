"""Things that a host holds in its hands, by name: what to put into the registers of a SEAMCALL.

    things(machine, 48)["TDR"]            # HPA of the first TD's TDR page
    resolve("free page", held)            # its number, or a hint at what there is

Every name follows from the machine's present state alone: "free page" is the lowest page that the
PAMT has free, so it moves on when that one is taken and comes back with a step back.
"""

from __future__ import annotations

import difflib

from tdxlab import views
from tdxlab.abi.leaves import Leaf
from tdxlab.arch import PAGE_SIZE, SIZE_2M, level_size, sept_levels
from tdxlab.bare import BareMachine
from tdxlab.host import SOURCE_PAGE_BUFFER, TD_PARAMS_BUFFER
from tdxlab.scenarios import CODE_GPA, HEAP_GPA
from tdxlab.seam.rules import HKID_FREE, PT_NDA

#: No thing: a number that the reader types.
BY_HAND = "by hand"

#: Where the console keeps parameters that the module must refuse.
BAD_PARAMS_BUFFER = TD_PARAMS_BUFFER + PAGE_SIZE

#: What stands in for "a page that no TDMR holds".
_OUTSIDE = 0x2000_0000


#: Part of a register's meaning -> the thing that goes there; the first part that is found counts.
_USUAL = {
    "level of the linking entry": "GPA, level 3",
    "with the level": "GPA, level 0",
    "GPA": "GPA, level 0",
    "TD_PARAMS": "TD_PARAMS",
    "source page": "source page",
    "KeyID in its upper bits": "free page, module's KeyID",
    "private KeyID": "free KeyID",
    "TDR": "TDR",
    "new TDVPR page": "free page",
    "TDVPR": "TDVPR",
    "new": "free page",
    "HPA of the page": "TDR",
    "start": "0",
}


def things(machine: BareMachine, gpaw: int) -> dict[str, int]:
    """Name -> value of everything there is to hand over just now.

    gpaw: 48 or 52; decides how many levels of GPA there are. Pages of a type are numbered from 2
    on: "TDCX", "TDCX 2" ...
    """
    return (
        _free(machine)
        | owned(machine)
        | {
            "TD_PARAMS": TD_PARAMS_BUFFER,
            "bad TD_PARAMS": BAD_PARAMS_BUFFER,
            "source page": SOURCE_PAGE_BUFFER,
            "page outside the TDMR": _OUTSIDE,
        }
        | {
            f"GPA, level {level}": CODE_GPA & -level_size(level) | level
            for level in range(sept_levels(gpaw))
        }
        | {"next GPA, level 0": HEAP_GPA, "0": 0, "1": 1}
    )


def resolve(value: int | str, held: dict[str, int]) -> int:
    """The number that `value` stands for: itself, a name among `held`, or a number in text.

    Refuses anything else: ValueError that lists the nearest names.
    """
    if isinstance(value, int):
        return value
    if value in held:
        return held[value]
    try:
        return int(value.replace("_", ""), 0)
    except ValueError:
        near = difflib.get_close_matches(value, held, n=3, cutoff=0.3) or list(held)[:4]
        raise ValueError(
            f"nothing here is called {value!r} now; there is {', '.join(near)}, "
            "or give a number such as 0x100000000"
        ) from None


def usual_thing(leaf: Leaf, register: str) -> str:
    """The name of what usually goes into a register of a leaf; BY_HAND if nothing does."""
    meaning = leaf.inputs[register]
    if "new" in meaning and "HPA" in meaning:
        return "free page"
    return next((thing for part, thing in _USUAL.items() if part in meaning), BY_HAND)


def free_page(machine: BareMachine) -> int | None:
    """HPA of the lowest 4 KiB page in a TDMR that is free; None if none is."""
    pamt = machine.module.pamt
    for tdmr in machine.platform.tdmrs:
        hpa = tdmr.base
        while hpa < tdmr.base + tdmr.size:
            size = pamt.represented_at(hpa)
            if size == 0 and pamt.page_type(pamt.entry(hpa, 0)) == PT_NDA:
                return hpa
            hpa += level_size(size)
    return None


def owned(machine: BareMachine) -> dict[str, int]:
    """Every page in use by its type and number, and each TD's KeyID."""
    found: dict[str, int] = {}
    counts: dict[str, int] = {}
    for row in views.pamt_rows(machine):
        kind = row.page_type.removeprefix("PT_")
        if kind == "NDA":
            continue
        counts[kind] = counts.get(kind, 0) + 1
        number = "" if counts[kind] == 1 else f" {counts[kind]}"
        found[kind + number] = row.hpa
        if kind == "TDR":
            found[f"TD's KeyID{number}"] = views.td_info(machine, row.hpa)["hkid"]
    return found


def _free(machine: BareMachine) -> dict[str, int]:
    """What is free: pages and KeyIDs; and KeyIDs that are not to be had."""
    found: dict[str, int] = {}
    hpa = free_page(machine)
    if hpa is not None:
        module_key = machine.platform.global_keyid
        found["free page"] = hpa
        found["free page, module's KeyID"] = machine.memory.join(hpa, module_key)
    large = _free_2m(machine)
    if large is not None:
        found["free 2 MiB"] = large
    low, high = machine.platform.private_keyids
    states = machine.module.keys.states.view
    idle = [keyid for keyid in range(low, high + 1) if states[keyid] == HKID_FREE]
    if idle:
        found["free KeyID"] = idle[0]
    return found | {"module's KeyID": machine.platform.global_keyid, "shared KeyID": low - 1}


def _free_2m(machine: BareMachine) -> int | None:
    """HPA of the lowest 2 MiB range of a TDMR without a page in use; None if there is none."""
    pamt = machine.module.pamt
    for tdmr in machine.platform.tdmrs:
        for hpa in range(tdmr.base, tdmr.base + tdmr.size, SIZE_2M):
            if pamt.represented_at(hpa) == 0 and pamt.is_all_free(hpa):
                return hpa
    return None
