"""Which leaf is legal in which state, and what it turns the state into: data only.

Five kinds of state meet here: Secure EPT entries, the operational state of a TD, life cycles (of
the system, a TD, a vCPU, a KeyID) and the page types of the PAMT. Values are the module's own, as
plain ints; leaf numbers are those of `tdxlab.abi.leaves`.

Source: TDX module 1.5.01, sept_state_lookup.c, op_state_lookup.c, td_control_structures.h,
tdx_tdvps.h, tdx_global_data.h, pamt_manager.h.
Differs: the migration states and rows are listed because they are in the module's tables; no
modelled leaf leads to one of them. Secure EPT entries of nested (L2) VMs are left out.
"""

from __future__ import annotations

from typing import NamedTuple

from tdxlab.abi import leaves as leaf

# ---- Secure EPT entry states ------------------------------------------------------------------
#
#   bit 56   55   54    53   ...  9   ...  7   6
#      TDP  TDB  TDBW  TDEX       D       PS  IPAT     the seven bits that spell the state
#
# TDP pending, TDB blocked, TDBW write-blocked, TDEX exported, D dirty since exported, PS leaf.
# FREE is not zero: zero is NL_MAPPED, a link to a table.
# Source: TDX module 1.5.01, sept_manager.h, SEPT_CONVERT_TO_ENCODING; x86_defs.h, ia32e_sept_t.

SEPT_STATE_MASK = 0x01E0_0000_0000_02C0

FREE_BITS = 0x00E0_0000_0000_0000
REMOVED_BITS = 0x00C0_0000_0000_0000
NL_MAPPED_BITS = 0x0000_0000_0000_0000
NL_BLOCKED_BITS = 0x0080_0000_0000_0000
MAPPED_BITS = 0x0000_0000_0000_00C0
BLOCKED_BITS = 0x0080_0000_0000_00C0
BLOCKEDW_BITS = 0x0040_0000_0000_00C0
EXPORTED_BLOCKEDW_BITS = 0x0060_0000_0000_00C0
EXPORTED_DIRTY_BITS = 0x0020_0000_0000_02C0
EXPORTED_DIRTY_BLOCKEDW_BITS = 0x0060_0000_0000_02C0
PENDING_BITS = 0x0100_0000_0000_00C0
PENDING_BLOCKED_BITS = 0x0180_0000_0000_00C0
PENDING_BLOCKEDW_BITS = 0x0140_0000_0000_00C0
PENDING_EXPORTED_BLOCKEDW_BITS = 0x0160_0000_0000_00C0
PENDING_EXPORTED_DIRTY_BITS = 0x0120_0000_0000_02C0
PENDING_EXPORTED_DIRTY_BLOCKEDW_BITS = 0x0160_0000_0000_02C0


class SeptState(NamedTuple):
    """One state of a Secure EPT entry.

    bits: the state's bits of the raw entry, under SEPT_STATE_MASK. public: the state byte that the
    host is shown in RDX 15:8. letter: one or two characters for plots; E exported, Q exported and
    pending, then W write-blocked, D dirty, X both.
    is_leaf: maps a page. tracked: before the entry may go, it must be blocked and the TLBs of its
    time flushed. guest_accessible: the guest can read the page. pending: the guest has not accepted
    the page. acceptable: the guest may accept it now. blocked: all access is blocked.
    """

    name: str
    bits: int
    public: int
    letter: str
    is_leaf: bool
    tracked: bool
    guest_accessible: bool
    pending: bool
    acceptable: bool
    blocked: bool


def _state(name: str, bits: int, public: int, letter: str, flags: str = "") -> SeptState:
    """One row; flags: a word of L leaf, T tracked, G guest accessible, P pending,
    A acceptable, B blocked."""
    return SeptState(name, bits, public, letter, *(flag in flags for flag in "LTGPAB"))


