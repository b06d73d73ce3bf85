"""Deleting a memslot by each policy: what goes, what stays, and what it costs, for any layout."""

from __future__ import annotations

import random
from typing import Any

import pytest

from tdxlab import invariants, steps, views
from tdxlab.abi.leaves import TDH_MEM_RANGE_UNBLOCK
from tdxlab.abi.status import (
    OPERAND_ID_RCX,
    TDX_EPT_ENTRY_STATE_INCORRECT,
    TDX_OPERAND_BUSY,
)
from tdxlab.arch import PAGE_SIZE, SIZE_1G, SIZE_2M
from tdxlab.crew import Actor
from tdxlab.kvm.blocked import is_blocked_spte
from tdxlab.kvm.injection import FailNth
from tdxlab.kvm.memory_region import kvm_set_memory_region
from tdxlab.kvm.params import KVM_X86_SW_PROTECTED_VM, MmuParams, VmConfig
from tdxlab.kvm.slots import KVM_MEM_GUEST_MEMFD
from tdxlab.kvm.tdp_iter import for_each_tdp_pte
from tdxlab.machine import Machine
from tdxlab.policies import KernelPolicy
from tdxlab.policy import Surroundings, Tally
from tdxlab.policy_bench import zapper
from tdxlab.races import build
from tdxlab.steps import Operation
from tdxlab.study import slot_costs
from tdxlab.study.slot_lab import Meter
from tdxlab.vmm import Gate
from tdxlab.vmm_ioctls import HVA_BASE, Backing
from tdxlab.vmm_td import Td

#: Where slots may be: far apart, so that trees get tables of every level.
_BASES = (0, 3 * SIZE_2M, SIZE_1G, 600 * SIZE_1G)
_LEAVES = ("RANGE.BLOCK", "TRACK", "PAGE.REMOVE", "RANGE.UNBLOCK", "PAGE.AUG")
WIDTHS = pytest.mark.parametrize("gpaw", [48, 52])


