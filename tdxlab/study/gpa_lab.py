"""A running TD whose guest touches one GPA after another, and what the module says to GPAs.

    lab = GpaLab(gpaw=48)
    lab.touch(0x12345678)                  # private, and there is a page
    lab.touch(0x8000_1234_5678)            # the same frame, shared: the guest leaves for the host
    gate_rows(48)                          # which GPAs the module takes as private

Differs: this host has no tables for shared memory, so every shared access leaves the guest.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

from tdxlab.abi import leaves as abi
from tdxlab.abi.registers import Registers
from tdxlab.abi.status import describe, operand_name, status_name
from tdxlab.abi.structs import make_td_params
from tdxlab.arch import GPAW_CHOICES, PA_LIMIT, PAGE_OFFSET_MASK, PAGE_SIZE, shared_bit
from tdxlab.bare import BareMachine
from tdxlab.hardware import default_platform
from tdxlab.host import TD_PARAMS_BUFFER, Host
from tdxlab.host_td import TDCS_PAGES, HostTd
from tdxlab.scenarios import booted_machine
from tdxlab.study.gpa_split import EXAMPLE_GPA, config_flags, eptp_controls, split
from tdxlab.tape import Action, Tape

#: How far apart the guest's reads lie in its code.
_INSTRUCTION_BYTES = 4


class Touch(NamedTuple):
    """One access by the guest, as the host hears of it. host_is_told: R8 of the TD exit, "-" if the
    guest did not leave.
    """

    gpa: str
    half: str
    outcome: str
    host_is_told: str


class GpaLab:
    """A TD with one vCPU and one page, at the example GPA; the guest is about to run on LP 0.

    gpaw: 48 or 52. tape: what the guest does.
    """

    def __init__(self, *, gpaw: int = 48) -> None:
        self.gpaw = gpaw
        self.td = HostTd(Host(booted_machine()), gpaw=gpaw, max_vcpus=1)
        self.td.add_vcpu(lp=0)
        self.td.add_page(EXAMPLE_GPA & ~PAGE_OFFSET_MASK)
        self.td.finalize()
        self.tape = Tape(self.td.host.machine)

    @property
    def last_gpa(self) -> int | None:
        """The GPA that the guest touched last, None before the first touch."""
        return next((a.inputs["gpa"] for a in reversed(self._played()) if is_touch(a)), None)

    def touch(self, gpa: int) -> Touch:
        """Let the guest read the byte at `gpa`; it is entered first if it is outside. Each read is
        an instruction of its own: the module stops a guest that faults again and again at one.

        Refuses a GPA that the guest cannot form: ValueError.
        """
        split(gpa, self.gpaw)
        if not self.tape.machine.cpu.vcpu_inside(0):
            self.tape.seamcall(0, abi.TDH_VP_ENTER, Registers(rcx=self.td.vcpus[0]))
        self.tape.touch(0, gpa, rip=self.tape.position * _INSTRUCTION_BYTES)
        return self.touches()[-1]

    def touches(self) -> list[Touch]:
        """Every touch up to the present position."""
        return [self._told(action) for action in self._played() if is_touch(action)]

    def _played(self) -> list[Action]:
        return self.tape.actions[: self.tape.position]

    def _told(self, action: Action) -> Touch:
        at = split(action.inputs["gpa"], self.gpaw)
        if not action.exited:
            outcome, told = f"translated to HPA {action.outputs['hpa']:#x}", "-"
        else:
            outcome, told = "TD exit: EPT violation", f"{action.outputs['r8']:#x}"
        return Touch(f"{at.gpa:#x}", at.half, outcome, told)


def is_touch(action: Action) -> bool:
    """True for an access to memory by the guest."""
    return action.kind == "touch"


def edge_gpas(gpaw: int) -> dict[str, int]:
    """What stands at the edges of a TD's GPA space -> the GPA, ascending."""
    half = 1 << shared_bit(gpaw)
    return {
        "first private page": 0,
        "last private page": half - PAGE_SIZE,
        "first shared page": half,
        "last shared page": 2 * half - PAGE_SIZE,
    }


