"""The operations of a trace that look at single SPTEs or set them by hand, and the bare walk.

See `ops` for their form.
"""

from __future__ import annotations

from collections.abc import Callable

from tdxlab.kvm import spte as sptes
from tdxlab.kvm.dirty_log import mark_page_dirty_in_slot
from tdxlab.kvm.role import Role
from tdxlab.kvm.spte import FROZEN_SPTE, SPTE_MMU_PRESENT_MASK
from tdxlab.kvm.tdp_iter import (
    TdpIter,
    gfn_root_bits,
    tdp_mmu_max_gfn_exclusive,
)
from tdxlab.mmu_conformance.decode import Args
from tdxlab.mmu_conformance.ops import Op, Out, reload
from tdxlab.mmu_conformance.record import split_spte
from tdxlab.mmu_conformance.rig import Rig

_NO_ROOT = "no root"
_VISITS_LOGGED = 4000


# -- one entry, by hand


def _touch(change: Callable[[int, Args], int] | None) -> Op:
    """The operation that goes to an entry, shows it, and stores what `change` makes of it. Nobody
    is told, and nothing is counted. Where the walk ends above `level` it shows the last entry and
    returns the level of where it would have gone on.
    """

    def do(rig: Rig, args: Args, out: Out) -> int | str:
        vm, root = rig.vm, rig.root(args.text("root"))
        if root is None:
            return _NO_ROOT
        gfn, level = args.number("gfn"), args.number("level")
        it = TdpIter(vm, root, level, gfn, gfn_root_bits(vm, root))
        word = -1
        for _ in it.walk(gfn + 1):
            word = it.word
            if it.level == level:
                break
        reached = it.level if word >= 0 else -1
        if word < 0 or (change and reached != level):
            return reached
        words = vm.memory.words
        out["old"] = out["new"] = split_spte(words.view[word], reached)
        if change:
            words.put(word, change(words.view[word], args))
            out["new"] = split_spte(words.view[word], reached)
        return reached

    return do


# -- how SPTEs are made


def do_make_spte(rig: Rig, args: Args, out: Out) -> int | str:
    """make_spte."""
    vm = rig.vm
    slot = vm.slots.by_id(args.number("slot", 0))
    if slot is None:
        return "no slot"
    vcpu = reload(rig, args)
    given = {name: args.number(name) for name in ("guest_mode", "ad_disabled") if name in args}
    level, gfn = args.number("level"), args.number("gfn")
    made = sptes.make_spte(
        vm,
        role=int(Role(vcpu.root_role).with_(level=level, **given)),
        access=args.number("access"),
        pfn=args.number("pfn"),
        prefetch=args.flag("prefetch"),
        host_writable=args.flag("hw"),
    )
    if made & sptes.PT_WRITABLE_MASK and slot.is_dirty_tracked:
        mark_page_dirty_in_slot(vm, slot, gfn)
    out["wrprot"] = 0
    return made


def do_make_mmio(rig: Rig, args: Args, out: Out) -> int:
    """make_mmio_spte."""
    return sptes.make_mmio_spte(rig.vm, args.number("gfn"), rig.vm.slots.generation)


def do_make_nonleaf(rig: Rig, args: Args, out: Out) -> int:
    """make_nonleaf_spte, without the address."""
    return sptes.make_nonleaf_spte(rig.vm, 0, ad_disabled=args.flag("ad_disabled"))


def do_make_small(rig: Rig, args: Args, out: Out) -> int:
    """make_small_spte; `level` is the child's."""
    role = Role(rig.vm.vcpus[0].root_role).with_(level=args.number("level"))
    return sptes.make_small_spte(rig.vm, args.number("huge"), int(role), args.number("index"))


def do_make_huge(rig: Rig, args: Args, out: Out) -> int:
    """make_huge_spte."""
    return sptes.make_huge_spte(rig.vm, args.number("small"), args.number("level"))


def do_acc_track(rig: Rig, args: Args, out: Out) -> int:
    """mark_spte_for_access_track, and back."""
    tracked = sptes.mark_spte_for_access_track(args.number("spte"))
    out["is_access_track"] = int(sptes.is_access_track_spte(tracked))
    if sptes.is_access_track_spte(tracked):
        out["restored"] = sptes.restore_acc_track_spte(tracked)
    return tracked


def do_spte_pred(rig: Rig, args: Args, out: Out) -> None:
    """Every predicate on an SPTE."""
    spte, level = args.number("spte"), args.number("level")
    present = bool(spte & SPTE_MMU_PRESENT_MASK)
    found = {
        "present": present,
        "last": sptes.is_last_spte(spte, level),
        "large": sptes.is_large_pte(spte),
        "mmio": sptes.is_mmio_spte(rig.vm, spte),
        "frozen": spte == FROZEN_SPTE,
        "needs_atomic": sptes.spte_needs_atomic_update(spte) if present else -1,
        "exec": sptes.is_executable_pte(spte),
        "accessed": sptes.is_accessed_spte(spte),
        "writable": sptes.is_writable_pte(spte),
        "mmu_writable": sptes.is_mmu_writable_spte(spte),
        "pfn": sptes.spte_to_pfn(spte),
        "ve_possible": sptes.is_ept_ve_possible(spte),
    }
    out.update((name, int(value)) for name, value in found.items())


# -- the walk alone


def do_iter(rig: Rig, args: Args, out: Out) -> str | None:
    """Walk a root, and say what is visited. all: the whole root, and no shared bit in its gfns.
    yield_at: at each k-th visit offer to let go, and start again if the walk has moved since.
    """
    vm, root = rig.vm, rig.root(args.text("root"))
    if root is None:
        return _NO_ROOT
    whole = args.flag("all")
    start = 0 if whole else args.number("start")
    end = tdp_mmu_max_gfn_exclusive(vm) if whole else args.number("end")
    gfn_bits = 0 if whole else gfn_root_bits(vm, root)
    it = TdpIter(vm, root, args.number("min_level"), start, gfn_bits)
    started, visits = it.valid, 0
    for _ in it.walk(end):
        visits += 1
        _visit(rig, args, it, visits)
    where = (it.level, it.gfn) if started else (0, 0)
    rig.recorder.add(("end", *where, {"valid": int(it.valid), "count": visits}))
    return None


def _visit(rig: Rig, args: Args, it: TdpIter, visits: int) -> None:
    if visits <= args.number("max", _VISITS_LOGGED):
        rig.recorder.add(("visit", it.level, it.gfn, *split_spte(it.old_spte, it.level)))
    every = args.number("yield_at", 0)
    if every and visits % every == 0:
        goal, since = it.next_last_level_gfn, it.yielded_gfn
        progress = {"next_last_level_gfn": goal, "yielded_gfn": since}
        rig.recorder.add(("yield", it.level, it.gfn, progress))
        it.yielded = goal != since


OPS: dict[str, Op] = {
    "getspte": _touch(None),
    "setspte": _touch(lambda spte, args: args.number("val")),
    "hwset": _touch(lambda spte, args: spte | args.number("bits")),
    "make_spte": do_make_spte,
    "make_mmio": do_make_mmio,
    "make_nonleaf": do_make_nonleaf,
    "make_small": do_make_small,
    "make_huge": do_make_huge,
    "acc_track": do_acc_track,
    "spte_pred": do_spte_pred,
    "iter": do_iter,
}
