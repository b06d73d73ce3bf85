"""For each host leaf, how a walker makes a call that should succeed: one function a leaf.

A function picks from what exists, or raises NothingToDo. `draw` is how the tests use them.
"""

from collections.abc import Callable

from tdxlab.abi import leaves as abi
from tdxlab.abi.registers import MASK64, NULL_PA
from tdxlab.arch import EPT_RWX, PAGE_SIZE
from tdxlab.seam.epochs import is_previous_busy
from tdxlab.seam.fields import NULL_FIELD_ID
from tdxlab.seam.fields_system import SYSTEM_FIELDS
from tdxlab.seam.fields_td import TD_FIELDS
from tdxlab.seam.fields_vcpu import VCPU_FIELDS
from tdxlab.seam.keys import Keys
from tdxlab.seam.rules import (
    HKID_FREE,
    MAPPED_BITS,
    NL_MAPPED_BITS,
    PT_EPT,
    PT_REG,
    PT_TDCX,
    PT_TDVPR,
    TD_BLOCKED,
    TD_HKID_ASSIGNED,
    TD_KEYS_CONFIGURED,
    TD_TEARDOWN,
    VCPU_UNINITIALIZED,
)
from tdxlab.seam.td import ATTRIBUTES_DEBUG, MAX_TDCX, MIN_TDCX, MIN_TDVPS_PAGES, Tdcs
from tests.scene import ANSWER, BIG_POOL, PARAMS, PARAMS_KINDS, POOL, SOURCE
from tests.walker import HostCall, NothingToDo, Walker

#: KeyIDs that new TDs take: few, so that they are used again.
KEYIDS = range(58, 64)
_MANY = 10

Maker = Callable[[Walker], HostCall]


def draw(walker: Walker, leaf: int) -> HostCall | None:
    """A call of the leaf that should succeed now; None if there is none."""
    return _try(MAKERS, walker, leaf)


def draw_carelessly(walker: Walker, leaf: int) -> HostCall | None:
    """As `draw`, but TLB tracking may forbid the call; None too for a leaf that needs none."""
    return _try(CARELESS_MAKERS, walker, leaf)


def _try(makers: dict[int, Maker], walker: Walker, leaf: int) -> HostCall | None:
    try:
        return makers[leaf](walker) if leaf in makers else None
    except NothingToDo:
        return None


# -- the module


def _always(leaf: int, **operands: int) -> Maker:
    """A call whose operands do not depend on anything."""
    return lambda walker: walker.call(leaf, **operands)


def _sys_rd(w: Walker) -> HostCall:
    return w.call(abi.TDH_SYS_RD, rdx=w.readable(SYSTEM_FIELDS, 0).id)


def _sys_info(w: Walker) -> HostCall:
    return w.call(abi.TDH_SYS_INFO, rcx=ANSWER, rdx=1024, r8=ANSWER + 1024, r9=32)


# -- TDs as a whole


def _mng_create(w: Walker) -> HostCall:
    states = w.machine.module.keys.states.view
    keyid = w.pick(keyid for keyid in KEYIDS if states[keyid] == HKID_FREE)
    return w.call(abi.TDH_MNG_CREATE, rcx=w.free_page(), rdx=keyid)


def _mng_key_config(w: Walker) -> HostCall:
    package_of = w.machine.cpu.package_of
    tdr, lp = w.pick(
        (td.tdr, lp)
        for td in w.scene.tds()
        for lp in w.scene.host_lps()
        if td.lifecycle == TD_HKID_ASSIGNED and not td.key_packages >> package_of[lp] & 1
    )
    return w.call(abi.TDH_MNG_KEY_CONFIG, lp=lp, rcx=tdr)


def _mng_addcx(w: Walker) -> HostCall:
    td = w.pick(
        td
        for td in w.scene.tds()
        if td.lifecycle == TD_KEYS_CONFIGURED and not (td.is_locked or td.fatal)
        if td.tdcx < MIN_TDCX or (td.tdcx < MAX_TDCX and td.accepts(abi.TDH_MNG_ADDCX))
    )
    return w.call(abi.TDH_MNG_ADDCX, rcx=w.free_page(), rdx=td.tdr)


