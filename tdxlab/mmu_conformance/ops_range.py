"""The operations of a trace that work on ranges of gfns: zapping, ageing, dirty logging, teardown.

See `ops` for their form.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

from tdxlab.kvm import ageing, dirty, roots, split, zap
from tdxlab.kvm.slots import Slot
from tdxlab.kvm.spte import is_last_spte, is_shadow_present_pte
from tdxlab.kvm.tdp_iter import TdpIter, for_each_tdp_pte_min_level
from tdxlab.kvm.zap import GfnRange
from tdxlab.mmu_conformance.decode import Args
from tdxlab.mmu_conformance.ops import Op, Out
from tdxlab.mmu_conformance.rig import Rig, finish

_NO_SLOT = "no slot"
_RECOVERY_RATIO = 60


def _slot(rig: Rig, args: Args) -> Slot | None:
    found: Slot | None = rig.vm.slots.by_id(args.number("slot", 0))
    return found


def _range(slot: Slot, args: Args) -> GfnRange:
    return GfnRange(
        slot,
        args.number("start"),
        args.number("end"),
        args.number("filter", 1),
        args.flag("may_block", 1),
        False,
    )


# -- zapping


def do_unmap(rig: Rig, args: Args, out: Out) -> bool | str:
    """kvm_tdp_mmu_unmap_gfn_range, or kvm_unmap_gfn_range with `kvm`."""
    slot = _slot(rig, args)
    if slot is None:
        return _NO_SLOT
    what = _range(slot, args)
    if args.flag("kvm"):
        return bool(finish(zap.kvm_unmap_gfn_range(rig.vm, what)))
    return bool(finish(zap.kvm_tdp_mmu_unmap_gfn_range(rig.vm, what, args.flag("flush"))))


def do_zap_leafs(rig: Rig, args: Args, out: Out) -> bool:
    """kvm_tdp_mmu_zap_leafs."""
    start, end, flush = args.number("start"), args.number("end"), args.flag("flush")
    return bool(finish(zap.kvm_tdp_mmu_zap_leafs(rig.vm, start, end, flush)))


def do_zap_gfn_range(rig: Rig, args: Args, out: Out) -> None:
    """kvm_zap_gfn_range."""
    finish(zap.kvm_zap_gfn_range(rig.vm, args.number("start"), args.number("end")))


def do_zap_sp(rig: Rig, args: Args, out: Out) -> bool | str:
    """kvm_tdp_mmu_zap_sp of the table below the entry at `level`."""
    vm, root = rig.vm, rig.root(args.text("root"))
    if root is None:
        return "no root"
    gfn, level = args.number("gfn"), args.number("level")
    last: TdpIter | None = None
    for last in for_each_tdp_pte_min_level(vm, root, level, gfn, gfn + 1):
        if last.level == level:
            break
    if (
        last is None
        or last.level != level
        or not is_shadow_present_pte(last.old_spte)
        or is_last_spte(last.old_spte, level)
    ):
        return "not a table"
    return bool(finish(zap.kvm_tdp_mmu_zap_sp(vm, vm.sp_of(last.old_spte))))


def do_zap_invalidated(rig: Rig, args: Args, out: Out) -> None:
    """kvm_tdp_mmu_zap_invalidated_roots."""
    finish(zap.kvm_tdp_mmu_zap_invalidated_roots(rig.vm, args.flag("shared", 1)))


def do_invalidate_roots(rig: Rig, args: Args, out: Out) -> None:
    """kvm_tdp_mmu_invalidate_roots."""
    roots.kvm_tdp_mmu_invalidate_roots(rig.vm, args.number("types"))


def do_recover_nx(rig: Rig, args: Args, out: Out) -> None:
    """kvm_recover_nx_huge_pages."""
    finish(zap.kvm_recover_nx_huge_pages(rig.vm, _RECOVERY_RATIO))


def do_destroy_vcpu(rig: Rig, args: Args, out: Out) -> None:
    """kvm_mmu_destroy."""
    roots.kvm_mmu_destroy(rig.vcpu(args))


def _whole(call: Callable[..., Generator[Any, None, Any]]) -> Op:
    """The operation that calls `call` for the VM, and returns nothing."""

    def do(rig: Rig, args: Args, out: Out) -> None:
        finish(call(rig.vm))

    return do


# -- ageing


def do_age(rig: Rig, args: Args, out: Out) -> bool | str:
    """kvm_tdp_mmu_age_gfn_range."""
    slot = _slot(rig, args)
    if slot is None:
        return _NO_SLOT
    return bool(finish(ageing.kvm_tdp_mmu_age_gfn_range(rig.vm, _range(slot, args))))


def do_test_age(rig: Rig, args: Args, out: Out) -> bool | str:
    """kvm_tdp_mmu_test_age_gfn."""
    slot = _slot(rig, args)
    if slot is None:
        return _NO_SLOT
    return bool(finish(ageing.kvm_tdp_mmu_test_age_gfn(rig.vm, _range(slot, args))))


# -- dirty logging


def do_wrprot_slot(rig: Rig, args: Args, out: Out) -> bool | str:
    """kvm_tdp_mmu_wrprot_slot."""
    slot = _slot(rig, args)
    if slot is None:
        return _NO_SLOT
    return bool(finish(dirty.kvm_tdp_mmu_wrprot_slot(rig.vm, slot, args.number("min_level", 1))))


def do_clear_dirty_slot(rig: Rig, args: Args, out: Out) -> str | None:
    """kvm_tdp_mmu_clear_dirty_slot."""
    slot = _slot(rig, args)
    if slot is None:
        return _NO_SLOT
    finish(dirty.kvm_tdp_mmu_clear_dirty_slot(rig.vm, slot))
    return None


def do_clear_dirty_pt_masked(rig: Rig, args: Args, out: Out) -> str | None:
    """kvm_tdp_mmu_clear_dirty_pt_masked."""
    slot = _slot(rig, args)
    if slot is None:
        return _NO_SLOT
    gfn, mask, wrprot = args.number("gfn"), args.number("mask"), args.flag("wrprot")
    finish(dirty.kvm_tdp_mmu_clear_dirty_pt_masked(rig.vm, slot, gfn, mask, wrprot))
    return None


def do_log_dirty_pt_masked(rig: Rig, args: Args, out: Out) -> str | None:
    """kvm_arch_mmu_enable_log_dirty_pt_masked."""
    slot = _slot(rig, args)
    if slot is None:
        return _NO_SLOT
    offset, mask = args.number("offset"), args.number("mask")
    finish(dirty.kvm_arch_mmu_enable_log_dirty_pt_masked(rig.vm, slot, offset, mask))
    return None


def do_write_protect_gfn(rig: Rig, args: Args, out: Out) -> bool | str:
    """kvm_tdp_mmu_write_protect_gfn."""
    slot = _slot(rig, args)
    if slot is None:
        return _NO_SLOT
    gfn, min_level = args.number("gfn"), args.number("min_level", 1)
    return bool(finish(dirty.kvm_tdp_mmu_write_protect_gfn(rig.vm, slot, gfn, min_level)))


def do_split(rig: Rig, args: Args, out: Out) -> str | None:
    """kvm_tdp_mmu_try_split_huge_pages."""
    slot = _slot(rig, args)
    if slot is None:
        return _NO_SLOT
    start, end, target = args.number("start"), args.number("end"), args.number("target", 1)
    shared = args.flag("shared", 1)
    finish(split.kvm_tdp_mmu_try_split_huge_pages(rig.vm, slot, start, end, target, shared=shared))
    return None


def do_recover(rig: Rig, args: Args, out: Out) -> str | None:
    """kvm_tdp_mmu_recover_huge_pages."""
    slot = _slot(rig, args)
    if slot is None:
        return _NO_SLOT
    finish(split.kvm_tdp_mmu_recover_huge_pages(rig.vm, slot))
    return None


def do_dirty_bits(rig: Rig, args: Args, out: Out) -> str | None:
    """Look at a slot's dirty bitmap."""
    slot = _slot(rig, args)
    if slot is None:
        return _NO_SLOT
    out["dirty"] = tuple(rig.vm.dirty.bits(slot))
    return None


OPS: dict[str, Op] = {
    "unmap": do_unmap,
    "zap_leafs": do_zap_leafs,
    "zap_gfn_range": do_zap_gfn_range,
    "zap_sp": do_zap_sp,
    "zap_all": _whole(zap.kvm_tdp_mmu_zap_all),
    "zap_all_fast": _whole(zap.kvm_mmu_zap_all_fast),
    "zap_invalidated": do_zap_invalidated,
    "invalidate_roots": do_invalidate_roots,
    "recover_nx": do_recover_nx,
    "flush_shadow_all": _whole(zap.kvm_mmu_zap_all),
    "destroy_vcpu": do_destroy_vcpu,
    "uninit_vm": _whole(zap.kvm_mmu_uninit_tdp_mmu),
    "age": do_age,
    "test_age": do_test_age,
    "wrprot_slot": do_wrprot_slot,
    "clear_dirty_slot": do_clear_dirty_slot,
    "clear_dirty_pt_masked": do_clear_dirty_pt_masked,
    "log_dirty_pt_masked": do_log_dirty_pt_masked,
    "write_protect_gfn": do_write_protect_gfn,
    "split": do_split,
    "recover": do_recover,
    "dirty_bits": do_dirty_bits,
}
