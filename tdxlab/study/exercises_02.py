"""The exercises of notebook 02: building a TD with raw SEAMCALLs.

Every right answer comes from the model: situations are played on a desk, lists of calls are judged
by making them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import Any, NamedTuple

from tdxlab import views
from tdxlab.abi import status as st
from tdxlab.bare import BareMachine
from tdxlab.hardware import default_platform
from tdxlab.host import Host
from tdxlab.host_td import HostTd
from tdxlab.scenarios import CODE_GPA
from tdxlab.seam.rules import HKID_FREE, OP_INITIALIZED
from tdxlab.study.answers import Reply
from tdxlab.study.console import Desk, desk_before, usual
from tdxlab.study.exercises import Exercise, Variant
from tdxlab.study.guide import BUILD
from tdxlab.study.tables import is_seamcall
from tdxlab.tape import Tape

Calls = list[tuple[str, int]]


class Situation(NamedTuple):
    """A call where it can be wrong: made on LP `lp` when the guide would begin `stage`."""

    stage: str
    leaf: str
    operands: dict[str, str]
    lp: int = 0


def _page_add(**changed: str) -> dict[str, str]:
    return usual("TDH.MEM.PAGE.ADD") | changed


_CREATE = "TDH.MNG.CREATE"
_RECLAIM = "TDH.PHYMEM.PAGE.RECLAIM"

#: Calls with one thing wrong, or none.
ONE_FAULT = (
    Situation("create", _CREATE, {"rcx": "free page", "rdx": "shared KeyID"}),
    Situation("create", _CREATE, {"rcx": "page outside the TDMR", "rdx": "free KeyID"}),
    Situation("create", _CREATE, {"rcx": "free page", "rdx": "module's KeyID"}),
    Situation("keys", "TDH.MNG.ADDCX", usual("TDH.MNG.ADDCX")),
    Situation("control pages", "TDH.MNG.INIT", usual("TDH.MNG.INIT")),
    Situation("control pages", "TDH.MNG.KEY.CONFIG", {"rcx": "TDR"}),
    Situation("init", "TDH.VP.CREATE", usual("TDH.VP.CREATE")),
    Situation("vCPU", "TDH.MR.FINALIZE", {"rcx": "TDR"}),
    Situation("S-EPT", "TDH.MEM.PAGE.ADD", _page_add()),
    Situation("finalize", "TDH.VP.ENTER", {"rcx": "TDVPR"}),
    Situation("enter", "TDH.MEM.PAGE.ADD", _page_add(rcx="next GPA, level 0")),
    Situation("enter", "TDH.VP.ENTER", {"rcx": "TDVPR"}, lp=2),
    Situation("leave", "TDH.MNG.VPFLUSHDONE", {"rcx": "TDR"}, lp=1),
    Situation("flush", "TDH.MNG.VPFLUSHDONE", {"rcx": "TDR"}),
    Situation("flush", "TDH.VP.FLUSH", {"rcx": "TDVPR"}, lp=3),
    Situation("flush", _RECLAIM, {"rcx": "REG"}),
    Situation("write back", "TDH.MNG.KEY.FREEID", {"rcx": "TDR"}),
    Situation("reclaim", _RECLAIM, {"rcx": "TDR"}),
)

#: Calls with two things wrong: the module looks at one of them first.
TWO_FAULTS = (
    Situation("create", _CREATE, {"rcx": "page outside the TDMR", "rdx": "shared KeyID"}),
    Situation("create", _CREATE, {"rcx": "page outside the TDMR", "rdx": "module's KeyID"}),
    Situation("control pages", "TDH.MNG.ADDCX", {"rcx": "TDR", "rdx": "free page"}),
    Situation("vCPU", "TDH.VP.CREATE", {"rcx": "TDCX", "rdx": "free page"}),
    Situation("page", "TDH.MEM.PAGE.ADD", _page_add(rcx="GPA, level 1", r8="TDR")),
    Situation("page", "TDH.MEM.PAGE.ADD", _page_add(r8="TDR", r9="0x10020123")),
)


def _play(situation: Situation, gpaw: int) -> Reply:
    desk = desk_before(situation.stage, gpaw)
    return desk.call(situation.leaf, situation.operands, lp=situation.lp)


def _told(situation: Situation) -> str:
    """A situation as a question tells it."""
    operands = ", ".join(f"{name.upper()} = {what}" for name, what in situation.operands.items())
    when = f'Right before the stage "{situation.stage}"'
    return f"{when} the host calls {situation.leaf} on LP {situation.lp} with {operands}"


def _way(situation: Situation) -> str:
    """How to see for oneself."""
    return (
        f'Set the desk up with desk_before("{situation.stage}", GPAW), make the call with '
        "desk.call(...) and read the second line."
    )


# -- 02.1 how many calls


def seamcalls_to_run(gpaw: int, packages: int, vcpus: int) -> int:
    """SEAMCALLs from TDH.MNG.CREATE to the first TDH.VP.ENTER, of a TD with one page, unmeasured.

    packages, vcpus: 1..8.
    """
    machine = BareMachine(default_platform(lps=2 * packages, packages=packages))
    Host(machine).boot()
    tape = Tape(machine)
    td = HostTd(Host(machine, tape), gpaw=gpaw, max_vcpus=vcpus)
    for number in range(vcpus):
        td.add_vcpu(lp=number % (2 * packages))
    td.add_page(CODE_GPA)
    td.finalize()
    td.enter(0, lp=0)
    return sum(map(is_seamcall, tape.actions))


def _count_calls(gpaw: int, seed: int) -> Variant:
    packages, vcpus = Random(seed).choice([(p, v) for p in (2, 3, 4, 8) for v in (2, 3, 4)])
    answer = seamcalls_to_run(gpaw, packages, vcpus)
    question = (
        f"A machine has {packages} packages. How many SEAMCALLs does it take, from TDH.MNG.CREATE "
        f"to the first TDH.VP.ENTER, to run a TD of GPAW {gpaw} with {vcpus} vCPUs and one page "
        "whose content is not measured?"
    )

    def hint(given: Any) -> str:
        side = "few" if given < answer else "many"
        return (
            f"{given} is too {side}. Go through the table of the build row by row and ask which "
            "rows grow with the packages, which with the vCPUs, and which with the levels."
        )

    return Variant(question, answer, hint)


# -- 02.2 and 02.4 what the module answers


def _predict(gpaw: int, seed: int) -> Variant:
    situation = Random(seed).choice(ONE_FAULT)
    answer = _play(situation, gpaw).status
    question = f"A machine has 2 packages: LPs 0 and 1, LPs 2 and 3. {_told(situation)}. "

    def accepts(given: Any) -> bool:
        return isinstance(given, str) and _bare(given) == _bare(answer)

    def hint(given: Any) -> str:
        known = isinstance(given, str) and _bare(given) in map(_bare, st.STATUS_NAMES.values())
        unknown = "" if known else f"{given!r} is no status of the module. "
        return f"{unknown}Which state does the call need, and which is there? {_way(situation)}"

    return Variant(question + "What is the name of the status?", answer, hint, accepts)


def _bare(name: str) -> str:
    return name.strip().upper().removeprefix("TDX_")


def _first_fault(gpaw: int, seed: int) -> Variant:
    situation = Random(seed).choice(TWO_FAULTS)
    answer = _play(situation, gpaw).answer.operand
    question = (
        f"{_told(situation)}. Two things are wrong. Which register does the status blame? "
        "Answer with its name."
    )

    def hint(given: Any) -> str:
        return (
            f"The module looks at something before it comes to {given}; each leaf has its own "
            f"order. {_way(situation)}"
        )

    return Variant(question, answer, hint)


# -- 02.3 a raw status

_RAW = tuple(
    code + operand
    for code in (
        st.TDX_OPERAND_INVALID,
        st.TDX_OPERAND_ADDR_RANGE_ERROR,
        st.TDX_OPERAND_BUSY,
        st.TDX_PAGE_METADATA_INCORRECT,
        st.TDX_EPT_WALK_FAILED,
        st.TDX_EPT_ENTRY_STATE_INCORRECT,
    )
    for operand in (st.OPERAND_ID_RCX, st.OPERAND_ID_RDX, st.OPERAND_ID_R8, st.OPERAND_ID_TDR)
)


def _decode(_gpaw: int, seed: int) -> Variant:
    raw = Random(seed).choice(_RAW)
    answer = (st.status_name(raw), st.operand_name(raw))
    question = (
        f"RAX comes back as {raw:#018x}. Answer with a pair: the name of the status, and the "
        "operand that it blames."
    )

    def hint(given: Any) -> str:
        pair = tuple(given) if isinstance(given, list | tuple) else ()
        if len(pair) == 2 and _same(pair[0], answer[0]):
            return "The name is right. The operand's number stands in bits 31:0."
        if len(pair) == 2 and _same(pair[1], answer[1]):
            return "The operand is right. The name follows from bits 63:32 alone."
        return (
            "Bits 63:32 name the status, bits 31:0 the operand. tdxlab.abi.status has both tables: "
            "STATUS_NAMES and OPERAND_NAMES."
        )

    return Variant(question, answer, hint)


def _same(one: Any, other: str | None) -> bool:
    return str(one).strip().casefold() == str(other).casefold()


# -- 02.5 and 02.6 lists of calls, judged by making them


def _is_list_of_calls(given: Any) -> bool:
    return isinstance(given, list | tuple) and all(
        isinstance(call, list | tuple)
        and len(call) == 2
        and isinstance(call[0], str)
        and isinstance(call[1], int)
        for call in given
    )


def _make(desk: Desk, calls: Sequence[tuple[str, int]]) -> Iterator[Reply]:
    """Make the calls with their usual operands, up to the first that is not plainly done."""
    for leaf, lp in calls:
        reply = desk.call(leaf, usual(leaf), lp=lp)
        yield reply
        if reply.answer.kind != "done":
            return


def _judge(
    calls: Any, desk: Desk, is_reached: Callable[[Desk], bool], shortest: int
) -> tuple[bool, str]:
    """(right, advice) on a list of calls made at `desk`."""
    if not _is_list_of_calls(calls):
        return False, 'Give a list of (leaf, LP), such as [("TDH.MNG.CREATE", 0)].'
    number = 0
    try:
        for number, reply in enumerate(_make(desk, calls), start=1):
            if reply.answer.kind != "done":
                return False, f"Call {number}, {reply.action.name}: {reply.answer.text}."
    except ValueError as mistake:
        return False, f"Call {number + 1} cannot be made: {mistake}."
    if not is_reached(desk):
        return False, f"All {len(calls)} calls succeed, but the goal is not reached; what is next?"
    if len(calls) > shortest:
        return False, f"The goal is reached, but {len(calls) - shortest} calls do not help."
    return True, ""


def _is_initialised(desk: Desk) -> bool:
    return any(
        views.td_info(desk.machine, tdr).get("op_state") == OP_INITIALIZED
        for tdr in views.tds(desk.machine)
    )


def _is_key_free(desk: Desk) -> bool:
    keyid = desk.held["TD's KeyID"]
    return desk.machine.module.keys.states.view[keyid] == HKID_FREE


def _listed(question: str, make_desk: Callable[[], Desk], best: Calls, goal: str) -> Variant:
    """An exercise whose answer is a list of calls. goal: "initialised" or "free"."""
    is_reached = {"initialised": _is_initialised, "free": _is_key_free}[goal]

    def verdict(given: Any) -> tuple[bool, str]:
        return _judge(given, make_desk(), is_reached, len(best))

    return Variant(question, best, lambda given: verdict(given)[1], lambda given: verdict(given)[0])


def _write_build(gpaw: int, seed: int) -> Variant:
    packages = Random(seed).choice((2, 3, 4))
    best = [
        (reply.action.name, reply.action.lp)
        for reply in Desk(gpaw, packages).run(*BUILD[: BUILD.index("vCPU")])
    ]
    question = (
        f"A machine has {packages} packages; package p has the LPs 2p and 2p + 1. Write the "
        "shortest list of (leaf, LP) that takes a TD from nothing to op state INITIALIZED. Each "
        "call gets its usual operands: the next free page, the TDR, TD_PARAMS."
    )
    return _listed(question, lambda: Desk(gpaw, packages), best, "initialised")


def _used_desk(gpaw: int, packages: int, lp: int) -> Desk:
    """A desk with a TD that has run, whose vCPU is associated with `lp`."""
    desk = desk_before("enter", gpaw, packages)
    desk.call("TDH.VP.FLUSH", rcx="TDVPR")
    desk.call("TDH.VP.ENTER", lp=lp, rcx="TDVPR")
    desk.interrupt(lp=lp)
    return desk


def _write_teardown(gpaw: int, seed: int) -> Variant:
    draw = Random(seed)
    packages = draw.choice((2, 3))
    lp = draw.randrange(1, 2 * packages)
    best = [
        (reply.action.name, reply.action.lp)
        for reply in _used_desk(gpaw, packages, lp).run("flush", "write back", "free the KeyID")
    ]
    question = (
        f"A machine has {packages} packages; package p has the LPs 2p and 2p + 1. A TD's only vCPU "
        f"ran on LP {lp} and has left. Write the shortest list of (leaf, LP) that makes its KeyID "
        "free. Each call gets its usual operands: the TDVPR, the TDR, 0 for start."
    )
    return _listed(question, lambda: _used_desk(gpaw, packages, lp), best, "free")


EXERCISES = (
    Exercise("02.1", _count_calls),
    Exercise("02.2", _predict),
    Exercise("02.3", _decode),
    Exercise("02.4", _first_fault),
    Exercise("02.5", _write_build),
    Exercise("02.6", _write_teardown),
)
