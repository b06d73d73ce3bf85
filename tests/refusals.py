"""Every refusal that a leaf of the TDX module can give, in the order in which it tests.

A refusal is the status' name and the operand that it blames, such as "OPERAND_BUSY TDR"; warnings
and interruptions count as refusals. `REFUSALS` has them by leaf, `IMPOSSIBLE` those that this model
never gives, with the reason.

Source: TDX module 1.5.01, the file of each leaf; helpers.c for what leaves share.
"""

from tdxlab.abi import leaves as abi
from tdxlab.abi.status import operand_name, status_name


def name_of(status: int) -> str:
    """A status as a refusal of these tables."""
    return f"{status_name(status).removeprefix('TDX_')} {operand_name(status) or ''}".strip()


def _all(status: str, *operands: str) -> tuple[str, ...]:
    return tuple(f"{status} {operand}" for operand in operands)


# -- sequences of tests that leaves share


def _invalid(*operands: str) -> tuple[str, ...]:
    return _all("OPERAND_INVALID", *operands)


def _busy(*operands: str) -> tuple[str, ...]:
    return _all("OPERAND_BUSY", *operands)


def _walked_page(operand: str) -> tuple[str, ...]:
    """A page of any type: address, TDMR, locks."""
    return (*_invalid(operand), f"OPERAND_ADDR_RANGE_ERROR {operand}", *_busy(operand))


def _page(operand: str) -> tuple[str, ...]:
    """A 4 KiB page of one type, named by an operand."""
    return (*_walked_page(operand), f"PAGE_METADATA_INCORRECT {operand}")


#: The TD's state while the leaf holds the TDR exclusively, and with the op-state lock.
_STATE_UNLOCKED = (
    *("TD_FATAL", "TD_KEYS_NOT_CONFIGURED", "TDCS_NOT_ALLOCATED", "OP_STATE_INCORRECT"),
)
_STATE = (*_STATE_UNLOCKED, *_busy("OP_STATE"))

#: GPA and level, S-EPT tree, walk, entry lock, entry state.
_ENTRY = (
    *_invalid("RCX"),
    *_busy("SEPT_TREE"),
    "EPT_WALK_FAILED RCX",
    *_busy("RCX"),
    "EPT_ENTRY_STATE_INCORRECT RCX",
)
_TRACKED = ("GPA_RANGE_NOT_BLOCKED RCX", "TLB_TRACKING_NOT_DONE RCX")

_MEMORY = (*_page("RDX"), *_STATE, *_ENTRY)
_VCPU = (*_page("RCX"), *_busy("TDR"), *_STATE)

_FIELD_READ = (
    "METADATA_FIRST_FIELD_ID_IN_CONTEXT",
    "METADATA_FIELD_ID_INCORRECT",
    "METADATA_FIELD_NOT_READABLE",
)
_FIELD_WRITE = (
    "METADATA_FIELD_ID_INCORRECT",
    "METADATA_FIELD_NOT_WRITABLE",
    "METADATA_FIELD_VALUE_NOT_VALID",
)
_VCPU_USE = ("TDCX_NUM_INCORRECT", "VCPU_STATE_INCORRECT", "VCPU_ASSOCIATED")

_MSR = ("LIMIT_CPUID_MAXVAL_SET", "INCONSISTENT_MSR")

