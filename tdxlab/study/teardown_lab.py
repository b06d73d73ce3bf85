"""A TD that is taken apart on a tape, in one of two orders, with or without a failure.

    lab = TeardownLab(gpaw=48, pages=6, vcpus=2, packages=2)
    lab.destroy(KEYID_LAST)
    lab.go_to("FREEID")                 # stand before the first step of a phase
    lab.ledger()                        # every page of the TD: in use, free, leaked

The ledger has the pages that the module owned when the lab began. Each teardown goes on the tape
anew; the one before is taken back first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from typing import NamedTuple

from tdxlab import views
from tdxlab.abi.leaves import HOST_LEAVES
from tdxlab.abi.registers import Registers
from tdxlab.abi.status import is_error, status_name
from tdxlab.arch import PAGE_SIZE, SEPT_LEVEL_NAMES, SIZE_2M
from tdxlab.journal import Table
from tdxlab.kvm.injection import LEAF_MASK, Between, FailNth
from tdxlab.machine import Machine
from tdxlab.step_tape import StepTape
from tdxlab.steps import Operation
from tdxlab.study.teardown_order import destroy_keyid_first
from tdxlab.tape import Action

KEYID_LAST, KEYID_FIRST = "KeyID last", "KeyID first"
ORDERS = (KEYID_LAST, KEYID_FIRST)
MAX_PAGES, MAX_VCPUS, MAX_PACKAGES = 24, 4, 4

# -- what a page of the TD is for

PRIVATE, TDVPR, TDCX, TDCS, TDR = "private", "TDVPR", "TDCX", "TDCS", "TDR"
TABLES = tuple(f"S-EPT {name}" for name in SEPT_LEVEL_NAMES[:4])
ROLES = (PRIVATE, TDVPR, TDCX, *TABLES, TDCS, TDR)

# -- what became of it, for the host

IN_USE, FREE, LEAKED = "in use", "free", "leaked"

# -- the phases, in the order of Linux 6.16

RELEASE, FLUSH, FLUSHDONE = "guest_memfd release", "VP.FLUSH", "VPFLUSHDONE"
CACHE_WB, FREEID = "CACHE.WB", "FREEID"
VCPU_PAGES, TABLE_PAGES, TDCS_PAGES, TDR_PAGE = "vCPU pages", "S-EPT pages", "TDCS", "TDR"
PHASES = (
    RELEASE,
    FLUSH,
    FLUSHDONE,
    CACHE_WB,
    FREEID,
    VCPU_PAGES,
    TABLE_PAGES,
    TDCS_PAGES,
    TDR_PAGE,
)

_PHASE_OF_LEAF = {
    "TDH.VP.FLUSH": FLUSH,
    "TDH.MNG.VPFLUSHDONE": FLUSHDONE,
    "TDH.PHYMEM.CACHE.WB": CACHE_WB,
    "TDH.MNG.KEY.FREEID": FREEID,
}
_PHASE_OF_ROLE = {PRIVATE: RELEASE, TDVPR: VCPU_PAGES, TDCX: VCPU_PAGES, TDCS: TDCS_PAGES}
_PHASE_OF_ROLE |= {TDR: TDR_PAGE} | dict.fromkeys(TABLES, TABLE_PAGES)


class Failure(NamedTuple):
    """Calls that shall fail. leaf: name. n: the first of them, from 1. status: in RAX. times: how
    many in a row, None for all from there on.
    """

    leaf: str
    n: int
    status: int
    times: int | None = 1

    def __str__(self) -> str:
        many = {1: "", None: " and all after it"}.get(self.times, f", {self.times} in a row")
        return f"{self.leaf} number {self.n}{many}: {status_name(self.status)}"


class PageRow(NamedTuple):
    """One page of the TD. role: of ROLES. host: IN_USE, FREE or LEAKED. module: its type in the
    PAMT. cause: why it leaked, "" if it did not.
    """

    hpa: int
    role: str
    host: str
    module: str
    cause: str


class KeyLine(NamedTuple):
    """One KeyID: whom the host gave it to, and what the module says of it. to_write_back: packages
    whose caches still have to be written back.
    """

    keyid: int
    host: str
    module: str
    to_write_back: int


class Tally(Between):
    """Counts KVM's SEAMCALLs, those that fail on purpose too.

    counts: (leaf name, phase) -> calls. refused: name of a status -> calls that ended with it.
    """

    def __init__(self, lab: TeardownLab) -> None:
        super().__init__(lab.machine.host)
        self.lab = lab
        self.counts = Table(self.journal)
        self.refused = Table(self.journal)

    def seamcall_steps(self, lp: int, rax: int, registers: Registers) -> Operation:
        """As the hardware behind; counted as the call begins."""
        leaf = HOST_LEAVES[rax & LEAF_MASK].name
        key = leaf, self.lab.phase_of(leaf, registers.rcx)
        self.counts.put(key, self.counts.get(key, 0) + 1)
        status: int = yield from self.behind.seamcall_steps(lp, rax, registers)
        if is_error(status):
            name = status_name(status)
            self.refused.put(name, self.refused.get(name, 0) + 1)
        return status

    def calls_of(self, leaf: str) -> int:
        """Calls of one leaf so far."""
        return sum(calls for (name, _), calls in self.counts.items() if name == leaf)


class TeardownLab:
    """A TD with some private pages in use, and its teardown on a tape.

    gpaw: 48 or 52. pages: 1 to 24, 4 KiB each. spread: each in a 2 MiB region of its own, so that
    each needs a table. vcpus: 1 to 4, all have run. packages: 1 to 4.
    Refuses numbers out of range: ValueError.
    order, failure: of the teardown on the tape.
    """

    def __init__(
        self,
        *,
        gpaw: int = 48,
        pages: int = 6,
        vcpus: int = 2,
        packages: int = 2,
        spread: bool = False,
    ) -> None:
        _require("pages", pages, MAX_PAGES)
        _require("vcpus", vcpus, MAX_VCPUS)
        _require("packages", packages, MAX_PACKAGES)
        lps = packages * -(-vcpus // packages)
        self.machine = Machine(gpaw=gpaw, memory="1 GiB", lps=lps, packages=packages)
        self.gpaw, self.pages, self.vcpus, self.packages = gpaw, pages, vcpus, packages
        self.order = KEYID_LAST
        self.failure: Failure | None = None
        stride = SIZE_2M if spread else PAGE_SIZE
        self.td = self.machine.create_td(vcpus=vcpus, memory=MAX_PAGES * stride)
        for number in range(max(pages, vcpus)):
            self.td.touch(number % pages * stride, vcpu=number % vcpus)
        self.roles = self._find_roles()
        self.keyid = self.td.tdx.hkid
        self.tape = StepTape(self.machine)
        self.tally = Tally(self)

    # -- taking it apart

    def destroy(self, order: str = KEYID_LAST, failure: Failure | None = None) -> None:
        """Take the TD apart from the beginning, and stand at the end.

        Refuses an order that is none, and a failure of a leaf that is none: ValueError.
        """
        if order not in ORDERS:
            raise ValueError(f"there is no order {order!r}; choose one of {', '.join(ORDERS)}")
        between = [self.tally] if failure is None else [self._injection(failure), self.tally]
        self.tape.seek(0)
        self.order, self.failure = order, failure
        self.tape.perform(order, lambda: self._operation(order, between))

    def _injection(self, failure: Failure) -> FailNth:
        leaf, n, status, times = failure
        return FailNth(self.machine.host, leaf_number(leaf), n=n, status=status, count=times)

    def _operation(self, order: str, between: Sequence[Between]) -> Operation:
        with ExitStack() as stack:
            for one in between:
                stack.enter_context(one)
            if order == KEYID_LAST:
                yield from self.td.destroy_steps()
            else:
                yield from destroy_keyid_first(self.td)

    def phases(self) -> dict[str, int]:
        """Phase -> position at which its first SEAMCALL comes next, in the tape's order."""
        found: dict[str, int] = {}
        for position, action in enumerate(self.tape.actions, start=1):
            found.setdefault(self.phase_of_step(action), position)
        found.pop("", None)
        return found

    def go_to(self, phase: str) -> None:
        """Stand just before the first SEAMCALL of a phase. Refuses one that does not come:
        ValueError.
        """
        places = self.phases()
        if phase not in places:
            raise ValueError(f"no phase {phase!r} in this teardown; it has {', '.join(places)}")
        self.tape.seek(places[phase])

    def phase_of(self, leaf: str, hpa: int) -> str:
        """The phase of a SEAMCALL. hpa: of the page that it is about, with or without KeyID."""
        if leaf.startswith("TDH.PHYMEM.PAGE."):
            return _PHASE_OF_ROLE[self.roles.get(hpa & self.machine.memory.pa_mask, PRIVATE)]
        return _PHASE_OF_LEAF.get(leaf, RELEASE)

    def phase_of_step(self, action: Action) -> str:
        """The phase of a step that is part of a SEAMCALL; "" for another step."""
        leaf, _, rest = action.name.partition(" ")
        if not leaf.startswith("TDH."):
            return ""
        words = rest.split()
        return self.phase_of(leaf, int(words[0], 16) if words[0].startswith("0x") else 0)

    # -- looking

    def ledger(self) -> list[PageRow]:
        """Every page that the module owned, by role, then by address."""
        types = self._types()
        rows = [self._row(hpa, role, types) for hpa, role in self.roles.items()]
        return sorted(rows, key=lambda row: (ROLES.index(row.role), row.hpa))

    def _types(self) -> dict[int, str]:
        """HPA -> type in the PAMT, of each page in use."""
        return {row.hpa: row.page_type for row in views.pamt_rows(self.machine)}

    def _row(self, hpa: int, role: str, types: dict[int, str]) -> PageRow:
        pages = self.machine.host.pages
        cause = pages.leaked.get(hpa, "")
        host = LEAKED if cause else IN_USE if pages.use_of(hpa) else FREE
        return PageRow(hpa, role, host, types.get(hpa, "PT_NDA"), cause)

    def key_lines(self) -> list[KeyLine]:
        """The KeyIDs that somebody has: the module's own, and the TD's as long as one side knows
        it.
        """
        host = self.machine.host
        module = {row.keyid: row for row in views.key_rows(self.machine)}
        lines = []
        for keyid in sorted({host.global_keyid, self.keyid, *module}):
            row = module.get(keyid)
            owner = "TDX module" if keyid == host.global_keyid else host.hkids.get(keyid, FREE)
            waiting = row.pending_packages.bit_count() if row else 0
            lines.append(KeyLine(keyid, owner, row.state if row else "FREE", waiting))
        return lines

    def leaked(self) -> dict[str, int]:
        """Role -> pages of it that are leaked; roles without one are left out."""
        return dict(Counter(row.role for row in self.ledger() if row.host == LEAKED))

    def leaked_pages(self) -> list[int]:
        """HPAs of the TD's pages that are leaked."""
        return [hpa for hpa in self.roles if hpa in self.machine.host.pages.leaked]

    def keyid_is_lost(self) -> bool:
        """The host still counts the TD's KeyID as in use, although the TD is gone."""
        return self.td.vm not in self.machine.host.vm_list and self.keyid in self.machine.host.hkids

    # -- counting

    def calls(self) -> dict[str, int]:
        """Leaf -> SEAMCALLs that KVM has made up to the present position, failed ones too."""
        return self._sums(0)

    def calls_per_phase(self) -> dict[str, int]:
        """Phase -> SEAMCALLs up to the present position; every phase is there."""
        return dict.fromkeys(PHASES, 0) | self._sums(1)

    def _sums(self, part: int) -> dict[str, int]:
        """The tally by one part of its keys."""
        sums: Counter[str] = Counter()
        for key, calls in self.tally.counts.items():
            sums[key[part]] += calls
        return dict(sums)

    def _find_roles(self) -> dict[int, str]:
        """HPA -> role of every page that the module owns for the TD."""
        tdx, types = self.td.tdx, self._types()
        roles = {tdx.td.tdr: TDR} | dict.fromkeys(tdx.td.tdcs, TDCS)
        for vcpu in tdx.vcpus:
            roles |= {vcpu.vp.tdvpr: TDVPR} | dict.fromkeys(vcpu.vp.tdcx, TDCX)
        for sp in self.td.vm.sps.values():
            if sp.external_spt in types:
                roles[sp.external_spt] = TABLES[sp.level - 1]
        return roles | {hpa: PRIVATE for hpa, kind in types.items() if kind == "PT_REG"}


def _require(name: str, value: int, most: int) -> None:
    if not 1 <= value <= most:
        raise ValueError(f"{name}={value}; choose 1 to {most}")


def leaf_number(name: str) -> int:
    """Number of a leaf by its name. Refuses one that the module does not have: ValueError."""
    for number, leaf in HOST_LEAVES.items():
        if leaf.name == name:
            return number
    raise ValueError(f"there is no leaf {name!r}; leaves are written like 'TDH.MEM.TRACK'")
