"""The smallest host that can use the module: it boots it, builds TDs, runs them and takes them
apart.

What a real host does around this (a mirror of the S-EPT, faults, memslots) is the kernel's part and
not here. Every call goes through `Host.call`; a call that has to succeed through `Host.must`.

Source: Linux 6.16, arch/x86/virt/vmx/tdx/tdx.c and arch/x86/kvm/vmx/tdx.c, for the order of the
calls.
"""

from __future__ import annotations

from tdxlab.abi import leaves as abi
from tdxlab.abi.registers import Registers
from tdxlab.abi.status import describe, is_error
from tdxlab.abi.structs import make_tdmr_info
from tdxlab.arch import PAGE_SIZE
from tdxlab.bare import BareMachine
from tdxlab.hardware import TdmrPlan
from tdxlab.tape import Tape

#: Where the host keeps its buffers in low memory.
TDMR_INFO_BUFFER = 0x1000_0000
TD_PARAMS_BUFFER = 0x1001_0000
SOURCE_PAGE_BUFFER = 0x1002_0000

_PAMT_ENTRY = 16


class SeamcallFailed(RuntimeError):
    """A SEAMCALL that had to succeed did not. `leaf`, `status`: what was called and what came
    back.
    """

    def __init__(self, leaf: int, status: int) -> None:
        super().__init__(f"{abi.HOST_LEAVES[leaf].name}: {describe(status)} ({status:#018x})")
        self.leaf = leaf
        self.status = status


class Host:
    """The host of one machine: its calls, its free pages and its free KeyIDs.

    machine: a machine nobody else hosts. tape: if given, every call is recorded there.
    """

    def __init__(self, machine: BareMachine, tape: Tape | None = None) -> None:
        self.machine = machine
        self.tape = tape
        self.door: BareMachine | Tape = machine if tape is None else tape
        self._free = [(tdmr.base, tdmr.base + tdmr.size) for tdmr in machine.platform.tdmrs]
        self._returned: list[int] = []
        lowest, highest = machine.platform.private_keyids
        reserved = machine.platform.global_keyid
        self._keyids = [keyid for keyid in range(highest, lowest - 1, -1) if keyid != reserved]

    def call(self, lp: int, leaf: int, **registers: int) -> tuple[int, Registers]:
        """SEAMCALL `leaf` (version 0) on `lp`; returns (RAX, registers afterwards)."""
        values = Registers(**registers)
        return self.door.seamcall(lp, leaf, values), values

    def must(self, lp: int, leaf: int, **registers: int) -> Registers:
        """As `call`, for a SEAMCALL that has to succeed. Raises SeamcallFailed."""
        status, values = self.call(lp, leaf, **registers)
        if is_error(status):
            raise SeamcallFailed(leaf, status)
        return values

    def phase(self, name: str) -> None:
        """Label what comes next on the tape."""
        if self.tape is not None:
            self.tape.phase = name

    # -- bringing the module up

    def boot(self, *, tdmr_init: bool = True) -> None:
        """SYS.INIT, LP.INIT everywhere, SYS.CONFIG, the module's key on each package, and the
        TDMRs.
        """
        cpu, platform = self.machine.cpu, self.machine.platform
        self.phase("boot")
        self.must(0, abi.TDH_SYS_INIT)
        for lp in cpu.lps:
            self.must(lp, abi.TDH_SYS_LP_INIT)
        self._write_tdmr_infos()
        self.must(
            0,
            abi.TDH_SYS_CONFIG,
            rcx=TDMR_INFO_BUFFER,
            rdx=len(platform.tdmrs),
            r8=platform.global_keyid,
        )
        for package in cpu.packages:
            self.must(self.lp_of(package), abi.TDH_SYS_KEY_CONFIG)
        if tdmr_init:
            for tdmr in platform.tdmrs:
                self._init_tdmr(tdmr)

    def lp_of(self, package: int) -> int:
        """The first LP of a package that runs no guest; of all of them the first."""
        cpu = self.machine.cpu
        lps = [lp for lp in cpu.lps if cpu.package_of[lp] == package]
        idle = [lp for lp in lps if not cpu.vcpu_inside(lp)]
        return (idle or lps)[0]

    def _init_tdmr(self, tdmr: TdmrPlan) -> None:
        while self.must(0, abi.TDH_SYS_TDMR_INIT, rcx=tdmr.base).rdx < tdmr.base + tdmr.size:
            pass

    def _write_tdmr_infos(self) -> None:
        """Lay out a TDMR_INFO for each TDMR, and the array of pointers to them."""
        pamt = self.machine.platform.pamt_region
        for number, plan in enumerate(self.machine.platform.tdmrs):
            info = TDMR_INFO_BUFFER + PAGE_SIZE * (number + 1)
            self.door.store(TDMR_INFO_BUFFER + 8 * number, info.to_bytes(8, "little"))
            self.door.store(info, _tdmr_info(plan, pamt))
            pamt += sum(_pamt_sizes(plan))

    # -- pages and KeyIDs

    def take_page(self, size: int = PAGE_SIZE) -> int:
        """HPA of a free page of `size` bytes (4 KiB or 2 MiB) in a TDMR; the lowest that fits.

        Refuses when memory is used up: ValueError.
        """
        if size == PAGE_SIZE and self._returned:
            return self._returned.pop()
        for number, (start, end) in enumerate(self._free):
            aligned = (start + size - 1) & -size
            if aligned + size <= end:
                self._returned += range(aligned - PAGE_SIZE, start - PAGE_SIZE, -PAGE_SIZE)
                self._free[number] = (aligned + size, end)
                return aligned
        raise ValueError(
            f"no free page of {size} bytes is left in the TDMRs; tear a TD down, or build a "
            "machine with default_platform(tdmr_gib=...)"
        )

    def give_back(self, hpa: int) -> None:
        """A 4 KiB page is free again."""
        self._returned.append(hpa)

    def take_keyid(self) -> int:
        """A private KeyID that no TD of this host has. Refuses when all are taken: ValueError."""
        if not self._keyids:
            raise ValueError("every private KeyID belongs to a TD; tear one down first")
        return self._keyids.pop()

    def give_keyid_back(self, keyid: int) -> None:
        """A KeyID is free again."""
        self._keyids.append(keyid)


def _pamt_sizes(plan: TdmrPlan) -> tuple[int, int, int]:
    """Bytes of the PAMT_1G, PAMT_2M and PAMT_4K of a TDMR, whole pages each."""
    entries = (plan.size >> 30, plan.size >> 21, plan.size >> 12)
    one_gib, two_mib, four_kib = (
        -(-count * _PAMT_ENTRY // PAGE_SIZE) * PAGE_SIZE for count in entries
    )
    return one_gib, two_mib, four_kib


def _tdmr_info(plan: TdmrPlan, pamt: int) -> bytes:
    """TDMR_INFO with the three PAMTs one behind the other from HPA `pamt` on."""
    size_1g, size_2m, size_4k = _pamt_sizes(plan)
    return make_tdmr_info(
        plan.base,
        plan.size,
        pamt_1g=(pamt, size_1g),
        pamt_2m=(pamt + size_1g, size_2m),
        pamt_4k=(pamt + size_1g + size_2m, size_4k),
        reserved=plan.reserved,
    )
