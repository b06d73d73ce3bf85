"""What the CPU, the kernel's build and its module parameters fix for every VM of a host, and what
user space chooses for one VM. What its type decides stands in `vm_types.py`.

Source: Linux 6.16, arch/x86/kvm/mmu/mmu.c (module parameters).
"""

from __future__ import annotations

from dataclasses import dataclass

from tdxlab.arch import PAGE_SHIFT, shared_bit
from tdxlab.kvm.vm_types import KVM_X86_DEFAULT_VM as KVM_X86_DEFAULT_VM
from tdxlab.kvm.vm_types import KVM_X86_SW_PROTECTED_VM as KVM_X86_SW_PROTECTED_VM
from tdxlab.kvm.vm_types import KVM_X86_TDX_VM as KVM_X86_TDX_VM
from tdxlab.kvm.vm_types import VM_FEATURES as VM_FEATURES
from tdxlab.kvm.vm_types import VM_TYPE_NAMES as VM_TYPE_NAMES
from tdxlab.kvm.vm_types import VmFeatures as VmFeatures


@dataclass(frozen=True)
class MmuParams:
    """One host's CPU, kernel and module parameters, as far as its MMU depends on them.

    maxphyaddr: physical address width in bits as CPUID reports it, KeyID bits included; 36 to 52.
    ad_bits: the EPT has accessed and dirty bits. execute_only: it has execute-only entries.
    nx_huge_pages: large pages are mapped without X. eager_page_split: dirty logging splits large
    pages when it starts, not at the first write. l1tf: MMIO entries keep their address away from
    the L1 cache. mmio_caching: MMIO gets entries of its own. prove_mmu: the kernel was built with
    CONFIG_KVM_PROVE_MMU; here that is about how a whole root is zapped, nothing else.
    """

    maxphyaddr: int = 52
    ad_bits: bool = True
    execute_only: bool = True
    nx_huge_pages: bool = False
    eager_page_split: bool = True
    l1tf: bool = False
    mmio_caching: bool = True
    prove_mmu: bool = False

    @property
    def max_gfn(self) -> int:
        """The greatest gfn that any VM can have. Source: mmu.h, kvm_mmu_max_gfn."""
        return (1 << (self.maxphyaddr - PAGE_SHIFT)) - 1


def gfn_shared_bit(gpaw: int) -> int:
    """`gfn_direct_bits` of a TD: the shared bit of its GPAs as a bit of a gfn. gpaw: 48 or 52."""
    return 1 << (shared_bit(gpaw) - PAGE_SHIFT)


@dataclass(frozen=True)
class VmConfig:
    """What user space chooses for one VM.

    vm_type: KVM_X86_*_VM. root_level: levels of its EPT, 4 or 5. gfn_direct_bits: 0, or for a TD
    `gfn_shared_bit(gpaw)`. slot_zap_all: quirk KVM_X86_QUIRK_SLOT_ZAP_ALL is on (it acts on DEFAULT
    VMs only). ignore_guest_pat: quirk KVM_X86_QUIRK_IGNORE_GUEST_PAT is on (never for a TD).
    dirty_log_size: entries of the CPU's page-modification log, 0 without it.
    manual_dirty_log_protect: flags of KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 (bit 0 on, bit 1 initially
    all set). answers: what code is told when it asks what the VM is like; None: what Linux 6.16
    knows by its flags.
    """

    vm_type: int = KVM_X86_DEFAULT_VM
    root_level: int = 4
    gfn_direct_bits: int = 0
    slot_zap_all: bool = True
    ignore_guest_pat: bool = True
    dirty_log_size: int = 0
    manual_dirty_log_protect: int = 0
    answers: VmFeatures | None = None

    @property
    def features(self) -> VmFeatures:
        """What code is told about the VM, at its creation."""
        return VM_FEATURES[self.vm_type] if self.answers is None else self.answers
