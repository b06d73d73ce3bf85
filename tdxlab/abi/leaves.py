"""The functions of the TDX module: numbers, names, operands.

TDH leaves are called by the host with SEAMCALL, TDG leaves by the guest with TDCALL. The caller
puts the leaf's number and version into RAX.

Source: TDX module 1.5.01, tdx_api_defs.h (numbers), tdx_vmm_dispatcher.c and tdx_td_dispatcher.c
(versions), one file per leaf (operands).
Differs: migration, service-TD and partitioning leaves, and the guest leaves for metadata and page
attributes, are listed by name and not modelled.
"""

from __future__ import annotations

from typing import NamedTuple

from tdxlab.bits import Bits, Word


class Rax(Word):
    """RAX on the way in: which leaf, in which version."""

    leaf = Bits(15, 0)
    version = Bits(23, 16)
    must_be_zero = Bits(63, 24)


# ---- Host leaves (SEAMCALL) ----------------------------------------------------------------------
# Number 42, TDH.MEM.SEPT.WR, has a name in the module and no code: it is refused as unknown.

TDH_VP_ENTER = 0
TDH_MNG_ADDCX = 1
TDH_MEM_PAGE_ADD = 2
TDH_MEM_SEPT_ADD = 3
TDH_VP_ADDCX = 4
TDH_MEM_PAGE_RELOCATE = 5
TDH_MEM_PAGE_AUG = 6
TDH_MEM_RANGE_BLOCK = 7
TDH_MNG_KEY_CONFIG = 8
TDH_MNG_CREATE = 9
TDH_VP_CREATE = 10
TDH_MNG_RD = 11
TDH_MEM_RD = 12
TDH_MNG_WR = 13
TDH_MEM_WR = 14
TDH_MEM_PAGE_DEMOTE = 15
TDH_MR_EXTEND = 16
TDH_MR_FINALIZE = 17
TDH_VP_FLUSH = 18
TDH_MNG_VPFLUSHDONE = 19
TDH_MNG_KEY_FREEID = 20
TDH_MNG_INIT = 21
TDH_VP_INIT = 22
TDH_MEM_PAGE_PROMOTE = 23
TDH_PHYMEM_PAGE_RDMD = 24
TDH_MEM_SEPT_RD = 25
TDH_VP_RD = 26
TDH_MNG_KEY_RECLAIMID = 27
TDH_PHYMEM_PAGE_RECLAIM = 28
TDH_MEM_PAGE_REMOVE = 29
TDH_MEM_SEPT_REMOVE = 30
TDH_SYS_KEY_CONFIG = 31
TDH_SYS_INFO = 32
TDH_SYS_INIT = 33
TDH_SYS_RD = 34
TDH_SYS_LP_INIT = 35
TDH_SYS_TDMR_INIT = 36
TDH_SYS_RDALL = 37
TDH_MEM_TRACK = 38
TDH_MEM_RANGE_UNBLOCK = 39
TDH_PHYMEM_CACHE_WB = 40
TDH_PHYMEM_PAGE_WBINVD = 41
TDH_VP_WR = 43
TDH_SYS_LP_SHUTDOWN = 44
TDH_SYS_CONFIG = 45
TDH_SERVTD_BIND = 48
TDH_SERVTD_PREBIND = 49
TDH_SYS_SHUTDOWN = 52
TDH_SYS_UPDATE = 53
TDH_EXPORT_ABORT = 64
TDH_EXPORT_BLOCKW = 65
TDH_EXPORT_RESTORE = 66
TDH_EXPORT_MEM = 68
TDH_EXPORT_PAUSE = 70
TDH_EXPORT_TRACK = 71
TDH_EXPORT_STATE_IMMUTABLE = 72
TDH_EXPORT_STATE_TD = 73
TDH_EXPORT_STATE_VP = 74
TDH_EXPORT_UNBLOCKW = 75
TDH_IMPORT_ABORT = 80
TDH_IMPORT_END = 81
TDH_IMPORT_COMMIT = 82
TDH_IMPORT_MEM = 83
TDH_IMPORT_TRACK = 84
TDH_IMPORT_STATE_IMMUTABLE = 85
TDH_IMPORT_STATE_TD = 86
TDH_IMPORT_STATE_VP = 87
TDH_MIG_STREAM_CREATE = 96

