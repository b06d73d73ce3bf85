"""A TD's life on a tape, on a whole machine: KVM, the TDX module, and a guest of eight pages.

    lab = LifeLab(gpaw=48)
    lab.build()
    lab.touch(1)                        # the guest writes to private memory
    lab.share(1); lab.touch_shared(1)   # MapGPA, and a write to the same page, now shared
    lab.trees()["mirror"]               # every table of a tree, with the entries in use
    lab.tear_down()

What the lab remembers of the TD lives under the machine's journal: one may go on from anywhere.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

from tdxlab import views
from tdxlab.accounts import DIRECT, EXTERNAL, MIRROR, TREES
from tdxlab.arch import ENTRIES_PER_TABLE, HPA_MASK, PAGE_SHIFT, PAGE_SIZE, SIZE_2M, sept_levels
from tdxlab.guest import MapGpa, Write
from tdxlab.journal import Field, Fields, Journalled
from tdxlab.kvm.spte import FROZEN_SPTE, SPTE_MMU_PRESENT_MASK, is_last_spte
from tdxlab.kvm.tdx_build import MemRegion, tdx_td_finalize, tdx_vcpu_init_mem_region
from tdxlab.kvm.tdx_init import InitVm, tdx_td_init
from tdxlab.kvm.tdx_vcpu import tdx_vcpu_create, tdx_vcpu_init
from tdxlab.kvm.vm import MmuPage, Vm
from tdxlab.machine import Machine
from tdxlab.scenarios import CODE_GPA
from tdxlab.seam.td import SEPT_ROOT_PAGE
from tdxlab.steps import Operation
from tdxlab.study.life_tape import SEAMCALL, STORE, TDCALL, LifeTape, becomes
from tdxlab.study.mirror_lab import FROZEN, MAPPED, TABLE
from tdxlab.vmm_run import RunResult
from tdxlab.vmm_td import SEPT_VE_DISABLE, SOURCE_HVA, Td

#: Pages of the guest, from CODE_GPA on: number 0 is measured at launch.
GUEST_PAGES = 8
GREETING = b"the guest's first instructions"

PRIVATE, SHARED = "private", "shared"

# -- the phases of a life

CREATE, VCPU, IMAGE, FINALIZE = "create the TD", "add a vCPU", "add the image", "finalize"
TOUCH, SHARE, TOUCH_SHARED, TEAR_DOWN = "touch", "share", "touch shared", "tear down"


#: Kinds of acts by which the module is asked.
CALLS = (SEAMCALL, TDCALL)


class Entry(NamedTuple):
    """One entry in use. number: its place in the table. state: of the S-EPT, or TABLE, MAPPED or
    FROZEN. hpa: of what it points to, 0 if that is nothing.
    """

    number: int
    state: str
    hpa: int
    raw: int


class TreeTable(NamedTuple):
    """One page-table page. level: 0 for the tables of 4 KiB entries. hpa: of the page."""

    level: int
    hpa: int
    entries: tuple[Entry, ...]


class LifeLab(Journalled):
    """A machine that a TD of one vCPU comes to life on.

    gpaw: 48 or 52. td: the TD, None before it is built and after it is torn down.
    """

    td: Field[Td | None] = Field(None)

    def __init__(self, *, gpaw: int = 48) -> None:
        self.gpaw = gpaw
        self.levels = sept_levels(gpaw)
        self.machine = Machine(gpaw=gpaw, memory="1 GiB", lps=4, packages=2)
        self.fields = Fields(self.machine.journal, self)
        self.tape = LifeTape(self.machine)

    # -- a life

    def build(self) -> None:
        """Create, add a vCPU, add and measure the image, finalize.

        Refuses a second TD: ValueError.
        """
        if self.td is not None:
            raise ValueError("the TD is there already; tear it down first, or reset")
        self._perform(CREATE, self._create)
        self._perform(VCPU, self._add_vcpu)
        self._perform(IMAGE, self._add_image)
        self._perform(FINALIZE, lambda: tdx_td_finalize(self.alive().tdx))

    def touch(self, page: int) -> None:
        """The guest writes to a private page. Refuses a shared one: ValueError."""
        gpa = self._page(page, PRIVATE)
        self._run(TOUCH, lambda td: td.run_steps([Write(gpa, b"private, page %d" % page)]))

    def share(self, page: int) -> None:
        """The guest has a page converted. Refuses one that is shared already: ValueError."""
        gpa = self._page(page, PRIVATE)
        asked = gpa | self.alive().guest.shared_mask
        self._run(SHARE, lambda td: td.run_steps([MapGpa(asked, PAGE_SIZE)]))

    def touch_shared(self, page: int) -> None:
        """The guest writes to a shared page. Refuses a private one: ValueError."""
        gpa = self._page(page, SHARED) | self.alive().guest.shared_mask
        self._run(TOUCH_SHARED, lambda td: td.run_steps([Write(gpa, b"shared, page %d" % page)]))

    def tear_down(self) -> None:
        """All file descriptors are closed; nothing of the TD stays."""
        self.alive()
        self._perform(TEAR_DOWN, self._destroy)

    def alive(self) -> Td:
        """The TD. Refuses when there is none: ValueError."""
        if self.td is None:
            raise ValueError("there is no TD; press Build first")
        return self.td

    def _page(self, page: int, kind: str) -> int:
        """GPA of a page that has to be of that kind."""
        td, gpa = self.alive(), CODE_GPA + page * PAGE_SIZE
        if not 0 <= page < GUEST_PAGES:
            raise ValueError(f"page {page} is not there; choose from 0..{GUEST_PAGES - 1}")
        is_shared = gpa >> PAGE_SHIFT in td.guest.shared
        if kind == PRIVATE and is_shared:
            raise ValueError(f"page {page} is shared now; press Touch shared, or take another page")
        if kind == SHARED and not is_shared:
            raise ValueError(f"page {page} is private; press Share first")
        return gpa

    # -- the operations on the tape

    def _perform(self, phase: str, start: Callable[[], Operation]) -> None:
        ret = self.tape.perform(phase, lambda: self.machine.host.on_cpu(0, self._heard(start())))
        if isinstance(ret, RunResult) and not ret.ok:
            raise ValueError(f"{phase}: {ret.reason} {ret.detail}")
        if isinstance(ret, int) and ret:
            raise ValueError(f"{phase}: errno {-ret}")

    def _run(self, phase: str, start: Callable[[Td], Operation]) -> None:
        self._perform(phase, lambda: start(self.alive()))

    def _heard(self, operation: Operation) -> Operation:
        """The operation; the tape is told of the entries that KVM stores in it."""
        while True:
            if self.td is not None and self.td.vm.listener is None:
                self.td.vm.listener = self._listen
            try:
                step = next(operation)
            except StopIteration as end:
                return end.value
            yield step

    def _listen(self, event: tuple[Any, ...]) -> None:
        if event[0] == "spte_changed":
            _, _, level, gfn, _, spte = event
            state = _entry(0, spte, level).state if _in_use(spte) else "empty"
            self.tape.told.append(becomes(level, gfn, state))

    def _create(self) -> Operation:
        self.td = td = Td(self.machine.host, gpaw=self.gpaw)
        init = InitVm(gpaw=self.gpaw, attributes=SEPT_VE_DISABLE, max_vcpus=1)
        ret = yield from tdx_td_init(td.tdx, init)
        td.add_memory(CODE_GPA, SIZE_2M)
        return ret

    def _add_vcpu(self) -> Operation:
        vcpu = tdx_vcpu_create(self.alive().tdx, 0)
        return vcpu if isinstance(vcpu, int) else (yield from tdx_vcpu_init(vcpu, 0))

    def _add_image(self) -> Operation:
        td = self.alive()
        td.user_memory.mmap(SOURCE_HVA, PAGE_SIZE)
        td.user_memory.write(SOURCE_HVA, GREETING)
        region = MemRegion(SOURCE_HVA, CODE_GPA, 1)
        ret, _ = yield from tdx_vcpu_init_mem_region(td.tdx.vcpus[0], region)
        yield from td.user_memory.munmap(SOURCE_HVA, PAGE_SIZE)
        return ret

    def _destroy(self) -> Operation:
        yield from self.alive().destroy_steps()
        self.td = None

    # -- looking

    def trees(self) -> dict[str, list[TreeTable]]:
        """Tree -> its tables, each before those below it; [] for a tree that is not there."""
        found: dict[str, list[TreeTable]] = {tree: [] for tree in TREES}
        if self.td is None:
            return found
        vm = self.td.vm
        for root in vm.tdp_mmu_roots:
            sp: MmuPage = vm.sps[root]
            _collect(vm, sp, found[MIRROR if sp.is_mirror else DIRECT])
        if self.td.tdr is not None:
            found[EXTERNAL] = self._external(self.td)
        return found

    def _external(self, td: Td) -> list[TreeTable]:
        """The Secure EPT; the lab bench can look into it."""
        tdr, tdcs = td.tdr, td.tdx.td.tdcs
        if tdr is None or len(tdcs) <= SEPT_ROOT_PAGE:
            return []
        root = tdcs[SEPT_ROOT_PAGE]
        pages: dict[int, tuple[int, list[Entry]]] = {root: (self.levels - 1, [])}
        for row in views.sept_rows(self.machine, tdr):
            table = row.entry_hpa & -PAGE_SIZE
            hpa = row.raw & HPA_MASK & self.machine.memory.pa_mask & -PAGE_SIZE
            entry = Entry(row.entry_hpa % PAGE_SIZE // 8, row.state, hpa, row.raw)
            pages.setdefault(table, (row.sept_level, []))[1].append(entry)
            if row.state in ("NL_MAPPED", "NL_BLOCKED"):
                pages.setdefault(hpa, (row.sept_level - 1, []))
        return [TreeTable(level, hpa, tuple(rows)) for hpa, (level, rows) in pages.items()]

    def page_base(self) -> int:
        """HPA from which on the host hands out pages, rounded down to 2 MiB."""
        tds = views.tds(self.machine)
        return (tds[0] if tds else self.machine.platform.tdmrs[0].base) & -SIZE_2M


def _collect(vm: Vm, sp: MmuPage, found: list[TreeTable]) -> None:
    """Add KVM's table `sp` and those below it."""
    start = vm.table_base(sp.spt)
    sptes = vm.memory.words.view[start : start + ENTRIES_PER_TABLE]
    used = [(i, spte) for i, spte in enumerate(sptes) if _in_use(spte)]
    entries = [_entry(index, spte, sp.level) for index, spte in used]
    found.append(TreeTable(sp.level - 1, sp.spt, tuple(entries)))
    for entry in entries:
        if entry.state == TABLE:
            _collect(vm, vm.sp_of(entry.raw), found)


