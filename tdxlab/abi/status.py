"""The completion status in RAX: layout, names, operand ids, and what each code says to a person.

    63     error             RAX reports a refusal; 0 with a non-zero code is a warning
    62     non_recoverable   the same call with the same operands cannot succeed
    61     fatal             the TD is dead
    60     host_hint         the host may decide how the guest's call went on
    47:40  class_            what the code is about
    39:32  code              number inside the class
    31:0   details           an operand id, packed numbers, an MSR, a level or an exit reason

Details are added to the code, whose low half is zero. After TDH.VP.ENTER they are the reason for
which the guest was left.

Source: TDX module 1.5.01, tdx_error_codes_defs.h (codes), tdx_api_defs.h (layout, operand ids).
"""

from __future__ import annotations

from tdxlab.bits import MASK64, Bits, Word


class Status(Word):
    """A completion status as named fields."""

    details = Bits(31, 0)
    code = Bits(39, 32)
    class_ = Bits(47, 40)
    host_hint = Bits(60)
    fatal = Bits(61)
    non_recoverable = Bits(62)
    error = Bits(63)


DETAILS_MASK = Status.details.mask
CODE_MASK = MASK64 & ~DETAILS_MASK

# Class 0: general, and the reasons of TD exits
TDX_SUCCESS = 0x0000_0000_0000_0000
TDX_NON_RECOVERABLE_VCPU = 0x4000_0001_0000_0000
TDX_NON_RECOVERABLE_TD = 0x6000_0002_0000_0000
TDX_INTERRUPTED_RESUMABLE = 0x8000_0003_0000_0000
TDX_INTERRUPTED_RESTARTABLE = 0x8000_0004_0000_0000
TDX_NON_RECOVERABLE_TD_NON_ACCESSIBLE = 0x6000_0005_0000_0000
TDX_INVALID_RESUMPTION = 0xC000_0006_0000_0000
TDX_NON_RECOVERABLE_TD_WRONG_APIC_MODE = 0xE000_0007_0000_0000
TDX_CROSS_TD_FAULT = 0x8000_0008_0000_0000
TDX_CROSS_TD_TRAP = 0x9000_0009_0000_0000
TDX_NON_RECOVERABLE_TD_CORRUPTED_MD = 0x6000_000A_0000_0000

# Class 1: operands
TDX_OPERAND_INVALID = 0xC000_0100_0000_0000
TDX_OPERAND_ADDR_RANGE_ERROR = 0xC000_0101_0000_0000

# Class 2: busy
TDX_OPERAND_BUSY = 0x8000_0200_0000_0000
TDX_PREVIOUS_TLB_EPOCH_BUSY = 0x8000_0201_0000_0000
TDX_SYS_BUSY = 0x8000_0202_0000_0000
TDX_RND_NO_ENTROPY = 0x8000_0203_0000_0000
TDX_OPERAND_BUSY_HOST_PRIORITY = 0x8000_0204_0000_0000
TDX_HOST_PRIORITY_BUSY_TIMEOUT = 0x9000_0205_0000_0000

# Class 3: physical pages
TDX_PAGE_METADATA_INCORRECT = 0xC000_0300_0000_0000
TDX_PAGE_ALREADY_FREE = 0x0000_0301_0000_0000
TDX_PAGE_NOT_OWNED_BY_TD = 0xC000_0302_0000_0000
TDX_PAGE_NOT_FREE = 0xC000_0303_0000_0000

# Class 4: dependants
TDX_TD_ASSOCIATED_PAGES_EXIST = 0xC000_0400_0000_0000

# Class 5: the module
TDX_SYS_INIT_NOT_PENDING = 0xC000_0500_0000_0000
TDX_SYS_LP_INIT_NOT_DONE = 0xC000_0502_0000_0000
TDX_SYS_LP_INIT_DONE = 0xC000_0503_0000_0000
TDX_SYS_NOT_READY = 0xC000_0505_0000_0000
TDX_SYS_SHUTDOWN = 0xC000_0506_0000_0000
TDX_SYS_KEY_CONFIG_NOT_PENDING = 0xC000_0507_0000_0000
TDX_SYS_STATE_INCORRECT = 0xC000_0508_0000_0000
TDX_SYS_INVALID_HANDOFF = 0xC000_0509_0000_0000
TDX_SYS_INCOMPATIBLE_SIGSTRUCT = 0xC000_050A_0000_0000
TDX_SYS_LP_INIT_NOT_PENDING = 0xC000_050B_0000_0000
TDX_SYS_CONFIG_NOT_PENDING = 0xC000_050C_0000_0000
TDX_INCOMPATIBLE_SEAM_CAPABILITIES = 0xC000_050D_0000_0000

