"""Invariants of a machine with a host: they hold through a TD's life, each one notices the damage
that it is there for, and a kernel with a mistake in it breaks them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from errno import EIO
from typing import Any

import pytest

from tdxlab import steps
from tdxlab.abi import leaves as abi
from tdxlab.abi.registers import Registers
from tdxlab.abi.status import TDX_OPERAND_BUSY, TDX_PAGE_METADATA_INCORRECT
from tdxlab.arch import HPA_MASK, PAGE_SHIFT
from tdxlab.cpu import Translation
from tdxlab.guest import Access, MapGpa, Write
from tdxlab.invariants import INVARIANTS, SCOPES, InvariantBroken, Scope, check, host_pages, mmu
from tdxlab.invariants.picture import Picture
from tdxlab.kvm import tdp_mmu, tdp_set, tdx_hooks, tdx_teardown
from tdxlab.kvm.blocked import make_blocked_spte
from tdxlab.kvm.locks import READ, WRITE
from tdxlab.kvm.pages import HostPages
from tdxlab.kvm.spte import FROZEN_SPTE, SHADOW_NONPRESENT_VALUE, spte_to_pfn
from tdxlab.kvm.tdp_iter import TdpIter, gfn_root_bits
from tdxlab.kvm.vm import OUTSIDE_GUEST_MODE, Vm
from tdxlab.machine import Machine
from tdxlab.seam.rules import PT_REG
from tdxlab.steps import Operation
from tdxlab.vmm_errors import IoctlError
from tdxlab.vmm_td import Td

PRIVATE, NEIGHBOUR, SHARED = 0x1000, 0x2000, 0x3000
FREE_GPA = 0x8000


class Bench:
    """A machine with a TD that has used private and shared memory, and is idle."""

    def __init__(self) -> None:
        self.machine = Machine(memory="1 GiB", lps=2, packages=1)
        self.td: Td = self.machine.create_td(vcpus=2, memory="4 MiB", image=b"code")
        for gpa in (PRIVATE, NEIGHBOUR):
            assert self.td.touch(gpa).ok
        assert self.td.convert(SHARED, 0x1000, to="shared").ok
        assert self.td.touch(SHARED, vcpu=1).ok
        self.vm: Vm = self.td.vm
        self.words = self.machine.memory.words

    def place(self, gpa: int, *, level: int = 1, mirror: bool = True) -> TdpIter:
        """The SPTE for `gpa`, without the SHARED bit, in one of the trees."""
        vcpu = self.vm.vcpus[0]
        root = self.vm.sps[vcpu.mirror_root_hpa if mirror else vcpu.root_hpa]
        gfn = gpa >> PAGE_SHIFT
        walk = TdpIter(self.vm, root, level, gfn, gfn_root_bits(self.vm, root)).walk(gfn + 1)
        return next(it for it in walk if it.level == level)

    def put(self, gpa: int, spte: int, *, level: int = 1, mirror: bool = True) -> None:
        self.words.put(self.place(gpa, level=level, mirror=mirror).word, spte)

    def spte(self, gpa: int, *, level: int = 1, mirror: bool = True) -> int:
        return self.words.view[self.place(gpa, level=level, mirror=mirror).word]

    def enter(self) -> int:
        """vCPU 0 goes inside and stays there, having used shared memory; returns its LP."""
        thread = self.td.run_steps(
            [Write(SHARED | self.td.guest.shared_mask), *[Write(PRIVATE)] * 9]
        )
        for step in thread:
            if step[0] == "guest" and step[1].gpa == PRIVATE:
                break
        self.thread = thread
        return 0


def forget_a_mirror_leaf(bench: Bench) -> None:
    bench.put(PRIVATE, SHADOW_NONPRESENT_VALUE)


def map_another_page_in_the_mirror(bench: Bench) -> None:
    bench.put(PRIVATE, bench.spte(PRIVATE) & ~HPA_MASK | bench.spte(NEIGHBOUR) & HPA_MASK)


def map_more_in_the_mirror(bench: Bench) -> None:
    bench.put(FREE_GPA, bench.spte(PRIVATE))
    bench.vm.update_page_stats(1, 1)


def exchange_an_external_page(bench: Bench) -> None:
    sp = bench.vm.sp_of(bench.spte(PRIVATE, level=2))
    bench.vm.sps.put(sp.spt, sp._replace(external_spt=bench.vm.vcpus[0].external_spt_cache[0]))


def give_a_page_of_the_module_away(bench: Bench) -> None:
    bench.machine.host.pages.free_page(bench.spte(PRIVATE) & HPA_MASK)


def free_a_mapped_page(bench: Bench) -> None:
    bench.machine.host.pages.free_page(bench.spte(SHARED, mirror=False) & HPA_MASK)


def leak_without_a_word(bench: Bench) -> None:
    bench.machine.host.pages.leak(bench.machine.host.pages.alloc_page("?"), "")


def forget_a_page(bench: Bench) -> None:
    bench.machine.host.pages.alloc_page("nobody's")


def use_a_page_twice(bench: Bench) -> None:
    vcpu = bench.vm.vcpus[0]
    vcpu.page_cache = (*vcpu.page_cache, vcpu.page_cache[0])


def use_a_free_page(bench: Bench) -> None:
    vcpu = bench.vm.vcpus[0]
    bench.machine.host.pages.free_page(vcpu.page_cache[-1])


def lose_count_of_pages(bench: Bench) -> None:
    bench.machine.host.pages.counts.put(0, bench.machine.host.pages.counts.view[0] - 1)


def return_a_page_that_is_in_use(bench: Bench) -> None:
    pages = bench.machine.host.pages
    hpa = pages.alloc_page("first")
    pages.free_page(hpa)
    other = pages.alloc_page("first")
    pages.free_page(other)
    pages.uses.put(other >> PAGE_SHIFT, pages._numbers["first"])
    pages.counts.put(0, pages.counts.view[0] + 1)


def clear_a_page_before_its_lines_are_written_back(bench: Bench) -> None:
    memory, rows = bench.machine.memory, bench.machine.module.pamt.in_use()
    used = [r.hpa for r in rows if r.page_type == PT_REG and memory.is_td_owned(r.hpa)]
    memory.write_back_page(used[0], bench.td.keyid or 0)
    for hpa in used[:2]:
        memory.clear_page(hpa)
    assert list(memory.caches.overtaken) == [used[1] >> PAGE_SHIFT]


def keep_a_control_page_as_a_table_page(bench: Bench) -> None:
    vcpu = bench.vm.vcpus[0]
    tdx: Any = bench.td.tdx
    vcpu.page_cache = (*vcpu.page_cache, tdx.td.tdcs[0])
    tdx.td = tdx.td._replace(tdcs=tdx.td.tdcs[1:])


def translate_to_a_free_shared_page(bench: Bench) -> None:
    lp = bench.enter()
    tlb = bench.machine.cpu.tlbs[lp]
    shared = bench.td.guest.shared_mask
    key = next(key for key in tlb if key[1] << PAGE_SHIFT & shared)
    free = bench.machine.host.pages.alloc_page("for a moment")
    bench.machine.host.pages.free_page(free)
    tlb.put(key, Translation(free, 0, 7))


def forget_a_leaf_in_the_statistics(bench: Bench) -> None:
    bench.vm.update_page_stats(1, -1)


def forget_a_table_in_the_statistics(bench: Bench) -> None:
    bench.vm.add_stat("pt_pages_mirror", 1)


def forget_a_table(bench: Bench) -> None:
    root = bench.vm.sps[bench.vm.vcpus[0].root_hpa]
    bench.vm.sps.put(bench.vm.vcpus[0].page_cache[-1], root)
    bench.vm.vcpus[0].page_cache = bench.vm.vcpus[0].page_cache[:-1]


def hold_a_root_twice(bench: Bench) -> None:
    root = bench.vm.vcpus[0].root_hpa
    bench.vm.root_count.put(root, bench.vm.root_count[root] + 1)


def map_shared_memory_in_the_mirror(bench: Bench) -> None:
    index = bench.td.guest.shared_mask >> 39 & 511
    root = bench.machine.memory.frame(bench.vm.vcpus[0].mirror_root_hpa)
    bench.words.put(root + index, FROZEN_SPTE)


def map_private_memory_in_the_direct_root(bench: Bench) -> None:
    root = bench.machine.memory.frame(bench.vm.vcpus[0].root_hpa)
    bench.words.put(root, FROZEN_SPTE)


def lose_a_keyid(bench: Bench) -> None:
    bench.machine.host.tdx_guest_keyid_alloc("nobody")


def keep_mmu_lock_for_read(bench: Bench) -> None:
    steps.run(bench.vm.mmu_lock.lock(READ))


def keep_mmu_lock_for_write(bench: Bench) -> None:
    steps.run(bench.vm.mmu_lock.lock(WRITE))


def keep_tdx_lock(bench: Bench) -> None:
    steps.run(bench.machine.host.tdx_lock.lock())


def leave_an_entry_frozen(bench: Bench) -> None:
    bench.put(FREE_GPA, FROZEN_SPTE)


def block_an_entry_without_a_page(bench: Bench) -> None:
    bench.put(FREE_GPA, make_blocked_spte(0x1234))


def leave_an_entry_blocked(bench: Bench) -> None:
    bench.put(PRIVATE, make_blocked_spte(spte_to_pfn(bench.spte(PRIVATE))))


def forget_where_a_vcpu_is(bench: Bench) -> None:
    bench.enter()
    bench.vm.vcpus[0].mode = OUTSIDE_GUEST_MODE


#: Damage, number and name of the invariant that it breaks, its scope.
DAMAGES: list[tuple[Callable[[Bench], None], int, str, str]] = [
    (forget_a_mirror_leaf, 1, "mirror leaves are sept leaves", "alive"),
    (map_another_page_in_the_mirror, 1, "mirror leaves are sept leaves", "alive"),
    (map_more_in_the_mirror, 1, "mirror leaves are sept leaves", "alive"),
    (exchange_an_external_page, 2, "mirror tables are sept tables", "alive"),
    (give_a_page_of_the_module_away, 5, "the module owns no free page", "always"),
    (free_a_mapped_page, 5, "leaves map pages in use", "always"),
    (leak_without_a_word, 5, "leaked pages have a cause", "always"),
    (forget_a_page, 5, "pages in use have one user", "quiet"),
    (use_a_page_twice, 5, "pages in use have one user", "quiet"),
    (use_a_free_page, 5, "pages in use have one user", "quiet"),
    (lose_count_of_pages, 5, "pages add up", "quiet"),
    (return_a_page_that_is_in_use, 5, "pages add up", "quiet"),
    (keep_a_control_page_as_a_table_page, 5, "host pages are not the modules", "quiet"),
    (translate_to_a_free_shared_page, 6, "shared translations are of pages in use", "always"),
    (forget_a_leaf_in_the_statistics, 8, "tables are counted right", "quiet"),
    (forget_a_table_in_the_statistics, 8, "tables are counted right", "quiet"),
    (forget_a_table, 8, "tables are known", "quiet"),
    (hold_a_root_twice, 8, "roots are counted right", "quiet"),
    (map_shared_memory_in_the_mirror, 9, "shared and private have their own roots", "always"),
    (map_private_memory_in_the_direct_root, 9, "shared and private have their own roots", "always"),
    (lose_a_keyid, 10, "keyids are those of the module", "quiet"),
    (keep_mmu_lock_for_read, 11, "locks of the host are free", "quiet"),
    (keep_mmu_lock_for_write, 11, "locks of the host are free", "quiet"),
    (keep_tdx_lock, 11, "locks of the host are free", "quiet"),
    (leave_an_entry_frozen, 11, "nothing is frozen", "quiet"),
    (leave_an_entry_blocked, 11, "nothing is frozen", "quiet"),
    (block_an_entry_without_a_page, 1, "blocked pages are still in the sept", "always"),
    (forget_where_a_vcpu_is, 13, "vcpus inside can be kicked", "always"),
    (
        clear_a_page_before_its_lines_are_written_back,
        14,
        "pages are written back before they change keys",
        "always",
    ),
]


@pytest.fixture(scope="module")
def shared_bench() -> Bench:
    return Bench()


@pytest.fixture
def bench(shared_bench: Bench) -> Iterator[Bench]:
    """The bench that all tests share, as it was."""
    mark = shared_bench.machine.mark()
    yield shared_bench
    if hasattr(shared_bench, "thread"):
        shared_bench.thread.close()
        del shared_bench.thread
    shared_bench.machine.rewind(mark)
    shared_bench.machine.journal.forget(mark)


@pytest.mark.parametrize(
    ("damage", "number", "name", "scope"), DAMAGES, ids=lambda x: getattr(x, "__name__", None)
)
def test_check_raises_for_the_invariant_that_a_damage_breaks(
    bench: Bench, damage: Callable[[Bench], None], number: int, name: str, scope: str
) -> None:
    check(bench.machine, "alive")
    damage(bench)
    if scope != "always":
        check(bench.machine, "always")
    invariant = next(invariant for invariant in INVARIANTS if invariant.name == name)
    assert (invariant.number, invariant.scope) == (number, scope)
    with pytest.raises(InvariantBroken):
        check(bench.machine, invariant.scope)
    assert name in broken(bench.machine)


def broken(machine: Machine, scope: Scope = "alive") -> dict[str, str]:
    """Name of each invariant of a scope that is broken -> its first explanation."""
    picture = Picture.of(machine)
    wanted = [i for i in INVARIANTS if SCOPES.index(i.scope) <= SCOPES.index(scope)]
    found = {invariant.name: next(invariant.faults(picture), "") for invariant in wanted}
    return {name: fault for name, fault in found.items() if fault}


def test_invariants_of_the_host_each_have_a_damage() -> None:
    named = {name for _, _, name, _ in DAMAGES}
    hosts = {
        i.name for i in INVARIANTS if i.faults.__module__ in (mmu.__name__, host_pages.__name__)
    }
    assert named == hosts


def test_check_passes_at_every_step_of_a_tds_life() -> None:
    machine = Machine(memory="1 GiB", lps=2, packages=1)
    td = machine.create_td(vcpus=2, memory="4 MiB", image=b"code")
    shared = td.guest.shared_mask
    program: list[Access] = [
        Write(PRIVATE),
        MapGpa(SHARED | shared, 0x2000),
        Write(SHARED | shared),
        MapGpa(SHARED, 0x1000),
        Write(SHARED),
    ]
    for operation in (td.run_steps(program), machine.host.on_cpu(1, td.destroy_steps())):
        for _ in operation:
            check(machine, "always")
        check(machine, "alive")
    assert machine.host.vm_list == ()
    assert not machine.host.pages.in_use


def test_check_passes_while_a_td_is_built() -> None:
    machine = Machine(memory="1 GiB", lps=2, packages=1)
    td = machine.create_td(memory="4 MiB", launch=False)
    check(machine, "alive")
    machine.add_firmware(td, bytes(0x3000))
    check(machine, "alive")
    td.finalize()
    check(machine, "alive")


def test_check_passes_with_premapped_pages() -> None:
    """The module refuses a page: the mirror has it already, and KVM counts it."""
    machine = Machine(memory="1 GiB", lps=2, packages=1)
    td = machine.create_td(memory="4 MiB", launch=False)
    answer(machine, abi.TDH_MEM_PAGE_ADD, TDX_OPERAND_BUSY)
    with pytest.raises(IoctlError):
        td.add_image(0, b"code")
    assert td.tdx.nr_premapped == 1
    check(machine, "alive")
    td.tdx.nr_premapped = 0
    assert "mirror leaves are sept leaves" in broken(machine)
    td.tdx.nr_premapped = 1
    td.punch_hole(0, 0x1000)
    assert td.tdx.nr_premapped == 0
    check(machine, "alive")


# ---- a kernel with a mistake in it --------------------------------------------------------------


def answer(machine: Machine, leaf: int, *statuses: int) -> None:
    """The next calls of `leaf` get these statuses, and do nothing."""
    ordered, original = list(statuses), machine.seamcall_steps

    def meddled(lp: int, rax: int, registers: Registers) -> Operation:
        if rax == leaf and ordered:
            return ordered.pop(0)
        return (yield from original(lp, rax, registers))

    machine.seamcall_steps = meddled  # type: ignore[method-assign]


@pytest.fixture
def young() -> Bench:
    """A bench of one's own: what is forgotten here is forgotten for good."""
    return Bench()


