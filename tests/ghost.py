"""A ghost holds a lock while a call is made: the locks that the call may run into, by its operands.

It takes and releases them by the module's own functions, as another LP inside the module would; the
entry locks of the Secure EPT and the locks that no modelled leaf takes exclusively are among them.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from tdxlab.arch import EPT_RWX, HPA_MASK, WORDS_PER_PAGE
from tdxlab.journal import Words
from tdxlab.seam import locks, sept
from tdxlab.seam.keys import Keys
from tdxlab.seam.rules import PT_NDA, PT_TDR, PT_TDVPR, TD_KEYS_CONFIGURED
from tdxlab.seam.system import Sys
from tdxlab.seam.td import Tdcs
from tests.scene import Scene, TdView
from tests.walker import HostCall


class Lock(NamedTuple):
    """One lock in one mode: how it is taken and released."""

    take: Callable[[Words, int], bool]
    release: Callable[[Words, int], None]
    words: Words
    index: int


def _take_entry(words: Words, index: int) -> bool:
    septe = words.view[index]
    words.put(index, septe | sept.LOCKED)
    return not septe & sept.LOCKED


def _release_entry(words: Words, index: int) -> None:
    words.put(index, words.view[index] & ~sept.LOCKED)


def _take_tdmr(words: Words, index: int) -> bool:
    held = words.view[index]
    words.put(index, held | 1)
    return not held & 1


def _release_tdmr(words: Words, index: int) -> None:
    words.put(index, words.view[index] & ~1)


_PAMT_MODES = (
    (locks.try_exclusive_hp, locks.release_exclusive_hp),
    (locks.try_shared_hp, locks.release_shared_hp),
)
_PLAIN_MODES = (
    (locks.try_exclusive, locks.release_exclusive),
    (locks.try_shared, locks.release_shared),
)


def locks_near(scene: Scene, call: HostCall) -> list[Lock]:
    """Locks that the call may need."""
    return [
        *_of_the_module(scene, call.lp),
        *(lock for hpa in _pages(scene, call) for lock in _of_page(scene, hpa)),
        *(lock for td in _tds(scene, call) for lock in _of_td(scene, td, call.registers.rcx)),
    ]


def _of_the_module(scene: Scene, lp: int) -> Iterator[Lock]:
    module = scene.machine.module
    for take, release in _PLAIN_MODES:
        yield Lock(take, release, module.system, Sys.LOCK)
        yield Lock(take, release, module.keys.lock, 0)
    yield Lock(_take_tdmr, _release_tdmr, module.system, Sys.TDMR_MUTEXES)
    mutex = module.keys.wbt_word(module.cpu.package_of[lp], Keys.MUTEX)
    yield Lock(*_PLAIN_MODES[0], module.keys.wbt, mutex)


def _pages(scene: Scene, call: HostCall) -> Iterator[int]:
    for operand in (call.registers.rcx, call.registers.rdx, call.registers.r8):
        yield operand & HPA_MASK & scene.machine.memory.pa_mask


def _of_page(scene: Scene, hpa: int) -> Iterator[Lock]:
    """The entries above a page, and that of the TDR which owns it."""
    pamt = scene.machine.module.pamt
    if hpa >> 30 not in pamt.blocks:
        return
    owner = pamt.owner(pamt.entry(hpa, 0))
    entries = [pamt.entry(hpa, size) for size in range(3)]
    if pamt.page_type(entries[0]) != PT_NDA and owner:
        entries.append(pamt.entry(owner, 0))
    for entry in entries:
        for take, release in _PAMT_MODES:
            yield Lock(take, release, pamt.words, entry)


def _tds(scene: Scene, call: HostCall) -> Iterator[TdView]:
    """TDs that the operands name, by their TDR or a TDVPR."""
    pamt = scene.machine.module.pamt
    for hpa in _pages(scene, call):
        if hpa >> 30 in pamt.blocks and not pamt.represented_at(hpa):
            entry = pamt.entry(hpa, 0)
            if pamt.page_type(entry) == PT_TDR:
                yield TdView(scene.machine, hpa)
            elif pamt.page_type(entry) == PT_TDVPR:
                yield TdView(scene.machine, pamt.owner(entry))


def _of_td(scene: Scene, td: TdView, operand: int) -> Iterator[Lock]:
    """The TD's own locks, the S-EPT entry that the operand names, and what that entry maps."""
    if not td.tdcs or td.lifecycle != TD_KEYS_CONFIGURED or not td.field(Tdcs.EPTP):
        return
    words, pamt = scene.machine.memory.words, scene.machine.module.pamt
    yield Lock(*_PAMT_MODES[0], words, td.tdcs + Tdcs.OP_STATE_LOCK)
    for take, release in _PLAIN_MODES:
        yield Lock(take, release, words, td.tdcs + Tdcs.SEPT_LOCK)
        yield Lock(take, release, words, td.tdcs + Tdcs.EPOCH_LOCK)
    eptp, gpa = td.field(Tdcs.EPTP), operand & HPA_MASK & (td.limit - 1)
    place = sept.walk(scene.machine.memory, eptp, gpa, min(operand & 7, td.top_level))
    yield Lock(_take_entry, _release_entry, words, place.word)
    target = place.septe & HPA_MASK
    if target >> 30 not in pamt.blocks:
        return
    size = place.sept_level if place.septe & sept.LEAF else 0
    yield Lock(*_PAMT_MODES[0], pamt.words, pamt.entry(target, size))
    if not size and place.sept_level and place.septe & EPT_RWX:
        yield from _of_children(scene, target)


def _of_children(scene: Scene, table: int) -> Iterator[Lock]:
    """A few entries of a table, and the 2 MiB entry over what the first one maps."""
    words, pamt = scene.machine.memory.words, scene.machine.module.pamt
    frame = scene.machine.memory.frame(table)
    for number in (0, 1, WORDS_PER_PAGE - 1):
        yield Lock(_take_entry, _release_entry, words, frame + number)
    first = words.view[frame] & HPA_MASK
    if words.view[frame] & sept.LEAF and first >> 30 in pamt.blocks:
        yield Lock(*_PAMT_MODES[0], pamt.words, pamt.entry(first, 1))
