"""A TD's whole life as a list of deeds, each of which may fail: built, used, changed, taken apart.

A life goes on after a failure as far as a VMM would: what a deed needs is looked at before it, and
what KVM refuses is noted. At the end the TD is always taken apart.

A deed that never ends is killed like a process: its vCPUs get a signal after so many steps, and
nothing more is asked of the TD but its end.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from errno import EBUSY, EINTR
from typing import Any, NamedTuple

from tdxlab.arch import PAGE_SIZE, SIZE_2M
from tdxlab.failures import Pace
from tdxlab.guest import MapGpa, Program, Write
from tdxlab.kvm.slots import KVM_MEM_GUEST_MEMFD
from tdxlab.kvm.tdx import TD_STATE_UNINITIALIZED
from tdxlab.machine import Machine
from tdxlab.steps import WAIT, Deadlock, Operation
from tdxlab.vmm_errors import IoctlError
from tdxlab.vmm_ioctls import Backing, Gauge
from tdxlab.vmm_run import RunResult
from tdxlab.vmm_td import Td

#: Steps after which a deed counts as one that never ends; a whole life without failures has 500.
PATIENCE = 2000
#: Steps that a teardown may have: it resumes an interrupted CACHE.WB 10000 times on each package.
LAST_PATIENCE = 100_000

#: Pages of each of the TD's two memories; the second begins in another table.
PAGES = 4
SECOND = SIZE_2M
IMAGE = b"\x90" * 64

DESTROY = "destroy"

# -- what becomes of a TD

GONE, UNFINALISED, DEAD, LOOPS, USABLE = "gone", "not finalised", "dead", "loops", "usable"
#: ... and of the whole host with it: Linux would follow an invalid pointer.
CRASHED = "host crash"


class Killed(Exception):
    """A deed would never have ended; a signal ended it."""


class OutOfMemory(Exception):
    """The VMM's own memory is exhausted."""


class Subject(Td):
    """A TD whose operations are counted in steps, and given up when they never end.

    pace: counts the steps. patience: steps of one operation.
    """

    def __init__(self, machine: Machine, gpaw: int) -> None:
        super().__init__(machine.host, gpaw=gpaw, name="TD")
        self.pace = Pace(machine.journal)
        self.patience = PATIENCE

    def run_thread(
        self, operation: Operation, lp: int | None = None, gauge: Gauge | None = None
    ) -> Any:
        """As `Td.run_thread`. Raises Killed if a signal had to end it, Deadlock if it waits for
        somebody or if not even a signal ends it.
        """
        place = self.host.idle_lp() if lp is None else lp
        thread = self.pace.watch(self.host.on_cpu(place, operation))
        first = self.pace.steps
        try:
            while True:
                step = next(thread)
                taken = self.pace.steps - first
                if step[0] == WAIT or taken > 2 * self.patience:
                    raise Deadlock(step if step[0] == WAIT else ("no end", *step))
                if taken == self.patience:
                    self._signal(True)
                elif taken > self.patience and self._has_taken_signal():
                    raise Killed(step[0])
        except StopIteration as end:
            return end.value
        finally:
            thread.close()
            self._signal(False)

    def _signal(self, pending: bool) -> None:
        for vcpu in self.vm.vcpus:
            if vcpu.signal_pending != pending:
                vcpu.signal_pending = pending

    def _has_taken_signal(self) -> bool:
        return not all(vcpu.signal_pending for vcpu in self.vm.vcpus)


class Deed(NamedTuple):
    """Something that is done with a TD. name: for people. do: does it. needs: the state in which
    the TD must be: GONE, UNFINALISED or USABLE.
    """

    name: str
    do: Callable[[Subject], object]
    needs: str = USABLE


