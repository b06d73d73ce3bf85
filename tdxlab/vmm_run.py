"""KVM_RUN and what the VMM does when it comes back; and the guests' programs inside the LPs.

Source: QEMU 10, accel/kvm/kvm-all.c (kvm_cpu_exec, kvm_convert_memory), target/i386/kvm/kvm.c.
"""

from __future__ import annotations

from collections.abc import Generator
from errno import EINVAL
from os import strerror
from typing import Any, NamedTuple, Protocol

from tdxlab.abi.outcome import GuestOutcome
from tdxlab.arch import PAGE_SHIFT
from tdxlab.bare import BareMachine
from tdxlab.guest import Guest, GuestCpu, GuestPanic, Motion, Program
from tdxlab.kvm.exits import (
    KVM_HC_MAP_GPA_RANGE,
    KVM_MAP_GPA_RANGE_ENCRYPTED,
    Failed,
    HypercallExit,
    Interrupted,
    KvmExit,
    MemoryFaultExit,
    MmioExit,
    ShutdownExit,
    SystemEventExit,
)
from tdxlab.kvm.fault import KVM_MEMORY_EXIT_FLAG_PRIVATE
from tdxlab.kvm.host import KvmHost
from tdxlab.kvm.params import MmuParams
from tdxlab.kvm.tdx import TdxVcpu
from tdxlab.kvm.vm import Vcpu, Vm
from tdxlab.kvm.vmx import VmxVcpu
from tdxlab.steps import Operation, Step
from tdxlab.vmm_errors import why_dead

# -- how a run can end

DONE = "done"
ERROR = "error"
MEMORY_FAULT = "memory fault"
PANIC = "panic"
SHUTDOWN = "shutdown"
UNHANDLED = "unhandled exit"


class RunResult(NamedTuple):
    """How a guest's program went.

    reason: DONE; ERROR: KVM_RUN failed with `error` (-errno); MEMORY_FAULT: the VMM could not help;
    PANIC: the guest's kernel gave up; SHUTDOWN: triple fault; UNHANDLED: another exit. answers: to
    the accesses that were done, in order. exits: everything that came to user space. detail: for
    people.
    """

    reason: str
    answers: tuple[Any, ...]
    exits: tuple[KvmExit, ...]
    error: int = 0
    detail: str = ""

    @property
    def ok(self) -> bool:
        """The program ran to its end."""
        return self.reason == DONE

    @property
    def value(self) -> Any:
        """The last answer, None without one."""
        return self.answers[-1] if self.answers else None


class Player:
    """A guest's program on one vCPU, between entries and exits."""

    def __init__(self, guest: Guest, vcpu: Vcpu, program: Program) -> None:
        self.guest = guest
        self.vcpu = vcpu
        self.cpu = GuestCpu(guest)
        self.ended = False
        self.panic = ""
        #: what the program itself raised
        self.mistake: Exception | None = None
        self._motion: Motion = self.cpu.execute(program)

    def inside(self, host: KvmHost, lp: int) -> Generator[Step, None, None]:
        """The vCPU is inside `lp`: go on with the program until a TD exit is delivered.

        A program that has ended leaves by an interrupt, with a signal for the VMM's thread.
        """
        self.cpu.lp = lp
        if isinstance(self.vcpu, VmxVcpu):
            self.cpu.emulated, self.vcpu.emulated = self.vcpu.emulated, None
        while lp not in host.exits:
            if lp in host.ipis:
                host.deliver_exit(lp, self.guest.door.interrupt(lp))
                return
            event = self._advance()
            if event is None:
                self.vcpu.signal_pending = True
                host.deliver_exit(lp, self.guest.door.interrupt(lp))
            elif isinstance(event, GuestOutcome):
                self._let_timer_fire()
                host.deliver_exit(lp, event)
            else:
                yield event

    def _let_timer_fire(self) -> None:
        """The guest's timer runs out as soon as it has left to wait for it."""
        if self.cpu.timer_set and isinstance(self.vcpu, TdxVcpu):
            self.cpu.timer_set = False
            self.vcpu.pending_events |= {"interrupt"}

    def _advance(self) -> GuestOutcome | Step | None:
        """The next thing that the guest does; None when the program has ended."""
        try:
            return next(self._motion)
        except StopIteration:
            self.ended = True
            return None
        except GuestPanic as panic:
            self.panic = panic.why
            self._motion = self.cpu.report_panic()
            return next(self._motion)
        except Exception as mistake:
            # A mistake in the program: kept until the vCPU is out, then raised by `run_steps`.
            self.ended, self.mistake = True, mistake
            return None

    def close(self) -> None:
        """Nobody will run the program any further."""
        self._motion.close()


class PlayingHost(KvmHost):
    """A host whose guests run programs: between a vCPU's entry and its exit its program goes on.

    machine: the hardware under it.
    """

    def __init__(self, machine: BareMachine, *, params: MmuParams | None = None) -> None:
        super().__init__(machine, params=params)
        self.machine = machine
        #: who plays which vCPU while it is in KVM_RUN
        self._players: dict[Vcpu, Player] = {}

    def run_guest(self, vcpu: Vcpu, lp: int) -> Generator[Step, None, None]:
        """As `KvmHost.run_guest`; a vCPU without a program waits for somebody to play it."""
        player = self._players.get(vcpu)
        return super().run_guest(vcpu, lp) if player is None else player.inside(self, lp)

    def start(self, player: Player) -> None:
        """Let the vCPU run the program from its next entry on.

        Refuses a vCPU that has one already: ValueError.
        """
        if player.vcpu in self._players:
            raise ValueError(f"{player.vcpu!r} runs a program already; let that end first")
        self._players[player.vcpu] = player

    def stop(self, player: Player) -> None:
        """The vCPU has no program any more."""
        player.close()
        self._players.pop(player.vcpu, None)

    def idle_lp(self) -> int:
        """The first LP that runs no guest.

        Refuses when there is none: ValueError.
        """
        for lp in self.hardware.cpu.lps:
            if not self.hardware.cpu.vcpu_inside(lp):
                return lp
        raise ValueError("every LP runs a guest; let one exit first")


