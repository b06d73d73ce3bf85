"""Metadata of a vCPU: what TDH.VP.RD and WR, and TDG.VP.RD and WR, see of VMCS and TDVPS.

The rows of the VMCS come first; the code of one is its VMCS encoding, and codes go up by two. Rows
are in the module's order: class, then code.

Source: TDX module 1.5.01, td_vmcs_fields_lookup.c, tdvps_fields_lookup.c, metadata_vp.c.
Differs:
- Only these fields are there; guest state and exit information of the VMCS, the virtual APIC, the
  #VE information, debug registers, guest MSRs and nested VMs' structures answer
  METADATA_FIELD_ID_INCORRECT.
- A debug host may write fewer fields: not the VMCS's TSC offset and multiplier, not XFAM, and of
  the secondary controls bits 31:30 alone. Other bits of the two control words read 0.
- Addresses of the MSR bitmap, the PML buffer and the EPTP list, VM functions, the PAUSE-loop
  fields, the time of the last exit and VMXIP read 0: nothing of that is modelled.
"""

from __future__ import annotations

from tdxlab.abi.status import (
    TDX_METADATA_FIELD_VALUE_NOT_VALID,
    TDX_SUCCESS,
    TDX_TD_VMCS_FIELD_NOT_INITIALIZED,
)
from tdxlab.arch import HPA_MASK, LINE_SHIFT, PAGE_SIZE
from tdxlab.bits import MASK64, Bits, Word
from tdxlab.seam.fields import (
    HOST_AND_GUEST,
    ONLY_DEBUG_HOST,
    ONLY_GUEST,
    ONLY_HOST,
    Change,
    Field,
    Get,
    Masks,
    Source,
    Target,
    constant,
    in_tdcs,
    in_tdvps,
)
from tdxlab.seam.fields_td import TD_FIELDS
from tdxlab.seam.page_checks import is_shared_hpa
from tdxlab.seam.td import GPR_NAMES, MAX_TDVPS_PAGES, NO_POSTED_VECTOR, Tdcs, Tdr, Tdvps

#: VMCS encodings that a refusal names.
VMCS_POSTED_VECTOR = 0x0002
VMCS_POSTED_DESCRIPTOR = 0x2016

_HIGHEST_VECTOR = 255
_DESCRIPTOR_SIZE = 1 << LINE_SHIFT
_DESCRIPTOR_ADDRESS = MASK64 & ~(_DESCRIPTOR_SIZE - 1)
_POSTED_INTERRUPTS = 1 << 7
_INSTRUCTION_TIMEOUT_CONTROLS = 3 << 30

_LOGGED_GPAS = 32
_GPRS_BEFORE_RSP = GPR_NAMES.index("rsp")
_GPRS_BEHIND_RSP = _GPRS_BEFORE_RSP + 1


class Vpid(Word):
    """The virtual-processor id that tags translations: the TD's KeyID and the number of the VM."""

    vm = Bits(1, 0)
    hkid = Bits(15, 2)


def _hkid(target: Target, _number: int) -> int:
    hkid: int = target.module.memory.words.view[target.tdr + Tdr.HKID]
    return hkid


def _vpid(target: Target, number: int) -> int:
    return Vpid(0).with_(hkid=_hkid(target, number))


def _of_td(name: str) -> Get:
    """Reads the TD's own field of this name."""
    return next(field for field in TD_FIELDS if field.name == name).source.get


def _admit_posted_vector(_target: Target, change: Change) -> int:
    return TDX_SUCCESS if change.new <= _HIGHEST_VECTOR else TDX_METADATA_FIELD_VALUE_NOT_VALID


def _admit_shared_hpa(target: Target, pa: int, alignment: int) -> int:
    """An address that the host may give: aligned, no private KeyID, outside the module."""
    is_legal = is_shared_hpa(target.module, pa, alignment)
    return TDX_SUCCESS if is_legal else TDX_METADATA_FIELD_VALUE_NOT_VALID


