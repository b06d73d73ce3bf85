"""The external-EPT hooks: how the TDP MMU tells a page table it cannot write what to do.

The MMU keeps a mirror EPT in plain memory. Whenever a mirror entry really changes, it calls one of
four hooks, and a back end carries the change over to the external EPT, which the CPU walks. For a
TD the back end is KVM's TDX code, and the external EPT is the Secure EPT.

    mirror change                          hook                    mmu_lock
    a non-leaf entry is installed          link_external_spt       shared
    a leaf entry is installed              set_external_spte       shared
    a present leaf becomes non-present     remove_external_spte    exclusive
    a page table is unlinked               free_external_spt       exclusive

Installing happens while the mirror entry is frozen, so nobody else can change it meanwhile; where a
hook fails, the MMU restores the old value and retries. Removing happens after the mirror entry was
cleared, and cannot be refused: a failing remove is a bug that ends the VM, a failing free leaks the
page. The TDP MMU stays free of TDX: it sees this protocol and nothing else.

Source: Linux 6.16, arch/x86/include/asm/kvm_host.h (struct kvm_x86_ops) and
arch/x86/kvm/mmu/tdp_mmu.c.
Differs: the hooks are step generators, so that other vCPUs can run in the middle of one; in Linux
they take the VM as first argument, here the object is bound to its VM.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Protocol

from tdxlab.steps import Step

#: A hook in flight: yields steps, returns 0 or a negative errno (EBUSY and EIO occur).
Hook = Generator[Step, None, int]


class ExternalOps(Protocol):
    """What a back end offers to the TDP MMU of one VM.

    Units: `gfn` is a frame number of 4 KiB, without the shared bit; `level` is KVM's, 1 for 4 KiB;
    `pfn` a frame number; `external_spt` the HPA of the page that stands for the table in the
    external EPT.
    """

    def link_external_spt(self, gfn: int, level: int, external_spt: int) -> Hook:
        """Link an empty table into the external EPT.

        gfn, level: of the entry that is to point at the table, gfn rounded to that level.
        Called with mmu_lock shared. Returns 0, -EBUSY or -EIO.
        """
        ...

    def set_external_spte(self, gfn: int, level: int, pfn: int) -> Hook:
        """Map the page `pfn`. gfn, level: of the leaf entry.

        Called with mmu_lock shared. Returns 0, -EBUSY or -EIO.
        """
        ...

    def remove_external_spte(self, gfn: int, level: int, pfn: int) -> Hook:
        """Unmap the page `pfn`, with everything that makes it safe to use again: TLB tracking too.

        Called with mmu_lock exclusive. Returns 0; anything else ends the VM.
        """
        ...

    def free_external_spt(self, gfn: int, level: int, external_spt: int) -> Hook:
        """Take back the page of a table that was unlinked. gfn, level: of the table itself.

        Called with mmu_lock exclusive. Returns 0; anything else leaks the page.
        """
        ...
