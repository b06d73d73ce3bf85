"""Invariants of the host: its pages, its KeyIDs, its locks, and its vCPUs."""

from __future__ import annotations

from collections.abc import Iterator

from tdxlab.arch import PAGE_SHIFT
from tdxlab.invariants.host_picture import VmPicture
from tdxlab.invariants.picture import Picture, name_of
from tdxlab.kvm.locks import WRITE
from tdxlab.kvm.tdx import TdxVcpu
from tdxlab.kvm.vm import IN_GUEST_MODE
from tdxlab.memory import Memory
from tdxlab.seam.rules import HKID_RESERVED, PT_NDA


def pages_add_up(picture: Picture) -> Iterator[str]:
    """5: free, in use, leaked and given away for good: together all pages."""
    if picture.host is None:
        return
    pages = picture.host.host.pages
    returned = list(pages.returned())
    if len(returned) + pages.untouched != pages.free:
        yield (
            f"{pages.free} pages should be free; {len(returned)} were given back and "
            f"{pages.untouched} never used"
        )
    for hpa in returned:
        if picture.host.is_out(hpa):
            yield f"the page {hpa:#x} is free, and in use too"


def the_module_owns_no_free_page(picture: Picture) -> Iterator[str]:
    """5: what the module owns, the host has not given to anybody else."""
    if picture.host is None:
        return
    for row in picture.rows:
        if row.page_type != PT_NDA and not picture.host.is_out(row.hpa):
            yield f"{name_of(row)} is free for the host"


def pages_in_use_have_one_user(picture: Picture) -> Iterator[str]:
    """5: every page that is out is in one place of one VM, and what a VM has is out."""
    if picture.host is None:
        return
    pages = picture.host.host.pages
    out = pages.in_use
    out.update({hpa: use for hpa, (_, use) in pages.huge.items()})
    users: dict[int, tuple[str, VmPicture]] = {}
    for vm in picture.vms:
        for hpa, use in (*vm.host_pages, *vm.guest_pages()):
            if hpa in users:
                first, other = users[hpa]
                yield f"the page {hpa:#x} has two users: {first}, {other}; {use}, {vm}"
            users[hpa] = use, vm
            if hpa not in out and not picture.host.is_out(hpa):
                yield f"the page {hpa:#x} is free, but has a user: {use}, {vm}"
    for hpa, use in out.items():
        if hpa not in users:
            yield f"the page {hpa:#x} is out ({use}), and nobody has it"


def leaked_pages_have_a_cause(picture: Picture) -> Iterator[str]:
    """5: each page that is lost says by which failure."""
    if picture.host is not None:
        for hpa, why in picture.host.host.pages.leaked.items():
            if not why:
                yield f"the page {hpa:#x} is leaked without a cause"


def host_pages_are_not_the_modules(picture: Picture) -> Iterator[str]:
    """5: the module owns no page table of KVM, and nothing of a process's memory."""
    owned = {row.hpa: row for row in picture.rows if row.page_type != PT_NDA}
    for vm in picture.vms:
        for hpa, use in vm.host_pages:
            if hpa in owned:
                yield f"{name_of(owned[hpa])} belongs to the module; {vm} uses it: {use}"


def shared_translations_are_of_pages_in_use(picture: Picture) -> Iterator[str]:
    """6, the host's share: a vCPU inside translates no shared GPA to a page that is free."""
    cpu = picture.machine.cpu
    for lp in picture.inside if picture.host is not None else ():
        td = picture.tds.get(cpu.tdr_inside(lp))
        for (root, gfn), found in cpu.tlbs[lp].items():
            shared = td is not None and root == td.root and td.is_shared(gfn << PAGE_SHIFT)
            if shared and picture.host is not None and not picture.host.is_out(found.hpa):
                yield f"LP {lp} runs {td}, and gfn {gfn:#x} is the free page {found.hpa:#x} there"


def keyids_are_those_of_the_module(picture: Picture) -> Iterator[str]:
    """10: KVM has given to TDs the KeyIDs that the module knows as taken."""
    if picture.host is None:
        return
    taken = {
        keyid for keyid, state, _ in picture.machine.module.keys.in_use() if state != HKID_RESERVED
    }
    ours = set(picture.host.host.hkids)
    if taken != ours:
        yield f"KVM has given out the KeyIDs {sorted(ours)}; for the module {sorted(taken)} are"


def pages_are_written_back_before_they_change_keys(picture: Picture) -> Iterator[str]:
    """14: nothing that is dirty under an old KeyID can overwrite what a page holds now."""
    if picture.host is not None:
        yield from overtaken_pages(picture.machine.memory)


def overtaken_pages(memory: Memory) -> Iterator[str]:
    """What 14 says of each page that took another KeyID too early, whoever the host is."""
    for pfn in memory.caches.overtaken:
        yield (
            f"the page {pfn << PAGE_SHIFT:#x} was given another KeyID while lines of its old one "
            "may be dirty in a cache"
        )


def locks_of_the_host_are_free(picture: Picture) -> Iterator[str]:
    """11, the host's share: locks, invalidations in progress, and the door that a zap closes."""
    if picture.host is None:
        return
    if picture.host.host.tdx_lock.held:
        yield "somebody holds tdx_lock"
    for picture_vm in picture.vms:
        vm, tdx = picture_vm.vm, picture_vm.tdx
        lock = vm.mmu_lock
        held = {
            "mmu_lock": lock.held(WRITE) or lock.readers or lock.waiting,
            "slots_lock": vm.slots_lock.held,
            "an invalidation": vm.mmu_invalidate_in_progress,
            "wait_for_sept_zap": tdx is not None and tdx.wait_for_sept_zap,
        }
        for name, is_held in held.items():
            if is_held:
                yield f"somebody holds {name} of {vm}"


def vcpus_inside_can_be_kicked(picture: Picture) -> Iterator[str]:
    """13, the host's share: KVM knows that a vCPU inside an LP is there."""
    for lp, tdvpr in picture.inside.items():
        for vm in picture.vms:
            for vcpu in vm.vm.vcpus:
                if not isinstance(vcpu, TdxVcpu) or vcpu.vp.tdvpr != tdvpr:
                    continue
                if (vcpu.mode, vcpu.cpu) != (IN_GUEST_MODE, lp):
                    yield f"{vcpu!r} is inside LP {lp}; for KVM it is {vcpu.mode}, on {vcpu.cpu}"
