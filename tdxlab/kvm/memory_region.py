"""KVM_SET_USER_MEMORY_REGION2: create, delete, move a memslot, or change its flags.

A new set of slots replaces the old one, and whoever may still be using the old one is waited for.
A slot that is deleted or moved goes in two such steps: it is marked invalid first, so that faults
on it retry; then what it mapped is zapped; then it goes.

Source: Linux 6.16, virt/kvm/kvm_main.c; arch/x86/kvm/x86.c (kvm_arch_prepare_memory_region,
kvm_arch_commit_memory_region).
"""

from __future__ import annotations

from collections.abc import Generator
from errno import EEXIST, EINVAL

from tdxlab.arch import PAGE_OFFSET_MASK, PAGE_SHIFT, PAGE_SIZE
from tdxlab.kvm import dirty, lpage, parking, zap
from tdxlab.kvm.slots import (
    KVM_MEM_GUEST_MEMFD,
    KVM_MEM_LOG_DIRTY_PAGES,
    KVM_MEM_READONLY,
    KVM_MEMSLOT_INVALID,
    KVM_MR_CREATE,
    KVM_MR_DELETE,
    KVM_MR_FLAGS_ONLY,
    KVM_MR_MOVE,
    KVM_USER_MEM_SLOTS,
    MAX_NR_PAGES,
    Slot,
)
from tdxlab.kvm.spte import MMIO_GEN_MASK
from tdxlab.kvm.vm import Vm
from tdxlab.steps import WAIT, Step

Setting = Generator[Step, None, int]
Work = Generator[Step, None, None]

#: First address that no process has, on a CPU with 5-level paging. Source: TASK_SIZE_MAX.
USER_LIMIT = (1 << 56) - PAGE_SIZE
_U64 = 1 << 64


def kvm_vm_ioctl_set_memory_region(
    vm: Vm,
    slot: int,
    guest_phys_addr: int,
    memory_size: int,
    flags: int,
    userspace_addr: int,
    guest_memfd: int = -1,
    guest_memfd_offset: int = 0,
) -> Setting:
    """The ioctl, as user space calls it. slot: number, address space << 16. Addresses, sizes and
    offsets in bytes.

    Returns 0, or -EINVAL for, in order: a number that is not user space's; flags that the VM does
    not have, or not together; an address, size or offset that is no multiple of 4 KiB or runs
    over; then what `kvm_set_memory_region` returns.
    Source: kvm_main.c, kvm_vm_ioctl_set_memory_region and kvm_set_memory_region.
    """
    if slot & 0xFFFF >= KVM_USER_MEM_SLOTS or not are_flags_valid(vm, flags):
        return -EINVAL
    if (memory_size | guest_phys_addr | userspace_addr) & PAGE_OFFSET_MASK:
        return -EINVAL
    if flags & KVM_MEM_GUEST_MEMFD and guest_memfd_offset & PAGE_OFFSET_MASK:
        return -EINVAL
    return (
        yield from kvm_set_memory_region(
            vm,
            slot & 0xFFFF,
            guest_phys_addr >> PAGE_SHIFT,
            memory_size >> PAGE_SHIFT,
            flags,
            userspace_addr,
            gmem=guest_memfd,
            gmem_pgoff=guest_memfd_offset >> PAGE_SHIFT,
            as_id=slot >> 16,
        )
    )


def kvm_set_memory_region(
    vm: Vm,
    slot_id: int,
    base_gfn: int,
    npages: int,
    flags: int,
    userspace_addr: int,
    gmem: int = -1,
    gmem_pgoff: int = 0,
    as_id: int = 0,
) -> Setting:
    """Make the slot what the arguments say; npages 0 deletes it. base_gfn, npages, gmem_pgoff: in
    4 KiB. userspace_addr: bytes. gmem: guest_memfd file, used if `flags` say so. Takes slots_lock.

    Returns 0, also where nothing changes, or in order:
    -EINVAL  flags that the VM does not have, or not together; HVAs that are no process's; no such
             address space or number; gfns beyond 64 bits; more than MAX_NR_PAGES pages
    -EINVAL  deleting what is not there; changing a slot to guest_memfd; changing a slot's size,
             HVA, or whether it is read-only
    -EEXIST  another slot has some of the gfns
    -EBADF, -EINVAL  the guest_memfd cannot back the slot (gmem.py)
    -EINVAL  a gfn beyond the host's, or with the shared bit
    Differs: memory for all of this is always there (-ENOMEM in Linux).
    """
    yield from vm.slots_lock.lock()
    try:
        new = Slot(slot_id, as_id, base_gfn, npages, flags, userspace_addr)
        if flags & KVM_MEM_GUEST_MEMFD:
            new = new._replace(gmem=gmem, gmem_pgoff=gmem_pgoff)
        if not is_region_valid(vm, new):
            return -EINVAL
        return (yield from _set_region(vm, new))
    finally:
        vm.slots_lock.unlock()


