"""TDH.MNG.INIT: read the host's TD_PARAMS and make the TD."""

from __future__ import annotations

from tdxlab.abi.status import (
    OPERAND_ID_ATTRIBUTES,
    OPERAND_ID_CPUID_CONFIG,
    OPERAND_ID_EPTP_CONTROLS,
    OPERAND_ID_EXEC_CONTROLS,
    OPERAND_ID_IA32_ARCH_CAPABILITIES_CONFIG,
    OPERAND_ID_MAX_VCPUS,
    OPERAND_ID_NUM_L2_VMS,
    OPERAND_ID_RCX,
    OPERAND_ID_RDX,
    OPERAND_ID_TSC_FREQUENCY,
    OPERAND_ID_XFAM,
    TDX_OPERAND_INVALID,
    TDX_TDCS_NOT_ALLOCATED,
)
from tdxlab.abi.structs import TD_PARAMS_SIZE
from tdxlab.arch import HPA_MASK
from tdxlab.seam import measure
from tdxlab.seam.call import Call, Refused
from tdxlab.seam.checks import lock_tdr, open_tdcs
from tdxlab.seam.cpuid import check_config
from tdxlab.seam.epochs import FIRST_EPOCH
from tdxlab.seam.page_checks import require_shared_hpa
from tdxlab.seam.params import (
    ARCH_CAPABILITIES_CONFIGURABLE,
    DEFAULT_HP_LOCK_TIMEOUT,
    TdParams,
    are_attributes_legal,
    are_config_flags_legal,
    are_eptp_controls_legal,
    is_tsc_frequency_legal,
    is_xfam_legal,
)
from tdxlab.seam.rules import OP_INITIALIZED
from tdxlab.seam.td import (
    ATTRIBUTES_MIGRATABLE,
    ATTRIBUTES_SEPT_VE_DISABLE,
    MIN_TDCX,
    SEPT_ROOT_PAGE,
    TD_CTLS_PENDING_VE_DISABLE,
    Td,
    Tdcs,
    Tdr,
)
from tdxlab.steps import Operation

MAX_L2_VMS = 3


def tdh_mng_init(call: Call) -> Operation:
    """TDH.MNG.INIT: give the TD its parameters; from now on it can be built.

    RCX: HPA of the TDR. RDX: HPA of TD_PARAMS, 1024 bytes, host memory. Returns RCX = 0, or the
    CPUID leaf and sub-leaf whose configuration is refused. A refused call can be repeated.
    Refuses, in order: TDR, taken exclusively (RCX); op-state; RDX; then OPERAND_INVALID with
    ATTRIBUTES, XFAM, MAX_VCPUS, NUM_L2_VMS; TDCS_NOT_ALLOCATED; reserved bytes 20..23 (RDX);
    EXEC_CONTROLS, EPTP_CONTROLS, TSC_FREQUENCY; reserved bytes 42..79, 19, 232..255 (RDX);
    CPUID_CONFIG; reserved bytes 448..1023 (RDX); IA32_ARCH_CAPABILITIES_CONFIG; a migratable TD
    with nested VMs (RDX).
    Source: TDX module 1.5.01, tdh_mng_init.c.
    Differs: the MSRs that the module compares with their values at TDH.SYS.INIT never change here,
    so LIMIT_CPUID_MAXVAL_SET and INCONSISTENT_MSR cannot occur.
    """
    module, tdr, pa = call.module, call.registers.rcx, call.registers.rdx
    call.registers.rcx = 0
    td = lock_tdr(call, tdr, OPERAND_ID_RCX, exclusive=True)
    open_tdcs(call, td, lock=False)
    require_shared_hpa(call, pa, TD_PARAMS_SIZE, OPERAND_ID_RDX)
    hpa, keyid = module.memory.split(pa)
    params = TdParams.parse(module.memory.read(hpa, TD_PARAMS_SIZE, keyid))
    _check(call, td, params)
    yield ("TDH.MNG.INIT", tdr, pa)
    # -- effects: nothing below may fail
    _write_tdcs(call, td, params)
    measure.start(module.measurements, td.tdcs_hpa)