# Class 6: the TD
TDX_TD_FATAL = 0xE000_0604_0000_0000
TDX_TD_NON_DEBUG = 0xC000_0605_0000_0000
TDX_TDCS_NOT_ALLOCATED = 0xC000_0606_0000_0000
TDX_LIFECYCLE_STATE_INCORRECT = 0xC000_0607_0000_0000
TDX_OP_STATE_INCORRECT = 0xC000_0608_0000_0000
TDX_NO_VCPUS = 0xC000_0609_0000_0000
TDX_TDCX_NUM_INCORRECT = 0xC000_0610_0000_0000

# Class 7: the vCPU
TDX_VCPU_STATE_INCORRECT = 0xC000_0700_0000_0000
TDX_VCPU_ASSOCIATED = 0x8000_0701_0000_0000
TDX_VCPU_NOT_ASSOCIATED = 0x8000_0702_0000_0000
TDX_NO_VALID_VE_INFO = 0xC000_0704_0000_0000
TDX_MAX_VCPUS_EXCEEDED = 0xC000_0705_0000_0000
TDX_TSC_ROLLBACK = 0xC000_0706_0000_0000
TDX_TD_VMCS_FIELD_NOT_INITIALIZED = 0xC000_0730_0000_0000
TD_VMCS_FIELD_ERROR = 0xC000_0731_0000_0000

# Class 8: keys and caches
TDX_KEY_GENERATION_FAILED = 0x8000_0800_0000_0000
TDX_TD_KEYS_NOT_CONFIGURED = 0x8000_0810_0000_0000
TDX_KEY_STATE_INCORRECT = 0xC000_0811_0000_0000
TDX_KEY_CONFIGURED = 0x0000_0815_0000_0000
TDX_WBCACHE_NOT_COMPLETE = 0x8000_0817_0000_0000
TDX_HKID_NOT_FREE = 0xC000_0820_0000_0000
TDX_NO_HKID_READY_TO_WBCACHE = 0x0000_0821_0000_0000
TDX_WBCACHE_RESUME_ERROR = 0xC000_0823_0000_0000
TDX_FLUSHVP_NOT_DONE = 0x8000_0824_0000_0000
TDX_NUM_ACTIVATED_HKIDS_NOT_SUPPORTED = 0xC000_0825_0000_0000

# Class 9: the platform
TDX_INCORRECT_CPUID_VALUE = 0xC000_0900_0000_0000
TDX_LIMIT_CPUID_MAXVAL_SET = 0xC000_0901_0000_0000
TDX_INCONSISTENT_CPUID_FIELD = 0xC000_0902_0000_0000
TDX_CPUID_MAX_SUBLEAVES_UNRECOGNIZED = 0xC000_0903_0000_0000
TDX_CPUID_LEAF_1F_FORMAT_UNRECOGNIZED = 0xC000_0904_0000_0000
TDX_INVALID_WBINVD_SCOPE = 0xC000_0905_0000_0000
TDX_INVALID_PKG_ID = 0xC000_0906_0000_0000
TDX_ENABLE_MONITOR_FSM_NOT_SET = 0xC000_0907_0000_0000
TDX_CPUID_LEAF_NOT_SUPPORTED = 0xC000_0908_0000_0000
TDX_SMRR_NOT_LOCKED = 0xC000_0910_0000_0000
TDX_INVALID_SMRR_CONFIGURATION = 0xC000_0911_0000_0000
TDX_SMRR_OVERLAPS_CMR = 0xC000_0912_0000_0000
TDX_SMRR_LOCK_NOT_SUPPORTED = 0xC000_0913_0000_0000
TDX_SMRR_NOT_SUPPORTED = 0xC000_0914_0000_0000
TDX_INCONSISTENT_MSR = 0xC000_0920_0000_0000
TDX_INCORRECT_MSR_VALUE = 0xC000_0921_0000_0000
TDX_SEAMREPORT_NOT_AVAILABLE = 0xC000_0930_0000_0000
TDX_SEAMDB_GETREF_NOT_AVAILABLE = 0xC000_0931_0000_0000
TDX_SEAMDB_REPORT_NOT_AVAILABLE = 0xC000_0932_0000_0000
TDX_SEAMVERIFYREPORT_NOT_AVAILABLE = 0xC000_0933_0000_0000

