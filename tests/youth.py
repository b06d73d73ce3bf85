"""A module that nobody has brought up yet, and fuzzing at every stage of that."""

from collections.abc import Iterator

from tdxlab.abi import leaves as abi
from tdxlab.abi.registers import Registers
from tdxlab.abi.structs import TDMR_INFO_SIZE, make_tdmr_info
from tdxlab.arch import PAGE_SIZE, SIZE_1G
from tdxlab.bare import BareMachine
from tdxlab.hardware import default_platform
from tdxlab.seam.module import LEAVES
from tests.scene import BASE, Scene
from tests.sweeps import Sweeper
from tests.walker import HostCall

POINTERS, INFOS = 0x2100_0000, 0x2101_0000
GLOBAL_KEYID = 32

#: Sizes of the PAMTs of a TDMR of 1 GiB, by level 1G, 2M, 4K.
_SIZES = (PAGE_SIZE, 2 * PAGE_SIZE, 1024 * PAGE_SIZE)


def youth() -> Scene:
    """A machine of four LPs in two packages, switched on."""
    return Scene(BareMachine(default_platform(lps=4, packages=2)))


def _info(machine: BareMachine, base: int = BASE, size: int = SIZE_1G, **changes: object) -> bytes:
    """TDMR_INFO of a TDMR that fits, but for the changes."""
    start = machine.platform.pamt_region
    operands: dict[str, object] = {}
    for name, length in zip(("pamt_1g", "pamt_2m", "pamt_4k"), _SIZES, strict=True):
        operands[name] = (start, length)
        start += length
    return make_tdmr_info(base, size, **(operands | changes))  # type: ignore[arg-type]


def tdmr_lists(machine: BareMachine) -> Iterator[list[bytes]]:
    """Lists of TDMR_INFOs, the first one right, each other one wrong in its way."""
    pamt = machine.platform.pamt_region
    good = _info(machine)
    yield [good]
    yield [good, good]
    yield [_info(machine, base=BASE + PAGE_SIZE)]
    yield [_info(machine, size=0)]
    yield [_info(machine, base=0)]
    yield [_info(machine, reserved=[(0x800, PAGE_SIZE)])]
    yield [_info(machine, reserved=[(2 * PAGE_SIZE, PAGE_SIZE), (0, PAGE_SIZE)])]
    yield [_info(machine, pamt_4k=(pamt + 3 * PAGE_SIZE, PAGE_SIZE))]
    yield [_info(machine, pamt_2m=(pamt, 2 * PAGE_SIZE))]
    yield [_info(machine, pamt_1g=(0x2200_0000, PAGE_SIZE))]


class Upbringing(Sweeper):
    """Fuzzes a module from its first call to readiness."""

    def boot(self) -> list[HostCall]:
        """The calls that make the module ready but for its TDMR."""
        self.write_tdmrs(next(tdmr_lists(self.machine)))
        return [
            HostCall(0, abi.TDH_SYS_INIT, Registers()),
            *(HostCall(lp, abi.TDH_SYS_LP_INIT, Registers()) for lp in self.machine.cpu.lps),
            self.config(),
            HostCall(0, abi.TDH_SYS_KEY_CONFIG, Registers()),
            HostCall(2, abi.TDH_SYS_KEY_CONFIG, Registers()),
        ]

    def config(self, count: int = 1) -> HostCall:
        """TDH.SYS.CONFIG with the list that is in memory."""
        registers = Registers(rcx=POINTERS, rdx=count, r8=GLOBAL_KEYID)
        return HostCall(0, abi.TDH_SYS_CONFIG, registers)

    def write_tdmrs(self, infos: list[bytes]) -> None:
        """Lay a list of TDMR_INFOs out in memory."""
        for number, info in enumerate(infos):
            place = INFOS + number * PAGE_SIZE
            self.machine.store(POINTERS + 8 * number, place.to_bytes(8, "little"))
            self.machine.store(place, info)

    def grow_up(self) -> None:
        """All stages, with sweeps before each next step."""
        for made in self.boot():
            self.sweep_stage(made)
            self.call(made)
        self.sweep_stage(HostCall(0, abi.TDH_SYS_TDMR_INIT, Registers(rcx=BASE)))

    def sweep_stage(self, following: HostCall) -> None:
        """Every leaf, the next step in all its mutations, lists of TDMRs that are wrong."""
        for leaf in sorted(LEAVES):
            self.once(HostCall(1, leaf, Registers()))
        self.sweep_operands(following)
        self.sweep_circumstances(following)
        for made in self.boot():
            self.sweep_circumstances(made)
        for leaf in (abi.TDH_SYS_INFO, abi.TDH_SYS_RDALL, abi.TDH_SYS_RD):
            for made in self.samples(leaf):
                self.once(made)
        for infos in tdmr_lists(self.machine):
            mark = self.machine.mark()
            self.write_tdmrs(infos)
            self.once(self.config(len(infos)))
            self.machine.rewind(mark)
            self.machine.journal.release(mark)

    def mutated(self) -> None:
        """A step of the boot, with one mutation; the list of TDMRs with one bit flipped."""
        infos = next(tdmr_lists(self.machine))
        made = self.random.choice(self.boot())
        if made.rax == abi.TDH_SYS_CONFIG:
            damaged = bytearray(infos[0])
            damaged[self.random.randrange(TDMR_INFO_SIZE)] ^= 1 << self.random.randrange(8)
            self.write_tdmrs([bytes(damaged)])
        self.random.choice(self.mutations)(made)
