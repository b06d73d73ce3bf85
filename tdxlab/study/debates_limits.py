"""Debates about where the shared bit ends up: D9, memslots that reach into the half of the GPAs
that has it; D13, TLB flushes of a range of gfns that do not have it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from errno import EINVAL
from typing import NamedTuple

from tdxlab.arch import PAGE_SHIFT, PAGE_SIZE, SIZE_2M
from tdxlab.guest import Read, Write
from tdxlab.kvm import fault as kvm_fault
from tdxlab.kvm import memory_region, tdp_iter
from tdxlab.kvm.fault import kvm_mmu_faultin_pfn
from tdxlab.kvm.lpage import kvm_mmu_init_memslot_memory_attributes
from tdxlab.kvm.page_fault import PageFault
from tdxlab.kvm.params import gfn_shared_bit
from tdxlab.kvm.slots import KVM_MR_CREATE, KVM_MR_MOVE, Slot
from tdxlab.kvm.spte import is_present_leaf
from tdxlab.kvm.tdp_iter import for_each_tdp_pte_min_level_all
from tdxlab.kvm.vm import Vcpu, Vm
from tdxlab.kvm.zap import kvm_zap_gfn_range
from tdxlab.machine import Machine
from tdxlab.study.debate_tools import Substitute, many, substituted
from tdxlab.study.undone import undone
from tdxlab.vmm import Gate
from tdxlab.vmm_td import Td

# -- D9


class LimitRule(NamedTuple):
    """Who keeps memslots within a VM's GPAs. allows: may this slot be created now. checks_init: the
    slots that are there are looked at again when the TD is initialised. limit: first gfn that no
    walk of the VM reaches. checks_faults: a fault beyond the VM's gfns is refused.
    """

    allows: Callable[[Vm, Slot], bool]
    checks_init: bool
    limit: Callable[[Vm], int]
    checks_faults: bool = False


def _host_limit(vm: Vm) -> int:
    return vm.params.max_gfn + 1


def _vm_limit(vm: Vm) -> int:
    return min(_host_limit(vm), vm.gfn_direct_bits or _host_limit(vm))


def _below_host_limit(vm: Vm, slot: Slot) -> bool:
    return slot.end_gfn <= _host_limit(vm)


def _below_vm_limit(vm: Vm, slot: Slot) -> bool:
    return slot.end_gfn <= _vm_limit(vm)


def _last_gfn_is_plain(vm: Vm, slot: Slot) -> bool:
    return _below_host_limit(vm, slot) and not slot.end_gfn - 1 & vm.gfn_direct_bits


LIMIT_RULES: dict[str, LimitRule] = {
    "host's bound alone": LimitRule(_below_host_limit, False, _host_limit),
    "a bound for each VM": LimitRule(_below_vm_limit, True, _vm_limit),
    "checks in the fault path": LimitRule(_below_host_limit, False, _host_limit, True),
    "last gfn has no direct bit": LimitRule(_last_gfn_is_plain, False, _host_limit),
}

#: (place of a slot, its first gfn, counted from the shared bit's); and the pages that each has.
_PLACES = (("below", -4), ("across", -2), ("above", 0))
SLOT_PAGES = 4


class LimitRow(NamedTuple):
    """One rule. before_init, after_init: places of slots that can be created before and after the
    TD is initialised. init_refused: of those before, the ones with which it is not. lost_before,
    lost_after: pages of slots, of all that were created before or after and stayed, that no access
    of the guest can reach. refused: accesses that the fault path refused. root_entries: entries of
    the direct root that a full zap looks at; missed: shared pages that stay mapped after it.
    """

    rule: str
    before_init: str
    init_refused: str
    after_init: str
    lost_before: int
    lost_after: int
    refused: int
    root_entries: int
    missed: int


class Fate(NamedTuple):
    """What became of a slot. outcome: "created"; "refused"; "TD refused": the slot was created, and
    the TD then not initialised. lost: pages of it that no access reaches; stopped: accesses that
    the fault path refused.
    """

    outcome: str
    lost: int = 0
    stopped: int = 0


CREATED, REFUSED, TD_REFUSED = "created", "refused", "TD refused"
NONE = "none"


def limit_rows(gpaw: int) -> list[LimitRow]:
    """D9: the same slots under each rule."""
    machine = Machine(gpaw=gpaw, memory="1 GiB", lps=2, packages=1)
    return [_limit_row(machine, name) for name in LIMIT_RULES]


def _limit_row(machine: Machine, name: str) -> LimitRow:
    before, after = (
        {place: slot_fate(machine, name, offset, before_init=first) for place, offset in _PLACES}
        for first in (True, False)
    )
    with undone(machine), substituted(_rule_substitutes(LIMIT_RULES[name])):
        entries, missed = _full_zap(machine)
    return LimitRow(
        name,
        _words([place for place, fate in before.items() if fate.outcome != REFUSED]),
        _words([place for place, fate in before.items() if fate.outcome == TD_REFUSED]),
        _words([place for place, fate in after.items() if fate.outcome != REFUSED]),
        sum(fate.lost for fate in before.values()),
        sum(fate.lost for fate in after.values()),
        sum(fate.stopped for fate in (*before.values(), *after.values())),
        entries,
        missed,
    )


def _words(places: Sequence[str]) -> str:
    return ", ".join(places) or NONE


def slot_fate(machine: Machine, rule: str, offset: int, *, before_init: bool) -> Fate:
    """What becomes of a slot of 4 pages under a rule of `LIMIT_RULES`; the machine is as before.

    offset: its first gfn, counted from the shared bit's. before_init: it is created before the TD
    is initialised.
    """
    found = LIMIT_RULES[rule]
    first = gfn_shared_bit(machine.gpaw) + offset
    with undone(machine), substituted(_rule_substitutes(found)):
        td = Td(machine.host, gpaw=machine.gpaw)
        if not before_init:
            td.init_vm()
        if _create_slot(td, first):
            return Fate(REFUSED)
        if before_init:
            td.init_vm()
        if found.checks_init and not all(found.allows(td.vm, slot) for slot in td.vm.slots.all(0)):
            return Fate(TD_REFUSED)
        td.add_vcpu()
        td.finalize()
        return Fate(CREATED, *_lost_pages(td, range(first, first + SLOT_PAGES)))


def _rule_substitutes(rule: LimitRule) -> list[Substitute]:
    def prepare(vm: Vm, new: Slot | None, change: int) -> int:
        if change in (KVM_MR_CREATE, KVM_MR_MOVE):
            assert new is not None
            if not rule.allows(vm, new):
                return -EINVAL
            kvm_mmu_init_memslot_memory_attributes(vm, new)
        return 0

    def faultin(vcpu: Vcpu, fault: PageFault) -> int:
        if rule.checks_faults and fault.gfn >= _vm_limit(vcpu.vm):
            return -EINVAL
        return kvm_mmu_faultin_pfn(vcpu, fault)

    return [
        (memory_region, "kvm_arch_prepare_memory_region", prepare),
        (tdp_iter, "tdp_mmu_max_gfn_exclusive", rule.limit),
        (kvm_fault, "kvm_mmu_faultin_pfn", faultin),
    ]


def _create_slot(td: Td, gfn: int) -> int:
    size = SLOT_PAGES * PAGE_SIZE
    steps = td.set_user_memory_region_steps(0, gfn << PAGE_SHIFT, size, hva=1 << 30)
    ret: int = td.run_thread(steps)
    return ret


def _lost_pages(td: Td, gfns: range) -> tuple[int, int]:
    """(pages that no fault finds, faults that were refused): the guest uses each as shared memory,
    through both GPAs that could mean it.
    """
    lost = refused = 0
    for gfn in gfns:
        answers = {_slot_found(td, gfn | td.vm.gfn_direct_bits), _slot_found(td, gfn)}
        lost += gfn not in answers
        refused += -EINVAL in answers
    return lost, refused


def _slot_found(td: Td, gfn: int) -> int | None:
    """The gfn whose page of a slot a fault at `gfn` finds; -EINVAL if it is refused."""
    found = PageFault(gfn << PAGE_SHIFT, 0, False, gfn & ~td.vm.gfn_direct_bits)
    found.slot = td.vm.slots.find(found.gfn)
    if kvm_fault.kvm_mmu_faultin_pfn(td.vcpu(0), found) == -EINVAL:
        return -EINVAL
    return None if found.slot is None else found.gfn


def _full_zap(machine: Machine) -> tuple[int, int]:
    """(entries of the direct root that a full zap visits, shared pages that it leaves mapped)."""
    td = machine.create_td(memory=SIZE_2M)
    td.convert(0, SLOT_PAGES * PAGE_SIZE, to="shared")
    td.touch(0, SLOT_PAGES * PAGE_SIZE)
    vm, root = td.vm, td.vm.sps[td.vm.vcpus[0].root_hpa]
    entries = sum(1 for _ in for_each_tdp_pte_min_level_all(vm, root, root.level))
    seen = sum(
        is_present_leaf(it.old_spte, it.level) for it in for_each_tdp_pte_min_level_all(vm, root, 1)
    )
    return entries, SLOT_PAGES - seen


def judge_limits(rows: Sequence[LimitRow]) -> str:
    """D9 in words."""
    parts = []
    for row in rows:
        lost = row.lost_before + row.lost_after
        words = [f"{many(lost, 'page')} of slots out of reach"]
        if lost:
            words[0] += f" ({row.lost_before} of slots from before the TD is initialised)"
        if row.init_refused != NONE:
            words.append(f"no TD with a slot {row.init_refused.replace(', ', ' or ')} the bit")
        if row.refused:
            words.append(f"{many(row.refused, 'fault')} refused")
        if row.missed:
            words.append(f"{many(row.missed, 'shared page')} missed by a full zap")
        parts.append(f'"{row.rule}": {", ".join(words)}')
    perfect = [row.rule for row in rows if not row.lost_before + row.lost_after + row.missed]
    end = f"Nothing goes wrong with {', '.join(perfect)}" if perfect else "No rule is without a gap"
    return f"{'; '.join(parts)}. {end}."


# -- D13


class FlushRow(NamedTuple):
    """One way to flush what was zapped. stale: translations to pages that are not mapped any more.
    needless: translations to other pages that were flushed too.
    """

    vm: str
    flush: str
    zapped: int
    stale: int
    needless: int


#: A range flush of gfns: (VM, first gfn, pages).
_Flush = Callable[[Vm, int, int], None]


def _flushing(machine: Machine, shift: Callable[[Vm], int]) -> _Flush:
    """A back end that flushes GPAs: the gfns, with what `shift` adds to them."""

    def flush(vm: Vm, gfn: int, nr_pages: int) -> None:
        first = gfn | shift(vm)
        for tlb in machine.cpu.tlbs:
            for key in [key for key in tlb if first <= key[1] < first + nr_pages]:
                tlb.drop(key)

    return flush


def _guarded(machine: Machine) -> _Flush:
    """The range if the VM has no direct bits, else everything."""
    ranged = _flushing(machine, lambda _vm: 0)

    def flush(vm: Vm, gfn: int, nr_pages: int) -> None:
        if vm.gfn_direct_bits:
            vm.flush_remote_tlbs()
        else:
            ranged(vm, gfn, nr_pages)

    return flush


FULL, PLAIN, SHIFTED, GUARD = "everything", "gfns as they are", "gfns with direct bits", "guarded"
_ZAPPED, _USED = 2, 8


def flush_rows(gpaw: int) -> list[FlushRow]:
    """D13: each way in a TD, and in a VM without a shared bit."""
    rows = []
    for name in ("TDX", "DEFAULT"):
        machine = Machine(gpaw=gpaw, memory="1 GiB", lps=2, packages=1)
        if name == "TDX":
            gate: Gate = machine.create_td(memory=SIZE_2M)
            gate.convert(0, SIZE_2M, to="shared")
        else:
            gate = machine.create_vm(memory=SIZE_2M)
        ways = {
            FULL: Vm.flush_remote_tlbs_range,
            PLAIN: _flushing(machine, lambda _vm: 0),
            SHIFTED: _flushing(machine, lambda vm: vm.gfn_direct_bits),
            GUARD: _guarded(machine),
        }
        rows += [_flush_row(machine, gate, name, way, ways[way]) for way in ways]
    return rows


def _flush_row(machine: Machine, gate: Gate, vm: str, way: str, flush: _Flush) -> FlushRow:
    """Use some pages, zap the first of them, let the vCPU go on, and look into the TLB."""
    alias, last = gate.guest.alias, (_USED - 1) * PAGE_SIZE
    with undone(machine), substituted([(Vm, "flush_remote_tlbs_range", flush)]):
        gate.run([Write(alias(page * PAGE_SIZE)) for page in range(_USED)])
        before = _cached(machine)
        gate.run_thread(kvm_zap_gfn_range(gate.vm, 0, _ZAPPED))
        gate.run([Read(alias(last))])
        after = _cached(machine)
    gone = {alias(page * PAGE_SIZE) >> PAGE_SHIFT for page in range(_ZAPPED)}
    others = before - gone - {alias(last) >> PAGE_SHIFT}
    return FlushRow(vm, way, _ZAPPED, len(after & gone), len(others - after))


def _cached(machine: Machine) -> set[int]:
    """gfns, shared bit included, of which a TLB has a translation."""
    return {gfn for tlb in machine.cpu.tlbs for _, gfn in tlb}


def judge_flushes(rows: Sequence[FlushRow]) -> str:
    """D13 in words."""
    stale = [f"{row.stale} of {row.zapped} in the {row.vm} VM" for row in rows if row.stale]
    ways = dict.fromkeys(row.flush for row in rows if row.stale)
    safe = [way for way in dict.fromkeys(row.flush for row in rows) if way not in ways]
    cost = {way: sum(row.needless for row in rows if row.flush == way) for way in safe}
    parts = []
    if stale:
        parts.append(f"Flushing {', '.join(ways)} leaves stale translations: {', '.join(stale)}")
    words = [f"{way} ({cost[way]} flushed needlessly)" for way in safe]
    parts.append(f"No stale translation is left by: {', '.join(words) or 'none of them'}")
    return ". ".join(parts) + "."
