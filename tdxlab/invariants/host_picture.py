"""What KVM holds, looked at once: the page tables of each VM, and the pages of host memory."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

from tdxlab.arch import ENTRIES_PER_TABLE, PAGE_SHIFT
from tdxlab.bits import filled
from tdxlab.kvm.blocked import is_blocked_spte
from tdxlab.kvm.gmem import GuestMemfds
from tdxlab.kvm.host import KvmHost
from tdxlab.kvm.pages import NO_PAGE
from tdxlab.kvm.spte import (
    FROZEN_SPTE,
    SHADOW_NONPRESENT_VALUE,
    SPTE_MMU_PRESENT_MASK,
    is_last_spte,
    spte_to_pfn,
)
from tdxlab.kvm.tdx import TD_STATE_UNINITIALIZED, Tdx, TdxVcpu
from tdxlab.kvm.user_memory import ProcessMemory
from tdxlab.kvm.vm import MmuPage, Vm, round_gfn

_UNUSED = (0, SHADOW_NONPRESENT_VALUE)


class Entry(NamedTuple):
    """An SPTE that is not empty. level, gfn: as its place in the tables says, so gfn has the SHARED
    bit in the direct root of a TD. is_mirror: it stands in a mirror.
    """

    level: int
    gfn: int
    spte: int
    is_mirror: bool

    @property
    def is_leaf(self) -> bool:
        """True if present, and it maps a page."""
        return bool(self.spte & SPTE_MMU_PRESENT_MASK) and is_last_spte(self.spte, self.level)

    @property
    def is_link(self) -> bool:
        """True if present, and it points at a table."""
        return bool(self.spte & SPTE_MMU_PRESENT_MASK) and not is_last_spte(self.spte, self.level)

    @property
    def is_frozen(self) -> bool:
        """True while somebody changes it."""
        return self.spte == FROZEN_SPTE

    @property
    def is_blocked(self) -> bool:
        """True between the blocking of its page and the removal."""
        return is_blocked_spte(self.spte)

    @property
    def pfn(self) -> int:
        """The frame that it holds."""
        return spte_to_pfn(self.spte)

    def __str__(self) -> str:
        tree = "mirror" if self.is_mirror else "direct"
        return f"the {tree} SPTE for gfn {self.gfn:#x} at level {self.level}"


class VmPicture:
    """One VM: its roots, and all entries in use below them, parents first; of these, the leaves map
    a page, the links point at a table. tdx: None if it is no TD.
    """

    def __init__(self, vm: Vm) -> None:
        self.vm = vm
        self.tdx: Tdx | None = vm.external if isinstance(vm.external, Tdx) else None
        self.roots: list[MmuPage] = [vm.sps[hpa] for hpa in vm.tdp_mmu_roots]
        self.entries: list[Entry] = []
        self.leaves: list[Entry] = []
        self.links: list[Entry] = []
        for root in self.roots:
            self._look(root.spt, root.level, 0, root.is_mirror)
        self.mirror = [entry for entry in self.entries if entry.is_mirror]

    def _look(self, spt: int, level: int, gfn: int, is_mirror: bool) -> None:
        """Note what stands in the table at `spt`, whose first entry is for `gfn`, and below it."""
        memory = self.vm.memory
        start = memory.frames.get(spt)
        if start is None:
            return
        shift = 9 * (level - 1)
        words = memory.words.view[start : start + ENTRIES_PER_TABLE].tolist()
        for index, spte in filled(words, _UNUSED):
            entry = Entry(level, gfn | index << shift, spte, is_mirror)
            self.entries.append(entry)
            if entry.is_leaf:
                self.leaves.append(entry)
            elif entry.is_link:
                self.links.append(entry)
                self._look(entry.pfn << PAGE_SHIFT, level - 1, entry.gfn, is_mirror)

    def __str__(self) -> str:
        return self.vm.name

    @property
    def living_td(self) -> Tdx | None:
        """Its back end, if it is a TD that has been initialised, has its KeyID, and is not dead."""
        tdx = self.tdx
        if tdx is None or tdx.state == TD_STATE_UNINITIALIZED or self.vm.vm_dead:
            return None
        return tdx if tdx.is_hkid_assigned else None

    def external_spts(self) -> dict[tuple[int, int], int]:
        """(gfn, level) of each mirror entry with a table below it -> HPA of the table's page in the
        external EPT.
        """
        links = (link for link in self.links if link.is_mirror)
        return {(link.gfn, link.level): self._external_spt(link) for link in links}

    def _external_spt(self, link: Entry) -> int:
        sp: MmuPage | None = self.vm.sps.get(link.pfn << PAGE_SHIFT)
        return NO_PAGE if sp is None else sp.external_spt

    def covers_only_private(self, entry: Entry) -> bool:
        """True if no GPA below `entry` has the SHARED bit."""
        direct_bits = self.vm.gfn_direct_bits
        return not entry.gfn & direct_bits and round_gfn(direct_bits, entry.level) == direct_bits

    # -- pages

    @cached_property
    def host_pages(self) -> list[tuple[int, str]]:
        """(HPA, use) of every page that KVM or the VM's process uses itself."""
        vm = self.vm
        found = [(spt, "page table") for spt in vm.sps]
        for vcpu in vm.vcpus:
            name = f"cache of {vcpu!r}"
            found += [(hpa, name) for hpa in (*vcpu.page_cache, *vcpu.external_spt_cache)]
            if isinstance(vcpu, TdxVcpu) and vcpu.pi_desc > 0:
                found.append((vcpu.pi_desc, f"posted-interrupt descriptor of {vcpu!r}"))
        if isinstance(vm.user_memory, ProcessMemory):
            found += [(hpa, "user memory") for hpa in vm.user_memory.owned()]
        return found

    def guest_pages(self) -> Iterator[tuple[int, str]]:
        """(HPA, use) of every page that the VM keeps for its guest, or has given to the module."""
        vm = self.vm
        for sp in vm.sps.values():
            if sp.external_spt != NO_PAGE:
                yield sp.external_spt, "external page table"
        if isinstance(vm.guest_memory, GuestMemfds):
            yield from ((pfn << PAGE_SHIFT, "guest_memfd") for pfn in vm.guest_memory.owned())
        if self.tdx is not None:
            yield from _control_pages(self.tdx)


def _control_pages(tdx: Tdx) -> Iterator[tuple[int, str]]:
    """The pages in which the module keeps a TD and its vCPUs."""
    if tdx.td.tdr:
        yield tdx.td.tdr, "TDR"
    yield from ((hpa, "TDCS") for hpa in tdx.td.tdcs)
    for vcpu in tdx.vcpus:
        if vcpu.vp.tdvpr:
            yield vcpu.vp.tdvpr, f"TDVPR of {vcpu!r}"
        yield from ((hpa, f"TDCX of {vcpu!r}") for hpa in vcpu.vp.tdcx)


class HostPicture:
    """The kernel of one machine, and its VMs."""

    def __init__(self, host: KvmHost) -> None:
        self.host = host
        self.vms = [VmPicture(vm) for vm in host.vm_list]

    def is_out(self, hpa: int) -> bool:
        """True unless the page at `hpa` is free, or none of KVM's pages."""
        pages = self.host.pages
        if pages.use_of(hpa) or hpa in pages.leaked:
            return True
        return any(base <= hpa < base + size for base, (size, _) in pages.huge.items())