# Class 10: TDMRs, PAMTs, CMRs
TDX_INVALID_TDMR = 0xC000_0A00_0000_0000
TDX_NON_ORDERED_TDMR = 0xC000_0A01_0000_0000
TDX_TDMR_OUTSIDE_CMRS = 0xC000_0A02_0000_0000
TDX_TDMR_ALREADY_INITIALIZED = 0x0000_0A03_0000_0000
TDX_INVALID_PAMT = 0xC000_0A10_0000_0000
TDX_PAMT_OUTSIDE_CMRS = 0xC000_0A11_0000_0000
TDX_PAMT_OVERLAP = 0xC000_0A12_0000_0000
TDX_INVALID_RESERVED_IN_TDMR = 0xC000_0A20_0000_0000
TDX_NON_ORDERED_RESERVED_IN_TDMR = 0xC000_0A21_0000_0000
TDX_CMR_LIST_INVALID = 0xC000_0A22_0000_0000

# Class 11: Secure EPT
TDX_EPT_WALK_FAILED = 0xC000_0B00_0000_0000
TDX_EPT_ENTRY_FREE = 0xC000_0B01_0000_0000
TDX_EPT_ENTRY_NOT_FREE = 0xC000_0B02_0000_0000
TDX_EPT_ENTRY_NOT_PRESENT = 0xC000_0B03_0000_0000
TDX_EPT_ENTRY_NOT_LEAF = 0xC000_0B04_0000_0000
TDX_EPT_ENTRY_LEAF = 0xC000_0B05_0000_0000
TDX_GPA_RANGE_NOT_BLOCKED = 0xC000_0B06_0000_0000
TDX_GPA_RANGE_ALREADY_BLOCKED = 0x0000_0B07_0000_0000
TDX_TLB_TRACKING_NOT_DONE = 0xC000_0B08_0000_0000
TDX_EPT_INVALID_PROMOTE_CONDITIONS = 0xC000_0B09_0000_0000
TDX_PAGE_ALREADY_ACCEPTED = 0x0000_0B0A_0000_0000
TDX_PAGE_SIZE_MISMATCH = 0xC000_0B0B_0000_0000
TDX_GPA_RANGE_BLOCKED = 0xC000_0B0C_0000_0000
TDX_EPT_ENTRY_STATE_INCORRECT = 0xC000_0B0D_0000_0000
TDX_EPT_PAGE_NOT_FREE = 0xC000_0B0E_0000_0000
TDX_L2_SEPT_WALK_FAILED = 0xC000_0B0F_0000_0000
TDX_L2_SEPT_ENTRY_NOT_FREE = 0xC000_0B10_0000_0000
TDX_PAGE_ATTR_INVALID = 0xC000_0B11_0000_0000
TDX_L2_SEPT_PAGE_NOT_PROVIDED = 0xC000_0B12_0000_0000

# Class 12: metadata fields
TDX_METADATA_FIELD_ID_INCORRECT = 0xC000_0C00_0000_0000
TDX_METADATA_FIELD_NOT_WRITABLE = 0xC000_0C01_0000_0000
TDX_METADATA_FIELD_NOT_READABLE = 0xC000_0C02_0000_0000
TDX_METADATA_FIELD_VALUE_NOT_VALID = 0xC000_0C03_0000_0000
TDX_METADATA_LIST_OVERFLOW = 0xC000_0C04_0000_0000
TDX_INVALID_METADATA_LIST_HEADER = 0xC000_0C05_0000_0000
TDX_REQUIRED_METADATA_FIELD_MISSING = 0xC000_0C06_0000_0000
TDX_METADATA_ELEMENT_SIZE_INCORRECT = 0xC000_0C07_0000_0000
TDX_METADATA_LAST_ELEMENT_INCORRECT = 0xC000_0C08_0000_0000
TDX_METADATA_FIELD_CURRENTLY_NOT_WRITABLE = 0xC000_0C09_0000_0000
TDX_METADATA_WR_MASK_NOT_VALID = 0xC000_0C0A_0000_0000
TDX_METADATA_FIRST_FIELD_ID_IN_CONTEXT = 0x0000_0C0B_0000_0000
TDX_METADATA_FIELD_SKIP = 0x0000_0C0C_0000_0000

# Class 13: service TDs
TDX_SERVTD_ALREADY_BOUND_FOR_TYPE = 0xC000_0D00_0000_0000
TDX_SERVTD_TYPE_MISMATCH = 0xC000_0D01_0000_0000
TDX_SERVTD_ATTR_MISMATCH = 0xC000_0D02_0000_0000
TDX_SERVTD_INFO_HASH_MISMATCH = 0xC000_0D03_0000_0000
TDX_SERVTD_UUID_MISMATCH = 0xC000_0D04_0000_0000
TDX_SERVTD_NOT_BOUND = 0xC000_0D05_0000_0000
TDX_SERVTD_BOUND = 0xC000_0D06_0000_0000
TDX_TARGET_UUID_MISMATCH = 0xC000_0D07_0000_0000
TDX_TARGET_UUID_UPDATED = 0xC000_0D08_0000_0000

