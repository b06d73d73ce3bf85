"""The replayer notices whatever is wrong: in a trace's answers (a mismatch), or in the file itself.

Real traces are cut short behind the step that matters, then damaged in one place.
"""

from __future__ import annotations

import copy
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tdxlab.bare import BareMachine
from tdxlab.replay import command, replay
from tests import trace_cuts
from tests.trace_cuts import Pick, Trace

TRACES = Path(__file__).parent.parent / "data" / "conformance" / "tdx_module"


def load(name: str, until: Pick | None = None) -> tuple[Trace, dict[str, Any]]:
    """As `trace_cuts.load`, by name."""
    return trace_cuts.load(TRACES / f"{name}.json.gz", until)


def is_guest_event(result: str) -> Pick:
    return lambda step: step.get("result") == result


def run(tmp_path: Path, *traces: Any, as_json: bool = True) -> tuple[int, Any, str]:
    """(exit status, report, what stands on stderr) of a replay of these traces."""
    paths = []
    for number, trace in enumerate(traces):
        paths.append(tmp_path / f"trace_{number}.json")
        paths[-1].write_text(json.dumps(trace))
    out, err = io.StringIO(), io.StringIO()
    status = command([str(path) for path in paths], as_json, out, err)
    shown = json.loads(out.getvalue()) if as_json and out.getvalue() else out.getvalue()
    return status, shown, err.getvalue()


# -- answers that differ


