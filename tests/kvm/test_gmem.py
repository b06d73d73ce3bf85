"""guest_memfd: pages that come with their first use and go with holes, files and failures."""

from errno import EBADF, EEXIST, EFAULT, EINTR, EINVAL, EIO, ENOMEM, EOPNOTSUPP

import pytest
from slots_scene import SlotScene

from tdxlab.arch import PAGE_SIZE
from tdxlab.kvm.fault import kvm_mmu_page_fault
from tdxlab.kvm.gmem import (
    EHWPOISON,
    FALLOC_FL_KEEP_SIZE,
    FALLOC_FL_PUNCH_HOLE,
    MF_DELAYED,
)
from tdxlab.kvm.page_fault import RET_PF_FIXED, RET_PF_RETRY
from tdxlab.kvm.params import KVM_X86_SW_PROTECTED_VM, KVM_X86_TDX_VM
from tdxlab.kvm.set_attributes import kvm_vm_set_mem_attributes
from tdxlab.kvm.slots import KVM_MEM_GUEST_MEMFD
from tdxlab.steps import run, seeded

PUNCH = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
PRIVATE_WRITE = 1 << 49 | 1 << 32 | 2


def td(vm_type=KVM_X86_TDX_VM, pages=0x20):
    """Gfns from 0x100 on are private, backed by the file from page 8 on."""
    scene = SlotScene(vm_type)
    assert scene.set(0, 0x100, pages, KVM_MEM_GUEST_MEMFD, gmem_pgoff=8) == 0
    run(kvm_vm_set_mem_attributes(scene.vm, 0x100, 0x100 + pages, private=True))
    return scene


def fill(calls, ret=0):
    """Something for populate to call that notes its calls and returns `ret`."""

    def post_populate(gfn, pfn, number):
        yield ("fill", gfn)
        calls.append((gfn, pfn, number))
        return ret

    return post_populate


@pytest.mark.parametrize(
    ("size", "flags", "ret"),
    [
        (0x3000, 0, 1),
        (0, 0, -EINVAL),
        (-0x1000, 0, -EINVAL),
        (0x3001, 0, -EINVAL),
        (0x1000, 1, -EINVAL),
    ],
)
def test_create_wants_whole_pages_and_no_flags(size, flags, ret):
    assert SlotScene(KVM_X86_TDX_VM).files.create(size, flags) == ret


def test_create_gives_a_number_again_after_a_rewind():
    scene = td()
    mark = scene.vm.journal.mark()
    first = scene.files.create(0x1000)
    assert scene.files.create(0x1000) == first + 1
    scene.vm.journal.rewind(mark)
    assert scene.files.create(0x2000) == first


def test_get_pfn_gives_the_same_page_again_zeroed_once():
    scene = td()
    pfn = scene.files.get_pfn(scene.gmem, 8)
    assert scene.pages.in_use[pfn << 12] == "guest_memfd"
    scene.vm.memory.write(pfn << 12, b"guest data")
    assert scene.files.get_pfn(scene.gmem, 8) == pfn
    assert scene.vm.memory.read(pfn << 12, 10) == b"guest data"


def test_get_pfn_zeroes_what_the_page_held_before():
    scene = td()
    page = scene.pages.alloc_page("somebody")
    scene.vm.memory.write(page, b"secret")
    scene.pages.free_page(page)
    assert scene.files.get_pfn(scene.gmem, 8) == page >> 12
    assert scene.vm.memory.read(page, 6) == bytes(6)


def test_get_pfn_fails_without_a_slot_without_memory_and_after_release():
    scene = td()
    assert scene.files.get_pfn(scene.gmem, 7) == -EIO
    assert scene.files.get_pfn(scene.gmem, 8 + 0x20) == -EIO
    while scene.pages.alloc_page("somebody") >= 0:
        pass
    assert scene.files.get_pfn(scene.gmem, 8) == -ENOMEM
    run(scene.files.release(scene.gmem))
    assert scene.files.get_pfn(scene.gmem, 8) == -EFAULT


def test_punch_hole_unmaps_and_frees_the_pages_in_the_hole_only():
    scene = td()
    for gfn in (0x100, 0x101, 0x102):
        assert scene.access(gfn, private=True) == RET_PF_FIXED
    free, seq = scene.pages.free, scene.vm.mmu_invalidate_seq
    scene.hooks.calls.clear()
    assert run(scene.files.fallocate(scene.gmem, PUNCH, 9 << 12, 2 << 12)) == 0
    assert scene.hooks.calls == [("remove", 0x101, 1), ("remove", 0x102, 1)]
    assert scene.pages.free == free + 2
    assert sorted(scene.files.pages(scene.gmem)) == [8]
    assert scene.vm.mmu_invalidate_seq == seq + 1
    assert scene.level(0x100, private=True) == 1


