"""A VM whose shared memory is mapped by real faults, for tests of ageing, dirty logging, splits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fault_scene import READ_CODE, FaultScene

from tdxlab.kvm.dirty import kvm_mmu_slot_apply_flags
from tdxlab.kvm.fault import kvm_mmu_page_fault
from tdxlab.kvm.params import MmuParams
from tdxlab.kvm.slots import KVM_MEM_LOG_DIRTY_PAGES, KVM_MR_FLAGS_ONLY, Slot
from tdxlab.kvm.spte import is_present_leaf
from tdxlab.kvm.tdp_iter import for_each_tdp_pte
from tdxlab.steps import run

WRITE_CODE = READ_CODE | 2
#: 4 KiB leaf of an ordinary VM: writable, accessed, dirty. Without address.
LEAF = 0x8600_0000_0000_0B77
#: The same for 2 MiB.
LARGE_LEAF = 0x8600_0000_0000_0BF7
ADDRESS = 0x000F_FFFF_FFFF_F000


class LoggingScene(FaultScene):
    """A VM with one slot of 2 * 2 MiB from gfn 0 on. config: fields of VmConfig."""

    def __init__(
        self,
        *,
        vm_type: int = 0,
        params: MmuParams | None = None,
        npages: int = 0x400,
        free_pages: int = 1 << 12,
        **config: Any,
    ) -> None:
        super().__init__(vm_type, params=params, free_pages=free_pages)
        self.vm.config = replace(self.vm.config, **config)
        self.slot = self.add_slot(0, npages)
        self.user_memory.level = 1

    def touch(self, *gfns: int, level: int = 1, write: bool = True) -> None:
        """Let the guest access `gfns` where the host has pages of `level`; forgets the events."""
        self.user_memory.level = level
        code = WRITE_CODE if write else READ_CODE
        for gfn in gfns:
            run(kvm_mmu_page_fault(self.vcpu, self.shared_gpa(gfn), code))
        self.events.clear()

    def leaves(self) -> dict[int, int]:
        """gfn -> SPTE without address of every present leaf in the direct root."""
        root = self.vm.sps[self.vcpu.root_hpa]
        walk = for_each_tdp_pte(self.vm, root, 0, self.slot.end_gfn)
        return {
            it.gfn: it.old_spte & ~ADDRESS for it in walk if is_present_leaf(it.old_spte, it.level)
        }

    def set_spte(self, gfn: int, change: int) -> None:
        """Flip the bits `change` in the last entry on the way to `gfn`, as the CPU does."""
        words = self.vm.memory.words
        root = self.vm.sps[self.vcpu.root_hpa]
        word = [it.word for it in for_each_tdp_pte(self.vm, root, gfn, gfn + 1)][-1]
        words.put(word, words.view[word] ^ change)

    def log(self, on: bool) -> None:
        """Switch dirty logging of the slot on or off."""
        old, flag = self.slot, KVM_MEM_LOG_DIRTY_PAGES
        self.slot = old._replace(flags=old.flags | flag if on else old.flags & ~flag)
        self.put_slot(old, self.slot)
        run(kvm_mmu_slot_apply_flags(self.vm, old, self.slot, KVM_MR_FLAGS_ONLY))

    def changes(self) -> list[tuple[int, int, int, int]]:
        """(level, gfn, old, new) of the SPTE changes so far, addresses left out."""
        return [
            (level, gfn, old & ~ADDRESS, new & ~ADDRESS)
            for _, _, level, gfn, old, new in self.said("spte_changed")
        ]

    def flushes(self) -> list[tuple[object, ...]]:
        """The TLB flushes so far."""
        return self.said("kvm_flush_remote_tlbs_range") + self.said("kvm_flush_remote_tlbs")


def slot_of(slot_id: int = 0, npages: int = 0x400, *, log: bool = True, as_id: int = 0) -> Slot:
    """A slot by itself."""
    return Slot(slot_id, as_id, 0x1000, npages, int(log), 0)
