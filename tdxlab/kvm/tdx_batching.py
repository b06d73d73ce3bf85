"""The hooks of a TD that removes pages in batches, or keeps them blocked; see `batching.py` and
`parking.py`.

    block_external_spte             RANGE.BLOCK
    flush_external_sptes            MEM.TRACK and a kick
    remove_blocked_external_spte    PAGE.REMOVE, PAGE.WBINVD
    unblock_external_spte           RANGE.UNBLOCK

The first three together do what `tdx_sept_remove_private_spte` does for each page, with the same
BUSY protocol.
Differs: Linux 6.16 has that one hook and no others.
"""

from __future__ import annotations

from errno import EINVAL, EIO
from typing import TYPE_CHECKING

from tdxlab.abi.status import TDX_TLB_TRACKING_NOT_DONE
from tdxlab.kvm.external import Hook
from tdxlab.kvm.seamcall_args import (
    TDX_SEAMCALL_STATUS_MASK,
    pg_level_to_tdx_sept_level,
    tdx_operand_busy,
)
from tdxlab.kvm.seamcalls import tdh_mem_range_unblock
from tdxlab.kvm.tdx_hooks import (
    leak_page,
    retry_without_vcpus,
    tdx_sept_drop_private_spte,
    tdx_sept_zap_private_spte,
    tdx_track,
)
from tdxlab.kvm.vm import gfn_to_gpa

if TYPE_CHECKING:
    from tdxlab.kvm.tdx import Tdx

#: Pages in a batch, at most: the entries of one table.
MAX_BATCH = 512


def tdx_sept_block_private_spte(tdx: Tdx, gfn: int, level: int, pfn: int) -> Hook:
    """Block a page. Returns 1; 0 if it was only premapped; -EINVAL or -EIO with the VM dead: then
    the page is lost.
    """
    ret = -EINVAL
    if tdx.is_hkid_assigned:
        ret = yield from tdx_sept_zap_private_spte(tdx, gfn, level, pfn)
    else:
        tdx.vm.bug("a private page is blocked without a KeyID")
    if ret < 0:
        leak_page(tdx, pfn)
    return ret


def tdx_sept_remove_blocked_spte(tdx: Tdx, gfn: int, level: int, pfn: int) -> Hook:
    """Remove a page that is blocked and tracked. Returns 0, or -EIO with the VM dead: then the page
    is lost.
    """
    ret = yield from tdx_sept_drop_private_spte(tdx, gfn, level, pfn)
    if ret:
        leak_page(tdx, pfn)
    return ret


def tdx_sept_unblock_private_spte(tdx: Tdx, gfn: int, level: int) -> Hook:
    """Let the TD use a page again that is blocked and tracked. One that was blocked before the TD
    could run has not been tracked; that is done now. Returns 0, or -EIO with the VM dead.

    Differs: Linux 6.16 never unblocks.
    """
    place = gfn_to_gpa(gfn), pg_level_to_tdx_sept_level(level)
    err, entry, level_state = yield from tdh_mem_range_unblock(tdx.host, tdx.td, *place)
    if err & TDX_SEAMCALL_STATUS_MASK == TDX_TLB_TRACKING_NOT_DONE:
        yield from tdx_track(tdx)
        err, entry, level_state = yield from tdh_mem_range_unblock(tdx.host, tdx.td, *place)
    if err and tdx_operand_busy(err):
        again = tdh_mem_range_unblock(tdx.host, tdx.td, *place)
        err, entry, level_state = yield from retry_without_vcpus(tdx, again)
    return -EIO if tdx.bug_on("TDH_MEM_RANGE_UNBLOCK", err, entry, level_state) else 0


def set_zap_batch(tdx: Tdx, pages: int) -> None:
    """Let zaps of the VM's mirror remove up to `pages` pages at a time; 0: one by one, as Linux
    6.16 does. Refuses anything but a whole number up to 512: ValueError.
    """
    if not (isinstance(pages, int) and 0 <= pages <= MAX_BATCH):
        raise ValueError(f"a batch of {pages} pages; choose 1..{MAX_BATCH}, or 0 for no batches")
    tdx.vm.zap_batch = pages