#: What a leaf itself refuses; the dispatcher's refusals are added below.
_OF_LEAF: dict[int, tuple[str, ...]] = {
    abi.TDH_SYS_INIT: (
        "SYS_BUSY",
        *_invalid("RCX"),
        "SYS_INIT_NOT_PENDING",
        *("NUM_ACTIVATED_HKIDS_NOT_SUPPORTED", "CMR_LIST_INVALID"),
        *("INCOMPATIBLE_SEAM_CAPABILITIES", "SYS_INCOMPATIBLE_SIGSTRUCT"),
        "RND_NO_ENTROPY",
    ),
    abi.TDH_SYS_LP_INIT: (
        "SYS_BUSY",
        "SYS_LP_INIT_NOT_PENDING",
        "SYS_LP_INIT_DONE",
        "RND_NO_ENTROPY",
        "INCOMPATIBLE_SEAM_CAPABILITIES",
    ),
    abi.TDH_SYS_CONFIG: (
        "SYS_BUSY",
        "SYS_CONFIG_NOT_PENDING",
        *_invalid("RCX", "RDX", "R8"),
        *("INVALID_TDMR", "NON_ORDERED_TDMR"),
        *("INVALID_RESERVED_IN_TDMR", "NON_ORDERED_RESERVED_IN_TDMR"),
        *("INVALID_PAMT", "PAMT_OVERLAP", "PAMT_OUTSIDE_CMRS", "TDMR_OUTSIDE_CMRS"),
    ),
    abi.TDH_SYS_KEY_CONFIG: (
        "SYS_BUSY",
        "SYS_KEY_CONFIG_NOT_PENDING",
        "KEY_CONFIGURED",
        *_busy("KET"),
        "KEY_GENERATION_FAILED",
    ),
    abi.TDH_SYS_TDMR_INIT: (*_invalid("RCX"), *_busy("RCX"), "TDMR_ALREADY_INITIALIZED"),
    abi.TDH_SYS_INFO: ("SYS_LP_INIT_NOT_DONE", *_invalid("RCX", "RDX", "R8", "R9")),
    abi.TDH_SYS_RD: ("SYS_LP_INIT_NOT_DONE", *_FIELD_READ),
    abi.TDH_SYS_RDALL: (
        "SYS_LP_INIT_NOT_DONE",
        *_invalid("RDX"),
        "METADATA_FIELD_ID_INCORRECT",
        "METADATA_LIST_OVERFLOW",
    ),
    abi.TDH_SYS_LP_SHUTDOWN: (),
    abi.TDH_SYS_SHUTDOWN: (*_invalid("RCX"), "SYS_BUSY"),
    abi.TDH_SYS_UPDATE: ("SYS_BUSY", "SYS_STATE_INCORRECT", "SYS_INVALID_HANDOFF"),
    abi.TDH_MNG_CREATE: (
        *_invalid("RDX"),
        *_page("RCX"),
        *_busy("KOT"),
        "HKID_NOT_FREE",
        "RND_NO_ENTROPY",
    ),
    abi.TDH_MNG_KEY_CONFIG: (
        *_page("RCX"),
        *("TD_FATAL", "LIFECYCLE_STATE_INCORRECT", "KEY_CONFIGURED"),
        *_busy("KET"),
        "KEY_GENERATION_FAILED",
    ),
    abi.TDH_MNG_ADDCX: (
        *_page("RDX"),
        *("TD_FATAL", "TD_KEYS_NOT_CONFIGURED", "TDCX_NUM_INCORRECT"),
        *_page("RCX"),
        *("RND_NO_ENTROPY", "OP_STATE_INCORRECT"),
    ),
    abi.TDH_MNG_INIT: (
        *_MSR,
        *_page("RCX"),
        *_STATE_UNLOCKED,
        *_invalid("RDX", "ATTRIBUTES", "XFAM", "MAX_VCPUS", "NUM_L2_VMS", "EXEC_CONTROLS"),
        *_invalid("EPTP_CONTROLS", "TSC_FREQUENCY", "CPUID_CONFIG"),
        *_invalid("IA32_ARCH_CAPABILITIES_CONFIG"),
    ),
    abi.TDH_MNG_VPFLUSHDONE: (
        *_page("RCX"),
        *_busy("KOT"),
        *("LIFECYCLE_STATE_INCORRECT", "FLUSHVP_NOT_DONE"),
    ),
    abi.TDH_MNG_KEY_FREEID: (
        *_page("RCX"),
        "LIFECYCLE_STATE_INCORRECT",
        *_busy("KOT"),
        "WBCACHE_NOT_COMPLETE",
    ),
    abi.TDH_MNG_KEY_RECLAIMID: (),
    abi.TDH_MNG_RD: (*_page("RCX"), *_STATE, *_FIELD_READ),
    abi.TDH_MNG_WR: (
        *_page("RCX"),
        *_STATE,
        *_FIELD_WRITE,
        "METADATA_WR_MASK_NOT_VALID",
        *_busy("METADATA_FIELD"),
    ),
    abi.TDH_VP_CREATE: (*_page("RDX"), *_STATE, *_page("RCX")),
    abi.TDH_VP_ADDCX: (
        *_page("RDX"),
        *_busy("TDR"),
        *_STATE,
        *("VCPU_STATE_INCORRECT", "TDCX_NUM_INCORRECT"),
        *_page("RCX"),
    ),
    abi.TDH_VP_INIT: (
        *_VCPU,
        *("TDCX_NUM_INCORRECT", "VCPU_STATE_INCORRECT", "MAX_VCPUS_EXCEEDED"),
        "INCONSISTENT_MSR",
    ),
    abi.TDH_VP_ENTER: (
        *_VCPU,
        *_VCPU_USE,
        *(*_MSR, "TSC_ROLLBACK", "INCORRECT_MSR_VALUE"),
        *_busy("TD_EPOCH", "SEPT_TREE"),
    ),
    abi.TDH_VP_FLUSH: (
        *_page("RCX"),
        *_busy("TDR"),
        *("TD_KEYS_NOT_CONFIGURED", "TDCX_NUM_INCORRECT", "VCPU_NOT_ASSOCIATED"),
    ),
    abi.TDH_VP_RD: (*_VCPU, *_VCPU_USE, *_FIELD_READ),
    abi.TDH_VP_WR: (*_VCPU, *_VCPU_USE, *_FIELD_WRITE, "TD_VMCS_FIELD_NOT_INITIALIZED"),
    abi.TDH_MEM_SEPT_ADD: (
        *_invalid("RDX"),
        *_MEMORY,
        *_page("R8"),
        *_invalid("R9", "R10", "R11"),
    ),
    abi.TDH_MEM_PAGE_ADD: (
        *_page("RDX"),
        *_STATE_UNLOCKED,
        *_invalid("RCX"),
        *("EPT_WALK_FAILED RCX", "EPT_ENTRY_STATE_INCORRECT RCX"),
        *_invalid("R9"),
        *_page("R8"),
    ),
    abi.TDH_MEM_PAGE_AUG: (*_MEMORY, *_page("R8")),
    abi.TDH_MEM_RANGE_BLOCK: (*_MEMORY, "GPA_RANGE_ALREADY_BLOCKED RCX"),
    abi.TDH_MEM_RANGE_UNBLOCK: (*_MEMORY, "TLB_TRACKING_NOT_DONE SEPT_TREE"),
    abi.TDH_MEM_TRACK: (
        *_page("RCX"),
        *_STATE,
        *_busy("TD_EPOCH"),
        "PREVIOUS_TLB_EPOCH_BUSY",
    ),
    abi.TDH_MEM_PAGE_REMOVE: (*_MEMORY, *_TRACKED),
    abi.TDH_MEM_SEPT_REMOVE: (*_MEMORY, *_TRACKED, "EPT_PAGE_NOT_FREE RCX"),
    abi.TDH_MEM_PAGE_PROMOTE: (
        *_MEMORY,
        *_TRACKED,
        *("EPT_INVALID_PROMOTE_CONDITIONS RCX", "INTERRUPTED_RESTARTABLE"),
    ),
    abi.TDH_MEM_PAGE_DEMOTE: (*_MEMORY, *_TRACKED, *_page("R8"), "INTERRUPTED_RESTARTABLE"),
    abi.TDH_MEM_PAGE_RELOCATE: (*_MEMORY, *_TRACKED, *_page("R8")),
    abi.TDH_MEM_SEPT_RD: tuple(r for r in _MEMORY if r != "EPT_ENTRY_STATE_INCORRECT RCX"),
    abi.TDH_MEM_RD: (
        *_page("RDX"),
        *_STATE,
        "TD_NON_DEBUG",
        *_invalid("RCX"),
        *_busy("SEPT_TREE"),
        "EPT_ENTRY_NOT_PRESENT RCX",
        *_busy("RCX"),
        "EPT_ENTRY_STATE_INCORRECT RCX",
    ),
    abi.TDH_MR_EXTEND: (
        *_page("RDX"),
        *_STATE_UNLOCKED,
        *_invalid("RCX"),
        *("EPT_ENTRY_NOT_PRESENT RCX", "EPT_ENTRY_NOT_PRESENT"),
    ),
    abi.TDH_MR_FINALIZE: (*_page("RCX"), *_STATE_UNLOCKED, "NO_VCPUS"),
    abi.TDH_PHYMEM_PAGE_RDMD: _walked_page("RCX"),
    abi.TDH_PHYMEM_PAGE_RECLAIM: (
        *_page("RCX"),
        *_busy("TDR"),
        *("LIFECYCLE_STATE_INCORRECT", "TD_ASSOCIATED_PAGES_EXIST"),
    ),
    abi.TDH_PHYMEM_PAGE_WBINVD: _page("RCX"),
    abi.TDH_PHYMEM_CACHE_WB: (
        *_invalid("RCX"),
        *_busy("WBCACHE", "KOT"),
        *("NO_HKID_READY_TO_WBCACHE", "WBCACHE_RESUME_ERROR", "INTERRUPTED_RESUMABLE"),
    ),
}
_OF_LEAF[abi.TDH_MEM_WR] = _OF_LEAF[abi.TDH_MEM_RD]