# ---- Guest leaves (TDCALL) -----------------------------------------------------------------------

TDG_VP_VMCALL = 0
TDG_VP_INFO = 1
TDG_MR_RTMR_EXTEND = 2
TDG_VP_VEINFO_GET = 3
TDG_MR_REPORT = 4
TDG_VP_CPUIDVE_SET = 5
TDG_MEM_PAGE_ACCEPT = 6
TDG_VM_RD = 7
TDG_VM_WR = 8
TDG_VP_RD = 9
TDG_VP_WR = 10
TDG_SYS_RD = 11
TDG_SYS_RDALL = 12
TDG_SERVTD_RD = 18
TDG_SERVTD_WR = 20
TDG_MR_VERIFYREPORT = 22
TDG_MEM_PAGE_ATTR_RD = 23
TDG_MEM_PAGE_ATTR_WR = 24
TDG_VP_ENTER = 25
TDG_VP_INVEPT = 26
TDG_VP_INVVPID = 27

# ---- What each leaf does -------------------------------------------------------------------------


class Leaf(NamedTuple):
    """What the interface says of one leaf; register names are those of `Registers`.

    versions: those that the leaf takes. inputs, outputs: register -> what it holds before the call
    and after a success. After a refusal that concerns a Secure EPT entry, the leaves of group
    "memory" show that entry in RCX and its level and state in RDX. Operands of leaves that are not
    modelled are left out.
    """

    number: int
    name: str
    group: str
    summary: str
    modelled: bool
    versions: tuple[int, ...]
    inputs: dict[str, str]
    outputs: dict[str, str]


#: First part of the name, after TDH or TDG -> the group.
GROUPS: dict[str, str] = {
    "SYS": "system",
    "MNG": "td",
    "VM": "td",
    "VP": "vcpu",
    "MEM": "memory",
    "MR": "measurement",
    "PHYMEM": "physical memory",
    "SERVTD": "service td",
    "EXPORT": "migration",
    "IMPORT": "migration",
    "MIG": "migration",
}


def _leaf(
    number: int,
    name: str,
    summary: str,
    inputs: dict[str, str] | None = None,
    outputs: dict[str, str] | None = None,
    *,
    versions: tuple[int, ...] = (0,),
    modelled: bool = True,
) -> Leaf:
    """One row; the group follows from the name."""
    group = GROUPS[name.split(".")[1]]
    return Leaf(number, name, group, summary, modelled, versions, inputs or {}, outputs or {})


def _named(number: int, name: str, summary: str, *, versions: tuple[int, ...] = (0,)) -> Leaf:
    """One row of a leaf that is not modelled."""
    return _leaf(number, name, summary, versions=versions, modelled=False)


_TDR = "HPA of the TDR page"
_TDVPR = "HPA of the TDVPR page"
_ENTRY = {"rcx": "GPA, with the level in bits 2:0", "rdx": _TDR}
_NOTHING_LEFT = {"rcx": "0", "rdx": "0"}
_ENTRY_SHOWN = {"rcx": "the entry as the host may see it", "rdx": "level 2:0, state 15:8"}
_L2_TABLES = {"r9": "version 1: table of L2 VM 1, or all ones", "r10": "VM 2", "r11": "VM 3"}
_L2_TABLES_OUT = {"r9": "version 1: like R8, for L2 VM 1", "r10": "VM 2", "r11": "VM 3"}
_L2_TABLES_FREED = {"r9": "version 1: all ones without L2 VMs", "r10": "like R9", "r11": "like R9"}
_FIELD_ASKED = {"rdx": "field id, or all ones for the first one"}
_FIELD_WRITTEN = {"rdx": "field id", "r8": "new value", "r9": "bits to be written"}
_DEMOTE_TABLES = {
    "r8": "HPA of the new table",
    "r9": "table of L2 VM 1, ignored without L2 VMs",
    "r10": "VM 2",
    "r11": "VM 3",
}
_OLD_VALUE = {"r8": "old value"}
_FIELD_WRITE = {"rdx": "field id", "r8": "new value", "r9": "mask of the bits to write"}
_FIELD_READ = {"r8": "value", "rdx": "version 1: id of the next field"}
_PAGE_OF = {"rcx": "page type", "rdx": "HPA of the owner's TDR", "r8": "size: 0 4K, 1 2M, 2 1G"}