class Layout:
    """A VM with a slot at each of _BASES, and pages used here and there. gfns: private ones of a
    TD, all of another VM; shared: shared ones of a TD; going: the slot to be deleted.
    """

    def __init__(self, gate: Gate, dice: random.Random) -> None:
        self.gate = gate
        self.slots: list[Backing] = [
            gate.add_memory(base, dice.randrange(1, 1400) * PAGE_SIZE, private=isinstance(gate, Td))
            for base in _BASES
        ]
        self.going = dice.choice(self.slots)
        self.gfns: set[int] = set()
        self.shared: set[int] = set()
        for slot in self.slots:
            number = slot.size // PAGE_SIZE
            picked = dice.sample(range(number), min(number, dice.randrange(40)))
            for number, index in enumerate(picked):
                gpa = slot.gpa + index * PAGE_SIZE
                if isinstance(gate, Td) and number % 3 == 0:
                    assert gate.convert(gpa, PAGE_SIZE, to="shared").ok
                    self.shared.add(gpa // PAGE_SIZE)
                else:
                    self.gfns.add(gpa // PAGE_SIZE)
                assert gate.touch(gpa).ok

    def in_slot(self, gfns: set[int]) -> int:
        return len(gfns & set(self.range))

    @property
    def range(self) -> range:
        start = self.going.gpa // PAGE_SIZE
        return range(start, start + self.going.size // PAGE_SIZE)

    def walked(self, gfns: set[int]) -> int:
        level = self.gate.vm.config.root_level
        start, end = self.range.start, self.range.stop
        return slot_costs.walked_in(start, end, gfns, root_level=level)


def delete(gate: Gate, backing: Backing) -> dict[str, int]:
    """Delete a slot; what that took."""
    before = counts(gate)
    with Meter(gate.vm).on() as meter:
        gate.set_user_memory_region(backing.slot, backing.gpa, 0)
    gained = {name: count - before[name] for name, count in counts(gate).items()}
    return gained | {
        "write": meter.walked[True],
        "read": meter.walked[False],
        "cleared": meter.events["cleared"],
        "rescanned": meter.events["rescanned"],
    }


def create(gate: Gate, backing: Backing, **changes: int) -> None:
    flags = KVM_MEM_GUEST_MEMFD if backing.gmem >= 0 else 0
    values: dict[str, Any] = {"flags": flags, "gmem": backing.gmem} | changes
    gate.set_user_memory_region(backing.slot, backing.gpa, backing.size, **values)


def counts(gate: Gate) -> dict[str, int]:
    machine, vm = gate.host.machine, gate.vm
    calls = {name: machine.seamcalls.get(f"TDH.MEM.{name}", 0) for name in _LEAVES}
    return calls | {
        "WBINVD": machine.seamcalls.get("TDH.PHYMEM.PAGE.WBINVD", 0),
        "kicks": gate.host.counts["kick"],
        "flushes": vm.stats["remote_tlb_flush"],
        "tables": vm.stats["pt_pages"],
        "faults": sum(vcpu.stats["pf_taken"] for vcpu in vm.vcpus),
    }


def plain(
    root_level: int = 4, maxphyaddr: int = 52, *, quirk: bool = True, prove_mmu: bool = False
) -> Gate:
    params = MmuParams(maxphyaddr=maxphyaddr, prove_mmu=prove_mmu)
    machine = Machine(memory="4 GiB", lps=2, packages=1, params=params)
    config = VmConfig(root_level=root_level, slot_zap_all=quirk)
    vm = machine.create_vm(memory=PAGE_SIZE, config=config)
    vm.set_user_memory_region(0, 0, 0)
    vm.backings = ()
    vm.user_memory.areas = ()
    return vm


def td_of(gpaw: int, **choices: Any) -> Td:
    machine = Machine(gpaw=gpaw, memory="1 GiB", lps=2, packages=1)
    return machine.create_td(memory=8 * SIZE_2M, **choices)


# -- costs of any layout


@pytest.mark.parametrize(("root_level", "maxphyaddr"), [(4, 52), (5, 52), (4, 46)])
@pytest.mark.parametrize("policy", ["F", "T"])
def test_costs_of_a_plain_vm_are_those_of_the_formulas(
    root_level: int, maxphyaddr: int, policy: str
) -> None:
    for seed in range(3):
        gate = plain(root_level, maxphyaddr)
        layout = Layout(gate, random.Random(seed))
        tree = slot_costs.mapped(layout.gfns, root_level=root_level, maxphyaddr=maxphyaddr)
        assert gate.vm.stats["pt_pages"] == sum(tree.tables)
        gate.choose_slot_policy(policy)
        took = delete(gate, layout.going)
        assert not any(took[name] for name in (*_LEAVES, "WBINVD"))
        if policy == "F":
            costs = slot_costs.zap_all(tree)
            assert (took["read"], took["write"]) == (costs.walked, 0)
            assert (took["cleared"], -took["tables"]) == (costs.cleared, costs.freed)
            assert took["rescanned"] == costs.rescanned
            assert (took["kicks"], took["flushes"]) == (1, 0)
            left = layout.gfns - set(layout.range)
            for gfn in left:
                assert gate.touch(gfn * PAGE_SIZE).ok
            assert counts(gate)["faults"] - len(layout.gfns) == len(left)
        else:
            leaves = layout.in_slot(layout.gfns)
            assert (took["write"], took["read"]) == (layout.walked(layout.gfns), 0)
            assert (took["cleared"], took["tables"]) == (leaves, 0)
            assert (took["kicks"], took["flushes"]) == (0, int(leaves > 0))
        invariants.check(gate.host.machine, "alive")


class Leaves(set[tuple[int, int]]):
    """Leaves as (level, index at that level), and what follows from them alone."""

    def tables(self, level: int) -> set[int]:
        """The tables at a level, by their index at the level above."""
        return {i >> 9 * (level + 1 - leaf) for leaf, i in self if leaf <= level}

    def tree(self, root_level: int, maxphyaddr: int) -> slot_costs.Tree:
        tables = tuple(len(self.tables(level)) for level in range(1, root_level))
        root_entries = min(512, 2 ** (maxphyaddr - 12 - 9 * (root_level - 1)))
        return slot_costs.Tree(tables, len(self), root_entries)

    def overlapping(self, gfns: range, root_level: int) -> int:
        """Entries of all tables that have one of the gfns."""
        found = 0
        for level in range(1, root_level + 1):
            first, last = gfns[0] >> 9 * (level - 1), gfns[-1] >> 9 * (level - 1)
            for table in self.tables(level) if level < root_level else {0}:
                found += max(0, min(last, 512 * table + 511) - max(first, 512 * table) + 1)
        return found


#: First GPA of a slot -> level of the host's pages behind it.
_MIXED = {0: 1, SIZE_1G: 3, 3 * SIZE_1G: 2, 600 * SIZE_1G: 2}


def mixed_layout(gate: Gate, dice: random.Random) -> dict[range, Leaves]:
    """Slots with host pages of all sizes, used here and there: gfns of a slot -> its leaves. A leaf
    is as large as the host's page, or less where the slot ends before.
    """
    layout = {}
    for number, (base, most) in enumerate(_MIXED.items()):
        unit, start = 1 << 9 * (most - 1), base // PAGE_SIZE
        gfns = range(start, start + unit + dice.randrange(1, 1400))
        size = -(-len(gfns) // unit) * unit * PAGE_SIZE
        gate.user_memory.mmap(HVA_BASE + base, size, level=most)
        gate.set_user_memory_region(number, base, len(gfns) * PAGE_SIZE)
        layout[gfns] = Leaves()
        for gfn in [gfns[-1], *dice.choices(gfns, k=dice.randrange(15))]:
            assert gate.touch(gfn * PAGE_SIZE).ok
            level = next(
                level
                for level in range(most, 0, -1)
                if (gfn >> 9 * (level - 1) << 9 * (level - 1)) + (1 << 9 * (level - 1)) <= gfns.stop
            )
            layout[gfns].add((level, gfn >> 9 * (level - 1)))
    return layout


def use_again(gate: Gate, leaves: Leaves) -> tuple[int, int]:
    """Touch the first page of each leaf; faults, and tables that it took."""
    before = counts(gate)
    for level, index in leaves:
        assert gate.touch((index << 9 * (level - 1)) * PAGE_SIZE).ok
    after = counts(gate)
    return after["faults"] - before["faults"], after["tables"] - before["tables"]


@pytest.mark.parametrize(
    ("root_level", "maxphyaddr", "prove_mmu"), [(4, 52, False), (5, 52, False), (4, 46, True)]
)
@pytest.mark.parametrize("policy", ["F", "T"])
def test_costs_with_leaves_of_all_sizes_follow_from_the_set_of_leaves_alone(
    root_level: int, maxphyaddr: int, prove_mmu: bool, policy: str
) -> None:
    for seed in range(2):
        dice = random.Random(seed)
        gate = plain(root_level, maxphyaddr, prove_mmu=prove_mmu)
        layout = mixed_layout(gate, dice)
        every = Leaves().union(*layout.values())
        tree = Leaves(every).tree(root_level, maxphyaddr)
        going = dice.choice(list(layout))
        number, slot = list(layout).index(going), layout[going]
        rest = Leaves(every - slot)
        gate.choose_slot_policy(policy)
        size = len(going) * PAGE_SIZE
        took = delete(gate, Backing(number, going.start * PAGE_SIZE, size, -1, 0))
        if policy == "F":
            costs = slot_costs.zap_all(tree, prove_mmu=prove_mmu)
            assert (took["read"], took["write"]) == (costs.walked, 0)
            assert (took["rescanned"], took["cleared"]) == (costs.rescanned, costs.cleared)
            assert (took["tables"], took["flushes"]) == (-sum(tree.tables), 0)
            left = sum(rest.tree(root_level, maxphyaddr).tables)
            assert use_again(gate, rest) == (len(rest), left)
        else:
            walked = Leaves(every).overlapping(going, root_level)
            assert (took["write"], took["read"], took["rescanned"]) == (walked, 0, 0)
            assert (took["cleared"], took["tables"], took["flushes"]) == (len(slot), 0, 1)
            assert use_again(gate, rest) == (0, 0)
            gate.set_user_memory_region(number, going.start * PAGE_SIZE, size)
            assert use_again(gate, slot) == (len(slot), 0)


@WIDTHS
@pytest.mark.parametrize("policy", [None, "T", "B"])
def test_costs_of_a_td_are_those_of_the_formulas(gpaw: int, policy: str | None) -> None:
    for seed in range(2):
        machine = Machine(gpaw=gpaw, memory="1 GiB", lps=2, packages=1)
        td = machine.create_td(memory=PAGE_SIZE)
        td.set_user_memory_region(0, 0, 0)
        td.backings = ()
        td.user_memory.areas = ()
        layout = Layout(td, random.Random(seed))
        td.choose_slot_policy(policy)
        took = delete(td, layout.going)
        private, shared = layout.in_slot(layout.gfns), layout.in_slot(layout.shared)
        price = slot_costs.remove_private if policy != "B" else slot_costs.block_private
        costs = price(private)
        assert took["RANGE.BLOCK"] == costs.blocks
        assert (took["TRACK"], took["kicks"]) == (costs.tracks, costs.kicks)
        assert (took["PAGE.REMOVE"], took["WBINVD"]) == (costs.removes, costs.writebacks)
        assert took["cleared"] == private + shared
        assert (took["tables"], took["read"]) == (0, 0)
        assert took["write"] == layout.walked(layout.gfns) + layout.walked(layout.shared)
        assert took["flushes"] == int(shared > 0 or (private > 0 and policy != "B"))
        invariants.check(machine, "alive")


@pytest.mark.parametrize("leaf_level", [1, 2])
def test_formulas_for_contiguous_memory_are_those_of_the_set(leaf_level: int) -> None:
    for npages in (512, 1024, 3 * 512, 512 * 513):
        gfns = range(npages)
        some = range(0, npages, slot_costs.per_entry(leaf_level))
        assert slot_costs.contiguous(npages, leaf_level=leaf_level) == slot_costs.mapped(
            some, leaf_level=leaf_level
        )
        assert slot_costs.zap_leafs(npages, leaf_level=leaf_level).walked == slot_costs.walked_in(
            0, npages, gfns[:: slot_costs.per_entry(leaf_level)], leaf_level=leaf_level
        )


@pytest.mark.parametrize(
    ("slot", "rest", "leaf_level", "every", "leafs"),
    [
        ("2 GiB", "6 GiB", 1, (2_107_392, 2_101_760, 2_101_257, 4_105), (525_315, 524_288)),
        ("2 GiB", "62 GiB", 1, (16_844_800, 16_810_496, 16_810_049, 32_833), (525_315, 524_288)),
        ("2 GiB", "6 GiB", 2, (10_240, 4_608, 4_105, 9), (1_027, 1_024)),
        (
            *("1 TiB", "4 GiB", 1),
            (270_541_824, 270_011_904, 270_011_399, 527_367),
            (268_960_770, 268_435_456),
        ),
        ("1 TiB", "4 GiB", 2, (1_057_792, 527_872, 527_367, 1_031), (525_314, 524_288)),
    ],
)
def test_formulas_give_the_figures_that_were_worked_out_by_hand(
    slot: str, rest: str, leaf_level: int, every: tuple[int, ...], leafs: tuple[int, ...]
) -> None:
    """For a host of 46 bits."""
    npages = slot_costs.pages(slot) + slot_costs.pages(rest)
    tree = slot_costs.contiguous(npages, leaf_level=leaf_level, maxphyaddr=46)
    assert slot_costs.zap_all(tree) == (*every, slot_costs.covering(npages, leaf_level))
    costs = slot_costs.zap_leafs(slot_costs.pages(slot), leaf_level=leaf_level)
    assert (costs.walked, costs.cleared, costs.faults) == (*leafs, leafs[1])


def test_formulas_give_the_figures_for_private_pages_and_for_books_on_shadow_pages() -> None:
    private = slot_costs.remove_private(slot_costs.pages("2 GiB"))
    assert (private.seamcalls, private.kicks, private.lines) == (2_097_152, 524_288, 33_554_432)
    blocked = slot_costs.block_private(slot_costs.pages("2 GiB"), level=3)
    assert (blocked.blocks, blocked.tracks, blocked.kicks, blocked.unblocks) == (2, 1, 1, 2)
    assert slot_costs.shadow_lookups(slot_costs.pages("2 GiB")) == (525_314, 524_288)


# -- who decides


def test_linux_decides_by_the_type_and_the_quirk_unless_user_space_chose() -> None:
    freed = {}
    for name, gate in (("on", plain()), ("off", plain(quirk=False))):
        freed[name] = delete_used(gate)
    assert freed == {"on": 3, "off": 0}
    machine = Machine(memory="1 GiB", lps=2, packages=1)
    gate = machine.create_vm(vm_type=KVM_X86_SW_PROTECTED_VM, memory=SIZE_2M)
    assert gate.touch(0).ok
    assert delete(gate, gate.backings[0])["tables"] == 0


def delete_used(gate: Gate, policy: str | None = None, slot: int | None = None) -> int:
    """Tables that go when a slot with one used page goes."""
    backing = gate.add_memory(0, SIZE_2M, private=False)
    assert gate.touch(0).ok
    gate.choose_slot_policy(policy, slot)
    return -delete(gate, backing)["tables"]


def test_a_choice_for_a_slot_comes_before_one_for_the_vm() -> None:
    assert delete_used(plain(), "T") == 0
    assert delete_used(plain(), "T", 0) == 0
    assert delete_used(plain(), "T", 5) == 3
    gate = plain(quirk=False)
    gate.choose_slot_policy("F")
    assert delete_used(gate, "T", 0) == 0
    gate.choose_slot_policy(None, 0)
    create(gate, gate.backings[0])
    assert gate.touch(0).ok
    assert -delete(gate, gate.backings[0])["tables"] == 3
    gate.choose_slot_policy(None)
    assert gate.vm.slot_policies == ()


@pytest.mark.parametrize("policy", ["f", "", "zap"])
def test_choose_slot_policy_refuses_what_it_does_not_know(policy: str) -> None:
    with pytest.raises(ValueError, match="there is no policy"):
        plain().choose_slot_policy(policy)


def test_choose_slot_policy_refuses_to_block_where_there_is_no_secure_ept() -> None:
    gate = plain()
    with pytest.raises(ValueError, match="no Secure EPT"):
        gate.choose_slot_policy("B")
    assert gate.vm.slot_policies == ()


@pytest.mark.parametrize("slot", [-1, 32764])
def test_choose_slot_policy_refuses_what_is_no_number_of_a_slot(slot: int) -> None:
    gate = plain()
    with pytest.raises(ValueError, match=r"no slot has the number .* choose 0\.\.32763"):
        gate.choose_slot_policy("T", slot)
    assert gate.vm.slot_policies == ()


# -- blocked and kept


class Parked:
    """A TD whose second slot, of 16 pages, was deleted by blocking; eight of them were used."""

    def __init__(self, gpaw: int = 48) -> None:
        self.td = td_of(gpaw)
        self.machine = self.td.host.machine
        self.backing = self.td.add_memory(SIZE_1G, 16 * PAGE_SIZE)
        assert self.td.touch(SIZE_1G, 8 * PAGE_SIZE).ok
        assert self.td.write(SIZE_1G, b"mine").ok
        self.td.choose_slot_policy("B")
        delete(self.td, self.backing)

    def blocked(self) -> int:
        vm, first = self.td.vm, SIZE_1G // PAGE_SIZE
        root = vm.sps[vm.vcpus[0].mirror_root_hpa]
        return sum(
            is_blocked_spte(it.old_spte) for it in for_each_tdp_pte(vm, root, first, first + 16)
        )

    def back(self, **changes: int) -> dict[str, int]:
        """Create the slot again; the calls that this took."""
        before = counts(self.td)
        create(self.td, self.backing, **changes)
        return {name: n - before[name] for name, n in counts(self.td).items()}


@WIDTHS
def test_a_slot_that_comes_back_has_its_content_and_nothing_is_accepted(gpaw: int) -> None:
    parked = Parked(gpaw)
    assert parked.blocked() == 8
    assert parked.td.read(SIZE_1G, 4).reason == "memory fault"
    invariants.check(parked.machine, "alive")
    took = parked.back()
    assert (took["RANGE.UNBLOCK"], took["TRACK"], took["PAGE.AUG"]) == (8, 0, 0)
    assert (parked.blocked(), parked.td.vm.parked) == (0, ())
    faults = counts(parked.td)["faults"]
    assert parked.td.read(SIZE_1G, 4).value == b"mine"
    assert counts(parked.td)["faults"] == faults
    invariants.check(parked.machine, "alive")


@pytest.mark.parametrize(
    "changes",
    [{"flags": 0, "gmem": -1}, {"gmem": 0}],
    ids=["without a file", "on another file"],
)
def test_pages_are_removed_when_something_else_needs_their_place(changes: dict[str, int]) -> None:
    parked = Parked()
    if changes["gmem"] == 0:
        parked.td.choose_slot_policy("T", 0)
        delete(parked.td, parked.td.backings[0])
    took = parked.back(**changes)
    assert (took["PAGE.REMOVE"], took["WBINVD"], took["RANGE.UNBLOCK"]) == (8, 8, 0)
    assert (parked.blocked(), parked.td.vm.parked) == (0, ())
    invariants.check(parked.machine, "alive")


def test_a_slot_elsewhere_on_the_same_pages_of_the_file_takes_them() -> None:
    parked = Parked()
    backing = parked.backing
    parked.td.set_user_memory_region(
        7, 4 * SIZE_1G, 4 * PAGE_SIZE, flags=KVM_MEM_GUEST_MEMFD, gmem=backing.gmem
    )
    assert (parked.blocked(), parked.td.vm.parked) == (0, ())
    invariants.check(parked.machine, "alive")


def test_a_slot_that_meets_none_of_the_pages_leaves_them_blocked() -> None:
    parked = Parked()
    parked.td.add_memory(4 * SIZE_1G, SIZE_2M)
    assert parked.blocked() == 8
    assert len(parked.td.vm.parked) == 1


def test_holes_and_conversions_reach_pages_that_are_kept_blocked() -> None:
    parked = Parked()
    parked.td.punch_hole(SIZE_1G + PAGE_SIZE, 2 * PAGE_SIZE)
    assert parked.blocked() == 6
    parked.td.set_memory_attributes(SIZE_1G + 5 * PAGE_SIZE, PAGE_SIZE, private=False)
    invariants.check(parked.machine, "alive")
    took = parked.back()
    assert (took["RANGE.UNBLOCK"], took["PAGE.REMOVE"]) == (5, 1)
    assert parked.blocked() == 0
    invariants.check(parked.machine, "alive")


def test_pages_kept_blocked_are_removed_beside_a_zap_policy_of_ones_own() -> None:
    parked = Parked()
    td, tally = parked.td, Tally()
    around = Surroundings(tally, lambda: None, lambda op: None)
    td.vm.mirror_zapper = zapper(td.tdx, KernelPolicy(), around)
    assert td.touch(0, 3 * PAGE_SIZE).ok
    td.punch_hole(SIZE_1G + PAGE_SIZE, 2 * PAGE_SIZE)
    assert (parked.blocked(), tally.pages) == (6, 0)
    invariants.check(parked.machine, "alive")
    td.set_memory_attributes(SIZE_1G + 5 * PAGE_SIZE, PAGE_SIZE, private=False)
    took = parked.back()
    assert (took["RANGE.UNBLOCK"], took["PAGE.REMOVE"], tally.pages) == (5, 1, 0)
    delete(td, parked.backing)
    td.destroy()
    assert (tally.pages, len(parked.machine.host.pages.leaked)) == (3, 0)
    invariants.check(parked.machine, "alive")


def test_a_hole_punched_while_the_slot_changes_hands_is_not_filled_with_the_old_page() -> None:
    parked = Parked()
    td, host, backing = parked.td, parked.machine.host, parked.backing
    before = counts(td)
    place = (backing.slot, backing.gpa, backing.size)
    creating = host.on_cpu(
        0,
        td.set_user_memory_region_steps(
            *place, flags=KVM_MEM_GUEST_MEMFD, hva=backing.hva, gmem=backing.gmem
        ),
    )
    for step in creating:
        if step[0] == "filemap_invalidate_lock" and not td.guest_memory._bindings[backing.gmem]:
            steps.run(host.on_cpu(1, td.punch_hole_steps(backing.gpa, PAGE_SIZE)))
    took = {name: count - before[name] for name, count in counts(td).items()}
    assert (took["RANGE.UNBLOCK"], took["PAGE.REMOVE"]) == (7, 1)
    invariants.check(parked.machine, "alive")


@pytest.mark.parametrize("comes_back", [False, True])
def test_a_td_with_kept_pages_is_destroyed_without_a_leak(comes_back: bool) -> None:
    parked = Parked()
    if comes_back:
        parked.back()
    parked.td.destroy()
    assert len(parked.machine.host.pages.leaked) == 0
    assert parked.machine.host.vm_list == ()
    invariants.check(parked.machine, "alive")


def test_a_rewind_takes_choice_and_parking_back() -> None:
    parked = Parked()
    mark = parked.machine.mark()
    parked.back()
    parked.td.choose_slot_policy(None)
    parked.machine.rewind(mark)
    assert (parked.blocked(), len(parked.td.vm.parked)) == (8, 1)
    assert parked.td.vm.slot_policies == ((None, "B"),)


def test_a_busy_unblock_is_answered_with_a_kick_and_a_second_call() -> None:
    parked = Parked()
    busy = TDX_OPERAND_BUSY | OPERAND_ID_RCX
    with FailNth(parked.machine.host, TDH_MEM_RANGE_UNBLOCK, status=busy):
        took = parked.back()
    assert (took["RANGE.UNBLOCK"], took["kicks"]) == (8, 1)
    assert parked.td.vm.vm_bugged == ""
    invariants.check(parked.machine, "alive")


def test_an_unblock_that_fails_ends_the_td() -> None:
    parked = Parked()
    status = TDX_EPT_ENTRY_STATE_INCORRECT | OPERAND_ID_RCX
    with FailNth(parked.machine.host, TDH_MEM_RANGE_UNBLOCK, n=3, status=status):
        parked.back()
    assert "TDH_MEM_RANGE_UNBLOCK" in parked.td.vm.vm_bugged


def test_pages_blocked_before_the_td_could_run_come_back_afterwards() -> None:
    td = td_of(48, launch=False)
    backing = td.add_memory(SIZE_1G, SIZE_2M)
    td.add_image(SIZE_1G, b"mine" + bytes(2 * PAGE_SIZE))
    td.choose_slot_policy("B")
    took = delete(td, backing)
    assert (took["RANGE.BLOCK"], took["TRACK"], took["kicks"]) == (3, 0, 0)
    td.finalize()
    before = counts(td)
    create(td, backing)
    after = counts(td)
    assert [after[name] - before[name] for name in ("RANGE.UNBLOCK", "TRACK")] == [4, 1]
    assert td.read(SIZE_1G, 4).value == b"mine"
    invariants.check(td.host.machine, "alive")


def test_a_slot_without_a_file_goes_as_by_zapping_leaves_where_others_are_blocked() -> None:
    td = td_of(48)
    backing = td.add_memory(SIZE_1G, SIZE_2M, private=False)
    assert td.touch(SIZE_1G | td.guest.shared_mask).ok
    td.choose_slot_policy("B")
    took = delete(td, backing)
    assert (took["cleared"], took["flushes"], took["RANGE.BLOCK"]) == (1, 1, 0)
    assert td.vm.parked == ()


def test_pages_that_the_guest_never_accepted_are_pending_again() -> None:
    td = td_of(48, accepts=False, sept_ve_disable=False)
    backing = td.add_memory(SIZE_1G, SIZE_2M)
    assert td.touch(SIZE_1G).reason == "panic"
    td.choose_slot_policy("B")
    states = [page_state(td)]
    delete(td, backing)
    states.append(page_state(td))
    create(td, backing)
    assert [*states, page_state(td)] == ["PENDING", "PENDING_BLOCKED", "PENDING"]


def page_state(td: Td) -> str:
    """State of the S-EPT entry for the page at 1 GiB."""
    assert td.tdr is not None
    rows = views.sept_rows(td.host.machine, td.tdr)
    return next(row.state for row in rows if (row.gpa, row.sept_level) == (SIZE_1G, 0))


def test_zap_all_leaves_private_pages_of_a_td_in_its_reach() -> None:
    """What Linux's test of the VM type is for."""
    td = td_of(48)
    backing = td.add_memory(SIZE_1G, SIZE_2M)
    assert td.write(SIZE_1G, b"mine").ok
    td.choose_slot_policy("F")
    assert delete(td, backing)["PAGE.REMOVE"] == 0
    assert td.read(SIZE_1G, 4).value == b"mine"


@pytest.mark.parametrize("moment", ["deleted", "created again"])
def test_a_fault_and_a_slot_that_is_blocked_or_comes_back_meet_in_every_order(moment: str) -> None:
    race = build("slot-delete", 1)
    vm, host, fault = race.vms[0], race.machine.host, race.actors[0]
    (slot,) = vm.slots.all()
    place = (vm, slot.slot_id, slot.base_gfn)
    steps.run(fault.start())
    vm.slot_policies = ((None, "B"),)
    if moment == "created again":
        going: Operation = kvm_set_memory_region(*place, 0, 0, slot.userspace_addr)
        steps.run(host.on_cpu(3, going))
    more = (slot.npages, slot.flags, slot.userspace_addr, slot.gmem, slot.gmem_pgoff)
    what = (0, 0, slot.userspace_addr) if moment == "deleted" else more
    changing = Actor("slot", lambda: host.on_cpu(3, kvm_set_memory_region(*place, *what)))
    found = race._replace(actors=(fault, changing)).explore()
    assert found.complete
    assert [violation.table() for violation in found.violations] == []
