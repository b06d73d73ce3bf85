"""TDG.VM, TDG.VP and TDG.SYS metadata functions, as the guest's dispatcher calls them.

Source: TDX module 1.5.01, tdg_vm_rd_wr.c, tdg_vp_rd_wr.c, tdg_sys_rd.c, tdg_sys_rdall.c.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from tdxlab.abi import leaves as abi
from tdxlab.abi.registers import NULL_PA, Registers
from tdxlab.abi.status import OPERAND_ID_RDX, TDX_OPERAND_INVALID, TDX_SUCCESS
from tdxlab.arch import PAGE_SIZE
from tdxlab.seam.exits import Guest
from tdxlab.seam.fields import GUEST
from tdxlab.seam.gpa import map_private
from tdxlab.seam.leaves import metadata
from tdxlab.seam.td import Td

if TYPE_CHECKING:
    from tdxlab.seam.module import Module

Access = Callable[["Module", Td, int, Registers, int], int]


def _handler(access: Access) -> Callable[[Guest], int]:
    """A metadata function as a handler of the guest's dispatcher."""

    def handle(guest: Guest) -> int:
        version = guest.rax >> 16 & 0xFF
        return access(guest.module, guest.td, guest.page, guest.registers, version)

    return handle


def tdg_sys_rdall(guest: Guest) -> int:
    """TDG.SYS.RDALL: write all system fields that the guest may read into a page of its own.

    RDX: private GPA of the page, 4 KiB aligned. R8: field to start with, all ones for the first.
    Returns R8 = all ones.
    Refuses, in order: RDX; RDX as `map_private`; METADATA_FIELD_ID_INCORRECT for R8.
    """
    registers = guest.registers
    start, registers.r8 = registers.r8, NULL_PA
    if registers.rdx % PAGE_SIZE:
        return TDX_OPERAND_INVALID + OPERAND_ID_RDX
    page = map_private(guest, registers.rdx, OPERAND_ID_RDX, write=True)
    content = metadata.dump_system(guest.module, GUEST, start)
    guest.module.memory.write(page.hpa, content, page.keyid)
    return TDX_SUCCESS


#: Metadata functions by leaf number.
HANDLERS: dict[int, Callable[[Guest], int]] = {
    abi.TDG_VM_RD: _handler(metadata.tdg_vm_rd),
    abi.TDG_VM_WR: _handler(metadata.tdg_vm_wr),
    abi.TDG_VP_RD: _handler(metadata.tdg_vp_rd),
    abi.TDG_VP_WR: _handler(metadata.tdg_vp_wr),
    abi.TDG_SYS_RD: _handler(metadata.tdg_sys_rd),
    abi.TDG_SYS_RDALL: tdg_sys_rdall,
}
