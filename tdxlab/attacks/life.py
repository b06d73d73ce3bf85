"""Attacks on the order of things: pages taken too early, steps of the teardown left out."""

from __future__ import annotations

from tdxlab.abi import leaves as abi
from tdxlab.abi.status import is_error
from tdxlab.attacks.memory import FORGED, judge_read
from tdxlab.attacks.stage import (
    DATA,
    DATA_GPA,
    FREE_GPA,
    SECRET,
    SOURCE_HPA,
    VICTIM_LP,
    Stage,
)
from tdxlab.attacks.verdict import (
    CONTROL,
    ENCRYPTION,
    LEAKED,
    LIFE_CYCLE,
    NOTHING,
    TRACKING,
    Verdict,
    refused,
)
from tdxlab.memory import LINE_SIZE


def remove_without_block(stage: Stage) -> Verdict:
    """Take the victim's page away at once, while its vCPU runs."""
    stage.guest_read()
    status = stage.seamcall(abi.TDH_MEM_PAGE_REMOVE, rcx=DATA_GPA, rdx=stage.tdr)
    return _judge_tlb(stage, [status])


def stale_tlb(stage: Stage) -> Verdict:
    """Block the victim's page and take it away while the victim's LP still translates it: before
    TDH.MEM.TRACK, and after it without an IPI.
    """
    tdr = stage.tdr
    stage.guest_read()
    stage.seamcall(abi.TDH_MEM_RANGE_BLOCK, rcx=DATA_GPA, rdx=tdr)
    statuses = [stage.seamcall(abi.TDH_MEM_PAGE_REMOVE, rcx=DATA_GPA, rdx=tdr)]
    if is_error(statuses[0]):
        stage.seamcall(abi.TDH_MEM_TRACK, rcx=tdr)
        statuses.append(stage.seamcall(abi.TDH_MEM_PAGE_REMOVE, rcx=DATA_GPA, rdx=tdr))
    return _judge_tlb(stage, statuses)


def _judge_tlb(stage: Stage, statuses: list[int]) -> Verdict:
    verdict = refused(statuses)
    if verdict is not None:
        return verdict
    tlb = stage.machine.cpu.tlbs[VICTIM_LP]
    if any(found.hpa == stage.data_hpa for found in tlb.values()):
        return Verdict("", CONTROL, "the host has the page, and the victim's TLB still leads to it")
    return Verdict(TRACKING, NOTHING, "no TLB leads to the page any more")


def reclaim_early(stage: Stage) -> Verdict:
    """Reclaim the victim's page, as if the victim were being torn down; then begin to tear it down
    and try again.
    """
    statuses = [stage.seamcall(abi.TDH_PHYMEM_PAGE_RECLAIM, rcx=stage.data_hpa)]
    if is_error(statuses[0]):
        _flush_vcpu(stage)
        stage.seamcall(abi.TDH_MNG_VPFLUSHDONE, rcx=stage.tdr)
        statuses.append(stage.seamcall(abi.TDH_PHYMEM_PAGE_RECLAIM, rcx=stage.data_hpa))
    return refused(statuses) or Verdict("", CONTROL, "the host has a page of a living TD")


def skip_vcpu_flush(stage: Stage) -> Verdict:
    """End the victim without flushing its vCPU, of which the LP still has translations."""
    stage.guest_read()
    stage.kick()
    status = stage.seamcall(abi.TDH_MNG_VPFLUSHDONE, rcx=stage.tdr)
    return refused([status]) or Verdict("", CONTROL, "the TD is closed with its vCPU on an LP")


def skip_cache_flush(stage: Stage) -> Verdict:
    """Free the victim's KeyID with one of the packages not written back."""
    _flush_vcpu(stage)
    stage.seamcall(abi.TDH_MNG_VPFLUSHDONE, rcx=stage.tdr)
    stage.seamcall(abi.TDH_PHYMEM_CACHE_WB, lp=_lp_of(stage, 0))
    status = stage.seamcall(abi.TDH_MNG_KEY_FREEID, rcx=stage.tdr)
    return refused([status]) or Verdict("", CONTROL, "the KeyID is free, its lines are in a cache")


