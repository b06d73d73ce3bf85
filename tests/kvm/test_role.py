"""Page roles: the words that KVM compares."""

import pytest

from tdxlab.kvm.role import AD_DISABLED, INVALID, IS_MIRROR, Role, child_role, tdp_root_role


@pytest.mark.parametrize(
    ("level", "flags", "role"),
    [
        (4, 0, 0x3784),
        (5, 0, 0x3785),
        (4, IS_MIRROR, 0x83784),
        (5, IS_MIRROR, 0x83785),
        (4, INVALID, 0x3F84),
        (5, IS_MIRROR | INVALID, 0x83F85),
    ],
)
def test_tdp_root_role_is_the_word_of_a_direct_root(level: int, flags: int, role: int) -> None:
    assert tdp_root_role(level, ad_bits=True) | flags == role


def test_tdp_root_role_notes_missing_ad_bits_and_smm() -> None:
    assert tdp_root_role(4, ad_bits=False) == 0x3784 | AD_DISABLED == 0x13784
    assert tdp_root_role(4, ad_bits=True, smm=True) == 0x1003784


def test_invalid_adds_0x800() -> None:
    assert INVALID == 0x800


def test_child_role_differs_in_the_level_only() -> None:
    role = tdp_root_role(4, ad_bits=True) | IS_MIRROR
    child = Role(child_role(role))
    assert (child.level, child.is_mirror, child.access, child.direct) == (3, 1, 7, 1)
    assert child_role(role) == 0x83783


def test_role_fields_of_a_mirror_root() -> None:
    role = Role(0x83784)
    assert (role.level, role.direct, role.access, role.invalid) == (4, 1, 7, 0)
    assert (role.efer_nx, role.cr0_wp, role.is_mirror, role.ad_disabled) == (1, 1, 1, 0)
