"""A VM whose guest's own page tables KVM shadows: its state, and nothing of what is done with it.

The VM lives on a host of its own, with a journal of its own: a machine for experiments on PAE roots
that needs neither EPT nor TDX. KVM's pages come from two zones. With a C-bit (SME) the host's
memory is encrypted unless a page is decrypted on purpose: who reads with the other key gets noise.

Source: Linux 6.16, arch/x86/include/asm/kvm_host.h (struct kvm_mmu, struct kvm_vcpu_arch),
arch/x86/kvm/mmu/mmu_internal.h (struct kvm_mmu_page).
Differs: guest memory is there from the beginning, one frame of the host's behind each gfn, and the
host maps it in 4 KiB pages; a TLB is not modelled, what would be flushed is counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from tdxlab.arch import PAGE_OFFSET_MASK, PAGE_SHIFT, PAGE_SIZE
from tdxlab.hardware import Region
from tdxlab.journal import Field, Fields, Journal, Journalled, Mark, Table, Words
from tdxlab.kvm.locks import MmuLock
from tdxlab.kvm.pae_pdpte import (
    PDPTES,
    X86_CR0_PG,
    X86_CR0_WP,
    X86_CR4_PAE,
    X86_CR4_PSE,
    spte_address,
)
from tdxlab.kvm.pae_zones import ZonedPages
from tdxlab.kvm.pages import NO_PAGE
from tdxlab.kvm.role import ACC_ALL, INVALID, LEVEL_MASK, Role
from tdxlab.kvm.shadow_params import NESTED, NPT, SPECIAL, MemoryMap, ShadowParams, ShadowRole
from tdxlab.kvm.spte import SPTE_MMU_PRESENT_MASK
from tdxlab.kvm.tdp_set import HostBug
from tdxlab.kvm.vm import INVALID_PAGE
from tdxlab.memory import Memory
from tdxlab.trace import Trace

#: KeyID under which memory with the C-bit lies, and the one of memory without it.
ENCRYPTED, PLAIN = 1, 0

# -- requests to a vCPU

FREE_OBSOLETE_ROOTS = "MMU_FREE_OBSOLETE_ROOTS"
LOAD_MMU_PGD = "LOAD_MMU_PGD"
MMU_SYNC = "MMU_SYNC"
TLB_FLUSH = "TLB_FLUSH"

#: KVM_MMU_NUM_PREV_ROOTS: roots that a vCPU keeps besides the present one.
NUM_PREV_ROOTS = 3

#: What is counted, in the order of its words.
COUNTS = (
    *("sp_lookups", "sp_hits", "sp_created", "sp_zapped"),
    *("roots_built", "roots_reused", "slots_stored", "pdptes_checked"),
    *("tlb_flush_current", "remote_tlb_flush", "vm_entries", "entry_failures", "vm_exits"),
    *("pf_taken", "pf_fixed", "pf_guest", "synced", "write_tracked"),
    *("decrypted", "encrypted", "roots_allocated"),
)
_WORD = {name: word for word, name in enumerate(COUNTS)}


class ShadowPage(NamedTuple):
    """struct kvm_mmu_page of the shadow MMU.

    spt: HPA of the table. gfn: of the guest table that it shadows, or of the range that it maps.
    pdptes: of a PAE guest's root with a header: what it was made for. root_count: vCPUs whose root
    it is, or hangs on. parents: HPA of each entry that links it. unsync: the guest may write the
    table it shadows without KVM noticing. valid_gen: `mmu_valid_gen` when it was made.
    """

    spt: int
    gfn: int
    role: int
    pdptes: tuple[int, ...] = ()
    root_count: int = 0
    parents: tuple[int, ...] = ()
    unsync: bool = False
    valid_gen: int = 0

    @property
    def level(self) -> int:
        """1 holds entries of 4 KiB."""
        return self.role & LEVEL_MASK

    @property
    def is_invalid(self) -> bool:
        """It was zapped while somebody used it as a root."""
        return bool(self.role & INVALID)

    @property
    def is_direct(self) -> bool:
        """It shadows no table of the guest."""
        return bool(self.role & Role.direct.mask)

    @property
    def has_gptes(self) -> bool:
        """Writes to the page at its gfn concern it.

        Source: mmu.c, sp_has_gptes. A PAE root does not count: the guest's PDPTEs take effect when
        they are loaded, not when they are written.
        """
        return not self.role & (Role.direct.mask | ShadowRole.pae_root.mask)


class Root(NamedTuple):
    """struct kvm_mmu_root_info: hpa of the topmost table, INVALID_PAGE for none; pgd: the CR3."""

    hpa: int = INVALID_PAGE
    pgd: int = 0


NO_ROOT = Root()


class ShadowVcpu(Journalled):
    """struct kvm_vcpu, as far as paging in 32-bit modes needs it.

    root, prev_roots: struct kvm_mmu's. pae_root, pml4_root, pml5_root: HPA of the special tables,
    NO_PAGE without. page_cache: pages kept ready for shadow pages. pae_root_cache: the one kept
    ready for a PAE root of the RFC. cr0, cr3, cr4: the guest's; when nested, those under which L1's
    NPT works. pdptrs: its PDPTEs as KVM has them cached. hardware: what the CPU has in its PDPTE
    registers while the guest runs (Intel). in_guest: between VM entry and VM exit.
    """

    root: Field[Root] = Field(NO_ROOT)
    prev_roots: Field[tuple[Root, ...]] = Field((NO_ROOT,) * NUM_PREV_ROOTS)
    pae_root = Field(NO_PAGE)
    pml4_root = Field(NO_PAGE)
    pml5_root = Field(NO_PAGE)
    page_cache: Field[tuple[int, ...]] = Field(())
    pae_root_cache = Field(NO_PAGE)
    cr0 = Field(X86_CR0_WP)
    cr3 = Field(0)
    cr4 = Field(0)
    pdptrs: Field[tuple[int, ...]] = Field((0,) * PDPTES)
    hardware: Field[tuple[int, ...]] = Field((0,) * PDPTES)
    in_guest = Field(False)
    requests: Field[frozenset[str]] = Field(frozenset())

    def __init__(self, vm: ShadowVm, vcpu_id: int) -> None:
        self.vm = vm
        self.vcpu_id = vcpu_id
        self.fields = Fields(vm.journal, self)

    @property
    def guest_level(self) -> int:
        """Levels of the guest's tables: 3 with PAE, 2 without, 0 while paging is off or KVM does
        not look at them.
        """
        if self.vm.params.use == NPT or not self.cr0 & X86_CR0_PG:
            return 0
        return 3 if self.cr4 & X86_CR4_PAE else 2

    @property
    def has_pse(self) -> bool:
        """Directory entries may map large pages."""
        return bool(self.cr4 & (X86_CR4_PSE | X86_CR4_PAE))

    @property
    def role(self) -> int:
        """The role of the MMU's root: mmu->root_role."""
        level = self.guest_level
        role = ShadowRole(0).with_(
            level=3, access=ACC_ALL, cr0_wp=1, direct=int(not level), has_4_byte_gpte=level == 2
        )
        if self.vm.params.design == SPECIAL:
            return int(role.with_(guest_mode=int(self.vm.params.use == NESTED)))
        return int(role.with_(pae_root=1, level_promoted=int(level == 2)))

    def make_request(self, request: str) -> None:
        """Source: kvm_host.h, kvm_make_request."""
        self.requests |= {request}

    def check_request(self, request: str) -> bool:
        """True, once, if `request` was pending. Source: kvm_host.h, kvm_check_request."""
        was_pending = request in self.requests
        self.requests -= {request}
        return was_pending


