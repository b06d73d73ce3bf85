"""A TD wired by hand over a bare machine: host, VM, back end, memory, and guests that touch it."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

from tdxlab.abi import leaves as abi
from tdxlab.abi.leaves import HOST_LEAVES
from tdxlab.abi.outcome import GuestOutcome
from tdxlab.abi.registers import Registers
from tdxlab.arch import PAGE_SHIFT, PAGE_SIZE
from tdxlab.bare import BareMachine
from tdxlab.hardware import default_platform
from tdxlab.journal import Mark
from tdxlab.kvm.gmem import GuestMemfds
from tdxlab.kvm.host import Doing, KvmHost
from tdxlab.kvm.memory_region import kvm_set_memory_region
from tdxlab.kvm.params import KVM_X86_TDX_VM, MmuParams, VmConfig
from tdxlab.kvm.set_attributes import kvm_vm_set_mem_attributes
from tdxlab.kvm.slots import KVM_MEM_GUEST_MEMFD
from tdxlab.kvm.tdx import Tdx, TdxVcpu, tdx_vm_init
from tdxlab.kvm.tdx_build import MemRegion, tdx_td_finalize, tdx_vcpu_init_mem_region
from tdxlab.kvm.tdx_init import InitVm, tdx_td_init
from tdxlab.kvm.tdx_module import tdx_bringup
from tdxlab.kvm.tdx_run import kvm_vcpu_ioctl_run
from tdxlab.kvm.tdx_teardown import kvm_destroy_vm
from tdxlab.kvm.tdx_vcpu import tdx_vcpu_create, tdx_vcpu_init
from tdxlab.kvm.user_memory import ProcessMemory
from tdxlab.kvm.vm import Vcpu, Vm
from tdxlab.steps import Operation, run

HVA = 1 << 40
SLOT_PAGES = 1 << 20


class Meddled(BareMachine):
    """A machine whose module answers some calls with statuses of our choice, without doing them.

    calls: (LP, leaf, registers) of every SEAMCALL since the boot, in order. answers: leaf -> what
    its next calls get.
    """

    def __init__(self, **platform: int) -> None:
        super().__init__(default_platform(**platform))
        self.calls: list[tuple[int, int, dict[str, int]]] = []
        self.answers: dict[int, list[int | None]] = {}

    def answer(self, leaf: int, *statuses: int | None) -> None:
        """The next calls of `leaf` get these statuses; None lets one through."""
        self.answers[leaf] = list(statuses)

    def seamcall_steps(self, lp: int, rax: int, registers: Registers) -> Operation:
        """As the machine's, unless something was ordered."""
        self.calls.append((lp, rax, registers.as_dict()))
        ordered = self.answers.get(rax)
        status = ordered.pop(0) if ordered else None
        if status is None:
            return (yield from super().seamcall_steps(lp, rax, registers))
        return status

    def names(self) -> list[str]:
        """Names of the leaves called so far, in order."""
        return [HOST_LEAVES[rax & 0xFFFF].name for _, rax, _ in self.calls]


@cache
def _booted(**platform: int) -> tuple[KvmHost, Mark]:
    host = KvmHost(Meddled(**platform))
    assert run(tdx_bringup(host)) == 0
    return host, host.journal.mark()


def boot(**platform: int) -> KvmHost:
    """A host whose module is up. One for each platform, rewound to that state: a test that wants
    two at once must build the second one itself.
    """
    host, mark = _booted(**platform)
    host.journal.rewind(mark)
    machine: Any = host.hardware
    machine.calls.clear()
    machine.answers.clear()
    assert host.current_lp == 0
    vars(host).pop("run_guest", None)
    return host