def _admit_posted_descriptor(target: Target, change: Change) -> int:
    return _admit_shared_hpa(target, change.new, _DESCRIPTOR_SIZE)


def _admit_shared_eptp(target: Target, change: Change) -> int:
    return _admit_shared_hpa(target, change.new & HPA_MASK, PAGE_SIZE)


def _admit_pin_controls(target: Target, change: Change) -> int:
    """Posted interrupts need their vector, then their descriptor."""
    view, page = target.module.memory.words.view, target.tdvps
    if change.new & _POSTED_INTERRUPTS:
        if view[page + Tdvps.POSTED_VECTOR] == NO_POSTED_VECTOR:
            return TDX_TD_VMCS_FIELD_NOT_INITIALIZED + VMCS_POSTED_VECTOR
        if view[page + Tdvps.POSTED_DESCRIPTOR] == MASK64:
            return TDX_TD_VMCS_FIELD_NOT_INITIALIZED + VMCS_POSTED_DESCRIPTOR
    return TDX_SUCCESS


def _host(field_id: int, name: str, source: Source, fields: int = 1) -> Field:
    return Field(field_id, name, source, ONLY_HOST, fields=fields)


def _debug(field_id: int, name: str, source: Source, fields: int = 1) -> Field:
    return Field(field_id, name, source, ONLY_DEBUG_HOST, fields=fields)


def _settable(field_id: int, name: str, source: Source) -> Field:
    """A field that every host reads and writes as a whole."""
    return Field(field_id, name, source, ONLY_HOST, write=ONLY_HOST)


VMCS_FIELDS: tuple[Field, ...] = (
    _debug(0x0024000100000000, "VPID", Source(_vpid)),
    Field(
        0x0024000100000000 | VMCS_POSTED_VECTOR,
        "POSTED_INTERRUPT_VECTOR",
        in_tdvps(Tdvps.POSTED_VECTOR),
        read=ONLY_HOST,
        write=ONLY_HOST,
        admit=_admit_posted_vector,
    ),
    _host(0x0024000300002004, "MSR_BITMAP_ADDRESS", constant(0)),
    _host(0x002400030000200E, "PML_ADDRESS", constant(0)),
    _host(0x0024000300002010, "TSC_OFFSET", Source(_of_td("TSC_OFFSET"))),
    Field(
        0x0024000300000000 | VMCS_POSTED_DESCRIPTOR,
        "POSTED_INTERRUPT_DESCRIPTOR",
        in_tdvps(Tdvps.POSTED_DESCRIPTOR),
        read=ONLY_HOST,
        write=Masks(_DESCRIPTOR_ADDRESS, _DESCRIPTOR_ADDRESS),
        admit=_admit_posted_descriptor,
        ones_mean_unset=True,
    ),
    _host(0x0024000300002018, "VM_FUNCTION_CONTROLS", constant(0)),
    _host(0x002400030000201A, "EPTP", in_tdcs(Tdcs.EPTP)),
    _host(0x0024000300002024, "EPTP_LIST_ADDRESS", constant(0)),
    _host(0x0024000300002032, "TSC_MULTIPLIER", Source(_of_td("TSC_MULTIPLIER"))),
    Field(
        0x002400030000203C,
        "SHARED_EPTP",
        in_tdvps(Tdvps.SHARED_EPTP),
        read=Masks(HPA_MASK, MASK64),
        write=Masks(HPA_MASK, HPA_MASK),
        admit=_admit_shared_eptp,
    ),
    Field(
        0x0024000200004000,
        "PIN_BASED_CONTROLS",
        in_tdvps(Tdvps.PIN_CONTROLS),
        read=Masks(_POSTED_INTERRUPTS, MASK64),
        write=Masks(_POSTED_INTERRUPTS, _POSTED_INTERRUPTS),
        admit=_admit_pin_controls,
    ),
    Field(
        0x002400020000401E,
        "SECONDARY_CONTROLS",
        in_tdvps(Tdvps.SECONDARY_CONTROLS),
        read=Masks(_INSTRUCTION_TIMEOUT_CONTROLS, MASK64),
        write=Masks(_INSTRUCTION_TIMEOUT_CONTROLS, _INSTRUCTION_TIMEOUT_CONTROLS),
    ),
    _host(0x0024000200004020, "PLE_GAP", constant(0)),
    _host(0x0024000200004022, "PLE_WINDOW", constant(0)),
    _settable(0x0024000200004024, "INSTRUCTION_TIMEOUT", in_tdvps(Tdvps.INSTRUCTION_TIMEOUT)),
    _host(0x0024000200004026, "TD_HKID", Source(_hkid)),
)

