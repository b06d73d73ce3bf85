"""The guest and its memory: TDG.MEM.PAGE.ACCEPT and EPT violations."""

import pytest
from leafbench import RAW, SIZE_2M, SIZE_4K, Bench, BuiltTd

from tdxlab.abi import leaves as abi
from tdxlab.abi import status as s
from tdxlab.abi.outcome import GuestOutcome
from tdxlab.abi.registers import Registers
from tdxlab.cpu import Translation
from tdxlab.seam.td import Tdcs, Tdvps

GPA = 0x4000_0000
SEPT_VE_DISABLE = 1 << 28
ACCEPT = abi.TDG_MEM_PAGE_ACCEPT
BUSY_RCX = s.TDX_OPERAND_BUSY + 1


def guest(bench: Bench, *, gpaw: int = 48, attributes: int = 0) -> BuiltTd:
    """A TD whose vCPU runs on LP 0; tables exist down to GPA, its 2 MiB neighbour has none."""
    td = bench.td(gpaw=gpaw, attributes=attributes)
    td.map_tables(GPA)
    td.start()
    td.enter()
    return td


def aug(td: BuiltTd, gpa: int, level: int = 0) -> int:
    """As BuiltTd.aug, from LP 1 while the guest runs on LP 0."""
    hpa = td.bench.spare() if level == 0 else td.bench.big()
    operands = {"rcx": gpa | level, "rdx": td.tdr, "r8": hpa}
    td.bench.must(abi.TDH_MEM_PAGE_AUG, lp=1, **operands)
    return hpa


def put_entry(td: BuiltTd, gpa: int, level: int, raw: int) -> None:
    td.bench.words.put(td.locate(gpa, level)[0], raw)


@pytest.mark.parametrize("gpaw", [48, 52])
def test_tdg_mem_page_accept_zeroes_and_maps_a_4k_page(bench: Bench, gpaw: int) -> None:
    td = guest(bench, gpaw=gpaw)
    hpa, registers = aug(td, GPA), Registers(rcx=GPA, rdx=2, r15=15)
    bench.machine.store(hpa, b"left behind by somebody")
    outcome = bench.machine.tdcall(0, ACCEPT, registers.copy())
    assert outcome == GuestOutcome(False, 0, registers)
    assert td.septe(GPA) == RAW["MAPPED"] | hpa
    assert bench.machine.memory.read(hpa, SIZE_4K, td.keyid) == bytes(SIZE_4K)
    assert bench.machine.memory.keyid_of(hpa) == td.keyid
    assert isinstance(bench.machine.touch(0, GPA, write=True), Translation)


def test_tdg_mem_page_accept_zeroes_and_maps_a_2m_page(bench: Bench) -> None:
    td, gpa = guest(bench), GPA + SIZE_2M
    hpa = aug(td, gpa, 1)
    bench.machine.store(hpa + SIZE_2M - 8, b"leftover")
    td.accept(gpa, 1)
    assert td.septe(gpa, 1) == RAW["MAPPED"] | hpa
    assert bench.machine.memory.read(hpa + SIZE_2M - 8, 8, td.keyid) == bytes(8)


def test_tdg_mem_page_accept_of_2m_goes_on_where_an_interrupt_stopped_it(bench: Bench) -> None:
    td, gpa = guest(bench), GPA + SIZE_2M
    hpa = aug(td, gpa, 1)
    bench.conditions.interrupt_pending = True
    for counter in (1, 2, 3):
        outcome = td.tdcall(ACCEPT, rcx=gpa | 1)
        assert (outcome.exited, outcome.status) == (False, ACCEPT)
        assert td.septe(gpa, 1) == RAW["PENDING"] | hpa | counter << 12
    shown = bench.must(abi.TDH_MEM_SEPT_RD, lp=1, rcx=gpa | 1, rdx=td.tdr).rcx
    assert shown == RAW["PENDING"] & ~(1 << 56) | hpa | 3 << 12
    zeroed = bench.machine.trace.hardware()["movdir64b"]
    bench.conditions.interrupt_pending = False
    td.accept(gpa, 1)
    assert td.septe(gpa, 1) == RAW["MAPPED"] | hpa
    assert bench.machine.trace.hardware()["movdir64b"] - zeroed == (512 - 3) * 64


@pytest.mark.parametrize(
    "rcx", [GPA | 2, GPA | 8, GPA | 0x800, GPA | 1 << 52, (GPA + SIZE_4K) | 1, GPA | 1 << 47]
)
def test_tdg_mem_page_accept_refuses_a_bad_operand(bench: Bench, rcx: int) -> None:
    td = guest(bench)
    before = td.septe(GPA)
    outcome = td.tdcall(ACCEPT, rcx=rcx)
    assert (outcome.exited, outcome.status) == (False, s.TDX_OPERAND_INVALID + 1)
    assert td.septe(GPA) == before