# Class 14: migration
TDX_INVALID_MBMD = 0xC000_0E00_0000_0000
TDX_INCORRECT_MBMD_MAC = 0xC000_0E01_0000_0000
TDX_NOT_WRITE_BLOCKED = 0xC000_0E02_0000_0000
TDX_ALREADY_WRITE_BLOCKED = 0x0000_0E03_0000_0000
TDX_NOT_EXPORTED = 0xC000_0E04_0000_0000
TDX_MIGRATION_STREAM_STATE_INCORRECT = 0xC000_0E05_0000_0000
TDX_MAX_MIGS_NUM_EXCEEDED = 0xC000_0E06_0000_0000
TDX_EXPORTED_DIRTY_PAGES_REMAIN = 0xC000_0E07_0000_0000
TDX_MIGRATION_DECRYPTION_KEY_NOT_SET = 0xC000_0E08_0000_0000
TDX_TD_NOT_MIGRATABLE = 0xC000_0E09_0000_0000
TDX_PREVIOUS_EXPORT_CLEANUP_INCOMPLETE = 0xC000_0E0A_0000_0000
TDX_NUM_MIGS_HIGHER_THAN_CREATED = 0xC000_0E0B_0000_0000
TDX_IMPORT_MISMATCH = 0xC000_0E0C_0000_0000
TDX_MIGRATION_EPOCH_OVERFLOW = 0xC000_0E0D_0000_0000
TDX_MAX_EXPORTS_EXCEEDED = 0xC000_0E0E_0000_0000
TDX_INVALID_PAGE_MAC = 0xC000_0E0F_0000_0000
TDX_MIGRATED_IN_CURRENT_EPOCH = 0xC000_0E10_0000_0000
TDX_DISALLOWED_IMPORT_OVER_REMOVED = 0xC000_0E11_0000_0000
TDX_SOME_VCPUS_NOT_MIGRATED = 0xC000_0E12_0000_0000
TDX_ALL_VCPUS_IMPORTED = 0xC000_0E13_0000_0000
TDX_MIN_MIGS_NOT_CREATED = 0xC000_0E14_0000_0000
TDX_VCPU_ALREADY_EXPORTED = 0xC000_0E15_0000_0000
TDX_INVALID_MIGRATION_DECRYPTION_KEY = 0xC000_0E16_0000_0000

# Class 16: reports
TDX_INVALID_CPUSVN = 0xC000_1000_0000_0000
TDX_INVALID_REPORTMACSTRUCT = 0xC000_1001_0000_0000

# Class 17: TD partitioning
TDX_L2_EXIT_HOST_ROUTED_ASYNC = 0x0000_1100_0000_0000
TDX_L2_EXIT_HOST_ROUTED_TDVMCALL = 0x0000_1101_0000_0000
TDX_L2_EXIT_PENDING_INTERRUPT = 0x0000_1102_0000_0000
TDX_PENDING_INTERRUPT = 0x0000_1120_0000_0000
TDX_TD_EXIT_BEFORE_L2_ENTRY = 0x0000_1140_0000_0000
TDX_TD_EXIT_ON_L2_VM_EXIT = 0x0000_1141_0000_0000
TDX_TD_EXIT_ON_L2_TO_L1 = 0x0000_1142_0000_0000
TDX_GLA_NOT_CANONICAL = 0xC000_1160_0000_0000

#: What the module puts into RAX before a leaf runs; a leaf that leaves it there halts the module.
UNINITIALIZE_ERROR = MASK64

# ---- Operand ids: which register or hidden resource a status is about ----------------------------

