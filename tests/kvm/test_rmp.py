"""The RMP, the hooks of guest_memfd, and an SNP VM that has both behind it."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

import pytest

from tdxlab.abi.outcome import GuestOutcome
from tdxlab.arch import EPT_EXECUTE, EPT_READ, EPT_WRITE, PAGE_SIZE
from tdxlab.cpu import Translation
from tdxlab.guest import Write
from tdxlab.journal import Journal
from tdxlab.kvm.fault import kvm_vcpu_pre_fault_memory
from tdxlab.kvm.gmem import GuestMemfds
from tdxlab.kvm.params import KVM_X86_SW_PROTECTED_VM
from tdxlab.kvm.rmp import PFERR_GUEST_ENC_MASK, SVM_EXIT_NPF, Rmp, RmpEntry, SnpGmem
from tdxlab.kvm.spte import SPTE_MMU_PRESENT_MASK, spte_to_pfn
from tdxlab.kvm.tdp_iter import for_each_tdp_pte
from tdxlab.kvm.vm_types import KVM_X86_SEV_ES_VM, KVM_X86_SEV_VM, KVM_X86_SNP_VM
from tdxlab.machine import Machine
from tdxlab.steps import run, seeded
from tdxlab.vmm_errors import IoctlError
from tdxlab.vmm_run import UNHANDLED
from tdxlab.vmm_snp import SnpDoor, SnpVm

MEMORY = 16 * PAGE_SIZE


@pytest.fixture
def vm() -> SnpVm:
    made = Machine(memory="1 GiB", lps=2, packages=1).create_vm(
        vm_type=KVM_X86_SNP_VM, memory=MEMORY
    )
    assert isinstance(made, SnpVm)
    return made


def mapped(vm: SnpVm) -> int:
    return vm.vm.stats["pages_4k"]


# -- the table


def test_make_private_assigns_and_make_shared_takes_back() -> None:
    rmp = Rmp(Journal())
    rmp.make_private(7, 3, 1)
    assert rmp.lookup(7) == RmpEntry(1, 3)
    assert rmp.entries(1) == {7: 3}
    assert rmp.entries(2) == {}
    rmp.make_shared(7)
    assert rmp.lookup(7) is None
    assert (rmp.made_private, rmp.made_shared) == (1, 1)


@pytest.mark.parametrize(
    ("asid", "gfn", "encrypted", "allowed"),
    [(1, 3, True, True), (2, 3, True, False), (1, 4, True, False), (1, 3, False, False)],
)
def test_allows_asks_for_guest_and_gfn_of_an_assigned_page(
    asid: int, gfn: int, encrypted: bool, allowed: bool
) -> None:
    rmp = Rmp(Journal())
    rmp.make_private(7, 3, 1)
    assert rmp.allows(7, asid, gfn, encrypted=encrypted) == allowed
    assert rmp.allows(8, asid, gfn, encrypted=encrypted) == (not encrypted)


def test_prepare_leaves_an_assigned_page_alone_and_invalidate_a_free_one() -> None:
    rmp = Rmp(Journal())
    arch = SnpGmem(rmp)
    assert arch.prepare(3, 7) == arch.prepare(4, 7) == 0
    assert rmp.entries(arch.asid) == {7: 3}
    arch.invalidate(7)
    arch.invalidate(7)
    assert (rmp.made_private, rmp.made_shared) == (1, 1)


def test_asids_differ_and_a_rewind_takes_all_back() -> None:
    journal = Journal()
    rmp = Rmp(journal)
    mark = journal.mark()
    one, other = SnpGmem(rmp), SnpGmem(rmp)
    assert one.asid != other.asid
    one.prepare(1, 1)
    journal.rewind(mark)
    assert rmp.entries(one.asid) == {}
    assert (rmp.made_private, rmp.new_asid()) == (0, one.asid)


# -- a VM with it


def test_private_use_assigns_the_page_and_maps_it_in_the_direct_root(vm: SnpVm) -> None:
    assert vm.write(0x3000, b"mine").ok
    assert list(vm.owned()) == [0x3000]
    assert mapped(vm) == 1
    assert vm.read(0x3000, 4).value == b"mine"


def test_an_assigned_page_is_prepared_once_however_often_it_is_mapped(vm: SnpVm) -> None:
    vm.write(0x3000, b"mine")
    vm.run_thread(vm.user_memory.munmap(vm.backings[0].hva, MEMORY))
    assert mapped(vm) == 0
    assert vm.read(0x3000, 4).value == b"mine"
    assert vm.rmp.made_private == 1


def test_shared_use_needs_no_entry(vm: SnpVm) -> None:
    vm.convert(0x3000, PAGE_SIZE, to="shared")
    assert vm.write(0x3000, b"all").ok
    assert vm.read_shared(0x3000, 3) == b"all"
    assert vm.owned() == {}


def test_conversion_keeps_the_page_until_a_hole_is_punched(vm: SnpVm) -> None:
    vm.write(0x3000, b"mine")
    (hpa,) = vm.owned().values()
    vm.convert(0x3000, PAGE_SIZE, to="shared")
    assert list(vm.owned()) == [0x3000]
    vm.convert(0x3000, PAGE_SIZE, to="private")
    assert vm.read(0x3000, 4).value == b"mine"
    vm.punch_hole(0x3000, PAGE_SIZE)
    assert vm.owned() == {}
    assert vm.rmp.lookup(hpa >> 12) is None


def test_access_of_the_other_kind_exits_and_the_vmm_converts(vm: SnpVm) -> None:
    vm.set_memory_attributes(0x3000, PAGE_SIZE, private=False)
    result = vm.write(0x3000, b"mine")
    assert result.ok
    assert [type(each).__name__ for each in result.exits] == ["MemoryFaultExit"]
    assert vm.vm.attributes.is_private(3)


def test_shared_access_to_a_mapped_private_page_exits_and_the_vmm_converts(vm: SnpVm) -> None:
    vm.write(0x3000, b"mine")
    vm.guest.shared.put(3, None)
    result = vm.write(0x3000, b"all")
    assert [type(each).__name__ for each in result.exits] == ["MemoryFaultExit"]
    assert result.ok
    assert vm.read_shared(0x3000, 3) == b"all"


def test_a_page_that_was_not_assigned_cannot_be_used(
    vm: SnpVm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SnpGmem, "prepare", lambda *_: 0)
    result = vm.write(0x3000, b"mine")
    assert (result.reason, mapped(vm)) == (UNHANDLED, 1)
    assert f"{SVM_EXIT_NPF}" in result.detail


def refused(monkeypatch: pytest.MonkeyPatch, access: Callable[[], object]) -> list[GuestOutcome]:
    """The nested page faults of a run in which the walk had found a page."""
    seen: list[GuestOutcome] = []
    original = SnpDoor._access

    def listening(self: SnpDoor, *arguments: Any) -> Translation | GuestOutcome:
        found = original(self, *arguments)
        if isinstance(found, GuestOutcome) and found.status == SVM_EXIT_NPF:
            seen.append(found)
        return found

    monkeypatch.setattr(SnpDoor, "_access", listening)
    access()
    return seen


def test_forbidden_access_says_that_the_walk_succeeded_and_whether_the_c_bit_was_set(
    vm: SnpVm, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm.write(0x3000, b"mine")
    vm.guest.shared.put(3, None)
    (plain,) = refused(monkeypatch, lambda: vm.write(0x3000, b"all"))
    monkeypatch.setattr(SnpGmem, "prepare", lambda *_: 0)
    private = refused(monkeypatch, lambda: vm.write(0x4000, b"mine"))
    write, walked = EPT_READ | EPT_WRITE, (EPT_READ | EPT_WRITE | EPT_EXECUTE) << 3
    assert (plain.registers.r8, plain.registers.rcx) == (0x3000, write | walked)
    assert {(each.registers.r8, each.registers.rcx) for each in private} == {
        (0x4000, write | walked | PFERR_GUEST_ENC_MASK)
    }


def test_a_refusing_hook_ends_the_fault_and_the_page_stays_unprepared(
    vm: SnpVm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SnpGmem, "prepare", lambda *_: -errno.EIO)
    assert not vm.write(0x3000, b"mine").ok
    folio = vm.guest_memory.folio(vm.backings[0].gmem, 3)
    assert folio is not None
    assert not folio.prepared
    monkeypatch.undo()
    assert vm.write(0x3000, b"mine").ok
    assert list(vm.owned().values()) == [folio.pfn << 12]


def test_destroy_takes_every_entry_back(vm: SnpVm) -> None:
    vm.touch(0, MEMORY)
    assert len(vm.owned()) == 16
    vm.destroy()
    assert vm.owned() == {}
    assert vm.rmp.made_private == vm.rmp.made_shared == 16


def test_two_guests_own_different_pages() -> None:
    machine = Machine(memory="1 GiB", lps=2, packages=1)
    vms = [machine.create_vm(vm_type=KVM_X86_SNP_VM, memory=MEMORY) for _ in range(2)]
    for vm in vms:
        vm.touch(0)
    one, other = vms
    assert isinstance(one, SnpVm)
    assert isinstance(other, SnpVm)
    assert one.asid != other.asid
    assert set(one.owned().values()).isdisjoint(other.owned().values())


# -- the rules, whatever happens in whatever order


def broken_rules(vm: SnpVm) -> list[str]:
    """What is wrong: the RMP has the pages that guest_memfd has prepared, and nothing else; what is
    mapped as private is assigned, what is mapped as shared is not.
    """
    gmem, wrong = vm.backings[0].gmem, []
    prepared = {i: f.pfn for i, f in vm.guest_memory.pages(gmem).items() if f.prepared}
    owned = {gpa >> 12: hpa >> 12 for gpa, hpa in vm.owned().items()}
    if owned != prepared:
        wrong.append(f"assigned {owned}, prepared {prepared}")
    root = vm.vm.sps[vm.vcpu(0).root_hpa] if vm.vcpu(0).root_hpa > 0 else None
    for it in for_each_tdp_pte(vm.vm, root, 0, 16) if root else ():
        if it.old_spte & SPTE_MMU_PRESENT_MASK and it.level == 1:
            pfn, private = spte_to_pfn(it.old_spte), vm.vm.attributes.is_private(it.gfn)
            if (vm.rmp.lookup(pfn) == RmpEntry(vm.asid, it.gfn)) != private:
                wrong.append(f"gfn {it.gfn:#x} is mapped to pfn {pfn:#x}")
    return wrong


def race(vm: SnpVm, seed: int) -> None:
    """Two vCPUs use pages while these are converted and punched out, in a random order."""
    pages = [Write(page * PAGE_SIZE, b"x") for page in range(4)]
    vm.run(pages)
    convert = vm.set_memory_attributes_steps(0, 2 * PAGE_SIZE, private=False)
    schedule = seeded(
        [
            vm.run_steps(pages * 2, vcpu=0),
            vm.run_steps(pages, vcpu=1),
            vm.host.on_cpu(2, convert),
            vm.host.on_cpu(3, vm.punch_hole_steps(0, 3 * PAGE_SIZE)),
        ],
        seed,
    )
    assert [schedule.results[number] for number in (2, 3)] == [0, 0]
    assert schedule.results[0].ok
    assert schedule.results[1].ok


def racing_vm() -> SnpVm:
    machine = Machine(memory="1 GiB", lps=4, packages=1)
    made = machine.create_vm(vm_type=KVM_X86_SNP_VM, vcpus=2, memory=MEMORY)
    assert isinstance(made, SnpVm)
    return made


@pytest.mark.parametrize("seed", range(12))
def test_rmp_follows_guest_memfd_in_every_order(seed: int) -> None:
    vm = racing_vm()
    race(vm, seed)
    assert broken_rules(vm) == []


def test_a_hook_that_forgets_breaks_the_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SnpGmem, "invalidate", lambda *_: None)
    vm = racing_vm()
    vm.touch(0)
    vm.punch_hole(0, PAGE_SIZE)
    assert len(broken_rules(vm)) == 1


# -- its launch, and the types without private memory


def test_pre_fault_works_when_the_launch_has_ended() -> None:
    machine = Machine(memory="1 GiB", lps=2, packages=1)
    vm = machine.create_vm(vm_type=KVM_X86_SNP_VM, memory=MEMORY, launch=False)
    assert isinstance(vm, SnpVm)
    vcpu = vm.vcpu(0)
    assert run(kvm_vcpu_pre_fault_memory(vcpu, 0, PAGE_SIZE)) == -errno.EOPNOTSUPP
    vm.launch_finish()
    assert run(kvm_vcpu_pre_fault_memory(vcpu, 0, PAGE_SIZE)) == PAGE_SIZE
    assert list(vm.owned()) == [0]
    with pytest.raises(IoctlError, match="EINVAL: the launch has ended already"):
        vm.launch_finish()
    vm.destroy()
    with pytest.raises(IoctlError, match=r"EBADF: .* was destroyed"):
        vm.launch_finish()


@pytest.mark.parametrize("vm_type", [KVM_X86_SEV_VM, KVM_X86_SEV_ES_VM])
def test_sev_has_nothing_private(vm_type: int) -> None:
    vm = Machine(memory="1 GiB", lps=2, packages=1).create_vm(vm_type=vm_type, memory=MEMORY)
    assert vm.backings[0].gmem == -1
    assert vm.touch(0).ok
    with pytest.raises(IoctlError, match="has no private memory"):
        vm.set_memory_attributes(0, PAGE_SIZE, private=True)


def test_other_types_have_no_hooks() -> None:
    machine = Machine(memory="1 GiB", lps=2, packages=1)
    vm = machine.create_vm(vm_type=KVM_X86_SW_PROTECTED_VM, memory=MEMORY)
    assert isinstance(vm.guest_memory, GuestMemfds)
    assert vm.guest_memory.arch is None
    vm.touch(0, MEMORY)
    assert machine.rmp.made_private == 0
