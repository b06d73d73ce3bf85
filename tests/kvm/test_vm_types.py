"""VM types: what flags follow from each, other ways to ask, which types a host offers."""

from __future__ import annotations

from itertools import product

import pytest

from tdxlab.kvm.vm_types import (
    HYPOTHETICAL,
    KINDS,
    LEGACY_SEV_ES,
    VM_FEATURES,
    VM_TYPE_NAMES,
    Offers,
    VmFeatures,
    by_flags,
    by_mask,
    by_type,
    kvm_caps_supported_vm_types,
    kvm_is_vm_type_supported,
    nonsense,
    wrong_answers,
)

#: type -> private memory, protected state, pre-fault at creation; as Linux 6.16.1 sets them.
AT_CREATION = {
    0: (False, False, True),
    1: (True, False, True),
    2: (False, False, True),
    3: (False, True, True),
    4: (True, True, False),
    5: (True, True, False),
}


@pytest.mark.parametrize(("vm_type", "flags"), AT_CREATION.items())
def test_vm_features_are_those_of_linux_at_creation(
    vm_type: int, flags: tuple[bool, bool, bool]
) -> None:
    assert VM_FEATURES[vm_type] == (*flags, vm_type == 5)


def test_kinds_are_the_six_types_in_the_order_of_their_numbers() -> None:
    assert [kind.vm_type for kind in KINDS] == list(AT_CREATION)
    assert {kind.vm_type: kind.name for kind in KINDS} == VM_TYPE_NAMES


def test_old_sev_es_keeps_has_protected_state_clear() -> None:
    assert by_flags(LEGACY_SEV_ES) == (False, False, True, False)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_flags_and_type_are_right_about_each_type_at_creation(kind: object) -> None:
    assert wrong_answers(kind, by_flags) == wrong_answers(kind, by_type) == ()


@pytest.mark.parametrize("number", [4, 5])
def test_only_a_flag_can_change_when_the_launch_ends(number: int) -> None:
    launched = KINDS[number]._replace(launched=True)
    assert wrong_answers(launched, by_flags) == ()
    assert wrong_answers(launched, by_type) == ("pre_fault_allowed",)


def test_type_is_wrong_about_sev_with_private_memory_and_flags_are_not() -> None:
    kind = HYPOTHETICAL[0]
    assert wrong_answers(kind, by_type) == ("has_private_mem",)
    assert wrong_answers(kind, by_flags) == ()


def test_a_second_mirror_is_missed_by_whoever_asks_the_type() -> None:
    second = HYPOTHETICAL[1]
    assert wrong_answers(second, by_flags) == ("has_mirrored_tdp",)
    assert set(wrong_answers(second, by_type)) == set(VmFeatures._fields)


def test_mask_takes_a_mirror_without_shared_bit_for_an_ordinary_vm() -> None:
    assert by_mask(HYPOTHETICAL[2]) == by_mask(KINDS[0]) == (False, False, True, False)
    assert by_mask(HYPOTHETICAL[3]).has_mirrored_tdp


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_nonsense_finds_nothing_in_what_linux_sets(kind: object) -> None:
    assert nonsense(kind.vm_type, by_flags(kind), kind.shared_bit) == ()  # type: ignore[attr-defined]


def test_nonsense_names_each_senseless_combination() -> None:
    open_td = VmFeatures(False, False, True, False)
    assert nonsense(5, open_td, True) == (
        "a TD without private memory",
        "a TD whose state is open",
        "a TD without a mirror",
    )
    assert nonsense(0, VmFeatures(False, False, True, True), True) == (
        "a mirror, and nothing private",
    )
    assert nonsense(4, VmFeatures(True, True, True, True), False) == (
        "a mirror, and no shared bit",
    )


def test_flags_of_a_td_make_sense_in_two_of_sixteen_combinations() -> None:
    combinations = [VmFeatures(*bits) for bits in product((False, True), repeat=4)]
    sensible = [each for each in combinations if not nonsense(5, each, True)]
    assert sensible == [(True, True, False, True), (True, True, True, True)]


# -- which types a host offers


def test_caps_have_a_bit_for_each_type_that_the_host_has() -> None:
    assert kvm_caps_supported_vm_types(Offers()) == 0b1
    assert kvm_caps_supported_vm_types(Offers(sw_protected=True)) == 0b11
    assert kvm_caps_supported_vm_types(Offers(sw_protected=True, tdp=False)) == 0b1
    assert kvm_caps_supported_vm_types(Offers(sev=True, sev_es=True, snp=True)) == 0b11101
    assert kvm_caps_supported_vm_types(Offers(tdx=True)) == 0b100001


@pytest.mark.parametrize("vm_type", [-1, *range(6, 41)])
def test_kvm_is_vm_type_supported_refuses_numbers_without_a_bit(vm_type: int) -> None:
    supported = kvm_caps_supported_vm_types(Offers(True, True, True, True, True, True))
    assert not kvm_is_vm_type_supported(vm_type, supported)
    assert all(kvm_is_vm_type_supported(known, supported) for known in VM_TYPE_NAMES)


def test_kvm_is_vm_type_supported_ends_at_32_whatever_the_bitmap() -> None:
    assert kvm_is_vm_type_supported(31, 1 << 31)
    assert not kvm_is_vm_type_supported(32, 1 << 32)
