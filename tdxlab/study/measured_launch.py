"""Building a TD from an image, with real SEAMCALLs, and asking it for its report.

    built = build(Recipe(SMALL_IMAGE))
    built.mrtd()                      # the field that TDH.MR.FINALIZE filled
    mrtd(built.log)                   # the same from the log, with hashlib alone
    built.report()[512:]              # TDINFO

A recipe says all that the host decides; two recipes that differ in one thing show whether the
measurement sees it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from tdxlab import views
from tdxlab.abi import leaves as abi
from tdxlab.abi.outcome import GuestOutcome
from tdxlab.abi.registers import Registers
from tdxlab.arch import HPA_MASK
from tdxlab.bare import BareMachine
from tdxlab.host import Host
from tdxlab.host_td import HostTd
from tdxlab.scenarios import booted_machine
from tdxlab.seam.attest import REPORT_SIZE, TD_INFO_SIZE
from tdxlab.seam.td import Tdr
from tdxlab.study.measurement_log import (
    PAGE_ADD,
    PAGE_BY_PAGE,
    SMALL_IMAGE,
    Image,
    Record,
    log_of,
    mrtd,
)
from tdxlab.tape import Action, Tape

#: Offset of TDINFO in a report, behind REPORTMACSTRUCT and TEE_TCB_INFO.
TD_INFO = REPORT_SIZE - TD_INFO_SIZE

#: Where a running guest gets a page for its report: the first free one from here on.
REPORT_GPA = 0x7000_0000
REPORT_DATA_OFFSET = 2048

#: The guest runs here; the host calls from LP 0.
GUEST_LP = 1

#: The calls that a record stands for.
MEASURED_LEAVES = {"TDH.MEM.PAGE.ADD", "TDH.MR.EXTEND"}


class Recipe(NamedTuple):
    """All that a host decides when it builds a TD.

    image: the pages, in order; order: of the calls. vcpus: 1 or more. attributes: TD attributes.
    pending: GPAs of pages that it maps without content before it finalises, for the guest to
    accept. skip: host pages that it leaves unused, so that everything lies elsewhere in RAM.
    """

    image: Image = SMALL_IMAGE
    order: str = PAGE_BY_PAGE
    gpaw: int = 48
    vcpus: int = 1
    attributes: int = 0
    pending: tuple[int, ...] = ()
    skip: int = 0


class Built(NamedTuple):
    """A TD that was built. log: its records, from the recipe alone. tape: every call."""

    recipe: Recipe
    log: list[Record]
    tape: Tape
    td: HostTd

    def mrtd(self) -> str:
        """MRTD as the module has it, 96 hex digits: zeros before TDH.MR.FINALIZE."""
        return views.mrtd(self.tape.machine, self.td.tdr)

    def agrees(self) -> bool:
        """True if the module's MRTD and the one from the log are equal."""
        return self.mrtd() == mrtd(self.log)

    def report(self) -> bytes:
        """Let the guest ask for a report (TDG.MR.REPORT) over 64 zero bytes; returns its 1024
        bytes.
        """
        gpa = next(g for g in range(REPORT_GPA, self.td.limit, 4096) if g not in self.td.pages)
        self.enter()
        self.td.aug(gpa)
        self.td.accept(GUEST_LP, gpa)
        registers = Registers(rcx=gpa, rdx=gpa + REPORT_DATA_OFFSET)
        _require_success(self.tape.tdcall(GUEST_LP, abi.TDG_MR_REPORT, registers))
        return self.guest_memory(gpa, REPORT_SIZE)

    def extend_rtmr(self, number: int, gpa: int) -> bytes:
        """Let the guest extend RTMR `number` by the 48 bytes at `gpa`; returns those bytes."""
        self.enter()
        registers = Registers(rcx=gpa, rdx=number)
        _require_success(self.tape.tdcall(GUEST_LP, abi.TDG_MR_RTMR_EXTEND, registers))
        return self.guest_memory(gpa, 48)

    def enter(self) -> None:
        """Put vCPU 0 on its LP, unless it is there."""
        if not self.tape.machine.cpu.vcpu_inside(GUEST_LP):
            self.td.enter(0, lp=GUEST_LP)

    def guest_memory(self, gpa: int, size: int) -> bytes:
        """`size` bytes that the guest sees at `gpa`; they must lie in one page."""
        hpa, _ = self.td.pages[gpa & -4096]
        return self.tape.machine.memory.read(hpa | gpa & 4095, size, self.td.keyid)


