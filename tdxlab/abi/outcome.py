"""How a SEAMCALL or a guest event can end besides a status in RAX."""

from __future__ import annotations

from typing import NamedTuple

from tdxlab.abi.registers import Registers

#: What `seamcall` returns when TDH.VP.ENTER reached the guest: no status, the vCPU is inside and
#: its TD exit comes later.
IN_GUEST = -1

#: What a SEAMCALL gives when there is no working module behind it (carry flag set).
#: Source: Linux 6.16, arch/x86/include/asm/tdx.h, TDX_SEAMCALL_VMFAILINVALID.
VMFAILINVALID = 0x8000_FF00_FFFF_0000


class GuestOutcome(NamedTuple):
    """How a guest event ended.

    exited: True for a TD exit: the host's TDH.VP.ENTER returns with RAX = `status` and `registers`.
    False: the guest goes on with RAX = `status` and `registers`.
    """

    exited: bool
    status: int
    registers: Registers