SEPT_STATES: tuple[SeptState, ...] = (
    _state("FREE", FREE_BITS, 0x00, "F"),
    _state("REMOVED", REMOVED_BITS, 0x05, "R"),
    _state("NL_MAPPED", NL_MAPPED_BITS, 0x84, "T", "T"),
    _state("NL_BLOCKED", NL_BLOCKED_BITS, 0x81, "TB", "TB"),
    _state("MAPPED", MAPPED_BITS, 0x04, "M", "LTG"),
    _state("BLOCKED", BLOCKED_BITS, 0x01, "B", "LTB"),
    _state("BLOCKEDW", BLOCKEDW_BITS, 0x08, "W", "LTG"),
    _state("EXPORTED_BLOCKEDW", EXPORTED_BLOCKEDW_BITS, 0x09, "EW", "LG"),
    _state("EXPORTED_DIRTY", EXPORTED_DIRTY_BITS, 0x0B, "ED", "LTG"),
    _state("EXPORTED_DIRTY_BLOCKEDW", EXPORTED_DIRTY_BLOCKEDW_BITS, 0x0C, "EX", "LTG"),
    _state("PENDING", PENDING_BITS, 0x02, "P", "LTPA"),
    _state("PENDING_BLOCKED", PENDING_BLOCKED_BITS, 0x03, "PB", "LTPB"),
    _state("PENDING_BLOCKEDW", PENDING_BLOCKEDW_BITS, 0x10, "PW", "LTP"),
    _state("PENDING_EXPORTED_BLOCKEDW", PENDING_EXPORTED_BLOCKEDW_BITS, 0x11, "QW", "LP"),
    _state("PENDING_EXPORTED_DIRTY", PENDING_EXPORTED_DIRTY_BITS, 0x13, "QD", "LTPA"),
    _state(
        "PENDING_EXPORTED_DIRTY_BLOCKEDW", PENDING_EXPORTED_DIRTY_BLOCKEDW_BITS, 0x14, "QX", "LTP"
    ),
)
SEPT_STATE_BY_BITS: dict[int, SeptState] = {state.bits: state for state in SEPT_STATES}
#: Bits of the states in which all access is blocked.
SEPT_BLOCKED = frozenset(state.bits for state in SEPT_STATES if state.blocked)
SEPT_STATE_BY_NAME: dict[str, SeptState] = {state.name: state for state in SEPT_STATES}

_ALL_SEPT = frozenset(SEPT_STATE_BY_BITS)
_LEAVES = frozenset(state.bits for state in SEPT_STATES if state.is_leaf)
_GUEST_READABLE = frozenset(state.bits for state in SEPT_STATES if state.guest_accessible)
_GUEST_WRITABLE = frozenset({MAPPED_BITS, EXPORTED_DIRTY_BITS})
_EXPORTED = frozenset(state.bits for state in SEPT_STATES if "EXPORTED" in state.name)
_WRITE_BLOCKED = frozenset(state.bits for state in SEPT_STATES if state.name.endswith("BLOCKEDW"))

#: SEAMCALL leaf -> states of the entry at (GPA, level) that it goes on with.
#: TDH.MEM.SEPT.RD reads its row nowhere: it takes every state.
#: Source: TDX module 1.5.01, sept_state_lookup.c.
SEPT_ACCEPTS: dict[int, frozenset[int]] = {
    leaf.TDH_MEM_PAGE_ADD: frozenset({FREE_BITS}),
    leaf.TDH_MEM_SEPT_ADD: frozenset({FREE_BITS, NL_MAPPED_BITS}),
    leaf.TDH_MEM_PAGE_RELOCATE: _LEAVES,
    leaf.TDH_MEM_PAGE_AUG: frozenset({FREE_BITS, REMOVED_BITS}),
    leaf.TDH_MEM_RANGE_BLOCK: frozenset(
        {NL_MAPPED_BITS, MAPPED_BITS, BLOCKEDW_BITS, PENDING_BITS, PENDING_BLOCKEDW_BITS}
    ),
    leaf.TDH_MEM_RD: _GUEST_READABLE,
    leaf.TDH_MEM_WR: _GUEST_WRITABLE,
    leaf.TDH_MEM_PAGE_DEMOTE: frozenset(
        {MAPPED_BITS, BLOCKED_BITS, PENDING_BITS, PENDING_BLOCKED_BITS}
    ),
    leaf.TDH_MR_EXTEND: frozenset({MAPPED_BITS}),
    leaf.TDH_MEM_PAGE_PROMOTE: frozenset({NL_MAPPED_BITS, NL_BLOCKED_BITS}),
    leaf.TDH_MEM_SEPT_RD: _ALL_SEPT,
    leaf.TDH_MEM_PAGE_REMOVE: _LEAVES - _EXPORTED,
    leaf.TDH_MEM_SEPT_REMOVE: frozenset({NL_MAPPED_BITS, NL_BLOCKED_BITS}),
    leaf.TDH_MEM_RANGE_UNBLOCK: frozenset({NL_BLOCKED_BITS, BLOCKED_BITS, PENDING_BLOCKED_BITS}),
    leaf.TDH_EXPORT_BLOCKW: frozenset(
        {MAPPED_BITS, EXPORTED_DIRTY_BITS, PENDING_BITS, PENDING_EXPORTED_DIRTY_BITS}
    ),
    leaf.TDH_EXPORT_RESTORE: _EXPORTED,
    leaf.TDH_EXPORT_MEM: _LEAVES - {BLOCKED_BITS, PENDING_BLOCKED_BITS},
    leaf.TDH_EXPORT_UNBLOCKW: _WRITE_BLOCKED,
    leaf.TDH_IMPORT_MEM: frozenset({FREE_BITS, REMOVED_BITS, MAPPED_BITS, PENDING_BITS}),
}