def build(recipe: Recipe, machine: BareMachine | None = None) -> Built:
    """Build a TD up to TDH.MR.FINALIZE. machine: booted, without TDs; a fresh one if None."""
    return build_on(Tape(machine or booted_machine()), recipe)


def build_on(tape: Tape, recipe: Recipe) -> Built:
    """Build a TD on `tape`, from its beginning; what was recorded there is forgotten."""
    tape.seek(0)
    tape.phase = ""
    host = Host(tape.machine, tape)
    for _ in range(recipe.skip):
        host.take_page()
    td = HostTd(host, gpaw=recipe.gpaw, max_vcpus=recipe.vcpus, attributes=recipe.attributes)
    log = log_of(recipe.image, recipe.order)
    for record in log:
        _do(td, recipe.image, record)
    for gpa in recipe.pending:
        td.aug(gpa)
    for _ in range(recipe.vcpus):
        td.add_vcpu(lp=GUEST_LP)
    td.finalize()
    return Built(recipe, log, tape, td)


def _do(td: HostTd, image: Image, record: Record) -> None:
    """The host's call that a record stands for."""
    if record.call == PAGE_ADD:
        td.add_page(record.gpa, image[record.page].content)
    else:
        td.host.phase("measure a page")
        td.host.must(0, abi.TDH_MR_EXTEND, rcx=record.gpa, rdx=td.tdr)


def _require_success(outcome: GuestOutcome) -> None:
    if outcome.exited or outcome.status:
        raise RuntimeError(f"the guest's call did not succeed: {outcome}")


# -- what the bench sees of the hash


class LeafBytes(NamedTuple):
    """One leaf of a build: how often it was called, and how many bytes its calls hashed."""

    leaf: str
    calls: int
    moved: int
    bytes_hashed: int


def records_done(actions: list[Action]) -> int:
    """How many of these actions are calls that feed the measurement."""
    return sum(action.name in MEASURED_LEAVES for action in actions)


def running_digest(machine: BareMachine, tdr: int) -> str | None:
    """SHA-384 over what the module was fed so far, 96 hex digits; None before TDH.MNG.INIT.

    Only the lab bench can look at it: the module shows nothing before TDH.MR.FINALIZE.
    """
    if tdr not in views.tds(machine):
        return None
    page = machine.memory.frame(tdr)
    first_tdcx = machine.memory.words.view[page + Tdr.TDCX_PA]
    context = machine.module.measurements.get(first_tdcx & machine.memory.pa_mask & HPA_MASK)
    return None if context is None else str(context.hexdigest())


def digests(built: Built) -> Iterator[tuple[Action, str | None]]:
    """Every action of a build and the running digest behind it; leaves the tape where it was."""
    position = built.tape.position
    for number, action in enumerate(built.tape.actions, start=1):
        built.tape.seek(number)
        yield action, running_digest(built.tape.machine, built.td.tdr)
    built.tape.seek(position)


def bytes_by_leaf(built: Built) -> list[LeafBytes]:
    """For each leaf: calls, how many of them moved the running digest, and the bytes hashed.

    The calls that moved it are observed; the bytes come from the log, record by record.
    """
    rows: dict[str, LeafBytes] = {}
    before: str | None = None
    waiting = iter(built.log)
    for action, digest in digests(built):
        if action.kind == "SEAMCALL":
            row = rows.get(action.name, LeafBytes(action.name, 0, 0, 0))
            moved = before is not None and digest != before
            size = len(next(waiting).data) if moved else 0
            rows[action.name] = LeafBytes(
                action.name, row.calls + 1, row.moved + moved, row.bytes_hashed + size
            )
        before = digest
    return list(rows.values())