def done(value: Any = None) -> Any:
    """An operation that does nothing."""
    return lambda *args, **kwargs: _nothing(value)


def _nothing(value: Any) -> Operation:
    yield ("nothing",)
    return value


def test_check_notices_a_kernel_that_does_not_remove(
    young: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tdx_hooks, "tdx_sept_zap_private_spte", done(0))
    young.td.punch_hole(PRIVATE, 0x1000)
    assert "mirror leaves are sept leaves" in broken(young.machine)


def test_check_notices_a_kernel_that_frees_what_it_could_not_remove(
    young: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tdx_hooks, "tdx_sept_zap_private_spte", done(0))
    young.td.guest_memory.put_page(young.spte(PRIVATE) >> PAGE_SHIFT & (1 << 40) - 1)
    young.td.punch_hole(PRIVATE, 0x1000)
    assert "the module owns no free page" in broken(young.machine, "always")


def test_check_passes_when_a_kernel_forgets_tlb_tracking(
    young: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The module does not let the page go: the TD dies, and the page is lost with a cause."""
    monkeypatch.setattr(tdx_hooks, "tdx_track", done())
    young.enter()
    young.td.punch_hole(PRIVATE, 0x1000)
    assert "TDH_MEM_PAGE_REMOVE" in young.vm.vm_bugged
    assert list(young.machine.host.pages.leaked.values()) == [young.vm.vm_bugged]
    check(young.machine, "always")


def test_check_notices_a_kernel_that_leaves_an_entry_frozen(
    young: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = tdp_set.set_external_spte_present

    def without_restore(vm: Vm, it: TdpIter, new_spte: int) -> Operation:
        error = yield from original(vm, it, new_spte)
        if error:
            vm.memory.words.put(it.word, FROZEN_SPTE)
        return error

    monkeypatch.setattr(tdp_set, "set_external_spte_present", without_restore)
    answer(young.machine, abi.TDH_MEM_PAGE_AUG, TDX_PAGE_METADATA_INCORRECT)
    assert young.td.touch(FREE_GPA).error == -EIO
    assert set(broken(young.machine)) == {"nothing is frozen"}


def test_check_passes_when_a_hook_failed(young: Bench) -> None:
    answer(young.machine, abi.TDH_MEM_PAGE_AUG, TDX_PAGE_METADATA_INCORRECT)
    assert young.td.touch(FREE_GPA).error == -EIO
    assert young.vm.vm_dead
    check(young.machine, "alive")


def test_check_notices_a_kernel_that_does_not_count(
    young: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Vm, "update_page_stats", lambda *args: None)
    assert young.td.touch(FREE_GPA).ok
    assert set(broken(young.machine)) == {"tables are counted right"}


def test_check_notices_a_kernel_that_does_not_flush_shared_memory(
    young: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A vCPU inside goes on using a page that its VMM has unmapped."""
    monkeypatch.setattr(Vm, "flush_remote_tlbs", lambda vm: None)
    young.enter()
    hva = young.td.backings[0].hva + SHARED
    steps.run(young.machine.host.on_cpu(1, young.td.user_memory.munmap(hva, 0x1000)))
    found = broken(young.machine, "always")
    assert set(found) == {"shared translations are of pages in use"}


def test_check_passes_when_shared_memory_is_unmapped_under_a_vcpu(young: Bench) -> None:
    young.enter()
    hva = young.td.backings[0].hva + SHARED
    for _ in young.machine.host.on_cpu(1, young.td.user_memory.munmap(hva, 0x1000)):
        check(young.machine, "always")
    check(young.machine, "always")


def test_check_notices_a_kernel_that_does_not_reclaim(
    young: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tdx_teardown, "tdx_reclaim_page", done(0))
    young.td.destroy()
    assert "the module owns no free page" in broken(young.machine, "always")


def test_check_notices_a_kernel_that_leaks_in_silence(
    young: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer(young.machine, abi.TDH_PHYMEM_PAGE_RECLAIM, TDX_OPERAND_BUSY)
    monkeypatch.setattr(HostPages, "leak", lambda pages, hpa, why: None)
    young.td.destroy()
    assert "pages in use have one user" in broken(young.machine)


def test_check_passes_when_a_page_cannot_be_reclaimed(young: Bench) -> None:
    answer(young.machine, abi.TDH_PHYMEM_PAGE_RECLAIM, TDX_OPERAND_BUSY)
    young.td.destroy()
    assert len(young.machine.host.pages.leaked) >= 1
    check(young.machine, "alive")


def test_check_notices_a_kernel_that_zaps_the_mirror_alone(
    young: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tdp_set, "_remove_leaf", done(0))
    young.td.punch_hole(PRIVATE, 0x1000)
    assert "mirror leaves are sept leaves" in broken(young.machine)


def test_check_notices_a_kernel_that_maps_shared_memory_in_the_mirror(
    young: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fault loses the SHARED bit: the module gets a page of the VMM's process."""
    assert young.td.convert(FREE_GPA, 0x1000, to="shared").ok

    def mirror_root(vcpu: Any, fault: Any) -> Any:
        return vcpu.vm.sps[vcpu.mirror_root_hpa]

    monkeypatch.setattr(tdp_mmu, "tdp_mmu_get_root_for_fault", mirror_root)
    thread = young.td.run_steps([Write(FREE_GPA | young.td.guest.shared_mask)])
    found: dict[str, str] = {}
    for step in thread:
        if step[0] == "read_lock(mmu_lock)" and found:
            break
        found = broken(young.machine, "quiet")
        if "host pages are not the modules" in found:
            break
    thread.close()
    assert "host pages are not the modules" in found
