"""The module's state tables: known states, real values, and changes that fit together."""

from itertools import chain

import pytest

from tdxlab.abi import leaves
from tdxlab.seam import rules
from tdxlab.seam.rules import SEPT_STATE_BY_BITS, SEPT_STATE_BY_NAME, SEPT_STATES, SeptState

SEPT_ROWS = [*rules.SEPT_ACCEPTS.items(), *rules.GUEST_SEPT_ACCEPTS.items()]
SEPT_CHANGES = [*rules.SEPT_RESULT.values(), *rules.GUEST_SEPT_RESULT.values()]

#: The module's seven-bit spelling of each state, in the order of its table.
STATE_CODES = (14, 12, 0, 8, 96, 104, 100, 102, 99, 103, 112, 120, 116, 118, 115, 119)


def named(bits: frozenset[int]) -> set[str]:
    return {SEPT_STATE_BY_BITS[b].name for b in bits}


# ---- Secure EPT states ---------------------------------------------------------------------------


@pytest.mark.parametrize(("state", "code"), list(zip(SEPT_STATES, STATE_CODES, strict=True)))
def test_sept_state_bits_spell_the_modules_code(state: SeptState, code: int) -> None:
    spelled = (code & 1) << 9 | (code >> 1 & 0xF) << 53 | (code >> 5) << 6
    assert state.bits == spelled
    assert getattr(rules, f"{state.name}_BITS") == spelled


def test_sept_states_are_distinct() -> None:
    for column in ("name", "bits", "public", "letter"):
        assert len({getattr(state, column) for state in SEPT_STATES}) == len(SEPT_STATES) == 16
    assert len(SEPT_STATE_BY_BITS) == len(SEPT_STATE_BY_NAME) == 16


def test_sept_state_mask_is_the_seven_bits() -> None:
    assert rules.SEPT_STATE_MASK.bit_count() == 7
    used = 0
    for state in SEPT_STATES:
        used |= state.bits
    assert used == rules.SEPT_STATE_MASK


def test_sept_state_flags_follow_the_bits() -> None:
    for state in SEPT_STATES:
        assert state.is_leaf == bool(state.bits & 1 << 7), state.name
        assert len(state.letter) in (1, 2)
        if state.is_leaf:
            assert state.pending == bool(state.bits & 1 << 56), state.name
            assert state.blocked == bool(state.bits & 1 << 55), state.name


def test_sept_states_that_the_guest_may_accept_are_pending_and_not_blocked() -> None:
    acceptable = {state.bits for state in SEPT_STATES if state.acceptable}
    assert acceptable == rules.GUEST_SEPT_ACCEPTS[leaves.TDG_MEM_PAGE_ACCEPT]
    for state in SEPT_STATES:
        if state.acceptable:
            assert state.pending
            assert not state.blocked
        assert not (state.guest_accessible and (state.pending or state.blocked))


def test_sept_states_without_tlb_tracking() -> None:
    untracked = {state.name for state in SEPT_STATES if not state.tracked}
    assert untracked == {"FREE", "REMOVED", "EXPORTED_BLOCKEDW", "PENDING_EXPORTED_BLOCKEDW"}


def test_sept_state_bytes_that_the_host_sees() -> None:
    seen = {name: SEPT_STATE_BY_NAME[name].public for name in ("FREE", "PENDING", "MAPPED")}
    assert seen == {"FREE": 0, "PENDING": 2, "MAPPED": 4}
    assert SEPT_STATE_BY_NAME["NL_MAPPED"].public == 0x84
    assert SEPT_STATE_BY_NAME["NL_BLOCKED"].public == 0x81
    assert SEPT_STATE_BY_NAME["PENDING_BLOCKED"].public == 3


# ---- Leaf x Secure EPT state ---------------------------------------------------------------------


def test_sept_rows_name_known_leaves_and_states() -> None:
    assert set(rules.SEPT_ACCEPTS) <= set(leaves.HOST_LEAVES)
    assert set(rules.GUEST_SEPT_ACCEPTS) <= set(leaves.GUEST_LEAVES)
    for _, accepted in SEPT_ROWS:
        assert accepted
        assert accepted <= set(SEPT_STATE_BY_BITS)


