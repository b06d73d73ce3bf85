"""TDG.VP.VMCALL<MapGPA>: the guest asks for a range of memory to become shared or private.

KVM changes nothing itself. It tells user space, at most 2 MiB at a time, with KVM_EXIT_HYPERCALL;
user space converts the memory and runs the vCPU again.

Source: Linux 6.16, arch/x86/kvm/vmx/tdx.c (tdx_map_gpa, __tdx_map_gpa,
tdx_complete_vmcall_map_gpa).
"""

from __future__ import annotations

from tdxlab.arch import PAGE_SHIFT, PAGE_SIZE, SIZE_2M
from tdxlab.bits import MASK64
from tdxlab.kvm.exits import (
    KVM_EXIT_HYPERCALL_LONG_MODE,
    KVM_HC_MAP_GPA_RANGE,
    KVM_MAP_GPA_RANGE_ENCRYPTED,
    HypercallExit,
)
from tdxlab.kvm.tdx import TdxVcpu
from tdxlab.kvm.tdx_build import is_private_gpa

#: Bytes that user space is asked to convert at once. Source: tdx.c.
TDX_MAP_GPA_MAX_LEN = SIZE_2M

# -- what a VMCALL returns in R10. Source: asm/shared/tdx.h

TDVMCALL_STATUS_SUCCESS = 0
TDVMCALL_STATUS_RETRY = 1
TDVMCALL_STATUS_INVALID_OPERAND = 1 << 63
TDVMCALL_STATUS_ALIGN_ERROR = 1 << 63 | 2
TDVMCALL_STATUS_SUBFUNC_UNSUPPORTED = 1 << 63 | 3


def tdx_map_gpa(vcpu: TdxVcpu) -> int:
    """The guest's request: R12 = GPA with or without the SHARED bit, R13 = bytes.

    Returns 0: to user space; 1: back to the guest with the status in R10 and the GPA in R11. In
    order: SUBFUNC_UNSUPPORTED: user space does not take such exits; INVALID_OPERAND: nothing, a
    range that wraps around, is not in the guest's address space, or crosses the SHARED bit;
    ALIGN_ERROR: not whole pages.
    """
    gpa, size = vcpu.arg("r12"), vcpu.arg("r13")
    status = _check(vcpu, gpa, size)
    if status:
        vcpu.answer(r10=status, r11=gpa)
        return 1
    vcpu.map_gpa_next, vcpu.map_gpa_end = gpa, gpa + size
    return _ask_user_space(vcpu)


def _check(vcpu: TdxVcpu, gpa: int, size: int) -> int:
    end = gpa + size
    shared_bit = vcpu.vm.gfn_direct_bits << PAGE_SHIFT
    if not vcpu.tdx.exits_on_map_gpa:
        return TDVMCALL_STATUS_SUBFUNC_UNSUPPORTED
    if not size or end > MASK64 or end > 2 * shared_bit:
        return TDVMCALL_STATUS_INVALID_OPERAND
    if is_private_gpa(vcpu.vm, gpa) != is_private_gpa(vcpu.vm, end - 1):
        return TDVMCALL_STATUS_INVALID_OPERAND
    return TDVMCALL_STATUS_ALIGN_ERROR if (gpa | size) % PAGE_SIZE else TDVMCALL_STATUS_SUCCESS


def _ask_user_space(vcpu: TdxVcpu) -> int:
    """The next piece goes to user space; returns 0. Its answer is 0 unless it says otherwise."""
    gpa = vcpu.map_gpa_next
    size = min(vcpu.map_gpa_end - gpa, TDX_MAP_GPA_MAX_LEN)
    attributes = KVM_MAP_GPA_RANGE_ENCRYPTED if is_private_gpa(vcpu.vm, gpa) else 0
    plain = gpa & ~(vcpu.vm.gfn_direct_bits << PAGE_SHIFT)
    vcpu.hypercall_ret = 0
    vcpu.run = HypercallExit(
        KVM_HC_MAP_GPA_RANGE,
        (plain, size // PAGE_SIZE, attributes),
        KVM_EXIT_HYPERCALL_LONG_MODE,
    )
    vcpu.completion = "MapGPA"
    return 0


def tdx_complete_vmcall_map_gpa(vcpu: TdxVcpu) -> int:
    """User space has answered. Returns 0: to user space with the next piece; 1: to the guest.

    An error becomes INVALID_OPERAND; with an event waiting for the guest the rest is left to it:
    RETRY; both with the GPA from which on nothing was done in R11.
    """
    if vcpu.hypercall_ret:
        vcpu.answer(r10=TDVMCALL_STATUS_INVALID_OPERAND, r11=vcpu.map_gpa_next)
        return 1
    vcpu.map_gpa_next += TDX_MAP_GPA_MAX_LEN
    if vcpu.map_gpa_next >= vcpu.map_gpa_end:
        return 1
    if vcpu.pending_events:
        vcpu.answer(r10=TDVMCALL_STATUS_RETRY, r11=vcpu.map_gpa_next)
        return 1
    return _ask_user_space(vcpu)
