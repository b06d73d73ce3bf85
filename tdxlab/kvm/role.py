"""The role of a page-table page: what KVM must know to tell two pages for one gfn apart.

Source: Linux 6.16, arch/x86/include/asm/kvm_host.h, union kvm_mmu_page_role; mmu.c,
kvm_calc_tdp_mmu_root_page_role.
"""

from __future__ import annotations

from tdxlab.bits import Bits, Word


class Role(Word):
    """The 32 bits of a page role."""

    level = Bits(3, 0)
    has_4_byte_gpte = Bits(4)
    quadrant = Bits(6, 5)
    direct = Bits(7)
    access = Bits(10, 8)
    invalid = Bits(11)
    efer_nx = Bits(12)
    cr0_wp = Bits(13)
    smep_andnot_wp = Bits(14)
    smap_andnot_wp = Bits(15)
    ad_disabled = Bits(16)
    guest_mode = Bits(17)
    passthrough = Bits(18)
    is_mirror = Bits(19)
    smm = Bits(31, 24)


LEVEL_MASK = Role.level.mask
INVALID = Role.invalid.mask
IS_MIRROR = Role.is_mirror.mask
AD_DISABLED = Role.ad_disabled.mask
GUEST_MODE = Role.guest_mode.mask

#: Access bits of a role, not of an SPTE: execute, write, user.
ACC_EXEC_MASK = 1
ACC_WRITE_MASK = 2
ACC_USER_MASK = 4
ACC_ALL = ACC_EXEC_MASK | ACC_WRITE_MASK | ACC_USER_MASK


def tdp_root_role(level: int, *, ad_bits: bool, smm: bool = False) -> int:
    """The role of a vCPU's direct root. level: 4 or 5.

    Source: mmu.c, kvm_calc_tdp_mmu_root_page_role. Example: 0x3784 for 4 levels with A/D bits.
    """
    role = Role(0).with_(level=level, direct=1, access=ACC_ALL, efer_nx=1, cr0_wp=1)
    return int(role.with_(ad_disabled=int(not ad_bits), smm=int(smm)))


def child_role(role: int) -> int:
    """The role of a table one level below. Source: tdp_mmu.c, tdp_mmu_init_child_sp."""
    return role - 1