# -- what the module takes


class GateRow(NamedTuple):
    """One GPA, and whether the module takes it as a private one. answer: to TDH.MEM.SEPT.RD."""

    what: str
    gpa: int
    taken: bool
    answer: str


def gate_rows(gpaw: int) -> list[GateRow]:
    """The edges of a TD's GPA space, and beyond them."""
    gpas = {"the page that was added": EXAMPLE_GPA & ~PAGE_OFFSET_MASK} | edge_gpas(gpaw)
    gpas |= {"first page beyond the width": 1 << gpaw, "first page beyond 52 bits": PA_LIMIT}
    unlike = {gpa: what for what, gpa in gpas.items()}
    return gate(((what, gpa) for gpa, what in unlike.items()), gpaw)


def gate(gpas: Iterable[tuple[str, int]], gpaw: int) -> list[GateRow]:
    """Ask the module to show the 4K entry of each GPA of a TD. gpas: (what it is, page-aligned
    byte address).
    """
    td = GpaLab(gpaw=gpaw).td
    rows = []
    for what, gpa in gpas:
        status, _ = td.host.call(0, abi.TDH_MEM_SEPT_RD, rcx=gpa, rdx=td.tdr)
        taken = not is_invalid_operand(status)
        rows.append(GateRow(what, gpa, taken, describe(status).partition(":")[0]))
    return rows


def is_invalid_operand(status: int) -> bool:
    """True if the module found an operand illegal by itself, whatever the tables say."""
    return status_name(status) == "TDX_OPERAND_INVALID"


class WidthRow(NamedTuple):
    """What the module says to a GPAW and a number of levels on a host. answer: to TDH.MNG.INIT."""

    maxphyaddr: int
    gpaw: int
    levels: int
    answer: str


def width_rows(hosts: Iterable[int] = (48, 52)) -> list[WidthRow]:
    """Every width with every number of levels, on hosts of some physical address widths."""
    return [
        WidthRow(maxphyaddr, gpaw, levels, answer)
        for maxphyaddr in hosts
        for (gpaw, levels), answer in _init_answers(maxphyaddr).items()
    ]


def _init_answers(maxphyaddr: int) -> dict[tuple[int, int], str]:
    """(gpaw, levels) -> the answer to TDH.MNG.INIT, each time from the same state."""
    platform = replace(default_platform(tdmr_gib=1), max_pa_bits=maxphyaddr)
    host = Host(BareMachine(platform))
    host.boot()
    tdr = _bare_td(host)
    start = host.machine.mark()
    answers = {}
    for gpaw in GPAW_CHOICES:
        for levels in (4, 5):
            params = make_td_params(
                max_vcpus=1, eptp_controls=eptp_controls(levels), config_flags=config_flags(gpaw)
            )
            host.door.store(TD_PARAMS_BUFFER, params)
            status, _ = host.call(0, abi.TDH_MNG_INIT, rcx=tdr, rdx=TD_PARAMS_BUFFER)
            blamed = operand_name(status)
            answers[gpaw, levels] = f"{status_name(status)}{f' ({blamed})' if blamed else ''}"
            host.machine.rewind(start)
    return answers


def _bare_td(host: Host) -> int:
    """A TD that has its keys and control pages and waits for TDH.MNG.INIT; returns its TDR."""
    tdr = host.take_page()
    host.must(0, abi.TDH_MNG_CREATE, rcx=tdr, rdx=host.take_keyid())
    for package in host.machine.cpu.packages:
        host.must(host.lp_of(package), abi.TDH_MNG_KEY_CONFIG, rcx=tdr)
    for _ in range(TDCS_PAGES):
        host.must(0, abi.TDH_MNG_ADDCX, rcx=host.take_page(), rdx=tdr)
    return tdr
