"""A lab for one Secure EPT: one TD, one vCPU, and any call on any entry, right or wrong.

    lab = SeptLab(gpaw=48)
    lab.build()                                  # the tables above the 4 KiB entry of FIRST_GPA
    lab.do("PAGE.AUG")                           # an Answer: state before and after, status
    lab.play("MR.FINALIZE", "VP.ENTER", "PAGE.ACCEPT")

The guest runs on LP 0, the host calls from LP 1. Pages are chosen by looking at the PAMT, so that
the lab holds nothing that a step back on its tape would have to undo.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from tdxlab import views
from tdxlab.abi.outcome import IN_GUEST, GuestOutcome
from tdxlab.abi.registers import Registers
from tdxlab.abi.status import EXIT_REASON_NAMES, TDX_SUCCESS, describe, status_name
from tdxlab.arch import (
    HPA_MASK,
    PAGE_SIZE,
    SEPT_LEVEL_NAMES,
    SIZE_2M,
    WORDS_PER_PAGE,
    level_size,
    table_index,
)
from tdxlab.bare import BareMachine
from tdxlab.cpu import Translation
from tdxlab.host import SOURCE_PAGE_BUFFER, Host
from tdxlab.host_td import HostTd
from tdxlab.scenarios import booted_machine
from tdxlab.seam import epochs, sept
from tdxlab.seam.rules import PT_NDA, SEPT_STATE_BY_BITS, SEPT_STATE_MASK, SEPT_STATES
from tdxlab.seam.td import Td, Tdcs
from tdxlab.steps import Operation
from tdxlab.study.sept_moves import MOVES, Move, Prospect, Situation, find_move, prospect
from tdxlab.tape import Tape

GUEST_LP, HOST_LP = 0, 1

#: The 2 MiB-aligned GPA where the lab's examples start.
FIRST_GPA = 0x4000_0000

#: What `SeptLab.state` says of an entry whose table is not there.
NO_TABLE = "no table"

#: How the outcome of a move starts that could not even be asked.
NOT_DONE = "not done: "

_PUBLIC_NAMES = {state.public: state.name for state in SEPT_STATES}


class Seen(NamedTuple):
    """An entry as the module shows it to the host. level: where it stands; state: its name."""

    rcx: int
    rdx: int

    @property
    def level(self) -> int:
        """The sept_level in RDX 2:0."""
        return self.rdx & 7

    @property
    def state(self) -> str:
        """Name of the state in RDX 15:8."""
        return _PUBLIC_NAMES[self.rdx >> 8 & 0xFF]

    def __str__(self) -> str:
        level = SEPT_LEVEL_NAMES[self.level]
        return f"RCX={self.rcx:#018x} RDX={self.rdx:#06x}: {level} entry, {self.state}"


class Answer(NamedTuple):
    """What came of one move. call: the leaf's name. gpa, level: the entry it was about, level -1
    for none. before, after: that entry's state. status: RAX, None if there is none. outcome: the
    answer in words. seen: the entry that RCX and RDX show, if they show one.
    """

    call: str
    gpa: int
    level: int
    before: str
    after: str
    status: int | None
    outcome: str
    seen: Seen | None = None

    @property
    def is_refused(self) -> bool:
        """True if the module refused the move, or it could not even be asked."""
        is_status = self.status is not None and self.status > 0 and self.call.startswith("TDH")
        return is_status or self.outcome.startswith(NOT_DONE)

    @property
    def name(self) -> str:
        """The status without details, such as "TDX_SUCCESS"; of a guest's access, its outcome."""
        is_status = self.status is not None and self.status >= 0
        return status_name(self.status) if is_status and self.status else self.outcome

    def __repr__(self) -> str:
        place = f"{SEPT_LEVEL_NAMES[self.level]} {self.gpa:#x}" if self.level >= 0 else ""
        change = self.before if self.before == self.after else f"{self.before} -> {self.after}"
        shown = f"\n    shown: {self.seen}" if self.seen else ""
        return f"{self.call:<21} {place:<17} {change if place else '':<28} {self.outcome}{shown}"


