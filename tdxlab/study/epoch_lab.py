"""A lab for TLB tracking: one TD, a few vCPUs, and one page that the host wants back.

    lab = EpochLab(gpaw=48, vcpus=3)
    lab.play("enter 0", "read 0", "BLOCK", "TRACK", "REMOVE", "kick", "REMOVE")

vCPU n runs on LP n, the host calls from the LP behind them. A move that needs a vCPU has its number
behind its name. Everything goes over a tape, and the lab itself remembers nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

from tdxlab import views
from tdxlab.abi import leaves as abi
from tdxlab.abi.outcome import IN_GUEST, GuestOutcome
from tdxlab.abi.registers import Registers
from tdxlab.abi.status import status_name
from tdxlab.arch import PAGE_SHIFT, SIZE_1G
from tdxlab.host import Host
from tdxlab.host_td import HostTd
from tdxlab.scenarios import booted_machine
from tdxlab.seam import epochs
from tdxlab.seam.td import Td, Tdvps
from tdxlab.tape import Tape

#: The page that is taken away, and what the guest has stored there.
GPA = SIZE_1G
CONTENT = b"my own data"
MAX_VCPUS = 4

#: Moves of the host on the page or the TD, and of one vCPU.
HOST_MOVES = ("BLOCK", "TRACK", "kick", "REMOVE", "UNBLOCK")
VCPU_MOVES = ("enter", "leave", "read")

_LEAVES = {
    "BLOCK": abi.TDH_MEM_RANGE_BLOCK,
    "REMOVE": abi.TDH_MEM_PAGE_REMOVE,
    "UNBLOCK": abi.TDH_MEM_RANGE_UNBLOCK,
}
T = TypeVar("T")


class VcpuRow(NamedTuple):
    """One vCPU. epoch: that it entered in last, 0 before; inside: it is in the guest now; cached:
    the TLB of its LP holds a translation of the page.
    """

    vcpu: int
    inside: bool
    epoch: int
    cached: bool


class EpochRow(NamedTuple):
    """A move, what came of it, and the books afterwards.

    td_epoch; even, odd: vCPUs inside that entered in an even and in an odd epoch. page: state of
    its S-EPT entry; bepoch: epoch in which it was blocked, as the PAMT has it. inside: each vCPU
    in the guest @ the epoch that it entered in. cached: vCPUs whose LP has the page in its TLB.
    """

    move: str
    answer: str
    td_epoch: int
    even: int
    odd: int
    page: str
    bepoch: int
    inside: str
    cached: str


class EpochLab:
    """A TD that can run, with `vcpus` vCPUs (1 to 4) outside, and the page at GPA mapped.

    machine, tape: what it lives on. answer: of the last move, in words.
    Refuses another number of vCPUs: ValueError.
    """

    def __init__(self, *, gpaw: int = 48, vcpus: int = 3) -> None:
        if not 1 <= vcpus <= MAX_VCPUS:
            raise ValueError(f"{vcpus} vCPUs; choose 1..{MAX_VCPUS}")
        self.gpaw, self.vcpus, self.host_lp = gpaw, vcpus, vcpus
        self.machine = booted_machine(lps=vcpus + 1, packages=1)
        host = Host(self.machine)
        self.td = HostTd(host, gpaw=gpaw, max_vcpus=vcpus)
        for lp in range(vcpus):
            self.td.add_vcpu(lp=lp)
        self.hpa = self.td.add_page(GPA, CONTENT)
        self.td.finalize()
        self.tape = host.tape = host.door = Tape(self.machine)

    # -- moves

    def do(self, move: str) -> EpochRow:
        """Make one move, such as "BLOCK" or "enter 1"; returns what came of it.

        Refuses a move that does not exist, and one that cannot even be asked, such as a read by a
        vCPU that is outside: ValueError.
        """
        name, vcpu = self._parse(move)
        answer = self._host_move(name) if vcpu is None else self._vcpu_move(name, vcpu)
        return self.row(move, answer)

    def play(self, *moves: str) -> list[EpochRow]:
        """Several moves, one after the other."""
        return [self.do(move) for move in moves]

    def _parse(self, move: str) -> tuple[str, int | None]:
        name, _, number = str(move).strip().partition(" ")
        if name in HOST_MOVES and not number:
            return name, None
        if name in VCPU_MOVES and number in map(str, range(self.vcpus)):
            return name, int(number)
        mine = ", ".join(f"{each} 0..{self.vcpus - 1}" for each in VCPU_MOVES)
        raise ValueError(f"there is no move {move!r}; choose of {', '.join(HOST_MOVES)}, {mine}")

    def _host_move(self, name: str) -> str:
        self.tape.phase = name
        if name == "kick":
            kicked = self.inside()
            for vcpu in kicked:
                self.tape.kick(vcpu)
            return f"{len(kicked)} IPI{'s' * (len(kicked) != 1)}"
        if name == "TRACK":
            registers = Registers(rcx=self.td.tdr)
            return said(self.tape.seamcall(self.host_lp, abi.TDH_MEM_TRACK, registers))
        registers = Registers(rcx=GPA, rdx=self.td.tdr)
        return said(self.tape.seamcall(self.host_lp, _LEAVES[name], registers))

    def _vcpu_move(self, name: str, vcpu: int) -> str:
        self.tape.phase = f"vCPU {vcpu}"
        if name == "enter":
            return said(self.td.enter(vcpu, lp=vcpu))
        if name == "leave":
            self.tape.interrupt(vcpu)
            return "outside"
        hits = self.machine.trace.hardware()["tlb_hit"]
        found = self.tape.touch(vcpu, GPA)
        if isinstance(found, GuestOutcome):
            return "EPT violation: outside"
        return "from the TLB" if self.machine.trace.hardware()["tlb_hit"] > hits else "by a walk"

    # -- what is there

    def inside(self) -> list[int]:
        """Numbers of the vCPUs in the guest."""
        return [lp for lp in range(self.vcpus) if self.machine.cpu.vcpu_inside(lp)]

    def vcpu_rows(self) -> list[VcpuRow]:
        """All vCPUs."""
        inside, rows = self.inside(), []
        for vcpu, tdvpr in enumerate(self.td.vcpus):
            page = self.machine.memory.frame(tdvpr)
            epoch = self.machine.memory.words.view[page + Tdvps.VCPU_EPOCH]
            cached = any(gfn == GPA >> PAGE_SHIFT for _, gfn in self.machine.cpu.tlbs[vcpu])
            rows.append(VcpuRow(vcpu, vcpu in inside, epoch, cached))
        return rows

    def page_state(self) -> str:
        """State of the page's S-EPT entry."""
        rows = views.sept_rows(self.machine, self.td.tdr)
        found = [row.state for row in rows if (row.sept_level, row.gpa) == (0, GPA)]
        return found[0] if found else "FREE"

    def bepoch(self) -> int:
        """The epoch in which the page was blocked, as the PAMT has it; 0 for never."""
        pamt = self.machine.module.pamt
        return pamt.bepoch(pamt.entry(self.hpa, 0))

    def is_tracked(self) -> bool:
        """The module would take the page's tracking for done."""
        td = Td(self.machine.memory, self.td.tdr)
        td.map_tdcs(self.machine.memory)
        return epochs.is_tracked(self.machine.memory.words, td.tdcs, self.bepoch())

    def row(self, move: str = "", answer: str = "") -> EpochRow:
        """The books as they are now."""
        info, vcpus = views.td_info(self.machine, self.td.tdr), self.vcpu_rows()
        return EpochRow(
            move,
            answer,
            info["td_epoch"],
            info["refcount0"],
            info["refcount1"],
            self.page_state(),
            self.bepoch(),
            " ".join(f"{row.vcpu}@{row.epoch}" for row in vcpus if row.inside) or "-",
            " ".join(str(row.vcpu) for row in vcpus if row.cached) or "-",
        )

    def counts(self) -> dict[str, int]:
        """IPIs and TLB flushes so far, since the machine was built."""
        hardware = self.machine.trace.hardware()
        return {"IPIs": hardware["ipi"], "TLB flushes": hardware["tlb_flush"]}

    def over_time(self, look: Callable[[], T]) -> Iterator[T]:
        """What `look` sees after each action of the tape up to the present one; the first is the
        beginning. The machine is where it was afterwards.
        """
        now = self.tape.position
        try:
            for position in range(now + 1):
                self.tape.seek(position)
                yield look()
        finally:
            self.tape.seek(now)


def said(status: int) -> str:
    """The answer of a SEAMCALL, short: the name of the status."""
    return "inside" if status == IN_GUEST else status_name(status).removeprefix("TDX_")
