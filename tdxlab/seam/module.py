"""The TDX module of one machine: registers in, registers out.

`seamcall` and `vm_exit` are its only doors. The host knows nothing else of it: the Secure EPT, the
PAMT and all control structures can be looked at from the lab bench, never through this interface.

Source: TDX module 1.5.01, tdx_vmm_dispatcher.c and tdx_td_dispatcher.c.
"""

from __future__ import annotations

from collections.abc import Callable

from tdxlab.abi import leaves as abi
from tdxlab.abi.outcome import VMFAILINVALID, GuestOutcome
from tdxlab.abi.registers import MASK64, Registers
from tdxlab.abi.status import (
    OPERAND_ID_RAX,
    TDX_OPERAND_INVALID,
    TDX_SUCCESS,
    TDX_SYS_NOT_READY,
    TDX_SYS_SHUTDOWN,
)
from tdxlab.arch import HPA_MASK, PAGE_SIZE
from tdxlab.cpu import Cpu
from tdxlab.hardware import Platform
from tdxlab.journal import Journal, Table, Words
from tdxlab.memory import MachineCheck, Memory
from tdxlab.seam import guest
from tdxlab.seam.call import Call, ModuleFatal, Refused
from tdxlab.seam.exits import EXIT_TDCALL
from tdxlab.seam.keys import Keys
from tdxlab.seam.leaves import (
    enter,
    init,
    mem,
    mem_block,
    mem_data,
    mem_size,
    metadata,
    mng,
    mr,
    phymem,
    sys,
    vp,
)
from tdxlab.seam.pamt import Pamt
from tdxlab.seam.rules import CONTROL_PAGE_TYPES, PAGE_TYPE_NAMES, SYS_READY, SYS_SHUTDOWN
from tdxlab.seam.system import Sys
from tdxlab.seam.td import Td, Tdcs, Tdr
from tdxlab.steps import Operation
from tdxlab.trace import Event, Trace

Leaf = Callable[[Call], Operation]

#: Every host function that is modelled, by leaf number.
LEAVES: dict[int, Leaf] = {
    abi.TDH_VP_ENTER: enter.tdh_vp_enter,
    abi.TDH_MNG_ADDCX: mng.tdh_mng_addcx,
    abi.TDH_MEM_PAGE_ADD: mem.tdh_mem_page_add,
    abi.TDH_MEM_SEPT_ADD: mem.tdh_mem_sept_add,
    abi.TDH_VP_ADDCX: vp.tdh_vp_addcx,
    abi.TDH_MEM_PAGE_RELOCATE: mem_size.tdh_mem_page_relocate,
    abi.TDH_MEM_PAGE_AUG: mem.tdh_mem_page_aug,
    abi.TDH_MEM_RANGE_BLOCK: mem_block.tdh_mem_range_block,
    abi.TDH_MNG_KEY_CONFIG: mng.tdh_mng_key_config,
    abi.TDH_MNG_CREATE: mng.tdh_mng_create,
    abi.TDH_VP_CREATE: vp.tdh_vp_create,
    abi.TDH_MNG_RD: metadata.tdh_mng_rd,
    abi.TDH_MEM_RD: mem_data.tdh_mem_rd,
    abi.TDH_MNG_WR: metadata.tdh_mng_wr,
    abi.TDH_MEM_WR: mem_data.tdh_mem_wr,
    abi.TDH_MEM_PAGE_DEMOTE: mem_size.tdh_mem_page_demote,
    abi.TDH_MR_EXTEND: mr.tdh_mr_extend,
    abi.TDH_MR_FINALIZE: mr.tdh_mr_finalize,
    abi.TDH_VP_FLUSH: vp.tdh_vp_flush,
    abi.TDH_MNG_VPFLUSHDONE: mng.tdh_mng_vpflushdone,
    abi.TDH_MNG_KEY_FREEID: mng.tdh_mng_key_freeid,
    abi.TDH_MNG_INIT: init.tdh_mng_init,
    abi.TDH_VP_INIT: vp.tdh_vp_init,
    abi.TDH_MEM_PAGE_PROMOTE: mem_size.tdh_mem_page_promote,
    abi.TDH_PHYMEM_PAGE_RDMD: phymem.tdh_phymem_page_rdmd,
    abi.TDH_MEM_SEPT_RD: mem.tdh_mem_sept_rd,
    abi.TDH_VP_RD: metadata.tdh_vp_rd,
    abi.TDH_MNG_KEY_RECLAIMID: mng.tdh_mng_key_reclaimid,
    abi.TDH_PHYMEM_PAGE_RECLAIM: phymem.tdh_phymem_page_reclaim,
    abi.TDH_MEM_PAGE_REMOVE: mem.tdh_mem_page_remove,
    abi.TDH_MEM_SEPT_REMOVE: mem.tdh_mem_sept_remove,
    abi.TDH_SYS_KEY_CONFIG: sys.tdh_sys_key_config,
    abi.TDH_SYS_INFO: metadata.tdh_sys_info,
    abi.TDH_SYS_INIT: sys.tdh_sys_init,
    abi.TDH_SYS_RD: metadata.tdh_sys_rd,
    abi.TDH_SYS_LP_INIT: sys.tdh_sys_lp_init,
    abi.TDH_SYS_TDMR_INIT: sys.tdh_sys_tdmr_init,
    abi.TDH_SYS_RDALL: metadata.tdh_sys_rdall,
    abi.TDH_MEM_TRACK: mem_block.tdh_mem_track,
    abi.TDH_MEM_RANGE_UNBLOCK: mem_block.tdh_mem_range_unblock,
    abi.TDH_PHYMEM_CACHE_WB: phymem.tdh_phymem_cache_wb,
    abi.TDH_PHYMEM_PAGE_WBINVD: phymem.tdh_phymem_page_wbinvd,
    abi.TDH_VP_WR: metadata.tdh_vp_wr,
    abi.TDH_SYS_LP_SHUTDOWN: sys.tdh_sys_lp_shutdown,
    abi.TDH_SYS_CONFIG: sys.tdh_sys_config,
    abi.TDH_SYS_SHUTDOWN: sys.tdh_sys_shutdown,
    abi.TDH_SYS_UPDATE: sys.tdh_sys_update,
}

