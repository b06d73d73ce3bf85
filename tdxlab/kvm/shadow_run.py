"""A vCPU in a 32-bit paging mode: created, entered, used by its guest, destroyed.

    vm = start(ShadowParams(design=RFC))
    vcpu = vm.vcpus[0]
    run(set_cr3(vcpu, 0x101000))
    run(access(vcpu, 0xC0123456, write=True))

Source: Linux 6.16, arch/x86/kvm/x86.c (vcpu_enter_guest, load_pdptrs, kvm_set_cr0, kvm_set_cr3,
kvm_set_cr4, kvm_arch_vcpu_create); vmx/vmx.c and svm/svm.c (exit handlers of page faults).
"""

from __future__ import annotations

from collections.abc import Generator
from errno import ENOMEM
from typing import NamedTuple

from tdxlab.arch import PAGE_OFFSET_MASK
from tdxlab.kvm.locks import WRITE
from tdxlab.kvm.pae_cpu import FINE, GP, Hit, vm_entry, walk
from tdxlab.kvm.pae_guest import VA_LIMIT, GuestFault, GuestWalk, read_pdpte, walk_guest
from tdxlab.kvm.pae_pdpte import (
    KVM_MMU_CR4_ROLE_BITS,
    PDPTES,
    X86_CR0_PDPTR_BITS,
    X86_CR0_PG,
    X86_CR4_PAE,
    X86_CR4_PDPTR_BITS,
    X86_CR4_PGE,
    is_legal_table,
)
from tdxlab.kvm.pae_rfc import make_default_pdpte
from tdxlab.kvm.pae_special import Doing
from tdxlab.kvm.page_fault import (
    PFERR_RSVD_MASK,
    PFERR_USER_MASK,
    PFERR_WRITE_MASK,
    RET_PF_EMULATE,
    RET_PF_WRITE_PROTECTED,
)
from tdxlab.kvm.shadow import kvm_mmu_page_fault, kvm_mmu_track_write
from tdxlab.kvm.shadow_pages import free_page_cache
from tdxlab.kvm.shadow_params import NESTED, MemoryMap, ShadowParams
from tdxlab.kvm.shadow_roots import (
    design_of,
    kvm_mmu_free_obsolete_roots,
    kvm_mmu_free_roots,
    kvm_mmu_load,
    kvm_mmu_new_pgd,
    kvm_mmu_sync_roots,
)
from tdxlab.kvm.shadow_vm import (
    FREE_OBSOLETE_ROOTS,
    LOAD_MMU_PGD,
    MMU_SYNC,
    TLB_FLUSH,
    ShadowVcpu,
    ShadowVm,
)
from tdxlab.kvm.vm import INVALID_PAGE
from tdxlab.steps import Step

# -- what an access came to

OK = "ok"
EMULATED = "emulated"
GUEST_FAULT = "the guest's #PF"
MMIO = "device memory"
ILLEGAL_TABLE = "illegal shadow table"
NO_MEMORY, INTERNAL_ERROR = "-ENOMEM", "-EIO"
STUCK = "faults for ever"

#: Exits after which an access is given up. A right one takes two at most.
MOST_EXITS = 8

Result = Generator[Step, None, "Outcome"]


class Outcome(NamedTuple):
    """What became of a guest's access. kind: see above, or ENTRY_FAILURE. hpa: byte that was
    reached, -1 if none. error_code: of the guest's page fault. exits: VM exits that it took.
    """

    kind: str
    hpa: int = -1
    error_code: int = 0
    exits: int = 0


# -- creation and end


def start(
    params: ShadowParams | None = None, *, vcpus: int = 1, memory_map: MemoryMap | None = None
) -> ShadowVm:
    """A host with a VM whose vCPUs have been created.

    Refuses, with a ValueError, a host without the pages that this takes.
    """
    vm = ShadowVm(params, vcpus=vcpus, memory_map=memory_map)
    error = make_default_pdpte(vm)
    for vcpu in vm.vcpus:
        error = error or design_of(vm).create(vcpu)
    if error:
        raise ValueError(
            f"no page for the PAE roots of {vcpus} vCPUs: {vm.pages.dma32.free} are free below "
            "4 GiB; give the memory map more of them"
        )
    return vm