OPERAND_ID_RAX = 0
OPERAND_ID_RCX = 1
OPERAND_ID_RDX = 2
OPERAND_ID_RBX = 3
OPERAND_ID_RBP = 5
OPERAND_ID_RSI = 6
OPERAND_ID_RDI = 7
OPERAND_ID_R8 = 8
OPERAND_ID_R9 = 9
OPERAND_ID_R10 = 10
OPERAND_ID_R11 = 11
OPERAND_ID_R12 = 12
OPERAND_ID_R13 = 13
OPERAND_ID_R14 = 14
OPERAND_ID_R15 = 15
OPERAND_ID_ATTRIBUTES = 64
OPERAND_ID_XFAM = 65
OPERAND_ID_EXEC_CONTROLS = 66
OPERAND_ID_EPTP_CONTROLS = 67
OPERAND_ID_MAX_VCPUS = 68
OPERAND_ID_CPUID_CONFIG = 69
OPERAND_ID_TSC_FREQUENCY = 70
OPERAND_ID_NUM_L2_VMS = 71
OPERAND_ID_IA32_ARCH_CAPABILITIES_CONFIG = 72
OPERAND_ID_PAGE = 95
OPERAND_ID_TDMR_INFO_PA = 96
OPERAND_ID_GPA_LIST_ENTRY = 97
OPERAND_ID_MIG_BUFF_LIST_ENTRY = 98
OPERAND_ID_NEW_PAGE_LIST_ENTRY = 99
OPERAND_ID_TDR = 128
OPERAND_ID_TDCX = 129
OPERAND_ID_TDVPR = 130
OPERAND_ID_REG_PAGE = 132
OPERAND_ID_TDCS = 144
OPERAND_ID_TDVPS = 145
OPERAND_ID_SEPT_TREE = 146
OPERAND_ID_SEPT_ENTRY = 147
OPERAND_ID_RTMR = 168
OPERAND_ID_TD_EPOCH = 169
OPERAND_ID_L2_VAPIC_GPA = 170
OPERAND_ID_MIGSC = 171
OPERAND_ID_OP_STATE = 172
OPERAND_ID_MIG = 173
OPERAND_ID_SERVTD_BINDINGS = 174
OPERAND_ID_METADATA_FIELD = 176
OPERAND_ID_SYS = 184
OPERAND_ID_TDMR = 185
OPERAND_ID_KOT = 186
OPERAND_ID_KET = 187
OPERAND_ID_WBCACHE = 188

# ---- Exit reasons in the low half after TDH.VP.ENTER --------------------------------------------
# Source: Intel SDM volume 3, appendix on VMX basic exit reasons.

#: The basic reason; the bits above it qualify it.
EXIT_REASON_MASK = 0xFFFF
EXIT_REASON_NAMES: dict[int, str] = {
    0: "exception or NMI",
    1: "external interrupt",
    2: "triple fault",
    12: "HLT",
    48: "EPT violation",
    49: "EPT misconfiguration",
    77: "TDCALL",
}

# ---- Names ---------------------------------------------------------------------------------------

_CODE_PREFIXES = ("TDX_", "TD_VMCS_", "UNINITIALIZE_")
_OPERAND_PREFIX = "OPERAND_ID_"

#: Code (details zero) -> its name.
STATUS_NAMES: dict[int, str] = {
    value & CODE_MASK: name
    for name, value in tuple(globals().items())
    if name.startswith(_CODE_PREFIXES)
}

#: Operand id -> its short name: RCX, TDR, SEPT_TREE ...
OPERAND_NAMES: dict[int, str] = {
    value: name.removeprefix(_OPERAND_PREFIX)
    for name, value in tuple(globals().items())
    if name.startswith(_OPERAND_PREFIX)
}

_WITH_OPERAND = frozenset(
    {
        TDX_OPERAND_INVALID,
        TDX_OPERAND_ADDR_RANGE_ERROR,
        TDX_OPERAND_BUSY,
        TDX_OPERAND_BUSY_HOST_PRIORITY,
        TDX_PAGE_METADATA_INCORRECT,
        TDX_EPT_WALK_FAILED,
        TDX_EPT_ENTRY_NOT_PRESENT,
        TDX_GPA_RANGE_NOT_BLOCKED,
        TDX_GPA_RANGE_ALREADY_BLOCKED,
        TDX_TLB_TRACKING_NOT_DONE,
        TDX_EPT_INVALID_PROMOTE_CONDITIONS,
        TDX_EPT_ENTRY_STATE_INCORRECT,
        TDX_EPT_PAGE_NOT_FREE,
        TDX_L2_SEPT_PAGE_NOT_PROVIDED,
    }
)
_WITH_MSR = frozenset({TDX_INCONSISTENT_MSR, TDX_INCORRECT_MSR_VALUE})
_WITH_LEVEL = frozenset({TDX_PAGE_ALREADY_ACCEPTED, TDX_PAGE_SIZE_MISMATCH})
_WITH_VM_AND_LEVEL = frozenset({TDX_L2_SEPT_WALK_FAILED, TDX_L2_SEPT_ENTRY_NOT_FREE})
_TD_EXITS = frozenset(
    {
        TDX_SUCCESS,
        TDX_NON_RECOVERABLE_VCPU,
        TDX_NON_RECOVERABLE_TD,
        TDX_NON_RECOVERABLE_TD_NON_ACCESSIBLE,
        TDX_NON_RECOVERABLE_TD_WRONG_APIC_MODE,
        TDX_NON_RECOVERABLE_TD_CORRUPTED_MD,
        TDX_CROSS_TD_FAULT,
        TDX_CROSS_TD_TRAP,
        TDX_HOST_PRIORITY_BUSY_TIMEOUT,
    }
)
#: Codes whose details are packed bytes -> what each byte counts, lowest first.
_WITH_BYTES: dict[int, tuple[str, ...]] = {
    TDX_INVALID_TDMR: ("TDMR",),
    TDX_NON_ORDERED_TDMR: ("TDMR",),
    TDX_TDMR_OUTSIDE_CMRS: ("TDMR",),
    TDX_INVALID_PAMT: ("TDMR", "PAMT level"),
    TDX_PAMT_OUTSIDE_CMRS: ("TDMR", "PAMT level"),
    TDX_PAMT_OVERLAP: ("TDMR", "PAMT level", "overlapped TDMR"),
    TDX_INVALID_RESERVED_IN_TDMR: ("TDMR", "reserved area"),
    TDX_NON_ORDERED_RESERVED_IN_TDMR: ("TDMR", "reserved area"),
}