#: Leaves that have versions above 0; which of those exist, the leaf says itself.
_VERSIONED = frozenset(
    (
        abi.TDH_MEM_PAGE_PROMOTE,
        abi.TDH_MEM_SEPT_ADD,
        abi.TDH_MEM_SEPT_REMOVE,
        abi.TDH_MNG_RD,
        abi.TDH_VP_RD,
    )
)

#: Leaves that work before the module is ready.
_EARLY = frozenset(
    (
        abi.TDH_SYS_INFO,
        abi.TDH_SYS_RD,
        abi.TDH_SYS_RDALL,
        abi.TDH_SYS_INIT,
        abi.TDH_SYS_LP_INIT,
        abi.TDH_SYS_CONFIG,
        abi.TDH_SYS_KEY_CONFIG,
        abi.TDH_SYS_LP_SHUTDOWN,
        abi.TDH_SYS_UPDATE,
    )
)

#: How a leaf can end before its time: refused, or with the module halted.
_REFUSALS = (Refused, ModuleFatal, MachineCheck)

_CHLDCNT = Tdr.CHLDCNT
#: The word that says whether the module is ready.
_STATE = Sys.STATE

_INVALID_RAX = TDX_OPERAND_INVALID + OPERAND_ID_RAX


class Module:
    """The TDX module and the state that only it may write.

    memory, cpu, trace, platform: the machine it runs on. pamt, keys, system, tdmrs: its own tables.
    measurements: HPA of a TD's first TDCS page -> the running hash of its MRTD.
    """

    def __init__(
        self, journal: Journal, platform: Platform, memory: Memory, cpu: Cpu, trace: Trace
    ) -> None:
        self.platform = platform
        self.memory = memory
        self.cpu = cpu
        self.trace = trace
        self.conditions = cpu.conditions
        lowest = min(region.base for region in platform.cmrs)
        self.pamt = Pamt(journal, lowest, max(region.end for region in platform.cmrs))
        self.keys = Keys(journal, platform.packages)
        self.system = Words(journal, Sys.lp_word(len(cpu.lps), 0))
        self.tdmrs = Table(journal)
        self.measurements = Table(journal)
        self.all_packages = (1 << platform.packages) - 1
        #: Any of these bits set: not the address of a 4 KiB page of memory, KeyID bits included.
        self.not_an_hpa = MASK64 & ~(memory.pa_mask & HPA_MASK)
        self._end = Table(journal)
        #: SEAMCALLs of other LPs that a step driver holds in their middle.
        self.calls_suspended = 0

    # -- the host's door

    def seamcall(self, lp: int, rax: int, registers: Registers) -> int:
        """Execute SEAMCALL on `lp` at once; arguments, result and refusals as `seamcall_steps`."""
        if not 0 <= lp < self.cpu.count or self.cpu.inside.view[lp]:
            self.require_host(lp)
        trace = self.trace
        inputs = registers.as_dict() if trace.logging else None
        leaf, status = LEAVES.get(rax), TDX_SUCCESS
        if leaf is None or self._end or self.system.view[_STATE] != SYS_READY:
            leaf, status = self._early(rax)
        if leaf is not None:
            call = Call(self, lp, rax & 0xFFFF, rax >> 16, registers)
            try:
                for _ in leaf(call):
                    pass
            except _REFUSALS as end:
                self._refuse(call, end)
            call.release_all()
            status = call.status
        trace.count_seamcall(rax & 0xFFFF, status)
        if inputs is not None:
            self._log(lp, rax, inputs, status, registers)
        return status

    def seamcall_steps(self, lp: int, rax: int, registers: Registers) -> Operation:
        """Execute SEAMCALL on `lp`: a step generator that yields once, with all checks passed and
        all locks held.

        rax: leaf number in bits 15:0, version in 23:16. registers: in and out.
        Returns RAX: the status, IN_GUEST after a successful TDH.VP.ENTER, VMFAILINVALID if the
        module has halted. A call that is closed at its yield lets go of its locks.
        Refuses an LP that does not exist or that is inside a guest: ValueError.
        """
        if not 0 <= lp < self.cpu.count or self.cpu.inside.view[lp]:
            self.require_host(lp)
        trace = self.trace
        inputs = registers.as_dict() if trace.logging else None
        leaf, status = LEAVES.get(rax), TDX_SUCCESS
        if leaf is None or self._end or self.system.view[_STATE] != SYS_READY:
            leaf, status = self._early(rax)
        if leaf is not None:
            call = Call(self, lp, rax & 0xFFFF, rax >> 16, registers)
            try:
                for step in leaf(call):
                    self.calls_suspended += 1
                    try:
                        yield step
                    finally:
                        self.calls_suspended -= 1
            except _REFUSALS as end:
                self._refuse(call, end)
            finally:
                call.release_all()
            status = call.status
        trace.count_seamcall(rax & 0xFFFF, status)
        if inputs is not None:
            self._log(lp, rax, inputs, status, registers)
        return status

    def _log(
        self, lp: int, rax: int, inputs: dict[str, int], status: int, registers: Registers
    ) -> None:
        outputs = registers.as_dict()
        self.trace.record(Event("SEAMCALL", lp, rax & 0xFFFF, inputs, status, outputs))

    def _early(self, rax: int) -> tuple[Leaf | None, int]:
        """The leaf to go on with, None if the dispatcher refuses, and its status."""
        status = self._refuse_early(rax)
        return (None if status else LEAVES[rax & 0xFFFF]), status

    def _refuse_early(self, rax: int) -> int:
        """The dispatcher's own checks; they touch no register. Returns TDX_SUCCESS to go on.

        Source: TDX module 1.5.01, tdx_vmm_dispatcher.c, tdx_vmm_dispatcher.
        """
        leaf = rax & 0xFFFF
        if self.halted:
            return VMFAILINVALID
        if rax >> 24 or (rax >> 16 and leaf not in _VERSIONED):
            return _INVALID_RAX
        state = self.system.view[Sys.STATE]
        if state != SYS_READY:
            if state == SYS_SHUTDOWN and leaf != abi.TDH_SYS_LP_SHUTDOWN:
                return TDX_SYS_SHUTDOWN
            if leaf not in _EARLY:
                return TDX_SYS_NOT_READY
        return TDX_SUCCESS if leaf in LEAVES else _INVALID_RAX

    def _refuse(self, call: Call, end: Exception) -> None:
        """A leaf ended before its time: its status and extended information."""
        if isinstance(end, Refused):
            call.refuse(end)
        else:
            self.halted = str(end)
            call.status = VMFAILINVALID

    @property
    def halted(self) -> str | None:
        """Why the module stopped, None while it lives; a rewind takes it back."""
        return self._end.get("reason")

    @halted.setter
    def halted(self, reason: str | None) -> None:
        if reason is not None:
            self._end.put("reason", reason)
        elif self._end:
            self._end.drop("reason")

    def notice_store(self, hpa: int, size: int) -> None:
        """Somebody stored `size` bytes at `hpa` under a shared KeyID. If they hit a page in which
        the module keeps control structures, the module halts.

        Differs: the real module halts when it next reads what was overwritten, a machine check. A
        machine without encryption does not notice, and its structures are garbage.
        """
        for page in range(hpa & -PAGE_SIZE, hpa + size, PAGE_SIZE):
            self.notice_page(page)

    def notice_page(self, hpa: int) -> None:
        """As `notice_store`, of the page at `hpa`."""
        page_type = self.pamt.type_of(hpa)
        if page_type in CONTROL_PAGE_TYPES and self.memory.encrypted:
            name = PAGE_TYPE_NAMES[page_type]
            self.halted = f"the host overwrote the module's page {hpa:#x} ({name})"

    # -- the guest's door

    def vm_exit(
        self,
        lp: int,
        reason: int,
        registers: Registers,
        *,
        rax: int = 0,
        qualification: int = 0,
        gpa: int = 0,
        rip: int | None = None,
        interruption: int = guest.DEFAULT_INTERRUPTION,
    ) -> GuestOutcome:
        """Something happened to the guest that runs on `lp`.

        reason: VM exit reason, 77 for a TDCALL. rax, registers: the guest's. qualification, gpa: as
        the CPU reports them.
        rip: address of the instruction, None if it did not move since the last exit. interruption:
        of an interrupt or exception, its vector (7:0), type (10:8) and valid bit (31).
        Refuses an LP that does not exist or that runs the host: ValueError.
        """
        self.require_guest(lp)
        inputs = registers.as_dict() if self.trace.logging else {}
        try:
            if self.halted:
                raise ModuleFatal(self.halted)
            outcome = guest.handle(
                self, lp, reason, rax, registers, qualification, gpa, rip, interruption
            )
        except (ModuleFatal, MachineCheck) as stop:
            self.halted = self.halted or str(stop)
            self.cpu.leave(lp)
            outcome = GuestOutcome(True, VMFAILINVALID, Registers())
        if self.trace.logging:
            is_tdcall = reason == EXIT_TDCALL
            kind, number = ("TDCALL", rax & 0xFFFF) if is_tdcall else ("VM exit", reason)
            outputs = outcome.registers.as_dict()
            self.trace.record(Event(kind, lp, number, inputs, outcome.status, outputs))
        return outcome

    def require_host(self, lp: int) -> None:
        """Refuse, with a ValueError, an LP that does not exist or runs a guest."""
        cpu = self.cpu
        if 0 <= lp < cpu.count and not cpu.vcpu_inside(lp):
            return
        cpu.require_lp(lp)
        raise ValueError(
            f"LP {lp} runs a guest, so the host cannot call from it; "
            "let the guest exit first, or call from another LP"
        )

    def require_guest(self, lp: int) -> None:
        """Refuse, with a ValueError, an LP that runs the host."""
        self.cpu.require_lp(lp)
        if not self.cpu.vcpu_inside(lp):
            raise ValueError(
                f"LP {lp} runs the host; a guest event needs a vCPU inside: "
                "TDH.VP.ENTER comes first"
            )

    # -- what leaves share

    def add_children(self, td: Td, pages: int) -> None:
        """Change the number of 4 KiB pages that the TD owns."""
        words, index = self.memory.words, td.page + _CHLDCNT
        words.cells[index] = words.view[index] + pages

    @property
    def is_ready(self) -> bool:
        """True once every package has the module's key, until it is shut down."""
        return self.system.view[Sys.STATE] == SYS_READY

    def is_lp_initialised(self, lp: int) -> bool:
        """True once TDH.SYS.LP.INIT ran on `lp`."""
        return bool(self.system.view[Sys.lp_word(lp, Sys.LP_INITIALISED)])

    def flush_tlb(self, lp: int, td: Td) -> None:
        """INVEPT on `lp` for the TD's Secure EPT."""
        self.cpu.invept(lp, self.memory.words.view[td.tdcs + Tdcs.EPTP] & HPA_MASK)

    def is_last_vcpu(self, lp: int, tdvpr: int) -> bool:
        """True if the vCPU was the last one to run on `lp`."""
        return self.system.view[Sys.lp_word(lp, Sys.LP_LAST_VCPU)] == tdvpr

    def set_last_vcpu(self, lp: int, tdvpr: int) -> None:
        """Remember the vCPU that ran last on `lp`."""
        self.system.put(Sys.lp_word(lp, Sys.LP_LAST_VCPU), tdvpr)

    def forget_last_vcpu(self, lp: int) -> None:
        """Nothing of any vCPU is cached on `lp`."""
        self.set_last_vcpu(lp, 0)