_SYSTEM = (
    _leaf(
        TDH_SYS_INIT,
        "TDH.SYS.INIT",
        "check the platform and initialise the module, once",
        {"rcx": "attributes, 0"},
        {"rcx": "0", "rdx": "0", "r8": "0", "r9": "0", "r10": "0"},
    ),
    _leaf(
        TDH_SYS_LP_INIT,
        "TDH.SYS.LP.INIT",
        "initialise the calling logical processor, once",
        outputs={"rcx": "0", "rdx": "0", "r8": "0"},
    ),
    _leaf(
        TDH_SYS_INFO,
        "TDH.SYS.INFO",
        "write the module's properties and the list of CMRs to host memory",
        {
            "rcx": "HPA of the buffer for the properties, 1024-byte aligned",
            "rdx": "its size in bytes, at least 1024",
            "r8": "HPA of the buffer for the CMRs, 512-byte aligned",
            "r9": "room for that many CMRs, at least 32",
        },
        {"rdx": "bytes written, 1024", "r9": "CMRs written, 32"},
    ),
    _leaf(
        TDH_SYS_RD,
        "TDH.SYS.RD",
        "read one metadata field of the module",
        {"rdx": "field id, or all ones for the first"},
        {"r8": "value", "rdx": "id of the next field"},
    ),
    _leaf(
        TDH_SYS_RDALL,
        "TDH.SYS.RDALL",
        "write all metadata fields of the module to a page of host memory",
        {"rdx": "HPA of the page", "r8": "id of the first field, or all ones"},
        {"r8": "id of the next field, or all ones"},
    ),
    _leaf(
        TDH_SYS_CONFIG,
        "TDH.SYS.CONFIG",
        "say which memory TDs may use, where the PAMTs lie, and the module's own KeyID",
        {
            "rcx": "HPA of an array of HPAs of TDMR_INFO, 512-byte aligned",
            "rdx": "number of TDMRs, 1..64",
            "r8": "global KeyID, 16 bits",
        },
    ),
    _leaf(TDH_SYS_KEY_CONFIG, "TDH.SYS.KEY.CONFIG", "make the global key on the calling package"),
    _leaf(
        TDH_SYS_TDMR_INIT,
        "TDH.SYS.TDMR.INIT",
        "initialise the PAMT of the next 4 MiB of a TDMR",
        {"rcx": "base of the TDMR, an HPA"},
        {"rdx": "address reached, rounded down to 1 GiB"},
    ),
    _leaf(TDH_SYS_LP_SHUTDOWN, "TDH.SYS.LP.SHUTDOWN", "do nothing, with success"),
    _leaf(
        TDH_SYS_SHUTDOWN,
        "TDH.SYS.SHUTDOWN",
        "stop the module and leave its state for a successor",
        {"rcx": "version of the hand-off data"},
    ),
    _leaf(TDH_SYS_UPDATE, "TDH.SYS.UPDATE", "take over the state that a predecessor left"),
)

_TD = (
    _leaf(
        TDH_MNG_CREATE,
        "TDH.MNG.CREATE",
        "make a free page the root of a new TD and reserve a KeyID for it",
        {"rcx": "HPA of the new TDR page", "rdx": "private KeyID, 16 bits"},
    ),
    _leaf(
        TDH_MNG_KEY_CONFIG,
        "TDH.MNG.KEY.CONFIG",
        "make the TD's key on the calling package",
        {"rcx": _TDR},
    ),
    _leaf(
        TDH_MNG_ADDCX,
        "TDH.MNG.ADDCX",
        "give the TD one more page for its control structure",
        {"rcx": "HPA of the new TDCX page", "rdx": _TDR},
    ),
    _leaf(
        TDH_MNG_INIT,
        "TDH.MNG.INIT",
        "initialise the TD from its parameters",
        {"rcx": _TDR, "rdx": "HPA of TD_PARAMS in host memory, 1024-byte aligned"},
        {"rcx": "0"},
    ),
    _leaf(
        TDH_MNG_RD,
        "TDH.MNG.RD",
        "read one metadata field of the TD",
        {"rcx": _TDR, "rdx": "field id; version 1: all ones for the first"},
        _FIELD_READ,
        versions=(0, 1),
    ),
    _leaf(
        TDH_MNG_WR,
        "TDH.MNG.WR",
        "write one metadata field of the TD",
        {"rcx": _TDR} | _FIELD_WRITE,
        _OLD_VALUE,
    ),
    _leaf(
        TDH_MNG_VPFLUSHDONE,
        "TDH.MNG.VPFLUSHDONE",
        "end the TD's work: no vCPU is associated, the KeyID's caches must be written back",
        {"rcx": _TDR},
    ),
    _leaf(
        TDH_MNG_KEY_FREEID,
        "TDH.MNG.KEY.FREEID",
        "give the KeyID back; the TD's pages may be reclaimed from now on",
        {"rcx": _TDR},
    ),
    _leaf(
        TDH_MNG_KEY_RECLAIMID,
        "TDH.MNG.KEY.RECLAIMID",
        "do nothing, with success; the operand is not looked at",
        {"rcx": _TDR},
    ),
)

