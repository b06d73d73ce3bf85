"""What must be true of a machine whatever its host and its guests do.

Each invariant is one function with a number, a name and a scope; `check` looks at the machine once
and asks all those whose scope is met. Scopes, each containing the ones before it:

    always   at every moment, also while a SEAMCALL waits between its checks and its effects
    quiet    no operation is half-done
    alive    ... and the host's tables of a TD are the host's doing alone

    no  scope   what
     1  alive   a mirror leaf is exactly one S-EPT leaf with the same page, and the reverse;
                always: a mirror entry that is blocked still is one
     2  alive   a table that a mirror links is a table of the S-EPT, and the reverse
     3  always  a page that the S-EPT maps is owned as PT_REG, a table as PT_EPT; none is linked
                twice, in one TD or two; and what a TD owns as such is in its S-EPT (until TEARDOWN)
     4  always  a TDR's child count is the number of 4 KiB pages that the TD owns
     5  always  every page that the module owns belongs to a TD that exists, and is not free for the
                host; no SPTE maps a free page; quiet: every page is free, used in one place, or
                leaked with a cause, and the sums are exact
     6  always  a vCPU inside holds no translation to a page that is not mapped there any more, or,
                where it is shared, to a page that is free
     7  always  the epoch counts are at least the vCPUs inside; quiet: exactly
     8  quiet   the numbers of pages, tables, vCPUs and references that a TD or a VM keeps are those
                that can be counted
     9  always  no shared GPA is in a mirror, no private GPA in a TD's direct root
    10  always  KeyIDs and life cycles of TDs fit each other; quiet: and the host's KeyIDs
    11  quiet   locks are free, but for those of the vCPUs inside; no SPTE is frozen or blocked
    12  always  a page is represented at one level of the PAMT
    13  quiet   a vCPU is active if and only if it is inside one LP, the one it is associated with;
                always: the host knows that it is there
    14  always  a page of the host's takes another KeyID only after its lines were written back

A `BareMachine` has no host to ask about: 1, 2, 9 and the host's share of the others hold there.
Numbers 1 and 2 are about TDs that have their KeyID and that the host has not declared dead.

A check visits only what is in use; it reads the module's memory from the lab bench and writes
nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple, get_args

from tdxlab.bare import BareMachine
from tdxlab.invariants import host_pages, keys_and_locks, mmu, pages, running
from tdxlab.invariants.pamt_rows import PamtRows
from tdxlab.invariants.picture import Picture
from tdxlab.seam.pamt import PamtEntry

Scope = Literal["always", "quiet", "alive"]
SCOPES: tuple[Scope, ...] = get_args(Scope)


class InvariantBroken(Exception):
    """A machine is in a state that must not exist. number, name: which invariant; explanation: what
    is wrong, in words.
    """

    def __init__(self, number: int, name: str, explanation: str) -> None:
        super().__init__(f"invariant {number} ({name}): {explanation}")
        self.number = number
        self.name = name
        self.explanation = explanation


class Invariant(NamedTuple):
    """One invariant. `faults` yields an explanation for each place where it is broken."""

    number: int
    scope: Scope
    faults: Callable[[Picture], Iterator[str]]

    @property
    def name(self) -> str:
        """The function's name in words."""
        return self.faults.__name__.replace("_", " ")