def destroy_vcpu(vcpu: ShadowVcpu) -> Doing:
    """Give back everything that is the vCPU's alone. Source: x86.c, kvm_arch_vcpu_destroy."""
    vcpu.vm.exit_guest(vcpu)
    yield from kvm_mmu_free_roots(vcpu, previous=True)
    design_of(vcpu.vm).destroy(vcpu)
    free_page_cache(vcpu)


# -- running


def vcpu_enter_guest(vcpu: ShadowVcpu) -> Generator[Step, None, str]:
    """See to the requests, load a root if there is none, and enter. Returns FINE, ENTRY_FAILURE,
    NO_MEMORY or INTERNAL_ERROR. Source: x86.c, vcpu_enter_guest.
    """
    while True:
        if vcpu.check_request(FREE_OBSOLETE_ROOTS):
            yield from kvm_mmu_free_obsolete_roots(vcpu)
        if vcpu.root.hpa == INVALID_PAGE:
            error = yield from kvm_mmu_load(vcpu)
            if error:
                return NO_MEMORY if error == -ENOMEM else INTERNAL_ERROR
        if MMU_SYNC in vcpu.requests:
            yield from kvm_mmu_sync_roots(vcpu)
        if vcpu.check_request(LOAD_MMU_PGD):
            yield ("load_mmu_pgd", vcpu.root.hpa)
        if vcpu.check_request(TLB_FLUSH):
            vcpu.vm.count("tlb_flush_current")
        yield ("VM entry", vcpu.vcpu_id)
        if not vcpu.requests:
            return vm_entry(vcpu)


def access(vcpu: ShadowVcpu, va: int, *, write: bool = False, user: bool = True) -> Result:
    """The guest uses a byte at `va` (0 to 4 GiB). Refuses another address: ValueError."""
    _require_va(va)
    code = (PFERR_WRITE_MASK if write else 0) | (PFERR_USER_MASK if user else 0)
    exits = 0
    while exits < MOST_EXITS:
        if not vcpu.in_guest:
            entered = yield from vcpu_enter_guest(vcpu)
            if entered != FINE:
                return Outcome(entered, exits=exits)
        yield ("guest", va)
        found = walk(vcpu, va, write=write, user=user)
        if isinstance(found, Hit):
            return Outcome(OK, found.hpa, exits=exits)
        exits += 1
        vcpu.vm.exit_guest(vcpu)
        if found.error_code & PFERR_RSVD_MASK:
            return Outcome(ILLEGAL_TABLE, error_code=found.error_code, exits=exits)
        came = yield from kvm_mmu_page_fault(vcpu, va, code | _as_user(vcpu))
        if isinstance(came, GuestFault):
            return Outcome(GUEST_FAULT, error_code=came.error_code, exits=exits)
        if came == -ENOMEM:
            return Outcome(NO_MEMORY, exits=exits)
        if came in (RET_PF_EMULATE, RET_PF_WRITE_PROTECTED):
            return Outcome(MMIO if came == RET_PF_EMULATE else EMULATED, exits=exits)
    return Outcome(STUCK, exits=exits)


def store(vcpu: ShadowVcpu, va: int, value: int, size: int, *, user: bool = True) -> Result:
    """The guest stores `size` bytes at `va`, within one page: itself, or KVM for it if the page is
    one of its tables.
    """
    vm = vcpu.vm
    came = yield from access(vcpu, va, write=True, user=user)
    if came.kind == OK:
        vm.write(came.hpa, value, size)
    if came.kind == EMULATED:
        found = walk_guest(vcpu, va, write=True, user=user)
        assert isinstance(found, GuestWalk)
        gpa = (found.gfn << 12) + (va & PAGE_OFFSET_MASK)
        yield from vm.mmu_lock.lock(WRITE)
        vm.write_guest(gpa, value, size)
        kvm_mmu_track_write(vm, gpa, size)
        vm.mmu_lock.unlock(WRITE)
    return came


def _as_user(vcpu: ShadowVcpu) -> int:
    """Under nested paging every access is one of user mode."""
    return PFERR_USER_MASK if vcpu.vm.params.tdp_enabled else 0


