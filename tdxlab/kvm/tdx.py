"""struct kvm_tdx: KVM's half of one trust domain, the back end of its VM.

The TDP MMU sees this object as `vm.external` and `vm.vendor`; everything that needs the module goes
from here through the SEAMCALL wrappers.

    TD      UNINITIALIZED -> INITIALIZED (KVM_TDX_INIT_VM) -> RUNNABLE (KVM_TDX_FINALIZE_VM)
    KeyID   none -> assigned (KVM_TDX_INIT_VM) -> given back (the VM is destroyed)

Source: Linux 6.16, arch/x86/kvm/vmx/tdx.c and tdx.h.
"""

from __future__ import annotations

from functools import partial

from tdxlab.journal import Field, Fields, Journalled
from tdxlab.kvm import tdx_batching, tdx_hooks
from tdxlab.kvm.exits import KvmExit
from tdxlab.kvm.external import Hook
from tdxlab.kvm.host import Doing, KvmHost
from tdxlab.kvm.pages import NO_PAGE
from tdxlab.kvm.seamcall_args import MASK_64, SHARED_EPT_POINTER, TdxTd, TdxVp, failure
from tdxlab.kvm.seamcalls import tdh_vp_wr
from tdxlab.kvm.vm import Vcpu, Vm

# -- kvm_tdx.state. Source: vmx/tdx.h, enum kvm_tdx_state

TD_STATE_UNINITIALIZED = "UNINITIALIZED"
TD_STATE_INITIALIZED = "INITIALIZED"
TD_STATE_RUNNABLE = "RUNNABLE"

# -- vcpu_tdx.state. Source: vmx/tdx.h, enum vcpu_tdx_state

VCPU_TD_STATE_UNINITIALIZED = "UNINITIALIZED"
VCPU_TD_STATE_INITIALIZED = "INITIALIZED"


class Tdx(Journalled):
    """struct kvm_tdx of the VM `vm`. host: the machine's.

    state: TD_STATE_*. hkid: its KeyID; 0 before it has one, -1 afterwards. td: its control pages.
    nr_premapped: pages that the mirror maps and the module does not yet. wait_for_sept_zap: no vCPU
    may enter. attributes, xfam, tsc_offset, tsc_multiplier: of the TD. exits_on_map_gpa: user
    space takes KVM_HC_MAP_GPA_RANGE (KVM_CAP_EXIT_HYPERCALL).
    """

    state: Field[str] = Field(TD_STATE_UNINITIALIZED)
    hkid = Field(0)
    td: Field[TdxTd] = Field(TdxTd())
    nr_premapped = Field(0)
    wait_for_sept_zap = Field(False)
    attributes = Field(0)
    xfam = Field(0)
    tsc_offset = Field(0)
    tsc_multiplier = Field(0)
    exits_on_map_gpa = Field(False)

    def __init__(self, host: KvmHost, vm: Vm) -> None:
        self.host = host
        self.vm = vm
        self.fields = Fields(host.journal, self)

    def __repr__(self) -> str:
        return f"TD of {self.vm!r}"

    @property
    def is_hkid_assigned(self) -> bool:
        """Source: tdx.c, is_hkid_assigned."""
        return self.hkid > 0

    @property
    def is_runnable(self) -> bool:
        """KVM_TDX_FINALIZE_VM was done."""
        return self.state == TD_STATE_RUNNABLE

    @property
    def max_vcpus(self) -> int:
        """No more vCPUs than the host has LPs. Source: tdx.c, tdx_vm_init."""
        return self.host.hardware.cpu.count

    @property
    def vcpus(self) -> tuple[TdxVcpu, ...]:
        """The VM's vCPUs."""
        return tuple(vcpu for vcpu in self.vm.vcpus if isinstance(vcpu, TdxVcpu))

    def bug_on(self, name: str, status: int, *words: int) -> bool:
        """KVM_BUG_ON a SEAMCALL's status: True, and the VM is dead, if it is not 0."""
        if status:
            why = failure(name, status, *words)
            self.vm.emit("pr_err", why)
            self.vm.bug(why)
        return bool(status)

    def alloc_page(self, use: str) -> int:
        """A page for the module, or NO_PAGE."""
        return self.host.pages.alloc_page(f"{use} of {self.vm.name}")

    # -- ExternalOps: the hooks are methods of the TD

    link_external_spt = tdx_hooks.tdx_sept_link_private_spt
    set_external_spte = tdx_hooks.tdx_sept_set_private_spte
    remove_external_spte = tdx_hooks.tdx_sept_remove_private_spte
    free_external_spt = tdx_hooks.tdx_sept_free_private_spt

    # -- BatchedRemoval

    def block_external_spte(self, gfn: int, level: int, pfn: int) -> Hook:
        """As `tdx_batching.tdx_sept_block_private_spte`."""
        return tdx_batching.tdx_sept_block_private_spte(self, gfn, level, pfn)

    def flush_external_sptes(self) -> Doing:
        """As `tdx_hooks.tdx_track`."""
        return tdx_hooks.tdx_track(self)

    def remove_blocked_external_spte(self, gfn: int, level: int, pfn: int) -> Hook:
        """As `tdx_batching.tdx_sept_remove_blocked_spte`."""
        return tdx_batching.tdx_sept_remove_blocked_spte(self, gfn, level, pfn)

    # -- Unblocking

    def unblock_external_spte(self, gfn: int, level: int, pfn: int) -> Hook:
        """As `tdx_batching.tdx_sept_unblock_private_spte`."""
        return tdx_batching.tdx_sept_unblock_private_spte(self, gfn, level)

    # -- Vendor

    def load_mmu_pgd(self, vcpu: Vcpu, root_hpa: int, root_level: int) -> Doing:
        """Tell the module where the direct root of the vCPU is.

        Source: tdx.c, tdx_load_mmu_pgd.
        """
        assert isinstance(vcpu, TdxVcpu)
        status = yield from tdh_vp_wr(self.host, vcpu.vp, SHARED_EPT_POINTER, root_hpa, MASK_64)
        self.bug_on("TDH_VP_WR", status)

    def flush_tlb_current(self, vcpu: Vcpu) -> Doing:
        """INVEPT global: the module flushes private translations itself, and the tag of the shared
        ones is not known to KVM. Source: tdx.c, tdx_flush_tlb_current.
        """
        yield ("INVEPT global", self.host.current_lp)
        self.host.invept_global(self.host.current_lp)

    def kick_all(self, vm: Vm, request: str) -> Doing:
        """As `KvmHost.kick_all`."""
        return self.host.kick_all(vm, request)

    def private_max_mapping_level(self, vm: Vm, pfn: int) -> int:
        """4 KiB pages only. Source: tdx.c, tdx_gmem_private_max_mapping_level."""
        return 1