def test_sept_rows_exist_for_every_modelled_leaf_that_names_an_entry() -> None:
    without = {leaves.TDH_MEM_TRACK}
    memory = {n for n, row in leaves.HOST_LEAVES.items() if row.modelled and row.group == "memory"}
    assert memory - without | {leaves.TDH_MR_EXTEND} == {
        n for n in rules.SEPT_ACCEPTS if leaves.HOST_LEAVES[n].modelled
    }


@pytest.mark.parametrize(
    ("number", "accepted"),
    [
        (leaves.TDH_MEM_PAGE_ADD, {"FREE"}),
        (leaves.TDH_MEM_PAGE_AUG, {"FREE", "REMOVED"}),
        (leaves.TDH_MEM_SEPT_ADD, {"FREE", "NL_MAPPED"}),
        (leaves.TDH_MEM_SEPT_REMOVE, {"NL_MAPPED", "NL_BLOCKED"}),
        (leaves.TDH_MEM_WR, {"MAPPED", "EXPORTED_DIRTY"}),
        (leaves.TDH_MEM_RANGE_UNBLOCK, {"NL_BLOCKED", "BLOCKED", "PENDING_BLOCKED"}),
        (
            leaves.TDH_MEM_PAGE_REMOVE,
            {"MAPPED", "BLOCKED", "BLOCKEDW", "PENDING", "PENDING_BLOCKED", "PENDING_BLOCKEDW"},
        ),
        (
            leaves.TDH_MEM_RD,
            {
                "MAPPED",
                "BLOCKEDW",
                "EXPORTED_BLOCKEDW",
                "EXPORTED_DIRTY",
                "EXPORTED_DIRTY_BLOCKEDW",
            },
        ),
    ],
)
def test_sept_rows_of_the_real_module(number: int, accepted: set[str]) -> None:
    assert named(rules.SEPT_ACCEPTS[number]) == accepted


def test_sept_changes_start_from_exactly_the_accepted_states() -> None:
    for number, change in rules.SEPT_RESULT.items():
        assert set(change) == rules.SEPT_ACCEPTS[number], leaves.HOST_LEAVES[number].name
    accept = leaves.TDG_MEM_PAGE_ACCEPT
    assert set(rules.GUEST_SEPT_RESULT[accept]) == rules.GUEST_SEPT_ACCEPTS[accept]
    assert set(rules.DEMOTED_CHILD) == rules.SEPT_ACCEPTS[leaves.TDH_MEM_PAGE_DEMOTE]


def test_sept_changes_end_in_known_states() -> None:
    ends = chain.from_iterable(change.values() for change in [*SEPT_CHANGES, rules.DEMOTED_CHILD])
    assert set(ends) <= set(SEPT_STATE_BY_BITS)


def test_sept_block_and_unblock_are_opposite() -> None:
    block = rules.SEPT_RESULT[leaves.TDH_MEM_RANGE_BLOCK]
    unblock = rules.SEPT_RESULT[leaves.TDH_MEM_RANGE_UNBLOCK]
    assert all(block[after] == before for before, after in unblock.items())
    assert all(SEPT_STATE_BY_BITS[state].blocked for state in block.values())
    assert not any(SEPT_STATE_BY_BITS[state].blocked for state in unblock.values())


def test_sept_changes_keep_a_page_pending_until_the_guest_accepts() -> None:
    keepers = (
        leaves.TDH_MEM_RANGE_BLOCK,
        leaves.TDH_MEM_RANGE_UNBLOCK,
        leaves.TDH_MEM_PAGE_RELOCATE,
    )
    for change in [*(rules.SEPT_RESULT[n] for n in keepers), rules.DEMOTED_CHILD]:
        for before, after in change.items():
            assert SEPT_STATE_BY_BITS[before].pending == SEPT_STATE_BY_BITS[after].pending
    for after in rules.GUEST_SEPT_RESULT[leaves.TDG_MEM_PAGE_ACCEPT].values():
        assert SEPT_STATE_BY_BITS[after].guest_accessible


def test_sept_changes_undo_blocks_when_a_page_moves_or_splits() -> None:
    for change in (rules.SEPT_RESULT[leaves.TDH_MEM_PAGE_RELOCATE], rules.DEMOTED_CHILD):
        assert not any(SEPT_STATE_BY_BITS[after].blocked for after in change.values())


def test_sept_free_entries_are_reached_by_removal_alone() -> None:
    freeing = {n for n, change in rules.SEPT_RESULT.items() if rules.FREE_BITS in change.values()}
    assert freeing == {leaves.TDH_MEM_PAGE_REMOVE, leaves.TDH_MEM_SEPT_REMOVE}