def test_tdg_mem_page_accept_warns_of_an_accepted_page_with_the_level_found(bench: Bench) -> None:
    td = guest(bench)
    hpa = aug(td, GPA + SIZE_2M, 1)
    put_entry(td, GPA + SIZE_2M, 1, RAW["MAPPED"] | hpa)
    put_entry(td, GPA, 0, RAW["MAPPED"] | bench.spare())
    for rcx, level in ((GPA, 0), (GPA + SIZE_2M | 1, 1), (GPA + SIZE_2M + SIZE_4K, 1)):
        outcome = td.tdcall(ACCEPT, rcx=rcx)
        assert outcome.status == 0x0000_0B0A_0000_0000 + level
        assert not outcome.exited


def test_tdg_mem_page_accept_of_2m_refuses_a_table_in_its_place(bench: Bench) -> None:
    td = guest(bench)
    outcome = td.tdcall(ACCEPT, rcx=GPA | 1)
    assert (outcome.exited, outcome.status) == (False, 0xC000_0B0B_0000_0001)


#: (what lies at (gpa, level), RCX of the TDCALL, the information in RDX 63:32).
ACCEPT_EXITS = {
    "free 4K": ("FREE", GPA, 0, GPA, 0x0),
    "free 2M, asked for 2M": ("FREE", GPA + SIZE_2M, 1, GPA + SIZE_2M | 1, 0x9),
    "free 2M, asked for 4K": ("FREE", GPA + SIZE_2M, 1, GPA + SIZE_2M, 0x8),
    "blocked 4K": ("BLOCKED", GPA, 0, GPA, 0x4040),
    "pending and blocked 4K": ("PENDING_BLOCKED", GPA, 0, GPA, 0x40C0),
    "blocked 2M, asked for 4K": ("BLOCKED", GPA, 1, GPA, 0x4048),
    "blocked 2M": ("BLOCKED", GPA, 1, GPA | 1, 0x4049),
    "pending 2M, asked for 4K": ("PENDING", GPA, 1, GPA, 0x4088),
    "pending and blocked 2M": ("PENDING_BLOCKED", GPA, 1, GPA | 1, 0x40C9),
    "blocked table at 2M": ("NL_BLOCKED", GPA, 1, GPA, 0x2048),
    "blocked table at 1G": ("NL_BLOCKED", GPA, 2, GPA, 0x2050),
    "blocked table at the root": ("NL_BLOCKED", GPA, 3, GPA, 0x2058),
    "nothing at 1G": ("FREE", GPA, 2, GPA, 0x10),
    "nothing at the root, asked for 2M": ("FREE", GPA, 3, GPA | 1, 0x19),
}


@pytest.mark.parametrize("case", ACCEPT_EXITS.values(), ids=ACCEPT_EXITS)
def test_tdg_mem_page_accept_exits_to_the_host_where_nothing_can_be_accepted(
    bench: Bench, case: tuple[str, int, int, int, int]
) -> None:
    td = guest(bench)
    state, gpa, level, rcx, info = case
    hpa = td.septe(gpa, level) & 0xF_FFFF_FFFF_F000
    put_entry(td, gpa, level, RAW[state] | (0 if state == "FREE" else hpa))
    outcome = td.tdcall(ACCEPT, rcx=rcx, r12=12)
    host = Registers(rcx=2, rdx=1 | info << 32, r8=rcx & ~0xFFF)
    assert outcome == GuestOutcome(True, 48, host)
    assert (td.vcpu_state(), td.inside) == (2, (0, 0))
    td.enter()
    rax, registers = bench.machine.guest_registers(0)
    assert (rax, registers.rcx, registers.r12) == (ACCEPT, rcx, 12), "the guest runs it again"


@pytest.mark.parametrize("bit", [11, 52], ids=["locked", "wanted by the host"])
@pytest.mark.parametrize("state", ["PENDING", "FREE", "MAPPED"])
def test_tdg_mem_page_accept_is_busy_and_leaves_the_entry_as_it_is(
    bench: Bench, state: str, bit: int
) -> None:
    td = guest(bench)
    put_entry(td, GPA, 0, RAW[state] | 1 << bit)
    outcome = td.tdcall(ACCEPT, rcx=GPA)
    assert (outcome.exited, outcome.status) == (False, BUSY_RCX)
    assert td.septe(GPA) == RAW[state] | 1 << bit


