"""The operations of a trace that make, change and look up mappings: slots, attributes, faults.

Each is one function (rig, args, out) -> ret. What a trace records besides `ret` goes into `out`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tdxlab.arch import PAGE_SHIFT, PAGE_SIZE
from tdxlab.kvm import (
    fault,
    lpage,
    memory_region,
    mmio_fault,
    notifier,
    roots,
    set_attributes,
    slots,
    tdp_mmu,
)
from tdxlab.kvm.attributes import KVM_MEMORY_ATTRIBUTE_PRIVATE
from tdxlab.kvm.page_fault import (
    PFERR_FETCH_MASK,
    PFERR_GUEST_FINAL_MASK,
    PFERR_PRESENT_MASK,
    PFERR_PRIVATE_ACCESS,
    PFERR_USER_MASK,
    PFERR_WRITE_MASK,
    RET_PF_NAMES,
    PageFault,
)
from tdxlab.kvm.vm import INVALID_PAGE, Vcpu
from tdxlab.mmu_conformance.decode import Args
from tdxlab.mmu_conformance.record import split_spte
from tdxlab.mmu_conformance.rig import Rig, finish, host_level_of, hva_of_slot

Out = dict[str, Any]
Op = Callable[[Rig, Args, Out], Any]

_NO_SLOT = "no slot"


def pf_name(ret: int) -> int | str:
    """A fault's result as traces write it: the name of a RET_PF_*, or -errno."""
    return RET_PF_NAMES.get(ret, ret)


def address(rig: Rig, args: Args) -> int:
    """The GPA that an operation is for, from `gpa` or `gfn`; `shared` adds the shared bit."""
    gpa = args.number("gpa") if "gpa" in args else args.number("gfn") << PAGE_SHIFT
    return gpa | rig.vm.gfn_direct_bits << PAGE_SHIFT if args.flag("shared") else gpa


def reload(rig: Rig, args: Args) -> Vcpu:
    """The operation's vCPU, with roots that are not obsolete."""
    vcpu = rig.vcpu(args)
    finish(roots.kvm_mmu_reload(vcpu))
    return vcpu


# -- slots and attributes


def do_slot(rig: Rig, args: Args, out: Out) -> int:
    """KVM_SET_USER_MEMORY_REGION2; npages 0 deletes."""
    vm, slot_id = rig.vm, args.number("id")
    hva = hva_of_slot(slot_id, args.number("hl", 1), args.number("hoff", 0))
    ret: int = finish(
        memory_region.kvm_set_memory_region(
            vm,
            slot_id,
            args.number("base", 0),
            args.number("npages"),
            args.number("flags", 0),
            hva,
            gmem=slot_id if args.number("flags", 0) & slots.KVM_MEM_GUEST_MEMFD else -1,
            gmem_pgoff=args.number("gmoff", 0),
        )
    )
    slot = vm.slots.by_id(slot_id)
    if slot is not None:
        out["slot"] = {
            "id": slot.slot_id,
            "as_id": slot.as_id,
            "base_gfn": slot.base_gfn,
            "npages": slot.npages,
            "flags": slot.flags,
            "hva": slot.userspace_addr,
            "host_level": host_level_of(slot.userspace_addr),
            "generation": vm.slots.generation,
        }
    return ret


def do_attr(rig: Rig, args: Args, out: Out) -> int:
    """KVM_SET_MEMORY_ATTRIBUTES."""
    start, end = args.number("start") << PAGE_SHIFT, args.number("end") << PAGE_SHIFT
    attributes = KVM_MEMORY_ATTRIBUTE_PRIVATE if args.flag("private") else 0
    ret: int = finish(
        set_attributes.kvm_vm_ioctl_set_mem_attributes(rig.vm, start, end - start, attributes)
    )
    return ret


def do_notifier(rig: Rig, args: Args, out: Out) -> int:
    """One MMU notifier: 0, 1 an invalidation starts, ends; 2 to 4 clear and flush, clear, test the
    accessed bits.
    """
    what, start, end = args.number("what"), args.number("hs"), args.number("he")
    calls = (
        notifier.kvm_mmu_notifier_invalidate_range_start,
        notifier.kvm_mmu_notifier_invalidate_range_end,
        notifier.kvm_mmu_notifier_clear_flush_young,
        notifier.kvm_mmu_notifier_clear_young,
        notifier.kvm_mmu_notifier_test_young,
    )
    return int(finish(calls[what](rig.vm, start, end)) or 0)


def do_max_mapping_level(rig: Rig, args: Args, out: Out) -> int | str:
    """The greatest level at which a gfn may be mapped."""
    slot = rig.vm.slots.by_id(args.number("slot", 0))
    if slot is None:
        return _NO_SLOT
    level: int = lpage.kvm_mmu_max_mapping_level(rig.vm, slot, args.number("gfn"))
    return level


def do_gen(rig: Rig, args: Args, out: Out) -> None:
    """Set the generation of the memslots by hand."""
    rig.vm.slots.set_generation(args.number("gen"))


# -- faults


def _error_code(args: Args) -> int:
    bits = (
        ("present", PFERR_PRESENT_MASK),
        ("write", PFERR_WRITE_MASK),
        ("user", PFERR_USER_MASK),
        ("fetch", PFERR_FETCH_MASK),
        ("private", PFERR_PRIVATE_ACCESS),
    )
    return PFERR_GUEST_FINAL_MASK | sum(bit for name, bit in bits if args.flag(name))


