"""Operations that meet on a machine, and what must be true of it meanwhile: what a scenario is.

`races` has the scenarios.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from tdxlab import invariants
from tdxlab.abi.registers import Registers
from tdxlab.bare import BareMachine
from tdxlab.crew import Actor, Fault
from tdxlab.explore import BUDGET, Exploration, explore
from tdxlab.invariants import InvariantBroken, host_pages
from tdxlab.journal import Row
from tdxlab.kvm.host import KvmHost
from tdxlab.kvm.seamcall_args import tdx_operand_busy
from tdxlab.kvm.vm import Vm
from tdxlab.machine import Machine
from tdxlab.player import ROUND_ROBIN, RUN_BUDGET, Order, Played, Player
from tdxlab.player import run as run_once
from tdxlab.steps import WAIT, Operation, run


class Warned(Exception):
    """WARN_ON fired: the kernel found something that its authors thought could not be."""


def listen(event: tuple[Any, ...]) -> None:
    """Hears all events of a scenario's VMs."""
    if event[0] == "warn":
        raise Warned(event[1])


class WholeCalls(Machine):
    """A machine whose SEAMCALLs are one move each: nobody sees one between checks and effects, and
    so nobody meets another's locks inside the module.
    """

    def seamcall_steps(self, lp: int, rax: int, registers: Registers) -> Operation:
        """As the machine's, at once."""
        yield from ()
        return run(super().seamcall_steps(lp, rax, registers))


class OpenCalls(Machine):
    """A machine whose SEAMCALLs are two moves: checks with all locks taken, then effects.

    Who meets a lock and is told BUSY goes on when no SEAMCALL stands half-done any more: until then
    it would only be told so again.
    """

    def seamcall_steps(self, lp: int, rax: int, registers: Registers) -> Operation:
        """As the machine's."""
        status = yield from super().seamcall_steps(lp, rax, registers)
        while tdx_operand_busy(status) and self.module.calls_suspended:
            yield (WAIT, "SEAMCALL", lp)
        return status


#: A machine whose SEAMCALLs are one move, or two.
Kind = type[Machine]


class Race(NamedTuple):
    """Operations that meet on a machine. actors: in the order in which they are tried. vms: those
    that are there at the beginning. ignored: what makes no difference in this scenario, beside
    counters. watch: what checks the machine while it is explored.
    """

    machine: BareMachine
    actors: tuple[Actor, ...]
    vms: tuple[Vm, ...] = ()
    ignored: tuple[object, ...] = ()
    watch: invariants.Watch | None = None

    @property
    def kernel(self) -> KvmHost | None:
        """The machine's kernel; None where the host calls the module itself."""
        return self.machine.host if isinstance(self.machine, Machine) else None

    def check(self, ended: bool) -> Fault | None:
        """What is wrong with the machine, None if nothing. ended: nothing is half-done."""
        for vm in self.vms:
            if vm.vm_bugged:
                return Fault("vm_bugged", f"{vm}: {vm.vm_bugged}")
        if self.machine.module.halted:
            return Fault("module halted", self.machine.module.halted)
        leaked = self.kernel.pages.leaked if self.kernel else None
        if leaked:
            hpa = min(leaked)
            return Fault("leaked", f"the page {hpa:#x} is lost: {leaked[hpa]}")
        try:
            check = self.watch.check if self.watch else partial(invariants.check, self.machine)
            check("alive" if ended else "always")
        except InvariantBroken as broken:
            return Fault(f"invariant {broken.number}: {broken.name}", broken.explanation)
        return None if self.kernel else self._overtaken()

    def _overtaken(self) -> Fault | None:
        """Invariant 14 where the host is not KVM: `invariants` asks no such host for it."""
        for explanation in host_pages.overtaken_pages(self.machine.memory):
            name = "pages are written back before they change keys"
            return Fault(f"invariant 14: {name}", explanation)
        return None

    @property
    def counters(self) -> list[object]:
        """What tells no states apart: stores that only count what happens, and `ignored`."""
        found: list[object] = [self.machine.trace.words, *self.ignored]
        if self.kernel:
            found.append(self.kernel.counters)
        for vm in self.vms:
            found += [w for v in vm.vcpus for w in vars(v).values() if isinstance(w, Row)]
        return found

    @property
    def locks(self) -> list[object]:
        """What is held for a while and leaves nothing behind."""
        found: list[object] = [self.kernel.tdx_lock] if self.kernel else []
        for vm in self.vms:
            found += [vm.mmu_lock, vm.slots_lock, vm.srcu]
        return found

    def player(self) -> Player:
        """The scenario in the hands of somebody who says who moves next."""
        journal = self.machine.journal
        return Player(self.actors, journal, self.check, ignored=self.counters, locks=self.locks)

    def run(self, order: Order = ROUND_ROBIN, *, budget: int = RUN_BUDGET) -> Played:
        """The scenario once, in one order, which leaves the machine where it led; as
        `player.run`.
        """
        journal = self.machine.journal
        return run_once(self.actors, journal, order, check=self.check, budget=budget)

    def explore(
        self,
        *,
        hashing: bool = True,
        budget: int = BUDGET,
        progress: Callable[[int, int], None] | None = None,
    ) -> Exploration:
        """All schedules of the scenario; as `explore.explore`."""
        watch = invariants.Watch(self.machine)
        try:
            return explore(
                self.actors,
                self.machine.journal,
                self._replace(watch=watch).check,
                ignored=self.counters,
                locks=self.locks,
                hashing=hashing,
                budget=budget,
                progress=progress,
            )
        finally:
            watch.close()
