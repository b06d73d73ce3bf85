"""struct kvm and struct kvm_vcpu: one VM as its MMU sees it. State only; what is done with it
stands in the other files.

Everything that changes lives in stores under the machine's journal. Page tables are frames of host
RAM: an SPTE is one word of `vm.memory.words`. What KVM knows of a page-table page beside its
content is an `MmuPage`.

Source: Linux 6.16, include/linux/kvm_host.h (struct kvm, struct kvm_vcpu),
arch/x86/include/asm/kvm_host.h (struct kvm_arch, struct kvm_mmu), arch/x86/kvm/mmu/mmu_internal.h
(struct kvm_mmu_page).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from tdxlab.arch import ENTRIES_PER_TABLE, PAGE_SHIFT
from tdxlab.journal import Field, Fields, Journal, Journalled, Row, Table
from tdxlab.kvm.attributes import MemAttributes
from tdxlab.kvm.dirty_log import DirtyLog
from tdxlab.kvm.external import ExternalOps
from tdxlab.kvm.locks import MmuLock, Mutex, Srcu
from tdxlab.kvm.pages import NO_PAGE, PageSource
from tdxlab.kvm.params import MmuParams, VmConfig
from tdxlab.kvm.role import IS_MIRROR, LEVEL_MASK, tdp_root_role
from tdxlab.kvm.slots import GuestMemory, MemSlots, NoGuestMemory, NoUserMemory, Slot, UserMemory
from tdxlab.kvm.spte import SHADOW_NONPRESENT_VALUE, Masks
from tdxlab.kvm.vendor import MirrorZapper, PlainVendor, Vendor
from tdxlab.memory import Memory

#: "No root": what root_hpa and mirror_root_hpa hold before the MMU is loaded.
INVALID_PAGE = -1

# -- modes of a vCPU. Source: kvm_host.h

OUTSIDE_GUEST_MODE = "OUTSIDE_GUEST_MODE"
IN_GUEST_MODE = "IN_GUEST_MODE"

#: VM statistics, in the order of their words. Source: struct kvm_vm_stat. pt_pages counts linked
#: page-table pages, roots not among them; pt_pages_mirror those of them that are in a mirror.
VM_STATS = (
    "pages_4k",
    "pages_2m",
    "pages_1g",
    "pt_pages",
    "pt_pages_mirror",
    "nx_lpage_splits",
    "remote_tlb_flush",
    "remote_tlb_flush_requests",
)

#: vCPU statistics. Source: struct kvm_vcpu_stat.
VCPU_STATS = (
    "pf_taken",
    "pf_fixed",
    "pf_emulate",
    "pf_spurious",
    "pf_fast",
    "pf_mmio_spte_created",
)

_VM_STAT_WORDS = {name: word for word, name in enumerate(VM_STATS)}
_VCPU_STAT_WORDS = {name: word for word, name in enumerate(VCPU_STATS)}

_EMPTY_TABLE = SHADOW_NONPRESENT_VALUE.to_bytes(8, "little") * ENTRIES_PER_TABLE


class MmuPage(NamedTuple):
    """struct kvm_mmu_page: what KVM knows of one page-table page.

    spt: HPA of the table. role: a Role. gfn: first gfn of the range it covers, without the shared
    bit. external_spt: HPA of the page given to the external EPT, NO_PAGE if there is none.
    ptep: index of the parent SPTE in `memory.words`, -1 while nothing links it.
    nx_huge_page_disallowed: it stands for a large page that would have been executable.
    scheduled_to_zap: a root that was invalidated and waits for its zapping.
    """

    spt: int
    role: int
    gfn: int
    external_spt: int = NO_PAGE
    ptep: int = -1
    nx_huge_page_disallowed: bool = False
    scheduled_to_zap: bool = False

    @property
    def level(self) -> int:
        """Its level: 1 holds 4 KiB entries."""
        return self.role & LEVEL_MASK

    @property
    def is_mirror(self) -> bool:
        """True for a table of a mirror EPT."""
        return bool(self.role & IS_MIRROR)


class MemoryFault(NamedTuple):
    """KVM_EXIT_MEMORY_FAULT: gpa and size in bytes, flags KVM_MEMORY_EXIT_FLAG_PRIVATE or 0."""

    gpa: int
    size: int
    flags: int


class Vcpu(Journalled):
    """struct kvm_vcpu, its MMU part.

    root_hpa, mirror_root_hpa: HPA of the direct and of the mirror root, INVALID_PAGE without one.
    root_role: role that a direct root for this vCPU has. requests: names of pending KVM_REQ_*.
    memory_fault: what user space would find in kvm_run after -EFAULT. page_cache,
    external_spt_cache: pages kept ready for a fault (struct kvm_mmu_memory_cache). mmio_gfn,
    mmio_gen: last gfn seen to be MMIO, and the memslots' generation then. cpu: LP on which it was
    loaded last, -1 before. mode: IN_GUEST_MODE from just before it enters until it has left.
    srcu_index: its place among the readers of the memslots, or -1. stat_words: of VCPU_STATS.
    """

    root_hpa = Field(INVALID_PAGE)
    mirror_root_hpa = Field(INVALID_PAGE)
    requests: Field[frozenset[str]] = Field(frozenset())
    memory_fault: Field[MemoryFault | None] = Field(None)
    page_cache: Field[tuple[int, ...]] = Field(())
    external_spt_cache: Field[tuple[int, ...]] = Field(())
    signal_pending = Field(False)
    mmio_gfn = Field(0)
    mmio_gen = Field(0)
    cpu = Field(-1)
    mode: Field[str] = Field(OUTSIDE_GUEST_MODE)
    srcu_index = Field(-1)

    def __init__(self, vm: Vm, vcpu_id: int) -> None:
        self.vm = vm
        self.vcpu_id = vcpu_id
        self.fields = Fields(vm.journal, self)
        self.root_role = tdp_root_role(vm.config.root_level, ad_bits=vm.params.ad_bits)
        self.stat_words = Row(vm.journal, len(VCPU_STATS))

    def __repr__(self) -> str:
        return f"vCPU {self.vcpu_id} of {self.vm!r}"

    def count(self, name: str) -> None:
        """Add one to a statistic of VCPU_STATS."""
        word, stats = _VCPU_STAT_WORDS[name], self.stat_words
        stats.cells[word] = stats.view[word] + 1

    @property
    def stats(self) -> dict[str, int]:
        """Name -> value of every statistic."""
        return dict(zip(VCPU_STATS, self.stat_words.view, strict=True))

    def make_request(self, request: str) -> None:
        """Source: kvm_host.h, kvm_make_request."""
        self.requests |= {request}

    def check_request(self, request: str) -> bool:
        """True, once, if `request` was pending. Source: kvm_host.h, kvm_check_request."""
        if request not in self.requests:
            return False
        self.requests -= {request}
        return True


class Vm(Journalled):
    """struct kvm with its arch part.

    journal, memory: of the machine. params: of the host. config: what user space chose.
    pages: gives page-table pages. external: back end for the mirror, None without one. mmu_lock:
    None for a new MmuLock. name: for people.

    tdp_mmu_roots: HPAs of all roots, the newest first. sps: HPA of a table -> MmuPage.
    root_count: HPA of a root -> its refcount. listener: called with every event, a tuple
    (name, values...); None while nobody listens. need_resched: asked by walkers whether to yield;
    None means never. is_mmio_pfn: says of a frame number whether it is a device's and not RAM;
    None means never.
    vendor: runs the vCPUs. kick_vcpus: interrupts those in the guest after a request for all; None
    where nobody runs any. zap_batch: mirror pages that are removed together; 0: one by one, without
    blocked entries. slot_policies: (slot number or None, policy), `slot_policy.py`; parked: slots
    whose pages are blocked, `parking.py`. mirror_zapper: takes leaves out of a mirror in the place
    of `zap.py`, but not what a parked slot keeps blocked; None means `zap.py` does. slots,
    attributes, dirty, guest_memory, user_memory: see their files.
    """

    tdp_mmu_roots: Field[tuple[int, ...]] = Field(())
    pre_fault_allowed = Field(False)
    gfn_direct_bits = Field(0)
    shadow_mmio_value = Field(0)
    vm_bugged: Field[str] = Field("")
    vm_dead = Field(False)
    mmu_invalidate_seq = Field(0)
    mmu_invalidate_in_progress = Field(0)
    mmu_invalidate_range_start = Field(0)
    mmu_invalidate_range_end = Field(0)
    mmu_valid_gen = Field(0)
    vcpus: Field[tuple[Vcpu, ...]] = Field(())
    zap_batch = Field(0)
    slot_policies: Field[tuple[tuple[int | None, str], ...]] = Field(())
    parked: Field[tuple[Slot, ...]] = Field(())

    def __init__(
        self,
        journal: Journal,
        memory: Memory,
        params: MmuParams,
        config: VmConfig,
        *,
        pages: PageSource,
        external: ExternalOps | None = None,
        mmu_lock: MmuLock | None = None,
        name: str = "VM",
    ) -> None:
        self.journal = journal
        self.memory = memory
        self.params = params
        self.config = config
        self.masks = Masks(params)
        self.features = config.features
        self.pages = pages
        self.external = external
        self.name = name
        self.mmu_lock = mmu_lock or MmuLock(journal)
        self.fields = Fields(journal, self)
        self.sps = Table(journal)
        self.root_count = Table(journal)
        #: tables that stand where an executable large page could: HPA -> number, ascending by age
        self.possible_nx_huge_pages = Table(journal)
        self.listener: Callable[[tuple[Any, ...]], None] | None = None
        self.need_resched: Callable[[], bool] | None = None
        self.is_mmio_pfn: Callable[[int], bool] | None = None
        self.mirror_zapper: MirrorZapper | None = None
        self._stats = Row(journal, len(VM_STATS))
        self._rcu_pending = Table(journal)
        self.vendor: Vendor = PlainVendor()
        self.dirty = DirtyLog(journal)
        self.slots_lock = Mutex(journal, "slots_lock", waits=self.mmu_lock.waits)
        self.srcu = Srcu(journal, "srcu", waits=self.mmu_lock.waits)
        self.slots = MemSlots(journal, 1 if self.features.has_private_mem else 2)
        self.attributes = MemAttributes(journal)
        self.guest_memory: GuestMemory = NoGuestMemory()
        self.user_memory: UserMemory = NoUserMemory()
        self.kick_vcpus: Callable[[], object] | None = None
        self.has_mirrored_tdp = self.features.has_mirrored_tdp
        self.pre_fault_allowed = self.features.pre_fault_allowed
        self.gfn_direct_bits = config.gfn_direct_bits
        if not self.has_mirrored_tdp:
            self.shadow_mmio_value = self.masks.mmio_value

    def __repr__(self) -> str:
        return self.name

    # -- events and statistics

    def emit(self, *event: Any) -> None:
        """Tell the listener what happens: (name, values...)."""
        if self.listener is not None:
            self.listener(event)

    def add_stat(self, name: str, amount: int) -> None:
        """Add `amount` to a statistic of VM_STATS."""
        word = _VM_STAT_WORDS[name]
        self._stats.put(word, self._stats.view[word] + amount)

    def update_page_stats(self, level: int, amount: int) -> None:
        """Count leaves of one level, 1 to 3. Source: mmu_internal.h, kvm_update_page_stats."""
        stats = self._stats
        stats.cells[level - 1] = stats.view[level - 1] + amount & (1 << 64) - 1

    @property
    def stats(self) -> dict[str, int]:
        """Name -> value of every statistic."""
        return dict(zip(VM_STATS, self._stats.view, strict=True))

    # -- bugs

    def bug(self, why: str) -> None:
        """KVM_BUG_ON fired: the VM is dead from now on; the machine lives. `vm_bugged` keeps the
        first reason. Source: kvm_host.h, kvm_vm_bugged.
        """
        self.emit("bug", why)
        if not self.vm_bugged:
            self.vm_bugged = why
            self.kill()

    def kill(self) -> None:
        """No vCPU runs any more. Source: kvm_host.h, kvm_vm_dead."""
        self.vm_dead = True
        self.make_all_cpus_request("VM_DEAD")

    def warn(self, what: str) -> None:
        """WARN_ON fired: it is said, and nothing else happens."""
        self.emit("warn", what)

    def make_all_cpus_request(self, request: str) -> None:
        """Leave `request` with every vCPU.

        Source: kvm_main.c, kvm_make_all_cpus_request. Differs: it does not wait until those that it
        interrupts have taken the interrupt; what must wait goes through the vendor's kick_all.
        """
        self.emit("kvm_make_all_cpus_request", request)
        self._request_all(request)

    def flush_remote_tlbs(self) -> None:
        """Every vCPU flushes its TLB before it enters the guest again.

        Source: kvm_main.c, kvm_flush_remote_tlbs. Differs: remote_tlb_flush counts all, in Linux
        those for which a vCPU was interrupted.
        """
        self.emit("kvm_flush_remote_tlbs")
        self.add_stat("remote_tlb_flush_requests", 1)
        self._request_all("TLB_FLUSH")
        self.add_stat("remote_tlb_flush", 1)

    def flush_remote_tlbs_range(self, gfn: int, nr_pages: int) -> None:
        """Flush a range of gfns; no back end here can, so it becomes a full flush.

        Source: kvm_main.c, kvm_flush_remote_tlbs_range; kvm_host.h (only KVM on Hyper-V can).
        """
        self.emit("kvm_flush_remote_tlbs_range", gfn, nr_pages)
        self._request_all("TLB_FLUSH")
        self.add_stat("remote_tlb_flush_requests", 1)
        self.add_stat("remote_tlb_flush", 1)

    def flush_remote_tlbs_gfn(self, gfn: int, level: int) -> None:
        """Flush what one entry at `level` covers. Source: mmu_internal.h."""
        self.flush_remote_tlbs_range(round_gfn(gfn, level), pages_per_level(level))

    def _request_all(self, request: str) -> None:
        for vcpu in self.vcpus:
            vcpu.make_request(request)
        if self.kick_vcpus is not None:
            self.kick_vcpus()

    # -- page-table pages

    def table_base(self, spt: int) -> int:
        """Index of the first SPTE of the table at `spt` in `memory.words`."""
        return self.memory.frame(spt)

    def init_table(self, sp: MmuPage) -> None:
        """Fill the table with empty SPTEs and know it as `sp`."""
        self.memory.write_page(sp.spt, _EMPTY_TABLE, 0)
        self.sps.put(sp.spt, sp)

    def sp_of(self, spte: int) -> MmuPage:
        """The page that a present non-leaf SPTE points at. Source: spte.h, spte_to_child_sp."""
        sp: MmuPage = self.sps[spte & self.masks.address]
        return sp

    def account_table(self, sp: MmuPage, amount: int) -> None:
        """Count a table as it is linked (1) or unlinked (-1).

        Source: tdp_mmu.c, tdp_account_mmu_page and tdp_unaccount_mmu_page.
        """
        self.add_stat("pt_pages", amount)
        if sp.role & IS_MIRROR:
            self.add_stat("pt_pages_mirror", amount)

    # -- RCU

    @property
    def rcu_pending(self) -> int:
        """Tables that wait for a grace period."""
        return len(self._rcu_pending)

    def call_rcu(self, sp: MmuPage) -> None:
        """Free the table, and its external page if it still has one, after a grace period.

        Source: tdp_mmu.c, tdp_mmu_free_sp_rcu_callback.
        """
        self._rcu_pending.put(sp.spt, sp)

    def rcu_barrier(self) -> None:
        """A grace period has ended: nobody can hold a pointer into the tables that wait.

        Differs: who drives the operations says when; a half-way reader keeps nobody waiting.
        """
        for _, sp in sorted(self._rcu_pending.items()):
            self._rcu_pending.drop(sp.spt)
            self.free_table(sp)

    def free_table(self, sp: MmuPage) -> None:
        """Give a table's pages back to the host now. Source: tdp_mmu.c, tdp_mmu_free_sp."""
        self.sps.drop(sp.spt)
        self.pages.free_page(sp.spt)
        if sp.external_spt != NO_PAGE:
            self.pages.free_page(sp.external_spt)


def gfn_to_gpa(gfn: int) -> int:
    """Byte address of a guest frame."""
    return gfn << PAGE_SHIFT


def pages_per_level(level: int) -> int:
    """4 KiB pages that one entry at `level` covers. Source: kvm_host.h, KVM_PAGES_PER_HPAGE."""
    return 1 << 9 * (level - 1)


def round_gfn(gfn: int, level: int) -> int:
    """`gfn` rounded down to what one entry at `level` covers. Source: gfn_round_for_level."""
    return gfn & -pages_per_level(level)
