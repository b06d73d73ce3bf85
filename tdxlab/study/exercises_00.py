"""The exercises of notebook 00: counting what a TD's life takes, and which tree it changes.

Every right answer is counted on a machine that lives the life in question.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

from tdxlab.accounts import DIRECT, EXTERNAL, MIRROR
from tdxlab.arch import PAGE_SIZE
from tdxlab.machine import Machine
from tdxlab.study.exercises import Exercise, Variant
from tdxlab.study.life_lab import SHARED, LifeLab
from tdxlab.study.tables import pamt_pages
from tdxlab.vmm_td import Td


def _told(general: str, special: dict[int, str]) -> Callable[[Any], str]:
    """A hint: the advice for a wrong answer that `special` knows, else `general`."""
    return lambda answer: special.get(answer, general)


def _td(gpaw: int, *, vcpus: int, pages: int, measured: bool = True) -> tuple[Machine, Td]:
    """A finalized TD whose initial pages lie side by side, on a machine of its own."""
    machine = Machine(gpaw=gpaw, memory="1 GiB", lps=vcpus, packages=1)
    td = machine.create_td(vcpus=vcpus, memory="2 MiB", launch=False)
    td.add_image(0, bytes(pages * PAGE_SIZE), measure=measured)
    td.finalize()
    return machine, td


def _calls_to_finalize(gpaw: int, seed: int) -> Variant:
    lab = LifeLab(gpaw=gpaw)
    lab.build()
    phases = [row.calls for row in lab.tape.phase_counts()]
    general = "Reset the panel, press Build, and read the number after SEAMCALLs."
    some = "That is one phase, or some of them. Add up all four phases of section 2."
    return Variant(
        "How many SEAMCALLs does KVM make from TDH.MNG.CREATE to TDH.MR.FINALIZE, for a TD with "
        f"one vCPU and one measured page, at GPAW {gpaw}?",
        sum(phases),
        _told(general, dict.fromkeys([*phases, phases[0] + phases[1]], some)),
    )


def _pages_owned(gpaw: int, seed: int) -> Variant:
    vcpus, pages = _draw(seed, (1, 1), most=(4, 200))
    machine, _ = _td(gpaw, vcpus=vcpus, pages=pages, measured=False)
    owned = sum(row.pages for row in pamt_pages(machine))
    tdr_missing = "Almost: the TDR is a page too, and the TD does not count it among its children."
    general = (
        "Add up the TDR, the TDCS pages, the pages of each vCPU, the S-EPT pages below the root, "
        "and the guest's pages. The PAMT map of the panel has a letter for each of these."
    )
    return Variant(
        f"A TD has {_some(vcpus, 'vCPU')} and {_some(pages, 'initial page')} side by side in one "
        f"2 MiB range, at GPAW {gpaw}. How many 4 KiB pages does the PAMT show as in use?",
        owned,
        _told(general, {owned - 1: tdr_missing}),
    )


def _measure_calls(gpaw: int, seed: int) -> Variant:
    (pages,) = _draw(seed, (4,), most=(32,))
    machine, _ = _td(gpaw, vcpus=1, pages=pages)
    calls = machine.seamcalls["TDH.MR.EXTEND"]
    per_page = (
        "That would be one call for a page. See how far one call of TDH.MR.EXTEND goes: its RCX "
        "moves by 0x100 from call to call."
    )
    return Variant(
        f"An image of {_some(pages, 'page')} of 4 KiB is measured completely. How often is "
        "TDH.MR.EXTEND called?",
        calls,
        _told(
            "Step through the phase `add the image` and count the calls for one page.",
            {pages: per_page},
        ),
    )


def _accepting_leaf(gpaw: int, seed: int) -> Variant:
    lab = LifeLab(gpaw=gpaw)
    lab.build()
    lab.touch(1)
    (leaf,) = {action.name for action in lab.tape.actions if action.name.startswith("TDG.")}
    return Variant(
        "A page that the host maps into a running TD is of no use until the guest itself makes a "
        "call. Which leaf is it? Write its full name.",
        leaf,
        lambda answer: (
            (
                "That one is called by the host. "
                if str(answer).strip().upper().startswith("TDH.")
                else ""
            )
            + "Press Touch for a new page and look for the TDCALL among the SEAMCALLs."
        ),
    )


def _states_of_a_page(gpaw: int, seed: int) -> Variant:
    page = Random(seed).randint(2, 7) if seed else 1
    return Variant(
        f"The guest touches its private page {page} for the first time and then shares it. Which "
        "states does the page's entry in the Secure EPT pass? Write all of them in order, FREE at "
        "both ends.",
        states_of(gpaw, page),
        _states_hint,
    )


def states_of(gpaw: int, page: int) -> tuple[str, ...]:
    """The states that the S-EPT entry of a page passes that is touched and then shared."""
    lab = LifeLab(gpaw=gpaw)
    lab.build()
    first = lab.tape.position
    lab.touch(page)
    lab.share(page)
    states = ["FREE"]
    for position in range(first, len(lab.tape) + 1):
        lab.tape.seek(position)
        now = _leaves(lab, EXTERNAL).get(page, "FREE")
        if now != states[-1]:
            states.append(now)
    return tuple(states)


def _leaves(lab: LifeLab, tree: str) -> dict[int, str]:
    """Page -> state of its leaf in a tree."""
    tables = [table for table in lab.trees()[tree] if table.level == 0]
    return {entry.number: entry.state for table in tables for entry in table.entries}


def _states_hint(answer: Any) -> str:
    if len(answer) < 2 or {str(answer[0]).upper(), str(answer[-1]).upper()} != {"FREE"}:
        return "The entry is FREE before the page is mapped, and FREE again at the end."
    return (
        "Touch a new page, share it, and step back through both: the external tree shows the "
        "letter of the entry after every call, and under the mouse its state."
    )


def _reclaims(gpaw: int, seed: int) -> Variant:
    vcpus, pages = _draw(seed, (1, 3), most=(4, 64))
    machine, td = _td(gpaw, vcpus=vcpus, pages=pages, measured=False)
    td.destroy()
    calls = machine.seamcalls["TDH.PHYMEM.PAGE.RECLAIM"]
    removed = (
        "You have counted the guest's pages too. KVM removes them one by one while the TD still "
        "has its KeyID; see what TDH.MEM.PAGE.REMOVE does in the phase `tear down`."
    )
    tables = "Those are the guest's pages. They are removed, not reclaimed; what else is there?"
    return Variant(
        f"A TD with {_some(vcpus, 'vCPU')} and {_some(pages, 'page')} in one 2 MiB range is torn "
        f"down at GPAW {gpaw}. How often does KVM call TDH.PHYMEM.PAGE.RECLAIM?",
        calls,
        _told(
            "What is left when the guest's pages are gone is reclaimed page by page: the vCPUs' "
            "pages, the tables below the root, the control pages, the TDR.",
            {pages: tables, calls + pages: removed},
        ),
    )


#: What the guest does -> how the lab does it.
_ACTS: dict[str, Callable[[LifeLab], None]] = {
    "writes to a shared page": lambda lab: lab.touch_shared(2),
    "writes to a private page": lambda lab: lab.touch(3),
    "has a private page converted that it has used": lambda lab: lab.share(1),
}


def _changed_trees(gpaw: int, seed: int) -> Variant:
    act = list(_ACTS)[seed % len(_ACTS)]
    lab = LifeLab(gpaw=gpaw)
    lab.build()
    lab.touch(1)
    lab.share(2)
    before = {tree: _leaves(lab, tree) for tree in (MIRROR, EXTERNAL, DIRECT)}
    _ACTS[act](lab)
    changed = {tree for tree in before if _leaves(lab, tree) != before[tree]}
    time = "" if "used" in act else " for the first time"
    return Variant(
        f"The guest {act}{time}. In which of the three trees has an entry of the lowest level "
        'changed afterwards? Write a set of "mirror", "external" and "direct".',
        frozenset(changed),
        _trees_hint,
    )


def _trees_hint(answer: Any) -> str:
    if isinstance(answer, str) or not set(answer) <= {MIRROR, EXTERNAL, DIRECT}:
        return 'Write a set of names, such as {"mirror"}.'
    if (MIRROR in answer) != (EXTERNAL in answer):
        return "The mirror is KVM's copy of the external tree: at rest they have the same leaves."
    return (
        "Note the numbers of mirror leaves, S-EPT leaves and direct leaves, do it in the panel "
        f"(it has the buttons Touch, Share and Touch {SHARED}), and compare."
    )


def _draw(seed: int, first: tuple[int, ...], *, most: tuple[int, ...]) -> tuple[int, ...]:
    """Seed 0 gives `first`, every other seed random numbers from 1 up to `most`."""
    random = Random(seed)
    return tuple(random.randint(1, limit) for limit in most) if seed else first


def _some(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


EXERCISES = (
    Exercise("00.1", _calls_to_finalize),
    Exercise("00.2", _pages_owned),
    Exercise("00.3", _measure_calls),
    Exercise("00.4", _accepting_leaf),
    Exercise("00.5", _states_of_a_page),
    Exercise("00.6", _reclaims),
    Exercise("00.7", _changed_trees),
)
