"""What comes of an attack: which mechanism stopped it, on what evidence; or that nothing did."""

from __future__ import annotations

from typing import NamedTuple

from tdxlab.abi import status as st

# -- what can stop an attack

ENCRYPTION = "encryption"
OWNER_BIT = "TD-owner bit"
MAC = "MAC"
PAMT = "PAMT"
SEPT = "Secure EPT state"
TRACKING = "TLB tracking"
LIFE_CYCLE = "life cycle"
KEY_TABLE = "KeyID table"
ACCEPTANCE = "guest acceptance"
OPERANDS = "operand checks"
SHARED_BIT = "shared bit"
ATTRIBUTES = "TD attributes"
STEPPING = "stepping filter"
MECHANISMS = (
    ENCRYPTION,
    OWNER_BIT,
    MAC,
    PAMT,
    SEPT,
    TRACKING,
    LIFE_CYCLE,
    KEY_TABLE,
    ACCEPTANCE,
    OPERANDS,
    SHARED_BIT,
    ATTRIBUTES,
    STEPPING,
)

# -- what the host has from an attack, stopped or not

NOTHING = "nothing"
LEAKED = "the secret"
CONTROL = "control of the guest's data"
CORRUPTION = "garbage in the guest's data"
REPLAY = "replay"
TRAFFIC = "traffic analysis"
DENIAL = "denial of service"
GAINS = (NOTHING, LEAKED, CONTROL, CORRUPTION, REPLAY, TRAFFIC, DENIAL)

_STOPPED_BY = {
    st.TDX_PAGE_METADATA_INCORRECT: PAMT,
    st.TDX_EPT_ENTRY_STATE_INCORRECT: SEPT,
    st.TDX_EPT_WALK_FAILED: SEPT,
    st.TDX_GPA_RANGE_NOT_BLOCKED: TRACKING,
    st.TDX_TLB_TRACKING_NOT_DONE: TRACKING,
    st.TDX_LIFECYCLE_STATE_INCORRECT: LIFE_CYCLE,
    st.TDX_FLUSHVP_NOT_DONE: LIFE_CYCLE,
    st.TDX_WBCACHE_NOT_COMPLETE: LIFE_CYCLE,
    st.TDX_TD_KEYS_NOT_CONFIGURED: LIFE_CYCLE,
    st.TDX_OP_STATE_INCORRECT: LIFE_CYCLE,
    st.TDX_HKID_NOT_FREE: KEY_TABLE,
    st.TDX_OPERAND_INVALID: OPERANDS,
    st.TDX_TD_NON_DEBUG: ATTRIBUTES,
}


class Verdict(NamedTuple):
    """stopped_by: a mechanism, "" if nothing stopped the attack. gained: what the host has from it
    all the same. evidence: the status, fault or bytes that show it.
    """

    stopped_by: str
    gained: str
    evidence: str


def refused(statuses: list[int]) -> Verdict | None:
    """The verdict on calls that all had to be refused; None if one of them succeeded."""
    if not all(map(st.is_error, statuses)):
        return None
    first = statuses[0] & st.CODE_MASK
    names = dict.fromkeys(said(status) for status in statuses)
    return Verdict(_STOPPED_BY.get(first, OPERANDS), NOTHING, ", ".join(names))


def said(status: int) -> str:
    """A status as evidence: its name, and the operand that it is about."""
    operand = st.operand_name(status)
    return st.status_name(status) + (f" ({operand})" if operand else "")
