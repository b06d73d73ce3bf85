"""VM types, the flags that follow from them, and other ways to find out what a VM is like.

A VM's type is a number that user space chooses. Code that has to know whether a VM has private
memory, or a mirror, can keep a flag for each such question, or deduce the answer from the type
whenever it asks. Linux keeps flags, but for the mirror, which it deduces. Three ways are here, each
a function from what a VM really is (`VmKind`) to what the code believes (`VmFeatures`):

    by_flags     Linux 6.16: booleans, and the type for the mirror
    by_type      the type as one bit, and a mask of types for each question
    by_mask      "there is a shared bit" stands for everything that only TDs had

Source: Linux 6.16, arch/x86/include/uapi/asm/kvm.h (types); arch/x86/kvm/x86.c (kvm_arch_init_vm,
kvm_is_vm_type_supported); svm/svm.c (svm_vm_init); vmx/tdx.c (tdx_vm_init); mmu.h
(kvm_has_mirrored_tdp). The second way was proposed while the TDX series was reviewed, and not
taken; the third is that of early TDX patches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

# -- VM types, by their number in the uAPI

KVM_X86_DEFAULT_VM = 0
KVM_X86_SW_PROTECTED_VM = 1
KVM_X86_SEV_VM = 2
KVM_X86_SEV_ES_VM = 3
KVM_X86_SNP_VM = 4
KVM_X86_TDX_VM = 5

VM_TYPE_NAMES = {
    KVM_X86_DEFAULT_VM: "DEFAULT",
    KVM_X86_SW_PROTECTED_VM: "SW_PROTECTED",
    KVM_X86_SEV_VM: "SEV",
    KVM_X86_SEV_ES_VM: "SEV_ES",
    KVM_X86_SNP_VM: "SNP",
    KVM_X86_TDX_VM: "TDX",
}

#: KVM_CAP_VM_TYPES is a bitmap of 32 bits, so no type has a greater number than 31.
VM_TYPE_BITS = 32


class VmFeatures(NamedTuple):
    """What code is told about a VM when it asks.

    has_private_mem: guest_memfd slots and the PRIVATE attribute exist. has_protected_state: the
    host may be refused the vCPU's registers. pre_fault_allowed: KVM_PRE_FAULT_MEMORY works.
    has_mirrored_tdp: private memory is mapped by an external EPT with a mirror.
    """

    has_private_mem: bool
    has_protected_state: bool
    pre_fault_allowed: bool
    has_mirrored_tdp: bool


class VmKind(NamedTuple):
    """What a VM really is, whatever code believes.

    vm_type: its number. private_mem, protected_state, mirror: as in VmFeatures. shared_bit: its
    GPAs have one. launched: its measured launch has ended, or it has none.
    """

    name: str
    vm_type: int
    private_mem: bool = False
    protected_state: bool = False
    mirror: bool = False
    shared_bit: bool = False
    launched: bool = True

    @property
    def truth(self) -> VmFeatures:
        """What somebody who knows the VM would answer. Pages may be mapped ahead of any access once
        the launch has ended.
        """
        return VmFeatures(self.private_mem, self.protected_state, self.launched, self.mirror)


#: The types of Linux 6.16, at creation. SNP and TDX have a launch, during which private memory
#: cannot be mapped ahead.
KINDS = (
    VmKind("DEFAULT", KVM_X86_DEFAULT_VM),
    VmKind("SW_PROTECTED", KVM_X86_SW_PROTECTED_VM, private_mem=True),
    VmKind("SEV", KVM_X86_SEV_VM),
    VmKind("SEV_ES", KVM_X86_SEV_ES_VM, protected_state=True),
    VmKind("SNP", KVM_X86_SNP_VM, private_mem=True, protected_state=True, launched=False),
    VmKind("TDX", KVM_X86_TDX_VM, True, True, mirror=True, shared_bit=True, launched=False),
)

#: SEV-ES started with the old ioctls on a VM of type DEFAULT. Its vCPUs' state is encrypted, and
#: has_protected_state stays false on purpose: old user space shall not see new errors.
LEGACY_SEV_ES = VmKind("DEFAULT, old SEV-ES", KVM_X86_DEFAULT_VM)

#: VMs that no kernel has. The number 6 is the next free one.
HYPOTHETICAL = (
    VmKind("SEV with private memory", KVM_X86_SEV_VM, private_mem=True),
    VmKind("another mirror, shared bit", 6, True, True, mirror=True, shared_bit=True),
    VmKind("a mirror, no shared bit", 6, True, True, mirror=True),
    VmKind("a shared bit, no mirror", 6, True, True, shared_bit=True),
)

#: A way to find out.
Way = Callable[[VmKind], VmFeatures]


def by_flags(kind: VmKind) -> VmFeatures:
    """A boolean for each question, set as the VM is created, one of them again later; whether there
    is a mirror is told by the type. Any combination can be stored, senseless ones too.
    """
    mirror = kind.vm_type == KVM_X86_TDX_VM
    return VmFeatures(kind.private_mem, kind.protected_state, kind.launched, mirror)


def _types(*vm_types: int) -> int:
    return sum(1 << vm_type for vm_type in vm_types)


_PRIVATE_MEM = _types(KVM_X86_SW_PROTECTED_VM, KVM_X86_SNP_VM, KVM_X86_TDX_VM)
_PROTECTED_STATE = _types(KVM_X86_SEV_ES_VM, KVM_X86_SNP_VM, KVM_X86_TDX_VM)
_PRE_FAULT = _types(KVM_X86_DEFAULT_VM, KVM_X86_SW_PROTECTED_VM, KVM_X86_SEV_VM, KVM_X86_SEV_ES_VM)
_MIRROR = _types(KVM_X86_TDX_VM)


def by_type(kind: VmKind) -> VmFeatures:
    """One bit for the type, and a mask for each question, fixed when the kernel is compiled. No
    senseless combination is possible, nor a VM that differs from others of its type, nor an answer
    that changes while the VM lives.
    """
    bit = _types(kind.vm_type)
    masks = (_PRIVATE_MEM, _PROTECTED_STATE, _PRE_FAULT, _MIRROR)
    return VmFeatures(*(bool(bit & mask) for mask in masks))


def by_mask(kind: VmKind) -> VmFeatures:
    """What has a shared bit is a TD, and all else is not.

    Differs: no patch asked the mask for everything; those that did asked for the mirror, and for
    whether single leaves are zapped.
    """
    is_td = kind.shared_bit
    return VmFeatures(is_td, is_td, not is_td, is_td)


WAYS: dict[str, Way] = {"flags": by_flags, "type": by_type, "mask": by_mask}


def wrong_answers(kind: VmKind, way: Way) -> tuple[str, ...]:
    """Names of the questions that the way answers otherwise than the VM is."""
    pairs = zip(VmFeatures._fields, way(kind), kind.truth, strict=True)
    return tuple(name for name, said, true in pairs if said != true)


def nonsense(vm_type: int, features: VmFeatures, shared_bit: bool) -> tuple[str, ...]:
    """What is wrong with a combination that flags can store, () for one that makes sense.

    Differs: Linux checks none of it; its three places that set the flags are right instead.
    """
    is_td = vm_type == KVM_X86_TDX_VM
    rules = (
        ("a TD without private memory", is_td and not features.has_private_mem),
        ("a TD whose state is open", is_td and not features.has_protected_state),
        ("a TD without a mirror", is_td and not features.has_mirrored_tdp),
        (
            "a mirror, and nothing private",
            features.has_mirrored_tdp and not features.has_private_mem,
        ),
        ("a mirror, and no shared bit", features.has_mirrored_tdp and not shared_bit),
    )
    return tuple(why for why, broken in rules if broken)


#: By type. Source: x86.c, kvm_arch_init_vm; svm/svm.c, svm_vm_init; vmx/tdx.c, tdx_vm_init.
VM_FEATURES: dict[int, VmFeatures] = {kind.vm_type: by_flags(kind) for kind in KINDS}


# -- which types a host offers


class Offers(NamedTuple):
    """What decides which types a host has. sw_protected: the build option for it. tdp: the TDP MMU
    is on. sev, sev_es, snp: enabled. tdx: the module is up.
    """

    tdp: bool = True
    sw_protected: bool = False
    sev: bool = False
    sev_es: bool = False
    snp: bool = False
    tdx: bool = False


def kvm_caps_supported_vm_types(offers: Offers) -> int:
    """KVM_CAP_VM_TYPES: bit n is set if type n can be created.

    Source: x86.c, kvm_x86_vendor_init; svm/sev.c, sev_set_cpu_caps; vmx/main.c, vt_init.
    """
    has = {
        KVM_X86_DEFAULT_VM: True,
        KVM_X86_SW_PROTECTED_VM: offers.sw_protected and offers.tdp,
        KVM_X86_SEV_VM: offers.sev,
        KVM_X86_SEV_ES_VM: offers.sev_es,
        KVM_X86_SNP_VM: offers.snp,
        KVM_X86_TDX_VM: offers.tdx,
    }
    return _types(*(vm_type for vm_type, is_there in has.items() if is_there))


def kvm_is_vm_type_supported(vm_type: int, supported: int) -> bool:
    """May such a VM be created? supported: the bitmap. Source: x86.c, kvm_is_vm_type_supported."""
    return 0 <= vm_type < VM_TYPE_BITS and bool(supported >> vm_type & 1)