#: Leaves that work before the module is ready.
_EARLY = frozenset(
    (
        *(abi.TDH_SYS_INFO, abi.TDH_SYS_RD, abi.TDH_SYS_RDALL, abi.TDH_SYS_INIT),
        *(abi.TDH_SYS_LP_INIT, abi.TDH_SYS_CONFIG, abi.TDH_SYS_KEY_CONFIG),
        *(abi.TDH_SYS_LP_SHUTDOWN, abi.TDH_SYS_UPDATE),
    )
)


def _of_dispatcher(leaf: int) -> tuple[str, ...]:
    after_shutdown = () if leaf == abi.TDH_SYS_LP_SHUTDOWN else ("SYS_SHUTDOWN",)
    too_early = () if leaf in _EARLY else ("SYS_NOT_READY",)
    return (*_invalid("RAX"), *after_shutdown, *too_early)


REFUSALS: dict[int, frozenset[str]] = {
    leaf: frozenset(_of_dispatcher(leaf) + refusals) for leaf, refusals in _OF_LEAF.items()
}

# -- what cannot occur in this model

_ONE_PLATFORM = "every platform that can be made is one that the module accepts"
_NO_MSR = "MSRs and the TSC never change here"
_HAS_ALL_PAGES = "a TD with a vCPU has been initialised, so its TDCS is complete"
_WAS_INITIALISED = "a TD with a vCPU has been initialised, and no other op-state is modelled"
_NO_MIGRATION = "needs an S-EPT entry in a state that only migration makes"

