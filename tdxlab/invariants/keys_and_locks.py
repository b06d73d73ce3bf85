"""Invariants of KeyIDs and of locks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from tdxlab.arch import level_size
from tdxlab.bits import filled
from tdxlab.invariants.picture import Picture, TdPicture, name_of
from tdxlab.seam import sept
from tdxlab.seam.keys import Keys
from tdxlab.seam.locks import HOST_PRIORITY, LOCK_MASK
from tdxlab.seam.pamt import SIZE_NAMES
from tdxlab.seam.rules import (
    HKID_ASSIGNED,
    HKID_FLUSHED,
    HKID_FREE,
    HKID_RESERVED,
    HKID_STATE_NAMES,
    TD_BLOCKED,
    TD_HKID_ASSIGNED,
    TD_KEYS_CONFIGURED,
    TD_LIFECYCLE_NAMES,
)
from tdxlab.seam.system import Sys
from tdxlab.seam.td import Tdcs, Tdr

#: What one reader adds to the lock word of a PAMT entry.
_READER = 4

#: Life cycle of a TD -> what its KeyID must be; in TEARDOWN it has none any more.
_KEY_OF_LIFECYCLE = {
    TD_HKID_ASSIGNED: HKID_ASSIGNED,
    TD_KEYS_CONFIGURED: HKID_ASSIGNED,
    TD_BLOCKED: HKID_FLUSHED,
}


def keyids_fit_the_life_cycles(picture: Picture) -> Iterator[str]:
    """10: a KeyID is taken by exactly one TD, in the state of that TD's life cycle."""
    keys = {keyid: state for keyid, state, _ in picture.machine.module.keys.in_use()}
    holders: dict[int, TdPicture] = {}
    for td in picture.living():
        if td.hkid in holders:
            yield f"{td} and {holders[td.hkid]} both have KeyID {td.hkid}"
        holders[td.hkid] = td
        if keys.get(td.hkid) != _KEY_OF_LIFECYCLE[td.lifecycle]:
            found = HKID_STATE_NAMES[keys.get(td.hkid, HKID_FREE)]
            yield f"{td} is {TD_LIFECYCLE_NAMES[td.lifecycle]}, its KeyID {td.hkid} is {found}"
    for keyid, state in keys.items():
        if state != HKID_RESERVED and keyid not in holders:
            yield f"KeyID {keyid} is {HKID_STATE_NAMES[state]}, but no TD has it"


def keys_are_on_all_packages_or_awaited(picture: Picture) -> Iterator[str]:
    """10: keys are configured when every package has the key; only a flushed KeyID waits for a
    write-back.
    """
    module = picture.machine.module
    for td in picture.living():
        is_complete = td.tdr_field(Tdr.PKG_CONFIG_BITMAP) == module.all_packages
        if td.lifecycle != TD_BLOCKED and is_complete != (td.lifecycle == TD_KEYS_CONFIGURED):
            bitmap = td.tdr_field(Tdr.PKG_CONFIG_BITMAP)
            yield f"{td} is {TD_LIFECYCLE_NAMES[td.lifecycle]} with its key on packages {bitmap:#b}"
    for keyid, pending in filled(module.keys.pending_packages.view.tolist(), (0,)):
        if module.keys.states.view[keyid] != HKID_FLUSHED:
            yield f"KeyID {keyid} waits for packages {pending:#b} and is not FLUSHED"


def pamt_locks_are_those_of_vcpus_inside(picture: Picture) -> Iterator[str]:
    """11: a vCPU inside reads its TDVPR with the entries above it, and the entry of its TDR."""
    cpu = picture.machine.cpu
    readers: Counter[tuple[int, int]] = Counter()
    for lp, tdvpr in picture.inside.items():
        readers[0, cpu.tdr_inside(lp)] += 1
        for size in range(3):
            readers[size, tdvpr & -level_size(size)] += 1
    for row in picture.rows:
        expected = readers.pop((row.size, row.hpa), 0)
        if row.lock & ~HOST_PRIORITY != expected * _READER:
            yield f"{name_of(row)} has the lock word {row.lock:#x}; {expected} vCPUs inside hold it"
    for size, hpa in readers:
        yield f"the {SIZE_NAMES[size]} entry of {hpa:#x} is not locked, but a vCPU inside holds it"


def other_locks_are_free(picture: Picture) -> Iterator[str]:
    """11: those of the module, of each TD, and of each S-EPT entry; wishes of the host may stay."""
    module = picture.machine.module
    words = {"the module": module.system.view[Sys.LOCK]}
    words["the KOT"] = module.keys.lock.view[0]
    words["a TDMR"] = int(bool(module.system.view[Sys.TDMR_MUTEXES]))
    for package in picture.machine.cpu.packages:
        mutex = module.keys.wbt_word(package, Keys.MUTEX)
        words[f"write-back of package {package}"] = module.keys.wbt.view[mutex]
    for td in picture.with_tdcs():
        words[f"S-EPT tree of {td}"] = td.tdcs_field(Tdcs.SEPT_LOCK)
        words[f"epoch of {td}"] = td.tdcs_field(Tdcs.EPOCH_LOCK)
        for name, word in (("op-state", Tdcs.OP_STATE_LOCK), ("RTMRs", Tdcs.RTMR_LOCK)):
            words[f"{name} of {td}"] = td.tdcs_field(word) & ~HOST_PRIORITY
        for link in td.links:
            if link.raw & sept.LOCKED:
                words[f"{link} of {td}"] = link.raw & sept.LOCKED
    for name, word in words.items():
        if word & LOCK_MASK:
            yield f"the lock of {name} is {word & LOCK_MASK:#x} and should be free"
