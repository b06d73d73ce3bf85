"""The host that KVM runs on: its processors, its free pages, its KeyIDs, the door to the module.

One `KvmHost` serves all VMs of a machine. A thread of the kernel is a step generator that runs on
one logical processor: `host.on_cpu(lp, operation)` says on which, and `current_lp` tells whoever
needs it.

Source: Linux 6.16, virt/kvm/kvm_main.c (kvm_make_all_cpus_request), kernel/smp.c
(smp_call_function_*), arch/x86/virt/vmx/tdx/tdx.c (KeyIDs).
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, NamedTuple, Protocol

from tdxlab.abi.outcome import GuestOutcome
from tdxlab.abi.registers import Registers
from tdxlab.cpu import Cpu
from tdxlab.hardware import Platform, Region
from tdxlab.journal import Field, Fields, Journal, Journalled, Row, Table
from tdxlab.kvm.locks import Mutex
from tdxlab.kvm.pages import HostPages
from tdxlab.kvm.params import MmuParams
from tdxlab.kvm.vm import OUTSIDE_GUEST_MODE, Vcpu, Vm
from tdxlab.memory import Memory
from tdxlab.steps import WAIT, Operation, Step

#: No KeyID: what a TD has before it is initialised is 0, and after it gave its KeyID back -1.
NO_HKID = -1

# -- states of the module as the kernel sees it. Source: arch/x86/virt/vmx/tdx/tdx.h

TDX_MODULE_UNINITIALIZED = "UNINITIALIZED"
TDX_MODULE_INITIALIZED = "INITIALIZED"
TDX_MODULE_ERROR = "ERROR"

#: What the host counts itself. clflush: pages that a SEAMCALL wrapper flushed from the caches (64
#: lines each). ipi: interrupts sent to other LPs. kick: calls of kvm_make_all_cpus_request that
#: wait for vCPUs to leave the guest. invept: global INVEPTs.
HOST_COUNTERS = ("clflush", "ipi", "kick", "invept")
_COUNTER_WORDS = {name: word for word, name in enumerate(HOST_COUNTERS)}
#: Place of the counter that nearly every SEAMCALL wrapper adds to.
CLFLUSH = _COUNTER_WORDS["clflush"]

Doing = Generator[Step, None, None]


class Hardware(Protocol):
    """The machine under the host: processors, memory and a TDX module behind SEAMCALL."""

    journal: Journal
    memory: Memory
    cpu: Cpu
    platform: Platform

    def seamcall_steps(self, lp: int, rax: int, registers: Registers) -> Operation:
        """SEAMCALL on `lp`: registers in and out; returns RAX, or IN_GUEST after TDH.VP.ENTER."""
        ...

    def store(self, hpa: int, data: bytes) -> None:
        """The host stores `data` at `hpa` under KeyID 0."""
        ...

    def clear(self, hpa: int) -> None:
        """64 MOVDIR64B of zeros over the page at `hpa`."""
        ...

    def kick(self, lp: int) -> GuestOutcome:
        """An IPI takes the vCPU out of `lp`; returns its TD exit."""
        ...


class TdExit(NamedTuple):
    """A TD exit that waits for the thread that entered. status: RAX of TDH.VP.ENTER; registers:
    name and value of each register that is not zero.
    """

    status: int
    registers: tuple[tuple[str, int], ...]


class _Running:
    """Where the thread that is being driven runs. lp: a number, 0 outside of any thread."""

    __slots__ = ("lp",)

    def __init__(self) -> None:
        self.lp = 0


class KvmHost(Journalled):
    """The kernel of one machine, as far as all its VMs share it.

    hardware: the machine. params: CPU facts and module parameters of KVM. pages: host memory that
    KVM may use, for guests too; None for all convertible memory of the platform.
    module_status: TDX_MODULE_*. nr_configured_hkids: KeyIDs that TDs have. hkids: KeyID -> name of
    its TD. exits: LP -> TdExit that its thread has not yet seen. ipis: LPs with an interrupt that
    they have not yet taken. associated: LP -> vCPUs that may have state cached there. vm_list: the
    VMs that exist, the oldest first. tdx_lock: one mutex for the SEAMCALLs that want the module's
    KeyID table. current_lp: smp_processor_id() of the thread that runs. running: holds it.
    Refuses a machine without memory for guests: ValueError.
    """

    module_status: Field[str] = Field(TDX_MODULE_UNINITIALIZED)
    nr_configured_hkids = Field(0)
    sysinfo: Field[Any] = Field(None)
    cpus_initialised: Field[frozenset[int]] = Field(frozenset())
    vm_list: Field[tuple[Vm, ...]] = Field(())

    def __init__(
        self,
        hardware: Hardware,
        *,
        params: MmuParams | None = None,
        pages: HostPages | None = None,
    ) -> None:
        self.hardware = hardware
        self.journal = hardware.journal
        self.memory = hardware.memory
        self.params = params or MmuParams()
        self.pages = pages or HostPages(self.journal, tdx_memory(hardware.platform))
        self.fields = Fields(self.journal, self)
        self.hkids = Table(self.journal)
        self.exits = Table(self.journal)
        self.ipis = Table(self.journal)
        self.associated = Table(self.journal)
        self.tdx_lock = Mutex(self.journal, "tdx_lock")
        self.counters = Row(self.journal, len(HOST_COUNTERS))
        self.running = _Running()

    # -- counting

    def count(self, name: str, amount: int = 1) -> None:
        """Add to a counter of HOST_COUNTERS."""
        word, counters = _COUNTER_WORDS[name], self.counters
        counters.cells[word] = counters.view[word] + amount

    @property
    def counts(self) -> dict[str, int]:
        """Name -> value of every counter."""
        return dict(zip(HOST_COUNTERS, self.counters.view, strict=False))

    # -- VMs

    def add_vm(self, vm: Vm) -> None:
        """A VM is created. Source: kvm_main.c, kvm_create_vm."""
        self.vm_list = (*self.vm_list, vm)

    def remove_vm(self, vm: Vm) -> None:
        """A VM is destroyed. Source: kvm_main.c, kvm_destroy_vm.

        Differs: it leaves the list when all its pages are given back, in Linux before.
        """
        self.vm_list = tuple(other for other in self.vm_list if other is not vm)

    # -- threads and processors

    @property
    def current_lp(self) -> int:
        """smp_processor_id() of the thread that runs."""
        return self.running.lp

    def on_cpu(self, lp: int, operation: Operation) -> Operation:
        """Run `operation` as a thread on `lp`; yields and returns what it does."""
        running = self.running
        try:
            while True:
                caller, running.lp = running.lp, lp
                try:
                    step = next(operation)
                except StopIteration as end:
                    return end.value
                finally:
                    running.lp = caller
                yield step
        finally:
            operation.close()

    def smp_call(self, lp: int, operation: Operation) -> Operation:
        """IPI `lp`, let it run `operation` in its interrupt handler, and wait for the result.

        Source: kernel/smp.c, smp_call_function_single with wait. The own LP gets no interrupt.
        """
        if lp != self.current_lp:
            yield ("smp_call_function_single", lp)
            self.count("ipi")
            self.take_out(lp)
        return (yield from self.on_cpu(lp, operation))

    def package_lps(self) -> list[int]:
        """The first LP of every package. Source: vmx/tdx.c, one CPU per package."""
        package_of = self.hardware.cpu.package_of
        return [package_of.index(package) for package in self.hardware.cpu.packages]

    # -- guests inside LPs

    def deliver_exit(self, lp: int, outcome: GuestOutcome) -> None:
        """The guest inside `lp` left: keep its TD exit for the thread that entered it.

        Refuses an outcome that is no exit: ValueError.
        """
        if not outcome.exited:
            raise ValueError(f"the guest on LP {lp} goes on; only a TD exit can be delivered")
        self.exits.put(lp, TdExit(outcome.status, outcome.registers.nonzero()))

    def take_exit(self, lp: int) -> TdExit:
        """The exit that was delivered to `lp`, once."""
        found: TdExit = self.exits[lp]
        self.exits.drop(lp)
        return found

    def take_out(self, lp: int) -> bool:
        """An interrupt arrives at `lp`: a guest inside leaves at once. True if there was one."""
        if not self.hardware.cpu.vcpu_inside(lp):
            return False
        self.deliver_exit(lp, self.hardware.kick(lp))
        return True

    def run_guest(self, vcpu: Vcpu, lp: int) -> Doing:
        """The vCPU is inside `lp`: wait until somebody delivers its TD exit.

        Who plays the guest either drives it beside this thread, or puts a generator of his own in
        the place of this method: it gets the vCPU and the LP and ends when the exit is delivered.
        """
        while lp not in self.exits:
            yield (WAIT, "TD exit", lp)

    def kick_all(self, vm: Vm, request: str) -> Doing:
        """IPI every vCPU that is not outside guest mode, but not the own LP, and wait until all
        have taken it. It leaves no request behind.

        Source: kvm_main.c, kvm_make_all_cpus_request with a request that has KVM_REQUEST_WAIT and
        KVM_REQUEST_NO_ACTION.
        """
        yield ("kvm_make_all_cpus_request", request)
        if vm.listener is not None:
            vm.emit("kvm_make_all_cpus_request", request)
        self.count("kick")
        for vcpu in self.interrupt_all(vm):
            while vcpu.cpu in self.ipis and vcpu.mode != OUTSIDE_GUEST_MODE:
                yield (WAIT, "IPI", vcpu.cpu)

    def interrupt_all(self, vm: Vm) -> list[Vcpu]:
        """`interrupt_vcpu` for all of a VM; returns those that have yet to take the interrupt."""
        return [
            vcpu
            for vcpu in vm.vcpus
            if vcpu.mode != OUTSIDE_GUEST_MODE and self.interrupt_vcpu(vcpu)
        ]

    def interrupt_vcpu(self, vcpu: Vcpu) -> bool:
        """Send the vCPU's LP an interrupt if it is in guest mode elsewhere; True if it must yet be
        taken: the vCPU is on its way in or out. Source: kvm_main.c, kvm_make_vcpu_request.
        """
        if vcpu.mode == OUTSIDE_GUEST_MODE or vcpu.cpu == self.current_lp:
            return False
        self.count("ipi")
        if self.take_out(vcpu.cpu) or vcpu.cpu in self.exits:
            return False
        self.ipis.put(vcpu.cpu, True)
        return True

    def enable_interrupts(self, lp: int) -> None:
        """`lp` takes what interrupts wait for it."""
        if lp in self.ipis:
            self.ipis.drop(lp)

    def invept_global(self, lp: int) -> None:
        """INVEPT global on `lp`: nothing of any EPT stays in its TLB."""
        self.count("invept")
        self.hardware.cpu.invept_global(lp)

    # -- KeyIDs

    @property
    def global_keyid(self) -> int:
        """The first private KeyID: the module's own. Source: tdx.c, tdx_init."""
        return self.hardware.platform.private_keyids[0]

    @property
    def guest_keyids(self) -> range:
        """The KeyIDs that TDs can have. Source: tdx.c, tdx_init."""
        first, last = self.hardware.platform.private_keyids
        return range(first + 1, last + 1)

    def tdx_guest_keyid_alloc(self, name: str) -> int:
        """The lowest free KeyID for the TD `name`, or NO_HKID.

        Source: tdx.c, tdx_guest_keyid_alloc. Differs: NO_HKID where Linux has -ENOSPC.
        """
        for keyid in self.guest_keyids:
            if keyid not in self.hkids:
                self.hkids.put(keyid, name)
                return keyid
        return NO_HKID

    def tdx_guest_keyid_free(self, keyid: int) -> None:
        """The KeyID can go to another TD. Source: tdx.c, tdx_guest_keyid_free."""
        self.hkids.drop(keyid)

    def mk_keyed_paddr(self, hkid: int, hpa: int) -> int:
        """`hpa` under KeyID `hkid`. Source: asm/tdx.h, mk_keyed_paddr."""
        return hpa | hkid << self.memory.keyid_shift


def tdx_memory(platform: Platform) -> list[Region]:
    """The memory that Linux would give to the module: every convertible region.

    Source: arch/x86/virt/vmx/tdx/tdx.c, build_tdx_memlist.
    Differs: all RAM above 1 MiB in Linux; low memory is not convertible on a machine here, and the
    module would refuse it.
    """
    return sorted(platform.cmrs)