class TdScene:
    """One TD. slots: base gfns of private slots of 4 GiB each."""

    def __init__(
        self,
        host: KvmHost | None = None,
        *,
        gpaw: int = 48,
        vcpus: int = 1,
        slots: Iterable[int] = (0,),
        name: str = "TD",
        params: MmuParams | None = None,
    ) -> None:
        self.host = host or boot()
        self.machine: Any = self.host.hardware
        self.gpaw = gpaw
        config = VmConfig(vm_type=KVM_X86_TDX_VM, root_level=4 if gpaw == 48 else 5)
        self.vm = Vm(
            self.host.journal,
            self.host.memory,
            params or self.host.params,
            config,
            pages=self.host.pages,
            name=name,
        )
        self.events: list[Any] = []
        self.vm.listener = self.events.append
        self.tdx: Tdx = tdx_vm_init(self.host, self.vm)
        self.gmem = GuestMemfds(self.vm)
        self.vm.guest_memory = self.gmem
        self.user = ProcessMemory(self.vm, self.host.pages)
        self.vm.user_memory = self.user
        assert run(tdx_td_init(self.tdx, InitVm(gpaw=gpaw, max_vcpus=max(vcpus, 1)))) == 0
        self.files = [self._add_slot(number, base) for number, base in enumerate(slots)]
        self.vcpus = [self._add_vcpu(number) for number in range(vcpus)]

    def _add_slot(self, number: int, base: int) -> int:
        gmem = self.gmem.create(SLOT_PAGES << PAGE_SHIFT)
        hva = HVA + (number << 36)
        self.user.mmap(hva, SLOT_PAGES << PAGE_SHIFT)
        flags = KVM_MEM_GUEST_MEMFD
        setting = kvm_set_memory_region(self.vm, number, base, SLOT_PAGES, flags, hva, gmem)
        assert run(setting) == 0
        assert run(kvm_vm_set_mem_attributes(self.vm, base, base + SLOT_PAGES, True)) == 0
        return gmem

    def _add_vcpu(self, number: int) -> TdxVcpu:
        vcpu = tdx_vcpu_create(self.tdx, number)
        assert isinstance(vcpu, TdxVcpu)
        lp = number % self.machine.cpu.count
        assert run(self.host.on_cpu(lp, tdx_vcpu_init(vcpu, 0))) == 0
        return vcpu

    # -- building

    def add(self, gfn: int, pages: int = 1, *, flags: int = 1) -> int:
        """KVM_TDX_INIT_MEM_REGION; returns 0 or -errno."""
        region = MemRegion(HVA, gfn << PAGE_SHIFT, pages)
        ret, _ = run(self.host.on_cpu(0, tdx_vcpu_init_mem_region(self.vcpus[0], region, flags)))
        return int(ret)

    def finalize(self) -> int:
        """KVM_TDX_FINALIZE_VM."""
        return int(run(tdx_td_finalize(self.tdx)))

    # -- running

    def run(self, guest: list[Any], vcpu: int = 0, lp: int | None = None) -> Any:
        """KVM_RUN with a guest that does what the list says, accesses that fault again and again.

        An item is a gfn to accept and touch, or (function, arguments...) for a TDCALL.
        """
        where = vcpu % self.machine.cpu.count if lp is None else lp
        self.play(guest)
        return run(self.host.on_cpu(where, kvm_vcpu_ioctl_run(self.vcpus[vcpu])))

    def play(self, guest: list[Any]) -> None:
        """Every guest from now on does what the list says, then waits for an interrupt."""

        def run_guest(vcpu: Vcpu, lp: int) -> Doing:
            while lp not in self.host.exits:
                yield ("guest", lp)
                if not self.machine.cpu.vcpu_inside(lp):
                    continue
                if not guest:
                    vcpu.signal_pending = True
                    self.host.take_out(lp)
                    return
                self._step(guest, lp)

        self.host.run_guest = run_guest  # type: ignore[method-assign]

    def _step(self, guest: list[Any], lp: int) -> None:
        what = guest[0]
        outcome = self.accept(lp, what) if isinstance(what, int) else what(lp)
        if outcome.exited:
            self.host.deliver_exit(lp, outcome)
            if not isinstance(what, int):
                guest.pop(0)
        else:
            guest.pop(0)

    def accept(self, lp: int, gfn: int) -> GuestOutcome:
        """The guest accepts a page."""
        registers = Registers(rcx=gfn << PAGE_SHIFT)
        outcome: GuestOutcome = self.machine.tdcall(lp, abi.TDG_MEM_PAGE_ACCEPT, registers)
        return outcome

    def vmcall(self, **registers: int) -> Any:
        """A guest step: TDG.VP.VMCALL that shows the host R10 to R15."""
        return lambda lp: self.machine.tdcall(lp, 0, Registers(rcx=0xFC00, **registers))

    def fault_in(self, gfns: Iterable[int], vcpu: int = 0) -> None:
        """The guest accepts all these pages, and leaves for a signal."""
        self.run(list(gfns), vcpu)
        self.vcpus[vcpu].signal_pending = False

    # -- the end

    def close_files(self) -> None:
        """The last close of every guest_memfd."""
        for gmem in self.files:
            run(self.gmem.release(gmem))

    def destroy(self) -> None:
        """The VM's end, as the kernel does it."""
        self.close_files()
        run(kvm_destroy_vm(self.tdx))

    # -- counting

    def count(self) -> dict[str, int]:
        """Leaf name -> SEAMCALLs so far."""
        calls = self.machine.trace.seamcalls()
        return {HOST_LEAVES[leaf].name: number for leaf, number in calls.items()}

    def since(self, before: dict[str, int]) -> dict[str, int]:
        """What was called since `before`."""
        now = self.count()
        return {
            name: number - before.get(name, 0)
            for name, number in now.items()
            if number > before.get(name, 0)
        }


def tables(gfns: Iterable[int], gpaw: int) -> int:
    """Secure EPT tables that these gfns need, all but the root: the cost model's T(S)."""
    levels = 4 if gpaw == 48 else 5
    wanted = set(gfns)
    return sum(len({gfn >> 9 * level for gfn in wanted}) for level in range(1, levels))


__all__ = ["HVA", "PAGE_SIZE", "SLOT_PAGES", "Meddled", "TdScene", "boot", "tables"]
