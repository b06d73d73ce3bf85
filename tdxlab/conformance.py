"""One recorded trace, replayed step by step on a machine of its own.

Every step is an object with either `pseudo` (bookkeeping), `guest_event` (a VM exit) or `leaf` (a
SEAMCALL). Numbers are hex strings. The recorder's memory reads the same under every KeyID, so the
machine is made without encryption.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from tdxlab.abi.leaves import HOST_LEAVES
from tdxlab.abi.outcome import IN_GUEST
from tdxlab.abi.registers import REGISTER_NAMES, Registers
from tdxlab.abi.status import status_name
from tdxlab.abi.structs import make_td_params
from tdxlab.hardware import Platform, Region, TdmrPlan
from tdxlab.host import TD_PARAMS_BUFFER, Host
from tdxlab.journal import Mark, Words
from tdxlab.machine import Machine
from tdxlab.seam import sept
from tdxlab.seam.keys import Keys
from tdxlab.seam.rules import PT_NDA, PT_RSVD, PT_TDR
from tdxlab.seam.system import Sys
from tdxlab.seam.td import Td, Tdcs
from tdxlab.views import key_rows, mrtd, pamt_rows, sept_rows, td_info

Step = dict[str, Any]
Difference = tuple[str, str, str]

_LOW_MEMORY = Region(0, 1 << 30)
#: Where the recorder put "valid TD_PARAMS" when a step says no more than that.
_VALID_PARAMS_AT = (TD_PARAMS_BUFFER, TD_PARAMS_BUFFER + 0x400, 0x1_2000_0000)
_PAMT_SIZES = {"PAMT_4K": 0, "PAMT_2M": 1, "PAMT_1G": 2}
_KOT, _SYS_GLOBAL, _OP_STATE, _SEPT_TREE, _TD_EPOCH, _WBT = range(6)


class TraceError(Exception):
    """Input that is not a trace, or not one that this replayer understands."""


def number(value: Any) -> int:
    """A number of a trace: a hex string or an int. Refuses anything else: TraceError."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    try:
        return int(value, 16)
    except (TypeError, ValueError):
        raise TraceError(f"{value!r} is not a number (hex string)") from None


def read_platform(raw: Step) -> Platform:
    """The hardware that a trace was recorded on."""
    return Platform(
        low_memory=_LOW_MEMORY,
        cmrs=tuple(_region(cmr) for cmr in raw["cmrs"]),
        tdmrs=tuple(_tdmr_plan(tdmr) for tdmr in raw["tdmrs"]),
        pamt_region=number(raw["pamt_region"]),
        seamrr=_region(raw["seamrr"]),
        keyid_bits=raw["hkid_bits"],
        private_keyids=(raw["private_hkid_min"], raw["private_hkid_max"]),
        global_keyid=raw["tdx_global_hkid"],
        max_pa_bits=raw["maxpa"],
        package_of=tuple(raw["lp_to_package"]),
        wbinvd_sub_blocks=raw["wbinvd_sub_blocks"],
    )


def _region(raw: Step) -> Region:
    return Region(number(raw["base"]), number(raw["size"]))