#: Class -> what its codes are about, for the codes that no modelled leaf returns.
CLASS_MEANINGS: dict[int, str] = {
    0: "general",
    1: "an operand",
    2: "something is busy",
    3: "what the page is used for",
    4: "something still depends on it",
    5: "the state of the module",
    6: "the state of the TD",
    7: "the state of the vCPU",
    8: "keys, KeyIDs and cache write-back",
    9: "what the platform reports of itself",
    10: "the layout of TDMRs, PAMTs and CMRs",
    11: "the Secure EPT",
    12: "metadata fields",
    13: "service TDs",
    14: "migration",
    16: "reports",
    17: "TD partitioning",
}

#: Code -> what it says to the caller, for every code that a modelled leaf can return.
MEANINGS: dict[int, str] = {
    TDX_SUCCESS: "done",
    UNINITIALIZE_ERROR & CODE_MASK: "the leaf wrote no status, and the module halts",
    TDX_NON_RECOVERABLE_VCPU: "this vCPU can never run again; the TD lives",
    TDX_NON_RECOVERABLE_TD: "the TD can never run again",
    TDX_INTERRUPTED_RESUMABLE: "an interrupt came; call again to go on from here",
    TDX_INTERRUPTED_RESTARTABLE: "an interrupt came; call again to start over",
    TDX_NON_RECOVERABLE_TD_NON_ACCESSIBLE: "the TD is dead and its memory cannot be reached",
    TDX_NON_RECOVERABLE_TD_WRONG_APIC_MODE: "the TD is dead: the local APIC was switched off",
    TDX_NON_RECOVERABLE_TD_CORRUPTED_MD: "the TD is dead: its control data was damaged",
    TDX_OPERAND_INVALID: "the operand's value is not legal",
    TDX_OPERAND_ADDR_RANGE_ERROR: "no initialised TDMR holds this address",
    TDX_OPERAND_BUSY: "somebody else holds the lock; try again",
    TDX_PREVIOUS_TLB_EPOCH_BUSY: "a vCPU of the previous epoch is still in the guest; make it exit",
    TDX_SYS_BUSY: "another call holds the whole module; try again",
    TDX_RND_NO_ENTROPY: "the random generator is drained; try again",
    TDX_OPERAND_BUSY_HOST_PRIORITY: "the host waits for this lock, so the guest must let it pass",
    TDX_HOST_PRIORITY_BUSY_TIMEOUT: "the guest waited too long for a lock that the host wants",
    TDX_PAGE_METADATA_INCORRECT: "the page is not of the type that this call needs",
    TDX_TD_ASSOCIATED_PAGES_EXIST: "the TD still owns pages; reclaim them first",
    TDX_SYS_INIT_NOT_PENDING: "the module was initialised before",
    TDX_SYS_LP_INIT_NOT_DONE: "this logical processor has not been initialised",
    TDX_SYS_LP_INIT_DONE: "this logical processor was initialised before",
    TDX_SYS_NOT_READY: "the module is not fully configured",
    TDX_SYS_SHUTDOWN: "the module has been shut down",
    TDX_SYS_KEY_CONFIG_NOT_PENDING: "this is not the moment to configure the global key",
    TDX_SYS_STATE_INCORRECT: "the module is in the wrong state for this call",
    TDX_SYS_INVALID_HANDOFF: "there is no usable state of a previous module",
    TDX_SYS_INCOMPATIBLE_SIGSTRUCT: "the module's signature structure is not accepted here",
    TDX_SYS_LP_INIT_NOT_PENDING: "this is not the moment to initialise a logical processor",
    TDX_SYS_CONFIG_NOT_PENDING: "this is not the moment to configure, or a processor is missing",
    TDX_INCOMPATIBLE_SEAM_CAPABILITIES: "this processor's SEAM capabilities do not fit",
    TDX_TD_FATAL: "the TD is dead",
    TDX_TD_NON_DEBUG: "only a debug TD lets the host look inside",
    TDX_TDCS_NOT_ALLOCATED: "the TD lacks control pages; add them with TDH.MNG.ADDCX",
    TDX_LIFECYCLE_STATE_INCORRECT: "the TD's life cycle is at another stage",
    TDX_OP_STATE_INCORRECT: "the TD's operational state does not allow this call",
    TDX_NO_VCPUS: "the TD has no initialised vCPU",
    TDX_TDCX_NUM_INCORRECT: "too many or too few control pages",
    TDX_VCPU_STATE_INCORRECT: "the vCPU's state does not allow this call",
    TDX_VCPU_ASSOCIATED: "the vCPU belongs to another logical processor; flush it there",
    TDX_VCPU_NOT_ASSOCIATED: "the vCPU does not belong to this logical processor",
    TDX_NO_VALID_VE_INFO: "no virtualization exception is waiting to be read",
    TDX_MAX_VCPUS_EXCEEDED: "the TD has as many vCPUs as its parameters allow",
    TDX_TSC_ROLLBACK: "the time stamp counter went backwards",
    TDX_TD_VMCS_FIELD_NOT_INITIALIZED: "another VMCS field must be written first",
    TDX_KEY_GENERATION_FAILED: "no key could be made; try again",
    TDX_TD_KEYS_NOT_CONFIGURED: "the TD's key is not, or no longer, in place on all packages",
    TDX_KEY_CONFIGURED: "this package has the key already",
    TDX_WBCACHE_NOT_COMPLETE: "some package has not written back its cache",
    TDX_HKID_NOT_FREE: "the KeyID is taken",
    TDX_NO_HKID_READY_TO_WBCACHE: "no KeyID waits for a cache write-back",
    TDX_WBCACHE_RESUME_ERROR: "there is no interrupted cache write-back to resume",
    TDX_FLUSHVP_NOT_DONE: "a vCPU is still associated with a logical processor; flush it",
    TDX_NUM_ACTIVATED_HKIDS_NOT_SUPPORTED: "the platform has more KeyIDs than the module can hold",
    TDX_LIMIT_CPUID_MAXVAL_SET: "the BIOS limits CPUID, which the module does not accept",
    TDX_INCONSISTENT_MSR: "the MSR changed or differs between processors",
    TDX_INCORRECT_MSR_VALUE: "the MSR's value does not fit",
    TDX_INVALID_TDMR: "the TDMR's base or size is not legal",
    TDX_NON_ORDERED_TDMR: "TDMRs must be ascending and apart",
    TDX_TDMR_OUTSIDE_CMRS: "unreserved memory of the TDMR lies outside all CMRs",
    TDX_TDMR_ALREADY_INITIALIZED: "nothing is left to initialise",
    TDX_INVALID_PAMT: "the PAMT's base or size is not legal",
    TDX_PAMT_OUTSIDE_CMRS: "the PAMT lies outside all CMRs",
    TDX_PAMT_OVERLAP: "the PAMT overlaps another PAMT or usable memory",
    TDX_INVALID_RESERVED_IN_TDMR: "the reserved area is not legal",
    TDX_NON_ORDERED_RESERVED_IN_TDMR: "reserved areas must be ascending and apart",
    TDX_CMR_LIST_INVALID: "the firmware's list of convertible memory is not legal",
    TDX_EPT_WALK_FAILED: "the walk ended above the requested level; see RCX and RDX",
    TDX_EPT_ENTRY_NOT_PRESENT: "nothing accessible is mapped there; see RCX and RDX",
    TDX_GPA_RANGE_NOT_BLOCKED: "block the range first",
    TDX_GPA_RANGE_ALREADY_BLOCKED: "the range was blocked before; nothing changed",
    TDX_TLB_TRACKING_NOT_DONE: "a TLB may still hold the translation; track and make vCPUs exit",
    TDX_EPT_INVALID_PROMOTE_CONDITIONS: "the 512 small pages do not make up one large page",
    TDX_PAGE_ALREADY_ACCEPTED: "the guest accepted this page before",
    TDX_PAGE_SIZE_MISMATCH: "the page is mapped with another size",
    TDX_EPT_ENTRY_STATE_INCORRECT: "the entry's state does not allow this call; see RCX and RDX",
    TDX_EPT_PAGE_NOT_FREE: "the table still has entries in use",
    TDX_METADATA_FIELD_ID_INCORRECT: "no such field",
    TDX_METADATA_FIELD_NOT_WRITABLE: "the caller may not write this field",
    TDX_METADATA_FIELD_NOT_READABLE: "the caller may not read this field",
    TDX_METADATA_FIELD_VALUE_NOT_VALID: "the field does not take this value",
    TDX_METADATA_LIST_OVERFLOW: "the list does not fit into one page",
    TDX_METADATA_WR_MASK_NOT_VALID: "the field can only be written as a whole",
    TDX_METADATA_FIRST_FIELD_ID_IN_CONTEXT: "RDX holds the first field's id; nothing was read",
}

