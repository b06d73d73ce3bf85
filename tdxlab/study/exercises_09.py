"""The exercises of notebook 09: deleting a memslot; answers are the model's, or its formulas'."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from tdxlab.kvm.params import KVM_X86_DEFAULT_VM, KVM_X86_SW_PROTECTED_VM, VmConfig
from tdxlab.kvm.zap import kvm_memslot_flush_zap_all
from tdxlab.machine import Machine
from tdxlab.study import slot_costs
from tdxlab.study.exercises import Exercise, Variant
from tdxlab.study.slot_costs import pages
from tdxlab.study.slot_lab import DEFAULT, SLOT, TD, SlotLab

_FEW_PAGES = 8
_CASE_BITS = 46


def _chosen(choices: Sequence[Any], seed: int) -> Any:
    return choices[seed % len(choices)]


def _is_row(given: Any, length: int) -> bool:
    """An answer whose parts have their places, as many as there should be."""
    return isinstance(given, list | tuple) and len(given) == length


# -- 09.1: what does Linux do?

_VMS = (
    ("a TD, with the quirk SLOT_ZAP_ALL as it is by default", "TD", True),
    ("a DEFAULT VM, with the quirk SLOT_ZAP_ALL as it is by default", "DEFAULT", True),
    ("a DEFAULT VM, with the quirk SLOT_ZAP_ALL turned off", "DEFAULT", False),
    ("a SW_PROTECTED VM, with the quirk SLOT_ZAP_ALL as it is by default", "SW", True),
    ("a SW_PROTECTED VM, with the quirk SLOT_ZAP_ALL turned off", "SW", False),
)


def _decision(gpaw: int, seed: int) -> Variant:
    told, kind, quirk = _chosen(_VMS, seed)
    machine = Machine(gpaw=gpaw, memory="1 GiB", lps=1, packages=1)
    vm_type = KVM_X86_SW_PROTECTED_VM if kind == "SW" else KVM_X86_DEFAULT_VM
    config = VmConfig(vm_type=vm_type, slot_zap_all=quirk)
    gate = machine.create_td() if kind == "TD" else machine.create_vm(config=config)
    right = "F" if kvm_memslot_flush_zap_all(gate.vm) else "T"

    def hint(given: Any) -> str:
        if str(given).strip().upper() not in ("F", "T"):
            return "Linux 6.16 has two policies: F, zap all, and T, zap leaves. Give one of them."
        return (
            "Two things have to be true for F: one about the type of the VM, one about the quirk."
        )

    question = f"User space deletes a memslot of {told}. Does Linux 6.16 go by F or by T?"
    return Variant(question, right, hint)


# -- 09.2: what does the guest find?

_STORIES = (
    (TD, "T", True),
    (TD, "B", False),
    (DEFAULT, "F", False),
    (TD, "F", False),
    (DEFAULT, "T", False),
)
_FINDS = ("its own data", "zeros", "nothing: the TD dies")


def _finds(gpaw: int, seed: int) -> Variant:
    vm, policy, told = _chosen(_STORIES, seed)
    lab = SlotLab(gpaw=gpaw)
    lab.use(vm, SLOT, _FEW_PAGES)
    lab.delete(vm, policy=policy)
    lab.create(vm, told=told)
    said = lab.read(vm).said
    right = said if said in _FINDS else _FINDS[2]

    def hint(given: Any) -> str:
        if str(given).strip().casefold() not in _FINDS:
            return f"Choose one of {', '.join(map(repr, _FINDS))}."
        return (
            f"What becomes of the page itself when the slot goes by {policy}: does it leave the "
            "VM? If it does, who clears it? SlotLab(gpaw=GPAW) with use, delete, create and read "
            "shows it, and so does the panel."
        )

    knows = ", and its kernel is told that the memory was gone" if told else ""
    question = (
        f"The guest of a {vm} writes to a slot. The slot is deleted by {policy} and created "
        f"again on the same memory{knows}. What does the guest read there? Give "
        f"{', '.join(map(repr, _FINDS[:-1]))} or {_FINDS[-1]!r}."
    )
    return Variant(question, right, hint)


# -- 09.3, 09.4: entries

_SLOTS = ("2 GiB", "64 MiB", "1 GiB", "16 GiB", "512 MiB", "4 GiB")


def _leafs(_gpaw: int, seed: int) -> Variant:
    size, leaf_level = _chosen(_SLOTS, seed), 1 + seed % 2
    costs = slot_costs.zap_leafs(pages(size), leaf_level=leaf_level)
    right = costs.walked

    def hint(given: Any) -> str:
        if given == costs.cleared:
            return (
                "Those are the leaves. A walk also visits the entries above them, level by level."
            )
        return (
            "Go level by level, from the leaves up to the root: how many entries of that level "
            f"cover {size}? One at least, four levels in all, none below the leaves."
        )

    leaves = ("4K", "2M")[leaf_level - 1]
    question = (
        f"An aligned slot of {size}, mapped by {leaves} leaves throughout, is deleted by T. How "
        "many entries does the walk visit in a root of four levels?"
    )
    return Variant(question, right, hint)


_SIZES = ("8 GiB", "64 GiB", "4 GiB", "32 GiB", "16 GiB", "2 GiB")


def _all(_gpaw: int, seed: int) -> Variant:
    size = _chosen(_SIZES, seed)
    tree = slot_costs.contiguous(pages(size), maxphyaddr=_CASE_BITS)
    costs = slot_costs.zap_all(tree)
    right = (costs.freed, costs.walked)

    def hint(given: Any) -> str:
        if not _is_row(given, len(right)):
            return "Give a pair: tables freed, entries visited."
        if given[0] != costs.freed:
            return f"Count the tables of each level that {size} needs; the root is not freed here."
        if given[1] == costs.walked + costs.rescanned:
            return "The entries of freed tables were asked for apart: leave them out here."
        return (
            "There are four passes. The first visits all tables; each later one leaves out a level "
            f"more. The root has {tree.root_entries} entries on a host of {_CASE_BITS} bits."
        )

    question = (
        f"A VM with {size} in 4K leaves, on a host of {_CASE_BITS} physical bits, deletes a slot "
        "by F. How many page tables are freed, and how many entries do the passes visit, without a "
        "second look at freed tables? Give a pair."
    )
    return Variant(question, right, hint)


# -- 09.5: a TD's calls


def _calls(_gpaw: int, seed: int) -> Variant:
    size, level = _chosen(_SLOTS, seed), 3 if seed % 2 == 0 else 2
    if pages(size) < slot_costs.per_entry(level):
        level = 2
    removing, blocking = (
        slot_costs.remove_private(pages(size)),
        slot_costs.block_private(pages(size), level=level),
    )
    right = (removing.seamcalls, blocking.seamcalls)

    def hint(given: Any) -> str:
        if not _is_row(given, len(right)):
            return "Give a pair: SEAMCALLs of T, SEAMCALLs of B."
        if given[0] != right[0]:
            return "T as Linux 6.16 does it takes four SEAMCALLs for every page of 4 KiB."
        return "One BLOCK covers a whole entry. And the TLBs: how often do they have to be flushed?"

    name = ("2M", "1G")[level - 2]
    question = (
        f"A slot of {size} of private memory, all of it mapped, is deleted: how many SEAMCALLs by "
        f"T as Linux 6.16 does it, and how many by B with one BLOCK for each {name} entry? Give a "
        "pair."
    )
    return Variant(question, right, hint)


# -- 09.6: again and again


def _again(_gpaw: int, seed: int) -> Variant:
    dice = random.Random(seed)
    times = 100 if not seed else dice.randrange(10, 500)
    slot, rest = "2 GiB", "62 GiB" if not seed else dice.choice(("6 GiB", "30 GiB", "126 GiB"))
    right = (times * (pages(slot) + pages(rest)), times * pages(slot))

    def hint(given: Any) -> str:
        if not _is_row(given, len(right)):
            return "Give a pair: faults with F, faults with T."
        if given[0] == times * pages(rest):
            return "With F the slot's own pages have to be mapped again, too."
        return (
            "One fault maps one page of 4 KiB. Whose pages are gone after F, whose after T? And "
            f"all of that {times} times."
        )

    question = (
        f"A slot of {slot} beside {rest} is deleted and created {times} times; in between the "
        "guest uses all of its memory, in 4K pages. How many faults does that cost with F, and "
        "with T? Give a pair."
    )
    return Variant(question, right, hint)


# -- 09.7: where they meet

_USED = ("1 GiB", "256 MiB", "4 GiB", "8 GiB", "512 MiB")
#: An answer may be off by so much; beyond this it is no size of any memory.
_NEAR, _MOST_GIB = 0.05, 1 << 30


def _meet(_gpaw: int, seed: int) -> Variant:
    used, price = _chosen(_USED, seed), (100, 20, 50, 200)[seed % 4]
    right = slot_costs.crossover(pages(used), price) // pages("1 GiB") or 1

    def accepts(given: Any) -> bool:
        return isinstance(given, int | float) and abs(given - right) <= max(_NEAR * right, 1)

    def hint(given: Any) -> str:
        if not (isinstance(given, int | float) and 0 < given < _MOST_GIB):
            return "Give a number of GiB above 0; 5 percent more or less do not matter."
        slot = max(round(given * pages("1 GiB")), 1)
        both = slot_costs.delay(slot, pages(used), price)
        return (
            f"With a slot of {given} GiB T visits {both.leafs_lock} entries under the lock, and "
            f"F's faults are worth {both.all_faults}. They should be about the same."
        )

    question = (
        f"The guest uses {used} of other memory all the time, in 4K pages, and a fault is taken to "
        f"be worth {price} visited entries. From which slot size on, in GiB, does F hold the "
        "vCPUs up less than T, which visits its entries with the write lock held?"
    )
    return Variant(question, right, hint, accepts)


EXERCISES = (
    Exercise("09.1", _decision),
    Exercise("09.2", _finds),
    Exercise("09.3", _leafs),
    Exercise("09.4", _all),
    Exercise("09.5", _calls),
    Exercise("09.6", _again),
    Exercise("09.7", _meet),
)
