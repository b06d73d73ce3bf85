"""Why KVM refuses an ioctl, in words.

KVM answers a mistake with an errno and nothing else. User space that knows its arguments can say
which of the reasons it was; these functions ask in KVM's order.
"""

from __future__ import annotations

import errno

from tdxlab.arch import PAGE_SHIFT, PAGE_SIZE
from tdxlab.kvm.memory_region import USER_LIMIT, are_flags_valid
from tdxlab.kvm.params import VM_TYPE_NAMES
from tdxlab.kvm.slots import KVM_MEM_GUEST_MEMFD, KVM_USER_MEM_SLOTS, MAX_NR_PAGES
from tdxlab.kvm.vm import Vm


class IoctlError(OSError, ValueError):
    """An ioctl that KVM refused. errno: as the real one gives it; the text says why and what to
    do.
    """

    def __init__(self, ioctl: str, error: int, why: str) -> None:
        super().__init__(error, f"{ioctl}: {errno.errorcode.get(error, error)}: {why}")
        self.ioctl = ioctl

    def __str__(self) -> str:
        return str(self.strerror)


def why_dead(vm: Vm) -> str:
    """Why no ioctl works on a VM any more."""
    reason = vm.vm_bugged or "its guest used private memory before accepting it"
    return f"{vm.name} is dead ({reason}); all that is left is to destroy it"


def _not_pages(name: str, value: int) -> str:
    nearest = value & -PAGE_SIZE
    return f"{name} {value:#x} is not a multiple of {PAGE_SIZE:#x}; did you mean {nearest:#x}?"


def why_region(
    vm: Vm,
    slot: int,
    gpa: int,
    size: int,
    flags: int,
    hva: int,
    gmem: int,
    gmem_offset: int,
) -> str:
    """Why KVM_SET_USER_MEMORY_REGION2 refused these arguments."""
    if not 0 <= slot & 0xFFFF < KVM_USER_MEM_SLOTS:
        return f"slot {slot & 0xFFFF}; allowed are 0..{KVM_USER_MEM_SLOTS - 1}"
    if not are_flags_valid(vm, flags):
        kind = VM_TYPE_NAMES[vm.config.vm_type]
        return f"a VM of type {kind} has no slots with flags {flags:#x}"
    values = {"GPA": gpa, "size": size, "HVA": hva, "offset in the guest_memfd": gmem_offset}
    for name, value in values.items():
        if value % PAGE_SIZE:
            return _not_pages(name, value)
    if not 0 <= slot >> 16 < vm.slots.spaces:
        return f"slot {slot:#x} is in address space {slot >> 16}; this VM has {vm.slots.spaces}"
    if not 0 <= size >> PAGE_SHIFT <= MAX_NR_PAGES:
        return f"{size:#x} bytes; a slot has at most {MAX_NR_PAGES << PAGE_SHIFT:#x}, use several"
    found = vm.slots.by_id(slot & 0xFFFF, slot >> 16)
    if not size:
        return f"there is no slot {slot} to delete"
    if found is not None and (found.can_be_private or found.npages != size >> PAGE_SHIFT):
        return f"slot {slot} exists; it can only be deleted (size 0) and created again"
    if hva < 0 or hva + size > USER_LIMIT:
        return f"HVAs from {hva:#x} on are not all from 0 to {USER_LIMIT:#x}, where processes end"
    return _why_range(vm, slot, gpa, size, flags, gmem, gmem_offset)


def _why_range(
    vm: Vm, slot: int, gpa: int, size: int, flags: int, gmem: int, gmem_offset: int
) -> str:
    """The reasons that lie in the place of the slot."""
    start, end = gpa >> PAGE_SHIFT, gpa + size >> PAGE_SHIFT
    for other in vm.slots.overlapping(start, end, slot >> 16):
        if other.slot_id != slot & 0xFFFF:
            first, behind = other.base_gfn << PAGE_SHIFT, other.end_gfn << PAGE_SHIFT
            return (
                f"GPAs {gpa:#x}..{gpa + size - 1:#x} overlap slot {other.slot_id}, "
                f"which has {first:#x}..{behind - 1:#x}; choose others or delete that slot"
            )
    limit = min(vm.params.max_gfn + 1, vm.gfn_direct_bits or vm.params.max_gfn + 1) << PAGE_SHIFT
    if gpa < 0 or gpa + size > limit:
        return (
            f"GPAs {gpa:#x}..{gpa + size - 1:#x} are not all in this VM's address space; "
            f"allowed are 0..{limit - 1:#x} (without the SHARED bit)"
        )
    if flags & KVM_MEM_GUEST_MEMFD:
        return (
            f"{size:#x} bytes at offset {gmem_offset:#x} of guest_memfd {gmem} cannot back the "
            "slot: there is no such file, it is too small, or another slot has that part"
        )
    return f"slot {slot} cannot become that; delete it (size 0) and create it again"


def why_attributes(vm: Vm, gpa: int, size: int) -> str:
    """Why KVM_SET_MEMORY_ATTRIBUTES refused."""
    if not vm.features.has_private_mem:
        return f"a VM of type {VM_TYPE_NAMES[vm.config.vm_type]} has no private memory"
    for name, value in {"GPA": gpa, "size": size}.items():
        if value % PAGE_SIZE:
            return _not_pages(name, value)
    return f"{size:#x} bytes at GPA {gpa:#x}: give at least a page, from 0 on and below 2^64"


def why_punch(gmem: int, offset: int, size: int) -> str:
    """Why fallocate(FALLOC_FL_PUNCH_HOLE) refused."""
    for name, value in {"offset": offset, "size": size}.items():
        if value % PAGE_SIZE:
            return _not_pages(name, value)
    return f"{size:#x} bytes at offset {offset:#x} of guest_memfd {gmem}: give at least a page"