TDVPS_FIELDS: tuple[Field, ...] = (
    Field(
        0x1020000300000000,
        "GPRS_RAX_TO_RBX",
        in_tdvps(Tdvps.GPRS),
        read=ONLY_DEBUG_HOST,
        write=ONLY_DEBUG_HOST,
        fields=_GPRS_BEFORE_RSP,
    ),
    Field(
        0x1020000300000000 | _GPRS_BEHIND_RSP,
        "GPRS_RBP_TO_R15",
        in_tdvps(Tdvps.GPRS + _GPRS_BEHIND_RSP),
        read=ONLY_DEBUG_HOST,
        write=ONLY_DEBUG_HOST,
        fields=len(GPR_NAMES) - _GPRS_BEHIND_RSP,
    ),
    _host(0x9120000300000100, "VCPU_STATE_DETAILS", constant(0)),
    _debug(0xA020000000000000, "VCPU_STATE", in_tdvps(Tdvps.STATE)),
    Field(0xA020000200000002, "VCPU_INDEX", in_tdvps(Tdvps.INDEX), read=HOST_AND_GUEST),
    _host(0xA020000000000003, "NUM_TDVPS_PAGES", in_tdvps(Tdvps.NUM_PAGES)),
    _host(0xA020000200000004, "ASSOC_LPID", in_tdvps(Tdvps.ASSOC_LPID)),
    _host(0xA020000300000006, "VCPU_EPOCH", in_tdvps(Tdvps.VCPU_EPOCH)),
    Field(
        0xA020000000000007,
        "CPUID_SUPERVISOR_VE",
        in_tdvps(Tdvps.CPUID_SUPERVISOR_VE),
        read=HOST_AND_GUEST,
        write=ONLY_GUEST,
    ),
    Field(
        0xA020000000000008,
        "CPUID_USER_VE",
        in_tdvps(Tdvps.CPUID_USER_VE),
        read=HOST_AND_GUEST,
        write=ONLY_GUEST,
    ),
    _debug(0xA02000030000000A, "LAST_EXIT_TSC", constant(0)),
    _settable(0x202000000000000B, "PEND_NMI", in_tdvps(Tdvps.PEND_NMI)),
    _host(0x202000030000000C, "XFAM", in_tdcs(Tdcs.XFAM)),
    _debug(0xA02000030000000D, "EPF_LIST_INDEX", in_tdvps(Tdvps.EPF_COUNT)),
    _debug(0xA02000030000000E, "EPF_COUNTER", in_tdvps(Tdvps.EPF_COUNTER)),
    _debug(0xA02000030000000F, "LAST_TD_EXIT", in_tdvps(Tdvps.LAST_TD_EXIT)),
    _host(0xA020000300000010, "TDVPS_PAGE_PA", in_tdvps(Tdvps.PAGE_PA), fields=MAX_TDVPS_PAGES),
    _debug(0xA220000300000200, "EPF_GPA_LOG", in_tdvps(Tdvps.EPF_GPAS), fields=_LOGGED_GPAS),
)

VCPU_FIELDS: tuple[Field, ...] = (*VMCS_FIELDS, *TDVPS_FIELDS)
