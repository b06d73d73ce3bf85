"""Mistakes of a user of the Python API: a ValueError that names value, range and remedy, and a
machine that did not change.
"""

from collections.abc import Callable

import pytest

from tdxlab.abi import leaves as abi
from tdxlab.abi.registers import Registers
from tdxlab.arch import shared_bit
from tdxlab.bare import BareMachine
from tdxlab.hardware import Platform, Region, default_platform
from tdxlab.host import Host
from tdxlab.host_td import HostTd
from tdxlab.scenarios import booted_machine

GPA = 0x4000_0000
LIMIT_48, LIMIT_52 = 1 << 47, 1 << 51


class Scene:
    """One machine: a TD of each width with a page; vCPU 0 of the first runs on LP 0."""

    def __init__(self) -> None:
        self.machine = booted_machine()
        self.host = Host(self.machine)
        self.td, self.wide = (HostTd(self.host, gpaw=gpaw) for gpaw in (48, 52))
        for td in (self.td, self.wide):
            td.add_vcpu(lp=0)
            td.add_page(GPA)
            td.finalize()
        self.td.enter(0, lp=0)


@pytest.fixture(scope="module")
def scene() -> Scene:
    return Scene()


Mistake = Callable[[Scene], object]

#: What a user does wrong, and what the complaint must say: the value, what is allowed, what to do.
MISTAKES: dict[str, tuple[Mistake, tuple[str, ...]]] = {
    "TD of GPAW 47": (lambda s: HostTd(s.host, gpaw=47), ("47", "48 or 52")),
    "shared bit of GPAW 57": (lambda s: shared_bit(57), ("57", "48 or 52")),
    "page above 2^47": (
        lambda s: s.td.aug(LIMIT_48),
        (hex(LIMIT_48), f"0..{LIMIT_48 - 4096:#x}", "GPAW 48"),
    ),
    "page above 2^51": (
        lambda s: s.wide.aug(LIMIT_52),
        (hex(LIMIT_52), f"0..{LIMIT_52 - 4096:#x}", "GPAW 52"),
    ),
    "2M page across the end": (lambda s: s.td.aug(LIMIT_48, 1), (hex(LIMIT_48), "GPAW 48")),
    "negative GPA": (lambda s: s.td.aug(-4096), ("-0x1000", "multiple of 0x1000")),
    "unaligned GPA": (lambda s: s.td.add_page(GPA + 8), (hex(GPA + 8), "multiple of 0x1000")),
    "unaligned 2M GPA": (lambda s: s.td.aug(GPA + 4096, 1), ("multiple of 0x200000",)),
    "GPA without a page": (lambda s: s.td.zap(GPA + 4096), (hex(GPA + 4096), hex(GPA))),
    "too many bytes": (lambda s: s.td.add_page(GPA, bytes(4097)), ("4097", "at most 4096")),
    "page outside memory": (
        lambda s: s.machine.store(1 << 45, b"x"),
        (hex(1 << 45), "0x0..0x3fffffff", "choose an address there"),
    ),
    "negative address": (lambda s: s.machine.store(-64, b"x"), ("-0x40", "choose an address")),
    "across the end of RAM": (lambda s: s.machine.store((1 << 30) - 1, b"xy"), ("0x3fffffff",)),
    "unaligned page": (
        lambda s: s.machine.clear(0x1234),
        ("0x1234", "did you mean 0x1000"),
    ),
    "cleared page outside memory": (lambda s: s.machine.clear(1 << 45), (hex(1 << 45), "RAM is")),
    "LP 4 of 4": (
        lambda s: s.machine.seamcall(4, abi.TDH_SYS_INFO, Registers()),
        ("LP 4", "LPs 0..3"),
    ),
    "LP -1": (
        lambda s: s.machine.seamcall(-1, abi.TDH_SYS_INFO, Registers()),
        ("LP -1", "LPs 0..3"),
    ),
    "guest event on LP 4": (lambda s: s.machine.interrupt(4), ("LP 4", "LPs 0..3")),
    "guest access on LP 9": (lambda s: s.machine.touch(9, 0), ("LP 9", "LPs 0..3")),
    "vCPU readied on LP 4": (lambda s: s.td.add_vcpu(lp=4), ("LP 4", "LPs 0..3")),
    "vCPU entered on LP 4": (lambda s: s.td.enter(0, lp=4), ("LP 4", "LPs 0..3")),
    "host call from a guest's LP": (
        lambda s: s.machine.seamcall(0, abi.TDH_SYS_INFO, Registers()),
        ("LP 0 runs a guest", "call from another LP"),
    ),
    "guest event on a host's LP": (
        lambda s: s.machine.tdcall(1, abi.TDG_VP_INFO, Registers()),
        ("LP 1 runs the host", "TDH.VP.ENTER comes first"),
    ),
    "guest access on a host's LP": (lambda s: s.machine.touch(1, 0), ("LP 1 runs the host",)),
    "guest registers on a host's LP": (
        lambda s: s.machine.guest_registers(1),
        ("LP 1 runs the host",),
    ),
    "one vCPU on two LPs": (
        lambda s: s.td.enter(0, lp=1),
        ("vCPU 0 runs on LP 0", "LP 1", "kick it out of LP 0 first"),
    ),
    "two vCPUs on one LP": (lambda s: s.wide.enter(0, lp=0), ("LP 0 runs a guest",)),
    "vCPU that does not exist": (lambda s: s.td.enter(1, lp=1), ("vCPU 1", "has 1 of them")),
    "access above 2^48": (
        lambda s: s.machine.touch(0, 1 << 48),
        (hex(1 << 48), f"0..{(1 << 48) - 1:#x}"),
    ),
    "negative access": (lambda s: s.machine.touch(0, -1), ("-0x1", "GPAW 48")),
    "no TDMR": (lambda s: default_platform(tdmr_gib=0), ("0 GiB", "choose 1 to 16384")),
    "0 LPs": (lambda s: default_platform(lps=0), ("0 LPs", "1..256")),
    "257 LPs": (lambda s: default_platform(lps=257), ("257 LPs", "1..256")),
}


@pytest.mark.parametrize(("mistake", "words"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_explained_and_changes_nothing(
    scene: Scene, mistake: Mistake, words: tuple[str, ...]
) -> None:
    before = scene.machine.digest()
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        mistake(scene)
    assert [word for word in words if word not in str(caught.value)] == []
    assert scene.machine.digest() == before


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"keyid_bits": 5}, ("32..63", "choose 1..31")),
        ({"private_keyids": (40, 39)}, ("40..39",)),
        ({"low_memory": Region(0x800, 4096)}, ("0x800", "multiples of 4096")),
        ({"low_memory": Region(0, 0)}, ("0x0 bytes", "above 0")),
    ],
)
def test_a_platform_that_cannot_be_is_refused(
    changes: dict[str, object], words: tuple[str, ...]
) -> None:
    good = default_platform()
    fields = {name: getattr(good, name) for name in good.__dataclass_fields__}
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        Platform(**fields | changes)
    assert [word for word in words if word not in str(caught.value)] == []


def test_a_host_without_a_free_page_says_what_to_do() -> None:
    host = Host(BareMachine())
    for _ in range(512):
        host.take_page(1 << 21)
    with pytest.raises(ValueError, match=r"no free page .* default_platform\(tdmr_gib="):
        host.take_page()


def test_a_host_without_a_free_keyid_says_what_to_do() -> None:
    host = Host(BareMachine())
    for _ in range(31):
        host.take_keyid()
    with pytest.raises(ValueError, match="tear one down first"):
        host.take_keyid()
