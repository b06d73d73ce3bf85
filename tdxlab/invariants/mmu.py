"""Invariants of KVM's page tables: what they mirror and count, and what they must not map."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from tdxlab.arch import PAGE_SHIFT
from tdxlab.invariants.host_picture import Entry, VmPicture
from tdxlab.invariants.picture import Picture, TdPicture
from tdxlab.kvm.parking import is_parked
from tdxlab.kvm.role import INVALID
from tdxlab.kvm.tdx import Tdx

_LEAF_STATS = ("pages_4k", "pages_2m", "pages_1g")


def _living_tds(picture: Picture) -> Iterator[tuple[VmPicture, Tdx, TdPicture]]:
    """VMs that are TDs, with KVM's and the module's half."""
    for vm in picture.vms:
        tdx = vm.living_td
        if tdx is not None and tdx.td.tdr in picture.tds:
            yield vm, tdx, picture.tds[tdx.td.tdr]


def mirror_leaves_are_sept_leaves(picture: Picture) -> Iterator[str]:
    """1: same gfn, level and page, one for one. Before the TD is finalized the mirror is ahead by
    the pages that KVM counts as premapped. Pages of a parked slot are in both, blocked.
    """
    for vm, tdx, td in _living_tds(picture):
        mirror = {(e.gfn, e.level): e.pfn for e in vm.mirror if e.is_leaf or _stays_blocked(vm, e)}
        leaves = (link for link in td.links if link.is_leaf)
        external = {(x.gpa >> PAGE_SHIFT, x.sept_level + 1): x.hpa >> PAGE_SHIFT for x in leaves}
        premapped = mirror.keys() - external.keys()
        if len(premapped) != tdx.nr_premapped:
            where = ", ".join(f"{gfn:#x}" for gfn, _ in sorted(premapped)[:4])
            yield (
                f"the mirror of {vm} maps {len(premapped)} pages that the S-EPT does not have "
                f"({where}); {tdx.nr_premapped} are premapped"
            )
        for (gfn, level), pfn in external.items():
            found = mirror.get((gfn, level))
            if found != pfn:
                what = "nothing" if found is None else f"frame {found:#x}"
                yield (
                    f"the S-EPT of {vm} maps gfn {gfn:#x} at level {level} to frame {pfn:#x}, "
                    f"the mirror to {what}"
                )


def _stays_blocked(vm: VmPicture, entry: Entry) -> bool:
    """True for a page that a slot left behind when it was deleted."""
    return entry.is_blocked and is_parked(vm.vm, entry.gfn)


def mirror_tables_are_sept_tables(picture: Picture) -> Iterator[str]:
    """2: below the same entry, in the page that KVM gave for it."""
    for vm, _, td in _living_tds(picture):
        mirror = vm.external_spts()
        links = (link for link in td.links if not link.is_leaf)
        external = {(link.gpa >> PAGE_SHIFT, link.sept_level + 1): link.hpa for link in links}
        for gfn, level in sorted(mirror.keys() | external.keys()):
            ours, theirs = mirror.get((gfn, level)), external.get((gfn, level))
            if ours != theirs:
                yield (
                    f"below gfn {gfn:#x} at level {level} of {vm} the mirror has the external page "
                    f"{_hpa(ours)}, the S-EPT {_hpa(theirs)}"
                )


def blocked_pages_are_still_in_the_sept(picture: Picture) -> Iterator[str]:
    """1, while pages are removed in batches: what the mirror calls blocked, the S-EPT still has."""
    for vm, _, td in _living_tds(picture):
        blocked = [entry for entry in vm.mirror if entry.is_blocked]
        if not blocked:
            continue
        leaves = {(x.gpa, x.sept_level): x.hpa for x in td.links if x.is_leaf}
        for entry in blocked:
            if leaves.get((entry.gfn << PAGE_SHIFT, entry.level - 1)) != entry.pfn << PAGE_SHIFT:
                yield f"{entry} of {vm} is blocked, and the S-EPT does not have its page"


def _hpa(hpa: int | None) -> str:
    return "none" if hpa is None or hpa < 0 else f"{hpa:#x}"


def tables_are_counted_right(picture: Picture) -> Iterator[str]:
    """8, KVM's share: leaves of each size and linked tables, in all roots of a VM."""
    for vm in picture.vms:
        leaves = Counter(entry.level for entry in vm.leaves)
        counted = {name: leaves[level] for level, name in enumerate(_LEAF_STATS, 1)}
        counted["pt_pages"] = len(vm.links)
        counted["pt_pages_mirror"] = sum(link.is_mirror for link in vm.links)
        counted["nx_lpage_splits"] = len(vm.vm.possible_nx_huge_pages)
        kept = vm.vm.stats
        for name, number in counted.items():
            if kept[name] != number:
                yield f"{vm} counts {kept[name]} {name}, and its tables have {number}"