IMPOSSIBLE: dict[tuple[int, str], str] = {
    (abi.TDH_SYS_INIT, "NUM_ACTIVATED_HKIDS_NOT_SUPPORTED"): _ONE_PLATFORM,
    (abi.TDH_SYS_INIT, "CMR_LIST_INVALID"): _ONE_PLATFORM,
    (abi.TDH_SYS_INIT, "INCOMPATIBLE_SEAM_CAPABILITIES"): _ONE_PLATFORM,
    (abi.TDH_SYS_INIT, "SYS_INCOMPATIBLE_SIGSTRUCT"): _ONE_PLATFORM,
    (abi.TDH_SYS_LP_INIT, "INCOMPATIBLE_SEAM_CAPABILITIES"): _ONE_PLATFORM,
    (abi.TDH_SYS_RD, "METADATA_FIELD_NOT_READABLE"): "the host may read every field of the module",
    (abi.TDH_SYS_RDALL, "METADATA_LIST_OVERFLOW"): "all fields fit one page",
    (abi.TDH_MNG_INIT, "LIMIT_CPUID_MAXVAL_SET"): _NO_MSR,
    (abi.TDH_MNG_INIT, "INCONSISTENT_MSR"): _NO_MSR,
    (abi.TDH_VP_INIT, "INCONSISTENT_MSR"): _NO_MSR,
    (abi.TDH_VP_ENTER, "LIMIT_CPUID_MAXVAL_SET"): _NO_MSR,
    (abi.TDH_VP_ENTER, "INCONSISTENT_MSR"): _NO_MSR,
    (abi.TDH_VP_ENTER, "TSC_ROLLBACK"): _NO_MSR,
    (abi.TDH_VP_ENTER, "INCORRECT_MSR_VALUE"): _NO_MSR,
    (abi.TDH_VP_ADDCX, "TDCS_NOT_ALLOCATED"): _HAS_ALL_PAGES,
    (abi.TDH_VP_INIT, "TDCS_NOT_ALLOCATED"): _HAS_ALL_PAGES,
    (abi.TDH_VP_ENTER, "TDCS_NOT_ALLOCATED"): _HAS_ALL_PAGES,
    (abi.TDH_VP_RD, "TDCS_NOT_ALLOCATED"): _HAS_ALL_PAGES,
    (abi.TDH_VP_WR, "TDCS_NOT_ALLOCATED"): _HAS_ALL_PAGES,
    (abi.TDH_VP_RD, "OP_STATE_INCORRECT"): _WAS_INITIALISED,
    (abi.TDH_VP_WR, "OP_STATE_INCORRECT"): _WAS_INITIALISED,
    (abi.TDH_MEM_RD, "EPT_ENTRY_STATE_INCORRECT RCX"): _NO_MIGRATION,
    (abi.TDH_MEM_WR, "EPT_ENTRY_STATE_INCORRECT RCX"): _NO_MIGRATION,
    (abi.TDH_MR_EXTEND, "EPT_ENTRY_NOT_PRESENT"): _NO_MIGRATION,
}
