"""Who proposed what in the debates, and what was said for it and against it.

Source: the kvm mailing list: the review of "Support TDX private mapping for TDP MMU", May 2024 (R.
Edgecombe, I. Yamahata, K. Huang, P. Bonzini); that of booleans against masks of VM types (R.
Edgecombe, S. Christopherson: D18); that of the SEAMCALL wrappers (D20); and the text with which the
TDP MMU's part was merged (D15, D16, D21).
Differs: what was said is retold here, and shortened; where a name or a reason is missing, none is
on record here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Position(NamedTuple):
    """One proposal. by: who made it; pro, contra: what was said, by whom in brackets if by another;
    each may be "".
    """

    proposal: str
    by: str = ""
    pro: str = ""
    contra: str = ""

    def words(self) -> str:
        """The position in one line."""
        said = "; ".join(
            f"{label} {text}"
            for label, text in (("for:", self.pro), ("against:", self.contra))
            if text
        )
        by = f" ({self.by})" if self.by else ""
        return f"{self.proposal}{by}{'. ' if said else ''}{said[:1].upper()}{said[1:]}."


PATCH, MERGED = "the patch", "as merged"
EDGECOMBE, YAMAHATA, HUANG = "Edgecombe", "Yamahata", "Huang"
BONZINI, CHRISTOPHERSON = "Bonzini", "Christopherson"

#: Name of a debate -> positions.
POSITIONS: Mapping[str, tuple[Position, ...]] = {
    "D1": (
        Position(
            "The walker's gfns have the bit, and who zaps converts its range",
            PATCH,
            "tables, flushes and traces name the address that is mapped",
            "they are handed on to code that wants a memslot's gfn, and no reader of a patch sees "
            f"it ({HUANG})",
        ),
        Position("The macro of the walk adds it", EDGECOMBE),
        Position(
            "The iterator has a mask that is used at the index alone",
            YAMAHATA,
            "one simple rule; the common MMU believes that it maps ordinary gfns",
            "flushes of a range and traces name another gfn than the mapped one, and a walk of "
            "everything misses half",
        ),
        Position("Iterator and table page have two fields, gfn and raw_gfn", HUANG),
        Position("The mask stands in the root's page", YAMAHATA, contra="memory"),
    ),
    "D2": (
        Position(
            "The exit handler strips it, and the error code says what is private",
            HUANG,
            "one trap less",
        ),
        Position(
            "The address keeps it",
            EDGECOMBE,
            "that is the address which faulted, traces tell the truth, and the bit is needed again "
            "to map",
        ),
    ),
    "D3": (
        Position(
            "A private fault belongs into the mirror, if the VM has a shared bit",
            PATCH,
            contra="SW_PROTECTED and SNP have private faults too, on their only root",
        ),
        Position("It does if the VM has a mirror, asked of one helper", EDGECOMBE),
        Position("The address has a bit that tells", MERGED),
    ),
    "D5": (
        Position(
            "The hooks are called for every private gfn",
            HUANG,
            "SNP could update its RMP in them",
            "outside of faults nobody knows what is private; SNP has hooks in guest_memfd, and its "
            f"RMP need not follow the page table ({EDGECOMBE}, {YAMAHATA})",
        ),
        Position(
            "They are called for entries of a mirror",
            f"{EDGECOMBE}, {YAMAHATA}",
            "pages given away for tables, updates in two phases and teardown in order are what a "
            "mirror needs",
        ),
    ),
    "D7": (
        Position(
            "An epoch and a kick for each page",
            PATCH,
            "the module refuses to remove a page that was not tracked, and conversions and "
            f"deletions are taken to be rare ({YAMAHATA})",
            f"an IPI to every vCPU for each page, which the module does not ask for ({EDGECOMBE})",
        ),
        Position(
            "One for many pages, later",
            YAMAHATA,
            contra="it needs a third state of an entry, blocked and not flushed yet",
        ),
    ),
    "D8": (
        Position(
            "The KeyID goes first",
            YAMAHATA,
            "nothing has to be tracked, blocked or removed then; pages are only reclaimed",
        ),
        Position(
            "Private pages go first",
            MERGED,
            "guest_memfd has to zap a page before it can free it, and does so when its file goes",
        ),
    ),
    "D9": (
        Position(
            "A greatest gfn for each VM; slots are looked at again when the TD is initialised",
            pro="clear, and a patch of its own that can be left out",
            contra="more state than the matter is worth",
        ),
        Position(
            "The host's bound, and checks in the fault path", pro="small", contra="an odd idea"
        ),
        Position(
            "A field with the limit, or an operation that returns it",
            pro="a field is easier to read, and does not depend on a shared bit",
        ),
    ),
    "D11": (
        Position(
            "For a VM with a shared bit the call is a bug",
            PATCH,
            "nobody wants zaps for APICv, MTRRs or non-coherent DMA there",
        ),
        Position("Common code has no such guard", EDGECOMBE),
    ),
    "D12": (
        Position(
            "A branch for it",
            PATCH,
            contra="dead code from a scheme that was dropped; a removal of two steps is no single "
            "compare-exchange, and tracking has to exclude others",
        ),
    ),
    "D13": (
        Position("It stays as it is", pro=f"only Hyper-V flushes ranges ({YAMAHATA})"),
        Position("A condition where it is asked whether ranges can be flushed", BONZINI),
        Position('"Unsupported" as the answer if a VM has direct bits', EDGECOMBE),
    ),
    "D14": (
        Position(
            "All of it in handle_changed_spte",
            YAMAHATA,
            contra="where an entry is set it has to be frozen before, so it cannot be done there",
        ),
        Position("At the places that call it", EDGECOMBE, "symmetry"),
        Position(
            "Removal after the children", YAMAHATA, "the module wants leaves removed before tables"
        ),
    ),
    "D15": (
        Position(
            "Freeze, call, then publish or restore",
            PATCH,
            "one entry is kept for one vCPU while mmu_lock is shared, and KVM does not collide "
            "inside the module",
        ),
        Position("mmu_lock for write"),
        Position("Call first, then compare and exchange, and undo if that fails"),
    ),
    "D16": (
        Position(
            "A mirror",
            MERGED,
            "without it every walk would read the Secure EPT by SEAMCALLs; with it only changes do",
            "tables take twice the memory",
        ),
    ),
    "D18": (
        Position(
            "The type, as one bit, and a mask of types for each question",
            EDGECOMBE,
            "nobody can make a TD without private memory",
            "tried before and turned down: 32 bits of ABI, which would tell the kernel's inside; "
            f"and one day an old type may get private memory ({CHRISTOPHERSON})",
        ),
        Position(
            "A boolean for each question",
            CHRISTOPHERSON,
            "a byte costs nothing, and is easier to read and to maintain",
        ),
        Position(
            "The mask of the shared bit", PATCH, contra="it fits as long as TDs alone have it"
        ),
    ),
    "D20": (
        Position("The SEAMCALL itself is exported", pro="raw registers are easy to debug"),
        Position("Wrappers with plain numbers"),
        Position(
            "Wrappers with types", pro="types are checked, code explains itself, reviews are easier"
        ),
    ),
    "D21": (
        Position("No filter", contra="the guest's data are lost whenever the host swaps"),
        Position("A filter for each cause", MERGED, "the cause knows which kind it means"),
    ),
}