def write_back_late(stage: Stage) -> Verdict:
    """Take a page from a TD of one's own and give it to the victim, with the lines of the old KeyID
    still in a cache: write them back under a wrong KeyID, which the module does not notice. When
    the victim has written its secret there, the old lines come to memory.
    """
    rival, hpa = stage.rival, stage.spare[0]
    stage.data_gpa, stage.data_hpa = FREE_GPA, hpa
    stage.store(SOURCE_HPA, FORGED)
    stage.seamcall(abi.TDH_MEM_PAGE_ADD, rcx=FREE_GPA, rdx=rival.tdr, r8=hpa, r9=SOURCE_HPA)
    stage.seamcall(abi.TDH_MEM_PAGE_REMOVE, rcx=FREE_GPA, rdx=rival.tdr)
    stage.seamcall(abi.TDH_PHYMEM_PAGE_WBINVD, rcx=hpa)
    stage.seamcall(abi.TDH_MEM_PAGE_AUG, rcx=FREE_GPA, rdx=stage.tdr, r8=hpa)
    stage.accept(FREE_GPA)
    stage.guest_write(DATA, FREE_GPA)
    stage.evict(hpa, FORGED)
    found = stage.guest_read(FREE_GPA)
    if found == FORGED:
        return Verdict("", CONTROL, "the victim reads what the host's own TD has left in a cache")
    return judge_read(stage, found, hpa, LIFE_CYCLE)


def read_leftovers(stage: Stage) -> Verdict:
    """Tear the victim down as it should be, but do not clear its page; read it, and give its KeyID
    to the next TD, which then has it with a key of its own.
    """
    keyid, hpa, spare = stage.keyid, stage.data_hpa, stage.spare[0]
    _flush_vcpu(stage)
    stage.seamcall(abi.TDH_MNG_VPFLUSHDONE, rcx=stage.tdr)
    for package in stage.machine.cpu.packages:
        stage.seamcall(abi.TDH_PHYMEM_CACHE_WB, lp=_lp_of(stage, package))
    stage.seamcall(abi.TDH_MNG_KEY_FREEID, rcx=stage.tdr)
    stage.seamcall(abi.TDH_PHYMEM_PAGE_RECLAIM, rcx=hpa)
    stage.load(hpa)
    stage.seamcall(abi.TDH_MNG_CREATE, rcx=spare, rdx=keyid)
    for package in stage.machine.cpu.packages:
        stage.seamcall(abi.TDH_MNG_KEY_CONFIG, lp=_lp_of(stage, package), rcx=spare)
    stage.read_with_key(hpa, keyid, "read with the KeyID's new key")
    if any(move.result == SECRET for move in stage.moves):
        return Verdict("", LEAKED, "the bytes are those that the victim wrote")
    return Verdict(ENCRYPTION, NOTHING, "without the key that is gone, the page is noise")


def add_after_launch(stage: Stage) -> Verdict:
    """Add a page with content of the host's choice to a TD that was measured already."""
    tdr, hpa = stage.tdr, stage.spare[0]
    stage.kick()
    stage.store(SOURCE_HPA, DATA[:LINE_SIZE])
    status = stage.seamcall(abi.TDH_MEM_PAGE_ADD, rcx=FREE_GPA, rdx=tdr, r8=hpa, r9=SOURCE_HPA)
    return refused([status]) or Verdict("", CONTROL, "the victim has a page that nobody measured")


def _flush_vcpu(stage: Stage) -> None:
    stage.kick()
    stage.seamcall(abi.TDH_VP_FLUSH, lp=VICTIM_LP, rcx=stage.victim.vcpus[0])


def _lp_of(stage: Stage, package: int) -> int:
    return stage.machine.cpu.package_of.index(package)