_VCPU = (
    _leaf(
        TDH_VP_CREATE,
        "TDH.VP.CREATE",
        "make a free page the root of a new vCPU",
        {"rcx": "HPA of the new TDVPR page", "rdx": _TDR},
    ),
    _leaf(
        TDH_VP_ADDCX,
        "TDH.VP.ADDCX",
        "give the vCPU one more page for its state",
        {"rcx": "HPA of the new TDCX page", "rdx": _TDVPR},
    ),
    _leaf(
        TDH_VP_INIT,
        "TDH.VP.INIT",
        "initialise the vCPU and associate it with the calling logical processor",
        {"rcx": _TDVPR, "rdx": "the guest's first RCX and R8"},
    ),
    _leaf(
        TDH_VP_ENTER,
        "TDH.VP.ENTER",
        "run the guest on this vCPU until something makes it leave",
        {"rcx": "HPA of the TDVPR page; bit 52 recoverability hint, bit 53 resume L1"},
        {
            "rcx": "exit qualification",
            "rdx": "extended exit qualification",
            "r8": "GPA, page aligned after an EPT violation",
            "r9": "interruption information",
        },
    ),
    _leaf(
        TDH_VP_FLUSH,
        "TDH.VP.FLUSH",
        "end the vCPU's association with the calling logical processor",
        {"rcx": _TDVPR},
    ),
    _leaf(
        TDH_VP_RD,
        "TDH.VP.RD",
        "read one metadata field of the vCPU, and associate it",
        {"rcx": _TDVPR, "rdx": "field id; version 1: all ones for the first"},
        _FIELD_READ,
        versions=(0, 1),
    ),
    _leaf(
        TDH_VP_WR,
        "TDH.VP.WR",
        "write one metadata field of the vCPU, and associate it",
        {"rcx": _TDVPR} | _FIELD_WRITE,
        _OLD_VALUE,
    ),
)

