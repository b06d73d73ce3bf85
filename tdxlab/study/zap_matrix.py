"""The zap matrix: who takes which mappings away, from which root, how; observed on small VMs.

    matrix()                        # a row for each cause and VM type
    observe("TDX", "slot deleted")  # one of them

Each VM has two slots. The cause strikes the first, where half of the pages are used as private
memory and half as shared (a DEFAULT VM has shared memory alone); the second shows what is hit
although it was not meant. Nothing here knows the answers: it counts entries before and after, and
listens to what the VM does meanwhile.
Differs: no scene has an invalid root, though most causes visit those too; nobody waits for
mmu_lock, so no walk gives it up and flushes in its middle.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes

from tdxlab.arch import PAGE_SHIFT, PAGE_SIZE, SIZE_2M
from tdxlab.guest import Write
from tdxlab.kvm.gmem import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE
from tdxlab.kvm.locks import READ, WRITE
from tdxlab.kvm.params import KVM_X86_DEFAULT_VM, KVM_X86_SW_PROTECTED_VM, VmConfig
from tdxlab.kvm.roots import kvm_mmu_reset_context
from tdxlab.kvm.spte import SPTE_MMU_PRESENT_MASK
from tdxlab.kvm.tdp_iter import for_each_tdp_pte
from tdxlab.kvm.vm import MmuPage, Vm
from tdxlab.kvm.zap import kvm_mmu_zap_all_fast, kvm_zap_gfn_range
from tdxlab.machine import Machine
from tdxlab.steps import Operation, run
from tdxlab.study.convert_lab import PRIVATE_DATA
from tdxlab.study.palette import BLACK, GREEN, ORANGE, VERMILLION, Look
from tdxlab.study.plots import Series, stacked_bars
from tdxlab.study.undone import undone
from tdxlab.vmm_plain import PlainVm
from tdxlab.vmm_td import Td

TDX, SW_PROTECTED, DEFAULT, NO_QUIRK = "TDX", "SW_PROTECTED", "DEFAULT", "DEFAULT, quirk off"
VM_TYPES = (TDX, SW_PROTECTED, DEFAULT, NO_QUIRK)

#: Pages of each slot, and of them those that are used as shared memory.
PAGES = 8
SHARED_PAGES = range(PAGES // 2, PAGES)
#: A private page and a shared one beside it.
_BOTH_KINDS = range(SHARED_PAGES.start - 1, SHARED_PAGES.start + 1)
_SLOT_GPAS = (0, SIZE_2M)
_END = 2 * SIZE_2M >> PAGE_SHIFT


class ZapRow(NamedTuple):
    """What one cause does to one VM.

    roots: that lost entries, "direct", "mirror" or both. takes: "leaves" or "tree". hits: "range"
    if only pages that were meant lost their mapping, "more" otherwise. private, shared: pages of
    that kind, of those meant, whose mapping is gone. lock: how mmu_lock was held when entries
    went. flushes: remote TLB flushes. seamcalls: calls of the module. private_data: of those pages
    afterwards.
    """

    cause: str
    vm: str
    roots: str
    takes: str
    hits: str
    private: int
    shared: int
    lock: str
    flushes: int
    seamcalls: int
    private_data: str


class Scene(NamedTuple):
    """A VM in which every page of both slots is mapped."""

    machine: Machine
    gate: Td | PlainVm

    @property
    def vm(self) -> Vm:
        """KVM's side of it."""
        return self.gate.vm

    @property
    def gmem(self) -> int:
        """The first slot's guest_memfd, -1 without one."""
        return self.gate.backings[0].gmem


def make_scene(vm_type: str) -> Scene:
    """A VM of one of `VM_TYPES`, on a machine of its own."""
    machine = Machine(memory="1 GiB", lps=2, packages=1)
    size = PAGES * PAGE_SIZE
    if vm_type == TDX:
        gate: Td | PlainVm = machine.create_td(memory=size)
    else:
        number = KVM_X86_SW_PROTECTED_VM if vm_type == SW_PROTECTED else KVM_X86_DEFAULT_VM
        config = VmConfig(vm_type=number, slot_zap_all=vm_type != NO_QUIRK)
        gate = machine.create_vm(memory=size, config=config)
    private = gate.vm.features.has_private_mem
    gate.add_memory(_SLOT_GPAS[1], size, private=private)
    for start in _SLOT_GPAS:
        if private:
            part = start + SHARED_PAGES.start * PAGE_SIZE
            gate.convert(part, len(SHARED_PAGES) * PAGE_SIZE, to="shared")
        for page in range(PAGES):
            gate.run([Write(gate.guest.alias(start + page * PAGE_SIZE), PRIVATE_DATA)])
    return Scene(machine, gate)


# -- causes


def _delete_slot(scene: Scene) -> Operation:
    return scene.gate.set_user_memory_region_steps(0, 0, 0, hva=0)


def _create_slot(scene: Scene) -> Operation:
    return scene.gate.set_user_memory_region_steps(5, 2 * SIZE_2M, SIZE_2M, hva=1 << 30)