INVARIANTS: tuple[Invariant, ...] = (
    Invariant(1, "alive", mmu.mirror_leaves_are_sept_leaves),
    Invariant(2, "alive", mmu.mirror_tables_are_sept_tables),
    Invariant(5, "always", pages.pages_in_use_belong_to_a_td),
    Invariant(12, "always", pages.pages_are_represented_at_one_level),
    Invariant(3, "always", pages.what_the_sept_links_is_owned_by_the_td),
    Invariant(3, "always", pages.nothing_is_linked_twice),
    Invariant(3, "always", pages.what_a_td_owns_is_in_its_sept),
    Invariant(4, "always", pages.child_count_is_the_pages_owned),
    Invariant(6, "always", running.vcpus_inside_use_only_mapped_pages),
    Invariant(7, "always", running.epoch_counts_cover_the_vcpus_inside),
    Invariant(7, "quiet", running.epoch_counts_are_the_vcpus_inside),
    Invariant(8, "quiet", pages.pages_are_counted_right),
    Invariant(8, "quiet", running.vcpus_are_counted_right),
    Invariant(10, "always", keys_and_locks.keyids_fit_the_life_cycles),
    Invariant(10, "always", keys_and_locks.keys_are_on_all_packages_or_awaited),
    Invariant(11, "quiet", keys_and_locks.pamt_locks_are_those_of_vcpus_inside),
    Invariant(11, "quiet", keys_and_locks.other_locks_are_free),
    Invariant(13, "quiet", running.active_vcpus_are_inside_their_lp),
    Invariant(5, "always", host_pages.the_module_owns_no_free_page),
    Invariant(5, "always", host_pages.leaked_pages_have_a_cause),
    Invariant(5, "always", mmu.leaves_map_pages_in_use),
    Invariant(5, "quiet", host_pages.pages_add_up),
    Invariant(5, "quiet", host_pages.pages_in_use_have_one_user),
    Invariant(5, "quiet", host_pages.host_pages_are_not_the_modules),
    Invariant(6, "always", host_pages.shared_translations_are_of_pages_in_use),
    Invariant(1, "always", mmu.blocked_pages_are_still_in_the_sept),
    Invariant(8, "quiet", mmu.tables_are_counted_right),
    Invariant(8, "quiet", mmu.tables_are_known),
    Invariant(8, "quiet", mmu.roots_are_counted_right),
    Invariant(9, "always", mmu.shared_and_private_have_their_own_roots),
    Invariant(10, "quiet", host_pages.keyids_are_those_of_the_module),
    Invariant(11, "quiet", host_pages.locks_of_the_host_are_free),
    Invariant(11, "quiet", mmu.nothing_is_frozen),
    Invariant(13, "always", host_pages.vcpus_inside_can_be_kicked),
    Invariant(14, "always", host_pages.pages_are_written_back_before_they_change_keys),
)


def check(machine: BareMachine, scope: Scope) -> None:
    """Test every invariant that holds in a machine of which `scope` is true. A module that has
    halted promises nothing any more.

    scope: "always", "quiet" or "alive"; each includes the ones before it.
    Raises InvariantBroken for the first one that is broken. Refuses another scope: ValueError.
    """
    _judge(machine, scope, None)


def _judge(machine: BareMachine, scope: Scope, rows: list[PamtEntry] | None) -> None:
    """As `check`; rows: the PAMT entries in use, if they are known."""
    if scope not in SCOPES:
        raise ValueError(f"there is no scope {scope!r}; choose one of {', '.join(SCOPES)}")
    if machine.module.halted:
        return
    picture = Picture.of(machine, rows)
    for invariant in INVARIANTS:
        if SCOPES.index(invariant.scope) <= SCOPES.index(scope):
            for fault in invariant.faults(picture):
                raise InvariantBroken(invariant.number, invariant.name, fault)


class Watch:
    """Checks a machine again and again that is never far from the state in which this is made, or
    moved on. The PAMT is read as a whole once, and then only where something has changed since.
    """

    def __init__(self, machine: BareMachine) -> None:
        self._machine = machine
        self._rows = PamtRows(machine)

    def close(self) -> None:
        """Give up the mark at which this holds the machine's journal."""
        self._rows.close()

    def move_on(self) -> None:
        """Count changes from the present on: for a machine that will not be rewound behind it."""
        self._rows.move_on()

    def check(self, scope: Scope) -> None:
        """As `invariants.check`."""
        _judge(self._machine, scope, self._rows.now())
