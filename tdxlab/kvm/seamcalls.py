"""The SEAMCALL wrappers: one typed function for each leaf that KVM may use.

A wrapper puts the operands into registers, flushes the page that it gives away from the caches,
calls, and returns the raw status. It takes no lock and retries nothing but a lack of entropy: what
to do about BUSY is its caller's policy. Each is a step generator that yields once before the call,
(name, operands), and then whatever the module lets others see.

    status = yield from tdh_mem_track(host, td)

Names, order of arguments and registers are Linux's; `host` comes first in the place of the current
CPU. Pages are HPAs without KeyID bits.

Source: Linux 6.16, arch/x86/virt/vmx/tdx/tdx.c (tdh_*), arch/x86/include/asm/tdx.h (sc_retry).
"""

from __future__ import annotations

from collections.abc import Generator

from tdxlab.abi import leaves as abi
from tdxlab.abi.registers import Registers
from tdxlab.abi.status import TDX_RND_NO_ENTROPY
from tdxlab.kvm.host import CLFLUSH, KvmHost
from tdxlab.kvm.seamcall_args import Answer, Reclaimed, TdxTd, TdxVp
from tdxlab.steps import Step

#: Calls in all before a lack of entropy is given up on. Source: RDRAND_RETRY_LOOPS.
RDRAND_RETRY_LOOPS = 10
_TRIES = range(RDRAND_RETRY_LOOPS)

Status = Generator[Step, None, int]
Answered = Generator[Step, None, Answer]


def seamcall(host: KvmHost, leaf: int, registers: Registers, label: Step) -> Status:
    """One SEAMCALL on the current LP, without any retry. registers: in and out. Returns RAX.

    Source: asm/tdx.h, __seamcall.
    """
    yield label
    status: int = yield from host.hardware.seamcall_steps(host.current_lp, leaf, registers)
    return status


def sc_retry(host: KvmHost, leaf: int, registers: Registers, label: Step) -> Status:
    """As `seamcall`, again while the answer is exactly TDX_RND_NO_ENTROPY, ten calls in all.

    Source: asm/tdx.h, sc_retry.
    """
    for _ in _TRIES:
        yield label
        lp = host.running.lp
        status: int = yield from host.hardware.seamcall_steps(lp, leaf, registers)
        if status != TDX_RND_NO_ENTROPY:
            break
    return status


def sc_retry_ret(host: KvmHost, leaf: int, registers: Registers, label: Step) -> Answered:
    """As `sc_retry`, for callers that want RCX and RDX too. Source: tdx.c, seamcall_ret."""
    for _ in _TRIES:
        yield label
        lp = host.running.lp
        status: int = yield from host.hardware.seamcall_steps(lp, leaf, registers)
        if status != TDX_RND_NO_ENTROPY:
            break
    return status, registers.rcx, registers.rdx


def tdx_clflush_page(host: KvmHost, hpa: int) -> None:
    """CLFLUSH the 64 lines of a page that the module is to get.

    Source: tdx.c, tdx_clflush_page. Differs: caches are not modelled; it only counts.
    """
    counters = host.counters
    counters.cells[CLFLUSH] = counters.view[CLFLUSH] + 1


# -- vCPUs


def tdh_vp_enter(host: KvmHost, vp: TdxVp, registers: Registers) -> Status:
    """TDH.VP.ENTER. registers: the guest's where it asked for it, in and out; RCX is overwritten.

    Returns the status, or IN_GUEST: the vCPU is inside, and its exit comes later. Never retried.
    """
    registers.rcx = vp.tdvpr
    return seamcall(host, abi.TDH_VP_ENTER, registers, ("TDH.VP.ENTER", vp.tdvpr))


def tdh_vp_create(host: KvmHost, td: TdxTd, vp: TdxVp) -> Status:
    """TDH.VP.CREATE."""
    tdx_clflush_page(host, vp.tdvpr)
    registers = Registers(rcx=vp.tdvpr, rdx=td.tdr)
    return sc_retry(host, abi.TDH_VP_CREATE, registers, ("TDH.VP.CREATE", vp.tdvpr))


def tdh_vp_addcx(host: KvmHost, vp: TdxVp, tdcx_page: int) -> Status:
    """TDH.VP.ADDCX."""
    tdx_clflush_page(host, tdcx_page)
    registers = Registers(rcx=tdcx_page, rdx=vp.tdvpr)
    label = ("TDH.VP.ADDCX", vp.tdvpr, tdcx_page)
    return sc_retry(host, abi.TDH_VP_ADDCX, registers, label)


def tdh_vp_init(host: KvmHost, vp: TdxVp, initial_rcx: int, x2apicid: int) -> Status:
    """TDH.VP.INIT. initial_rcx: what the guest finds in RCX and R8. x2apicid: of the vCPU.

    Differs: Linux calls version 1, by which the module learns the x2APIC id; the module modelled
    here has version 0 only, which takes the same registers and ignores R8.
    """
    registers = Registers(rcx=vp.tdvpr, rdx=initial_rcx, r8=x2apicid)
    return sc_retry(host, abi.TDH_VP_INIT, registers, ("TDH.VP.INIT", vp.tdvpr))


