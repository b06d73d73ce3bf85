"""The exercises of notebook 00: counting what a TD's life takes.

Every right answer is counted on a machine that lives the life in question.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

from tdxlab import views
from tdxlab.abi.leaves import TDH_MR_EXTEND, TDH_PHYMEM_PAGE_RECLAIM
from tdxlab.arch import PAGE_SIZE
from tdxlab.host import Host
from tdxlab.host_td import HostTd
from tdxlab.scenarios import CODE_GPA, HEAP_GPA, booted_machine, life_of_a_td
from tdxlab.study.exercises import Exercise, Variant
from tdxlab.study.tables import is_seamcall, pamt_pages
from tdxlab.tape import Tape


def _told(general: str, special: dict[int, str]) -> Callable[[Any], str]:
    """A hint: the advice for a wrong answer that `special` knows, else `general`."""
    return lambda answer: special.get(answer, general)


def _td(gpaw: int, *, vcpus: int, pages: int, measured: bool = True) -> HostTd:
    """A finalised TD whose initial pages lie side by side, on a machine of its own."""
    td = HostTd(Host(booted_machine()), gpaw=gpaw, max_vcpus=vcpus)
    for lp in range(vcpus):
        td.add_vcpu(lp=lp)
    for gpa in range(CODE_GPA, CODE_GPA + pages * PAGE_SIZE, PAGE_SIZE):
        td.add_page(gpa)
        if measured:
            td.measure(gpa)
    td.finalize()
    return td


def _calls_to_finalize(gpaw: int, seed: int) -> Variant:
    names = [action.name for action in life_of_a_td(gpaw=gpaw).actions if is_seamcall(action)]
    built, whole = names.index("TDH.MR.FINALIZE") + 1, len(names)
    general = "Reset the panel, press Build, and read the number after SEAMCALLs."
    too_many = "That is the whole life. Count only up to TDH.MR.FINALIZE, itself included."
    return Variant(
        "How many SEAMCALLs does it take from TDH.MNG.CREATE to TDH.MR.FINALIZE, for a TD with "
        f"one vCPU and one measured page, at GPAW {gpaw}?",
        built,
        _told(general, {whole: too_many}),
    )


def _pages_owned(gpaw: int, seed: int) -> Variant:
    vcpus, pages = _draw(seed, (1, 1), most=(4, 200))
    td = _td(gpaw, vcpus=vcpus, pages=pages, measured=False)
    machine = td.host.machine
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
    machine = _td(gpaw, vcpus=1, pages=pages).host.machine
    calls = machine.trace.seamcalls()[TDH_MR_EXTEND]
    per_page = (
        "That would be one call for a page. See how far one call of TDH.MR.EXTEND goes: its RCX "
        "moves by 0x100 from call to call."
    )
    return Variant(
        f"An image of {_some(pages, 'page')} of 4 KiB is measured completely. How often is "
        "TDH.MR.EXTEND called?",
        calls,
        _told(
            "Step through the phase `measure a page` and count the calls for one page.",
            {pages: per_page},
        ),
    )


def _accepting_leaf(gpaw: int, seed: int) -> Variant:
    tape = life_of_a_td(gpaw=gpaw)
    (leaf,) = {action.name for action in tape.actions if action.kind == "TDCALL"}
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
            + "Press Touch for a new page and look for the one TDCALL among the SEAMCALLs."
        ),
    )


def _states_of_a_page(gpaw: int, seed: int) -> Variant:
    return Variant(
        "Which states does the S-EPT entry of a page pass that is mapped into a running TD, "
        "accepted, and then removed? Write all of them in order, FREE at both ends.",
        states_of(life_of_a_td(gpaw=gpaw), HEAP_GPA),
        _states_hint,
    )


def states_of(tape: Tape, gpa: int) -> tuple[str, ...]:
    """The states that the 4 KiB entry for `gpa` passes on a tape until the TD is torn down."""
    states = ["FREE"]
    end = next(i for i, action in enumerate(tape.actions) if action.phase == "tear down")
    for position in range(end):
        tape.seek(position)
        now = _state(tape, gpa)
        if now != states[-1]:
            states.append(now)
    return tuple(states)


def _state(tape: Tape, gpa: int) -> str:
    machine = tape.machine
    rows = (row for tdr in views.tds(machine) for row in views.sept_rows(machine, tdr))
    return next((row.state for row in rows if row.gpa == gpa and row.sept_level == 0), "FREE")


def _states_hint(answer: Any) -> str:
    if len(answer) < 2 or {str(answer[0]).upper(), str(answer[-1]).upper()} != {"FREE"}:
        return "The entry is FREE before the page is mapped, and FREE again at the end."
    return (
        "Touch a new page, remove it, and step back through both: the tree shows the letter and "
        "the state of the entry after every call."
    )


def _reclaims(gpaw: int, seed: int) -> Variant:
    vcpus, pages = _draw(seed, (1, 3), most=(4, 64))
    td = _td(gpaw, vcpus=vcpus, pages=pages, measured=False)
    td.tear_down()
    calls = td.host.machine.trace.seamcalls()[TDH_PHYMEM_PAGE_RECLAIM]
    return Variant(
        f"A TD with {_some(vcpus, 'vCPU')} and {_some(pages, 'page')} in one 2 MiB range is torn "
        f"down at GPAW {gpaw}. How often is TDH.PHYMEM.PAGE.RECLAIM called?",
        calls,
        _told(
            "Each page that the TD owns is reclaimed by itself, whatever its type. Compare the "
            "number with the pages owned just before the end.",
            {
                pages: "Those are the guest's pages alone. Its tables and its control "
                "structures take pages as well."
            },
        ),
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
)
