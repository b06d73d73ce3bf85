"""Where attacks happen: a booted machine, a TD with a secret, a TD of the host's own, and a tape.

    stage = Stage(gpaw=48)
    stage.load(stage.data_hpa)              # what the host reads
    stage.seamcall(TDH_MEM_PAGE_AUG, ...)   # what it asks the module for
    stage.guest_read(DATA_GPA)              # what the guest still gets
    stage.tape.seek(0)                      # as if nothing had happened

The victim runs on LP 0. It has written its secret into a page that it accepted, and waits for
nothing. What happens from there on is on the tape, move by move.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tdxlab import dram
from tdxlab.abi import leaves as abi
from tdxlab.abi.outcome import IN_GUEST, GuestOutcome
from tdxlab.abi.registers import Registers
from tdxlab.abi.status import EXIT_REASON_MASK, is_fatal
from tdxlab.arch import PAGE_SHIFT, shared_bit
from tdxlab.attacks.verdict import said
from tdxlab.bare import BareMachine
from tdxlab.cpu import Translation
from tdxlab.hardware import default_platform
from tdxlab.host import Host
from tdxlab.host_td import HostTd
from tdxlab.memory import LINE_SIZE, Cipher, MachineCheck
from tdxlab.tape import Action, Tape

#: Where the victim's code, its data, and nothing yet is.
CODE_GPA, DATA_GPA, FREE_GPA = 0x4000_0000, 0x4000_1000, 0x4000_2000
#: Where the host keeps a page of its own, in memory that is no TD's.
SOURCE_HPA = 0x1002_0000
#: A shared KeyID that the host can use as it likes.
HOST_KEYID = 5
#: The LP of the victim's vCPU, and that on which the host works.
VICTIM_LP, HOST_LP = 0, 3

SECRET = b"The victim's private key is 6ed3f1a0c27b4985, and nobody's else."
_SHADES = (b"\x00", b"\xff")


def _picture() -> bytes:
    """A page: the secret in its first and its last line, between them a disc, one byte a dot."""
    lines = [SECRET]
    for y in range(1, 63):
        inside = [(x - 31.5) ** 2 + (y - 31.5) ** 2 < 26**2 for x in range(64)]
        lines.append(b"".join(_SHADES[dot] for dot in inside))
    return b"".join([*lines, SECRET])


#: What the victim's data page holds.
DATA = _picture()

#: Who makes a move.
HOST, GUEST, PROBE, CPU = "host", "guest", "bus probe", "CPU"


@dataclass
class Move(Action):
    """One move of an attack. actor: who makes it. result: what it gave when it was played last."""

    actor: str = HOST
    result: Any = None

    def note(self, result: Any) -> None:
        """Keep what came of it."""
        self.result = result
        if not isinstance(result, dram.Line):
            super().note(result)

    @property
    def answer(self) -> str:
        """What came of it, in a few words."""
        if self.kind == "TDCALL" and not self.exited:
            return said(self.result.status)
        return answer_text(self.result)


def answer_text(result: Any) -> str:
    """What came of a move, in a few words."""
    if isinstance(result, MachineCheck):
        return "machine check"
    if isinstance(result, bytes):
        return result[:8].hex(" ") + (" ..." if len(result) > 8 else "")
    if isinstance(result, dram.Line):
        return f"{answer_text(result.ciphertext)}, owner bit {int(result.td_owned)}"
    if isinstance(result, GuestOutcome):
        return _outcome_text(result)
    if isinstance(result, Translation):
        return f"HPA {result.hpa:#x}"
    status = result[0] if isinstance(result, tuple) else result
    if status == IN_GUEST:
        return "in the guest"
    return said(status) if isinstance(status, int) else str(result or "done")


def _outcome_text(outcome: GuestOutcome) -> str:
    reason = outcome.status & EXIT_REASON_MASK
    if not outcome.exited:
        return "#VE"
    if is_fatal(outcome.status):
        return f"the TD is dead: {said(outcome.status)}"
    where = f" at GPA {outcome.registers.r8:#x}" if outcome.registers.r8 else ""
    return f"TD exit, reason {reason}{where}"


class AttackTape(Tape):
    """A tape whose actions are moves of somebody."""

    def move(
        self,
        actor: str,
        name: str,
        play: Callable[[], Any],
        inputs: dict[str, int] | None = None,
        *,
        lp: int = HOST_LP,
        kind: str = "move",
    ) -> Any:
        """Make and record a move; returns what `play` returns. inputs: for the trace line."""
        return self._do(Move(kind, lp, name, self.phase, inputs or {}, play, actor=actor))


class Stage:
    """A machine set up for one attack.

    gpaw: 48 or 52. encrypted: False for memory that reads the same under every KeyID, and so
    without integrity. has_mac: False for lines that only have a TD-owner bit. careful: the victim
    accepts a page once only; otherwise it accepts whatever is pending. cipher: None for the
    core's.
    victim, rival: a TD with the secret, and one of the host's. tdr, keyid: the victim's. data_gpa,
    data_hpa: of the page with the secret. spare: HPAs of free pages.
    """

    def __init__(
        self,
        *,
        gpaw: int = 48,
        encrypted: bool = True,
        has_mac: bool = True,
        careful: bool = True,
        cipher: Cipher | None = None,
    ) -> None:
        self.gpaw, self.careful = gpaw, careful
        self.machine = self.make_machine(encrypted)
        self.machine.memory.has_mac = has_mac
        if cipher is not None:
            self.machine.memory.cipher = cipher
        self.set_up()
        self.tape = AttackTape(self.machine)

    def make_machine(self, encrypted: bool) -> BareMachine:
        """The machine of this stage."""
        return BareMachine(default_platform(), encrypted=encrypted)

    def set_up(self) -> None:
        """Boot it, and launch the victim."""
        host = Host(self.machine)
        host.boot()
        self.victim = HostTd(host, gpaw=self.gpaw, max_vcpus=1)
        self.rival = HostTd(host, gpaw=self.gpaw, max_vcpus=1)
        self.rival.map_tables(DATA_GPA)
        self._launch(self.victim)
        self.tdr, self.keyid = self.victim.tdr, self.victim.keyid
        self.data_gpa, self.data_hpa = DATA_GPA, self.victim.pages[DATA_GPA][0]
        self.spare = [host.take_page() for _ in range(2)]

    def _launch(self, td: HostTd) -> None:
        td.add_vcpu(lp=VICTIM_LP)
        td.add_page(CODE_GPA, b"the victim's first instructions")
        td.measure(CODE_GPA)
        td.finalize()
        td.enter(0, lp=VICTIM_LP)
        td.aug(DATA_GPA, lp=HOST_LP)
        td.accept(VICTIM_LP, DATA_GPA)
        self.machine.write_guest(VICTIM_LP, DATA_GPA, DATA)

    @property
    def shared_mask(self) -> int:
        """The SHARED bit of a GPA."""
        return 1 << shared_bit(self.gpaw)

    @property
    def is_dead(self) -> bool:
        """The victim, or the module with all TDs, has come to an end."""
        dead = [move for move in self.moves if _is_deadly(move.result)]
        return bool(self.machine.module.halted or dead)

    def goes_on(self) -> bool:
        """The victim could go on with its data page, if the host let it run; nothing changes."""
        mark = self.machine.mark()
        try:
            return self._reads_on()
        finally:
            self.machine.rewind(mark)
            self.machine.journal.forget(mark)

    def _reads_on(self) -> bool:
        machine = self.machine
        if machine.cpu.vcpu_inside(VICTIM_LP):
            machine.kick(VICTIM_LP)
        status = machine.seamcall(VICTIM_LP, abi.TDH_VP_ENTER, Registers(rcx=self.victim.vcpus[0]))
        return status == IN_GUEST and isinstance(
            machine.read_guest(VICTIM_LP, self.data_gpa, LINE_SIZE), bytes
        )

    @property
    def moves(self) -> list[Move]:
        """The moves up to the present position."""
        made = self.tape.actions[: self.tape.position]
        return [move for move in made if isinstance(move, Move)]

    # -- what the host does

    def seamcall(self, leaf: int, *, lp: int = HOST_LP, **registers: int) -> int:
        """A SEAMCALL of the host; returns RAX."""
        values = Registers(**registers)

        def play() -> tuple[int, Registers]:
            after = values.copy()
            return self.machine.seamcall(lp, leaf, after), after

        name = abi.HOST_LEAVES[leaf].name
        status: int = self.tape.move(HOST, name, play, lp=lp, kind="SEAMCALL", inputs=registers)[0]
        return status

    def load(self, hpa: int, size: int = LINE_SIZE, keyid: int = 0) -> bytes | MachineCheck:
        """The host reads memory under a shared KeyID."""
        return self._read(HOST, "read memory", hpa, size, keyid)

    def store(self, hpa: int, data: bytes) -> None:
        """The host writes memory under KeyID 0."""
        inputs = {"hpa": hpa, "bytes": len(data)}
        self.tape.move(HOST, "write memory", lambda: self.machine.store(hpa, data), inputs)

    def kick(self) -> None:
        """The host takes the victim's vCPU out of its LP."""
        self.tape.move(
            HOST, "kick the vCPU out", lambda: self.machine.kick(VICTIM_LP), lp=VICTIM_LP
        )

    def enter(self) -> int:
        """The host lets the victim's vCPU run on; returns RAX."""
        tdvpr = self.victim.vcpus[0]
        return self.seamcall(abi.TDH_VP_ENTER, lp=VICTIM_LP, rcx=tdvpr)

    def read_with_key(self, hpa: int, keyid: int, name: str) -> bytes | MachineCheck:
        """A line as somebody gets it who may use the private key behind `keyid`."""
        return self._read(CPU, name, hpa, LINE_SIZE, keyid)

    def _read(self, actor: str, name: str, hpa: int, size: int, keyid: int) -> bytes | MachineCheck:
        def play() -> bytes | MachineCheck:
            try:
                return self.machine.memory.read(hpa, size, keyid)
            except MachineCheck as fault:
                return fault

        inputs = {"hpa": hpa, "bytes": size, "keyid": keyid}
        result: bytes | MachineCheck = self.tape.move(actor, name, play, inputs)
        return result

    def evict(self, hpa: int, line: bytes) -> None:
        """If a line of an earlier KeyID of the page at `hpa` may still be dirty in a cache: let it
        come to memory. line: what it holds.
        """

        def play() -> str:
            memory = self.machine.memory
            tag = memory.caches.overtaken.get(hpa >> PAGE_SHIFT)
            if tag is None:
                return "no line is dirty"
            memory.put_line(hpa, line, tag)
            return "a dirty line of the old KeyID"

        self.tape.move(CPU, "write a cache line back", play, {"hpa": hpa})

    # -- what a probe on the memory bus does

    def probe(self, hpa: int) -> dram.Line:
        """Take down a line as the memory holds it."""
        line: dram.Line = self.tape.move(
            PROBE, "copy a line", lambda: dram.probe(self.machine.memory, hpa), {"hpa": hpa}
        )
        return line

    def inject(self, hpa: int, line: dram.Line) -> None:
        """Put a line into the memory."""
        self.tape.move(
            PROBE,
            "put a line back",
            lambda: dram.inject(self.machine.memory, hpa, line),
            {"hpa": hpa},
        )

    # -- what the victim does

    def guest_read(self, gpa: int = DATA_GPA, size: int = LINE_SIZE) -> bytes | GuestOutcome:
        """The victim reads; a careless one accepts what is pending first."""
        found = self._read_once(gpa, size)
        if isinstance(found, GuestOutcome) and not found.exited and not self.careful:
            self.accept(gpa)
            return self._read_once(gpa, size)
        return found

    def _read_once(self, gpa: int, size: int) -> bytes | GuestOutcome:
        found: bytes | GuestOutcome = self.tape.move(
            GUEST,
            "read memory",
            lambda: self.machine.read_guest(VICTIM_LP, gpa, size),
            {"gpa": gpa},
            lp=VICTIM_LP,
        )
        return found

    def guest_write(self, data: bytes, gpa: int = DATA_GPA) -> Translation | GuestOutcome:
        """The victim writes."""
        found: Translation | GuestOutcome = self.tape.move(
            GUEST,
            "write memory",
            lambda: self.machine.write_guest(VICTIM_LP, gpa, data),
            {"gpa": gpa},
            lp=VICTIM_LP,
        )
        return found

    def accept(self, gpa: int = DATA_GPA) -> GuestOutcome:
        """The victim accepts a page."""
        return self.tdcall(abi.TDG_MEM_PAGE_ACCEPT, rcx=gpa)

    def tdcall(self, leaf: int, **registers: int) -> GuestOutcome:
        """A TDCALL of the victim."""
        values = Registers(**registers)
        outcome: GuestOutcome = self.tape.move(
            GUEST,
            abi.GUEST_LEAVES[leaf].name,
            lambda: self.machine.tdcall(VICTIM_LP, leaf, values.copy()),
            registers,
            lp=VICTIM_LP,
            kind="TDCALL",
        )
        return outcome


def _is_deadly(result: Any) -> bool:
    return isinstance(result, GuestOutcome) and result.exited and is_fatal(result.status)