class Answers(list[Answer]):
    """Answers, oldest first; shown as a table."""

    def __repr__(self) -> str:
        head = f"{'call':<21} {'entry':<17} {'state':<28} answer"
        return "\n".join([head, *(str(answer) for answer in self)])


class SeptLab:
    """One TD with one vCPU that is not finalised and has no table but its root.

    gpaw: 48 or 52. machine, tape: what it lives on; the tape starts behind TDH.VP.INIT.
    top: sept_level of the root's entries.
    """

    def __init__(self, *, gpaw: int = 48, machine: BareMachine | None = None) -> None:
        self.machine = machine or booted_machine()
        host = Host(self.machine)
        built = HostTd(host, gpaw=gpaw, max_vcpus=1)
        built.add_vcpu(lp=GUEST_LP)
        host.door.store(SOURCE_PAGE_BUFFER, b"an initial page".ljust(PAGE_SIZE, b"\0"))
        self.gpaw, self.top = gpaw, built.top_level
        self.tdr, self.vcpu = built.tdr, built.vcpus[0]
        self.tape = Tape(self.machine)

    # -- doing

    def do(self, name: str, gpa: int = FIRST_GPA, level: int = 0) -> Answer:
        """Make the move `name` (short or full) on the entry for `gpa` at `level`.

        What the module refuses is an Answer, and so is what cannot even be asked, such as a guest's
        move while no vCPU is inside. Refuses an unknown move: ValueError.
        """
        move = find_move(name)
        if move.levels is None:
            gpa, level = 0, -1
        before = self.state(gpa, level) if level >= 0 else ""
        try:
            answer = self._act(move, gpa, level)
        except ValueError as problem:
            answer = Answer(move.full_name, gpa, level, "", "", None, f"{NOT_DONE}{problem}")
        after = self.state(gpa, level) if level >= 0 else ""
        return answer._replace(before=before, after=after)

    def play(self, *names: str, gpa: int = FIRST_GPA, level: int = 0) -> Answers:
        """Several moves on one entry, one after the other."""
        return Answers(self.do(name, gpa, level) for name in names)

    def build(self, gpa: int = FIRST_GPA, level: int = 0) -> Answers:
        """TDH.MEM.SEPT.ADD for each table that is missing above the entry for `gpa` at `level`."""
        return Answers(
            self.do("SEPT.ADD", gpa & -level_size(above), above)
            for above in range(self.top, level, -1)
            if self.state(gpa, above) == "FREE"
        )

    def start(self) -> Answers:
        """Finalise the TD and let its vCPU in."""
        return self.play("MR.FINALIZE", "VP.ENTER")

    def _act(self, move: Move, gpa: int, level: int) -> Answer:
        empty = Answer(move.full_name, gpa, level, "", "", None, "")
        if move.name == "kick":
            return _answer_of_guest(empty, self.tape.interrupt(GUEST_LP))
        if move.name in ("read", "write"):
            result = self.tape.touch(GUEST_LP, gpa, write=move.name == "write")
            return _answer_of_guest(empty, result)
        assert move.leaf is not None
        if move.side == "guest":
            outcome = self.tape.tdcall(GUEST_LP, move.leaf, Registers(rcx=gpa | level))
            return _answer_of_guest(empty, outcome)
        registers = self.registers(move, gpa, level)
        lp = GUEST_LP if move.name == "VP.ENTER" else HOST_LP
        status = self.tape.seamcall(lp, move.leaf, registers)
        return _answer_of_module(empty, status, registers)

    def registers(self, move: Move, gpa: int, level: int) -> Registers:
        """The operands of a SEAMCALL: right ones, if the entry lets it go on."""
        if move.levels is None:
            return Registers(rcx=self.vcpu if move.name == "VP.ENTER" else self.tdr)
        registers = Registers(rcx=gpa | level, rdx=self.tdr)
        if move.new_page:
            is_big = move.new_page == "page" and level == 1
            registers.r8 = self.free_page(SIZE_2M if is_big else PAGE_SIZE)
        if move.name == "PAGE.ADD":
            registers.r9 = SOURCE_PAGE_BUFFER
        return registers

    def free_page(self, size: int = PAGE_SIZE) -> int:
        """HPA of the lowest free page of 4 KiB or 2 MiB. Refuses when there is none: ValueError."""
        pamt, tdmr = self.machine.module.pamt, self.machine.platform.tdmrs[0]
        for big in range(tdmr.base, tdmr.base + tdmr.size, SIZE_2M):
            if pamt.page_type(pamt.entry(big, 1)) != PT_NDA:
                continue
            if size == SIZE_2M and pamt.is_all_free(big):
                return big
            pages = range(big, big + SIZE_2M, PAGE_SIZE) if size == PAGE_SIZE else ()
            for hpa in pages:
                if pamt.page_type(pamt.entry(hpa, 0)) == PT_NDA:
                    return hpa
        raise ValueError(f"no free page of {size} bytes is left; step back or reset")

    def begin(self, name: str, gpa: int = FIRST_GPA, level: int = 0) -> Operation:
        """Start a SEAMCALL and stop it between its checks and its effects, with its locks held.

        Give what comes back to `finish`. It goes past the tape: go on with a fresh lab afterwards.
        """
        move = find_move(name)
        assert move.leaf is not None
        registers = self.registers(move, gpa, level)
        operation = self.machine.seamcall_steps(HOST_LP + 1, move.leaf, registers)
        next(operation)
        return operation

    # -- looking, from the lab bench

    @property
    def eptp(self) -> int:
        """HPA of the root table, with the walk length in bits 5:3."""
        return self._tdcs(Tdcs.EPTP)

    @property
    def op_state(self) -> int:
        """Operational state of the TD."""
        return self._tdcs(Tdcs.OP_STATE)

    @property
    def is_inside(self) -> bool:
        """True while the vCPU runs the guest."""
        return bool(self.machine.cpu.vcpu_inside(GUEST_LP))

    @property
    def info(self) -> dict[str, int]:
        """The fields of the TD: `td_epoch`, `refcount0`, `chldcnt` and so on."""
        return views.td_info(self.machine, self.tdr)

    def _tdcs(self, word: int) -> int:
        memory = self.machine.memory
        td = Td(memory, self.tdr)
        td.map_tdcs(memory)
        return memory.words.view[td.tdcs + word]

    def entry(self, gpa: int = FIRST_GPA, level: int = 0) -> sept.Place | None:
        """The entry for `gpa` at `level`, also below a blocked table; None without its table."""
        memory = self.machine.memory
        table = self.eptp & HPA_MASK
        for at in range(self.top, level - 1, -1):
            word = memory.frame(table) + table_index(gpa, at)
            septe = memory.words.view[word]
            if at == level:
                return sept.Place(word, level, septe)
            if sept.Septe(septe).state not in ("NL_MAPPED", "NL_BLOCKED"):
                return None
            table = septe & HPA_MASK
        raise ValueError(f"sept_level {level} is not in 0..{self.top}")

    def raw(self, gpa: int = FIRST_GPA, level: int = 0) -> sept.Septe:
        """The entry itself, all 64 bits. Refuses where its table is not there: ValueError."""
        place = self.entry(gpa, level)
        if place is None:
            raise ValueError(
                f"there is no table with the {SEPT_LEVEL_NAMES[level]} entry of {gpa:#x}"
            )
        return sept.Septe(place.septe)

    def state(self, gpa: int = FIRST_GPA, level: int = 0) -> str:
        """Name of the entry's state, NO_TABLE where its table is not there."""
        place = self.entry(gpa, level)
        return NO_TABLE if place is None else sept.Septe(place.septe).state

    def read(self, gpa: int = FIRST_GPA, level: int = 0) -> Seen | None:
        """What TDH.MEM.SEPT.RD shows, without calling it; None where the walk stops above."""
        place = self.walk(gpa, level)
        return Seen(*sept.report(place.septe, level)) if place.sept_level == level else None

    def walk(self, gpa: int = FIRST_GPA, level: int = 0) -> sept.Place:
        """Where the module's walk to the entry for `gpa` at `level` ends."""
        return sept.walk(self.machine.memory, self.eptp, gpa, level)

    def table(self, gpa: int = FIRST_GPA, level: int = 0) -> list[str]:
        """States of the 512 entries of the table that holds the entry; empty without that table."""
        place = self.entry(gpa, level)
        if place is None:
            return []
        start = place.word - table_index(gpa, level)
        words = self.machine.memory.words.view[start : start + WORDS_PER_PAGE]
        return [SEPT_STATE_BY_BITS[word & SEPT_STATE_MASK].name for word in words]

    def bepoch(self, gpa: int = FIRST_GPA, level: int = 0) -> int:
        """BEPOCH in the PAMT entry of what the entry maps; 0 where it maps nothing."""
        place, pamt = self.entry(gpa, level), self.machine.module.pamt
        if place is None or not place.septe & HPA_MASK:
            return 0
        size = level if place.septe & sept.LEAF else 0
        return pamt.bepoch(pamt.entry(place.septe & HPA_MASK, size))

    def states(self) -> Counter[str]:
        """State -> number of entries of this TD in it, over all levels; FREE ones too."""
        counts = Counter(row.state for row in views.sept_rows(self.machine, self.tdr))
        tables = 1 + counts["NL_MAPPED"] + counts["NL_BLOCKED"]
        counts["FREE"] = tables * WORDS_PER_PAGE - counts.total()
        return counts

    def situation(self, gpa: int = FIRST_GPA, level: int = 0) -> Situation:
        """All that decides which moves on the entry are legal."""
        memory = self.machine.memory
        td = Td(memory, self.tdr)
        td.map_tdcs(memory)
        return Situation(
            state=self.state(gpa, level),
            level=level,
            top=self.top,
            reached=self.walk(gpa, level).sept_level == level,
            op_state=self.op_state,
            inside=self.is_inside,
            tracked=epochs.is_tracked(memory.words, td.tdcs, self.bepoch(gpa, level)),
        )

    def prospects(self, gpa: int = FIRST_GPA, level: int = 0) -> dict[str, Prospect]:
        """Move -> what the matrices say of it, without making it."""
        now = self.situation(gpa, level)
        return {move.name: prospect(move, now) for move in MOVES}