def _tdmr_plan(raw: Step) -> TdmrPlan:
    """A TDMR; its reserved areas are objects in a platform and pairs in a host write."""
    reserved = (r if isinstance(r, list) else (r["offset"], r["size"]) for r in raw["reserved"])
    areas = tuple(Region(number(offset), number(size)) for offset, size in reserved)
    return TdmrPlan(*_region(raw), areas)


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
        self._marks: dict[Any, Mark] = {}
        self._lock: Callable[[], int] | None = None
        self._last = (-1, "the boot")
        self._last_tdr = 0

    def replay(self, trace: Step) -> None:
        """Run all steps and compare the state at the end. Refuses a step it does not understand:
        TraceError with its number.
        """
        place = "platform"
        try:
            self._machine = Machine(read_platform(trace["platform"]), encrypted=False)
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
        except (TraceError, TypeError, AttributeError, IndexError, ValueError) as error:
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
        leaf = HOST_LEAVES.get(step.get("leaf_num", -1)) if "guest_event" not in step else None
        if leaf is None or leaf.modelled or not self._machine.module.is_ready:
            return None
        return f"not modelled: {leaf.name}"

    def _seamcall(self, step: Step) -> list[Difference]:
        registers = _registers(step["in"])
        self._remember_td(registers.rcx, registers.rdx)
        self._write_inputs(step.get("mem_in", {}), registers.rdx)
        rax = number(step["rax_in"]) if "rax_in" in step else _rax(step)
        status = self._machine.seamcall(step["lp"], rax, registers)
        return _compare_answer(step["status"], step["out"], status, registers)

    def _guest_event(self, step: Step) -> list[Difference]:
        given = dict(step["guest_in"])
        rax = number(given.pop("rax", 0))
        self._last_tdr = self._machine.cpu.tdr_inside(step["lp"])
        outcome = self._machine.vm_exit(
            step["lp"],
            step["exit_reason"],
            _registers(given),
            rax=rax,
            qualification=number(step["qual"]),
            gpa=number(step["gpa"]),
        )
        kind = "TDEXIT" if outcome.exited else "RESUMED_GUEST"
        found = _differ("result", step["result"], kind)
        recorded = dict(step["out"] if step["result"] == "TDEXIT" else step["guest_out"])
        recorded.pop("rax", None)
        return found + _compare_answer(step["status"], recorded, outcome.status, outcome.registers)

    def _remember_td(self, *operands: int) -> None:
        """Which TD a step is about: the first operand that is a TDR, or a page with an owner."""
        pamt = self._machine.module.pamt
        for operand in operands:
            hpa = operand & self._machine.memory.pa_mask & ~0xFFF
            if hpa >> 30 not in pamt.blocks:
                continue
            entry = pamt.entry(hpa, 0)
            if pamt.page_type(entry) == PT_TDR:
                self._last_tdr = hpa
                return
            if pamt.page_type(entry) not in (PT_NDA, PT_RSVD):
                self._last_tdr = pamt.owner(entry)
                return

    def _compare_extras(self, step: Step) -> list[Difference]:
        """What some steps record besides registers: a lock word, the TD's state, its MRTD, a
        BEPOCH.
        """
        found: list[Difference] = []
        if "lock_after" in step:
            if self._lock is None:
                raise TraceError("lock_after without a SET_LOCK before it")
            found += _differ("lock word", number(step["lock_after"]), self._lock())
        if "td_info" in step:
            found += _compare_fields(step["td_info"], td_info(self._machine, self._last_tdr))
        for key in ("mrtd", "mrtd_after", "mrtd_before_finalize"):
            if key in step:
                found += _differ(key, step[key], mrtd(self._machine, self._last_tdr))
        if "pamt_bepoch_page" in step:
            found += _differ("BEPOCH", number(step["pamt_bepoch_page"]), self._bepoch(step))
        return found

    def _bepoch(self, step: Step) -> int:
        """BEPOCH of the page that the step's GPA is mapped to."""
        memory, pamt = self._machine.memory, self._machine.module.pamt
        operand = number(step["in"]["rcx"])
        td = Td(memory, self._last_tdr)
        td.map_tdcs(memory)
        eptp = memory.words.view[td.tdcs + Tdcs.EPTP]
        place = sept.walk(memory, eptp, operand & ~0xFFF, operand & 7)
        return pamt.bepoch(pamt.entry(sept.leaf_hpa(place), place.sept_level))

    def _write_inputs(self, given: Step, rdx: int) -> None:
        """What the recorder had in memory for this call."""
        if "source_page" in given:
            source = given["source_page"]
            self._write(number(source["pa"]), _pattern(_pattern_number(source["pattern"])))
        if "TD_PARAMS" in given:
            params = bytearray(_td_params(given["TD_PARAMS"]))
            if "plus_byte" in given:
                params[given["plus_byte"]["offset"]] = given["plus_byte"]["value"]
            self._write(rdx, bytes(params))
        elif "valid TD_PARAMS at" in given.get("note", ""):
            for hpa in _VALID_PARAMS_AT:
                self._write(hpa, _td_params({"max_vcpus": 4, "eptp": 0x1E}))

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
        old = self._marks.pop(step["id"], None)
        self._marks[step["id"]] = self._machine.mark()
        if old is not None:
            self._machine.journal.forget(old)

    def _do_restore(self, step: Step) -> None:
        self._machine.rewind(self._marks[step["id"]])

    def _do_host_write(self, step: Step) -> None:
        if "tdmrs" in step:
            self._write_tdmr_infos(step)
        elif "fields" in step:
            self._write(number(step["pa"]), _td_params(step["fields"]))
        else:
            self._write(number(step["pa"]), _pattern(0))

    def _write_tdmr_infos(self, step: Step) -> None:
        array = number(step["ptr_array"])
        for j, raw in enumerate(step["tdmrs"]):
            info = array + 0x1000 * (j + 1)
            self._write(array + 8 * j, info.to_bytes(8, "little"))
            self._write(info, b"".join(w.to_bytes(8, "little") for w in _tdmr_words(raw)))

    def _do_host_interrupt_pending(self, step: Step) -> None:
        self._machine.cpu.conditions.interrupt_pending = bool(step["value"])

    def _do_rdseed_fails(self, step: Step) -> None:
        self._machine.cpu.conditions.entropy_fails = bool(step["value"])

    def _do_pconfig_result(self, step: Step) -> None:
        self._machine.cpu.conditions.pconfig_result = step["value"]

    def _do_mrtd(self, step: Step) -> None:
        self._note(_differ("MRTD", step["mrtd"], mrtd(self._machine, number(step["tdr"]))))

    def _do_state_dump(self, step: Step) -> None:
        self._note(self._compare_dump(step))

    def _do_set_lock(self, step: Step) -> None:
        """Somebody else holds a lock: its word is set by hand."""
        words, index, mask = self._lock_place(step)
        words.put(index, (words.view[index] & ~mask) | number(step["value"]))
        self._lock = lambda: words.view[index] & mask

    def _lock_place(self, step: Step) -> tuple[Words, int, int]:
        """(words, index, mask) of the lock word that a SET_LOCK names."""
        module, memory = self._machine.module, self._machine.memory
        kind = step["object"].split()[0]
        if kind in _PAMT_SIZES:
            return (
                module.pamt.words,
                module.pamt.entry(number(step["of"]), _PAMT_SIZES[kind]),
                0xFFFF,
            )
        if kind == "SEPT_ENTRY":
            return memory.words, self._septe_index(step), (1 << 64) - 1
        lock_id = step["lock_id"]
        fixed = {
            _KOT: (module.keys.lock, 0),
            _SYS_GLOBAL: (module.system, Sys.LOCK),
            _WBT: (module.keys.wbt, module.keys.wbt_word(0, Keys.MUTEX)),
        }
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

    def _septe_index(self, step: Step) -> int:
        """Word index of an S-EPT entry that a SET_LOCK names by its physical address."""
        hpa = number(step["ram_off"])
        return self._machine.memory.frame(hpa) + (hpa >> 3 & 511)

    # -- dumps

    def _compare_dump(self, dump: Step) -> list[Difference]:
        machine = self._machine
        rows = (r for r in pamt_rows(machine) if r.page_type != "PT_RSVD")
        pamt = [
            {
                "size": row.size,
                "pa": hex(row.hpa),
                "pt": row.page_type,
                "owner": hex(row.owner),
                "bepoch": hex(row.bepoch),
                "lock": hex(row.lock),
            }
            for row in rows
        ]
        kot = {
            str(key.keyid): {"state": key.state, "wbinvd_bitmap": key.pending_packages}
            for key in key_rows(machine)
        }
        found = _compare_lists("PAMT", dump["pamt_not_free"], pamt)
        found += _differ("KOT", dump["kot"], kot)
        for tdr, recorded in dump["tds"].items():
            found += _compare_fields(recorded["info"], td_info(machine, number(tdr)), f"{tdr} ")
            found += _compare_lists(f"S-EPT of {tdr}", recorded["sept"], self._sept(number(tdr)))
        return found

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
    return int(step["leaf_num"]) | int(step["version"]) << 16