class ShadowVm(Journalled):
    """A host with one VM on it. vcpus: how many it has.

    sps: HPA of a table -> ShadowPage. mmu_page_hash: gfn -> HPAs of its tables, oldest first.
    leaves: HPA of a present leaf SPTE -> (gfn, access). rmap: gfn -> HPAs of the leaves that map
    it. plain: HPA of each page that was decrypted.
    """

    mmu_valid_gen = Field(0)
    vcpus: Field[tuple[ShadowVcpu, ...]] = Field(())
    #: what unlinked PDPTEs of a root hold, 0 unless the design has a default one
    default_pdpte = Field(0)

    def __init__(
        self,
        params: ShadowParams | None = None,
        *,
        vcpus: int = 1,
        memory_map: MemoryMap | None = None,
    ) -> None:
        self.params = params or ShadowParams()
        self.map = memory_map or MemoryMap()
        self.journal = Journal()
        regions = (self.map.kernel, *self.map.dma32, *self.map.normal, self.map.guest)
        self._require_room(regions)
        self.memory = Memory(self.journal, Trace(self.journal), regions)
        self.pages = ZonedPages(self.journal, self.map.dma32, self.map.normal)
        self.fields = Fields(self.journal, self)
        self.mmu_lock = MmuLock(self.journal)
        self.sps = Table(self.journal)
        self.mmu_page_hash = Table(self.journal)
        self.leaves = Table(self.journal)
        self.rmap = Table(self.journal)
        self.plain = Table(self.journal)
        self._counts = Words(self.journal, len(COUNTS))
        self.npages = self.map.guest.size >> PAGE_SHIFT
        for region in (self.map.kernel, self.map.guest):
            for hpa in range(region.base, region.end, PAGE_SIZE):
                self.memory.clear_page(hpa, self._key(hpa))
        self.vcpus = tuple(ShadowVcpu(self, number) for number in range(vcpus))

    def _require_room(self, regions: Sequence[Region]) -> None:
        """Refuse memory that the CPU cannot address: ValueError."""
        bits = self.params.maxphyaddr if self.params.c_bit is None else self.params.c_bit
        for region in regions:
            if region.end > 1 << bits:
                raise ValueError(
                    f"memory at {region.base:#x} reaches beyond {bits} address bits; choose a "
                    "greater width or C-bit, or lower addresses"
                )

    # -- the journal

    def mark(self) -> Mark:
        """Note the present state."""
        return self.journal.mark()

    def rewind(self, mark: Mark) -> None:
        """Go back to it."""
        self.journal.rewind(mark)

    def digest(self) -> str:
        """Equal digests, equal states."""
        return self.journal.digest()

    # -- counts

    def count(self, name: str, amount: int = 1) -> None:
        """Add to one of COUNTS."""
        word = _WORD[name]
        self._counts.put(word, self._counts.view[word] + amount)

    @property
    def counts(self) -> dict[str, int]:
        """Name -> value of every count."""
        return dict(zip(COUNTS, self._counts.view, strict=True))

    # -- host memory, as the kernel reads and writes it

    def _key(self, hpa: int) -> int:
        page = hpa & ~PAGE_OFFSET_MASK
        is_plain = not self.params.me_value or page in self.plain or page == self.zero_page
        return PLAIN if is_plain else ENCRYPTED

    def read(self, hpa: int, size: int = 8) -> int:
        """A little-endian number of `size` bytes, through the kernel's own mapping."""
        return int.from_bytes(self.memory.read(hpa, size, self._key(hpa)), "little")

    def write(self, hpa: int, value: int, size: int = 8) -> None:
        """Store a number through the kernel's own mapping."""
        self.memory.write(hpa, value.to_bytes(size, "little"), self._key(hpa))

    def read_table(self, hpa: int) -> tuple[int, ...]:
        """The 512 entries of a table, as the kernel reads them."""
        if self.params.me_value:
            content = self.memory.read(hpa, PAGE_SIZE, self._key(hpa))
        else:
            content = self.memory.page(hpa)
        return tuple(memoryview(content).cast("Q"))

    def fill_table(self, hpa: int, entry: int) -> None:
        """Let all 512 entries of a table hold `entry`."""
        content = entry.to_bytes(8, "little") * (PAGE_SIZE // 8)
        self.memory.write_page(hpa, content, self._key(hpa))

    def cpu_read(self, entry: int, hpa: int) -> int:
        """The 8 bytes at `hpa` as the CPU's walker reads them, which came to their page by `entry`:
        its C-bit says with which key. A CR3 of 32 bits has no room for one.
        """
        key = ENCRYPTED if entry & self.params.me_value else PLAIN
        return int.from_bytes(self.memory.read(hpa, 8, key), "little")

    def set_memory_decrypted(self, hpa: int) -> None:
        """The kernel maps the page without the C-bit from now on. What is in it reads as noise.

        Source: arch/x86/include/asm/set_memory.h. Without a C-bit it does nothing.
        """
        self.count("decrypted")
        if self.params.me_value:
            self.plain.put(hpa, True)

    def set_memory_encrypted(self, hpa: int) -> None:
        """The reverse."""
        self.count("encrypted")
        if self.params.me_value:
            self.plain.drop(hpa)

    # -- guest memory

    def gfn_to_hpa(self, gfn: int) -> int:
        """HPA of the frame behind a gfn, NO_PAGE if no memslot holds it."""
        return self.map.guest.base + (gfn << PAGE_SHIFT) if gfn < self.npages else NO_PAGE

    def read_guest(self, gpa: int, size: int) -> int | None:
        """A number in guest memory; None where there is none."""
        hpa = self.gfn_to_hpa(gpa >> PAGE_SHIFT)
        return None if hpa == NO_PAGE else self.read(hpa + (gpa & PAGE_OFFSET_MASK), size)

    def write_guest(self, gpa: int, value: int, size: int) -> None:
        """Store a number into guest memory behind KVM's back. Refuses a GPA without memory:
        ValueError.
        """
        hpa = self.gfn_to_hpa(gpa >> PAGE_SHIFT)
        if hpa == NO_PAGE:
            last = (self.npages << PAGE_SHIFT) - 1
            raise ValueError(f"GPA {gpa:#x} has no memory; choose one up to {last:#x}")
        self.write(hpa + (gpa & PAGE_OFFSET_MASK), value, size)

    # -- entries

    def is_present(self, spte: int) -> bool:
        """KVM has linked or mapped something. Source: spte.h, is_shadow_present_pte."""
        return bool(spte & SPTE_MMU_PRESENT_MASK)

    def address(self, spte: int) -> int:
        """The HPA in an entry."""
        return spte_address(spte, self.params.me_value)

    def child(self, spte: int) -> ShadowPage:
        """The page that a present entry links. Raises HostBug if no page is there: KVM would follow
        the entry all the same. Source: spte.h, spte_to_child_sp.
        """
        sp: ShadowPage | None = self.sps.get(self.address(spte))
        if sp is None:
            raise HostBug(f"KVM follows the entry {spte:#x}, and no page table is there")
        return sp

    def sp_of_entry(self, sptep: int) -> ShadowPage | None:
        """The page in which the entry at HPA `sptep` stands; None for a special root.

        Source: mmu_internal.h, sptep_to_sp.
        """
        return self.sps.get(sptep & ~PAGE_OFFSET_MASK)

    def update_sp(self, sp: ShadowPage, **changes: object) -> ShadowPage:
        """Replace fields of a page's header; returns the new header."""
        new = sp._replace(**changes)  # type: ignore[arg-type]
        self.sps.put(sp.spt, new)
        return new

    def root_sp(self, vcpu: ShadowVcpu) -> ShadowPage | None:
        """The header of a vCPU's root; None for a special or a dummy one. Source: spte.h,
        root_to_sp.
        """
        return self.sps.get(vcpu.root.hpa)

    @property
    def zero_page(self) -> int:
        """HPA of the kernel's page of zeros, which serves as dummy root. Differs: it is not
        encrypted, so that it is one for every reader.
        """
        return self.map.kernel.base

    # -- everybody

    def make_all_cpus_request(self, request: str) -> None:
        """Leave a request with every vCPU. Source: kvm_main.c, kvm_make_all_cpus_request."""
        for vcpu in self.vcpus:
            vcpu.make_request(request)
            if self.params.kicks:
                self.exit_guest(vcpu)

    def flush_remote_tlbs(self) -> None:
        """Every vCPU leaves the guest, and flushes before it is back in there.

        Source: kvm_main.c, kvm_flush_remote_tlbs. Differs: vCPUs are out at once.
        """
        self.count("remote_tlb_flush")
        self.make_all_cpus_request(TLB_FLUSH)

    def exit_guest(self, vcpu: ShadowVcpu) -> None:
        """A VM exit, if the vCPU is in the guest."""
        if vcpu.in_guest:
            vcpu.in_guest = False
            self.count("vm_exits")