def finish(operation: Operation) -> str:
    """Let a SEAMCALL that `SeptLab.begin` stopped go on to its end; returns its answer in words."""
    try:
        next(operation)
    except StopIteration as end:
        return describe(end.value)
    raise AssertionError("a leaf yields once")


def _answer_of_module(empty: Answer, status: int, registers: Registers) -> Answer:
    if status == IN_GUEST:
        return empty._replace(status=status, outcome="the vCPU is inside the guest")
    shows = bool(registers.rcx or registers.rdx) and empty.level >= 0
    is_plain_success = status == TDX_SUCCESS and not empty.call.endswith("SEPT.RD")
    seen = Seen(registers.rcx, registers.rdx) if shows and not is_plain_success else None
    return empty._replace(status=status, outcome=describe(status), seen=seen)


def _answer_of_guest(empty: Answer, result: GuestOutcome | Translation) -> Answer:
    if isinstance(result, Translation):
        return empty._replace(outcome=f"translated to HPA {result.hpa:#x}")
    if result.exited:
        reason = result.status & 0xFFFF
        name = EXIT_REASON_NAMES.get(reason, str(reason))
        return empty._replace(outcome=f"TD exit: {name}")
    if empty.call in ("read", "write"):
        return empty._replace(outcome="#VE in the guest: the page waits for its acceptance")
    return empty._replace(status=result.status, outcome=describe(result.status))