def _require_va(va: int) -> None:
    if not 0 <= va < VA_LIMIT:
        raise ValueError(f"address {va:#x} has more than 32 bits; choose one below {VA_LIMIT:#x}")


# -- control registers


def load_pdptrs(vcpu: ShadowVcpu, cr3: int) -> Generator[Step, None, bool]:
    """Read and check the four PDPTEs of a guest without TDP. False: #GP. If they have changed, the
    present root is given up. Source: x86.c, load_pdptrs.
    """
    vm = vcpu.vm
    read = [read_pdpte(vm, cr3, index) for index in range(PDPTES)]
    vm.count("pdptes_checked", PDPTES)
    pdptes = tuple(pdpte for pdpte in read if pdpte is not None)
    if len(pdptes) < PDPTES or not is_legal_table(pdptes, vm.params.maxphyaddr):
        return False
    if pdptes != vcpu.pdptrs:
        yield from kvm_mmu_free_roots(vcpu)
    vcpu.pdptrs = pdptes
    return True


def is_pae_paging(vcpu: ShadowVcpu) -> bool:
    """KVM loads the guest's PDPTEs. L1's, when nested, are read one by one when they are needed."""
    return vcpu.guest_level == 3 and vcpu.vm.params.use != NESTED


def set_cr3(vcpu: ShadowVcpu, cr3: int) -> Generator[Step, None, str]:
    """The guest's MOV CR3 (when nested: L1 runs L2 with another nCR3). Returns FINE or GP.

    The same value again changes nothing but that the guest's tables are looked at anew; with PAE
    the PDPTEs are read in any case. Source: x86.c, kvm_set_cr3. Refuses more than 32 bits:
    ValueError.
    """
    _require_va(cr3)
    vcpu.vm.exit_guest(vcpu)
    if is_pae_paging(vcpu) and not (yield from load_pdptrs(vcpu, cr3)):
        return GP
    if cr3 != vcpu.cr3:
        vcpu.cr3 = cr3
        yield from kvm_mmu_new_pgd(vcpu)
    vcpu.make_request(MMU_SYNC)
    vcpu.make_request(TLB_FLUSH)
    return FINE


def set_cr0(vcpu: ShadowVcpu, cr0: int) -> Generator[Step, None, str]:
    """The guest's MOV CR0. Returns FINE or GP. Source: x86.c, kvm_set_cr0."""
    vcpu.vm.exit_guest(vcpu)
    return (yield from _set_paging(vcpu, cr0, vcpu.cr4))


def set_cr4(vcpu: ShadowVcpu, cr4: int) -> Generator[Step, None, str]:
    """The guest's MOV CR4. Returns FINE or GP. Source: x86.c, kvm_set_cr4."""
    vcpu.vm.exit_guest(vcpu)
    return (yield from _set_paging(vcpu, vcpu.cr0, cr4))


def _set_paging(vcpu: ShadowVcpu, cr0: int, cr4: int) -> Generator[Step, None, str]:
    """Change CR0 and CR4; PDPTEs are read anew if one of their bits changes under PAE paging, all
    roots go if the MMU becomes another one, and a change of PGE flushes as a load of CR3 does.

    Source: x86.c, kvm_post_set_cr0 and kvm_post_set_cr4. Differs: CR0.WP changes nothing.
    """
    cr0_changes, cr4_changes = vcpu.cr0 ^ cr0, vcpu.cr4 ^ cr4
    will_be_pae = bool(cr0 & X86_CR0_PG and cr4 & X86_CR4_PAE) and not vcpu.vm.params.tdp_enabled
    is_reload = cr0_changes & X86_CR0_PDPTR_BITS or cr4_changes & X86_CR4_PDPTR_BITS
    if is_reload and will_be_pae and not (yield from load_pdptrs(vcpu, vcpu.cr3)):
        return GP
    if cr0_changes & X86_CR0_PG or cr4_changes & KVM_MMU_CR4_ROLE_BITS:
        yield from kvm_mmu_free_roots(vcpu, previous=True)
    vcpu.cr0, vcpu.cr4 = cr0, cr4
    if cr4_changes & X86_CR4_PGE:
        vcpu.make_request(MMU_SYNC)
        vcpu.make_request(TLB_FLUSH)
    return FINE