def _mng_init(w: Walker) -> HostCall:
    td = w.pick(w.tds_for(abi.TDH_MNG_INIT, exclusive=True))
    params = PARAMS + PAGE_SIZE * w.choose(range(len(PARAMS_KINDS)))
    return w.call(abi.TDH_MNG_INIT, rcx=td.tdr, rdx=params)


def _mng_rd(w: Walker) -> HostCall:
    td = w.pick(w.tds_for(abi.TDH_MNG_RD))
    field = w.readable(TD_FIELDS, w.asker(td))
    return w.call(abi.TDH_MNG_RD, version=w.choose((0, 1)), rcx=td.tdr, rdx=field.id)


def _mng_wr(w: Walker) -> HostCall:
    td = w.pick(w.tds_for(abi.TDH_MNG_WR))
    asker = w.asker(td)
    field = w.writable(TD_FIELDS, asker)
    return w.call(abi.TDH_MNG_WR, rcx=td.tdr, rdx=field.id, r9=field.write[asker])


def _mng_vpflushdone(w: Walker) -> HostCall:
    td = w.pick(
        td
        for td in w.scene.tds()
        if td.lifecycle in (TD_HKID_ASSIGNED, TD_KEYS_CONFIGURED) and not td.is_locked
        if not (td.tdcs and td.field(Tdcs.NUM_ASSOC_VCPUS))
    )
    return w.call(abi.TDH_MNG_VPFLUSHDONE, rcx=td.tdr)


def _mng_key_freeid(w: Walker) -> HostCall:
    pending = w.machine.module.keys.pending_packages.view
    tds = w.scene.tds()
    td = w.pick(td for td in tds if td.lifecycle == TD_BLOCKED and not pending[td.hkid])
    return w.call(abi.TDH_MNG_KEY_FREEID, rcx=td.tdr)


def _mr_extend(w: Walker) -> HostCall:
    td, entry = w.pick(w.entries_for(abi.TDH_MR_EXTEND, 0, 0, exclusive=True))
    return w.call(abi.TDH_MR_EXTEND, rcx=entry.gpa + 256 * w.choose(range(16)), rdx=td.tdr)


def _mr_finalize(w: Walker) -> HostCall:
    tds = w.tds_for(abi.TDH_MR_FINALIZE, exclusive=True)
    td = w.pick(td for td in tds if td.field(Tdcs.NUM_VCPUS))
    return w.call(abi.TDH_MR_FINALIZE, rcx=td.tdr)


# -- vCPUs


def _vp_create(w: Walker) -> HostCall:
    if len(w.scene.vcpus()) > _MANY:
        raise NothingToDo
    td = w.pick(w.tds_for(abi.TDH_VP_CREATE))
    return w.call(abi.TDH_VP_CREATE, rcx=w.free_page(), rdx=td.tdr)


def _young_vcpu(w: Walker, leaf: int, *, complete: bool) -> int:
    tdvpr: int = w.pick(
        vcpu.tdvpr
        for vcpu in w.scene.vcpus()
        if vcpu.td.accepts(leaf) and vcpu.state == VCPU_UNINITIALIZED
        if (vcpu.pages >= MIN_TDVPS_PAGES) == complete
    )
    return tdvpr


def _vp_addcx(w: Walker) -> HostCall:
    tdvpr = _young_vcpu(w, abi.TDH_VP_ADDCX, complete=False)
    return w.call(abi.TDH_VP_ADDCX, rcx=w.free_page(), rdx=tdvpr)


def _vp_init(w: Walker) -> HostCall:
    return w.call(abi.TDH_VP_INIT, rcx=_young_vcpu(w, abi.TDH_VP_INIT, complete=True))


