"""One VM with memory behind it, for tests of faults: memslots, attributes, scripted host pages."""

from __future__ import annotations

from collections.abc import Generator

from tdxlab.arch import PAGE_SIZE
from tdxlab.hardware import Region
from tdxlab.journal import Journal
from tdxlab.kvm.fault import kvm_mmu_do_page_fault
from tdxlab.kvm.notifier import (
    kvm_mmu_invalidate_begin,
    kvm_mmu_invalidate_end,
    kvm_mmu_invalidate_range_add,
)
from tdxlab.kvm.page_fault import (
    PFERR_GUEST_FINAL_MASK,
    PFERR_PRIVATE_ACCESS,
    PFERR_WRITE_MASK,
    PageFault,
)
from tdxlab.kvm.pages import HostPages
from tdxlab.kvm.params import KVM_X86_TDX_VM, MmuParams, VmConfig, gfn_shared_bit
from tdxlab.kvm.roots import kvm_mmu_load
from tdxlab.kvm.slots import KVM_MEM_GUEST_MEMFD, HostPage, NoGuestMemory, Slot
from tdxlab.kvm.tdp_iter import for_each_tdp_pte
from tdxlab.kvm.vm import Vcpu, Vm
from tdxlab.memory import Memory
from tdxlab.steps import Operation, Step, run
from tdxlab.trace import Trace

#: First frame of guest_memfd and of user memory.
PRIVATE_PFN = 0x100000
SHARED_PFN = 0x200000
#: HVA of page 0 of user memory.
HVA = 0x10000000000