def are_flags_valid(vm: Vm, flags: int) -> bool:
    """True if the VM has all these flags, and has them together.

    Private memory cannot be dirty-logged, nor read-only; where the host cannot emulate the guest's
    writes nothing can be read-only. Source: kvm_main.c, check_memory_region_flags.
    """
    valid = KVM_MEM_LOG_DIRTY_PAGES | KVM_MEM_READONLY
    if vm.features.has_protected_state:
        valid &= ~KVM_MEM_READONLY
    if vm.features.has_private_mem and flags & KVM_MEM_GUEST_MEMFD:
        valid = KVM_MEM_GUEST_MEMFD
    return not flags & ~valid


def is_region_valid(vm: Vm, new: Slot) -> bool:
    """True if the arguments could describe a slot of this VM, whatever slots there are."""
    size = new.npages << PAGE_SHIFT
    return (
        are_flags_valid(vm, new.flags)
        and not new.userspace_addr & PAGE_OFFSET_MASK
        and 0 <= new.userspace_addr <= USER_LIMIT - size
        and 0 <= (new.gmem_pgoff << PAGE_SHIFT) + size < _U64
        and 0 <= new.as_id < vm.slots.spaces
        and 0 <= new.slot_id < KVM_USER_MEM_SLOTS
        and 0 <= new.base_gfn << PAGE_SHIFT < _U64 - size
        and 0 <= new.npages <= MAX_NR_PAGES
    )


def _set_region(vm: Vm, new: Slot) -> Setting:
    """The second half of kvm_set_memory_region: which change is it, and may it be."""
    old = vm.slots.by_id(new.slot_id, new.as_id)
    if new.npages == 0:
        if old is None:
            return -EINVAL
        return (yield from kvm_set_memslot(vm, old, None, KVM_MR_DELETE))
    change = KVM_MR_CREATE if old is None else _change(old, new)
    if change is None or change < 0:
        return change or 0
    if change != KVM_MR_FLAGS_ONLY and _overlaps(vm, new):
        return -EEXIST
    if vm.parked and change != KVM_MR_FLAGS_ONLY:
        yield from parking.make_room(vm, new)
    if new.can_be_private:
        ret = yield from vm.guest_memory.bind(new)
        if ret:
            return ret
    ret = yield from kvm_set_memslot(vm, old, new, change)
    if ret and new.can_be_private:
        yield from vm.guest_memory.unbind(new)
    return ret


def _change(old: Slot, new: Slot) -> int | None:
    """KVM_MR_MOVE, KVM_MR_FLAGS_ONLY, -EINVAL, or None where nothing changes.

    A guest_memfd slot cannot be changed in any way. Linux 6.16 asks the new flags only, so that a
    change that leaves KVM_MEM_GUEST_MEMFD out passes; the slot then has shared memory alone.
    """
    if new.can_be_private or new.userspace_addr != old.userspace_addr or new.npages != old.npages:
        return -EINVAL
    if (new.flags ^ old.flags) & KVM_MEM_READONLY:
        return -EINVAL
    if new.base_gfn != old.base_gfn:
        return KVM_MR_MOVE
    return KVM_MR_FLAGS_ONLY if new.flags != old.flags else None


def _overlaps(vm: Vm, new: Slot) -> bool:
    """True if another slot of the address space has one of its gfns."""
    found = vm.slots.overlapping(new.base_gfn, new.end_gfn, new.as_id)
    return any(slot.slot_id != new.slot_id for slot in found)


