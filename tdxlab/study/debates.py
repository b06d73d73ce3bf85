"""The debates of KVM's TDX reviews as experiments: vary what was argued about, and measure.

    debate("D8", gpaw=48)           # question, positions, table, verdict; what Linux 6.16 does
    debate("D8").table.rows

Each debate is two functions: one builds small machines, runs every alternative on them and returns
rows of numbers; the other turns the rows, and nothing else, into a verdict. An alternative that
Linux does not have is another function in the place of Linux's for as long as the run lasts.

Source: the reviews of the TDX series on the kvm mailing list (see `debates_positions`); Linux 6.16,
for what became of each.
Differs: a verdict is about this model's counts on small machines, not about time on real ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from textwrap import fill
from typing import Any, NamedTuple

from tdxlab.arch import GPAW_CHOICES
from tdxlab.study import (
    debates_faults,
    debates_gfns,
    debates_hooks,
    debates_limits,
    debates_mirror,
    debates_protocols,
    debates_roots,
    debates_styles,
    debates_teardown,
    debates_types,
    debates_zaps,
)
from tdxlab.study.debates_positions import POSITIONS, Position
from tdxlab.study.show import Table

#: Columns of printed text.
_WIDTH = 96


class Debate(NamedTuple):
    """One debate. measure: gpaw -> rows, NamedTuples of one class. judge: rows -> verdict.
    outcome: what Linux 6.16 does.
    """

    title: str
    question: str
    measure: Callable[[int], Sequence[Any]]
    judge: Callable[[Sequence[Any]], str]
    outcome: str


class Experiment(NamedTuple):
    """What was debated, and what came out of the experiment."""

    name: str
    title: str
    question: str
    positions: tuple[Position, ...]
    table: Table
    verdict: str
    outcome: str

    def __repr__(self) -> str:
        words = (f"{self.name}: {self.title}", self.question)
        said = "\n".join(_filled(f"- {each.words()}", "  ") for each in self.positions)
        ends = (f"Verdict: {self.verdict}", f"Linux 6.16: {self.outcome}")
        parts = [*map(_filled, words), said, repr(self.table), *map(_filled, ends)]
        return "\n\n".join(parts)

    def _repr_html_(self) -> str:
        said = "".join(f"<li>{escape(each.words())}</li>" for each in self.positions)
        return (
            f"<h4>{escape(self.name)}: {escape(self.title)}</h4><p>{escape(self.question)}</p>"
            f"<ul>{said}</ul>{self.table._repr_html_()}"
            f"<p><b>Verdict:</b> {escape(self.verdict)}</p>"
            f"<p><b>Linux 6.16:</b> {escape(self.outcome)}</p>"
        )


def _filled(text: str, indent: str = "") -> str:
    return fill(text, _WIDTH, subsequent_indent=indent)


def debate(name: str, gpaw: int = 48) -> Experiment:
    """Run the experiment of one debate. name: of `DEBATES`. gpaw: of the TDs, 48 or 52.

    Refuses another name, and another width: ValueError.
    """
    if name not in DEBATES:
        raise ValueError(f"there is no debate {name!r}; choose one of {', '.join(DEBATES)}")
    if gpaw not in GPAW_CHOICES:
        raise ValueError(f"GPAW {gpaw!r} is not a TDX guest address width; choose 48 or 52")
    title, question, measure, judge, outcome = DEBATES[name]
    rows = measure(gpaw)
    return Experiment(name, title, question, POSITIONS[name], Table(rows), judge(rows), outcome)


class DebateRow(NamedTuple):
    """One debate in one line."""

    debate: str
    title: str


def debate_rows() -> list[DebateRow]:
    """What can be run."""
    return [DebateRow(name, found.title) for name, found in DEBATES.items()]


class VerdictRow(NamedTuple):
    """One debate and what came out."""

    debate: str
    title: str
    verdict: str


class Verdicts(Table):
    """Rows of `VerdictRow`, shown as a paragraph each."""

    def __repr__(self) -> str:
        texts = (f"{row.debate}, {row.title}: {row.verdict}" for row in self.rows)
        return "\n\n".join(_filled(text, "  ") for text in texts)

    def _repr_html_(self) -> str:
        return "".join(
            f"<p><b>{escape(row.debate)}: {escape(row.title)}.</b> {escape(row.verdict)}</p>"
            for row in self.rows
        )


def verdicts(gpaw: int = 48) -> Verdicts:
    """Every debate, run. Refuses as `debate`."""
    found = [debate(name, gpaw) for name in DEBATES]
    return Verdicts(VerdictRow(one.name, one.title, one.verdict) for one in found)


#: Name -> debate, in the order of the list that the reviews make.
DEBATES: Mapping[str, Debate] = {
    "D1": Debate(
        "the shared bit in the walker's gfns",
        "Does a gfn inside the walker contain the shared bit, or is the bit added only where an "
        "index is computed?",
        debates_gfns.gfn_rows,
        debates_gfns.judge_gfns,
        "gfns are always clean; the iterator has gfn_bits, and the walk of a whole root a macro "
        "without them.",
    ),
    "D2": Debate(
        "the shared bit in the fault's address",
        "A fault has an address and a gfn. Which of them keeps the shared bit?",
        debates_faults.address_rows,
        debates_faults.judge_addresses,
        "the address keeps it and chooses the root, the gfn loses it, and a gfn that still has it "
        "where the pfn is looked up ends the VM.",
    ),
    "D3": Debate(
        "what selects the root of a fault",
        "Mirror or direct root: does the fault's privateness decide, or a bit of its address?",
        debates_faults.root_rows,
        debates_faults.judge_roots,
        "the address bit (kvm_is_addr_direct); the attributes of a range choose roots only where "
        "there is a mirror.",
    ),
    "D5": Debate(
        "what calls the hooks",
        "Are the hooks called for every private gfn, so that SNP could use them too, or for every "
        "entry of a mirror page table?",
        debates_hooks.hook_rows,
        debates_hooks.judge_hooks,
        "the mirror bit in the role of the table that has the entry.",
    ),
    "D7": Debate(
        "TLB tracking: for each page, or for many",
        "A new TLB epoch and a kick for each page that goes, or one for a batch?",
        debates_zaps.batch_rows,
        debates_zaps.judge_batches,
        "one for each page; batches were left for later.",
    ),
    "D8": Debate(
        "the KeyID: given back first, or last",
        "At the end of a TD, are private pages removed while it still has its KeyID, or reclaimed "
        "after it was given back?",
        debates_teardown.keyid_rows,
        debates_teardown.judge_keyid,
        "mixed: private pages go first, with the KeyID; tables and control pages after it.",
    ),
    "D9": Debate(
        "a greatest gfn for each VM",
        "Who keeps memslots out of the half of the GPAs that has the shared bit?",
        debates_limits.limit_rows,
        debates_limits.judge_limits,
        "the host's bound for all VMs, and no memslot whose last gfn has a direct bit.",
    ),
    "D11": Debate(
        "a range zap on a TD",
        "kvm_zap_gfn_range is for causes that no TD should have. Must it be kept from private "
        "memory all the same?",
        debates_roots.guard_rows,
        debates_roots.judge_guards,
        "no guard: it zaps direct and mirror roots, and relies on its callers.",
    ),
    "D12": Debate(
        "zapping a mirror with mmu_lock shared",
        "Could a mirror's leaf be frozen, blocked, tracked and removed while others hold mmu_lock "
        "for read, as in a direct root?",
        debates_zaps.atomic_rows,
        debates_zaps.judge_atomic,
        "not supported, and a bug that ends the VM; mirrors are zapped with mmu_lock for write.",
    ),
    "D13": Debate(
        "flushing a range of gfns",
        "Clean gfns name the private alias. Which pages does a ranged TLB flush of shared memory "
        "flush?",
        debates_limits.flush_rows,
        debates_limits.judge_flushes,
        "neither fix is there: only KVM on Hyper-V flushes ranges, and no TD is expected there; "
        "all others flush everything.",
    ),
    "D14": Debate(
        "parents or children first",
        "When a table goes, does the module hear of the table before or after what is below it?",
        debates_teardown.order_rows,
        debates_teardown.judge_order,
        "children first: the module removes leaves before it removes tables.",
    ),
    "D15": Debate(
        "freeze, lock, or hope",
        "Many vCPUs fault in one fresh region. What keeps them from changing one entry of the "
        "external EPT at once?",
        debates_protocols.protocol_rows,
        debates_protocols.judge_protocols,
        "the entry is frozen for as long as the hook runs; who meets it retries.",
    ),
    "D16": Debate(
        "a mirror at all?",
        "What would it cost to read the Secure EPT itself instead of a mirror of it?",
        debates_mirror.read_rows,
        debates_mirror.judge_reads,
        "a mirror; its tables double the memory for page tables of private memory.",
    ),
    "D18": Debate(
        "how to ask what a VM is like",
        "Is this the TDX-like case? Code can keep flags, look at the VM's type, or take a shared "
        "bit for the answer to everything.",
        debates_types.ask_rows,
        debates_types.judge_asking,
        "booleans for private memory and protected state, a helper that looks at the type for the "
        "mirror, and the mask for addresses alone.",
    ),
    "D20": Debate(
        "the shape of the SEAMCALL wrappers",
        "Raw registers, numbers with names, or types: which of them notices a mistake of the "
        "caller?",
        debates_styles.style_rows,
        debates_styles.judge_styles,
        "typed pages and TDs, KeyIDs and extended error words as numbers, and a wrapper of its own "
        "for the flush of the TDR.",
    ),
    "D21": Debate(
        "filtering zaps",
        "The host moves or swaps shared pages. Does the zap take the private pages at the same "
        "gfns too?",
        debates_roots.filter_rows,
        debates_roots.judge_filter,
        "every range has a filter, and an MMU notifier means shared memory only.",
    ),
}
