"""TDH.VP.CREATE, ADDCX, INIT, FLUSH."""

import pytest
from leafbench import TDCX, TDVPR, Bench
from leaffaults import (
    RCX,
    RDX,
    Fault,
    Refusals,
    check_alone,
    check_pairs,
    each,
    page_faults,
    state_faults,
)
from spoils import (
    Case,
    Held,
    hold,
    tdcs_field,
    tdr_field,
    vcpu_field,
)

from tdxlab.abi import leaves as abi
from tdxlab.abi import status as s
from tdxlab.seam.td import Tdcs, Tdr, Tdvps

NO_LP = 0xFFFF_FFFF


def tdr_held(case: Case) -> Held:
    """The TDR that the vCPU belongs to, found by the leaf itself."""
    pamt = case.bench.machine.module.pamt
    return hold(pamt.words, pamt.entry(case.td.tdr, 0), 1, 7)


TDR_BUSY = Fault("its TDR held", tdr_held, s.TDX_OPERAND_BUSY + 128)
TOO_FEW_PAGES = Fault("5 vCPU pages", vcpu_field(Tdvps.NUM_PAGES, 5), s.TDX_TDCX_NUM_INCORRECT)


def vcpu_states(*values: int) -> list[Fault]:
    """The vCPU is in a state that the leaf refuses."""
    status = s.TDX_VCPU_STATE_INCORRECT
    return [Fault(f"vCPU state {v:#x}", vcpu_field(Tdvps.STATE, v), status) for v in values]


def create(bench: Bench) -> Case:
    td = bench.td()
    return Case(bench, td, abi.TDH_VP_CREATE, rcx=bench.spare(), rdx=td.tdr, r8=8)


CREATE = [
    *page_faults("rdx", RDX, exclusive=False, wrong="free"),
    *state_faults(0, 2),
    *page_faults("rcx", RCX, exclusive=True),
]


def addcx(bench: Bench) -> Case:
    td = bench.td()
    td.vcpus.append(td.create_vcpu(4))
    return Case(bench, td, abi.TDH_VP_ADDCX, rcx=bench.spare(), rdx=td.vcpus[0], r8=8)


ADDCX = [
    *page_faults("rdx", RDX, exclusive=True, wrong="free"),
    TDR_BUSY,
    *state_faults(0, 2),
    *vcpu_states(2, 4, 8),
    Fault("15 vCPU pages", vcpu_field(Tdvps.NUM_PAGES, 15), s.TDX_TDCX_NUM_INCORRECT),
    *page_faults("rcx", RCX, exclusive=True),
]


def init(bench: Bench) -> Case:
    td = bench.td()
    td.vcpus.append(td.create_vcpu())
    return Case(bench, td, abi.TDH_VP_INIT, rcx=td.vcpus[0], rdx=0xABCD)


INIT = [
    *page_faults("rcx", RCX, exclusive=True, wrong="free"),
    TDR_BUSY,
    *state_faults(0, 2),
    TOO_FEW_PAGES,
    *vcpu_states(2, 4, 8),
    Fault("all vCPUs there", tdcs_field(Tdcs.NUM_VCPUS, 4), s.TDX_MAX_VCPUS_EXCEEDED),
]


def flush(bench: Bench) -> Case:
    td = bench.td()
    td.start()
    return Case(bench, td, abi.TDH_VP_FLUSH, rcx=td.vcpus[0], rdx=2)


def from_another_lp(case: Case) -> None:
    case.lp = 1


FLUSH = [
    *page_faults("rcx", RCX, exclusive=True, wrong="free"),
    TDR_BUSY,
    *(
        Fault(f"life cycle {v}", tdr_field(Tdr.LIFECYCLE, v), s.TDX_TD_KEYS_NOT_CONFIGURED)
        for v in (0, 2, 3)
    ),
    TOO_FEW_PAGES,
    Fault("from another LP", from_another_lp, s.TDX_VCPU_NOT_ASSOCIATED),
    Fault("flushed", vcpu_field(Tdvps.ASSOC_LPID, NO_LP), s.TDX_VCPU_NOT_ASSOCIATED),
]

TABLES = [
    Refusals(abi.TDH_VP_CREATE, create, CREATE),
    Refusals(abi.TDH_VP_ADDCX, addcx, ADDCX),
    Refusals(abi.TDH_VP_INIT, init, INIT),
    Refusals(abi.TDH_VP_FLUSH, flush, FLUSH),
]


@each(TABLES)
def test_vp_leaf_refuses(bench: Bench, table: Refusals, number: int) -> None:
    check_alone(bench, table, number)


@each(TABLES)
def test_vp_leaf_refuses_the_earlier_of_two_faults(
    bench: Bench, table: Refusals, number: int
) -> None:
    check_pairs(bench, table, number)


