"""TDH.MNG.CREATE, KEY.CONFIG, ADDCX, VPFLUSHDONE, KEY.FREEID, KEY.RECLAIMID."""

import pytest
from leafbench import NDA, TDCX, TDR, Bench, BuiltTd
from leaffaults import (
    RCX,
    RDX,
    Fault,
    Refusals,
    check_alone,
    check_pairs,
    each,
    page_faults,
)
from spoils import (
    Case,
    Held,
    condition,
    hold,
    register,
    tdcs_field,
    tdr_field,
)

from tdxlab.abi import leaves as abi
from tdxlab.abi import status as s
from tdxlab.seam.td import Tdcs, Tdr

FREE, ASSIGNED, FLUSHED, RESERVED_KEY = 0, 1, 2, 3
TDR_EXCLUSIVE = page_faults("rcx", RCX, exclusive=True, wrong="free")
FATAL = Fault("TD fatal", tdr_field(Tdr.FATAL, 1), s.TDX_TD_FATAL)
WRONG_LIFECYCLE = s.TDX_LIFECYCLE_STATE_INCORRECT


def lifecycles(*values: int, status: int = WRONG_LIFECYCLE) -> list[Fault]:
    """The TD is in another part of its life."""
    return [Fault(f"life cycle {v}", tdr_field(Tdr.LIFECYCLE, v), status) for v in values]


def kot_held(case: Case) -> Held:
    return hold(case.bench.machine.module.keys.lock, 0, 1, 1)


def kot_read(case: Case) -> Held:
    return hold(case.bench.machine.module.keys.lock, 0, 2, 2)


KOT = [
    Fault("KOT held", kot_held, s.TDX_OPERAND_BUSY + 186),
    Fault("KOT read", kot_read, s.TDX_OPERAND_BUSY + 186),
]


def create(bench: Bench) -> Case:
    td = BuiltTd(bench)
    return Case(bench, td, abi.TDH_MNG_CREATE, rcx=bench.spare(), rdx=bench.keyid(), r8=8)


def keyid_of_the_first_td(case: Case) -> None:
    case.registers["rdx"] = case.td.keyid


BAD_KEYID = s.TDX_OPERAND_INVALID + RDX
CREATE = [
    Fault("KeyID below the private ones", register("rdx", 31), BAD_KEYID),
    Fault("KeyID above the private ones", register("rdx", 64), BAD_KEYID),
    Fault("KeyID with bit 16", register("rdx", 1 << 16 | 34), BAD_KEYID),
    Fault("KeyID with bit 63", register("rdx", 1 << 63 | 34), BAD_KEYID),
    *page_faults("rcx", RCX, exclusive=True),
    *KOT,
    Fault("KeyID of another TD", keyid_of_the_first_td, s.TDX_HKID_NOT_FREE),
    Fault("KeyID of the module", register("rdx", 32), s.TDX_HKID_NOT_FREE),
    Fault("no entropy", condition("entropy_fails", True), s.TDX_RND_NO_ENTROPY, keeps=False),
]


def key_config(bench: Bench) -> Case:
    return Case(bench, td := BuiltTd(bench), abi.TDH_MNG_KEY_CONFIG, rcx=td.tdr, rdx=2)


KEY_CONFIG = [
    *TDR_EXCLUSIVE,
    FATAL,
    *lifecycles(1, 2, 3),
    Fault("package done", tdr_field(Tdr.PKG_CONFIG_BITMAP, 1), s.TDX_KEY_CONFIGURED),
    Fault("PCONFIG busy", condition("pconfig_result", 5), s.TDX_OPERAND_BUSY + 187),
    Fault("PCONFIG fails", condition("pconfig_result", 2), s.TDX_KEY_GENERATION_FAILED),
]


def addcx(bench: Bench, pages: int = 5) -> Case:
    td = BuiltTd(bench)
    td.configure_keys()
    td.add_tdcx(pages)
    return Case(bench, td, abi.TDH_MNG_ADDCX, rcx=bench.spare(), rdx=td.tdr, r8=8)


TDR_OF_RDX = page_faults("rdx", RDX, exclusive=True, wrong="free")
NO_KEYS = lifecycles(0, 2, 3, status=s.TDX_TD_KEYS_NOT_CONFIGURED)
ADDCX = [
    *TDR_OF_RDX,
    FATAL,
    *NO_KEYS,
    Fault("9 pages there", tdr_field(Tdr.NUM_TDCX, 9), s.TDX_TDCX_NUM_INCORRECT),
    *page_faults("rcx", RCX, exclusive=True),
    Fault("no entropy", condition("entropy_fails", True), s.TDX_RND_NO_ENTROPY),
]


