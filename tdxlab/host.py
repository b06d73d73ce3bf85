"""The smallest host that can use the module: it boots it, and lays things out in low memory.

What a real host does around this (allocating pages, keeping a mirror of the S-EPT, answering
faults) is the kernel's part and not here. Every SEAMCALL goes through `Host.call`, which counts
nothing and decides nothing.

Source: Linux 6.16, arch/x86/virt/vmx/tdx/tdx.c for the order of the boot calls.
"""

from __future__ import annotations

from tdxlab.abi import leaves as abi
from tdxlab.abi.registers import Registers
from tdxlab.abi.status import describe, is_error
from tdxlab.abi.structs import make_tdmr_info
from tdxlab.hardware import TdmrPlan
from tdxlab.machine import Machine

#: Where the host keeps its buffers in low memory.
TDMR_INFO_BUFFER = 0x1000_0000
TD_PARAMS_BUFFER = 0x1001_0000
SOURCE_PAGE_BUFFER = 0x1002_0000

_PAMT_ENTRY = 16
_PAGE = 4096


class SeamcallFailed(RuntimeError):
    """A SEAMCALL that had to succeed did not. `leaf`, `status`: what was called and what came
    back.
    """

    def __init__(self, leaf: int, status: int) -> None:
        super().__init__(f"{abi.HOST_LEAVES[leaf].name}: {describe(status)} ({status:#018x})")
        self.leaf = leaf
        self.status = status


class Host:
    """The host of one machine."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def call(self, lp: int, leaf: int, **registers: int) -> tuple[int, Registers]:
        """SEAMCALL `leaf` (version 0) on `lp`; returns (RAX, registers afterwards)."""
        values = Registers(**registers)
        return self.machine.seamcall(lp, leaf, values), values

    def must(self, lp: int, leaf: int, **registers: int) -> Registers:
        """As `call`, for a SEAMCALL that has to succeed. Raises SeamcallFailed."""
        status, values = self.call(lp, leaf, **registers)
        if is_error(status):
            raise SeamcallFailed(leaf, status)
        return values

    def write(self, hpa: int, data: bytes) -> None:
        """Store `data` in host memory. Refuses addresses without RAM: ValueError."""
        self.machine.memory.require_ram(hpa, len(data))
        self.machine.memory.write(hpa, data)

    def boot(self, *, tdmr_init: bool = True) -> None:
        """Bring the module up: SYS.INIT, LP.INIT everywhere, SYS.CONFIG, a key for each package,
        and the TDMRs.
        """
        cpu, platform = self.machine.cpu, self.machine.platform
        self.must(0, abi.TDH_SYS_INIT)
        for lp in cpu.lps:
            self.must(lp, abi.TDH_SYS_LP_INIT)
        self.write_tdmr_infos(TDMR_INFO_BUFFER, platform.tdmrs)
        self.must(
            0,
            abi.TDH_SYS_CONFIG,
            rcx=TDMR_INFO_BUFFER,
            rdx=len(platform.tdmrs),
            r8=platform.global_keyid,
        )
        for package in cpu.packages:
            self.must(cpu.package_of.index(package), abi.TDH_SYS_KEY_CONFIG)
        if tdmr_init:
            for tdmr in platform.tdmrs:
                self.init_tdmr(tdmr)

    def init_tdmr(self, tdmr: TdmrPlan) -> None:
        """Initialise the PAMT of a whole TDMR."""
        while self.must(0, abi.TDH_SYS_TDMR_INIT, rcx=tdmr.base).rdx < tdmr.base + tdmr.size:
            pass

    def write_tdmr_infos(self, hpa: int, tdmrs: tuple[TdmrPlan, ...]) -> None:
        """Lay out TDMR_INFOs and, at `hpa`, the array of pointers to them."""
        pamt = self.machine.platform.pamt_region
        for number, plan in enumerate(tdmrs):
            info = hpa + _PAGE * (number + 1)
            self.write(hpa + 8 * number, info.to_bytes(8, "little"))
            self.write(info, _tdmr_info(plan, pamt))
            pamt += sum(_pamt_sizes(plan))


def _pamt_sizes(plan: TdmrPlan) -> tuple[int, int, int]:
    """Bytes of the PAMT_1G, PAMT_2M and PAMT_4K of a TDMR, whole pages each."""
    entries = (plan.size >> 30, plan.size >> 21, plan.size >> 12)
    one_gib, two_mib, four_kib = (-(-count * _PAMT_ENTRY // _PAGE) * _PAGE for count in entries)
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