#: TDCALL leaf -> states it goes on with.
GUEST_SEPT_ACCEPTS: dict[int, frozenset[int]] = {
    leaf.TDG_MEM_PAGE_ACCEPT: frozenset({PENDING_BITS, PENDING_EXPORTED_DIRTY_BITS}),
    leaf.TDG_MEM_PAGE_ATTR_RD: _LEAVES - {BLOCKED_BITS, PENDING_BLOCKED_BITS},
    leaf.TDG_MEM_PAGE_ATTR_WR: frozenset(
        {MAPPED_BITS, EXPORTED_DIRTY_BITS, PENDING_BITS, PENDING_EXPORTED_DIRTY_BITS}
    ),
}

#: SEAMCALL leaf -> {state before: state after}, on success.
#: TDH.MEM.PAGE.REMOVE leaves REMOVED instead of FREE while a TD is being imported.
#: Source: TDX module 1.5.01, the file of each leaf.
SEPT_RESULT: dict[int, dict[int, int]] = {
    leaf.TDH_MEM_PAGE_ADD: {FREE_BITS: MAPPED_BITS},
    leaf.TDH_MEM_SEPT_ADD: {FREE_BITS: NL_MAPPED_BITS, NL_MAPPED_BITS: NL_MAPPED_BITS},
    leaf.TDH_MEM_PAGE_RELOCATE: {bits: bits for bits in _LEAVES}
    | {BLOCKED_BITS: MAPPED_BITS, PENDING_BLOCKED_BITS: PENDING_BITS},
    leaf.TDH_MEM_PAGE_AUG: {FREE_BITS: PENDING_BITS, REMOVED_BITS: PENDING_BITS},
    leaf.TDH_MEM_RANGE_BLOCK: {
        NL_MAPPED_BITS: NL_BLOCKED_BITS,
        MAPPED_BITS: BLOCKED_BITS,
        BLOCKEDW_BITS: BLOCKED_BITS,
        PENDING_BITS: PENDING_BLOCKED_BITS,
        PENDING_BLOCKEDW_BITS: PENDING_BLOCKED_BITS,
    },
    leaf.TDH_MEM_PAGE_REMOVE: dict.fromkeys(_LEAVES - _EXPORTED, FREE_BITS),
    leaf.TDH_MEM_SEPT_REMOVE: {NL_MAPPED_BITS: FREE_BITS, NL_BLOCKED_BITS: FREE_BITS},
    leaf.TDH_MEM_RANGE_UNBLOCK: {
        NL_BLOCKED_BITS: NL_MAPPED_BITS,
        BLOCKED_BITS: MAPPED_BITS,
        PENDING_BLOCKED_BITS: PENDING_BITS,
    },
}