class ScriptedHooks:
    """An external EPT that obeys. calls: (hook, gfn, level). errors: what the next calls return."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int, int]] = []
        self.errors: list[int] = []

    def link_external_spt(
        self, gfn: int, level: int, external_spt: int
    ) -> Generator[Step, None, int]:
        return self._call("link", gfn, level)

    def set_external_spte(self, gfn: int, level: int, pfn: int) -> Generator[Step, None, int]:
        return self._call("set", gfn, level)

    def remove_external_spte(self, gfn: int, level: int, pfn: int) -> Generator[Step, None, int]:
        return self._call("remove", gfn, level)

    def free_external_spt(
        self, gfn: int, level: int, external_spt: int
    ) -> Generator[Step, None, int]:
        return self._call("free", gfn, level)

    def _call(self, name: str, gfn: int, level: int) -> Generator[Step, None, int]:
        yield (name, gfn, level)
        self.calls.append((name, gfn, level))
        return self.errors.pop(0) if self.errors else 0


class ScriptedGuestMemory(NoGuestMemory):
    """guest_memfd with page `index` at PRIVATE_PFN + index. error: -errno of every lookup."""

    error = 0

    def get_pfn(self, gmem: int, index: int) -> int:
        return self.error or PRIVATE_PFN + index


class ScriptedUserMemory:
    """User memory with the page of `hva` at SHARED_PFN + its distance from HVA, in pages."""

    level = 3
    writable = True
    mapped = True

    def fault_in(self, hva: int, *, write: bool) -> HostPage | None:
        if not self.mapped:
            return None
        return HostPage(SHARED_PFN + (hva - HVA >> 12), self.writable, self.level)

    def mapping_level(self, hva: int) -> int:
        return self.level


class FaultScene:
    """A VM, one vCPU with its roots loaded, and what listens."""

    def __init__(
        self,
        vm_type: int = 0,
        *,
        params: MmuParams | None = None,
        free_pages: int = 1 << 12,
    ) -> None:
        self.journal = Journal()
        ram = Region(0, free_pages * PAGE_SIZE)
        memory = Memory(self.journal, Trace(self.journal), [ram])
        self.hooks = ScriptedHooks()
        is_td = vm_type == KVM_X86_TDX_VM
        config = VmConfig(vm_type, gfn_direct_bits=gfn_shared_bit(48) if is_td else 0)
        self.pages = HostPages(self.journal, [ram])
        self.vm = Vm(
            self.journal,
            memory,
            params or MmuParams(),
            config,
            pages=self.pages,
            external=self.hooks if is_td else None,
        )
        self.guest_memory = ScriptedGuestMemory()
        self.user_memory = ScriptedUserMemory()
        self.vm.guest_memory = self.guest_memory
        self.vm.user_memory = self.user_memory
        self.events: list[tuple[object, ...]] = []
        self.vm.listener = self.events.append
        self.vcpu = Vcpu(self.vm, 0)
        self.vm.vcpus = (self.vcpu,)
        self.load_error = run(kvm_mmu_load(self.vcpu))

    def add_slot(self, base_gfn: int, npages: int, flags: int = 0) -> Slot:
        """A slot whose gfn n has page n of both memories."""
        hva = HVA + (base_gfn << 12)
        number = len(self.vm.slots.all())
        slot = Slot(number, 0, base_gfn, npages, flags, hva, gmem=0, gmem_pgoff=base_gfn)
        self.put_slot(None, slot)
        return slot

    def put_slot(self, old: Slot | None, new: Slot | None) -> None:
        """Put `new` in the place of `old`, without any of what comes with it."""
        self.vm.slots.replace(old, new, 0)
        self.vm.slots.set_generation(self.vm.slots.next_generation(0))

    def set_private(self, start: int, end: int, private: bool = True) -> None:
        """Change attributes, without any of what comes with it."""
        self.vm.attributes.store(start, end, private=private)

    def shared_gpa(self, gfn: int) -> int:
        """GPA of a shared access, with the shared bit in a TD."""
        return gfn << 12 | self.vm.gfn_direct_bits << 12

    def spte(self, gpa: int) -> tuple[int, int]:
        """(level, SPTE) of the last entry on the way to `gpa`."""
        vm, gfn = self.vm, gpa >> 12
        in_mirror = vm.gfn_direct_bits and not gfn & vm.gfn_direct_bits
        root = vm.sps[self.vcpu.mirror_root_hpa if in_mirror else self.vcpu.root_hpa]
        gfn &= ~vm.gfn_direct_bits
        entries = [(it.level, it.old_spte) for it in for_each_tdp_pte(vm, root, gfn, gfn + 1)]
        return entries[-1]

    def said(self, name: str) -> list[tuple[object, ...]]:
        """Events of one name."""
        return [event for event in self.events if event[0] == name]


READ_CODE = PFERR_GUEST_FINAL_MASK
PRIVATE_CODE = PFERR_GUEST_FINAL_MASK | PFERR_PRIVATE_ACCESS | 2

WRITE_CODE = READ_CODE | PFERR_WRITE_MASK
#: A slot's first gfn, a gfn in it, and one without slot.
BASE, GFN, HOLE = 0x1000, 0x1005, 0x5000


def td_scene(private: bool = True) -> FaultScene:
    scene = FaultScene(KVM_X86_TDX_VM)
    scene.add_slot(BASE, 0x400, KVM_MEM_GUEST_MEMFD)
    scene.set_private(BASE, BASE + 0x400, private)
    return scene


def plain_scene(flags: int = 0, params: MmuParams | None = None) -> FaultScene:
    scene = FaultScene(params=params)
    scene.add_slot(BASE, 0x400, flags)
    return scene


def fault_in(scene: FaultScene, gpa: int, code: int = READ_CODE) -> tuple[int, int]:
    """(what the fault returned, its goal level)."""
    result: tuple[int, int] = run(kvm_mmu_do_page_fault(scene.vcpu, gpa, code))
    return result


def a_fault(scene: FaultScene, gfn: int, code: int = READ_CODE) -> PageFault:
    """A fault as `kvm_mmu_do_page_fault` fills it in. gfn: with the shared bit or without."""
    fault = PageFault(gfn << 12, code)
    fault.gfn = gfn & ~scene.vm.gfn_direct_bits
    fault.slot = scene.vm.slots.find(fault.gfn)
    return fault


def stop_at(operation: Operation, label: str) -> Operation:
    """The operation, driven up to the first step of that label."""
    while next(operation)[0] != label:
        pass
    return operation


def invalidate(scene: FaultScene, start: int, end: int) -> None:
    kvm_mmu_invalidate_begin(scene.vm)
    kvm_mmu_invalidate_range_add(scene.vm, start, end)
    kvm_mmu_invalidate_end(scene.vm)