_MEMORY = (
    _leaf(
        TDH_MEM_SEPT_ADD,
        "TDH.MEM.SEPT.ADD",
        "link a new table into the Secure EPT",
        {
            "rcx": "GPA, with the level of the linking entry in bits 2:0",
            "rdx": "HPA of the TDR page; bit 0: a table that is there already is no error",
            "r8": "HPA of the new table; version 1: all ones for none",
        }
        | _L2_TABLES,
        _NOTHING_LEFT | {"r8": "version 1: all ones when used, else bit 63 set"} | _L2_TABLES_OUT,
        versions=(0, 1),
    ),
    _leaf(
        TDH_MEM_SEPT_REMOVE,
        "TDH.MEM.SEPT.REMOVE",
        "unlink an empty table from the Secure EPT",
        _ENTRY,
        {"rcx": "HPA of the table", "rdx": "0"} | _L2_TABLES_FREED,
        versions=(0, 1),
    ),
    _leaf(
        TDH_MEM_SEPT_RD,
        "TDH.MEM.SEPT.RD",
        "show one entry of the Secure EPT",
        {"rcx": _ENTRY["rcx"], "rdx": "HPA of the TDR page; bit 0: L2 attributes too"},
        _ENTRY_SHOWN | {"r8": "L2 attributes where asked for, else as given"},
    ),
    _leaf(
        TDH_MEM_PAGE_ADD,
        "TDH.MEM.PAGE.ADD",
        "copy a page into a TD under construction and measure its address",
        _ENTRY | {"r8": "HPA of the new page", "r9": "HPA of the source page in host memory"},
        _NOTHING_LEFT,
    ),
    _leaf(
        TDH_MEM_PAGE_AUG,
        "TDH.MEM.PAGE.AUG",
        "map a 4 KiB or 2 MiB page that the guest has yet to accept",
        _ENTRY | {"r8": "HPA of the new page, aligned to its size"},
        _NOTHING_LEFT,
    ),
    _leaf(
        TDH_MEM_PAGE_REMOVE,
        "TDH.MEM.PAGE.REMOVE",
        "unmap a page and set it free",
        _ENTRY,
        {"rcx": "HPA of the page", "rdx": "0"},
    ),
    _leaf(
        TDH_MEM_PAGE_RELOCATE,
        "TDH.MEM.PAGE.RELOCATE",
        "move a 4 KiB page to another physical page",
        _ENTRY | {"r8": "HPA of the new page"},
        {"rcx": "HPA of the old page", "rdx": "0"},
    ),
    _leaf(
        TDH_MEM_PAGE_PROMOTE,
        "TDH.MEM.PAGE.PROMOTE",
        "merge 512 adjacent pages into a large one and set their table free",
        _ENTRY,
        {"rcx": "HPA of the table", "rdx": "0"} | _L2_TABLES_FREED,
        versions=(0, 1),
    ),
    _leaf(
        TDH_MEM_PAGE_DEMOTE,
        "TDH.MEM.PAGE.DEMOTE",
        "split a large page into 512 small ones under a new table",
        _ENTRY | _DEMOTE_TABLES,
        _NOTHING_LEFT | {"r9": "as given", "r10": "as given", "r11": "as given"},
    ),
    _leaf(
        TDH_MEM_RANGE_BLOCK,
        "TDH.MEM.RANGE.BLOCK",
        "take all access from a page or a whole table, and note the TD epoch",
        _ENTRY,
        _NOTHING_LEFT,
    ),
    _leaf(
        TDH_MEM_RANGE_UNBLOCK,
        "TDH.MEM.RANGE.UNBLOCK",
        "undo a block, after TLB tracking",
        _ENTRY,
        _NOTHING_LEFT,
    ),
    _leaf(TDH_MEM_TRACK, "TDH.MEM.TRACK", "begin a new TD epoch", {"rcx": _TDR}),
    _leaf(
        TDH_MEM_RD,
        "TDH.MEM.RD",
        "read 8 bytes of a debug TD",
        {"rcx": "GPA, 8-byte aligned", "rdx": _TDR},
        _NOTHING_LEFT | {"r8": "value"},
    ),
    _leaf(
        TDH_MEM_WR,
        "TDH.MEM.WR",
        "write 8 bytes of a debug TD",
        {"rcx": "GPA, 8-byte aligned", "rdx": _TDR, "r8": "new value"},
        _NOTHING_LEFT | _OLD_VALUE,
    ),
)

_MEASUREMENT = (
    _leaf(
        TDH_MR_EXTEND,
        "TDH.MR.EXTEND",
        "measure 256 bytes of a mapped page into MRTD",
        {"rcx": "GPA, 256-byte aligned", "rdx": _TDR},
        _NOTHING_LEFT,
    ),
    _leaf(
        TDH_MR_FINALIZE,
        "TDH.MR.FINALIZE",
        "close MRTD and let the TD run",
        {"rcx": _TDR},
    ),
)

_PHYSICAL_MEMORY = (
    _leaf(
        TDH_PHYMEM_PAGE_RDMD,
        "TDH.PHYMEM.PAGE.RDMD",
        "show what a physical page is used for",
        {"rcx": "HPA of the page"},
        _PAGE_OF | {"r9": "TD epoch of its last block", "r10": "0", "r11": "0"},
    ),
    _leaf(
        TDH_PHYMEM_PAGE_RECLAIM,
        "TDH.PHYMEM.PAGE.RECLAIM",
        "take a page away from a TD in teardown",
        {"rcx": "HPA of the page"},
        _PAGE_OF | {"r9": "0", "r10": "0", "r11": "0"},
    ),
    _leaf(
        TDH_PHYMEM_PAGE_WBINVD,
        "TDH.PHYMEM.PAGE.WBINVD",
        "write back and drop the cache lines of a free page",
        {"rcx": "HPA of the page, with the KeyID in its upper bits"},
    ),
    _leaf(
        TDH_PHYMEM_CACHE_WB,
        "TDH.PHYMEM.CACHE.WB",
        "write back the calling package's caches; an interrupt may cut it short",
        {"rcx": "0 start, 1 resume"},
    ),
)