def test_punch_hole_beside_all_slots_frees_without_invalidating():
    scene = td()
    assert run(scene.files.fallocate(scene.gmem, FALLOC_FL_KEEP_SIZE, 0, 1 << 12)) == 0
    seq = scene.vm.mmu_invalidate_seq
    assert run(scene.files.punch_hole(scene.gmem, 0, 8)) == 0
    assert scene.vm.mmu_invalidate_seq == seq
    assert scene.files.pages(scene.gmem) == {}


def test_punch_hole_leaves_a_referenced_page_out_of_the_file_but_not_free():
    scene = td()
    pfn = scene.files.get_pfn(scene.gmem, 8)
    scene.files.get_page(pfn)
    scene.files.get_page(pfn)
    run(scene.files.punch_hole(scene.gmem, 8, 9))
    assert scene.files.folio(scene.gmem, 8) is None
    assert pfn in scene.files.orphans
    scene.files.put_page(pfn)
    assert pfn << 12 in scene.pages.in_use
    scene.files.put_page(pfn)
    assert pfn << 12 not in scene.pages.in_use
    assert not scene.files.orphans


def test_put_page_refuses_a_page_without_a_reference():
    scene = td()
    pfn = scene.files.get_pfn(scene.gmem, 8)
    with pytest.raises(ValueError, match="get_page"):
        scene.files.put_page(pfn)


@pytest.mark.parametrize(
    ("mode", "offset", "size", "ret"),
    [
        (PUNCH, 0, 0x1000, 0),
        (FALLOC_FL_KEEP_SIZE, 0, 0x1000, 0),
        (PUNCH, 0, 0, -EINVAL),
        (PUNCH, -0x1000, 0x1000, -EINVAL),
        (0, 0, 0x1000, -EOPNOTSUPP),
        (FALLOC_FL_PUNCH_HOLE, 0, 0x1000, -EOPNOTSUPP),
        (PUNCH | 1 << 4, 0x1, 0x1000, -EOPNOTSUPP),
        (PUNCH, 0x1, 0x1000, -EINVAL),
        (PUNCH, 0, 0x1001, -EINVAL),
        (FALLOC_FL_KEEP_SIZE, 1023 << 12, 0x1000, 0),
        (FALLOC_FL_KEEP_SIZE, 1023 << 12, 0x2000, -EINVAL),
        (FALLOC_FL_KEEP_SIZE, 1024 << 12, 0x1000, -EINVAL),
        (PUNCH, 1023 << 12, 0x2000, 0),
    ],
)
def test_fallocate_checks_its_arguments(mode, offset, size, ret):
    scene = td()
    assert run(scene.files.fallocate(scene.gmem, mode, offset, size)) == ret
    assert run(scene.files.fallocate(7, mode, offset, size)) == -EBADF


def test_fallocate_has_pages_ready_that_are_not_prepared():
    scene = td()
    assert run(scene.files.fallocate(scene.gmem, FALLOC_FL_KEEP_SIZE, 1022 << 12, 2 << 12)) == 0
    assert sorted(scene.files.pages(scene.gmem)) == [1022, 1023]
    assert not scene.files.pages(scene.gmem)[1022].prepared


def test_release_unmaps_and_frees_everything_and_faults_fail():
    scene = td()
    assert scene.access(0x100, private=True) == RET_PF_FIXED
    scene.hooks.calls.clear()
    run(scene.files.release(scene.gmem))
    assert scene.hooks.calls == [("remove", 0x100, 1)]
    assert "guest_memfd" not in scene.pages.in_use.values()
    assert scene.access(0x100, private=True) == -EFAULT
    assert scene.delete(0) == 0


def test_deleting_a_slot_keeps_the_pages_for_the_next_one():
    scene = td(KVM_X86_SW_PROTECTED_VM)
    assert scene.access(0x100, private=True) == RET_PF_FIXED
    pfn = scene.files.folio(scene.gmem, 8).pfn
    assert scene.delete(0) == 0
    assert scene.level(0x100, private=True) == 0
    assert scene.files.get_pfn(scene.gmem, 8) == -EIO
    assert scene.set(1, 0x100, 0x20, KVM_MEM_GUEST_MEMFD, gmem_pgoff=8) == 0
    assert scene.access(0x100, private=True) == RET_PF_FIXED
    assert scene.files.get_pfn(scene.gmem, 8) == pfn