# -- EPT violations


@pytest.mark.parametrize(("write", "rcx"), [(False, 1), (True, 3)], ids=["read", "write"])
def test_a_violation_at_a_free_page_exits_to_the_host(bench: Bench, write: bool, rcx: int) -> None:
    td = guest(bench)
    outcome = bench.machine.touch(0, GPA + 0x123, write=write)
    assert outcome == GuestOutcome(True, 48, Registers(rcx=rcx, r8=GPA))
    assert (td.vcpu_state(), td.inside) == (2, (0, 0))
    assert bench.machine.cpu.vcpu_inside(0) == 0


def test_a_violation_shows_the_qualification_without_bits_12_to_7(bench: Bench) -> None:
    guest(bench)
    outcome = bench.machine.vm_exit(0, 48, Registers(rdx=5), qualification=0x1FFF, gpa=GPA + 1)
    assert outcome == GuestOutcome(True, 48, Registers(rcx=0x7F, r8=GPA))


@pytest.mark.parametrize("state", ["BLOCKED", "PENDING_BLOCKED"])
def test_a_violation_at_a_blocked_page_exits_even_with_ve_enabled(bench: Bench, state: str) -> None:
    td = guest(bench)
    put_entry(td, GPA, 0, RAW[state] | bench.spare())
    outcome = bench.machine.touch(0, GPA)
    assert isinstance(outcome, GuestOutcome)
    assert (outcome.exited, outcome.status, outcome.registers.rdx) == (True, 48, 0)


@pytest.mark.parametrize("level", [0, 1], ids=["4K", "2M"])
def test_a_violation_at_a_pending_page_becomes_a_ve(bench: Bench, level: int) -> None:
    td = guest(bench)
    gpa = GPA if level == 0 else GPA + SIZE_2M
    aug(td, gpa, level)
    outcome = bench.machine.touch(0, gpa + 0x10, write=True)
    assert isinstance(outcome, GuestOutcome)
    assert not outcome.exited
    assert td.read(td.vcpu_word(Tdvps.PENDING_EVENT)) == 1 << 31 | 20
    info = td.tdcall(abi.TDG_VP_VEINFO_GET)
    assert (info.status, info.registers.rcx, info.registers.r9) == (0, 48, gpa + 0x10)


def test_a_violation_at_a_pending_page_exits_if_the_td_switched_ve_off(bench: Bench) -> None:
    td = guest(bench, attributes=SEPT_VE_DISABLE)
    aug(td, GPA)
    outcome = bench.machine.touch(0, GPA)
    assert outcome == GuestOutcome(True, 48, Registers(rcx=1, rdx=6, r8=GPA))


@pytest.mark.parametrize(("gpaw", "bit"), [(48, 47), (52, 51)])
def test_a_shared_access_exits_and_is_not_counted_by_the_filter(
    bench: Bench, gpaw: int, bit: int
) -> None:
    td = guest(bench, gpaw=gpaw)
    gpa = 1 << bit | 0x1234
    outcome = bench.machine.touch(0, gpa)
    assert outcome == GuestOutcome(True, 48, Registers(rcx=1, r8=gpa & ~0xFFF))
    assert td.read(td.vcpu_word(Tdvps.EPF_COUNTER)) == 0


@pytest.mark.parametrize("bit", [48, 51])
def test_an_access_above_48_bits_is_a_page_fault_of_the_guest(bench: Bench, bit: int) -> None:
    td = guest(bench)
    outcome = bench.machine.vm_exit(0, 48, Registers(), qualification=0x181, gpa=1 << bit)
    assert not outcome.exited
    assert td.read(td.vcpu_word(Tdvps.PENDING_EVENT)) == 1 << 31 | 14


def test_two_vcpus_of_one_td_accept_a_page_once(bench: Bench) -> None:
    td = bench.td()
    td.map_tables(GPA)
    td.add_vcpu(0)
    td.add_vcpu(1)
    td.finalize()
    td.enter(0, lp=0)
    td.enter(1, lp=1)
    bench.must(abi.TDH_MEM_PAGE_AUG, lp=2, rcx=GPA, rdx=td.tdr, r8=bench.spare())
    assert td.tdcall(ACCEPT, lp=0, rcx=GPA).status == 0
    assert td.tdcall(ACCEPT, lp=1, rcx=GPA).status == s.TDX_PAGE_ALREADY_ACCEPTED
    assert td.read(td.tdcs_word(Tdcs.REFCOUNT + 1)) == 2