def tdh_vp_flush(host: KvmHost, vp: TdxVp) -> Status:
    """TDH.VP.FLUSH, on the LP that the vCPU is associated with."""
    registers = Registers(rcx=vp.tdvpr)
    return sc_retry(host, abi.TDH_VP_FLUSH, registers, ("TDH.VP.FLUSH", vp.tdvpr))


def tdh_vp_rd(host: KvmHost, vp: TdxVp, field: int) -> Generator[Step, None, tuple[int, int]]:
    """TDH.VP.RD. field: id. Returns (status, value)."""
    registers = Registers(rcx=vp.tdvpr, rdx=field)
    label = ("TDH.VP.RD", vp.tdvpr, field)
    status = yield from sc_retry(host, abi.TDH_VP_RD, registers, label)
    return status, registers.r8


def tdh_vp_wr(host: KvmHost, vp: TdxVp, field: int, data: int, mask: int) -> Status:
    """TDH.VP.WR. field: id. mask: the bits of `data` to write."""
    registers = Registers(rcx=vp.tdvpr, rdx=field, r8=data, r9=mask)
    label = ("TDH.VP.WR", vp.tdvpr, field, data)
    return sc_retry(host, abi.TDH_VP_WR, registers, label)


# -- TDs


def tdh_mng_create(host: KvmHost, td: TdxTd, hkid: int) -> Status:
    """TDH.MNG.CREATE."""
    tdx_clflush_page(host, td.tdr)
    registers = Registers(rcx=td.tdr, rdx=hkid)
    label = ("TDH.MNG.CREATE", td.tdr, hkid)
    return sc_retry(host, abi.TDH_MNG_CREATE, registers, label)


def tdh_mng_key_config(host: KvmHost, td: TdxTd) -> Status:
    """TDH.MNG.KEY.CONFIG, on one LP of each package."""
    label = ("TDH.MNG.KEY.CONFIG", td.tdr)
    return sc_retry(host, abi.TDH_MNG_KEY_CONFIG, Registers(rcx=td.tdr), label)


def tdh_mng_addcx(host: KvmHost, td: TdxTd, tdcs_page: int) -> Status:
    """TDH.MNG.ADDCX."""
    tdx_clflush_page(host, tdcs_page)
    registers = Registers(rcx=tdcs_page, rdx=td.tdr)
    label = ("TDH.MNG.ADDCX", td.tdr, tdcs_page)
    return sc_retry(host, abi.TDH_MNG_ADDCX, registers, label)


def tdh_mng_init(
    host: KvmHost, td: TdxTd, td_params: int
) -> Generator[Step, None, tuple[int, int]]:
    """TDH.MNG.INIT. td_params: HPA of the TD_PARAMS. Returns (status, RCX)."""
    registers = Registers(rcx=td.tdr, rdx=td_params)
    label = ("TDH.MNG.INIT", td.tdr, td_params)
    status = yield from sc_retry(host, abi.TDH_MNG_INIT, registers, label)
    return status, registers.rcx


def tdh_mng_rd(host: KvmHost, td: TdxTd, field: int) -> Generator[Step, None, tuple[int, int]]:
    """TDH.MNG.RD. field: id. Returns (status, value)."""
    registers = Registers(rcx=td.tdr, rdx=field)
    status = yield from sc_retry(host, abi.TDH_MNG_RD, registers, ("TDH.MNG.RD", td.tdr, field))
    return status, registers.r8


def tdh_mng_vpflushdone(host: KvmHost, td: TdxTd) -> Status:
    """TDH.MNG.VPFLUSHDONE."""
    label = ("TDH.MNG.VPFLUSHDONE", td.tdr)
    return sc_retry(host, abi.TDH_MNG_VPFLUSHDONE, Registers(rcx=td.tdr), label)


def tdh_mng_key_freeid(host: KvmHost, td: TdxTd) -> Status:
    """TDH.MNG.KEY.FREEID."""
    label = ("TDH.MNG.KEY.FREEID", td.tdr)
    return sc_retry(host, abi.TDH_MNG_KEY_FREEID, Registers(rcx=td.tdr), label)


def tdh_mr_extend(host: KvmHost, td: TdxTd, gpa: int) -> Answered:
    """TDH.MR.EXTEND. gpa: of 256 bytes of an added page."""
    registers = Registers(rcx=gpa, rdx=td.tdr)
    return sc_retry_ret(host, abi.TDH_MR_EXTEND, registers, ("TDH.MR.EXTEND", gpa))


def tdh_mr_finalize(host: KvmHost, td: TdxTd) -> Status:
    """TDH.MR.FINALIZE."""
    label = ("TDH.MR.FINALIZE", td.tdr)
    return sc_retry(host, abi.TDH_MR_FINALIZE, Registers(rcx=td.tdr), label)


