"""Scenarios to explore: a machine at the point where a few operations meet, and what they may do.

    race = build("fault-zap", vcpus=2)
    found = race.explore()

Each scenario has a machine of its own. In all of them hold: the invariants, those of every moment
in every state, and all where all have ended; no VM is declared buggy, no WARN fires, the module
does not halt, and no page is lost; results are those that the operation may have.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from errno import EFAULT, errorcode
from typing import Any, NamedTuple

from tdxlab import tlb_races
from tdxlab.abi.leaves import TDH_MEM_PAGE_AUG
from tdxlab.abi.status import OPERAND_ID_RCX, TDX_OPERAND_BUSY
from tdxlab.accesses import Accept, Read
from tdxlab.arch import PAGE_SHIFT, PAGE_SIZE, SIZE_2M, WORDS_PER_PAGE
from tdxlab.crew import Actor
from tdxlab.journal import Table
from tdxlab.kvm.fault import kvm_mmu_page_fault
from tdxlab.kvm.gmem import FALLOC_FL_KEEP_SIZE, GuestMemfds
from tdxlab.kvm.injection import FailNth
from tdxlab.kvm.page_fault import (
    PFERR_PRIVATE_ACCESS,
    PFERR_USER_MASK,
    PFERR_WRITE_MASK,
    RET_PF_FIXED,
    RET_PF_NAMES,
    RET_PF_RETRY,
    RET_PF_SPURIOUS,
)
from tdxlab.kvm.pages import PAGES_OUT
from tdxlab.kvm.tdx import TdxVcpu
from tdxlab.machine import Machine
from tdxlab.race import Kind, OpenCalls, Race, WholeCalls, listen
from tdxlab.states import CHUNK, Part
from tdxlab.steps import Operation, Step, run
from tdxlab.vmm_run import RunResult
from tdxlab.vmm_td import Td

__all__ = ["MAX_VCPUS", "SCENARIOS", "THREAD_LP", "Race", "Scenario", "build"]

#: The LP of threads that are no vCPU's; vCPUs have those below.
THREAD_LP = 3
#: vCPUs that a scenario can have.
MAX_VCPUS = 3

_PRIVATE_WRITE = PFERR_PRIVATE_ACCESS | PFERR_WRITE_MASK | PFERR_USER_MASK
#: GPA of a page that is mapped and accepted, beside which tables exist already.
_NEAR = 0x1000
#: GPAs of pages that are not mapped: with all tables there, and with the last one missing.
_PAGE, _FRESH = 0x5000, 2 * SIZE_2M
#: Bytes of memory about which nothing is kept beside what is kept of other memory: two bytes of a
#: page are the least that are kept.
_SPAN = CHUNK // 2 * PAGE_SIZE
#: PAMT entries do not begin where a place begins: the first pages of a span stay unused.
_MARGIN = CHUNK // 16 * PAGE_SIZE


class Scenario(NamedTuple):
    """A scenario to choose. build: of a number of vCPUs and a kind of machine. what: in words.
    most: greatest number of vCPUs that it is made for.
    """

    build: Callable[[int, Kind], Race]
    what: str
    most: int = MAX_VCPUS


def build(name: str, vcpus: int = 2, *, inside_seamcalls: bool = False) -> Race:
    """The scenario of that name, at its beginning.

    inside_seamcalls: others may move while a SEAMCALL stands between its checks and its effects,
    with all its locks held; else each is one move.
    Refuses a name that does not exist, or a number of vCPUs that it is not made for: ValueError.
    """
    if name not in SCENARIOS:
        raise ValueError(f"there is no scenario {name!r}; choose one of {', '.join(SCENARIOS)}")
    scenario = SCENARIOS[name]
    if not 1 <= vcpus <= scenario.most:
        raise ValueError(f"{vcpus} vCPUs; {name} is made for 1 to {scenario.most}")
    race = scenario.build(vcpus, OpenCalls if inside_seamcalls else WholeCalls)
    vms = race.kernel.vm_list if race.kernel else ()
    for vm in vms:
        vm.listener = listen
    return race._replace(vms=vms)


# -- the parts of a scenario


def _machine(vcpus: int, kind: Kind) -> tuple[Machine, Td]:
    """A TD with 8 MiB, each of whose vCPUs has used a page already."""
    machine = kind(memory="1 GiB", lps=THREAD_LP + 1, packages=2)
    td = machine.create_td(vcpus=vcpus, memory=4 * SIZE_2M)
    for number in range(vcpus):
        td.touch(_NEAR, vcpu=number)
        vcpu = td.vcpu(number)
        for hpa in (*vcpu.page_cache, *vcpu.external_spt_cache):
            # Else it would depend on the schedule which frame a table of the vCPU's gets.
            machine.memory.frame(hpa)
    return machine, td


def _own(td: Td, number: int) -> tuple[object, ...]:
    """What no other vCPU looks at: KVM's side of the vCPU, its pages in the module, and what its LP
    has of its own.
    """
    vcpu, host = td.vcpu(number), td.host
    assert isinstance(vcpu, TdxVcpu)
    cpu, memory = host.hardware.cpu, host.memory
    pages = (vcpu.vp.tdvpr, *vcpu.vp.tdcx)
    frames = [Part(memory.words, memory.frame(hpa), WORDS_PER_PAGE) for hpa in pages]
    of_the_lp = (cpu.inside, cpu.tdrs_inside, host.exits, host.ipis)
    return (vcpu, cpu.tlbs[number], *frames, *(Part(store, number) for store in of_the_lp))


def _apart(machine: Machine, tds: int) -> list[Td]:
    """TDs whose pages are so far from each other that no place (see `states`) is about pages of
    two of them.
    """
    pages, padding, found = machine.host.pages, [], []
    for _ in range(tds):
        while (hpa := pages.alloc_page("padding")) % _SPAN != _MARGIN:
            padding.append(hpa)
        pages.free_page(hpa)
        found.append(machine.create_td(vcpus=1, memory=SIZE_2M))
    for hpa in padding:
        pages.free_page(hpa)
    return found


def _own_of_td(td: Td) -> tuple[object, ...]:
    """What nobody looks at who handles another TD: KVM's side of it, its pages, and what is kept of
    them.
    """
    vm, host, memory = td.vm, td.host, td.host.memory
    assert td.tdr is not None
    assert isinstance(host.machine, Machine)
    hpa, count = td.tdr & -_SPAN, _SPAN >> PAGE_SHIFT
    pfn, pamt = hpa >> PAGE_SHIFT, host.machine.module.pamt
    spans = [
        Part(memory.tags, pfn, count),
        Part(host.pages.uses, pfn, count),
        Part(pamt.words, pamt.entry(hpa, 0), 2 * count),
    ]
    frames = [
        Part(memory.words, memory.frames[page], WORDS_PER_PAGE)
        for page in range(hpa, hpa + _SPAN, PAGE_SIZE)
        if page in memory.frames
    ]
    objects = (td, vm, td.tdx, vm.mmu_lock, vm.slots_lock, vm.srcu, *vm.vcpus, vm.guest_memory)
    tables = [store for thing in objects for store in vars(thing).values() if type(store) is Table]
    return (*objects, *tables, *spans, *frames)


def _fault_steps(td: Td, number: int, gpa: int) -> Generator[Step, None, int]:
    """A vCPU faults once on private memory, reading the memslots meanwhile, as after any exit."""
    srcu = td.vm.srcu
    index = srcu.read_lock()
    try:
        return (yield from kvm_mmu_page_fault(td.vcpu(number), gpa, _PRIVATE_WRITE))
    finally:
        srcu.read_unlock(index)


def _faulting(td: Td, number: int, gpa: int, *results: int) -> Actor:
    """A vCPU that faults, again while it is told to. results: allowed ones beside success."""
    allowed = (RET_PF_FIXED, RET_PF_SPURIOUS, *results)
    return Actor(
        f"vCPU {number}",
        lambda: td.host.on_cpu(number, _fault_steps(td, number, gpa)),
        lambda result: result in allowed,
        lambda result: bool(result == RET_PF_RETRY),
        _own(td, number),
        _fault_result,
    )


def _fault_result(result: int) -> str:
    """What a fault returned, by its name: RET_PF_*, or -errno."""
    return RET_PF_NAMES[result] if result >= 0 else f"-{errorcode[-result]}"


def _faults(td: Td, gpas: list[int], *results: int) -> tuple[Actor, ...]:
    """One vCPU for each GPA."""
    return tuple(_faulting(td, number, gpa, *results) for number, gpa in enumerate(gpas))


def _thread(td: Td, name: str, start: Callable[[], Operation]) -> Actor:
    """A thread of the VMM on an LP of its own; it has to succeed."""
    return Actor(name, lambda: td.host.on_cpu(THREAD_LP, start()), lambda result: result == 0)


def _running(td: Td, number: int, program: list[Any]) -> Actor:
    """A vCPU in KVM_RUN; its guest has to come to the end of its program."""

    def came_to_its_end(result: RunResult) -> bool:
        return result.ok

    start = lambda: td.run_steps(list(program), vcpu=number)  # noqa: E731
    return Actor(f"vCPU {number}", start, came_to_its_end, own=_own(td, number))


def _allocate(td: Td, gpa: int, size: int) -> None:
    """Let the guest_memfd have the pages, so that it does not matter who asks for one first."""
    files, (backing,) = td.vm.guest_memory, td.backings
    assert isinstance(files, GuestMemfds)
    allocate = files.fallocate(backing.gmem, FALLOC_FL_KEEP_SIZE, gpa - backing.gpa, size)
    assert run(td.host.on_cpu(0, allocate)) == 0


def _map(td: Td, gpa: int) -> None:
    """Let KVM map a page that no guest has accepted yet."""
    run(td.host.on_cpu(0, _fault_steps(td, 0, gpa)))


# -- scenarios


def same_page(vcpus: int, kind: Kind) -> Race:
    """All fault on one page: one maps it."""
    machine, td = _machine(vcpus, kind)
    return Race(machine, _faults(td, [_PAGE] * vcpus))


def fresh_region(vcpus: int, kind: Kind) -> Race:
    """All fault on neighbouring pages whose table is missing: one links it."""
    machine, td = _machine(vcpus, kind)
    _allocate(td, _FRESH, vcpus * PAGE_SIZE)
    return Race(machine, _faults(td, [_FRESH + n * PAGE_SIZE for n in range(vcpus)]))


def far_apart(vcpus: int, kind: Kind) -> Race:
    """All fault on pages that have tables of their own: nobody meets anybody."""
    machine, td = _machine(vcpus, kind)
    gpas = [_PAGE + n * SIZE_2M for n in range(vcpus)]
    for gpa in gpas:
        _map(td, gpa - PAGE_SIZE)
        _allocate(td, gpa, PAGE_SIZE)
    return Race(machine, _faults(td, gpas))


def fault_zap(vcpus: int, kind: Kind) -> Race:
    """A page is punched out of the guest_memfd while vCPUs fault on it."""
    machine, td = _machine(vcpus, kind)
    punch = _thread(td, "punch hole", lambda: td.punch_hole_steps(_PAGE, PAGE_SIZE))
    return Race(machine, (*_faults(td, [_PAGE] * vcpus), punch))


def fault_convert(vcpus: int, kind: Kind) -> Race:
    """A page turns shared while vCPUs fault on it as private memory: they map it, or go to user
    space.
    """
    machine, td = _machine(vcpus, kind)
    convert = lambda: td.convert_steps(_PAGE, PAGE_SIZE, private=False)  # noqa: E731
    faults = _faults(td, [_PAGE] * vcpus, -EFAULT)
    return Race(machine, (*faults, _thread(td, "convert", convert)))


def hook_failure(vcpus: int, kind: Kind) -> Race:
    """All fault on one page, and the first TDH.MEM.PAGE.AUG meets a locked operand."""
    machine, td = _machine(vcpus, kind)
    busy = TDX_OPERAND_BUSY | OPERAND_ID_RCX
    FailNth(machine.host, TDH_MEM_PAGE_AUG, status=busy).__enter__()
    return Race(machine, _faults(td, [_PAGE] * vcpus))


def slot_delete(vcpus: int, kind: Kind) -> Race:
    """The memslot is deleted while vCPUs fault on its memory."""
    machine, td = _machine(vcpus, kind)
    (backing,) = td.backings
    delete = lambda: td.set_user_memory_region_steps(  # noqa: E731
        backing.slot, backing.gpa, 0, hva=backing.hva
    )
    faults = _faults(td, [_PAGE] * vcpus, -EFAULT)
    return Race(machine, (*faults, _thread(td, "delete slot", delete)))


def zap_enter(vcpus: int, kind: Kind) -> Race:
    """A page is punched out while vCPUs that have it in their TLBs enter the guest."""
    machine, td = _machine(vcpus, kind)
    for number in range(vcpus):
        td.touch(_PAGE, vcpu=number)
    punch = _thread(td, "punch hole", lambda: td.punch_hole_steps(_PAGE, PAGE_SIZE))
    guests = tuple(_running(td, number, [Read(_NEAR, 1)]) for number in range(vcpus))
    return Race(machine, (*guests, punch))


def tlb_tracking(vcpus: int, kind: Kind) -> Race:
    """A host without KVM takes a page away from vCPUs that read it, and gives it to another TD.

    kind: does not matter; what can be seen half-done is part of the scenario.
    """
    del kind
    return Race(*tlb_races.tracking(vcpus))


def two_teardowns(vcpus: int, kind: Kind) -> Race:
    """TDs are destroyed at once; they share the module, the packages' caches and tdx_lock."""
    machine = kind(memory="1 GiB", lps=THREAD_LP + 1, packages=2)
    tds = _apart(machine, vcpus)

    def destroying(td: Td, lp: int) -> Actor:
        start = lambda: td.host.on_cpu(lp, td.destroy_steps())  # noqa: E731
        return Actor(f"destroy {td}", start, lambda result: result is None, own=_own_of_td(td))

    pages = machine.host.pages
    # Nobody takes a page: it makes no difference in which order they came back, and how many.
    ignored = (Part(pages, "last_returned"), pages.returned_before, Part(pages.counts, PAGES_OUT))
    return Race(machine, tuple(map(destroying, tds, range(vcpus))), ignored=ignored)


