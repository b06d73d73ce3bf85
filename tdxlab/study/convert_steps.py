"""What a step of a conversion means, in words for people.

A step stands just before what its label names; a SEAMCALL has two, one before KVM makes the call
and one inside the module, which then has its locks and will do it.
"""

from __future__ import annotations

from typing import NamedTuple

from tdxlab.tape import Action, Tape

#: Beginning of a step's label -> what comes next.
MEANINGS: dict[str, str] = {
    "vcpu_enter_guest": "KVM_RUN: the vCPU sees to its requests",
    "INVEPT global": "the vCPU flushes its TLB, because a remote flush asked it to",
    "smp_store_release(mode)": "the vCPU goes into guest mode: from then on a kick finds it",
    "kvm_vcpu_exit_request": "a last look at requests before the entry",
    "TDH.VP.ENTER": "the vCPU enters the guest",
    "guest MapGpa": "the guest asks with MapGPA, and KVM passes the question on to the VMM",
    "guest Read": "the guest reads",
    "guest Write": "the guest writes",
    "mutex_lock(slots_lock)": "KVM_SET_MEMORY_ATTRIBUTES: the VMM answers with an ioctl",
    "write_lock(mmu_lock)": "take mmu_lock for write: no fault can map anything meanwhile",
    "read_lock(mmu_lock)": "take mmu_lock for read: faults run beside each other",
    "TDH.MEM.RANGE.BLOCK": "block the Secure EPT entry; the mirror entry is empty already",
    "TDH.MEM.TRACK": "track: begin a new TLB epoch",
    "kvm_make_all_cpus_request": "kick every vCPU that is in guest mode",
    "TDH.MEM.PAGE.REMOVE": "remove the page from the TD",
    "TDH.PHYMEM.PAGE.WBINVD": "write the page back under the TD's KeyID; then KVM clears it",
    "store attributes": "the old kind is unmapped, now the attributes change",
    "faultin_pfn": "a fault: find the page behind the gfn, in the file or in the VMM's memory",
    "cmpxchg FROZEN_SPTE": "freeze the mirror entry, so that nobody else changes it",
    "publish SPTE": "the Secure EPT has the entry, now the mirror gets it too",
    "cmpxchg SPTE": "write an entry of the direct EPT, which the CPU walks itself",
    "TDH.MEM.SEPT.ADD": "add a table to the Secure EPT",
    "TDH.MEM.PAGE.AUG": "add the page to the Secure EPT: PENDING until the guest accepts it",
    "truncate_inode_pages_range": "the pages leave the guest_memfd and are free",
    "unmap_page_range": "the VMM's own pages go",
}


def meaning(action: Action | None) -> str:
    """What stands before the step that `action` led to; for the beginning and the end too."""
    if action is None:
        return "nothing has happened yet"
    if action.name.startswith("returns"):
        return f"done: {action.phase}"
    for label, words in MEANINGS.items():
        if action.name.startswith(label):
            return f"{action.phase}: next, {words}"
    return f"{action.phase}: next, {action.name}"


class StepRow(NamedTuple):
    """One step of an operation. step: its position on the tape. at: the label of what comes next.
    meaning: of that.
    """

    step: int
    at: str
    meaning: str


def step_rows(tape: Tape) -> list[StepRow]:
    """The steps of the operation that the tape stands in or behind; of the two of a SEAMCALL only
    the first, and without the return.
    """
    if tape.last is None:
        return []
    rows: list[StepRow] = []
    for number, action in enumerate(tape.actions, start=1):
        label = action.name.partition(" ")[0]
        is_inside = bool(rows) and label.startswith("TDH.") and rows[-1].at.startswith(label)
        is_return = action.name.startswith("returns")
        if action.phase == tape.last.phase and not is_inside and not is_return:
            words = meaning(action).removeprefix(f"{action.phase}: next, ")
            rows.append(StepRow(number, _short(action.name), words))
    return rows


def _short(name: str) -> str:
    """A label with its first value, that of a change of an SPTE with two: gfn and level."""
    if name.startswith("guest"):
        return name
    label = next((label for label in MEANINGS if name.startswith(label)), "")
    values = name[len(label) :].split()
    return " ".join([label, *values[: 2 if "SPTE" in label else 1]]).strip()
