"""A VM of any type on a tape of steps, and what can be done to it.

    lab = TypeLab("SNP")
    lab.do("use a private page")         # goes on the tape
    lab.tape.seek(3)                     # ... stands in the middle of it

The VM has two slots of 8 pages. The first half of each is private memory where the type has any;
some pages of both halves are in use. Deeds strike the first slot; the second shows what is hit
although it was not meant.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from errno import EOPNOTSUPP, errorcode
from typing import Any, NamedTuple

from tdxlab.arch import PAGE_SHIFT, PAGE_SIZE, SIZE_2M
from tdxlab.guest import Write
from tdxlab.kvm.fault import kvm_vcpu_pre_fault_memory
from tdxlab.kvm.slots import KVM_MEM_GUEST_MEMFD, KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY
from tdxlab.kvm.vm_types import KINDS, KVM_X86_TDX_VM
from tdxlab.machine import Machine
from tdxlab.step_tape import StepTape
from tdxlab.steps import Operation
from tdxlab.study.undone import undone
from tdxlab.study.zap_matrix import CAUSES, PAGES, SHARED_PAGES, Scene, look
from tdxlab.vmm_ioctls import HVA_BASE
from tdxlab.vmm_plain import PlainVm
from tdxlab.vmm_run import RunResult, run_steps
from tdxlab.vmm_snp import SnpVm
from tdxlab.vmm_td import Td

NAMES = tuple(kind.name for kind in KINDS)

#: Pages of each slot that are in use from the beginning, and two that are not.
USED = (0, 1, 4, 5)
NEW_PRIVATE, NEW_SHARED = 2, 6
_SLOT_GPAS = (0, SIZE_2M)
_FREE_GPA = 2 * SIZE_2M
_DATA = b"guest"

#: How a tape notes the end of an operation.
_RETURNS = "returns "
#: Where one number has two names, that of the kernel's documents.
_ERRNO_NAMES = {EOPNOTSUPP: "EOPNOTSUPP"}
#: Calls that only enter a guest.
_ENTRIES = frozenset({"TDH.VP.ENTER"})


class Deed(NamedTuple):
    """Something that can be done to a VM. make: the operation. private: it needs a guest_memfd.
    early: it is for a VM that was just created, whose launch has not ended. quirk: False if it is
    for a VM whose user space has turned the quirk KVM_X86_QUIRK_SLOT_ZAP_ALL off.
    """

    name: str
    make: Callable[[Scene], Operation]
    private: bool = False
    early: bool = False
    quirk: bool = True


def _new_slot(flags: int, number: int = 5) -> Callable[[Scene], Operation]:
    def make(scene: Scene) -> Operation:
        size = PAGES * PAGE_SIZE
        gmem = scene.gate.guest_memory.create(size) if flags & KVM_MEM_GUEST_MEMFD else -1
        return scene.gate.set_user_memory_region_steps(
            number, _FREE_GPA, size, flags=flags, hva=HVA_BASE + _FREE_GPA, gmem=gmem
        )

    return make


def _set_private(scene: Scene) -> Operation:
    gpa = NEW_SHARED * PAGE_SIZE
    return scene.gate.set_memory_attributes_steps(gpa, PAGE_SIZE, private=True)


def _pre_fault(scene: Scene) -> Operation:
    gpa = NEW_PRIVATE * PAGE_SIZE
    return kvm_vcpu_pre_fault_memory(scene.gate.vcpu(0), gpa, PAGE_SIZE)


def _use(page: int) -> Callable[[Scene], Operation]:
    def make(scene: Scene) -> Operation:
        return _write(scene, scene.gate.guest.alias(page * PAGE_SIZE))

    return make


def _write(scene: Scene, gpa: int) -> Operation:
    return run_steps(scene.gate, scene.gate.vcpu(0), [Write(gpa, _DATA)])


def _use_as_shared(scene: Scene) -> Operation:
    """The guest maps a private page as shared without a word, and user space converts nothing."""
    gate, gpa = scene.gate, NEW_PRIVATE * PAGE_SIZE
    if isinstance(gate, SnpVm):
        gate.guest.shared.put(NEW_PRIVATE, None)
    gate.converts = False
    result = yield from _write(scene, gpa | gate.guest.shared_mask)
    gate.converts = True
    return result


_ZAPS = {cause.name: cause for cause in CAUSES}
_ZAPPED = (
    *("slot deleted", "MMU notifier: munmap", "becomes shared", "becomes private"),
    *("punch hole", "zap_all_fast", "VM destroyed"),
)
_ZAP_DEEDS = [Deed(name, _ZAPS[name].make, _ZAPS[name].file) for name in _ZAPPED]

#: In the order of the matrix.
DEEDS = (
    Deed("a slot with guest_memfd", _new_slot(KVM_MEM_GUEST_MEMFD)),
    Deed("a read-only slot", _new_slot(KVM_MEM_READONLY)),
    Deed("a private slot, dirty-logged", _new_slot(KVM_MEM_GUEST_MEMFD | KVM_MEM_LOG_DIRTY_PAGES)),
    Deed("a slot for SMM", _new_slot(0, number=1 << 16)),
    Deed("attribute PRIVATE", _set_private),
    Deed("pre-fault at creation", _pre_fault, early=True),
    Deed("pre-fault later", _pre_fault),
    Deed("use a private page", _use(NEW_PRIVATE)),
    Deed("use a shared page", _use(NEW_SHARED)),
    Deed("use a private page as shared", _use_as_shared),
    _ZAP_DEEDS[0],
    Deed("slot deleted, quirk off", _ZAPS["slot deleted"].make, quirk=False),
    *_ZAP_DEEDS[1:],
)
_BY_NAME = {deed.name: deed for deed in DEEDS}


class Done(NamedTuple):
    """A deed on the tape, up to its present position. answer: "not ended yet" in its middle."""

    deed: str
    answer: str


class Counts(NamedTuple):
    """A VM at one moment. leaves: (root, gfn) that are mapped. rmp: entries changed so far."""

    leaves: frozenset[tuple[str, int]]
    seamcalls: int
    rmp: int
    flushes: int


class TypeLab:
    """A VM of one of NAMES on a machine of its own, and the tape that it is on. start: counts when
    the tape began.

    gpaw: of a TD, 48 or 52. launched: False for one that was just created, in which nothing is in
    use yet; an SNP VM or a TD is then in the middle of its launch. quirk: SLOT_ZAP_ALL is on.
    Refuses other names: ValueError.
    """

    def __init__(
        self, name: str, *, gpaw: int = 48, launched: bool = True, quirk: bool = True
    ) -> None:
        if name not in NAMES:
            raise ValueError(f"there is no VM type {name!r}; choose from {', '.join(NAMES)}")
        self.name, self.launched, self.quirk = name, launched, quirk
        self.kind = KINDS[NAMES.index(name)]
        self.machine = Machine(gpaw=gpaw, memory="1 GiB", lps=2, packages=1)
        self.gate = self._make_vm()
        self.gate.vm.config = replace(self.gate.vm.config, slot_zap_all=quirk)
        self.scene = Scene(self.machine, self.gate)
        self.is_private = self.gate.vm.features.has_private_mem
        self.gate.add_memory(_SLOT_GPAS[1], PAGES * PAGE_SIZE, private=self.is_private)
        self._use_memory()
        self.start = self.counts()
        self.tape = StepTape(self.machine)

    def _make_vm(self) -> Td | PlainVm:
        size, vm_type = PAGES * PAGE_SIZE, self.kind.vm_type
        if vm_type == KVM_X86_TDX_VM:
            return self.machine.create_td(memory=size, launch=self.launched)
        return self.machine.create_vm(memory=size, vm_type=vm_type, launch=self.launched)

    def _use_memory(self) -> None:
        """The guest uses some pages of both slots."""
        if not self.launched:
            return
        for start in _SLOT_GPAS:
            if self.is_private:
                part = start + SHARED_PAGES.start * PAGE_SIZE
                self.gate.convert(part, len(SHARED_PAGES) * PAGE_SIZE, to="shared")
            for page in USED:
                gpa = self.gate.guest.alias(start + page * PAGE_SIZE)
                self.gate.run([Write(gpa, _DATA)])

    @property
    def is_mute(self) -> bool:
        """The guest's page tables cannot say which kind of memory they mean."""
        return not isinstance(self.gate, SnpVm | Td)

    # -- deeds

    def operation(self, name: str) -> Operation:
        """The deed as a thread; it returns its answer in words.

        Refuses what is no deed, or what such a VM cannot meet: ValueError.
        """
        deed = _BY_NAME.get(name)
        if deed is None:
            raise ValueError(f"{name!r} is no deed; choose from {', '.join(_BY_NAME)}")
        if deed.private and not self.is_private:
            raise ValueError(f"{name}: a VM of type {self.name} has no guest_memfd")
        if deed.early and self.launched:
            raise ValueError(f"{name}: this VM is past that; build one whose launch has not ended")
        if self.quirk and not deed.quirk:
            raise ValueError(f"{name}: this VM has the quirk on; build one with it off")
        return self.machine.host.on_cpu(0, _worded(self.scene, deed))

    def do(self, name: str) -> str:
        """Do it, on the tape; returns the answer in words. Refuses as `operation`, and everything
        once the VM is destroyed: ValueError.
        """
        self.operation(name).close()
        if self.gate.destroyed:
            raise ValueError("the VM is destroyed: go back, or build a new one")
        return str(self.tape.perform(name, lambda: self.operation(name)))

    def use_as(self, *, attribute: bool, private: bool) -> str:
        """What comes of the use of a page that is not mapped, if user space converts nothing.

        attribute: the page is private by attribute. private: the guest uses it as private, by what
        its own page tables say, if its type lets them say it. Returns the root that maps it, or how
        the run ends. The VM is unchanged afterwards. Refuses a type without private memory:
        IoctlError.
        """
        gate, gpa = self.gate, NEW_PRIVATE * PAGE_SIZE
        with undone(self.machine):
            gate.set_memory_attributes(gpa, PAGE_SIZE, private=attribute)
            gate.converts = False
            if isinstance(gate, SnpVm) and not private:
                gate.guest.shared.put(NEW_PRIVATE, None)
            before = self.counts().leaves
            result = gate.run([Write(gpa | (0 if private else gate.guest.shared_mask), _DATA)])
            new = self.counts().leaves - before
        return ", ".join(sorted(root for root, _ in new)) if result.ok else result.reason

    # -- looking

    def counts(self) -> Counts:
        """What is mapped, and what was counted since the machine was built."""
        seen, rmp = look(self.scene), self.machine.rmp
        calls = Counter(self.machine.seamcalls)
        work = sum(number for leaf, number in calls.items() if leaf not in _ENTRIES)
        return Counts(seen.leaves, work, rmp.made_private + rmp.made_shared, seen.flushes)

    def history(self) -> list[Done]:
        """The deeds up to the tape's present position."""
        rows: list[Done] = []
        is_over = True
        for action in self.tape.actions[: self.tape.position]:
            if is_over:
                rows.append(Done(action.phase, "not ended yet"))
            is_over = action.name.startswith(_RETURNS)
            if is_over:
                rows[-1] = Done(action.phase, action.name.removeprefix(_RETURNS).strip("'"))
        return rows

    def is_private_gfn(self, gfn: int) -> bool:
        """The PRIVATE attribute of the gfn."""
        return self.gate.vm.attributes.is_private(gfn)

    def owned(self) -> set[int]:
        """gfns whose pages the RMP says are this VM's."""
        if not isinstance(self.gate, SnpVm):
            return set()
        return {gpa >> PAGE_SHIFT for gpa in self.gate.owned()}


def _worded(scene: Scene, deed: Deed) -> Operation:
    result = yield from deed.make(scene)
    return words_of(result)


def words_of(result: Any) -> str:
    """What came back from an operation: "ok", the name of an errno, or how a run ended."""
    if isinstance(result, RunResult):
        return "ok" if result.ok else result.reason
    if isinstance(result, int) and result < 0:
        return f"-{_ERRNO_NAMES.get(-result, errorcode[-result])}"
    return "ok"