class Vmm(Protocol):
    """What the loop around KVM_RUN needs of the VMM; `vmm.Gate` is one."""

    @property
    def host(self) -> PlayingHost:
        """The kernel."""
        ...

    @property
    def vm(self) -> Vm:
        """KVM's side of the VM."""
        ...

    @property
    def guest(self) -> Guest:
        """The software inside."""
        ...

    @property
    def converts(self) -> bool:
        """The VMM converts memory when the guest wants it."""
        ...

    def kvm_run(self, vcpu: Vcpu) -> Generator[Step, None, KvmExit]:
        """KVM_RUN on the current LP."""
        ...

    def convert_steps(
        self, gpa: int, size: int, *, private: bool, implicit: bool = False
    ) -> Operation:
        """Convert memory. implicit: the guest has not asked. Returns 0 or -errno."""
        ...

    def answer(self, vcpu: Vcpu, **values: int) -> None:
        """Leave what KVM asked for in `struct kvm_run`."""
        ...

    def device(self, gpa: int, size: int, data: int | None) -> int:
        """What a device does."""
        ...


def run_steps(vmm: Vmm, vcpu: Vcpu, program: Program) -> Operation:
    """The thread of a vCPU in the VMM: returns a RunResult. Runs on the current LP.

    What the program itself raises comes out here, once the vCPU has left the guest.
    """
    player = Player(vmm.guest, vcpu, program)
    vmm.host.start(player)
    exits: list[KvmExit] = []
    try:
        while True:
            exit_: KvmExit = yield from vmm.kvm_run(vcpu)
            if isinstance(exit_, Interrupted):
                vcpu.signal_pending = False
                if player.mistake is not None:
                    raise player.mistake
                if player.ended:
                    return _result(player, exits, DONE)
                continue
            exits.append(exit_)
            why = yield from _handle(vmm, vcpu, player, exit_)
            if why is not None:
                return _result(player, exits, *why)
    finally:
        vmm.host.stop(player)


def _result(
    player: Player, exits: list[KvmExit], reason: str, error: int = 0, detail: str = ""
) -> RunResult:
    return RunResult(reason, tuple(player.cpu.answers), tuple(exits), error, detail)


#: None to run on, else (reason, error, detail).
Verdict = Generator[Step, None, tuple[str, int, str] | None]


def _handle(vmm: Vmm, vcpu: Vcpu, player: Player, exit_: KvmExit) -> Verdict:
    """What the VMM does about an exit."""
    if isinstance(exit_, MemoryFaultExit):
        return (yield from _memory_fault(vmm, exit_))
    if isinstance(exit_, HypercallExit):
        vmm.answer(vcpu, hypercall_ret=(yield from _hypercall(vmm, exit_)))
        return None
    if isinstance(exit_, MmioExit):
        value = vmm.device(exit_.phys_addr, exit_.size, exit_.data)
        vmm.answer(vcpu, mmio_data=value)
        return None
    if isinstance(exit_, SystemEventExit):
        return PANIC, 0, player.panic or "the guest reported a fatal error"
    if isinstance(exit_, ShutdownExit):
        return SHUTDOWN, 0, player.panic or "the guest's CPU shut down"
    if isinstance(exit_, Failed):
        dead = why_dead(vmm.vm) if vmm.vm.vm_dead else strerror(-exit_.error)
        return ERROR, exit_.error, dead
    return UNHANDLED, 0, repr(exit_)


def _memory_fault(vmm: Vmm, exit_: MemoryFaultExit) -> Verdict:
    """The guest used memory as the other kind: convert it, and let it try again.

    Where it is of that kind already, or nothing is there, a conversion would not help.
    """
    private = bool(exit_.flags & KVM_MEMORY_EXIT_FLAG_PRIVATE)
    kind = "private" if private else "shared"
    where = f"{kind} access to GPA {exit_.gpa:#x}"
    if vmm.vm.attributes.is_private(exit_.gpa >> PAGE_SHIFT) == private:
        return MEMORY_FAULT, 0, f"{where}: it is {kind} already, but KVM has no page for it"
    if not vmm.converts:
        return MEMORY_FAULT, 0, f"{where}: it is not {kind}, and this VMM converts nothing"
    ret = yield from vmm.convert_steps(exit_.gpa, exit_.size, private=private, implicit=True)
    if ret:
        return MEMORY_FAULT, ret, f"{where}: conversion failed with {strerror(-ret)}"
    return None


def _hypercall(vmm: Vmm, exit_: HypercallExit) -> Generator[Step, None, int]:
    """MapGPA: convert the pages. Returns what the guest is told: 0, or an errno."""
    if exit_.nr != KVM_HC_MAP_GPA_RANGE or not vmm.converts:
        return EINVAL
    gpa, pages, attributes = exit_.args[:3]
    private = bool(attributes & KVM_MAP_GPA_RANGE_ENCRYPTED)
    ret: int = yield from vmm.convert_steps(gpa, pages << PAGE_SHIFT, private=private)
    return -ret
