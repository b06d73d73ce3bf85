"""What becomes of mappings when a memslot goes: three policies, and who chooses.

    F  zap all     every vCPU changes to new, empty direct roots; the old trees are cleared beside
                   them. A mirror stays as it is.
    T  zap leaves  the slot's leaves go from every root, direct and mirror; tables stay
    B  block       private pages of the slot are blocked and stay where they are (`parking.py`);
                   its shared pages go as with T

Linux 6.16 knows F and T, and decides by the type of the VM and one quirk:
`zap.kvm_memslot_flush_zap_all`. A choice made here comes before that decision; one for a slot
comes before one for the VM.

Differs: no kernel takes such a choice. The one for a slot was a reviewer's idea, as a flag of the
slot; here it stands beside the slots and outlives them. B was mentioned in the same review.
"""

from __future__ import annotations

from tdxlab.kvm.slots import KVM_USER_MEM_SLOTS, Slot
from tdxlab.kvm.vm import Vm

ZAP_ALL, ZAP_LEAFS, BLOCK = "F", "T", "B"

#: Policy -> what it does, in a few words.
SLOT_POLICIES = {ZAP_ALL: "zap all", ZAP_LEAFS: "zap leaves", BLOCK: "block"}


def choose_slot_policy(vm: Vm, policy: str | None, slot_id: int | None = None) -> None:
    """From now on slots of `vm` go by `policy`: F, T or B; None: as Linux 6.16 decides.

    slot_id: for the slot of that number only, in all address spaces, whether there is one or not;
    None: for all others.
    Refuses, in order: another policy; B for a VM without a mirror, which has nothing to block; what
    is no number of a slot: ValueError.
    """
    if policy is not None and policy not in SLOT_POLICIES:
        names = ", ".join(f"{name!r} ({what})" for name, what in SLOT_POLICIES.items())
        raise ValueError(f"there is no policy {policy!r}; choose {names}, or None for Linux 6.16's")
    if policy == BLOCK and not vm.has_mirrored_tdp:
        raise ValueError(f"{vm.name} has no Secure EPT in which 'B' could block; choose 'F' or 'T'")
    if slot_id is not None and slot_id not in range(KVM_USER_MEM_SLOTS):
        raise ValueError(f"no slot has the number {slot_id!r}; choose 0..{KVM_USER_MEM_SLOTS - 1}")
    others = [choice for choice in vm.slot_policies if choice[0] != slot_id]
    vm.slot_policies = (*others, *([(slot_id, policy)] if policy else []))


def chosen_slot_policy(vm: Vm, slot: Slot) -> str | None:
    """The policy that was chosen for the slot, or else for the VM; None without a choice."""
    choices = dict(vm.slot_policies)
    return choices.get(slot.slot_id) or choices.get(None)
