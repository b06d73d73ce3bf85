"""A VM with shadow paging whose guest has tables, and what its guest's CPU would make of them."""

from __future__ import annotations

from typing import Any

from tdxlab.hardware import Region
from tdxlab.kvm.pae_pdpte import X86_CR0_PG, X86_CR0_WP, X86_CR4_PAE, X86_CR4_PSE
from tdxlab.kvm.shadow import guest_store
from tdxlab.kvm.shadow_params import MemoryMap, ShadowParams
from tdxlab.kvm.shadow_run import Outcome, access, set_cr0, set_cr3, set_cr4, start
from tdxlab.kvm.shadow_vm import ShadowVcpu, ShadowVm
from tdxlab.steps import run

PAGE = 1 << 12
#: Present, writable, user.
RWU = 7
EXAMPLE = MemoryMap(
    normal=(
        Region(0x1_4000_1000, 2 * PAGE),
        Region(0x5555_5000, PAGE),
        Region(0x2_0000_3000, 200 * PAGE),
    )
)


def small_map(*, low: int = 64, normal: int = 1024, guest: int = 256) -> MemoryMap:
    """A host with that many free pages below 4 GiB and in the normal zone, and guest frames."""
    return MemoryMap(
        dma32=(Region(0x7F3A_5000, low * PAGE),),
        normal=(Region(0x1_4000_1000, normal * PAGE),),
        guest=Region(0x1_0000_0000, guest * PAGE),
    )


class Scene:
    """A VM in a paging mode. levels: of the guest's tables, 0, 2 or 3. Its tables are written with
    `put`, behind KVM's back, or with `guest_put`, as the guest writes them.
    """

    def __init__(
        self,
        levels: int = 2,
        *,
        vcpus: int = 1,
        cr3: int = 0x1000,
        memory_map: MemoryMap | None = None,
        **params: Any,
    ) -> None:
        memory = memory_map or small_map()
        self.vm: ShadowVm = start(ShadowParams(**params), vcpus=vcpus, memory_map=memory)
        self.levels = levels
        self.cr3 = cr3
        self.vcpu: ShadowVcpu = self.vm.vcpus[0]

    def turn_on(self, *vcpus: ShadowVcpu) -> None:
        """Let the guest switch paging on, on all vCPUs or some."""
        for vcpu in vcpus or self.vm.vcpus:
            assert run(set_cr3(vcpu, self.cr3)) == "fine"
            assert run(set_cr4(vcpu, X86_CR4_PAE if self.levels == 3 else X86_CR4_PSE)) == "fine"
            if self.levels:
                assert run(set_cr0(vcpu, X86_CR0_WP | X86_CR0_PG)) == "fine"

    @property
    def size(self) -> int:
        """Bytes of an entry."""
        return 4 if self.levels == 2 else 8

    def put(self, table: int, index: int, value: int) -> None:
        """Write an entry of the table at a GPA."""
        self.vm.write_guest(table + index * self.size, value, self.size)

    def guest_put(self, table: int, index: int, value: int) -> str:
        """The guest writes an entry."""
        return str(run(guest_store(self.vcpu, table + index * self.size, value, self.size)))

    def access(self, va: int, *, vcpu: ShadowVcpu | None = None, **how: bool) -> Outcome:
        outcome: Outcome = run(access(vcpu or self.vcpu, va, **how))
        return outcome

    def expected(self, va: int, *, write: bool = False, user: bool = True) -> int | None:
        """HPA of the byte that the guest's own tables lead to; None where it must fault. By a walk
        that shares nothing with the model's.
        """
        if self.vm.params.tdp_enabled:
            user = True
        if not self.levels:
            return self._hpa(va)
        bits = {2: ((22, 10), (12, 10)), 3: ((21, 9), (12, 9))}[self.levels]
        table: int | None = self.cr3 & 0xFFFF_FFE0
        if self.levels == 3:
            pdpte = self._word(table + 8 * (va >> 30), 8)
            table = None if pdpte is None or not pdpte & 1 else pdpte & 0x3FFF_FFFF_F000
        for shift, width in bits:
            entry = (
                None
                if table is None
                else self._word(
                    (table & ~0xFFF) + (va >> shift & (1 << width) - 1) * self.size, self.size
                )
            )
            if entry is None or not entry & 1 or entry >> 46:
                return None
            if (write and not entry & 2) or (user and not entry & 4):
                return None
            if shift > 12 and entry & 0x80:
                below = (1 << shift) - 1
                return None if entry & below & ~0x1FFF else self._hpa(entry & ~below | va & below)
            table = entry & ~0xFFF
        return self._hpa(table | va & 0xFFF)

    def _word(self, gpa: int, size: int) -> int | None:
        return self.vm.read_guest(gpa, size)

    def _hpa(self, gpa: int) -> int | None:
        """None for device memory."""
        if gpa >> 12 >= self.vm.npages:
            return None
        return self.vm.map.guest.base + gpa
