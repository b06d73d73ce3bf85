"""How KVM_RUN comes back to user space: kvm_run.exit_reason and what belongs to it.

Source: Linux 6.16, include/uapi/linux/kvm.h (struct kvm_run).
"""

from __future__ import annotations

from errno import EFAULT, EINTR
from typing import NamedTuple

from tdxlab.kvm.vm import MemoryFault

#: Hypercall by which a guest asks for memory of the other kind. Source: uapi/linux/kvm_para.h.
KVM_HC_MAP_GPA_RANGE = 12
#: Attribute of that hypercall: the pages are to be private.
KVM_MAP_GPA_RANGE_ENCRYPTED = 1 << 4
#: Flag of a hypercall exit: the guest is in 64-bit mode. Source: uapi/linux/kvm.h.
KVM_EXIT_HYPERCALL_LONG_MODE = 1 << 0


class Failed(NamedTuple):
    """KVM_RUN failed without an exit reason. error: -errno."""

    error: int


class MemoryFaultExit(NamedTuple):
    """KVM_EXIT_MEMORY_FAULT, with -EFAULT: memory is not of the kind that the access was for.

    gpa, size: bytes. flags: KVM_MEMORY_EXIT_FLAG_PRIVATE if the access was private.
    """

    gpa: int
    size: int
    flags: int


class HypercallExit(NamedTuple):
    """KVM_EXIT_HYPERCALL. nr: KVM_HC_*. args: its arguments. User space answers in
    `vcpu.hypercall_ret`: 0, or an error.
    """

    nr: int
    args: tuple[int, ...]
    flags: int


class MmioExit(NamedTuple):
    """KVM_EXIT_MMIO. phys_addr: bytes, without the shared bit. data: what is written, or None for a
    read, which user space answers in `vcpu.mmio_data`.
    """

    phys_addr: int
    size: int
    data: int | None


class SystemEventExit(NamedTuple):
    """KVM_EXIT_SYSTEM_EVENT: the guest reported that it cannot go on. data: the registers."""

    data: tuple[int, ...]


class TdxExit(NamedTuple):
    """KVM_EXIT_TDX: a request that user space must serve. nr: TDVMCALL_*; args: its registers."""

    nr: int
    args: tuple[int, ...]


class IoExit(NamedTuple):
    """KVM_EXIT_IO. port, size: bytes. data: what is written, None for a read."""

    port: int
    size: int
    data: int | None


class ShutdownExit(NamedTuple):
    """KVM_EXIT_SHUTDOWN: a triple fault."""


class FailEntry(NamedTuple):
    """KVM_EXIT_FAIL_ENTRY: the CPU would not enter. reason: exit reason. cpu: LP."""

    reason: int
    cpu: int


class InternalError(NamedTuple):
    """KVM_EXIT_INTERNAL_ERROR: an exit that nobody expected. data: status of VP.ENTER, LP."""

    data: tuple[int, ...]


class Interrupted(NamedTuple):
    """KVM_EXIT_INTR, with -EINTR: a signal is pending."""


KvmExit = (
    Failed
    | MemoryFaultExit
    | HypercallExit
    | MmioExit
    | SystemEventExit
    | TdxExit
    | IoExit
    | ShutdownExit
    | FailEntry
    | InternalError
    | Interrupted
)


def make_exit(ret: int, run: KvmExit | None, memory_fault: MemoryFault | None) -> KvmExit:
    """What user space sees of a KVM_RUN that ended with `ret`: 0 for `run`, or -errno."""
    if ret == 0 and run is not None:
        return run
    if ret == -EFAULT and memory_fault is not None:
        return MemoryFaultExit(*memory_fault)
    return Interrupted() if ret == -EINTR else Failed(ret)