def do_fault(rig: Rig, args: Args, out: Out) -> int | str:
    """A page fault of a vCPU that has just been about to enter the guest."""
    return _fault(rig, args, out, reload(rig, args))


def do_fault_noreload(rig: Rig, args: Args, out: Out) -> int | str:
    """A page fault of a vCPU that still has the root it had, obsolete or not."""
    vcpu = rig.vcpu(args)
    if vcpu.root_hpa == INVALID_PAGE:
        finish(roots.kvm_mmu_load(vcpu))
    return _fault(rig, args, out, vcpu)


def _fault(rig: Rig, args: Args, out: Out, vcpu: Vcpu) -> int | str:
    gpa, error_code = address(rig, args), _error_code(args)
    ret, level = finish(
        fault.kvm_mmu_do_page_fault(vcpu, gpa, error_code, prefetch=args.flag("prefetch"))
    )
    out.update(gpa=gpa, error_code=error_code, goal_level=level)
    return pf_name(ret)


def do_map_page(rig: Rig, args: Args, out: Out) -> int:
    """kvm_tdp_map_page."""
    vcpu = reload(rig, args)
    ret, level = finish(fault.kvm_tdp_map_page(vcpu, address(rig, args), _error_code(args)))
    out["level"] = level
    return int(ret)


def do_pre_fault(rig: Rig, args: Args, out: Out) -> int:
    """KVM_PRE_FAULT_MEMORY, one round."""
    vcpu, size = rig.vcpu(args), args.number("size", PAGE_SIZE)
    ret: int = finish(fault.kvm_arch_vcpu_pre_fault_memory(vcpu, args.number("gpa"), size))
    return ret


def do_tdp_map(rig: Rig, args: Args, out: Out) -> int | str:
    """kvm_tdp_mmu_map of a fault that is made by hand."""
    vcpu, gpa = reload(rig, args), address(rig, args)
    access = {
        "exec": PFERR_FETCH_MASK,
        "write": PFERR_WRITE_MASK,
        "private": PFERR_PRIVATE_ACCESS,
    }
    error_code = sum(bit for name, bit in access.items() if args.flag(name))
    made = PageFault(gpa, error_code, args.flag("prefetch"))
    made.gfn = gpa >> PAGE_SHIFT & ~rig.vm.gfn_direct_bits
    made.max_level, made.pfn = args.number("max_level", 3), args.number("pfn")
    made.map_writable = args.flag("writable", 1)
    made.slot = rig.vm.slots.find(made.gfn)
    made.nx_huge_page_workaround_enabled = rig.vm.params.nx_huge_pages
    ret = finish(tdp_mmu.kvm_tdp_mmu_map(vcpu, made))
    out.update(
        goal_level=made.goal_level,
        req_level=made.req_level,
        max_level=made.max_level,
        pfn=made.pfn,
        huge_page_disallowed=int(made.huge_page_disallowed),
    )
    return pf_name(ret)


def do_mmio_pf(rig: Rig, args: Args, out: Out) -> int | str:
    """handle_mmio_page_fault."""
    vcpu = reload(rig, args)
    return pf_name(mmio_fault.handle_mmio_page_fault(vcpu, args.number("gpa")))


# -- lookups


def do_is_mapped(rig: Rig, args: Args, out: Out) -> bool:
    """kvm_tdp_mmu_gpa_is_mapped."""
    vcpu = reload(rig, args)
    return tdp_mmu.kvm_tdp_mmu_gpa_is_mapped(vcpu, address(rig, args))


def do_get_walk(rig: Rig, args: Args, out: Out) -> int:
    """The direct root's entries on the way to an address; what the walk did not reach reads 0."""
    vcpu = reload(rig, args)
    root = rig.vm.sps[vcpu.root_hpa]
    found = tdp_mmu.kvm_tdp_mmu_get_walk(vcpu, address(rig, args), root)
    leaf = min(found, default=-1)
    levels = range(root.level, max(leaf, 1) - 1, -1)
    out["root_level"] = root.level
    out["walk"] = tuple((level, *split_spte(found.get(level, 0), level)) for level in levels)
    return leaf


def do_reload(rig: Rig, args: Args, out: Out) -> int:
    """kvm_mmu_reload."""
    ret: int = finish(roots.kvm_mmu_reload(rig.vcpu(args)))
    return ret


def do_unload(rig: Rig, args: Args, out: Out) -> None:
    """kvm_mmu_unload."""
    roots.kvm_mmu_unload(rig.vcpu(args))


def do_rcu(rig: Rig, args: Args, out: Out) -> None:
    """A grace period ends, as it does after each operation."""
    rig.vm.rcu_barrier()


OPS: dict[str, Op] = {
    "slot": do_slot,
    "attr": do_attr,
    "notifier": do_notifier,
    "max_mapping_level": do_max_mapping_level,
    "gen": do_gen,
    "fault": do_fault,
    "fault_noreload": do_fault_noreload,
    "map_page": do_map_page,
    "pre_fault": do_pre_fault,
    "tdp_map": do_tdp_map,
    "mmio_pf": do_mmio_pf,
    "is_mapped": do_is_mapped,
    "get_walk": do_get_walk,
    "reload": do_reload,
    "unload": do_unload,
    "rcu": do_rcu,
}