def addcx_seventh(bench: Bench) -> Case:
    return addcx(bench, 6)


ADDCX_SEVENTH = [
    Fault(f"op-state {n}", tdcs_field(Tdcs.OP_STATE, n), s.TDX_OP_STATE_INCORRECT) for n in (1, 2)
]


def vpflushdone(bench: Bench) -> Case:
    td = bench.td()
    td.start()
    bench.must(abi.TDH_VP_FLUSH, rcx=td.vcpus[0])
    return Case(bench, td, abi.TDH_MNG_VPFLUSHDONE, rcx=td.tdr, rdx=2)


VPFLUSHDONE = [
    *TDR_EXCLUSIVE,
    *KOT,
    *lifecycles(2, 3),
    Fault("vCPU associated", tdcs_field(Tdcs.NUM_ASSOC_VCPUS, 1), s.TDX_FLUSHVP_NOT_DONE),
]


def key_freeid(bench: Bench) -> Case:
    td = BuiltTd(bench)
    td.end(teardown=False)
    for lp in (1, 3):
        bench.must(abi.TDH_PHYMEM_CACHE_WB, lp=lp)
    return Case(bench, td, abi.TDH_MNG_KEY_FREEID, rcx=td.tdr, rdx=2)


def package_not_written_back(case: Case) -> None:
    case.bench.machine.module.keys.pending_packages.put(case.td.keyid, 2)


KEY_FREEID = [
    *TDR_EXCLUSIVE,
    *lifecycles(0, 1, 3),
    *KOT,
    Fault("package 1 not written back", package_not_written_back, s.TDX_WBCACHE_NOT_COMPLETE),
]

TABLES = [
    Refusals(abi.TDH_MNG_CREATE, create, CREATE),
    Refusals(abi.TDH_MNG_KEY_CONFIG, key_config, KEY_CONFIG),
    Refusals(abi.TDH_MNG_ADDCX, addcx, ADDCX),
    Refusals(abi.TDH_MNG_ADDCX, addcx_seventh, ADDCX_SEVENTH),
    Refusals(abi.TDH_MNG_VPFLUSHDONE, vpflushdone, VPFLUSHDONE),
    Refusals(abi.TDH_MNG_KEY_FREEID, key_freeid, KEY_FREEID),
]


@each(TABLES)
def test_mng_leaf_refuses(bench: Bench, table: Refusals, number: int) -> None:
    check_alone(bench, table, number)


@each(TABLES)
def test_mng_leaf_refuses_the_earlier_of_two_faults(
    bench: Bench, table: Refusals, number: int
) -> None:
    check_pairs(bench, table, number)


def kot(bench: Bench, keyid: int) -> tuple[int, int]:
    """(state, packages still to be written back) of a KeyID."""
    keys = bench.machine.module.keys
    return keys.states.view[keyid], keys.pending_packages.view[keyid]


def test_tdh_mng_create_makes_a_tdr_under_the_modules_keyid(bench: Bench) -> None:
    hpa = bench.page()
    bench.machine.store(hpa, b"old")
    values = bench.must(abi.TDH_MNG_CREATE, rcx=hpa, rdx=40, r8=8)
    assert (values.rcx, values.rdx, values.r8) == (hpa, 40, 8)
    assert bench.pamt(hpa)[2:] == (TDR, 0, 0, 0)
    assert kot(bench, 40) == (ASSIGNED, 0)
    assert bench.machine.memory.keyid_of(hpa) == 32
    page = bench.machine.memory.frame(hpa)
    fields = [bench.words.view[page + word] for word in (Tdr.HKID, Tdr.LIFECYCLE, Tdr.CHLDCNT)]
    assert fields == [40, 0, 0]


def test_tdh_mng_create_gives_every_td_another_uuid(bench: Bench) -> None:
    tds = [BuiltTd(bench) for _ in range(3)]
    assert len({bench.words.read(td.tdr_word(Tdr.UUID), 4) for td in tds} | {bytes(32)}) == 4


def test_tdh_mng_create_without_entropy_leaves_the_page_zeroed_and_free(bench: Bench) -> None:
    hpa = bench.page()
    bench.machine.store(hpa, b"old")
    bench.conditions.entropy_fails = True
    status, _ = bench.call(abi.TDH_MNG_CREATE, rcx=hpa, rdx=40)
    assert status == s.TDX_RND_NO_ENTROPY
    assert bench.machine.memory.page(hpa) == bytes(4096)
    assert bench.pamt(hpa)[2:] == (NDA, 0, 0, 0)
    assert kot(bench, 40) == (FREE, 0)


