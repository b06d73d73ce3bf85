"""The exercises of notebook 13 on the design debates; every answer is the model's."""

from __future__ import annotations

import random
from typing import Any

from tdxlab.arch import PAGE_SHIFT
from tdxlab.kvm.params import gfn_shared_bit
from tdxlab.machine import Machine
from tdxlab.study.debate_tools import many
from tdxlab.study.debates_limits import (
    CREATED,
    LIMIT_RULES,
    REFUSED,
    SLOT_PAGES,
    TD_REFUSED,
    slot_fate,
)
from tdxlab.study.debates_protocols import FORGIVE, FREEZE, LOCK, protocol_rows
from tdxlab.study.epoch_tables import batch_formula
from tdxlab.study.exercises import Exercise, Variant

# -- 13.5: which gfns a ranged flush has to name


def _flushed(gpaw: int, seed: int) -> Variant:
    dice = random.Random(seed)
    gfn = dice.randrange(0x10000, 0x40000) if seed else 0x12345
    pages = dice.choice((8, 64, 512)) if seed else 64
    kind = dice.choice(("shared", "private")) if seed else "shared"
    bit = gfn_shared_bit(gpaw)
    right = gfn | bit if kind == "shared" else gfn

    def hint(given: Any) -> str:
        if not isinstance(given, int):
            return "Give one gfn, an int."
        if given >> PAGE_SHIFT in (gfn, gfn | bit):
            return "That is a byte address. What is asked for is a frame number."
        if given in (gfn, gfn | bit):
            return "That is the other one of the two addresses that a guest has for this frame."
        return "Only one bit can be added, and only to one of the two kinds. Where is it in a gfn?"

    question = (
        f"A back end can flush ranges of guest frames. In a TD with GPAW {gpaw} the host has taken "
        f"{pages} pages of {kind} memory away, from KVM's clean gfn {gfn:#x} on. Which frame has "
        "the flush to begin with? Give an int."
    )
    return Variant(question, right, hint)


# -- 13.6: three ways to get rid of pages


def _removed(gpaw: int, seed: int) -> Variant:
    dice = random.Random(seed)
    pages = dice.randrange(100, 1000) if seed else 512
    batch = dice.choice((8, 16, 32, 64)) if seed else 64
    one_by_one = batch_formula(pages, 0, 1)[2]
    batched = batch_formula(pages, 0, batch)[2]
    right = (one_by_one, batched, pages)

    def hint(given: Any) -> str:
        if not isinstance(given, tuple | list) or len(given) != 3:
            return "Give three numbers: one by one, in batches, KeyID first."
        if given[0] != right[0]:
            return "Name the calls that one private page needs in Linux 6.16, and count them."
        if given[1] != right[1]:
            return "Only one of those calls is shared by a batch. The last batch may be smaller."
        return "Without a KeyID nobody can use the page any more: which calls are left to make?"

    question = (
        f"{pages} private pages of a TD that has run go back to the host. How many SEAMCALLs are "
        f"that for these pages: one by one as in Linux 6.16, in batches of {batch}, and reclaimed "
        "after the KeyID was given back? Give three numbers."
    )
    return Variant(question, right, hint)


# -- 13.7: what a protocol does in vain


def _in_vain(gpaw: int, seed: int) -> Variant:
    dice = random.Random(seed)
    wanted = (FREEZE, LOCK, FORGIVE)
    rows = [row for row in protocol_rows(gpaw) if row.protocol in wanted and row.vcpus > 1]
    row = dice.choice(rows) if seed else rows[1]
    right = (row.retries, row.wasted)

    def hint(given: Any) -> str:
        if not isinstance(given, tuple | list) or len(given) != 2:
            return "Give two numbers: faults that are repeated, SEAMCALLs in vain."
        advice = {
            FREEZE: "One vCPU freezes the entry above the missing table. What do the others meet "
            "there, and do they call the module before they find out?",
            LOCK: "How many vCPUs are between the lookup and the entry at the same time?",
            FORGIVE: "Nobody is kept away from the module. How many come to it for the same "
            "table, how many does it serve, and what do the others do next?",
        }
        return advice[row.protocol]

    question = (
        f"D15: {row.vcpus} vCPUs fault on neighbouring pages whose last table is missing. "
        f"Protocol: {row.protocol}. How many faults, at most, are repeated, and how many "
        "SEAMCALLs, at most, map or link nothing? Give two numbers."
    )
    return Variant(question, right, hint)


# -- 13.8: a slot at the edge

_OUTCOMES = (CREATED, REFUSED, TD_REFUSED)


def _edge(gpaw: int, seed: int) -> Variant:
    dice = random.Random(seed)
    rule = dice.choice(tuple(LIMIT_RULES)) if seed else "last gfn has no direct bit"
    offset = dice.choice((-4, -3, -2, -1, 0)) if seed else -1
    before = dice.choice((True, False)) if seed else True
    machine = Machine(gpaw=gpaw, memory="1 GiB", lps=2, packages=1)
    fate = slot_fate(machine, rule, offset, before_init=before)
    right = (fate.outcome, fate.lost)

    def hint(given: Any) -> str:
        if not isinstance(given, tuple | list) or len(given) != 2:
            return 'Give a word and a number, such as ("created", 0).'
        if given[0] not in _OUTCOMES:
            return f"The word is one of: {', '.join(_OUTCOMES)}."
        if given[0] != right[0]:
            return "Which bound does the rule know at that moment, and is it asked again later?"
        return "A fault loses the shared bit before a slot is looked up. Which pages are then left?"

    moment = "before" if before else "after"
    place = f"{many(-offset, 'page')} below the first" if offset else "at the first"
    question = (
        f'D9, rule "{rule}": a slot of {SLOT_PAGES} pages begins {place} gfn that has the shared '
        f'bit, and is created {moment} the TD is initialised. Is it "{CREATED}", '
        f'"{REFUSED}", or is the TD then not initialised ("{TD_REFUSED}")? And how many of its '
        "pages can no access reach, if it stays? Give (word, number)."
    )
    return Variant(question, right, hint)


DEBATE_EXERCISES = (
    Exercise("13.5", _flushed),
    Exercise("13.6", _removed),
    Exercise("13.7", _in_vain),
    Exercise("13.8", _edge),
)