def test_tdh_vp_create_makes_the_root_page_of_a_vcpu(bench: Bench) -> None:
    td, hpa = bench.td(), bench.page()
    children = td.chldcnt
    values = bench.must(abi.TDH_VP_CREATE, rcx=hpa, rdx=td.tdr)
    assert (values.rcx, values.rdx) == (hpa, td.tdr)
    assert bench.pamt(hpa)[2:] == (TDVPR, td.tdr, 0, 0)
    assert bench.machine.memory.keyid_of(hpa) == td.keyid
    td.vcpus.append(hpa)
    assert td.read(td.vcpu_word(Tdvps.NUM_PAGES)) == 1
    assert td.read(td.vcpu_word(Tdvps.ASSOC_LPID)) == NO_LP
    assert (td.chldcnt, td.vcpu_state()) == (children + 1, 0)


def test_tdh_vp_create_has_no_limit(bench: Bench) -> None:
    td = bench.td(max_vcpus=1)
    for _ in range(3):
        td.create_vcpu(0)


def test_tdh_vp_addcx_fills_each_page_by_its_index(bench: Bench) -> None:
    td = bench.td()
    td.vcpus.append(td.create_vcpu(0))
    children = td.chldcnt
    for index in range(1, 15):
        hpa = bench.page()
        values = bench.must(abi.TDH_VP_ADDCX, rcx=hpa, rdx=td.vcpus[0])
        assert (values.rcx, values.rdx) == (hpa, td.vcpus[0])
        filling = b"\xff" if index in (7, 8, 10, 11, 13, 14) else b"\0"
        assert bench.machine.memory.page(hpa) == filling * 4096
        assert bench.machine.memory.keyid_of(hpa) == td.keyid
        assert bench.pamt(hpa)[2:] == (TDCX, td.tdr, 0, 0)
    assert td.chldcnt == children + 14
    assert td.read(td.vcpu_word(Tdvps.NUM_PAGES)) == 15


@pytest.mark.parametrize(("gpaw", "width"), [(48, 48), (52, 52)])
def test_tdh_vp_init_readies_the_vcpu_and_associates_it(
    bench: Bench, gpaw: int, width: int
) -> None:
    td = bench.td(gpaw=gpaw)
    td.add_vcpu(lp=3)
    td.vcpus.append(td.create_vcpu())
    values = bench.must(abi.TDH_VP_INIT, lp=2, rcx=td.vcpus[1], rdx=0xABCD)
    assert (values.rcx, values.rdx) == (td.vcpus[1], 0xABCD)
    assert td.vcpu_state(1) == 2
    assert td.read(td.vcpu_word(Tdvps.ASSOC_LPID, 1)) == 2
    assert td.read(td.vcpu_word(Tdvps.INDEX, 1)) == 1
    assert (td.associated, td.read(td.tdcs_word(Tdcs.NUM_VCPUS))) == (2, 2)
    td.finalize()
    td.enter(1, lp=2)
    _, guest = bench.machine.guest_registers(2)
    assert (guest.rcx, guest.r8, guest.rbx, guest.rsi) == (0xABCD, 0xABCD, width, 1)


def test_tdh_vp_init_needs_three_pages_more_for_each_nested_vm(bench: Bench) -> None:
    td = bench.td(num_l2_vms=2)
    tdvpr = td.create_vcpu(10)
    assert bench.call(abi.TDH_VP_INIT, rcx=tdvpr)[0] == s.TDX_TDCX_NUM_INCORRECT
    bench.must(abi.TDH_VP_ADDCX, rcx=bench.page(), rdx=tdvpr)
    bench.must(abi.TDH_VP_INIT, rcx=tdvpr)


def test_tdh_vp_init_refuses_the_vcpu_too_many_and_keeps_the_count(bench: Bench) -> None:
    td = bench.td(max_vcpus=2)
    td.add_vcpu()
    td.add_vcpu()
    assert bench.call(abi.TDH_VP_INIT, rcx=td.create_vcpu())[0] == s.TDX_MAX_VCPUS_EXCEEDED
    assert td.read(td.tdcs_word(Tdcs.NUM_VCPUS)) == 2


def test_tdh_vp_flush_dissociates_and_drops_translations(bench: Bench) -> None:
    td = bench.td()
    td.add_page(0)
    td.start()
    td.enter()
    bench.machine.touch(0, 0)
    bench.machine.interrupt(0)
    assert bench.machine.cpu.tlbs[0]
    values = bench.must(abi.TDH_VP_FLUSH, rcx=td.vcpus[0])
    assert values.rcx == td.vcpus[0]
    assert td.read(td.vcpu_word(Tdvps.ASSOC_LPID)) == NO_LP
    assert (td.associated, td.vcpu_state()) == (0, 2)
    assert not bench.machine.cpu.tlbs[0]
    td.enter(lp=1)


def test_tdh_vp_flush_looks_neither_at_the_op_state_nor_at_fatal(bench: Bench) -> None:
    case = flush(bench)
    bench.words.put(case.td.tdr_word(Tdr.FATAL), 1)
    bench.words.put(case.td.tdcs_word(Tdcs.OP_STATE), 0)
    case.succeed()


def test_tdh_vp_flush_of_a_running_vcpu_finds_its_tdvpr_busy(bench: Bench) -> None:
    td = bench.td()
    td.start()
    td.enter()
    status, _ = bench.call(abi.TDH_VP_FLUSH, lp=1, rcx=td.vcpus[0])
    assert status == s.TDX_OPERAND_BUSY + 1