# ---- Functions -----------------------------------------------------------------------------------


def is_error(status: int) -> bool:
    """Whether the call was refused. A dead guest that was left by TDH.VP.ENTER is not a refusal."""
    return bool(status & Status.error.mask)


def is_fatal(status: int) -> bool:
    """Whether the status says that the TD is dead."""
    return bool(status & Status.fatal.mask)


def is_recoverable(status: int) -> bool:
    """Whether the call was refused for a reason that may pass by itself or by another call.

    The module's own mark, which is not always kind: TDX_TLB_TRACKING_NOT_DONE is marked as
    non-recoverable although TDH.MEM.TRACK mends it.
    """
    return is_error(status) and not status & Status.non_recoverable.mask


def with_bytes(code: int, b0: int, b1: int = 0, b2: int = 0) -> int:
    """`code` with numbers (0..255 each) packed into its details, as TDH.SYS.CONFIG does."""
    return code + b0 + (b1 << 8) + (b2 << 16)


def _code(status: int) -> int:
    """The table's code of `status`: no details, and no flag that was added to a known code."""
    code = status & CODE_MASK
    for added in (0, Status.host_hint.mask, Status.fatal.mask):
        if code & ~added in STATUS_NAMES:
            return code & ~added
    return code


def status_name(status: int) -> str:
    """The module's name for a status of any details, or `unknown status 0x...`."""
    return STATUS_NAMES.get(_code(status), f"unknown status {status:#018x}")