_HOST_UNMODELLED = (
    _named(TDH_SERVTD_BIND, "TDH.SERVTD.BIND", "bind a service TD to a TD"),
    _named(TDH_SERVTD_PREBIND, "TDH.SERVTD.PREBIND", "announce the service TD to come"),
    _named(TDH_EXPORT_ABORT, "TDH.EXPORT.ABORT", "give up an export"),
    _named(TDH_EXPORT_BLOCKW, "TDH.EXPORT.BLOCKW", "block writes to pages before their export"),
    _named(TDH_EXPORT_RESTORE, "TDH.EXPORT.RESTORE", "clear export states after a failed export"),
    _named(TDH_EXPORT_MEM, "TDH.EXPORT.MEM", "export pages"),
    _named(TDH_EXPORT_PAUSE, "TDH.EXPORT.PAUSE", "stop the TD for the last part of its export"),
    _named(TDH_EXPORT_TRACK, "TDH.EXPORT.TRACK", "end a migration epoch of the export"),
    _named(TDH_EXPORT_STATE_IMMUTABLE, "TDH.EXPORT.STATE.IMMUTABLE", "begin an export"),
    _named(TDH_EXPORT_STATE_TD, "TDH.EXPORT.STATE.TD", "export the TD's state"),
    _named(TDH_EXPORT_STATE_VP, "TDH.EXPORT.STATE.VP", "export a vCPU's state"),
    _named(TDH_EXPORT_UNBLOCKW, "TDH.EXPORT.UNBLOCKW", "allow writes to a page again"),
    _named(TDH_IMPORT_ABORT, "TDH.IMPORT.ABORT", "give up an import"),
    _named(TDH_IMPORT_END, "TDH.IMPORT.END", "finish an import"),
    _named(TDH_IMPORT_COMMIT, "TDH.IMPORT.COMMIT", "let the imported TD run before all is there"),
    _named(TDH_IMPORT_MEM, "TDH.IMPORT.MEM", "import pages"),
    _named(TDH_IMPORT_TRACK, "TDH.IMPORT.TRACK", "end a migration epoch of the import"),
    _named(TDH_IMPORT_STATE_IMMUTABLE, "TDH.IMPORT.STATE.IMMUTABLE", "begin an import"),
    _named(TDH_IMPORT_STATE_TD, "TDH.IMPORT.STATE.TD", "import the TD's state"),
    _named(TDH_IMPORT_STATE_VP, "TDH.IMPORT.STATE.VP", "import a vCPU's state"),
    _named(TDH_MIG_STREAM_CREATE, "TDH.MIG.STREAM.CREATE", "create a migration stream"),
)