def test_tdh_mng_key_config_on_every_package_configures_the_td(bench: Bench) -> None:
    td = BuiltTd(bench)
    bench.must(abi.TDH_MNG_KEY_CONFIG, lp=1, rcx=td.tdr)
    assert (td.lifecycle, td.read(td.tdr_word(Tdr.PKG_CONFIG_BITMAP))) == (0, 1)
    assert bench.call(abi.TDH_MNG_KEY_CONFIG, lp=0, rcx=td.tdr)[0] == s.TDX_KEY_CONFIGURED
    bench.must(abi.TDH_MNG_KEY_CONFIG, lp=3, rcx=td.tdr)
    assert (td.lifecycle, td.read(td.tdr_word(Tdr.PKG_CONFIG_BITMAP))) == (1, 3)


def test_tdh_mng_addcx_fills_each_page_by_its_index(bench: Bench) -> None:
    td = BuiltTd(bench)
    td.configure_keys()
    td.add_tdcx(9)
    free = (0x80E0_0000_0000_0000).to_bytes(8, "little") * 512
    for index, hpa in enumerate(td.cx):
        filling = {2: b"\xff" * 4096, 3: free}.get(index, bytes(4096))
        assert bench.machine.memory.page(hpa) == filling
        assert bench.machine.memory.keyid_of(hpa) == td.keyid
        assert bench.pamt(hpa)[2:] == (TDCX, td.tdr, 0, 0)
        assert td.read(td.tdr_word(Tdr.TDCX_PA + index)) == hpa | td.keyid << 46
    assert (td.chldcnt, td.read(td.tdr_word(Tdr.NUM_TDCX))) == (9, 9)


@pytest.mark.parametrize("pages", [0, 4, 6])
def test_tdh_mng_addcx_needs_entropy_for_the_sixth_page_only(bench: Bench, pages: int) -> None:
    case = addcx(bench, pages)
    bench.conditions.entropy_fails = True
    case.succeed()


@pytest.mark.parametrize("op_state", [1, 2])
def test_tdh_mng_addcx_does_not_look_at_the_op_state_before_the_seventh_page(
    bench: Bench, op_state: int
) -> None:
    case = addcx(bench, 5)
    tdcs_field(Tdcs.OP_STATE, op_state)(case)
    case.succeed()


def test_tdh_mng_vpflushdone_blocks_the_td_and_flushes_its_keyid(bench: Bench) -> None:
    case = vpflushdone(bench)
    values = case.succeed()
    assert (values.rcx, values.rdx) == (case.td.tdr, 2)
    assert case.td.lifecycle == 2
    assert kot(bench, case.td.keyid) == (FLUSHED, 3)


@pytest.mark.parametrize("keys", [False, True])
def test_tdh_mng_vpflushdone_succeeds_without_tdcs_and_on_a_fatal_td(
    bench: Bench, keys: bool
) -> None:
    td = BuiltTd(bench)
    if keys:
        td.configure_keys()
    bench.words.put(td.tdr_word(Tdr.FATAL), 1)
    td.end(teardown=False)
    assert td.lifecycle == 2


def test_tdh_mng_vpflushdone_waits_for_every_associated_vcpu(bench: Bench) -> None:
    td = bench.td()
    td.add_vcpu(lp=0)
    td.add_vcpu(lp=3)
    bench.must(abi.TDH_VP_FLUSH, lp=0, rcx=td.vcpus[0])
    assert bench.call(abi.TDH_MNG_VPFLUSHDONE, rcx=td.tdr)[0] == s.TDX_FLUSHVP_NOT_DONE
    bench.must(abi.TDH_VP_FLUSH, lp=3, rcx=td.vcpus[1])
    bench.must(abi.TDH_MNG_VPFLUSHDONE, rcx=td.tdr)


def test_tdh_mng_key_freeid_gives_the_keyid_to_the_next_td(bench: Bench) -> None:
    case = key_freeid(bench)
    case.succeed()
    assert case.td.lifecycle == 3
    assert kot(bench, case.td.keyid) == (FREE, 0)
    bench.must(abi.TDH_MNG_CREATE, rcx=bench.page(), rdx=case.td.keyid)


@pytest.mark.parametrize("rcx", [0, 0x123, (1 << 64) - 1])
def test_tdh_mng_key_reclaimid_always_succeeds(bench: Bench, rcx: int) -> None:
    before = bench.digest()
    assert bench.must(abi.TDH_MNG_KEY_RECLAIMID, rcx=rcx).rcx == rcx
    assert bench.digest() == before
