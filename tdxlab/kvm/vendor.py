"""What the MMU asks of the code that runs the vCPUs: the part of kvm_x86_ops that is no EPT hook.

Source: Linux 6.16, arch/x86/include/asm/kvm-x86-ops.h; arch/x86/kvm/vmx/main.c.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Protocol

from tdxlab.steps import Step

if TYPE_CHECKING:
    from tdxlab.kvm.vm import MmuPage, Vcpu, Vm

Doing = Generator[Step, None, None]

#: (mirror root, first gfn, gfn behind the last, TLBs are to be flushed) -> operation that takes the
#: leaves out and returns whether TLBs are to be flushed then.
MirrorZapper = Callable[["MmuPage", int, int, bool], Generator[Step, None, bool]]


class Vendor(Protocol):
    """What VMX, or TDX on it, does for the MMU."""

    def load_mmu_pgd(self, vcpu: Vcpu, root_hpa: int, root_level: int) -> Doing:
        """The vCPU is to use the direct root at `root_hpa`."""
        ...

    def flush_tlb_current(self, vcpu: Vcpu) -> Doing:
        """Flush what the vCPU's present root has left in the TLB."""
        ...

    def kick_all(self, vm: Vm, request: str) -> Doing:
        """IPI every vCPU that is in the guest, and wait until it has left."""
        ...

    def private_max_mapping_level(self, vm: Vm, pfn: int) -> int:
        """The greatest level at which private memory may be mapped; 0: no limit of its own."""
        ...


class PlainVendor:
    """A VM whose vCPUs nobody runs: the MMU alone, in tests and replays."""

    def load_mmu_pgd(self, vcpu: Vcpu, root_hpa: int, root_level: int) -> Doing:
        """Nothing to load it into."""
        yield from ()

    def flush_tlb_current(self, vcpu: Vcpu) -> Doing:
        """No TLB."""
        yield from ()

    def kick_all(self, vm: Vm, request: str) -> Doing:
        """Nobody is in the guest."""
        yield from ()

    def private_max_mapping_level(self, vm: Vm, pfn: int) -> int:
        """TDs map 4 KiB pages only; others have no limit."""
        return 1 if vm.has_mirrored_tdp else 0