def _in_use(spte: int) -> bool:
    return spte == FROZEN_SPTE or bool(spte & SPTE_MMU_PRESENT_MASK)


def _entry(index: int, spte: int, level: int) -> Entry:
    if spte == FROZEN_SPTE:
        return Entry(index, FROZEN, 0, spte)
    state = MAPPED if is_last_spte(spte, level) else TABLE
    return Entry(index, state, spte & HPA_MASK & -PAGE_SIZE, spte)


class ByWhom(NamedTuple):
    """How often the entries of one tree changed by each kind of act on a tape."""

    tree: str
    kvm_store: int
    seamcall: int
    tdcall: int


def who_changed(lab: LifeLab) -> list[ByWhom]:
    """For each tree: stops of the tape behind which its entries were others than before, by what
    was done. Leaves the tape where it stood. Where KVM has stored and called in one stop, its own
    trees count as stored, the module's as called.
    """
    here, counts = lab.tape.position, Counter[tuple[str, str]]()
    lab.tape.seek(0)
    before = _contents(lab)
    for position in range(1, len(lab.tape) + 1):
        lab.tape.seek(position)
        now = _contents(lab)
        counts.update((tree, _kind(lab.tape, tree)) for tree in TREES if now[tree] != before[tree])
        before = now
    lab.tape.seek(here)
    return [ByWhom(tree, *(counts[tree, kind] for kind in (STORE, *CALLS))) for tree in TREES]


def _kind(tape: LifeTape, tree: str) -> str:
    """What changed a tree on the way to the present position: the last call, or the store."""
    done = [action for action in tape.actions_at(tape.position) if action.kind in CALLS]
    if tape.has_stored and (tree != EXTERNAL or not done):
        return STORE
    return done[-1].kind if done else "nobody"


def _contents(lab: LifeLab) -> dict[str, list[TreeTable]]:
    """The tables that have entries."""
    return {tree: [one for one in tables if one.entries] for tree, tables in lab.trees().items()}
