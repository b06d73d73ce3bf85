"""Packages, LPs, TLBs, IPIs and the walk of an EPT."""

import pytest

from tdxlab.arch import EPT_EXECUTE, EPT_READ, EPT_WRITE
from tdxlab.cpu import Cpu, EptViolation, Translation
from tdxlab.hardware import Region, default_platform
from tdxlab.journal import Journal
from tdxlab.memory import Memory
from tdxlab.trace import Trace

ROOT, PDPT, PD, PT = 0x1000, 0x2000, 0x3000, 0x4000
LINK, LEAF, RWX = 7, 0x80, 7
PAGE, BIG = 0x70_0000, 0x20_0000
GPA = 0x4000_5000


class Hardware:
    """Two LPs in two packages and an EPT of four levels: 4 KiB at GPA, 2 MiB at GPA + 2 MiB."""

    def __init__(self) -> None:
        journal = Journal()
        self.trace = Trace(journal)
        self.memory = Memory(journal, self.trace, [Region(0, 1 << 24)])
        self.cpu = Cpu(journal, self.trace, self.memory, (0, 1))
        self.link(ROOT, 0, PDPT | LINK)
        self.link(PDPT, 1, PD | LINK)
        self.link(PD, 0, PT | LINK)
        self.link(PD, 1, BIG | LEAF | RWX)
        self.link(PT, 5, PAGE | LEAF | RWX)

    def link(self, table: int, index: int, entry: int) -> None:
        self.memory.words.put(self.memory.frame(table) + index, entry)

    def access(self, gpa: int, access: int, lp: int = 0) -> Translation | EptViolation:
        return self.cpu.access(lp, ROOT, 3, gpa, access)

    def count(self, name: str) -> int:
        return self.trace.hardware()[name]


@pytest.fixture
def hardware() -> Hardware:
    return Hardware()


@pytest.mark.parametrize(("lps", "packages"), [(1, 1), (4, 2), (256, 8), (3, 2)])
def test_a_platform_spreads_its_lps_over_its_packages(lps: int, packages: int) -> None:
    platform = default_platform(lps=lps, packages=packages)
    assert len(platform.package_of) == lps
    sizes = [platform.package_of.count(package) for package in range(packages)]
    assert max(sizes) - min(sizes) <= 1
    assert list(platform.package_of) == sorted(platform.package_of)


@pytest.mark.parametrize(("lps", "packages"), [(0, 1), (257, 1), (4, 0), (4, 9), (2, 3)])
def test_a_platform_refuses_numbers_out_of_range(lps: int, packages: int) -> None:
    with pytest.raises(ValueError, match=r"choose 1\.\.256 LPs and 1\.\.8 packages"):
        default_platform(lps=lps, packages=packages)


@pytest.mark.parametrize(
    ("package_of", "message"),
    [((), "1 to 256"), ((0,) * 257, "1 to 256"), ((0, 2), "number them"), (range(9), "at most 8")],
)
def test_a_cpu_refuses_impossible_packages(package_of: tuple[int, ...], message: str) -> None:
    hardware = Hardware()
    with pytest.raises(ValueError, match=message):
        Cpu(Journal(), hardware.trace, hardware.memory, tuple(package_of))


@pytest.mark.parametrize("lp", [-1, 2, 1 << 40])
def test_an_lp_that_does_not_exist_is_refused_with_those_that_do(
    hardware: Hardware, lp: int
) -> None:
    with pytest.raises(ValueError, match=rf"LP {lp} does not exist; this machine has LPs 0\.\.1"):
        hardware.cpu.require_lp(lp)


def test_enter_and_leave_say_who_is_inside_which_lp(hardware: Hardware) -> None:
    hardware.cpu.enter(1, 0x5000, 0x6000)
    assert [hardware.cpu.vcpu_inside(lp) for lp in (0, 1)] == [0, 0x5000]
    assert [hardware.cpu.tdr_inside(lp) for lp in (0, 1)] == [0, 0x6000]
    hardware.cpu.leave(1)
    assert hardware.cpu.vcpu_inside(1) == hardware.cpu.tdr_inside(1) == 0
    assert (hardware.count("td_entry"), hardware.count("td_exit")) == (1, 1)


def test_ipis_are_counted(hardware: Hardware) -> None:
    hardware.cpu.send_ipi(0)
    hardware.cpu.send_ipi(1)
    assert hardware.count("ipi") == 2
    with pytest.raises(ValueError, match="does not exist"):
        hardware.cpu.send_ipi(2)


@pytest.mark.parametrize(
    ("gpa", "expected"),
    [
        (GPA + 0x123, Translation(PAGE + 0x123, 0, RWX)),
        (0x4020_0000, Translation(BIG, 1, RWX)),
        (0x4030_1234, Translation(BIG + 0x10_1234, 1, RWX)),
    ],
)
def test_walk_finds_small_and_big_pages(
    hardware: Hardware, gpa: int, expected: Translation
) -> None:
    assert hardware.cpu.walk(ROOT, 3, gpa, EPT_READ) == expected


def test_walk_allows_what_every_level_allows(hardware: Hardware) -> None:
    hardware.link(PD, 0, PT | EPT_READ | EPT_EXECUTE)
    assert hardware.access(GPA, EPT_READ) == Translation(PAGE, 0, EPT_READ | EPT_EXECUTE)
    violation = hardware.access(GPA, EPT_READ | EPT_WRITE)
    assert violation == EptViolation(GPA, 3 | (EPT_READ | EPT_EXECUTE) << 3)


def test_a_violation_says_what_was_wanted_and_caches_nothing(hardware: Hardware) -> None:
    assert hardware.access(GPA + 0x1000, EPT_READ) == EptViolation(GPA + 0x1000, EPT_READ)
    assert not hardware.cpu.tlbs[0]


def test_a_translation_stays_in_the_tlb_of_its_lp_until_it_is_flushed(hardware: Hardware) -> None:
    hardware.access(GPA, EPT_READ)
    hardware.link(PT, 5, 0)
    assert hardware.access(GPA + 8, EPT_READ) == Translation(PAGE + 8, 0, RWX)
    assert isinstance(hardware.access(GPA, EPT_READ, lp=1), EptViolation)
    assert (hardware.count("tlb_hit"), hardware.count("tlb_walk")) == (1, 2)
    hardware.cpu.invept(0, ROOT)
    assert isinstance(hardware.access(GPA, EPT_READ), EptViolation)
    assert hardware.count("tlb_flush") == 1


def test_invept_drops_one_root_only(hardware: Hardware) -> None:
    hardware.access(GPA, EPT_READ)
    hardware.cpu.invept(0, 0x9000)
    assert hardware.cpu.tlbs[0]


def test_an_access_beyond_the_cached_permissions_walks_again(hardware: Hardware) -> None:
    hardware.link(PT, 5, PAGE | LEAF | EPT_READ)
    hardware.access(GPA, EPT_READ)
    hardware.link(PT, 5, PAGE | LEAF | RWX)
    assert hardware.access(GPA, EPT_WRITE) == Translation(PAGE, 0, RWX)
    assert hardware.count("tlb_walk") == 2