def _vp_enter(w: Walker) -> HostCall:
    if len(w.scene.host_lps()) == 1:
        raise NothingToDo
    tdvpr, lp = w.vcpu_for(abi.TDH_VP_ENTER)
    return w.call(abi.TDH_VP_ENTER, lp=lp, rcx=tdvpr)


def _vp_flush(w: Walker) -> HostCall:
    hosts, vcpus = w.scene.host_lps(), w.scene.vcpus()
    vcpu = w.pick(v for v in vcpus if v.td.tdcs and v.lp in hosts and not v.is_locked)
    return w.call(abi.TDH_VP_FLUSH, lp=vcpu.lp, rcx=vcpu.tdvpr)


def _vp_rd(w: Walker) -> HostCall:
    tdvpr, lp = w.vcpu_for(abi.TDH_VP_RD)
    return w.call(abi.TDH_VP_RD, lp=lp, rcx=tdvpr, rdx=w.readable(VCPU_FIELDS, 0).id)


def _vp_wr(w: Walker) -> HostCall:
    tdvpr, lp = w.vcpu_for(abi.TDH_VP_WR)
    field = w.writable(VCPU_FIELDS, 0)
    return w.call(abi.TDH_VP_WR, lp=lp, rcx=tdvpr, rdx=field.id, r9=field.write[0])


# -- private memory


def _on_entry(
    leaf: int, lowest: int, highest: int, *, tracked: bool = False, page: bool = False
) -> Maker:
    """A call on (GPA and level, TDR). tracked: TLB tracking must not forbid it; page: R8 is a free
    one.
    """

    def make(w: Walker) -> HostCall:
        options = w.entries_for(leaf, lowest, highest)
        td, entry = w.pick((t, e) for t, e in options if not tracked or t.is_free_to_go(e))
        r8 = w.free_page() if page else 0
        return w.call(leaf, rcx=entry.operand, rdx=td.tdr, r8=r8)

    return make


def _mem_sept_add(w: Walker) -> HostCall:
    options = w.entries_for(abi.TDH_MEM_SEPT_ADD, 1, 4)
    td, entry = w.pick((t, e) for t, e in options if e.bits != NL_MAPPED_BITS)
    version, page = w.choose((0, 1)), w.free_page()
    operands = {"rcx": entry.operand, "rdx": td.tdr, "r8": page}
    l2_pages = dict.fromkeys(("r9", "r10", "r11"), NULL_PA)
    return w.call(abi.TDH_MEM_SEPT_ADD, version=version, **operands, **l2_pages)


def _mem_page_add(w: Walker) -> HostCall:
    td, entry = w.pick(w.entries_for(abi.TDH_MEM_PAGE_ADD, 0, 0, exclusive=True))
    return w.call(abi.TDH_MEM_PAGE_ADD, rcx=entry.gpa, rdx=td.tdr, r8=w.free_page(), r9=SOURCE)


def _mem_page_aug(w: Walker) -> HostCall:
    big_pages = w.scene.free_big_pages()
    td, entry = w.pick(w.entries_for(abi.TDH_MEM_PAGE_AUG, 0, 1 if big_pages else 0))
    hpa = w.pick(big_pages) if entry.sept_level else w.free_page()
    return w.call(abi.TDH_MEM_PAGE_AUG, rcx=entry.operand, rdx=td.tdr, r8=hpa)


def _mem_track(w: Walker) -> HostCall:
    words = w.machine.memory.words
    tds = w.tds_for(abi.TDH_MEM_TRACK)
    td = w.pick(td for td in tds if not is_previous_busy(words, td.tdcs))
    return w.call(abi.TDH_MEM_TRACK, rcx=td.tdr)


