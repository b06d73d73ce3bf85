"""What every vCPU does around its entry into the guest, whatever the kind of its VM.

Source: Linux 6.16, arch/x86/kvm/x86.c, vcpu_enter_guest.
"""

from __future__ import annotations

from collections.abc import Generator

from tdxlab.kvm.vm import IN_GUEST_MODE, Vcpu
from tdxlab.steps import Step


def announce_entry(vcpu: Vcpu) -> Generator[Step, None, bool]:
    """Say that the vCPU is in the guest, let go of the memslots, and look for requests once more:
    whoever asks from now on kicks. Returns True if the vCPU may go in.

    Source: x86.c, vcpu_enter_guest and kvm_vcpu_exit_request.
    """
    yield ("smp_store_release(mode)", vcpu.vcpu_id)
    vcpu.mode = IN_GUEST_MODE
    stop_reading_memslots(vcpu)
    yield ("kvm_vcpu_exit_request", vcpu.vcpu_id)
    return not (vcpu.requests or vcpu.signal_pending)


def stop_reading_memslots(vcpu: Vcpu) -> None:
    """Let go of the memslots, if the vCPU reads them.

    Source: kvm_host.h, kvm_vcpu_srcu_read_unlock."""
    if vcpu.srcu_index >= 0:
        vcpu.vm.srcu.read_unlock(vcpu.srcu_index)
        vcpu.srcu_index = -1