# -- private memory; `sept_level` is the module's, and Registers begin with RCX, RDX, R8


def tdh_mem_page_add(host: KvmHost, td: TdxTd, gpa: int, page: int, source: int) -> Answered:
    """TDH.MEM.PAGE.ADD: 4 KiB. page, source: HPAs of the private page and of its first content."""
    tdx_clflush_page(host, page)
    registers = Registers(rcx=gpa, rdx=td.tdr, r8=page, r9=source)
    label = ("TDH.MEM.PAGE.ADD", gpa, page)
    return sc_retry_ret(host, abi.TDH_MEM_PAGE_ADD, registers, label)


def tdh_mem_sept_add(host: KvmHost, td: TdxTd, gpa: int, sept_level: int, page: int) -> Answered:
    """TDH.MEM.SEPT.ADD. gpa, sept_level: of the entry that is to point at the new table `page`."""
    tdx_clflush_page(host, page)
    registers = Registers(gpa | sept_level, td.tdr, page)
    label = ("TDH.MEM.SEPT.ADD", gpa, sept_level, page)
    return sc_retry_ret(host, abi.TDH_MEM_SEPT_ADD, registers, label)


def tdh_mem_page_aug(host: KvmHost, td: TdxTd, gpa: int, sept_level: int, page: int) -> Answered:
    """TDH.MEM.PAGE.AUG."""
    tdx_clflush_page(host, page)
    registers = Registers(gpa | sept_level, td.tdr, page)
    label = ("TDH.MEM.PAGE.AUG", gpa, sept_level, page)
    return sc_retry_ret(host, abi.TDH_MEM_PAGE_AUG, registers, label)


def tdh_mem_range_block(host: KvmHost, td: TdxTd, gpa: int, sept_level: int) -> Answered:
    """TDH.MEM.RANGE.BLOCK."""
    registers = Registers(gpa | sept_level, td.tdr)
    label = ("TDH.MEM.RANGE.BLOCK", gpa, sept_level)
    return sc_retry_ret(host, abi.TDH_MEM_RANGE_BLOCK, registers, label)


def tdh_mem_range_unblock(host: KvmHost, td: TdxTd, gpa: int, sept_level: int) -> Answered:
    """TDH.MEM.RANGE.UNBLOCK. Differs: Linux 6.16 has no wrapper for it."""
    registers = Registers(gpa | sept_level, td.tdr)
    label = ("TDH.MEM.RANGE.UNBLOCK", gpa, sept_level)
    return sc_retry_ret(host, abi.TDH_MEM_RANGE_UNBLOCK, registers, label)


def tdh_mem_page_remove(host: KvmHost, td: TdxTd, gpa: int, sept_level: int) -> Answered:
    """TDH.MEM.PAGE.REMOVE."""
    registers = Registers(gpa | sept_level, td.tdr)
    label = ("TDH.MEM.PAGE.REMOVE", gpa, sept_level)
    return sc_retry_ret(host, abi.TDH_MEM_PAGE_REMOVE, registers, label)


def tdh_mem_track(host: KvmHost, td: TdxTd) -> Status:
    """TDH.MEM.TRACK."""
    label = ("TDH.MEM.TRACK", td.tdr)
    return sc_retry(host, abi.TDH_MEM_TRACK, Registers(td.tdr), label)


# -- physical memory


def tdh_phymem_page_reclaim(host: KvmHost, page: int) -> Generator[Step, None, Reclaimed]:
    """TDH.PHYMEM.PAGE.RECLAIM. page: HPA without KeyID."""
    registers = Registers(rcx=page)
    label = ("TDH.PHYMEM.PAGE.RECLAIM", page)
    status = yield from sc_retry(host, abi.TDH_PHYMEM_PAGE_RECLAIM, registers, label)
    return Reclaimed(status, registers.rcx, registers.rdx, registers.r8)


def tdh_phymem_cache_wb(host: KvmHost, *, resume: bool) -> Status:
    """TDH.PHYMEM.CACHE.WB, on one LP of each package. resume: go on with an interrupted one."""
    label = ("TDH.PHYMEM.CACHE.WB", resume)
    registers = Registers(rcx=int(resume))
    return sc_retry(host, abi.TDH_PHYMEM_CACHE_WB, registers, label)


def tdh_phymem_page_wbinvd_tdr(host: KvmHost, td: TdxTd) -> Status:
    """TDH.PHYMEM.PAGE.WBINVD of a TDR, which the module wrote under the global KeyID."""
    return tdh_phymem_page_wbinvd_hkid(host, host.global_keyid, td.tdr)


def tdh_phymem_page_wbinvd_hkid(host: KvmHost, hkid: int, page: int) -> Status:
    """TDH.PHYMEM.PAGE.WBINVD of `page` as it was written under `hkid`."""
    registers = Registers(host.mk_keyed_paddr(hkid, page))
    label = ("TDH.PHYMEM.PAGE.WBINVD", page, hkid)
    return sc_retry(host, abi.TDH_PHYMEM_PAGE_WBINVD, registers, label)
