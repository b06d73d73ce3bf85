"""What the CPU and the kernel's module parameters fix for every VM of a host, and the VM types.

Source: Linux 6.16, arch/x86/kvm/mmu/mmu.c (module parameters), arch/x86/kvm/x86.c
(kvm_arch_init_vm), arch/x86/include/uapi/asm/kvm.h (types).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from tdxlab.arch import PAGE_SHIFT, shared_bit

# -- VM types, by their number in the uAPI

KVM_X86_DEFAULT_VM = 0
KVM_X86_SW_PROTECTED_VM = 1
KVM_X86_TDX_VM = 5


@dataclass(frozen=True)
class MmuParams:
    """One host's CPU and module parameters, as far as its MMU depends on them.

    maxphyaddr: physical address width in bits as CPUID reports it, KeyID bits included; 36 to 52.
    ad_bits: the EPT has accessed and dirty bits. execute_only: it has execute-only entries.
    nx_huge_pages: large pages are mapped without X. eager_page_split: dirty logging splits large
    pages when it starts, not at the first write. l1tf: MMIO entries keep their address away from
    the L1 cache. mmio_caching: MMIO gets entries of its own.
    """

    maxphyaddr: int = 52
    ad_bits: bool = True
    execute_only: bool = True
    nx_huge_pages: bool = False
    eager_page_split: bool = True
    l1tf: bool = False
    mmio_caching: bool = True

    @property
    def max_gfn(self) -> int:
        """The greatest gfn that any VM can have. Source: mmu.h, kvm_mmu_max_gfn."""
        return (1 << (self.maxphyaddr - PAGE_SHIFT)) - 1


class VmFeatures(NamedTuple):
    """What the type of a VM decides when it is created.

    has_private_mem: guest_memfd slots and the PRIVATE attribute exist. has_protected_state: the
    host may be refused the vCPU's registers. pre_fault_allowed: KVM_PRE_FAULT_MEMORY works from the
    beginning. has_mirrored_tdp: private memory is mapped by an external EPT with a mirror.
    """

    has_private_mem: bool
    has_protected_state: bool
    pre_fault_allowed: bool
    has_mirrored_tdp: bool


#: By type. Source: x86.c, kvm_arch_init_vm; vmx/tdx.c, tdx_vm_init; mmu.h, kvm_has_mirrored_tdp.
VM_FEATURES: dict[int, VmFeatures] = {
    KVM_X86_DEFAULT_VM: VmFeatures(False, False, True, False),
    KVM_X86_SW_PROTECTED_VM: VmFeatures(True, False, True, False),
    KVM_X86_TDX_VM: VmFeatures(True, True, False, True),
}

VM_TYPE_NAMES = {
    KVM_X86_DEFAULT_VM: "DEFAULT",
    KVM_X86_SW_PROTECTED_VM: "SW_PROTECTED",
    KVM_X86_TDX_VM: "TDX",
}


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
    all set).
    """

    vm_type: int = KVM_X86_DEFAULT_VM
    root_level: int = 4
    gfn_direct_bits: int = 0
    slot_zap_all: bool = True
    ignore_guest_pat: bool = True
    dirty_log_size: int = 0
    manual_dirty_log_protect: int = 0

    @property
    def features(self) -> VmFeatures:
        """What the type decides."""
        return VM_FEATURES[self.vm_type]