def _on_debug_memory(leaf: int) -> Maker:
    """TDH.MEM.RD and WR: 8 bytes of a debug TD."""

    def make(w: Walker) -> HostCall:
        td, entry = w.pick(
            (td, entry)
            for td in w.tds_for(leaf)
            if td.field(Tdcs.ATTRIBUTES) & ATTRIBUTES_DEBUG
            for entry in td.entries(0, 1, frozenset({MAPPED_BITS}))
            if entry.place.septe & EPT_RWX
        )
        gpa = entry.gpa + 8 * w.choose(range(512))
        return w.call(leaf, rcx=gpa, rdx=td.tdr, r8=w.choose((0, 1, MASK64)))

    return make


# -- physical memory


def _phymem_cache_wb(w: Walker) -> HostCall:
    keys, lp = w.machine.module.keys, w.pick(w.scene.host_lps())
    if not keys.flushed():
        raise NothingToDo
    saved = keys.wbt.view[keys.wbt_word(w.machine.cpu.package_of[lp], Keys.SAVED_POINT)]
    return w.call(abi.TDH_PHYMEM_CACHE_WB, lp=lp, rcx=int(bool(saved)))


def _phymem_page_wbinvd(w: Walker) -> HostCall:
    pa = w.machine.memory.join(w.free_page(), w.choose((0, *KEYIDS)))
    return w.call(abi.TDH_PHYMEM_PAGE_WBINVD, rcx=pa)


def _phymem_page_reclaim(w: Walker) -> HostCall:
    pamt = w.machine.module.pamt
    ending = {td.tdr: td for td in w.scene.tds() if td.lifecycle == TD_TEARDOWN}
    small = [(hpa, 0) for hpa in w.scene.pages(PT_REG, PT_TDCX, PT_TDVPR, PT_EPT)]
    big = [(hpa, 1) for hpa in BIG_POOL if pamt.page_type(pamt.entry(hpa, 1)) == PT_REG]
    pages = [hpa for hpa, size in small + big if pamt.owner(pamt.entry(hpa, size)) in ending]
    pages += [tdr for tdr, td in ending.items() if not td.children]
    return w.call(abi.TDH_PHYMEM_PAGE_RECLAIM, rcx=w.pick(pages))


def _phymem_page_rdmd(w: Walker) -> HostCall:
    return w.call(abi.TDH_PHYMEM_PAGE_RDMD, rcx=w.choose(POOL))