#: TDCALL leaf -> {state before: state after}, on success.
GUEST_SEPT_RESULT: dict[int, dict[int, int]] = {
    leaf.TDG_MEM_PAGE_ACCEPT: {
        PENDING_BITS: MAPPED_BITS,
        PENDING_EXPORTED_DIRTY_BITS: EXPORTED_DIRTY_BITS,
    },
}

#: State of the large page -> state of the 512 small ones that TDH.MEM.PAGE.DEMOTE makes of it; the
#: entry itself becomes NL_MAPPED. TDH.MEM.PAGE.PROMOTE goes back: the large page takes its
#: children's state, which must be MAPPED or PENDING.
DEMOTED_CHILD: dict[int, int] = {
    MAPPED_BITS: MAPPED_BITS,
    BLOCKED_BITS: MAPPED_BITS,
    PENDING_BITS: PENDING_BITS,
    PENDING_BLOCKED_BITS: PENDING_BITS,
}

# ---- Operational state of a TD (TDCS.op_state) --------------------------------------------------
# Source: TDX module 1.5.01, td_control_structures.h.

OP_UNINITIALIZED = 0
OP_INITIALIZED = 1
OP_RUNNABLE = 2
OP_LIVE_EXPORT = 3
OP_PAUSED_EXPORT = 4
OP_POST_EXPORT = 5
OP_MEMORY_IMPORT = 6
OP_STATE_IMPORT = 7
OP_POST_IMPORT = 8
OP_LIVE_IMPORT = 9
OP_FAILED_IMPORT = 10

OP_STATE_NAMES: dict[int, str] = {
    OP_UNINITIALIZED: "UNINITIALIZED",
    OP_INITIALIZED: "INITIALIZED",
    OP_RUNNABLE: "RUNNABLE",
    OP_LIVE_EXPORT: "LIVE_EXPORT",
    OP_PAUSED_EXPORT: "PAUSED_EXPORT",
    OP_POST_EXPORT: "POST_EXPORT",
    OP_MEMORY_IMPORT: "MEMORY_IMPORT",
    OP_STATE_IMPORT: "STATE_IMPORT",
    OP_POST_IMPORT: "POST_IMPORT",
    OP_LIVE_IMPORT: "LIVE_IMPORT",
    OP_FAILED_IMPORT: "FAILED_IMPORT",
}

#: In these op-states an entry must be blocked and tracked before it is removed, split, merged,
#: moved or unblocked; in all others, notably before TDH.MR.FINALIZE, the module skips both checks.
TLB_TRACKING_OP_STATES: frozenset[int] = frozenset({OP_RUNNABLE, OP_LIVE_EXPORT, OP_LIVE_IMPORT})

_EXECUTING = TLB_TRACKING_OP_STATES
_BUILDING = frozenset({OP_INITIALIZED})
_BUILDING_VCPU = frozenset({OP_INITIALIZED, OP_STATE_IMPORT})
_EXPORTING = frozenset({OP_LIVE_EXPORT, OP_PAUSED_EXPORT, OP_POST_EXPORT})
_IMPORTING = frozenset({OP_MEMORY_IMPORT, OP_STATE_IMPORT, OP_POST_IMPORT, OP_LIVE_IMPORT})
_CHANGING = _BUILDING | _EXECUTING | {OP_PAUSED_EXPORT, OP_POST_EXPORT, OP_POST_IMPORT}
_READING = frozenset(OP_STATE_NAMES) - {OP_UNINITIALIZED}
_WRITING = _READING - {OP_PAUSED_EXPORT, OP_POST_EXPORT}