def _check(call: Call, td: Td, params: TdParams) -> None:
    """All tests on the content of TD_PARAMS, in the module's order."""
    pages = call.module.memory.words.view[td.page + Tdr.NUM_TDCX]
    _require(are_attributes_legal(params.attributes), OPERAND_ID_ATTRIBUTES)
    _require(is_xfam_legal(params.xfam, call.module.platform.native_xfam), OPERAND_ID_XFAM)
    _require(params.max_vcpus > 0, OPERAND_ID_MAX_VCPUS)
    _require(params.num_l2_vms <= MAX_L2_VMS, OPERAND_ID_NUM_L2_VMS)
    if pages < MIN_TDCX + params.num_l2_vms:
        raise Refused(TDX_TDCS_NOT_ALLOCATED)
    _require(not params.nonzero(20, 24), OPERAND_ID_RDX)
    _require(are_config_flags_legal(params.config_flags), OPERAND_ID_EXEC_CONTROLS)
    _require(
        are_eptp_controls_legal(
            params.eptp_controls, params.config_flags, call.module.platform.max_pa_bits
        ),
        OPERAND_ID_EPTP_CONTROLS,
    )
    _require(is_tsc_frequency_legal(params.tsc_frequency), OPERAND_ID_TSC_FREQUENCY)
    _require(not params.nonzero(42, 80), OPERAND_ID_RDX)
    _require(params.msr_config_ctls >> 1 == 0, OPERAND_ID_RDX)
    _require(not params.nonzero(232, 256), OPERAND_ID_RDX)
    illegal_cpuid = check_config(params.cpuid_config)
    if illegal_cpuid is not None:
        raise Refused(TDX_OPERAND_INVALID + OPERAND_ID_CPUID_CONFIG, rcx=illegal_cpuid)
    _require(not params.nonzero(448, TD_PARAMS_SIZE), OPERAND_ID_RDX)
    legal = ARCH_CAPABILITIES_CONFIGURABLE if params.msr_config_ctls & 1 else 0
    _require(not params.arch_capabilities & ~legal, OPERAND_ID_IA32_ARCH_CAPABILITIES_CONFIG)
    is_migratable = bool(params.attributes & ATTRIBUTES_MIGRATABLE)
    _require(not (is_migratable and params.num_l2_vms), OPERAND_ID_RDX)


def _require(is_legal: bool, operand: int) -> None:
    if not is_legal:
        raise Refused(TDX_OPERAND_INVALID + operand)


def _write_tdcs(call: Call, td: Td, params: TdParams) -> None:
    words = call.module.memory.words
    root = words.view[td.page + Tdr.TDCX_PA + SEPT_ROOT_PAGE] & call.module.memory.pa_mask
    ve_disable = bool(params.attributes & ATTRIBUTES_SEPT_VE_DISABLE)
    fields = {
        Tdcs.ATTRIBUTES: params.attributes,
        Tdcs.XFAM: params.xfam,
        Tdcs.MAX_VCPUS: params.max_vcpus,
        Tdcs.NUM_L2_VMS: params.num_l2_vms,
        Tdcs.CONFIG_FLAGS: params.config_flags,
        Tdcs.GPAW: params.config_flags & 1,
        Tdcs.EPTP: params.eptp_controls | root & HPA_MASK,
        Tdcs.TSC_FREQUENCY: params.tsc_frequency,
        Tdcs.MSR_CONFIG_CTLS: params.msr_config_ctls,
        Tdcs.ARCH_CAPABILITIES: params.arch_capabilities,
        Tdcs.TD_CTLS: TD_CTLS_PENDING_VE_DISABLE if ve_disable else 0,
        Tdcs.HP_LOCK_TIMEOUT: DEFAULT_HP_LOCK_TIMEOUT,
        Tdcs.NUM_VCPUS: 0,
        Tdcs.NUM_ASSOC_VCPUS: 0,
        Tdcs.REFCOUNT: 0,
        Tdcs.REFCOUNT + 1: 0,
        Tdcs.TD_EPOCH: FIRST_EPOCH,
        Tdcs.OP_STATE: OP_INITIALIZED,
    }
    for word, value in fields.items():
        words.put(td.tdcs + word, value)
    words.fill(td.tdcs + Tdcs.MRCONFIGID, params.bytes_at(80, 144))
    words.fill(td.tdcs + Tdcs.CPUID_CONFIG, params.bytes_at(256, 192))