def accept_block(vcpus: int, kind: Kind) -> Race:
    """A guest accepts a page that is punched out meanwhile: it faults, and accepts the new one."""
    machine, td = _machine(vcpus, kind)
    for number in range(vcpus):
        _map(td, _PAGE + number * PAGE_SIZE)
    punch = _thread(td, "punch hole", lambda: td.punch_hole_steps(_PAGE, PAGE_SIZE))
    guests = tuple(
        _running(td, number, [Accept(_PAGE + number * PAGE_SIZE)]) for number in range(vcpus)
    )
    return Race(machine, (*guests, punch))


def _first_paragraph(build: Callable[[int, Kind], Race]) -> str:
    text, _, _ = (build.__doc__ or "").partition("\n\n")
    return " ".join(text.split()).rstrip(".")


#: Name -> scenario.
SCENARIOS: dict[str, Scenario] = {
    function.__name__.replace("_", "-"): Scenario(function, _first_paragraph(function), most)
    for function, most in (
        (same_page, 3),
        (fresh_region, 3),
        (far_apart, 3),
        (fault_zap, 3),
        (fault_convert, 3),
        (hook_failure, 3),
        (slot_delete, 3),
        (zap_enter, 3),
        (tlb_tracking, 2),
        (two_teardowns, 3),
        (accept_block, 3),
    )
}