_GUEST = (
    _leaf(
        TDG_VP_VMCALL,
        "TDG.VP.VMCALL",
        "leave to the host with chosen registers",
        {"rcx": "bit n passes register n (31:16: XMM); others as the two sides agree"},
    ),
    _leaf(
        TDG_VP_INFO,
        "TDG.VP.INFO",
        "ask for the TD's basic properties",
        outputs={
            "rcx": "GPA width, 48 or 52",
            "rdx": "ATTRIBUTES",
            "r8": "vCPUs 31:0, most vCPUs 63:32",
            "r9": "index of this vCPU",
            "r10": "1: TDG.SYS.RD is there",
            "r11": "0",
        },
    ),
    _leaf(
        TDG_MR_RTMR_EXTEND,
        "TDG.MR.RTMR.EXTEND",
        "extend a run-time measurement register",
        {"rcx": "GPA of 48 bytes, 64-byte aligned, private", "rdx": "register, 0..3"},
    ),
    _leaf(
        TDG_VP_VEINFO_GET,
        "TDG.VP.VEINFO.GET",
        "read why the last virtualization exception came, and let the next one come",
        outputs={
            "rcx": "exit reason",
            "rdx": "exit qualification",
            "r8": "guest linear address",
            "r9": "GPA",
            "r10": "instruction length 31:0, information 63:32",
        },
    ),
    _leaf(
        TDG_MR_REPORT,
        "TDG.MR.REPORT",
        "write a report of the TD's measurements",
        {
            "rcx": "GPA of the report, 1024-byte aligned",
            "rdx": "GPA of 64 bytes of the guest's own, 64-byte aligned",
            "r8": "sub-type, 0",
        },
    ),
    _leaf(
        TDG_VP_CPUIDVE_SET,
        "TDG.VP.CPUIDVE.SET",
        "ask for an exception on every CPUID",
        {"rcx": "bit 0: in supervisor mode, bit 1: in user mode"},
    ),
    _leaf(
        TDG_MEM_PAGE_ACCEPT,
        "TDG.MEM.PAGE.ACCEPT",
        "accept a pending page: zero it and make it usable",
        {"rcx": "GPA, with the level (0 or 1) in bits 2:0"},
    ),
    _leaf(
        TDG_VM_RD,
        "TDG.VM.RD",
        "read one metadata field of the TD",
        {"rcx": "0", **_FIELD_ASKED},
        {"r8": "value, 0 on errors", "rdx": "version 1: next field id"},
        versions=(0, 1),
    ),
    _leaf(
        TDG_VM_WR,
        "TDG.VM.WR",
        "write one metadata field of the TD",
        {"rcx": "0", **_FIELD_WRITTEN},
        {"r8": "old value, 0 on errors"},
    ),
    _leaf(
        TDG_VP_RD,
        "TDG.VP.RD",
        "read one metadata field of this vCPU",
        {"rcx": "0", **_FIELD_ASKED},
        {"r8": "value, 0 on errors", "rdx": "next field id"},
    ),
    _leaf(
        TDG_VP_WR,
        "TDG.VP.WR",
        "write one metadata field of this vCPU",
        {"rcx": "0", **_FIELD_WRITTEN},
        {"r8": "old value, 0 on errors"},
    ),
    _leaf(
        TDG_SYS_RD,
        "TDG.SYS.RD",
        "read one metadata field of the module",
        _FIELD_ASKED,
        {"r8": "value, 0 on errors", "rdx": "next field id"},
    ),
    _leaf(
        TDG_SYS_RDALL,
        "TDG.SYS.RDALL",
        "write all metadata fields of the module to a page",
        {"rdx": "GPA of the page, 4 KiB aligned, private", "r8": "first field id, or all ones"},
        {"r8": "all ones: nothing is left to read"},
    ),
    _named(TDG_SERVTD_RD, "TDG.SERVTD.RD", "read one metadata field of a bound TD"),
    _named(TDG_SERVTD_WR, "TDG.SERVTD.WR", "write one metadata field of a bound TD"),
    _named(TDG_MR_VERIFYREPORT, "TDG.MR.VERIFYREPORT", "check a report made on this platform"),
    _named(TDG_MEM_PAGE_ATTR_RD, "TDG.MEM.PAGE.ATTR.RD", "read a page's attributes"),
    _named(TDG_MEM_PAGE_ATTR_WR, "TDG.MEM.PAGE.ATTR.WR", "write a page's attributes"),
    _named(TDG_VP_ENTER, "TDG.VP.ENTER", "run a nested (L2) guest"),
    _named(TDG_VP_INVEPT, "TDG.VP.INVEPT", "flush translations of nested guests"),
    _named(TDG_VP_INVVPID, "TDG.VP.INVVPID", "flush linear translations of a nested guest"),
)

_HOST = (
    *_SYSTEM,
    *_TD,
    *_VCPU,
    *_MEMORY,
    *_MEASUREMENT,
    *_PHYSICAL_MEMORY,
    *_HOST_UNMODELLED,
)

#: SEAMCALL leaves by number, in the order of a TD's life.
HOST_LEAVES: dict[int, Leaf] = {row.number: row for row in _HOST}
#: TDCALL leaves by number.
GUEST_LEAVES: dict[int, Leaf] = {row.number: row for row in _GUEST}
