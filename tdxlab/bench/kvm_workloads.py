"""The measured work that goes through KVM: a page fault of private memory, and a conversion.

As in `workloads`, once for the model and once for the baseline: the same guest memory, tables
present, pages mapped in the same order. A fault is a write that somebody makes for the first time:
KVM's whole path, the mirror and the module. A conversion makes 2 MiB of mapped pages shared.
"""

from __future__ import annotations

from itertools import count
from typing import Protocol

from tdxlab import steps
from tdxlab.arch import PAGE_SIZE, SIZE_2M
from tdxlab.bench.baseline import Baseline
from tdxlab.bench.baseline_mmu import BaselineMmu
from tdxlab.bench.workloads import PAGES, TD_PARAMS, as_trace_platform, best_slice
from tdxlab.hardware import default_platform
from tdxlab.kvm.attributes import KVM_MEMORY_ATTRIBUTE_PRIVATE
from tdxlab.kvm.fault import kvm_mmu_page_fault
from tdxlab.kvm.page_fault import (
    PFERR_GUEST_FINAL_MASK,
    PFERR_PRIVATE_ACCESS,
    PFERR_WRITE_MASK,
    RET_PF_FIXED,
)
from tdxlab.kvm.roots import kvm_mmu_reload
from tdxlab.kvm.set_attributes import kvm_vm_ioctl_set_mem_attributes
from tdxlab.machine import Machine

_PRIVATE_WRITE = PFERR_GUEST_FINAL_MASK | PFERR_WRITE_MASK | PFERR_PRIVATE_ACCESS
_GFNS = SIZE_2M // PAGE_SIZE


class KvmBench(Protocol):
    """One side: a TD that runs, all of its memory private and none of it mapped."""

    def fault(self, gpa: int) -> int:
        """A write to `gpa`, private: RET_PF_* or -errno."""
        ...

    def convert(self, gpa: int, size: int, *, private: bool) -> int:
        """Make `size` bytes private or shared: 0 or -errno."""
        ...


class ModelKvm:
    """The model's side. pages: of guest memory, from GPA 0 on. memory: of the machine."""

    def __init__(self, pages: int = PAGES, memory: str = "2 GiB") -> None:
        self.machine = Machine(memory=memory)
        self.td = self.machine.create_td(memory=pages * PAGE_SIZE)
        self.vcpu = self.td.vcpu(0)
        steps.run(self.td.host.on_cpu(0, kvm_mmu_reload(self.vcpu)))

    def fault(self, gpa: int) -> int:
        """A write to `gpa`, private: RET_PF_* or -errno."""
        result: int = steps.run(kvm_mmu_page_fault(self.vcpu, gpa, _PRIVATE_WRITE))
        return result

    def faulting(self, gpa: int) -> steps.Operation:
        """The same write, not started."""
        return kvm_mmu_page_fault(self.vcpu, gpa, _PRIVATE_WRITE)

    def convert(self, gpa: int, size: int, *, private: bool) -> int:
        """Make `size` bytes private or shared: 0 or -errno."""
        attributes = KVM_MEMORY_ATTRIBUTE_PRIVATE if private else 0
        operation = kvm_vm_ioctl_set_mem_attributes(self.td.vm, gpa, size, attributes)
        result: int = steps.run(operation)
        return result


class BaselineKvm:
    """The baseline's side, on the same platform."""

    def __init__(self, pages: int = PAGES) -> None:
        platform = default_platform(tdmr_gib=2)
        self.module = Baseline()
        self.module.boot(as_trace_platform(platform))
        free = count(platform.tdmrs[0].base, PAGE_SIZE)
        keyid = platform.private_keyids[0] + 1
        tdr = self.module.build_td(free, keyid, TD_PARAMS, range(0))
        self.mmu = BaselineMmu(self.module, tdr, keyid, free, 0, pages)

    def fault(self, gpa: int) -> int:
        """A write to `gpa`, private: RET_PF_* or -errno."""
        return self.mmu.fault(gpa)

    def convert(self, gpa: int, size: int, *, private: bool) -> int:
        """Make `size` bytes private or shared: 0 or -errno."""
        return self.mmu.convert(gpa >> 12, gpa + size >> 12, private)


def kvm_round(bench: KvmBench, pages: int = PAGES) -> dict[str, float]:
    """Make the tables, fault every page in, convert all; CPU seconds a page of each kind of work.

    Raises RuntimeError where one of them fails. pages: a multiple of 512.
    """

    def fault(number: int) -> None:
        if number % _GFNS and bench.fault(number * PAGE_SIZE) != RET_PF_FIXED:
            raise RuntimeError(f"the fault of page {number} failed")

    def convert(number: int) -> None:
        if number % _GFNS == 0 and bench.convert(number * PAGE_SIZE, SIZE_2M, private=False):
            raise RuntimeError(f"the conversion from page {number} on failed")

    for number in range(0, pages, _GFNS):
        bench.fault(number * PAGE_SIZE)
    return {"fault": best_slice(fault, pages), "convert": best_slice(convert, pages, _GFNS)}