class Life:
    """A TD that lives through deeds.

    deed: what it is at. refused: (name of a deed, what KVM said) of each that was refused.
    looped: the deed that a signal had to end, "" if none. stopped: a program of the guest could not
    go on, and the VMM gave up.
    """

    def __init__(self, machine: Machine, gpaw: int) -> None:
        self.td = Subject(machine, gpaw)
        self.deed = ""
        self.refused: list[tuple[str, str]] = []
        self.looped = ""
        self.stopped = False

    def attempt(self, deed: Deed) -> None:
        """Do a deed, if the TD has come far enough for it."""
        if self.stopped or self.state() != deed.needs:
            return
        self.deed = deed.name
        try:
            result = deed.do(self.td)
        except Killed:
            self.looped = deed.name
        except IoctlError as error:
            self.refused.append((deed.name, str(error)))
            if error.errno == EINTR:
                self.looped = deed.name
        except OutOfMemory as error:
            self.refused.append((deed.name, str(error)))
        else:
            if isinstance(result, RunResult) and not result.ok:
                self.refused.append((deed.name, f"{result.reason}: {result.detail}"))
                self.stopped = True

    def state(self) -> str:
        """What has become of the TD so far.

        GONE: the module has none. UNFINALISED: it was built, not more. USABLE: KVM would run it.
        DEAD: KVM runs it no more. LOOPS: something never ended but by a signal.
        """
        tdx = self.td.tdx
        if self.td.vm.vm_dead:
            return DEAD
        if self.looped:
            return LOOPS
        if tdx.state == TD_STATE_UNINITIALIZED:
            return GONE
        return USABLE if tdx.is_runnable else UNFINALISED

    def end(self) -> None:
        """Take the TD apart."""
        self.deed = DESTROY
        self.td.patience = LAST_PATIENCE
        self.td.run_thread(self.td.destroy_steps())


# -- deeds


def init(td: Subject) -> None:
    """KVM_TDX_INIT_VM."""
    td.init_vm(max_vcpus=2)


def add_vcpu(td: Subject) -> None:
    """KVM_CREATE_VCPU and KVM_TDX_INIT_VCPU."""
    td.add_vcpu()


def add_memories(td: Subject) -> None:
    """Two memories of PAGES pages."""
    td.add_memory(0, PAGES * PAGE_SIZE)
    td.add_memory(SECOND, PAGES * PAGE_SIZE)


def add_image(td: Subject) -> None:
    """KVM_TDX_INIT_MEM_REGION: one measured page at GPA 0."""
    try:
        td.add_image(0, IMAGE)
    except IoctlError:
        raise
    except ValueError as error:
        raise OutOfMemory("the VMM has no page for the image") from error


def finalize(td: Subject) -> None:
    """KVM_TDX_FINALIZE_VM; twice more if it says -EBUSY."""
    for attempts_left in (2, 1, 0):
        try:
            td.finalize()
        except IoctlError as error:
            if error.errno != EBUSY or not attempts_left:
                raise
        else:
            return


def use(*gpas: int, vcpu: int = 0, lp: int | None = None) -> Callable[[Subject], RunResult]:
    """The guest writes to pages, as it has them: private or shared."""

    def do(td: Subject) -> RunResult:
        program: Program = [Write(td.guest.alias(gpa)) for gpa in gpas]
        return td.run(program, vcpu=_vcpu(td, vcpu), lp=lp)

    return do


def convert(gpa: int, pages: int, to: str) -> Callable[[Subject], RunResult]:
    """The guest has pages converted: to="shared" or "private"."""

    def do(td: Subject) -> RunResult:
        asked = gpa | (td.guest.shared_mask if to == "shared" else 0)
        return td.run([MapGpa(asked, pages * PAGE_SIZE)])

    return do


