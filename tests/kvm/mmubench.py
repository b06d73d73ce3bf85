"""A VM for tests of its MMU alone: tables in RAM, noted events, an external EPT of hooks."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

from tdxlab.hardware import Region
from tdxlab.journal import Journal
from tdxlab.kvm import caches, roots
from tdxlab.kvm.locks import MmuLock, NoLock
from tdxlab.kvm.pages import NO_PAGE, HostPages
from tdxlab.kvm.params import KVM_X86_DEFAULT_VM, KVM_X86_TDX_VM, MmuParams, VmConfig
from tdxlab.kvm.role import ACC_ALL, LEVEL_MASK, child_role
from tdxlab.kvm.slots import Slot
from tdxlab.kvm.spte import SPTE_MMU_PRESENT_MASK, is_last_spte, make_spte
from tdxlab.kvm.tdp_iter import TdpIter, gfn_root_bits
from tdxlab.kvm.tdp_set import tdp_mmu_link_sp, tdp_mmu_set_spte_atomic
from tdxlab.kvm.vm import MmuPage, Vcpu, Vm
from tdxlab.memory import Memory
from tdxlab.steps import Step, run
from tdxlab.trace import Trace

SHARED_BIT = 1 << 35
SLOT = Slot(0, 0, 0, 0x1000, 0, 0x1000_0000)


class Hooks:
    """An external EPT that only notes what it is told. errors: hook -> what it returns."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.errors: dict[str, int] = {}

    def _note(self, *call: Any) -> Generator[Step, None, int]:
        yield call
        self.calls.append(call)
        return self.errors.get(call[0], 0)

    def link_external_spt(self, gfn: int, level: int, external_spt: int) -> Any:
        return self._note("link", gfn, level)

    def set_external_spte(self, gfn: int, level: int, pfn: int) -> Any:
        return self._note("set", gfn, level, pfn)

    def remove_external_spte(self, gfn: int, level: int, pfn: int) -> Any:
        return self._note("remove", gfn, level, pfn)

    def free_external_spt(self, gfn: int, level: int, external_spt: int) -> Any:
        return self._note("free", gfn, level)


class MmuBench:
    """One VM, its hooks and what it told. vcpus: how many it has. locks: with a real mmu_lock."""

    def __init__(
        self,
        vm_type: int = KVM_X86_DEFAULT_VM,
        *,
        vcpus: int = 2,
        locks: bool = True,
        **config: Any,
    ) -> None:
        self.journal = Journal()
        region = Region(0, 64 << 20)
        memory = Memory(self.journal, Trace(self.journal), [region])
        if vm_type == KVM_X86_TDX_VM:
            config.setdefault("gfn_direct_bits", SHARED_BIT)
        self.hooks = Hooks()
        self.pages = HostPages(self.journal, [region])
        self.vm = Vm(
            self.journal,
            memory,
            MmuParams(),
            VmConfig(vm_type, **config),
            pages=self.pages,
            external=self.hooks,
            mmu_lock=MmuLock(self.journal) if locks else NoLock(self.journal),
        )
        self.vm.vcpus = tuple(Vcpu(self.vm, number) for number in range(vcpus))
        self.events: list[tuple[Any, ...]] = []
        self.vm.listener = self.events.append

    def load(self, number: int = 0) -> Vcpu:
        """The vCPU with its roots loaded; forgets the events."""
        vcpu = self.vm.vcpus[number]
        assert run(roots.kvm_mmu_reload(vcpu)) == 0
        self.events.clear()
        return vcpu

    def root(self, vcpu: Vcpu, *, mirror: bool = False) -> MmuPage:
        """The vCPU's direct or mirror root as it is now."""
        root: MmuPage = self.vm.sps[vcpu.mirror_root_hpa if mirror else vcpu.root_hpa]
        return root

    def map(self, vcpu: Vcpu, gfn: int, *, level: int = 1, mirror: bool = False) -> None:
        """Map `gfn` to the frame of the same number, with all tables; forgets events and calls."""
        vm = self.vm
        assert caches.mmu_topup_memory_caches(vcpu) == 0
        root = self.root(vcpu, mirror=mirror)
        for it in TdpIter(vm, root, level, gfn, gfn_root_bits(vm, root)).walk(gfn + 1):
            role = root.role & ~LEVEL_MASK | it.level
            if it.level == level:
                spte = make_spte(vm, role=role, access=ACC_ALL, pfn=it.gfn)
                assert run(tdp_mmu_set_spte_atomic(vm, it, spte)) == 0
            elif not it.old_spte & SPTE_MMU_PRESENT_MASK:
                external = caches.take_external_page(vcpu) if mirror else NO_PAGE
                spt = caches.take_table_page(vcpu)
                sp = MmuPage(spt, child_role(role), it.gfn, external, it.word)
                vm.init_table(sp)
                assert run(tdp_mmu_link_sp(vm, it, sp, shared=True)) == 0
        self.events.clear()
        self.hooks.calls.clear()

    def entries(self, root: MmuPage) -> list[tuple[int, int]]:
        """(level, gfn) of every present entry of a root, as a whole-root walk finds them."""
        walk = TdpIter(self.vm, root, 1, 0, 0).walk(1 << 45)
        return [(it.level, it.gfn) for it in walk if it.old_spte & SPTE_MMU_PRESENT_MASK]

    def leaves(self, root: MmuPage) -> list[tuple[int, int]]:
        """(level, gfn) of every present leaf, without the shared bit."""
        walk = TdpIter(self.vm, root, 1, 0, gfn_root_bits(self.vm, root)).walk(1 << 45)
        return [
            (it.level, it.gfn)
            for it in walk
            if it.old_spte & SPTE_MMU_PRESENT_MASK and is_last_spte(it.old_spte, it.level)
        ]

    def changes(self) -> list[tuple[int, int]]:
        """(level, gfn) of every SPTE change so far, in order."""
        return [event[2:4] for event in self.events if event[0] == "spte_changed"]

    def told(self, name: str) -> list[tuple[Any, ...]]:
        """The events of one name."""
        return [event for event in self.events if event[0] == name]

    def resched_at(self, *checks: int) -> None:
        """Let the CPU be wanted at these checks, counted from 0."""
        count = iter(range(1 << 30))
        self.vm.need_resched = lambda: next(count) in checks


def tdx_bench(**config: Any) -> MmuBench:
    """A bench for a TD with 4 levels."""
    return MmuBench(KVM_X86_TDX_VM, **config)