def test_sept_states_reached_by_modelled_leaves_are_not_of_migration() -> None:
    reached = {rules.FREE_BITS}
    while True:
        more = {c[s] for c in SEPT_CHANGES for s in reached if s in c} - reached
        if not more:
            break
        reached |= more
    assert named(frozenset(reached)) == {
        "FREE",
        "NL_MAPPED",
        "NL_BLOCKED",
        "MAPPED",
        "BLOCKED",
        "PENDING",
        "PENDING_BLOCKED",
    }


# ---- Leaf x op-state -----------------------------------------------------------------------------


def test_op_rows_name_known_leaves_and_states() -> None:
    assert set(rules.OP_STATE_ACCEPTS) <= set(leaves.HOST_LEAVES)
    for accepted in rules.OP_STATE_ACCEPTS.values():
        assert accepted
        assert accepted <= set(rules.OP_STATE_NAMES)


def test_op_rows_exist_for_every_leaf_that_looks() -> None:
    blind = {
        "TDH.MNG.CREATE",
        "TDH.MNG.KEY.CONFIG",
        "TDH.MNG.KEY.FREEID",
        "TDH.MNG.KEY.RECLAIMID",
        "TDH.MNG.VPFLUSHDONE",
        "TDH.VP.FLUSH",
    }
    for number, row in leaves.HOST_LEAVES.items():
        looks = row.group not in ("system", "physical memory") and row.name not in blind
        assert looks == (number in rules.OP_STATE_ACCEPTS), row.name


@pytest.mark.parametrize(
    ("number", "accepted"),
    [
        (leaves.TDH_MEM_PAGE_ADD, {1}),
        (leaves.TDH_MR_EXTEND, {1}),
        (leaves.TDH_MR_FINALIZE, {1}),
        (leaves.TDH_MNG_INIT, {0}),
        (leaves.TDH_VP_ENTER, {2, 3, 9}),
        (leaves.TDH_VP_CREATE, {1, 7}),
        (leaves.TDH_MEM_PAGE_AUG, {1, 2, 3, 9}),
        (leaves.TDH_MEM_SEPT_ADD, {1, 2, 3, 6, 7, 8, 9}),
        (leaves.TDH_MEM_RANGE_BLOCK, {1, 2, 3, 4, 5, 8, 9}),
        (leaves.TDH_MEM_PAGE_REMOVE, {1, 2, 3, 4, 5, 8, 9, 10}),
        (leaves.TDH_MEM_SEPT_REMOVE, set(range(1, 11))),
        (leaves.TDH_MEM_TRACK, set(range(1, 10))),
        (leaves.TDH_MNG_WR, {1, 2, 3, 6, 7, 8, 9, 10}),
    ],
)
def test_op_rows_of_the_real_module(number: int, accepted: set[int]) -> None:
    assert rules.OP_STATE_ACCEPTS[number] == accepted


def test_op_states_that_require_tracking_are_those_that_run_guests() -> None:
    assert rules.OP_STATE_ACCEPTS[leaves.TDH_VP_ENTER] == rules.TLB_TRACKING_OP_STATES
    assert rules.OP_INITIALIZED not in rules.TLB_TRACKING_OP_STATES


# ---- Names of the other states -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prefix", "names", "values"),
    [
        ("OP_", rules.OP_STATE_NAMES, tuple(range(11))),
        ("", rules.SYS_STATE_NAMES, (0, 1, 2, 3, 4)),
        ("", rules.TD_LIFECYCLE_NAMES, (0, 1, 2, 3)),
        ("", rules.VCPU_STATE_NAMES, (0, 2, 4, 8, 16)),
        ("", rules.HKID_STATE_NAMES, (0, 1, 2, 3)),
        ("", rules.PAGE_TYPE_NAMES, (0, 1, 3, 4, 5, 6, 8)),
    ],
)
def test_state_names_are_those_of_the_constants(
    prefix: str, names: dict[int, str], values: tuple[int, ...]
) -> None:
    assert tuple(names) == values
    for value, name in names.items():
        assert getattr(rules, prefix + name) == value


def test_page_type_letters_are_distinct() -> None:
    assert len({kind.letter for kind in rules.PAGE_TYPES}) == len(rules.PAGE_TYPES) == 7