#: SEAMCALL leaf -> op-states it is legal in. A leaf without a row does not look at the op-state.
#: TDH.MNG.ADDCX consults its row only from the seventh page on (six are there already).
#: TDH.VP.FLUSH has a row of all states in the module that its code never reads: left out here.
#: Source: TDX module 1.5.01, op_state_lookup.c.
OP_STATE_ACCEPTS: dict[int, frozenset[int]] = {
    leaf.TDH_VP_ENTER: _EXECUTING,
    leaf.TDH_MNG_ADDCX: frozenset({OP_UNINITIALIZED}),
    leaf.TDH_MEM_PAGE_ADD: _BUILDING,
    leaf.TDH_MEM_SEPT_ADD: _BUILDING | {OP_RUNNABLE, OP_LIVE_EXPORT} | _IMPORTING,
    leaf.TDH_VP_ADDCX: _BUILDING_VCPU,
    leaf.TDH_MEM_PAGE_RELOCATE: _CHANGING,
    leaf.TDH_MEM_PAGE_AUG: _BUILDING | _EXECUTING,
    leaf.TDH_MEM_RANGE_BLOCK: _CHANGING,
    leaf.TDH_VP_CREATE: _BUILDING_VCPU,
    leaf.TDH_MNG_RD: _READING,
    leaf.TDH_MEM_RD: _READING,
    leaf.TDH_MNG_WR: _WRITING,
    leaf.TDH_MEM_WR: _WRITING,
    leaf.TDH_MEM_PAGE_DEMOTE: _CHANGING,
    leaf.TDH_MR_EXTEND: _BUILDING,
    leaf.TDH_MR_FINALIZE: _BUILDING,
    leaf.TDH_MNG_INIT: frozenset({OP_UNINITIALIZED}),
    leaf.TDH_VP_INIT: _BUILDING,
    leaf.TDH_MEM_PAGE_PROMOTE: _CHANGING,
    leaf.TDH_MEM_SEPT_RD: _READING,
    leaf.TDH_VP_RD: _READING,
    leaf.TDH_MEM_PAGE_REMOVE: _CHANGING | {OP_FAILED_IMPORT},
    leaf.TDH_MEM_SEPT_REMOVE: _READING,
    leaf.TDH_MEM_TRACK: _READING - {OP_FAILED_IMPORT},
    leaf.TDH_MEM_RANGE_UNBLOCK: _CHANGING,
    leaf.TDH_VP_WR: _WRITING,
    leaf.TDH_SERVTD_BIND: _EXECUTING | {OP_UNINITIALIZED, OP_INITIALIZED, OP_POST_IMPORT},
    leaf.TDH_SERVTD_PREBIND: frozenset({OP_UNINITIALIZED, OP_INITIALIZED}),
    leaf.TDH_EXPORT_ABORT: _EXPORTING,
    leaf.TDH_EXPORT_BLOCKW: frozenset({OP_LIVE_EXPORT}),
    leaf.TDH_EXPORT_RESTORE: frozenset({OP_RUNNABLE}),
    leaf.TDH_EXPORT_MEM: _EXPORTING,
    leaf.TDH_EXPORT_PAUSE: frozenset({OP_LIVE_EXPORT}),
    leaf.TDH_EXPORT_TRACK: frozenset({OP_LIVE_EXPORT, OP_PAUSED_EXPORT}),
    leaf.TDH_EXPORT_STATE_IMMUTABLE: frozenset({OP_RUNNABLE, OP_LIVE_IMPORT}),
    leaf.TDH_EXPORT_STATE_TD: frozenset({OP_PAUSED_EXPORT}),
    leaf.TDH_EXPORT_STATE_VP: frozenset({OP_PAUSED_EXPORT}),
    leaf.TDH_EXPORT_UNBLOCKW: _EXPORTING | {OP_RUNNABLE},
    leaf.TDH_IMPORT_ABORT: (_IMPORTING | {OP_FAILED_IMPORT}) - {OP_LIVE_IMPORT},
    leaf.TDH_IMPORT_END: frozenset({OP_POST_IMPORT, OP_LIVE_IMPORT}),
    leaf.TDH_IMPORT_COMMIT: frozenset({OP_POST_IMPORT}),
    leaf.TDH_IMPORT_MEM: _IMPORTING,
    leaf.TDH_IMPORT_TRACK: frozenset({OP_MEMORY_IMPORT, OP_STATE_IMPORT}),
    leaf.TDH_IMPORT_STATE_IMMUTABLE: frozenset({OP_UNINITIALIZED}),
    leaf.TDH_IMPORT_STATE_TD: frozenset({OP_MEMORY_IMPORT}),
    leaf.TDH_IMPORT_STATE_VP: frozenset({OP_STATE_IMPORT}),
    leaf.TDH_MIG_STREAM_CREATE: frozenset({OP_UNINITIALIZED, OP_INITIALIZED, OP_RUNNABLE}),
}