def tables_are_known(picture: Picture) -> Iterator[str]:
    """8: KVM knows a table if it is a root, is linked once, or waits for a grace period."""
    for vm in picture.vms:
        linked = Counter(link.pfn << PAGE_SHIFT for link in vm.links)
        linked.update(root.spt for root in vm.roots)
        for hpa, times in linked.items():
            if times > 1 or hpa not in vm.vm.sps:
                yield f"the table at {hpa:#x} of {vm} is linked {times} times; KVM should know one"
        waiting = len(vm.vm.sps) - len(linked)
        if waiting != vm.vm.rcu_pending:
            yield (
                f"{vm} has {waiting} tables that nothing links, and {vm.vm.rcu_pending} wait for a "
                "grace period"
            )


def roots_are_counted_right(picture: Picture) -> Iterator[str]:
    """8: a root has a reference of each vCPU that uses it, and the MMU's until it is zapped."""
    for vm in picture.vms:
        users = Counter(vcpu.root_hpa for vcpu in vm.vm.vcpus)
        users.update(vcpu.mirror_root_hpa for vcpu in vm.vm.vcpus)
        for root in vm.roots:
            own = not root.role & INVALID or root.scheduled_to_zap
            count = vm.vm.root_count.get(root.spt, 0)
            if count != users[root.spt] + own:
                yield (
                    f"the root at {root.spt:#x} of {vm} has {count} references; "
                    f"{users[root.spt]} vCPUs use it"
                )


def shared_and_private_have_their_own_roots(picture: Picture) -> Iterator[str]:
    """9: the SHARED bit is in no GPA of a mirror, and in every GPA of a TD's direct root."""
    for vm in picture.vms:
        if not vm.vm.gfn_direct_bits:
            continue
        for entry in vm.entries:
            if entry.is_mirror and entry.gfn & vm.vm.gfn_direct_bits:
                yield f"{entry} of {vm} is in use, for a shared GPA"
            elif not entry.is_mirror and vm.covers_only_private(entry):
                yield f"{entry} of {vm} is in use, for a private GPA"


def leaves_map_pages_in_use(picture: Picture) -> Iterator[str]:
    """5: no table maps a page that was given back to the host."""
    for vm in picture.vms:
        for entry in vm.leaves:
            is_device = vm.vm.is_mmio_pfn is not None and vm.vm.is_mmio_pfn(entry.pfn)
            if not is_device and not _is_out(picture, entry):
                yield f"{entry} of {vm} maps the page {entry.pfn << PAGE_SHIFT:#x}, which is free"


def _is_out(picture: Picture, entry: Entry) -> bool:
    assert picture.host is not None
    return picture.host.is_out(entry.pfn << PAGE_SHIFT)


def nothing_is_frozen(picture: Picture) -> Iterator[str]:
    """11, KVM's share: nobody is changing an entry, or removing its page."""
    for vm in picture.vms:
        for entry in vm.entries:
            if entry.is_frozen:
                yield f"{entry} of {vm} is frozen"
            elif entry.is_blocked and not _stays_blocked(vm, entry):
                yield f"{entry} of {vm} is blocked, and nobody removes its page"