def punch(gpa: int, pages: int) -> Callable[[Subject], None]:
    """The guest gives pages up, and the VMM punches them out of guest_memfd."""

    def do(td: Subject) -> None:
        td.punch_hole(gpa, pages * PAGE_SIZE)
        for gfn in range(gpa // PAGE_SIZE, gpa // PAGE_SIZE + pages):
            if gfn in td.guest.accepted:
                td.guest.accepted.drop(gfn)

    return do


def delete_slot(number: int) -> Callable[[Subject], None]:
    """Delete one of the TD's memslots."""

    def do(td: Subject) -> None:
        _set_slot(td, td.backings[number], 0)

    return do


def replace_slot(number: int) -> Callable[[Subject], None]:
    """Delete a memslot and create it again: its private pages are lost."""

    def do(td: Subject) -> None:
        backing = td.backings[number]
        _set_slot(td, backing, 0)
        for gfn in range(backing.gpa // PAGE_SIZE, backing.end // PAGE_SIZE):
            if gfn in td.guest.accepted:
                td.guest.accepted.drop(gfn)
        _set_slot(td, backing, backing.size)

    return do


def _set_slot(td: Subject, backing: Backing, size: int) -> None:
    td.set_user_memory_region(
        backing.slot,
        backing.gpa,
        size,
        flags=KVM_MEM_GUEST_MEMFD,
        hva=backing.hva,
        gmem=backing.gmem,
    )


def _vcpu(td: Subject, number: int) -> int:
    """The vCPU that is meant, another one where it does not exist."""
    return min(number, len(td.vm.vcpus) - 1)


_BUILD = (
    Deed("init VM", init, GONE),
    Deed("vCPU 0", add_vcpu, UNFINALISED),
    Deed("vCPU 1", add_vcpu, UNFINALISED),
    Deed("memory", add_memories, UNFINALISED),
    Deed("image", add_image, UNFINALISED),
    Deed("finalize", finalize, UNFINALISED),
)

#: The life that the systematic part of a campaign repeats.
WHOLE_LIFE = (
    *_BUILD,
    Deed("fault", use(PAGE_SIZE, 2 * PAGE_SIZE)),
    Deed("fault, vCPU 1", use(SECOND, SECOND + PAGE_SIZE, vcpu=1)),
    Deed("convert to shared", convert(PAGE_SIZE, 1, "shared")),
    Deed("shared fault", use(PAGE_SIZE)),
    Deed("convert to private", convert(PAGE_SIZE, 1, "private")),
    Deed("punch", punch(2 * PAGE_SIZE, 1)),
    Deed("move vCPU", use(2 * PAGE_SIZE, lp=2)),
    Deed("delete slot", delete_slot(1)),
    Deed("last fault", use(3 * PAGE_SIZE)),
)


def random_life(choose: random.Random) -> tuple[Deed, ...]:
    """A TD that is built and then does some things in any order."""
    deeds = [deed for deed in _BUILD if deed.name != "vCPU 1" or choose.random() < 0.6]
    if choose.random() < 0.3:
        deeds.remove(_BUILD[4])
    for _ in range(choose.randint(2, 10)):
        deeds.append(choose.choice(_ANY)(choose))
    return tuple(deeds)


def _page(choose: random.Random) -> int:
    return choose.choice((0, SECOND)) + choose.randrange(PAGES) * PAGE_SIZE


def _random_use(choose: random.Random) -> Deed:
    gpas = [_page(choose) for _ in range(choose.randint(1, 4))]
    return Deed("fault", use(*gpas, vcpu=choose.randrange(2), lp=choose.randrange(3)))


def _random_conversion(choose: random.Random) -> Deed:
    to = choose.choice(("shared", "private"))
    return Deed(f"convert to {to}", convert(_page(choose), 1, to))


def _random_punch(choose: random.Random) -> Deed:
    return Deed("punch", punch(_page(choose), 1))


def _random_replacement(choose: random.Random) -> Deed:
    return Deed("replace slot", replace_slot(choose.randrange(2)))


_ANY: tuple[Callable[[random.Random], Deed], ...] = (
    _random_use,
    _random_use,
    _random_conversion,
    _random_punch,
    _random_replacement,
)
