"""Where a TD's and a vCPU's control structures lie in their pages.

The module keeps all state of a TD in pages that the host gave it: the TDR, the TDCS pages
(TDH.MNG.ADDCX), and for each vCPU the TDVPR and its pages (TDH.VP.ADDCX). So does the model: a
field is a 64-bit word of the page's frame in `Memory`. A page that is zeroed, or that is reclaimed
and given to somebody else, therefore loses or keeps its fields just as the real one does.

Source: TDX module 1.5.01, tdx_tdr.h, td_control_structures.h, tdx_tdvps.h.
Differs: the word numbers are ours; which page a group of fields lies in follows the module, and
bit-packed fields have a word each.
"""

from __future__ import annotations

from tdxlab.memory import Memory

MAX_TDCX = 9
MIN_TDCX = 6
MAX_TDVPS_PAGES = 15
MIN_TDVPS_PAGES = 6
TDVPS_PAGES_PER_L2_VM = 3
SEPT_ROOT_PAGE = 3

NO_LP = 0xFFFF_FFFF
NO_POSTED_VECTOR = 0xFFFF

#: Filling of the TDCS pages by index; the others are zeroed.
ALL_ONES = b"\xff" * 4096


class Tdr:
    """Words of the TDR page."""

    FATAL = 0
    NUM_TDCX = 1
    CHLDCNT = 2
    LIFECYCLE = 3
    HKID = 4
    PKG_CONFIG_BITMAP = 5
    TDCX_PA = 8  # 9 words
    UUID = 20  # 4 words


#: Read at nearly every SEAMCALL, so not looked up in its class each time.
_TDCX_PA = Tdr.TDCX_PA


class Tdcs:
    """Words of the first TDCS page (TDCX index 0)."""

    OP_STATE = 0
    OP_STATE_LOCK = 1
    NUM_VCPUS = 2
    NUM_ASSOC_VCPUS = 3
    SEPT_LOCK = 4
    EPOCH_LOCK = 5
    TD_EPOCH = 6
    REFCOUNT = 7  # 2 words, by parity of the epoch
    RTMR_LOCK = 9
    ATTRIBUTES = 10
    XFAM = 11
    MAX_VCPUS = 12
    NUM_L2_VMS = 13
    GPAW = 14  # flag: 0 is 48 bits, 1 is 52
    EPTP = 15
    CONFIG_FLAGS = 16
    TSC_FREQUENCY = 17
    TD_CTLS = 18
    NOTIFY_ENABLES = 19
    HP_LOCK_TIMEOUT = 20
    VM_CTLS = 21  # 4 words
    MSR_CONFIG_CTLS = 27
    ARCH_CAPABILITIES = 28
    MRTD = 32  # 6 words
    MRCONFIGID = 38
    MROWNER = 44
    MROWNERCONFIG = 50
    RTMR = 56  # 4 times 6 words
    SERVTD_HASH = 80
    CPUID_CONFIG = 128  # 24 words: 12 entries of EAX, EBX, ECX, EDX


class Tdvps:
    """Words of the TDVPR page, the first page of a vCPU's state."""

    STATE = 0
    NUM_PAGES = 1
    INDEX = 2
    ASSOC_LPID = 3
    VCPU_EPOCH = 4
    LAST_TD_EXIT = 5
    EPF_COUNTER = 6
    EPF_COUNT = 7
    RIP = 8
    RIP_AT_ENTRY = 9
    VE_VALID = 10
    VE_REASON = 11
    VE_QUALIFICATION = 12
    VE_GLA = 13
    VE_GPA = 14
    VE_INFO = 15
    PAGE_PA = 16  # 15 words
    CPUID_SUPERVISOR_VE = 31
    CPUID_USER_VE = 32
    PEND_NMI = 33
    POSTED_VECTOR = 34
    POSTED_DESCRIPTOR = 35
    SHARED_EPTP = 36
    PIN_CONTROLS = 37
    SECONDARY_CONTROLS = 38
    INSTRUCTION_TIMEOUT = 39
    HP_BUSY = 40
    PENDING_EVENT = 41
    VMCALL_MASK = 42
    GPRS = 48  # 16 words, in the order of GPR_NAMES
    EPF_GPAS = 64  # 32 words


#: Kinds of the last TD exit (Tdvps.LAST_TD_EXIT).
EXIT_FAULT_LIKE, EXIT_TRAP_LIKE, EXIT_VMCALL = 0, 1, 2

#: The guest's registers in the order of TDVPS, which is the order of the bits in a VMCALL mask.
GPR_NAMES = (
    *("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi"),
    *("r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"),
)

ATTRIBUTES_DEBUG = 1 << 0
ATTRIBUTES_SEPT_VE_DISABLE = 1 << 28
ATTRIBUTES_MIGRATABLE = 1 << 29
ATTRIBUTES_PERFMON = 1 << 63

CONFIG_GPAW = 1 << 0
CONFIG_FLEXIBLE_PENDING_VE = 1 << 1
CONFIG_NO_RBP_MOD = 1 << 2

TD_CTLS_PENDING_VE_DISABLE = 1 << 0


class Td:
    """A TD as a leaf sees it: the HPAs and frames of its control structures.

    tdr: HPA of the TDR; page: word index of its frame; hkid: its KeyID; tdcs_hpa, tdcs: HPA of the
    first TDCS page and word index of its frame, both 0 until mapped.
    """

    __slots__ = ("_memory", "page", "tdcs", "tdcs_hpa", "tdr")

    def __init__(self, memory: Memory, tdr: int) -> None:
        self._memory = memory
        self.tdr = tdr
        self.page: int = memory.frames[tdr]
        self.tdcs = self.tdcs_hpa = 0

    @property
    def hkid(self) -> int:
        """What the TDR says of its KeyID."""
        return self._memory.words.view[self.page + Tdr.HKID]

    def map_tdcs(self, memory: Memory) -> None:
        """Find the first TDCS page; the TD must have it."""
        pa = memory.words.view[self.page + _TDCX_PA]
        self.tdcs_hpa = hpa = pa & memory.page_mask
        self.tdcs = memory.frames[hpa]