# -- carrying a change out


def kvm_set_memslot(vm: Vm, old: Slot | None, new: Slot | None, change: int) -> Setting:
    """Replace `old` by `new`; None is no slot. slots_lock held. Returns 0 or -EINVAL.

    Where the new one is refused after the old one was marked invalid, the old one comes back; what
    it had mapped is gone all the same. Source: kvm_main.c, kvm_set_memslot.
    """
    if change in (KVM_MR_DELETE, KVM_MR_MOVE):
        assert old is not None
        yield from kvm_invalidate_memslot(vm, old)
    ret = kvm_arch_prepare_memory_region(vm, new, change)
    if ret:
        if change == KVM_MR_MOVE:
            yield from _activate(vm, old, old)
        return ret
    yield from _activate(vm, old, new)
    yield from kvm_commit_memory_region(vm, old, new, change)
    return 0


def kvm_invalidate_memslot(vm: Vm, old: Slot) -> Work:
    """From here on faults on the slot retry; then nothing maps its memory any more.

    Source: kvm_main.c, kvm_invalidate_memslot.
    """
    invalid = old._replace(flags=old.flags | KVM_MEMSLOT_INVALID)
    yield from _activate(vm, old, invalid)
    yield from zap.kvm_arch_flush_shadow_memslot(vm, old)


def _activate(vm: Vm, old: Slot | None, new: Slot | None) -> Work:
    """Put a set with `new` instead of `old` in place, wait for the readers of the former one, and
    give it its generation. MMU notifiers are let finish before, or their ends would find other
    slots than their starts. Source: kvm_main.c, kvm_swap_active_memslots.
    """
    slot = new or old
    assert slot is not None
    while vm.slots.mn_active_invalidate_count:
        yield (WAIT, "mn_active_invalidate_count")
    yield ("rcu_assign_pointer(memslots)", slot.as_id, slot.slot_id, new)
    vm.slots.replace(old, new, slot.as_id)
    yield from vm.srcu.synchronize()
    generation = vm.slots.next_generation(slot.as_id)
    yield from kvm_mmu_invalidate_mmio_sptes(vm, generation)
    vm.slots.set_generation(generation, slot.as_id)


def kvm_mmu_invalidate_mmio_sptes(vm: Vm, generation: int) -> Work:
    """MMIO SPTEs hold a few bits of the generation: when these start again at 0, old ones would
    look new, and everything is zapped. slots_lock held.

    Source: mmu.c, kvm_mmu_invalidate_mmio_sptes.
    """
    if not generation & MMIO_GEN_MASK & -vm.slots.spaces:
        yield from zap.kvm_mmu_zap_all_fast(vm)


def kvm_arch_prepare_memory_region(vm: Vm, new: Slot | None, change: int) -> int:
    """May there be a slot here; if so, note what large pages it has. Returns 0 or -EINVAL."""
    if change not in (KVM_MR_CREATE, KVM_MR_MOVE):
        return 0
    assert new is not None
    last = new.end_gfn - 1
    if last > vm.params.max_gfn or last & vm.gfn_direct_bits:
        return -EINVAL
    if vm.features.has_private_mem:
        lpage.kvm_mmu_init_memslot_memory_attributes(vm, new)
    return 0


def kvm_commit_memory_region(vm: Vm, old: Slot | None, new: Slot | None, change: int) -> Work:
    """The new set is in place: count pages, start or end dirty logging, free what `old` had.

    Source: kvm_main.c, kvm_commit_memory_region and kvm_free_memslot.
    """
    vm.slots.nr_pages += (new.npages if new else 0) - (old.npages if old else 0)
    yield from dirty.kvm_mmu_slot_apply_flags(vm, old, new, change)
    if old is None:
        assert new is not None
        yield from parking.unpark(vm, new)
        return
    if change in (KVM_MR_DELETE, KVM_MR_MOVE):
        lpage.free_lpage_info(vm, old)
    if change == KVM_MR_DELETE and old.can_be_private and old not in vm.parked:
        yield from vm.guest_memory.unbind(old)