def test_error_folio_unmaps_the_page_which_stays_and_cannot_be_used():
    scene = td()
    assert scene.access(0x100, private=True) == RET_PF_FIXED
    assert run(scene.files.error_folio(scene.gmem, 8)) == MF_DELAYED
    assert scene.level(0x100, private=True) == 0
    assert scene.access(0x100, private=True) == -EHWPOISON
    pfn = scene.files.folio(scene.gmem, 8).pfn
    run(scene.files.punch_hole(scene.gmem, 8, 9))
    assert scene.pages.leaked == {pfn << 12: "memory failure"}
    with pytest.raises(ValueError, match="no page 8"):
        run(scene.files.error_folio(scene.gmem, 8))


def test_populate_lets_the_caller_fill_each_page_once():
    scene = td()
    calls = []
    assert run(scene.files.populate(0x102, 2, fill(calls))) == 2
    pfns = [scene.files.folio(scene.gmem, index).pfn for index in (10, 11)]
    assert calls == [(0x102, pfns[0], 0), (0x103, pfns[1], 1)]
    assert run(scene.files.populate(0x103, 1, fill(calls))) == -EEXIST
    assert run(scene.files.populate(0x101, 3, fill(calls))) == 1


def test_populate_stops_at_the_end_of_the_slot():
    assert run(td().files.populate(0x11E, 9, fill([]))) == 2


def test_populate_fails_without_pages_a_slot_or_the_private_attribute():
    scene = td()
    assert run(scene.files.populate(0x100, 0, fill([]))) == -EINVAL
    assert run(scene.files.populate(0x80, 1, fill([]))) == -EINVAL
    run(kvm_vm_set_mem_attributes(scene.vm, 0x101, 0x102, private=False))
    assert run(scene.files.populate(0x101, 1, fill([]))) == -EINVAL
    assert run(scene.files.populate(0x100, 2, fill([]))) == 1
    run(scene.files.release(scene.gmem))
    assert run(scene.files.populate(0x105, 1, fill([]))) == -EFAULT


def test_populate_leaves_a_page_unprepared_that_could_not_be_filled():
    scene = td()
    assert run(scene.files.populate(0x100, 2, fill([], -EIO))) == -EIO
    assert not scene.files.folio(scene.gmem, 8).prepared
    assert run(scene.files.populate(0x100, 2, fill([]))) == 2


def test_populate_is_interrupted_by_a_signal():
    scene = td()
    calls = []
    pending = [False, True]
    assert run(scene.files.populate(0x100, 3, fill(calls), lambda: pending.pop(0))) == 1
    assert run(scene.files.populate(0x101, 3, fill(calls), lambda: True)) == -EINTR


@pytest.mark.parametrize("seed", range(60))
def test_punch_hole_leaves_no_mapping_of_a_freed_page_whoever_moves_first(seed):
    scene = td()
    hole = scene.files.punch_hole(scene.gmem, 8, 10)
    fault = kvm_mmu_page_fault(scene.vcpu, 0x101 << 12, PRIVATE_WRITE)
    results = seeded([hole, fault], seed).results
    assert results[0] == 0
    assert results[1] in (RET_PF_FIXED, RET_PF_RETRY)
    folio = scene.files.folio(scene.gmem, 9)
    if scene.level(0x101, private=True):
        _, spte = scene.spte(0x101 << 12)
        assert folio is not None
        assert spte & scene.vm.masks.address == folio.pfn << 12


@pytest.mark.parametrize("seed", range(20))
def test_punch_hole_and_populate_keep_each_other_out(seed):
    scene = td()
    calls = []
    hole = scene.files.punch_hole(scene.gmem, 8, 12)
    results = seeded([hole, scene.files.populate(0x100, 4, fill(calls))], seed).results
    assert results == {0: 0, 1: 4}
    assert len(scene.files.pages(scene.gmem)) in (0, 4)


def test_everything_is_taken_back_by_a_rewind():
    scene = td()
    before = scene.digest()
    mark = scene.journal.mark()
    scene.access(0x100, private=True)
    run(scene.files.punch_hole(scene.gmem, 8, 9))
    scene.access(0x101, private=True)
    assert scene.files.create(PAGE_SIZE) == 1
    run(scene.files.release(scene.gmem))
    scene.journal.rewind(mark)
    assert scene.digest() == before