def _registers(given: Step) -> Registers:
    unknown = sorted(set(given) - set(REGISTER_NAMES))
    if unknown:
        raise TraceError(f"unknown register {unknown[0]!r}")
    return Registers(**{name: number(value) for name, value in given.items()})


def _pattern(i: int) -> bytes:
    """The recorder's source page: byte j is i*7 + j."""
    return bytes((i * 7 + j) & 0xFF for j in range(4096))


def _pattern_number(text: str) -> int:
    """The i of "byte[j]=(i*7+j)&0xff"."""
    return int(text.partition("(")[2].partition("*")[0])


def _td_params(fields: Step) -> bytes:
    """TD_PARAMS from the recorder's names of its fields."""
    return make_td_params(
        max_vcpus=number(fields.get("max_vcpus", 0)),
        eptp_controls=number(fields.get("eptp", 0)),
        attributes=number(fields.get("attributes", 0)),
        xfam=number(fields.get("xfam", 3)),
        num_l2_vms=number(fields.get("num_l2", 0)),
        config_flags=number(fields.get("config", 0)),
        tsc_frequency=number(fields.get("tsc", 40)),
    )


def _tdmr_words(raw: Step) -> list[int]:
    """The 40 words of a TDMR_INFO as the recorder writes it."""
    size = number(raw["size"])
    size_2m = -(-((size >> 21) * 16) // 4096) * 4096
    words = [number(raw["base"]), size, number(raw["pamt_1g"][0]), 0x1000]
    words += [number(raw["pamt_2m"]), size_2m, number(raw["pamt_4k"]), (size >> 12) * 16]
    for offset, length in raw["reserved"]:
        words += [number(offset), number(length)]
    return words + [0] * (40 - len(words))


# -- comparing


def _show(value: Any) -> str:
    return f"{value:#x}" if isinstance(value, int) else str(value)


def _differ(name: str, recorded: Any, ours: Any) -> list[Difference]:
    return [] if recorded == ours else [(name, _show(recorded), _show(ours))]


def _show_status(status: int) -> str:
    return "IN_GUEST" if status == IN_GUEST else f"{status:#018x} {status_name(status)}"


def _compare_answer(
    recorded: str, out: Step, status: int, registers: Registers
) -> list[Difference]:
    """Status and every recorded register."""
    expected = IN_GUEST if recorded == "IN_GUEST" else number(recorded)
    found: list[Difference] = []
    if expected != status:
        found.append(("status", _show_status(expected), _show_status(status)))
    for name, value in out.items():
        if name not in REGISTER_NAMES:
            raise TraceError(f"unknown register {name!r}")
        found += _differ(name, number(value), getattr(registers, name))
    return found


def _compare_fields(recorded: Step, ours: Step, prefix: str = "") -> list[Difference]:
    pairs: Iterator[list[Difference]] = (
        _differ(f"{prefix}{name}", value, ours.get(name)) for name, value in recorded.items()
    )
    return [difference for pair in pairs for difference in pair]


def _compare_lists(name: str, recorded: list[Step], ours: list[Step]) -> list[Difference]:
    """The first place where two lists of rows differ."""
    for place in range(max(len(recorded), len(ours))):
        left = recorded[place] if place < len(recorded) else "nothing"
        right = ours[place] if place < len(ours) else "nothing"
        if left != right:
            return [(f"{name}, row {place}", str(left), str(right))]
    return []