class TdxVcpu(Vcpu):
    """struct vcpu_tdx. tdx: its TD. vp: its control pages. tdx_state: VCPU_TD_STATE_*. pi_desc: HPA
    of the page with its posted-interrupt descriptor.

    vp_enter_ret: RAX of the last TDH.VP.ENTER. exit_reason: what VMX would call that exit. args:
    the registers that VP.ENTER returned and will take next, (name, value) pairs without zeros.
    map_gpa_next, map_gpa_end: where a MapGPA request stands, byte addresses. halted: it waits for
    an event. pending_events: "interrupt", "NMI". run: how KVM_RUN came back. completion: what the
    next KVM_RUN has to finish first. hypercall_ret, mmio_data: answers of user space.
    """

    vp: Field[TdxVp] = Field(TdxVp())
    tdx_state: Field[str] = Field(VCPU_TD_STATE_UNINITIALIZED)
    pi_desc = Field(NO_PAGE)
    vp_enter_ret = Field(0)
    exit_reason = Field(0)
    args: Field[tuple[tuple[str, int], ...]] = Field(())
    map_gpa_next = Field(0)
    map_gpa_end = Field(0)
    halted = Field(False)
    run: Field[KvmExit | None] = Field(None)
    completion = Field("")
    hypercall_ret = Field(0)
    mmio_data = Field(0)
    pending_events: Field[frozenset[str]] = Field(frozenset())

    def __init__(self, tdx: Tdx, vcpu_id: int) -> None:
        super().__init__(tdx.vm, vcpu_id)
        self.tdx = tdx

    def arg(self, name: str) -> int:
        """One register of the last exit."""
        return dict(self.args).get(name, 0)

    def answer(self, **registers: int) -> None:
        """Set registers that the guest gets when it is entered again."""
        values = {**dict(self.args), **registers}
        self.args = tuple((name, value) for name, value in values.items() if value)

    @property
    def is_initialised(self) -> bool:
        """KVM_TDX_INIT_VCPU was done."""
        return self.tdx_state == VCPU_TD_STATE_INITIALIZED


def tdx_vm_init(host: KvmHost, vm: Vm) -> Tdx:
    """Give a TDX VM its back end: hooks, vendor and kicks. Source: tdx.c, tdx_vm_init."""
    tdx = Tdx(host, vm)
    vm.external = tdx
    vm.vendor = tdx
    vm.kick_vcpus = partial(host.interrupt_all, vm)
    return tdx
