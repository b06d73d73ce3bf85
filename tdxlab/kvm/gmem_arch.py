"""What a VM's type has done to guest_memfd pages as they come and go.

These are the hooks that SNP needs: whose page it is stands in a table of the hardware, which has
nothing to do with page tables. They are called for pages, once in a page's life each; the hooks of
`external.py` are called for mappings.

Source: Linux 6.16, virt/kvm/guest_memfd.c (kvm_arch_gmem_prepare, kvm_arch_gmem_invalidate).
"""

from __future__ import annotations

from typing import Protocol


class GmemArch(Protocol):
    """The hooks of one VM."""

    def prepare(self, gfn: int, pfn: int) -> int:
        """The page, zeroed, is about to be the guest's at `gfn`. Returns 0 or -errno."""
        ...

    def invalidate(self, pfn: int) -> None:
        """The page has left its file, nothing maps it, and it is about to be free."""
        ...
