"""The exercises of notebook 13: VM types and design debates; every answer is the model's."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from tdxlab.kvm.vm_types import HYPOTHETICAL, KINDS, WAYS, VmFeatures, by_flags, wrong_answers
from tdxlab.study.exercises import Exercise, Variant
from tdxlab.study.exercises_13_debates import DEBATE_EXERCISES
from tdxlab.study.vmtype_lab import TypeLab
from tdxlab.study.vmtype_tables import observe

# -- 13.1: the flags of a type


def _flags(gpaw: int, seed: int) -> Variant:
    dice = random.Random(seed)
    kind = dice.choice(KINDS) if seed else KINDS[3]
    launched = dice.choice((True, False)) if seed else False
    right = tuple(by_flags(kind._replace(launched=kind.launched or launched)))

    def hint(given: Sequence[Any]) -> str:
        if len(given) != 4:
            return "Give four values, each True or False, in the order of the question."
        wrong = next(i for i in range(4) if given[i] != right[i])
        advice = (
            "Who has a guest_memfd? The matrix shows which types may have such a slot.",
            "Whose read-only slots are refused, though they have nothing to do with privacy?",
            "Is there a launch during which memory must not be mapped ahead of time?",
            "Whose private memory is mapped by tables that KVM cannot write?",
        )
        return f"{VmFeatures._fields[wrong]}: {advice[wrong]}"

    moment = "Its launch, if it has one, has ended" if launched else "It was just created"
    question = (
        f"A VM of type {kind.name}. {moment}. Give (has_private_mem, has_protected_state, "
        "pre_fault_allowed, has_mirrored_tdp)."
    )
    return Variant(question, right, hint)


# -- 13.2: whose word counts


def _use(gpaw: int, seed: int) -> Variant:
    dice = random.Random(seed)
    name = dice.choice(("SNP", "TDX", "SW_PROTECTED")) if seed else "SNP"
    attribute = dice.choice((True, False)) if seed else True
    private = dice.choice((True, False)) if seed else True
    right = TypeLab(name, gpaw=gpaw).use_as(attribute=attribute, private=private)
    says = "private" if private else "shared"

    def hint(given: str) -> str:
        if given.strip().casefold() not in ("direct", "mirror", "memory fault"):
            return 'Give "direct", "mirror" or "memory fault".'
        if name == "SW_PROTECTED":
            return "How could this guest say which memory it means? Who decides instead of it?"
        if right == "memory fault":
            return "Compare what the guest says with what user space has set, before any table."
        return "Both agree, so it is mapped. Who writes the tables that map it?"

    how = {
        "SW_PROTECTED": "the guest just uses it",
        "SNP": f"the guest uses it {'with' if private else 'without'} the C-bit",
        "TDX": f"the guest uses it {'without' if private else 'with'} the shared bit, as {says}",
    }
    kind = "private" if attribute else "shared"
    question = (
        f"A VM of type {name}; a page that is not mapped and {kind} by its attribute; "
        f'{how[name]}; user space converts nothing. Is it mapped in the "direct" root or in the '
        '"mirror", or is there a "memory fault" exit?'
    )
    return Variant(question, right, hint)


# -- 13.3: what a zap takes

_ZAPS = ("slot deleted", "MMU notifier: munmap", "zap_all_fast", "becomes shared", "punch hole")


def _zapped(gpaw: int, seed: int) -> Variant:
    dice = random.Random(seed)
    if seed:
        name = dice.choice(("DEFAULT", "SEV", "SW_PROTECTED", "SNP", "TDX"))
        deed = dice.choice(_ZAPS[:3] if name in ("DEFAULT", "SEV") else _ZAPS)
    else:
        name, deed = "TDX", "MMU notifier: munmap"
    row = observe(name, deed, gpaw=gpaw)
    assert row is not None
    right = (row.private, row.shared, row.beside)

    def hint(given: Sequence[Any]) -> str:
        if len(given) != 3:
            return "Give three numbers: private, shared, beside."
        if given[2] != right[2]:
            return "Does this cause walk the slot's own range, or does it throw whole trees away?"
        if name == "TDX":
            return "Two roots: which of them does this cause mean? The mirror's trees always stay."
        return "One root maps both kinds here, and a filter cannot tell them apart in it."

    question = (
        f"The panel's VM, of type {name}, has 4 pages in use in each of two slots; if the type has "
        f"private memory, 2 of them are private. Deed: {deed}, in the first slot. Give (private "
        "pages, shared pages of this slot that lose their mapping, pages of the other slot)."
    )
    return Variant(question, right, hint)


# -- 13.4: three ways to ask


def _wrong(gpaw: int, seed: int) -> Variant:
    dice = random.Random(seed)
    launched = [kind._replace(launched=True) for kind in KINDS]
    cases = [
        (kind, name)
        for kind in (*launched, *HYPOTHETICAL)
        for name, way in WAYS.items()
        if wrong_answers(kind, way)
    ]
    kind, way = dice.choice(cases) if seed else (HYPOTHETICAL[0], "type")
    right = frozenset(wrong_answers(kind, WAYS[way]))

    def hint(given: Any) -> str:
        strange = [name for name in given if name not in VmFeatures._fields]
        if strange:
            return f"Questions are {', '.join(VmFeatures._fields)}."
        if set(given) - right:
            return f"{min(set(given) - right)} is answered as the VM is."
        asks = {
            "flags": "Three are booleans that somebody has set. The fourth is asked of the type.",
            "type": "Masks were compiled in before this VM, or this moment of it, was thought of.",
            "mask": "What has a shared bit is taken for a TD in its launch, all else is not.",
        }
        return asks[way]

    facts = [name for name, is_so in zip(VmFeatures._fields, kind.truth, strict=True) if is_so]
    is_true = ", ".join(facts) or "nothing"
    bit = "with" if kind.shared_bit else "without"
    question = (
        f"{kind.name!r}, number {kind.vm_type}, {bit} a shared bit; true of it: {is_true}. The "
        f"code asks by {way!r}. Which of the four questions does it answer wrong? Give the set of "
        "their names."
    )
    return Variant(question, right, hint)


EXERCISES = (
    Exercise("13.1", _flags),
    Exercise("13.2", _use),
    Exercise("13.3", _zapped),
    Exercise("13.4", _wrong),
    *DEBATE_EXERCISES,
)