# ---- Life cycles -------------------------------------------------------------------------------

#: The whole module. Source: TDX module 1.5.01, tdx_global_data.h, sysinit_state_e.
SYSINIT_PENDING = 0
SYSINIT_DONE = 1
SYSCONFIG_DONE = 2
SYS_READY = 3
SYS_SHUTDOWN = 4
SYS_STATE_NAMES: dict[int, str] = {
    SYSINIT_PENDING: "SYSINIT_PENDING",
    SYSINIT_DONE: "SYSINIT_DONE",
    SYSCONFIG_DONE: "SYSCONFIG_DONE",
    SYS_READY: "SYS_READY",
    SYS_SHUTDOWN: "SYS_SHUTDOWN",
}

#: A TD (TDR.lifecycle_state). Source: TDX module 1.5.01, td_control_structures.h.
TD_HKID_ASSIGNED = 0
TD_KEYS_CONFIGURED = 1
TD_BLOCKED = 2
TD_TEARDOWN = 3
TD_LIFECYCLE_NAMES: dict[int, str] = {
    TD_HKID_ASSIGNED: "TD_HKID_ASSIGNED",
    TD_KEYS_CONFIGURED: "TD_KEYS_CONFIGURED",
    TD_BLOCKED: "TD_BLOCKED",
    TD_TEARDOWN: "TD_TEARDOWN",
}

#: A vCPU (TDVPS). Source: TDX module 1.5.01, tdx_tdvps.h.
VCPU_UNINITIALIZED = 0
VCPU_READY = 2
VCPU_ACTIVE = 4
VCPU_DISABLED = 8
VCPU_IMPORT = 0x10
VCPU_STATE_NAMES: dict[int, str] = {
    VCPU_UNINITIALIZED: "VCPU_UNINITIALIZED",
    VCPU_READY: "VCPU_READY",
    VCPU_ACTIVE: "VCPU_ACTIVE",
    VCPU_DISABLED: "VCPU_DISABLED",
    VCPU_IMPORT: "VCPU_IMPORT",
}

#: A KeyID in the key ownership table. Source: TDX module 1.5.01, tdx_global_data.h, kot_entry_t.
HKID_FREE = 0
HKID_ASSIGNED = 1
HKID_FLUSHED = 2
HKID_RESERVED = 3
HKID_STATE_NAMES: dict[int, str] = {
    HKID_FREE: "HKID_FREE",
    HKID_ASSIGNED: "HKID_ASSIGNED",
    HKID_FLUSHED: "HKID_FLUSHED",
    HKID_RESERVED: "HKID_RESERVED",
}

# ---- PAMT page types ---------------------------------------------------------------------------
# Source: TDX module 1.5.01, pamt_manager.h. The values 2 and 7 are not used.

PT_NDA = 0
PT_RSVD = 1
PT_REG = 3
PT_TDR = 4
PT_TDCX = 5
PT_TDVPR = 6
PT_EPT = 8


class PageType(NamedTuple):
    """What a physical page is to the module. letter: one character for plots."""

    name: str
    value: int
    letter: str


#: NDA: not directly assigned, that is free (or look one level down). RSVD: reserved, never usable.
#: REG: private memory. TDR, TDCX, TDVPR: control structures. EPT: a page of a Secure EPT.
PAGE_TYPES: tuple[PageType, ...] = (
    PageType("PT_NDA", PT_NDA, "."),
    PageType("PT_RSVD", PT_RSVD, "x"),
    PageType("PT_REG", PT_REG, "R"),
    PageType("PT_TDR", PT_TDR, "D"),
    PageType("PT_TDCX", PT_TDCX, "C"),
    PageType("PT_TDVPR", PT_TDVPR, "V"),
    PageType("PT_EPT", PT_EPT, "E"),
)
PAGE_TYPE_NAMES: dict[int, str] = {kind.value: kind.name for kind in PAGE_TYPES}

#: Types of pages in which the module keeps its own structures.
CONTROL_PAGE_TYPES = frozenset((PT_TDR, PT_TDCX, PT_TDVPR, PT_EPT))