#: Leaf -> its maker. TDH.SYS.SHUTDOWN is not there: nothing works after it.
MAKERS: dict[int, Maker] = {
    abi.TDH_VP_ENTER: _vp_enter,
    abi.TDH_MNG_ADDCX: _mng_addcx,
    abi.TDH_MEM_PAGE_ADD: _mem_page_add,
    abi.TDH_MEM_SEPT_ADD: _mem_sept_add,
    abi.TDH_VP_ADDCX: _vp_addcx,
    abi.TDH_MEM_PAGE_RELOCATE: _on_entry(abi.TDH_MEM_PAGE_RELOCATE, 0, 0, tracked=True, page=True),
    abi.TDH_MEM_PAGE_AUG: _mem_page_aug,
    abi.TDH_MEM_RANGE_BLOCK: _on_entry(abi.TDH_MEM_RANGE_BLOCK, 0, 4),
    abi.TDH_MNG_KEY_CONFIG: _mng_key_config,
    abi.TDH_MNG_CREATE: _mng_create,
    abi.TDH_VP_CREATE: _vp_create,
    abi.TDH_MNG_RD: _mng_rd,
    abi.TDH_MEM_RD: _on_debug_memory(abi.TDH_MEM_RD),
    abi.TDH_MNG_WR: _mng_wr,
    abi.TDH_MEM_WR: _on_debug_memory(abi.TDH_MEM_WR),
    abi.TDH_MEM_PAGE_DEMOTE: _on_entry(abi.TDH_MEM_PAGE_DEMOTE, 1, 2, tracked=True, page=True),
    abi.TDH_MR_EXTEND: _mr_extend,
    abi.TDH_MR_FINALIZE: _mr_finalize,
    abi.TDH_VP_FLUSH: _vp_flush,
    abi.TDH_MNG_VPFLUSHDONE: _mng_vpflushdone,
    abi.TDH_MNG_KEY_FREEID: _mng_key_freeid,
    abi.TDH_MNG_INIT: _mng_init,
    abi.TDH_VP_INIT: _vp_init,
    abi.TDH_MEM_PAGE_PROMOTE: _on_entry(abi.TDH_MEM_PAGE_PROMOTE, 1, 2, tracked=True),
    abi.TDH_PHYMEM_PAGE_RDMD: _phymem_page_rdmd,
    abi.TDH_MEM_SEPT_RD: _on_entry(abi.TDH_MEM_SEPT_RD, 0, 4),
    abi.TDH_VP_RD: _vp_rd,
    abi.TDH_MNG_KEY_RECLAIMID: _always(abi.TDH_MNG_KEY_RECLAIMID),
    abi.TDH_PHYMEM_PAGE_RECLAIM: _phymem_page_reclaim,
    abi.TDH_MEM_PAGE_REMOVE: _on_entry(abi.TDH_MEM_PAGE_REMOVE, 0, 2, tracked=True),
    abi.TDH_MEM_SEPT_REMOVE: _on_entry(abi.TDH_MEM_SEPT_REMOVE, 1, 4, tracked=True),
    abi.TDH_SYS_KEY_CONFIG: _always(abi.TDH_SYS_KEY_CONFIG),
    abi.TDH_SYS_INFO: _sys_info,
    abi.TDH_SYS_INIT: _always(abi.TDH_SYS_INIT),
    abi.TDH_SYS_RD: _sys_rd,
    abi.TDH_SYS_LP_INIT: _always(abi.TDH_SYS_LP_INIT),
    abi.TDH_SYS_TDMR_INIT: _always(abi.TDH_SYS_TDMR_INIT, rcx=POOL[0]),
    abi.TDH_SYS_RDALL: _always(abi.TDH_SYS_RDALL, rdx=ANSWER, r8=NULL_FIELD_ID),
    abi.TDH_MEM_TRACK: _mem_track,
    abi.TDH_MEM_RANGE_UNBLOCK: _on_entry(abi.TDH_MEM_RANGE_UNBLOCK, 0, 4, tracked=True),
    abi.TDH_PHYMEM_CACHE_WB: _phymem_cache_wb,
    abi.TDH_PHYMEM_PAGE_WBINVD: _phymem_page_wbinvd,
    abi.TDH_VP_WR: _vp_wr,
    abi.TDH_SYS_LP_SHUTDOWN: _always(abi.TDH_SYS_LP_SHUTDOWN),
    abi.TDH_SYS_CONFIG: _always(abi.TDH_SYS_CONFIG, rcx=ANSWER, rdx=1, r8=32),
    abi.TDH_SYS_UPDATE: _always(abi.TDH_SYS_UPDATE),
}

#: Leaves that need TLB tracking, without asking whether it was done.
CARELESS_MAKERS: dict[int, Maker] = {
    abi.TDH_MEM_PAGE_RELOCATE: _on_entry(abi.TDH_MEM_PAGE_RELOCATE, 0, 0, page=True),
    abi.TDH_MEM_PAGE_DEMOTE: _on_entry(abi.TDH_MEM_PAGE_DEMOTE, 1, 2, page=True),
    abi.TDH_MEM_PAGE_PROMOTE: _on_entry(abi.TDH_MEM_PAGE_PROMOTE, 1, 2),
    abi.TDH_MEM_PAGE_REMOVE: _on_entry(abi.TDH_MEM_PAGE_REMOVE, 0, 2),
    abi.TDH_MEM_SEPT_REMOVE: _on_entry(abi.TDH_MEM_SEPT_REMOVE, 1, 4),
    abi.TDH_MEM_RANGE_UNBLOCK: _on_entry(abi.TDH_MEM_RANGE_UNBLOCK, 0, 4),
}
