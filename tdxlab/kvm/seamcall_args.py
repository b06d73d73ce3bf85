"""What goes into a SEAMCALL and what comes out, as KVM's wrappers see it.

Source: Linux 6.16, arch/x86/include/asm/tdx.h, arch/x86/include/asm/shared/tdx.h,
arch/x86/kvm/vmx/tdx_arch.h, arch/x86/kvm/vmx/tdx_errno.h.
"""

from __future__ import annotations

from typing import NamedTuple

from tdxlab.abi.status import (
    TDX_OPERAND_BUSY,
    TDX_OPERAND_INVALID,
    describe,
)
from tdxlab.bits import Bits, Word

#: Compares a status without its operand: the upper half.
TDX_SEAMCALL_STATUS_MASK = 0xFFFF_FFFF_0000_0000

#: Statuses that the kernel itself makes of a SEAMCALL instruction that failed.
TDX_SW_ERROR = 0x8000_FF00_0000_0000

# -- fields of the metadata. Source: vmx/tdx_arch.h; virt/vmx/tdx/tdx_global_metadata.c

TD_TDCS_EXEC_TSC_OFFSET = 0x1110_0003_0000_000A
TD_TDCS_EXEC_TSC_MULTIPLIER = 0x1110_0003_0000_000B
#: VMCS encodings in a TD's VMCS (class 0).
SHARED_EPT_POINTER = 0x203C
POSTED_INTR_NV = 0x0002
POSTED_INTR_DESC_ADDR = 0x2016
PIN_BASED_VM_EXEC_CONTROL = 0x4000
PIN_BASED_POSTED_INTR = 1 << 7
#: Management class 32: an NMI waits for the guest.
TD_VCPU_PEND_NMI = 32 << 56 | 11
#: Class 17, not architectural: bit 0 says that an interrupt waits in the virtual APIC.
TD_VCPU_STATE_DETAILS_NON_ARCH = 1 << 63 | 17 << 56 | 0x100

#: What a wrapper with extended outputs returns: the status, ext_err1, ext_err2. The two words are
#: only logged; of the MEM leaves they are the Secure EPT entry at which the walk stopped, and its
#: level and state.
Answer = tuple[int, int, int]

#: Masks of VP.WR: every bit of a field of that width.
MASK_8, MASK_16, MASK_64 = (1 << 8) - 1, (1 << 16) - 1, (1 << 64) - 1


class GpaLevel(Word):
    """RCX of the MEM leaves: a private GPA and a level of the Secure EPT."""

    sept_level = Bits(2, 0)
    gpa = Bits(51, 12, in_place=True)


class TdxTd(NamedTuple):
    """struct tdx_td. tdr: HPA of the TDR page, 0 before it exists. tdcs: HPAs of the TDCS pages
    that the module has. tdcx_pages: TDCX pages that each vCPU needs beside its TDVPR.
    """

    tdr: int = 0
    tdcs: tuple[int, ...] = ()
    tdcx_pages: int = 0


class TdxVp(NamedTuple):
    """struct tdx_vp. tdvpr: HPA of the TDVPR page, 0 before it exists. tdcx: HPAs of the TDCX pages
    that the module has.
    """

    tdvpr: int = 0
    tdcx: tuple[int, ...] = ()


class Reclaimed(NamedTuple):
    """What TDH.PHYMEM.PAGE.RECLAIM says of the page, for error messages only."""

    status: int
    page_type: int
    owner: int
    size: int


def pg_level_to_tdx_sept_level(level: int) -> int:
    """KVM's level as the module counts it. Source: vmx/tdx_arch.h."""
    return level - 1


def tdx_operand_busy(status: int) -> bool:
    """Some operand was locked by somebody else. Source: vmx/tdx.c."""
    return status & TDX_SEAMCALL_STATUS_MASK == TDX_OPERAND_BUSY


def tdx_operand_invalid(status: int) -> bool:
    """Some operand was not valid. Source: vmx/tdx.c, __tdx_td_init."""
    return status & TDX_SEAMCALL_STATUS_MASK == TDX_OPERAND_INVALID


def failure(name: str, status: int, *words: int) -> str:
    """The line that KVM prints for a SEAMCALL that failed. Source: vmx/tdx.c, pr_tdx_error*."""
    shown = "".join(
        f", {register} {word:#x}"
        for register, word in zip(("rcx", "rdx", "r8"), words, strict=False)
    )
    return f"SEAMCALL {name} failed: {status:#x} ({describe(status)}){shown}"