def operand_name(status: int) -> str | None:
    """The operand or resource that a status blames: `RCX`, `TDR` ...; None where it blames none."""
    code, operand_id = _code(status), status & DETAILS_MASK
    if code not in _WITH_OPERAND or (operand_id == OPERAND_ID_RAX and code != TDX_OPERAND_INVALID):
        return None
    return OPERAND_NAMES.get(operand_id, f"operand {operand_id}")


def _details_text(status: int) -> str | None:
    """The details in words; None where there is nothing to say."""
    code, details = _code(status), status & DETAILS_MASK
    if code in _WITH_OPERAND:
        return operand_name(status)
    if code in _WITH_MSR:
        return f"MSR {details:#x}"
    if code in _WITH_LEVEL:
        return f"level {details}"
    if code in _WITH_VM_AND_LEVEL:
        return f"VM {details >> 16}, level {details & 0xFFFF}"
    if code in _WITH_BYTES:
        names, numbers = _WITH_BYTES[code], details.to_bytes(4, "little")
        return ", ".join(f"{name} {number}" for name, number in zip(names, numbers, strict=False))
    if code in _TD_EXITS and (details or code != TDX_SUCCESS):
        reason = details & EXIT_REASON_MASK
        return f"exit reason {reason}, {EXIT_REASON_NAMES.get(reason, 'see the SDM')}"
    return f"{details:#x}" if details else None


def describe(status: int) -> str:
    """A status for people: `TDX_OPERAND_BUSY (TDR): somebody else holds the lock; try again`.

    status: RAX, 0..2**64 - 1. A code that no modelled leaf returns is described by its class. A
    success with details is read as an exit of TDH.VP.ENTER.
    """
    code = _code(status)
    if code not in STATUS_NAMES:
        return status_name(status)
    meaning = MEANINGS.get(code) or f"about {CLASS_MEANINGS[Status(code).class_]}; not modelled"
    if code == TDX_SUCCESS and status & DETAILS_MASK:
        meaning = "the vCPU has left the guest"
    details = _details_text(status)
    return f"{status_name(status)}{f' ({details})' if details else ''}: {meaning}"
