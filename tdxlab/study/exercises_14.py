"""The exercises of notebook 14: PAE roots; every answer is the model's."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from tdxlab.kvm.pae_cpu import FINE, enter_guest, walk_pdpte
from tdxlab.kvm.pae_pdpte import make_root_pdpte, reserved_bits_set, written_sptes
from tdxlab.kvm.shadow_params import AMD, DESIGNS, INTEL, RFC, SPECIAL
from tdxlab.study.exercises import Exercise, Variant
from tdxlab.study.pae_lab import PAE, TWO_LEVELS, PaeLab
from tdxlab.study.pae_tables import DIRECTORY, built_in_a_round, low_pages

# -- 14.1: where an address leads


def _indexes(gpaw: int, seed: int) -> Variant:
    va = random.Random(seed).randrange(1 << 32) & ~0xFFF if seed else 0xC012_3000
    right = (va >> 30, va >> 21 & 511, va >> 12 & 511, va >> 22)

    def hint(given: Sequence[Any]) -> str:
        if len(given) != 4:
            return "Give four numbers: slot, two shadow indexes, guest's directory index."
        names = ("slot", "shadow index at level 2", "shadow index at level 1", "guest's PDE")
        bits = ("31:30", "29:21", "20:12", "31:22")
        wrong = next(i for i in range(4) if given[i] != right[i])
        return f"The {names[wrong]} is another one: it is bits {bits[wrong]} of the address."

    question = (
        f"A guest with 2 levels uses {va:#010x}. Give (slot of the PAE root, index in the shadow "
        "page of level 2, index in the one of level 1, index of the PDE in the guest's directory)."
    )
    return Variant(question, right, hint)


# -- 14.2: what a CPU refuses


def _refused(gpaw: int, seed: int) -> Variant:
    dice = random.Random(seed)
    good = make_root_pdpte(DIRECTORY, 0)
    bits = [1, 5, 9, 11, 3, gpaw - 1, gpaw if gpaw < 52 else 53, 63]
    values = [good | 1 << bit for bit in dice.sample(bits, 4)]
    values.append(good & ~1 | 1 << 63 | 2)
    right = frozenset(
        place for place, value in enumerate(values, start=1) if reserved_bits_set(value, gpaw)
    )

    def hint(given: Any) -> str:
        strange = [place for place in given if place not in range(1, 6)]
        if strange:
            return "Give a set of numbers from 1 to 5, the places in the list."
        wrong = set(given) - right
        if wrong:
            value = values[min(wrong) - 1]
            return f"A CPU takes number {min(wrong)}: pdpte_drawing({value:#x}, GPAW) shows why."
        return f"{len(right - set(given))} more are refused. Draw each with pdpte_drawing."

    listed = ", ".join(f"({place}) {value:#x}" for place, value in enumerate(values, start=1))
    question = (
        f"MAXPHYADDR is {gpaw}. Which of these PDPTEs does a CPU refuse? {listed}. Give the set of "
        "their numbers."
    )
    return Variant(question, right, hint)


# -- 14.3: must a PDPTE be present?


def _present(gpaw: int, seed: int) -> Variant:
    dice = random.Random(seed)
    good = make_root_pdpte(DIRECTORY, 0)
    table = [dice.choice((good, 0, good | 2)) for _ in range(4)] if seed else [good, 0, 0, good]
    gib = dice.randrange(4) if seed else 1
    right = tuple(
        text
        for vendor in (INTEL, AMD)
        for text in (
            enter_guest(vendor, table, gpaw),
            walk_pdpte(vendor, table, gib << 30, gpaw),
        )
    )

    def hint(given: Sequence[Any]) -> str:
        if len(given) != 4:
            return f'Give four texts, each "{FINE}", "#PF" or "VM entry fails".'
        vendor = INTEL if any(g != r for g, r in zip(given[:2], right[:2], strict=True)) else AMD
        return (
            f"Look again at {vendor}: which entries does it look at when the guest is entered, and "
            "which when an address is used? A present bit that is 0 makes all others meaningless."
        )

    shown = ", ".join(f"{value:#x}" for value in table)
    question = (
        f"A root holds {shown} (MAXPHYADDR {gpaw}). Give (VM entry on Intel, use of GiB {gib} on "
        f'Intel, VMRUN on AMD, use of GiB {gib} on AMD), each "{FINE}", "#PF" or "VM entry fails"; '
        "a guest that cannot be entered cannot use anything."
    )
    return Variant(question, right, hint)


# -- 14.4: quadrants


def _written(gpaw: int, seed: int) -> Variant:
    offset = random.Random(seed).randrange(1024) * 4 if seed else 0x3FC
    (quadrant,) = (q for q in range(4) if written_sptes(offset, level=2, quadrant=q))
    right = (quadrant, *written_sptes(offset, level=2, quadrant=quadrant))

    def hint(given: Sequence[Any]) -> str:
        if len(given) != 3:
            return "Give three numbers: the quadrant and the two entries in its page."
        if given[0] != right[0]:
            return "The guest's directory has 4 quarters of 1024 bytes, one for each slot."
        return "Within the quarter, each PDE of 4 bytes stands for two entries of 8 bytes."

    question = (
        f"A guest with 2 levels stores a PDE at offset {offset:#x} of its directory. In the page "
        "of which quadrant does KVM have to zap, and which two entries? Give (quadrant, first, "
        "second)."
    )
    return Variant(question, right, hint)


# -- 14.5 and 14.6: what designs cost


def _rounds(gpaw: int, seed: int) -> Variant:
    cases = [(d, n, g) for g in (TWO_LEVELS, PAE) for n in (3, 4, 5, 6) for d in DESIGNS[:2]]
    if seed:
        design, processes, guest = random.Random(seed).choice(cases)
    else:
        design, processes, guest = RFC, 4, TWO_LEVELS
    right = built_in_a_round(design, processes, guest)

    def hint(given: int) -> str:
        if design == SPECIAL:
            return "A special root has no header. What can be kept of one when CR3 changes?"
        if guest == PAE:
            return "Loading CR3 reads the guest's PDPTEs. What does KVM do if they differ?"
        return "KVM keeps three roots besides the present one, the one used longest ago goes first."

    question = (
        f"Design: {design}; guest: {guest}. {processes} processes take turns, each uses a page. "
        "How many roots does one round build, when two rounds are done already?"
    )
    return Variant(question, right, hint)


def _low(gpaw: int, seed: int) -> Variant:
    dice = random.Random(seed)
    design = dice.choice(DESIGNS[:2]) if seed else RFC
    vcpus = dice.randrange(2, 6) if seed else 3
    processes = dice.choice((1, vcpus)) if seed else 1
    right = low_pages(design, vcpus, processes)

    def hint(given: int) -> str:
        if design == SPECIAL:
            return "The table belongs to a vCPU from its creation on, whatever the guest does."
        return (
            "Count the roots that are in use, each once however many vCPUs share it, and the "
            "pages that are kept ready, one for each vCPU."
        )

    question = (
        f"Design: {design}; {vcpus} vCPUs of a guest with 2 levels run {processes} process"
        f"{'es' * (processes > 1)}. How many pages below 4 GiB are out for PAE roots?"
    )
    return Variant(question, right, hint)


# -- 14.7: references


def _references(gpaw: int, seed: int) -> Variant:
    dice = random.Random(seed)
    kinds = ("present", "absent", "present, but its frame is in no memslot")
    pattern = (
        [dice.choice(kinds) for _ in range(4)] if seed else [kinds[0], kinds[1], kinds[2], kinds[0]]
    )
    lab = PaeLab(design=SPECIAL, guest=PAE, maxphyaddr=gpaw)
    values = {kinds[0]: 0x10001, kinds[1]: 0, kinds[2]: 0x4000_0001}
    for index, kind in enumerate(pattern):
        lab.vm.write_guest(lab.cr3(1) + 8 * index, values[kind], 8)
    lab.use(1, 1)
    slots = [row.slot for row in lab.slots() if row.present]
    right = (len(slots), sum(page.level == 2 for page in lab.pages()))

    def hint(given: Sequence[Any]) -> str:
        if len(given) != 2:
            return "Give two numbers: slots that are not 0, and page directories of KVM's."
        if given[0] != right[0]:
            return "A slot is filled only if the PDPTE is present and memory is behind its frame."
        return "A page is found by gfn and role: what do the guest's directories have in common?"

    question = (
        f"Special root, PAE guest. Its PDPTEs are: {'; '.join(pattern)}. Those that are present "
        "with memory all hold the same frame. How many slots of the root are not 0, and how many "
        "shadow pages of level 2 are there? Give a pair."
    )
    return Variant(question, right, hint)


EXERCISES = (
    Exercise("14.1", _indexes),
    Exercise("14.2", _refused),
    Exercise("14.3", _present),
    Exercise("14.4", _written),
    Exercise("14.5", _rounds),
    Exercise("14.6", _low),
    Exercise("14.7", _references),
)