def flip(value: Any) -> Any:
    """Another value of the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value ^ 1
    return value[:-1] + ("0" if value[-1] != "0" else "1")


DAMAGES: list[tuple[str, str, Pick, tuple[Any, ...]]] = [
    ("a status", "s9_keys_hkids", lambda s: "td_info" in s, ("status",)),
    ("rcx", "s9_keys_hkids", lambda s: "td_info" in s, ("out", "rcx")),
    ("r11", "s9_keys_hkids", lambda s: "td_info" in s, ("out", "r11")),
    ("lifecycle", "s9_keys_hkids", lambda s: "td_info" in s, ("td_info", "lifecycle_state")),
    ("epoch", "s4_tlb_tracking", lambda s: "td_info" in s, ("td_info", "td_epoch")),
    ("refcount", "s4_tlb_tracking", lambda s: "td_info" in s, ("td_info", "refcount1")),
    ("lock word", "s6_locks_runnable", lambda s: "lock_after" in s, ("lock_after",)),
    ("mrtd", "s7_mrtd", lambda s: "mrtd" in s and "leaf" in s, ("mrtd",)),
    ("mrtd after", "s1_life_gpaw48", lambda s: "mrtd_after" in s, ("mrtd_after",)),
    ("MRTD", "s7_mrtd", lambda s: s.get("pseudo") == "MRTD", ("mrtd",)),
    (
        "mrtd before",
        "s7_mrtd",
        lambda s: "mrtd_before_finalize" in s,
        ("mrtd_before_finalize",),
    ),
    (
        "bepoch",
        "s4_tlb_tracking",
        lambda s: "pamt_bepoch_page" in s,
        ("pamt_bepoch_page",),
    ),
    ("exit or not", "s9_accept_gpaw48_att0", is_guest_event("TDEXIT"), ("result",)),
    ("exit status", "s9_accept_gpaw48_att0", is_guest_event("TDEXIT"), ("status",)),
    ("exit rdx", "s9_accept_gpaw48_att0", is_guest_event("TDEXIT"), ("out", "rdx")),
    (
        "guest rax",
        "s9_accept_gpaw48_att0",
        is_guest_event("RESUMED_GUEST"),
        ("guest_out", "rax"),
    ),
    ("guest r8", "s9_accept_gpaw48_att0", is_guest_event("RESUMED_GUEST"), ("guest_out", "r8")),
]


@pytest.mark.parametrize(
    ("name", "until", "place"), [case[1:] for case in DAMAGES], ids=[case[0] for case in DAMAGES]
)
def test_replay_reports_a_mismatch_for_each_kind_of_answer(
    tmp_path: Path, name: str, until: Pick, place: tuple[Any, ...]
) -> None:
    trace, step = load(name, until)
    assert run(tmp_path, trace)[0] == 0
    target = step
    for key in place[:-1]:
        target = target[key]
    if place == ("result",):
        step["guest_out"] = step["out"]
        target["result"] = "RESUMED_GUEST"
    else:
        target[place[-1]] = flip(target[place[-1]])
    status, report, _ = run(tmp_path, trace)
    assert (status, report["mismatched"]) == (1, 1)


@pytest.mark.parametrize(
    "damage",
    [
        lambda dump: dump["pamt_not_free"][0].update(owner="0x1000"),
        lambda dump: dump["pamt_not_free"][0].update(bepoch="0x7"),
        lambda dump: dump["pamt_not_free"][0].update(lock="0x2"),
        lambda dump: dump["pamt_not_free"][0].update(pt="PT_REG"),
        lambda dump: dump["pamt_not_free"].pop(),
        lambda dump: next(iter(dump["tds"].values()))["sept"][-1].update(raw="0x1"),
        lambda dump: next(iter(dump["tds"].values()))["sept"][-1].update(state="REMOVED"),
        lambda dump: next(iter(dump["tds"].values()))["sept"].pop(),
        lambda dump: next(iter(dump["tds"].values()))["info"].update(chldcnt=1),
        lambda dump: next(iter(dump["kot"].values())).update(wbinvd_bitmap=3),
        lambda dump: dump["kot"].update({"63": {"state": "FLUSHED", "wbinvd_bitmap": 0}}),
    ],
    ids=[
        *("owner", "page bepoch", "page lock", "page type", "page missing", "raw entry"),
        *("entry state", "entry missing", "children", "write-back bitmap", "another KeyID"),
    ],
)
@pytest.mark.parametrize("where", ["final_state", "STATE_DUMP"])
def test_replay_reports_a_mismatch_in_a_dump(
    tmp_path: Path, where: str, damage: Callable[[Trace], None]
) -> None:
    trace, _ = load("s8_walk_0036")
    if where == "STATE_DUMP":
        trace["steps"].append({"pseudo": "STATE_DUMP", **trace.pop("final_state")})
    assert run(tmp_path, trace)[0] == 0
    dump = trace["steps"][-1] if where == "STATE_DUMP" else trace["final_state"]
    damage(dump)
    status, report, _ = run(tmp_path, trace)
    assert (status, report["mismatched"]) == (1, 1)


def test_replay_goes_on_after_a_mismatch(tmp_path: Path) -> None:
    trace, _ = load("s1_life_gpaw48")
    _, whole, _ = run(tmp_path, trace)
    trace["steps"][0]["status"] = "0xc000010000000000"
    status, report, _ = run(tmp_path, trace)
    assert status == 1
    assert report["mismatched"] == 1
    assert (report["steps"], report["compared"]) == (whole["steps"], whole["compared"])
    assert report["first_mismatches"][0]["step"] == 0


def test_replay_goes_on_with_a_vcpu_that_is_inside_in_the_trace_only(tmp_path: Path) -> None:
    trace, _ = load("s9_accept_gpaw48_att0")
    place = next(i for i, s in enumerate(trace["steps"]) if s.get("status") == "IN_GUEST")
    del trace["steps"][place]
    status, report, err = run(tmp_path, trace)
    assert (status, err) == (1, "")
    recorded = [s for s in trace["steps"] if "pseudo" not in s]
    assert report["steps"] == len(recorded)
    assert "LP" in json.dumps(report["first_mismatches"][0]["differences"])


def test_replay_goes_on_when_the_model_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace, _ = load("s9_keys_hkids")
    real = BareMachine.seamcall
    calls = []

    def fails_once(machine: BareMachine, lp: int, rax: int, registers: Any) -> int:
        calls.append(rax)
        if rax == trace["steps"][-1]["leaf_num"] and len(calls) > 600:
            raise KeyError("a bug")
        return real(machine, lp, rax, registers)

    monkeypatch.setattr(BareMachine, "seamcall", fails_once)
    status, report, err = run(tmp_path, trace)
    assert (status, err) == (1, "")
    assert "a bug" in json.dumps(report["first_mismatches"])


def test_replay_shows_what_was_called_and_both_answers(tmp_path: Path) -> None:
    trace, _ = load("s1_life_gpaw48")
    trace["steps"][0]["out"]["rcx"] = "0x123"
    _, text, _ = run(tmp_path, trace, as_json=False)
    assert "trace_0, step 0: TDH.MNG.CREATE on LP 0" in text
    assert "rcx: the real code gave 0x123, the model 0x100100000" in text


def test_replay_as_json_is_one_object_with_these_keys(tmp_path: Path) -> None:
    trace, _ = load("s2_states_c")
    status, report, _ = run(tmp_path, trace, trace)
    assert status == 0
    assert list(report) == [
        *("traces", "steps", "compared", "skipped", "mismatched"),
        *("skipped_by_reason", "first_mismatches"),
    ]
    assert report["traces"] == 2
    assert report["steps"] == report["compared"] + report["skipped"]
    assert report["skipped"] == sum(report["skipped_by_reason"].values()) > 0
    assert all(reason.startswith("not modelled: TDH.") for reason in report["skipped_by_reason"])


def test_replay_compares_what_the_dispatcher_refuses_even_if_not_modelled(tmp_path: Path) -> None:
    export_mem = {"lp": 0, "leaf": "TDH.EXPORT.MEM", "leaf_num": 68, "in": {}, "out": {}}
    trace, _ = load("s1_life_gpaw48", lambda s: True)
    trace["steps"] = [
        export_mem | {"version": 0, "status": "0x0"},
        export_mem | {"version": 1, "status": "0xc000010000000000"},
    ]
    _, report, _ = run(tmp_path, trace)
    assert (report["compared"], report["skipped"], report["mismatched"]) == (1, 1, 0)


def test_progress_is_told_after_each_trace(tmp_path: Path) -> None:
    trace, _ = load("s9_keys_hkids", lambda s: True)
    for number in range(3):
        (tmp_path / f"t{number}.json").write_text(json.dumps(trace))
    told: list[tuple[int, int]] = []
    replay([str(tmp_path)], lambda done, total: told.append((done, total)))
    assert told == [(0, 3), (1, 3), (2, 3), (3, 3)]


# -- files that are wrong


def refused(path: Path) -> str:
    """The one line about `path`, without its name."""
    out, err = io.StringIO(), io.StringIO()
    assert command([str(path)], False, out, err) == 2
    assert out.getvalue() == ""
    line = err.getvalue()
    assert line.count("\n") == 1
    assert line.startswith(f"tdxlab replay: {path}")
    return line.removeprefix(f"tdxlab replay: {path}").strip(": \n")


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (gzip.compress(b"{}" * 1000, mtime=0)[:-20], "damaged or truncated gzip"),
        (gzip.compress(b"{}", mtime=0)[:-8] + b"\0" * 8, "damaged or truncated gzip"),
        (b"\x1f\x8b", "damaged or truncated gzip"),
        (b"\xc3\x28", "not a trace: not text (byte 0)"),
        (b"{", "not JSON (line 1, column 2)"),
        (b"", "not JSON (line 1, column 1)"),
        (b"[" * 100_000, "not a trace"),
        (b'{"a": ' + b"1" * 5000 + b"}", "not a trace"),
        (b"[1, 2]", "not a trace: neither of the TDX module"),
        (b'{"platform": {}}', "not a trace: neither of the TDX module ('platform', 'steps')"),
        (b'{"platform": {}, "steps": []}', "platform: key 'cmrs' is missing"),
        (b'{"platform": 1, "steps": []}', "platform: "),
    ],
)
def test_replay_of_a_file_that_is_no_trace_is_one_line(
    tmp_path: Path, content: bytes, complaint: str
) -> None:
    path = tmp_path / "odd.json.gz"
    path.write_bytes(content)
    assert complaint in refused(path)


def test_replay_of_a_real_trace_cut_anywhere_is_one_line(tmp_path: Path) -> None:
    whole = (TRACES / "s9_keys_hkids.json.gz").read_bytes()
    path = tmp_path / "cut.json.gz"
    for length in (1, 9, 10, 11, len(whole) // 2, len(whole) - 8, len(whole) - 1):
        path.write_bytes(whole[:length])
        refused(path)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"in": {"rcx": "0x0", "rzx": "0x0"}}, "step 0: unknown register 'rzx'"),
        ({"out": {"eax": "0x0"}}, "step 0: unknown register 'eax'"),
        ({"in": {"rcx": "green"}}, "step 0: 'green' is not a number (hex string)"),
        ({"in": {"rcx": True}}, "step 0: True is not a number (hex string)"),
        ({"in": {"rcx": "0x10000000000000000"}}, "step 0: 0x10000000000000000 does not fit 64"),
        ({"in": {"rcx": -1}}, "step 0: -0x1 does not fit 64 bits"),
        ({"in": None}, "step 0: "),
        ({"lp": 99}, "step 0: LP 99 does not exist on this platform"),
        ({"mem_in": {"TD_PARAMS": {"max_vcpus": "0x10000"}}}, "step 0: "),
        ({"lock_after": "0x0"}, "step 0: lock_after without a SET_LOCK before it"),
        ({"pseudo": "DANCE"}, "step 0: unknown pseudo step 'DANCE'"),
        ({"pseudo": "RESTORE", "id": 7}, "step 0: key 7 is missing"),
        ({"pseudo": "SET_LOCK", "object": "KOT"}, "step 0: key 'lock_id' is missing"),
    ],
)
def test_replay_of_a_step_that_says_nonsense_names_the_step(
    tmp_path: Path, change: Trace, complaint: str
) -> None:
    trace, step = load("s1_life_gpaw48", lambda s: True)
    step.update(copy.deepcopy(change))
    path = tmp_path / "odd.json"
    path.write_text(json.dumps(trace))
    assert refused(path).startswith(complaint)


@pytest.mark.parametrize("key", ["status", "in", "out", "lp", "version"])
def test_replay_of_a_step_without_a_key_names_both(tmp_path: Path, key: str) -> None:
    trace, _ = load("s9_keys_hkids")
    del trace["steps"][3][key]
    path = tmp_path / "odd.json"
    path.write_text(json.dumps(trace))
    assert refused(path) == f"step 3: key '{key}' is missing"


def test_replay_of_a_guest_event_with_an_unknown_register_names_it(tmp_path: Path) -> None:
    trace, step = load("s9_accept_gpaw48_att0", is_guest_event("TDEXIT"))
    step["guest_in"]["xmm0"] = "0x0"
    path = tmp_path / "odd.json"
    path.write_text(json.dumps(trace))
    assert "unknown register 'xmm0'" in refused(path)


def test_replay_of_nothing_is_one_line(tmp_path: Path) -> None:
    assert refused(tmp_path / "missing.json") == "no such file or folder"
    assert "no traces" in refused(tmp_path)