def _munmap(scene: Scene) -> Operation:
    backing = scene.gate.backings[0]
    return scene.gate.user_memory.munmap(backing.hva, backing.size)


def _exit(scene: Scene) -> Operation:
    return scene.gate.user_memory.exit()


def _set_attributes(private: bool) -> Callable[[Scene], Operation]:
    def cause(scene: Scene) -> Operation:
        size = PAGES * PAGE_SIZE
        return scene.gate.set_memory_attributes_steps(0, size, private=private)

    return cause


def _punch(scene: Scene) -> Operation:
    mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
    return scene.gate.guest_memory.fallocate(scene.gmem, mode, 0, PAGES * PAGE_SIZE)


def _close_file(scene: Scene) -> Operation:
    return scene.gate.guest_memory.release(scene.gmem)


def _memory_failure(scene: Scene) -> Operation:
    return scene.gate.guest_memory.error_folio(scene.gmem, 0)


def _zap_all_fast(scene: Scene) -> Operation:
    return kvm_mmu_zap_all_fast(scene.vm)


def _zap_gfns(scene: Scene) -> Operation:
    return kvm_zap_gfn_range(scene.vm, _BOTH_KINDS.start, _BOTH_KINDS.stop)


def _reset_context(scene: Scene) -> Operation:
    yield from ()
    for vcpu in scene.vm.vcpus:
        kvm_mmu_reset_context(vcpu)
    return 0


def _destroy(scene: Scene) -> Operation:
    return scene.gate.destroy_steps()


class Cause(NamedTuple):
    """name: for people. make: the operation. file: it needs a guest_memfd. pages: that it means."""

    name: str
    make: Callable[[Scene], Operation]
    file: bool = False
    pages: range = range(PAGES)


#: In the order of the matrix.
CAUSES = (
    Cause("slot deleted", _delete_slot),
    Cause("slot created", _create_slot),
    Cause("MMU notifier: munmap", _munmap),
    Cause("process exits", _exit),
    Cause("becomes shared", _set_attributes(False), file=True),
    Cause("becomes private", _set_attributes(True), file=True),
    Cause("punch hole", _punch, file=True),
    Cause("guest_memfd closed", _close_file, file=True),
    Cause("memory failure", _memory_failure, file=True, pages=range(1)),
    Cause("zap_all_fast", _zap_all_fast),
    Cause("zap_gfn_range, two pages", _zap_gfns, pages=_BOTH_KINDS),
    Cause("MMU context reset", _reset_context),
    Cause("VM destroyed", _destroy),
)


# -- observing


class Seen(NamedTuple):
    """What is there at one time. leaves: (root kind, gfn); tables: (root kind, HPA)."""

    leaves: frozenset[tuple[str, int]]
    tables: frozenset[tuple[str, int]]
    flushes: int
    seamcalls: int


def look(scene: Scene) -> Seen:
    """What is there now."""
    leaves: set[tuple[str, int]] = set()
    tables: set[tuple[str, int]] = set()
    for kind, table, gfn in _entries(scene.vm):
        (leaves if table < 0 else tables).add((kind, gfn if table < 0 else table))
    calls = sum(scene.machine.seamcalls.values())
    flushes = scene.vm.stats["remote_tlb_flush"]
    return Seen(frozenset(leaves), frozenset(tables), flushes, calls)


def leaf_places(vm: Vm, end: int = _END) -> set[tuple[str, int]]:
    """(root kind, gfn) of every leaf in valid roots below gfn `end`."""
    return {(kind, gfn) for kind, table, gfn in _entries(vm) if table < 0 and gfn < end}


def _entries(vm: Vm) -> Iterator[tuple[str, int, int]]:
    """(root kind, HPA of the table that an entry links, or -1 for a leaf, gfn) of valid roots."""
    for root in vm.tdp_mmu_roots:
        sp: MmuPage = vm.sps[root]
        kind = "mirror" if sp.is_mirror else "direct"
        for it in for_each_tdp_pte(vm, sp, 0, _END):
            if it.old_spte & SPTE_MMU_PRESENT_MASK:
                yield kind, -1 if it.level == 1 else vm.sp_of(it.old_spte).spt, it.gfn


class _Listener:
    """Notes how mmu_lock is held whenever an entry changes."""

    def __init__(self, vm: Vm) -> None:
        self.vm = vm
        self.modes: set[str] = set()

    def __call__(self, event: tuple[Any, ...]) -> None:
        if event[0] == "spte_changed":
            self.modes.add(WRITE if self.vm.mmu_lock.written else READ)


def observe(vm_type: str, cause_name: str) -> ZapRow | None:
    """The row of one cause for one VM type; None where such a VM cannot meet it.

    Refuses names that are not in `VM_TYPES` and `CAUSES`: ValueError.
    """
    causes = {cause.name: cause for cause in CAUSES}
    if cause_name not in causes or vm_type not in VM_TYPES:
        raise ValueError(
            f"{vm_type!r}, {cause_name!r}: choose a VM type of {', '.join(VM_TYPES)} "
            f"and a cause of {', '.join(causes)}"
        )
    return _observe(make_scene(vm_type), vm_type, causes[cause_name])


