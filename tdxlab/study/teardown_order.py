"""An experiment: tear a TD down with its KeyID given back first.

Linux 6.16 removes every private page while the TD still has its KeyID, four SEAMCALLs each, because
the guest_memfd files are released before the VM goes. Once the KeyID is given back the module takes
no call on private memory any more, but it lets every page be reclaimed, with one.

    4 N   BLOCK, TRACK, REMOVE, WBINVD          with the KeyID
      N   RECLAIM                               without it

Nothing of the back end is changed: the order is another one, and the hook that takes a private page
away is another one. A policy that a kernel could have; a patch of June 2025 proposed it as a
command for user space (KVM_TDX_TERMINATE_VM).
Differs: the proposed command marks the VM as dead, so that no vCPU enters again, and returns; the
files are released when the process ends. Here both happen in one operation, and nobody is left who
could enter.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tdxlab.arch import PAGE_SHIFT
from tdxlab.kvm.external import Hook
from tdxlab.kvm.tdx import Tdx
from tdxlab.kvm.tdx_hooks import tdx_reclaim_page
from tdxlab.kvm.tdx_teardown import kvm_destroy_vm, tdx_mmu_release_hkid
from tdxlab.steps import Operation
from tdxlab.vmm_td import Td


class ReclaimOnly:
    """The four hooks of a TD, of which one differs: without a KeyID a private page is reclaimed."""

    def __init__(self, tdx: Tdx) -> None:
        self.tdx = tdx

    def __repr__(self) -> str:
        return f"{self.tdx!r}, its private pages only reclaimed"

    def link_external_spt(self, gfn: int, level: int, external_spt: int) -> Hook:
        """As the TD's own."""
        return self.tdx.link_external_spt(gfn, level, external_spt)

    def set_external_spte(self, gfn: int, level: int, pfn: int) -> Hook:
        """As the TD's own."""
        return self.tdx.set_external_spte(gfn, level, pfn)

    def remove_external_spte(self, gfn: int, level: int, pfn: int) -> Hook:
        """Reclaim the page. As the TD's own if the KeyID could not be given back.

        Returns 0, or -EIO: the page is lost.
        """
        tdx, hpa = self.tdx, pfn << PAGE_SHIFT
        if tdx.is_hkid_assigned:
            return (yield from tdx.remove_external_spte(gfn, level, pfn))
        ret = yield from tdx_reclaim_page(tdx, hpa)
        if ret:
            tdx.host.pages.leak(hpa, "TDH_PHYMEM_PAGE_RECLAIM failed")
        else:
            tdx.vm.guest_memory.put_page(pfn)
        return ret

    def free_external_spt(self, gfn: int, level: int, external_spt: int) -> Hook:
        """As the TD's own."""
        return self.tdx.free_external_spt(gfn, level, external_spt)


@contextmanager
def reclaiming(tdx: Tdx) -> Iterator[None]:
    """While it lasts, private pages without a KeyID are reclaimed."""
    own, tdx.vm.external = tdx.vm.external, ReclaimOnly(tdx)
    try:
        yield
    finally:
        tdx.vm.external = own


def destroy_keyid_first(td: Td) -> Operation:
    """As `Td.destroy_steps`, but the KeyID goes back before the files are released."""
    td.destroyed = True
    with reclaiming(td.tdx):
        yield from tdx_mmu_release_hkid(td.tdx)
        yield from td.close_files_steps()
        yield from kvm_destroy_vm(td.tdx)
    td.host.remove_vm(td.vm)
