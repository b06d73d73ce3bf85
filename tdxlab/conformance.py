"""One recorded trace, replayed step by step on a machine of its own.

Every step is an object with either `pseudo` (bookkeeping), `guest_event` (a VM exit) or `leaf` (a
SEAMCALL). The recorder's memory reads the same under every KeyID, so the machine is made without
encryption.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial

from tdxlab.abi.leaves import HOST_LEAVES, Leaf
from tdxlab.abi.registers import Registers
from tdxlab.arch import HPA_MASK
from tdxlab.bare import BareMachine
from tdxlab.comparison import (
    Difference,
    NoAnswer,
    ask,
    compare,
    compare_answer,
    compare_lists,
    differ,
)
from tdxlab.host import TD_PARAMS_BUFFER, Host, SeamcallFailed
from tdxlab.journal import Words
from tdxlab.recorded import (
    VALID_TD_PARAMS,
    Step,
    TraceError,
    host_write,
    inputs,
    number,
    platform,
    registers,
    td_params,
)
from tdxlab.seam import sept
from tdxlab.seam.keys import Keys
from tdxlab.seam.rules import PT_NDA, PT_RSVD, PT_TDR
from tdxlab.seam.system import Sys
from tdxlab.seam.td import Td, Tdcs
from tdxlab.snapshots import Snapshots
from tdxlab.views import key_rows, mrtd, pamt_rows, sept_rows, td_info

#: Where the recorder put "valid TD_PARAMS" when a step says no more than that.
_VALID_PARAMS_AT = (TD_PARAMS_BUFFER, TD_PARAMS_BUFFER + 0x400, 0x1_2000_0000)
_PAMT_SIZES = {"PAMT_4K": 0, "PAMT_2M": 1, "PAMT_1G": 2}
_KOT, _SYS_GLOBAL, _OP_STATE, _SEPT_TREE, _TD_EPOCH, _WBT = range(6)
#: Leaves of these groups take a GPA in RCX, if they take one.
_TAKE_GPA = ("memory", "measurement")


#: What a trace that says nonsense runs into, apart from a missing key.
_NOT_UNDERSTOOD = (
    TraceError,
    TypeError,
    AttributeError,
    IndexError,
    ValueError,
    OverflowError,
    MemoryError,
    SeamcallFailed,
)


class TraceRun:
    """One trace on its way: the machine, the counts, and the mismatches found so far.

    compared: steps compared. skipped: reason -> steps. mismatches: number of the step -> (what was
    called, differences).
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.compared = 0
        self.skipped: Counter[str] = Counter()
        self.mismatches: dict[int, tuple[str, list[Difference]]] = {}
        self._lock: Callable[[], int] | None = None
        self._last = (-1, "the boot")
        self._last_tdr = 0

    def replay(self, trace: Step) -> None:
        """Run all steps and compare the state at the end. Refuses a step it does not understand:
        TraceError with its number.
        """
        place = "platform"
        try:
            self._machine = BareMachine(platform(trace["platform"]), encrypted=False)
            self._snapshots = Snapshots(self._machine.journal)
            boot = trace["platform"]["boot"]
            if boot["booted"]:
                Host(self._machine).boot(tdmr_init=boot["tdmr_init_done"])
            for index, step in enumerate(trace["steps"]):
                place = f"step {index}"
                self._step(index, step)
            place = "final_state"
            if "final_state" in trace:
                self._note(self._compare_dump(trace["final_state"]))
        except KeyError as error:
            raise TraceError(f"{place}: key {error} is missing") from None
        except _NOT_UNDERSTOOD as error:
            raise TraceError(f"{place}: {error}") from None

    def _step(self, index: int, step: Step) -> None:
        if "pseudo" in step:
            self._bookkeeping(step)
            return
        if "leaf" not in step and "guest_event" not in step:
            raise TraceError("neither a SEAMCALL, a guest event nor a pseudo step")
        self._last = index, _title(step)
        reason = self._why_skipped(step)
        if reason:
            self.skipped[reason] += 1
            return
        self.compared += 1
        self._note(self._guest_event(step) if "guest_event" in step else self._seamcall(step))
        self._note(self._compare_extras(step))

    def _note(self, differences: list[Difference]) -> None:
        """Charge differences to the step that was compared last."""
        if differences:
            index, title = self._last
            self.mismatches.setdefault(index, (title, []))[1].extend(differences)

    # -- SEAMCALLs and guest events

    def _why_skipped(self, step: Step) -> str | None:
        """Only a leaf that is not modelled is skipped, and only where the dispatcher would not
        refuse it anyway.
        """
        if "guest_event" in step:
            return None
        rax = _rax(step)
        leaf = HOST_LEAVES.get(rax)
        if leaf is None or leaf.modelled or not self._machine.module.is_ready:
            return None
        return f"not modelled: {leaf.name}"

    def _seamcall(self, step: Step) -> list[Difference]:
        values, lp, rax = registers(step["in"]), self._lp(step), _rax(step)
        self._remember_td(HOST_LEAVES.get(rax & 0xFFFF), values)
        self._write_inputs(step.get("mem_in", {}), values.rdx)
        try:
            status = ask(lambda: self._machine.seamcall(lp, rax, values))
        except NoAnswer as failure:
            return [("status", step["status"], str(failure))]
        return compare_answer(step["status"], step["out"], status, values)

    def _guest_event(self, step: Step) -> list[Difference]:
        given, lp = dict(step["guest_in"]), self._lp(step)
        rax = number(given.pop("rax", 0))
        values, reason = registers(given), number(step["exit_reason"])
        qualification, gpa = number(step["qual"]), number(step["gpa"])
        self._last_tdr = self._machine.cpu.tdr_inside(lp) or self._last_tdr
        try:
            outcome = ask(
                lambda: self._machine.vm_exit(
                    lp, reason, values, rax=rax, qualification=qualification, gpa=gpa
                )
            )
        except NoAnswer as failure:
            return [("result", step["result"], str(failure))]
        found = differ("result", step["result"], "TDEXIT" if outcome.exited else "RESUMED_GUEST")
        recorded = dict(step["out"] if step["result"] == "TDEXIT" else step["guest_out"])
        if "rax" in recorded:
            found += differ("rax", number(recorded.pop("rax")), outcome.status)
        return found + compare_answer(step["status"], recorded, outcome.status, outcome.registers)

    def _lp(self, step: Step) -> int:
        """The step's LP. Refuses one that the platform does not have: TraceError."""
        lp = number(step["lp"])
        if lp not in self._machine.cpu.lps:
            raise TraceError(f"LP {lp} does not exist on this platform")
        return lp

    def _remember_td(self, leaf: Leaf | None, values: Registers) -> None:
        """Which TD a call is about: the first operand that is a TDR, or a page with an owner."""
        pamt = self._machine.module.pamt
        operands = [values.rcx, values.rdx]
        if leaf and leaf.group in _TAKE_GPA:
            operands.reverse()
        for operand in operands:
            hpa = operand & self._machine.memory.pa_mask & HPA_MASK
            if hpa >> 30 not in pamt.blocks:
                continue
            entry = pamt.entry(hpa, 0)
            if pamt.page_type(entry) not in (PT_NDA, PT_RSVD):
                is_tdr = pamt.page_type(entry) == PT_TDR
                self._last_tdr = hpa if is_tdr else pamt.owner(entry)
                return

    def _compare_extras(self, step: Step) -> list[Difference]:
        """What some steps record besides registers: a lock word, the TD's state, its MRTD, a
        BEPOCH.
        """
        found: list[Difference] = []
        if "lock_after" in step:
            if self._lock is None:
                raise TraceError("lock_after without a SET_LOCK before it")
            found += differ("lock word", number(step["lock_after"]), self._lock())
        if "td_info" in step:
            found += self._compare_td("TD", step["td_info"], self._last_tdr)
        for key in ("mrtd", "mrtd_after", "mrtd_before_finalize"):
            if key in step:
                found += self._compare_mrtd(key, step[key], self._last_tdr)
        if "pamt_bepoch_page" in step:
            operand, recorded = number(step["in"]["rcx"]), number(step["pamt_bepoch_page"])
            found += compare("BEPOCH", recorded, lambda: self._bepoch(operand))
        return found

    def _compare_td(self, name: str, recorded: Step, tdr: int) -> list[Difference]:
        def ours() -> Step:
            info = td_info(self._machine, tdr)
            return {field: info.get(field) for field in recorded}

        return compare(name, recorded, ours)

    def _compare_mrtd(self, name: str, recorded: str, tdr: int) -> list[Difference]:
        return compare(name, recorded, lambda: mrtd(self._machine, tdr))

    def _bepoch(self, operand: int) -> int:
        """BEPOCH of what the entry maps that `operand` (GPA and level) names in the last TD."""
        memory, pamt = self._machine.memory, self._machine.module.pamt
        td = Td(memory, self._last_tdr)
        td.map_tdcs(memory)
        eptp = memory.words.view[td.tdcs + Tdcs.EPTP]
        place = sept.walk(memory, eptp, operand & HPA_MASK, operand & 7)
        size = place.sept_level if place.septe & sept.LEAF else 0
        return pamt.bepoch(pamt.entry(place.septe & HPA_MASK, size))

    def _write_inputs(self, given: Step, rdx: int) -> None:
        """What the recorder had in memory for this call."""
        for pa, data in inputs(given, rdx):
            self._write(pa, data)
        if "TD_PARAMS" not in given and "valid TD_PARAMS at" in given.get("note", ""):
            for hpa in _VALID_PARAMS_AT:
                self._write(hpa, td_params(VALID_TD_PARAMS))

    def _write(self, pa: int, data: bytes) -> None:
        memory = self._machine.memory
        memory.write(memory.split(pa)[0], data)

    # -- bookkeeping

    def _bookkeeping(self, step: Step) -> None:
        name = "_do_" + str(step["pseudo"]).lower()
        handler: Callable[[Step], None] | None = getattr(self, name, None)
        if handler is None:
            raise TraceError(f"unknown pseudo step {step['pseudo']!r}")
        handler(step)

    def _do_note(self, step: Step) -> None:
        """A comment."""

    def _do_snapshot(self, step: Step) -> None:
        self._snapshots.keep(step["id"])

    def _do_restore(self, step: Step) -> None:
        self._snapshots.restore(step["id"])

    def _do_host_write(self, step: Step) -> None:
        for pa, data in host_write(step):
            self._write(pa, data)

    def _do_host_interrupt_pending(self, step: Step) -> None:
        self._machine.cpu.conditions.interrupt_pending = bool(step["value"])

    def _do_rdseed_fails(self, step: Step) -> None:
        self._machine.cpu.conditions.entropy_fails = bool(step["value"])

    def _do_pconfig_result(self, step: Step) -> None:
        self._machine.cpu.conditions.pconfig_result = step["value"]

    def _do_mrtd(self, step: Step) -> None:
        self._note(self._compare_mrtd("MRTD", step["mrtd"], number(step["tdr"])))

    def _do_state_dump(self, step: Step) -> None:
        self._note(self._compare_dump(step))

    def _do_set_lock(self, step: Step) -> None:
        """Somebody else holds a lock: its word is set by hand."""
        words, index, mask = self._lock_place(step)
        words.put(index, (words.view[index] & ~mask) | (number(step["value"]) & mask))
        self._lock = lambda: words.view[index] & mask

    def _lock_place(self, step: Step) -> tuple[Words, int, int]:
        """(words, index, mask) of the lock word that a SET_LOCK names."""
        module, memory = self._machine.module, self._machine.memory
        kind = step["object"].split()[0]
        if kind in _PAMT_SIZES:
            entry = module.pamt.entry(number(step["of"]), _PAMT_SIZES[kind])
            return module.pamt.words, entry, 0xFFFF
        if kind == "SEPT_ENTRY":
            hpa = number(step["ram_off"])
            return memory.words, memory.frame(hpa) + (hpa >> 3 & 511), (1 << 64) - 1
        fixed = {
            _KOT: (module.keys.lock, 0),
            _SYS_GLOBAL: (module.system, Sys.LOCK),
            _WBT: (module.keys.wbt, module.keys.wbt_word(0, Keys.MUTEX)),
        }
        lock_id = number(step["lock_id"])
        if lock_id in fixed:
            return *fixed[lock_id], 0xFFFF
        td = Td(memory, number(step["tdr"]))
        td.map_tdcs(memory)
        words = {
            _OP_STATE: Tdcs.OP_STATE_LOCK,
            _SEPT_TREE: Tdcs.SEPT_LOCK,
            _TD_EPOCH: Tdcs.EPOCH_LOCK,
        }
        return memory.words, td.tdcs + words[lock_id], 0xFFFF

    # -- dumps

    def _compare_dump(self, dump: Step) -> list[Difference]:
        found = compare_lists("PAMT", dump["pamt_not_free"], self._pamt)
        found += compare("KOT", dump["kot"], self._kot)
        for tdr, recorded in dump["tds"].items():
            hpa = number(tdr)
            found += self._compare_td(f"TD {tdr}", recorded["info"], hpa)
            rows = partial(self._sept, hpa)
            found += compare_lists(f"S-EPT of {tdr}", recorded["sept"], rows)
        return found

    def _pamt(self) -> list[Step]:
        return [
            {
                "size": row.size,
                "pa": hex(row.hpa),
                "pt": row.page_type,
                "owner": hex(row.owner),
                "bepoch": hex(row.bepoch),
                "lock": hex(row.lock),
            }
            for row in pamt_rows(self._machine)
            if row.page_type != "PT_RSVD"
        ]

    def _kot(self) -> Step:
        return {
            str(key.keyid): {"state": key.state, "wbinvd_bitmap": key.pending_packages}
            for key in key_rows(self._machine)
        }

    def _sept(self, tdr: int) -> list[Step]:
        return [
            {
                "level": row.sept_level,
                "gpa": hex(row.gpa),
                "raw": hex(row.raw),
                "state": row.state,
                "entry_pa": hex(row.entry_hpa),
            }
            for row in sept_rows(self._machine, tdr)
        ]


def _title(step: Step) -> str:
    """What was called, for people."""
    if "guest_event" in step:
        return f"{step['guest_event']} in the guest on LP {step['lp']}"
    operands = " ".join(f"{name}={value}" for name, value in step["in"].items())
    return f"{step['leaf']} on LP {step['lp']}, {operands}"


def _rax(step: Step) -> int:
    if "rax_in" in step:
        return number(step["rax_in"])
    return number(step["leaf_num"]) | number(step["version"]) << 16
