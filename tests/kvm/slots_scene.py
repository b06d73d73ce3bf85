"""A VM with guest_memfd files and process memory of its own, and slots made by the ioctl."""

from fault_scene import HVA, PRIVATE_CODE, READ_CODE, FaultScene

from tdxlab.kvm.fault import kvm_mmu_page_fault
from tdxlab.kvm.gmem import GuestMemfds
from tdxlab.kvm.memory_region import kvm_set_memory_region
from tdxlab.kvm.slots import KVM_MEM_GUEST_MEMFD
from tdxlab.kvm.spte import SPTE_MMU_PRESENT_MASK, is_last_spte
from tdxlab.kvm.user_memory import ProcessMemory
from tdxlab.steps import run

WRITE_CODE = READ_CODE | 2


class SlotScene(FaultScene):
    """gmem: a file of 1024 pages, where the VM can have one."""

    def __init__(self, vm_type=0, *, free_pages=1 << 13):
        super().__init__(vm_type, free_pages=free_pages)
        self.files = GuestMemfds(self.vm)
        self.process = ProcessMemory(self.vm, self.pages)
        self.vm.guest_memory = self.files
        self.vm.user_memory = self.process
        self.gmem = self.files.create(1024 << 12)

    def set(self, slot_id, base_gfn, npages, flags=0, hva=None, **others):
        """The ioctl; HVAs follow from the gfns unless they are given."""
        hva = HVA + (base_gfn << 12) if hva is None else hva
        if flags & KVM_MEM_GUEST_MEMFD:
            others.setdefault("gmem", self.gmem)
            others.setdefault("gmem_pgoff", base_gfn % 1024)
        return run(kvm_set_memory_region(self.vm, slot_id, base_gfn, npages, flags, hva, **others))

    def delete(self, slot_id, **others):
        return self.set(slot_id, 0, 0, **others)

    def access(self, gfn, *, private=False):
        """A guest's write; what the fault returns."""
        if private:
            return run(kvm_mmu_page_fault(self.vcpu, gfn << 12, PRIVATE_CODE))
        return run(kvm_mmu_page_fault(self.vcpu, self.shared_gpa(gfn), WRITE_CODE))

    def level(self, gfn, *, private=False):
        """Level of the leaf that maps the gfn; 0 without one."""
        level, spte = self.spte(gfn << 12 if private else self.shared_gpa(gfn))
        present = spte & SPTE_MMU_PRESENT_MASK and is_last_spte(spte, level)
        return level if present else 0

    def digest(self):
        return self.journal.digest()