def _observe(scene: Scene, vm_type: str, cause: Cause) -> ZapRow | None:
    if cause.file and scene.gmem < 0:
        return None
    with undone(scene.machine):
        return _observed(scene, vm_type, cause)


def _observed(scene: Scene, vm_type: str, cause: Cause) -> ZapRow:
    before, listener = look(scene), _Listener(scene.vm)
    scene.vm.listener = listener
    try:
        run(scene.machine.host.on_cpu(0, cause.make(scene)))
    finally:
        scene.vm.listener = None
    after = look(scene)
    leaves, tables = before.leaves - after.leaves, before.tables - after.tables
    gone = {gfn for _, gfn in leaves}
    private = {gfn for gfn in cause.pages if gfn not in SHARED_PAGES}
    if not scene.vm.features.has_private_mem:
        private = set()
    return ZapRow(
        cause.name,
        vm_type,
        " + ".join(sorted({kind for kind, _ in leaves})) or "-",
        ("tree" if tables else "leaves") if leaves else "-",
        ("range" if gone <= set(cause.pages) else "more") if leaves else "-",
        len(gone & private),
        len(gone & (set(cause.pages) - private)),
        "/".join(sorted(listener.modes)) or "-",
        after.flushes - before.flushes,
        after.seamcalls - before.seamcalls,
        _private_data(scene, sorted(private)),
    )


def _private_data(scene: Scene, gfns: list[int]) -> str:
    """What has become of the private pages' data."""
    if not gfns:
        return "-"
    kept = sum(_is_kept(scene, gfn) for gfn in gfns)
    return {0: "lost", len(gfns): "kept"}.get(kept, f"{kept} of {len(gfns)} kept")


def _is_kept(scene: Scene, gfn: int) -> bool:
    """The guest_memfd has the page, and the guest's data is in it."""
    folio = scene.gate.guest_memory.folio(scene.gmem, gfn)
    if folio is None or folio.poisoned:
        return False
    keyid = scene.gate.keyid or 0 if isinstance(scene.gate, Td) else 0
    hpa = folio.pfn << PAGE_SHIFT
    with undone(scene.machine):
        if scene.machine.memory.keyid_of(hpa) != keyid:
            return False
        data = scene.machine.memory.read(hpa, len(PRIVATE_DATA), keyid)
    return data == PRIVATE_DATA


def matrix(*vm_types: str) -> list[ZapRow]:
    """A row for each cause and each of `vm_types`, where there is one: by default for a TD, an
    SW_PROTECTED and a DEFAULT VM.
    """
    scenes = {vm_type: make_scene(vm_type) for vm_type in vm_types or VM_TYPES[:3]}
    rows = [_observe(scene, name, cause) for cause in CAUSES for name, scene in scenes.items()]
    return [row for row in rows if row is not None]


class ShortRow(NamedTuple):
    """One cause and what it does to each type of VM, in a few words."""

    cause: str
    tdx: str
    sw_protected: str
    default: str


def short_matrix(rows: Sequence[ZapRow]) -> list[ShortRow]:
    """The rows of `matrix()` with one column for each VM type."""
    words = {(row.cause, row.vm): _words(row) for row in rows}
    return [
        ShortRow(cause, *(words.get((cause, vm_type), "not possible") for vm_type in VM_TYPES[:3]))
        for cause in dict.fromkeys(row.cause for row in rows)
    ]


def _words(row: ZapRow) -> str:
    """D: direct roots, M: mirror roots; then how, and what it costs."""
    if row.roots == "-":
        return "nothing"
    letters = row.roots.replace("direct", "D").replace("mirror", "M").replace(" ", "")
    parts = [f"{letters} {row.takes}", row.lock]
    parts += [f"flush {row.flushes}"] if row.flushes else []
    parts += [f"{row.seamcalls} SEAMCALLs"] if row.seamcalls else []
    parts += ["data lost"] if row.private_data == "lost" else []
    return ", ".join(parts)


#: What becomes of a page that loses its mapping -> its look.
LOSSES = (
    Look("private, data lost", VERMILLION, BLACK, "L", "xx"),
    Look("private, data kept", GREEN, BLACK, "K", ""),
    Look("shared", ORANGE, BLACK, "S", "//"),
)


def losses(rows: Sequence[ZapRow], ax: Axes) -> Axes:
    """Pages that lose their mapping, for each row of `matrix()`: by kind, and with or without
    their data.
    """
    lost = [row.private if row.private_data == "lost" else 0 for row in rows]
    kept = [row.private - gone for row, gone in zip(rows, lost, strict=True)]
    values = (lost, kept, [row.shared for row in rows])
    series = [Series(look, each) for look, each in zip(LOSSES, values, strict=True)]
    names = [f"{row.cause.rpartition(': ')[2]}, {row.vm}" for row in rows]
    return stacked_bars(ax, names, series, unit="pages", title=f"Mappings gone, of {PAGES} pages")
