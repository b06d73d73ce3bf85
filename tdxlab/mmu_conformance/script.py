"""KVM's TDX back end over a module that says yes to everything, unless told what to say.

The recorder ran the real hooks without a module: each SEAMCALL was noted and succeeded with zero
outputs, and `scfail` made chosen ones fail.
"""

from __future__ import annotations

from collections.abc import Callable

from tdxlab.abi import leaves as abi
from tdxlab.abi.outcome import GuestOutcome
from tdxlab.abi.registers import REGISTER_NAMES, Registers
from tdxlab.arch import PAGE_SHIFT
from tdxlab.cpu import Cpu
from tdxlab.hardware import default_platform
from tdxlab.kvm.host import NO_HKID, KvmHost
from tdxlab.kvm.pages import HostPages
from tdxlab.kvm.seamcall_args import GpaLevel, TdxTd
from tdxlab.kvm.tdx import TD_STATE_INITIALIZED, TD_STATE_RUNNABLE, Tdx
from tdxlab.memory import Memory
from tdxlab.mmu_conformance.decode import Args
from tdxlab.mmu_conformance.ops import Op, Out
from tdxlab.mmu_conformance.record import Row
from tdxlab.mmu_conformance.rig import TABLES, Countdown, Rig
from tdxlab.steps import Operation
from tdxlab.trace import Trace

#: The KeyID that the recorder's TD had.
_HKID = 5
_TDR = 0x1000


def _gpa_level(memory: Memory, given: Registers) -> Row:
    word = GpaLevel(given.rcx)
    return word.gpa, word.sept_level


def _gpa_level_pfn(memory: Memory, given: Registers) -> Row:
    return *_gpa_level(memory, given), given.r8 >> PAGE_SHIFT


def _keyid_pfn(memory: Memory, given: Registers) -> Row:
    hpa, keyid = memory.split(given.rcx)
    return keyid, hpa >> PAGE_SHIFT


def _nothing(memory: Memory, given: Registers) -> Row:
    return ()


#: Leaf number -> name in the traces, and what of its operands they show.
_SHOWN: dict[int, tuple[str, Callable[[Memory, Registers], Row]]] = {
    abi.TDH_MEM_SEPT_ADD: ("tdh_mem_sept_add", _gpa_level),
    abi.TDH_MEM_PAGE_AUG: ("tdh_mem_page_aug", _gpa_level_pfn),
    abi.TDH_MEM_RANGE_BLOCK: ("tdh_mem_range_block", _gpa_level),
    abi.TDH_MEM_TRACK: ("tdh_mem_track", _nothing),
    abi.TDH_MEM_PAGE_REMOVE: ("tdh_mem_page_remove", _gpa_level),
    abi.TDH_PHYMEM_PAGE_WBINVD: ("tdh_phymem_page_wbinvd_hkid", _keyid_pfn),
    abi.TDH_PHYMEM_PAGE_RECLAIM: ("tdh_phymem_page_reclaim", _nothing),
}


class ScriptedHardware:
    """The machine under the back end: a module by script, and nobody inside any guest.

    failing_name, failing: the SEAMCALL that is to fail, when, and with which status.
    """

    def __init__(self, rig: Rig) -> None:
        self.journal = rig.vm.journal
        self.memory = rig.vm.memory
        self.platform = default_platform()
        trace = Trace(self.journal)
        self.cpu = Cpu(self.journal, trace, self.memory, self.platform.package_of)
        self.failing_name = ""
        self.failing = Countdown(0, 0, 0)
        self._rig = rig

    def seamcall_steps(self, lp: int, rax: int, registers: Registers) -> Operation:
        """Note the call; success with zero outputs, or the status that was asked for."""
        yield from ()
        name, operands = _SHOWN[rax]
        record = self._rig.recorder
        record.add((name, *operands(self.memory, registers)))
        for register in REGISTER_NAMES:
            setattr(registers, register, 0)
        if name != self.failing_name:
            return 0
        self.failing.count()
        if not self.failing.is_due:
            return 0
        record.add(("seamcall_err", self.failing.what))
        return int(self.failing.what)

    def store(self, hpa: int, data: bytes) -> None:
        """Contents do not matter."""

    def clear(self, hpa: int) -> None:
        """Contents do not matter."""

    def kick(self, lp: int) -> GuestOutcome:
        """Nobody is in the guest: refused with a ValueError."""
        raise ValueError(f"no vCPU is inside LP {lp}")


class ScriptedTdx:
    """The real hooks of one rig. tdx: the back end. hardware: what it calls."""

    def __init__(self, rig: Rig, *, runnable: bool) -> None:
        self.hardware = ScriptedHardware(rig)
        pages = HostPages(rig.vm.journal, (TABLES,))
        host = KvmHost(self.hardware, params=rig.vm.params, pages=pages)
        self.tdx = Tdx(host, rig.vm)
        self.tdx.hkid = _HKID
        self.tdx.td = TdxTd(tdr=_TDR)
        self.set_runnable(runnable)
        rig.real = self.tdx

    def set_runnable(self, runnable: bool) -> None:
        """The TD is finalised, or not yet."""
        self.tdx.state = TD_STATE_RUNNABLE if runnable else TD_STATE_INITIALIZED
        self.tdx.vm.pre_fault_allowed = runnable


def operations(td: ScriptedTdx | None) -> dict[str, Op]:
    """The operations of a trace on the TD of the real hooks. Without them only `tdx_state` does
    something: it decides whether user space may map pages ahead.
    """

    def do_scfail(rig: Rig, args: Args, out: Out) -> None:
        """Let SEAMCALLs fail."""
        if td:
            n, count = args.number("n", 1), args.number("count", 1)
            td.hardware.failing_name = args.text("name")
            td.hardware.failing = Countdown(n, count, args.number("err"))

    def do_hkid_release(rig: Rig, args: Args, out: Out) -> None:
        """The TD gives up its KeyID."""
        if td:
            td.tdx.hkid = NO_HKID

    def do_tdx_state(rig: Rig, args: Args, out: Out) -> None:
        """The TD is finalised, or not yet."""
        if td:
            td.set_runnable(args.flag("runnable"))
        else:
            rig.vm.pre_fault_allowed = args.flag("runnable")

    def do_premapped(rig: Rig, args: Args, out: Out) -> int:
        """Pages that the mirror has and the module not yet."""
        return td.tdx.nr_premapped if td else 0

    return {
        "scfail": do_scfail,
        "hkid_release": do_hkid_release,
        "tdx_state": do_tdx_state,
        "premapped": do_premapped,
    }
