"""The replay of the MMU's traces notices whatever is wrong: in a trace's answers, or in the file.

Real traces are cut short behind the step that matters, then damaged in one place.
"""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Iterator
from errno import EINVAL, ENOENT, EOPNOTSUPP
from pathlib import Path
from typing import Any

import pytest

from tdxlab.arch import HPA_MASK
from tdxlab.kvm import tdp_mmu
from tdxlab.kvm.spte import FROZEN_SPTE, SHADOW_NONPRESENT_VALUE
from tdxlab.mmu_conformance import ops, ops_range, ops_spte, script
from tdxlab.mmu_conformance.decode import Args, config, integer, params, plain
from tdxlab.mmu_conformance.record import Recorder, TableNames, show, split_spte, stride
from tdxlab.mmu_conformance.rig import (
    Countdown,
    FreshPages,
    GuestPages,
    Resched,
    UserPages,
    host_level_of,
    hva_of_slot,
)
from tdxlab.mmu_conformance.run import MmuTraceRun
from tdxlab.recorded import TraceError
from tdxlab.replay import command, replay
from tests import trace_cuts
from tests.trace_cuts import Pick, Trace

DATA = Path(__file__).parent.parent / "data" / "conformance"
TRACES = DATA / "tdp_mmu"


def load(name: str, until: Pick | None = None) -> tuple[Trace, dict[str, Any]]:
    """As `trace_cuts.load`, by name."""
    return trace_cuts.load(TRACES / f"{name}.json.gz", until)


def mismatches(trace: Trace) -> dict[int, list[str]]:
    """Step -> names of what differs, `final` not among them."""
    run = MmuTraceRun("test")
    run.replay(trace)
    found = {
        step: [name.replace(",", " ").split()[0] for name, _, _ in differences]
        for step, (_, differences) in run.mismatches.items()
    }
    return {
        step: kept for step, names in found.items() if (kept := [n for n in names if n != "final"])
    }


# -- traces as they are


#: One small trace of each kind.
SOUND = [
    "s1_faults_gpaw48",
    "s2_fail_free_external_spt",
    "s3_teardown_tdx_gmemrelease",
    "s4_frozen_tdx",
    "s4_race_tdx",
    "s5_age_tdx_ad1",
    "s5_dirty_tdx_pml0_eager0",
    "s6_iter_tdx",
    "s8_spte_default_noad",
    "s9_realtdx_gpaw48",
    "s9_realtdx_premap",
    "walkrace_tdx_204",
]


@pytest.mark.parametrize("name", SOUND)
def test_replay_of_a_real_trace_finds_nothing(name: str) -> None:
    trace, _ = load(name)
    run = MmuTraceRun(name)
    run.replay(trace)
    assert run.mismatches == {}
    assert run.compared == len(trace["steps"])
    assert not run.skipped


def test_replay_tells_both_kinds_of_traces_apart() -> None:
    module = DATA / "tdx_module" / "s9_keys_hkids.json.gz"
    report = replay([str(module), str(TRACES / "s4_race_tdx.json.gz")])
    assert report.traces == 2
    assert report.mismatched == 0
    assert report.compared > 20


def test_replay_in_two_processes_reports_the_same(tmp_path: Path) -> None:
    trace, step = load("s4_race_tdx", is_op("fault"))
    step["ret"] = "RET_PF_RETRY"
    (tmp_path / "bad.json").write_text(json.dumps(trace))
    paths = [str(tmp_path), str(TRACES / "s4_race_tdx.json.gz")]
    assert replay(paths, jobs=2).as_dict() == replay(paths).as_dict()
    (tmp_path / "worse.json").write_text("{}")
    with pytest.raises(TraceError, match=r"worse\.json: not a trace: neither"):
        replay(paths, jobs=2)


# -- answers that differ


def is_op(name: str, key: str = "ret") -> Pick:
    """The first step of that operation of which `key` is not empty."""
    return lambda step: step["op"] == name and bool(step.get(key))


def flip(value: Any) -> Any:
    """Another value of the same kind."""
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, int):
        return value ^ 1
    return value[:-1] + ("0" if value[-1] != "0" else "1")


DAMAGES: list[tuple[str, Pick, tuple[Any, ...]]] = [
    ("s1_faults_gpaw48", is_op("fault"), ("ret",)),
    ("s1_faults_gpaw48", is_op("fault"), ("gpa",)),
    ("s1_faults_gpaw48", is_op("fault"), ("error_code",)),
    ("s1_faults_gpaw48", is_op("fault"), ("goal_level",)),
    ("s1_faults_gpaw48", is_op("fault", "hooks"), ("hooks", 1, 1)),
    ("s1_faults_gpaw48", is_op("fault", "hooks"), ("events", 0, 1)),
    ("s1_faults_gpaw48", is_op("fault", "spte_changes"), ("spte_changes", 0, 5)),
    ("s1_faults_gpaw48", is_op("fault", "spte_changes"), ("spte_changes", 3, 6)),
    ("s1_faults_gpaw48", is_op("fault"), ("stats", "pt_pages_mirror")),
    ("s1_faults_gpaw48", is_op("fault", "memory_fault_exit"), ("memory_fault_exit", "flags")),
    ("s1_faults_gpaw48", is_op("slot", "slot"), ("slot", "hva")),
    ("s1_faults_gpaw48", is_op("slot", "slot"), ("slot", "generation")),
    ("s1_faults_gpaw48", is_op("map_page", "level"), ("level",)),
    ("s1_faults_gpaw48", is_op("get_walk"), ("walk", 0, 1)),
    ("s1_faults_gpaw48", is_op("snapshot", "roots"), ("roots", 0, "refcount")),
    ("s1_faults_gpaw48", is_op("snapshot", "roots"), ("roots", 0, "sptes", 3, 3)),
    ("s1_faults_gpaw48", is_op("snapshot", "roots"), ("roots", 1, "pt_pages", "1")),
    ("s1_maxlevel_default", is_op("max_mapping_level"), ("ret",)),
    ("s1_maxlevel_default", is_op("tdp_map"), ("req_level",)),
    ("s3_zapleafs_default", is_op("zap_gfn_range", "flush"), ("flush", 0, 2)),
    ("s3_zapleafs_default", is_op("zap_gfn_range", "spte_changes"), ("spte_changes", 0, 7)),
    ("s4_race_tdx", is_op("fault", "events"), ("events", 3, 3, "ret")),
    ("s4_race_tdx", is_op("fault", "events"), ("events", 3, 3, "stats", "gen")),
    ("s5_dirty_tdx_pml0_eager0", is_op("dirty_bits", "dirty"), ("dirty", 0)),
    ("s6_iter_tdx", is_op("iter", "events"), ("events", 1, 2)),
    ("s6_iter_tdx", is_op("iter", "events"), ("events", -1, 3, "count")),
    ("s8_spte_default_noad", is_op("make_spte"), ("ret",)),
    ("s8_spte_default_noad", is_op("spte_pred", "present"), ("needs_atomic",)),
    ("s8_spte_default_noad", is_op("acc_track", "restored"), ("restored",)),
    ("s9_realtdx_gpaw48", is_op("fault", "hooks"), ("events", 3, 2)),
    ("s9_realtdx_premap", is_op("premapped"), ("ret",)),
]


@pytest.mark.parametrize(
    ("name", "pick", "where"), DAMAGES, ids=[f"{d[0]} {'.'.join(map(str, d[2]))}" for d in DAMAGES]
)
def test_replay_reports_a_mismatch_for_each_kind_of_answer(
    name: str, pick: Pick, where: tuple[Any, ...]
) -> None:
    trace, step = load(name, pick)
    assert mismatches(copy.deepcopy(trace)) == {}
    place = step
    for key in where[:-1]:
        place = place[key]
    place[where[-1]] = flip(place[where[-1]])
    assert mismatches(trace) == {len(trace["steps"]) - 1: [where[0]]}


@pytest.mark.parametrize("key", ["hooks", "flush", "events", "spte_changes"])
@pytest.mark.parametrize("change", ["missing", "extra"])
def test_replay_reports_a_mismatch_for_lists_of_other_lengths(key: str, change: str) -> None:
    trace, step = load("s3_zapleafs_tdx", lambda s: bool(s.get("hooks") and s.get("flush")))
    if change == "missing":
        step[key].pop()
    else:
        step[key].append(["kvm_flush_remote_tlbs"])
    assert mismatches(trace) == {len(trace["steps"]) - 1: [key]}


def test_replay_reports_a_memory_fault_exit_that_the_trace_has_not() -> None:
    trace, step = load("s1_faults_gpaw48", is_op("fault", "memory_fault_exit"))
    del step["memory_fault_exit"]
    assert mismatches(trace) == {len(trace["steps"]) - 1: ["memory_fault_exit"]}


def test_replay_reports_a_table_that_changed_its_name() -> None:
    trace, step = load("s1_faults_gpaw48", is_op("snapshot", "roots"))
    rows = [row for row in step["roots"][0]["sptes"] if str(row[4]).startswith("pt#")]
    rows[0][4], rows[1][4] = rows[1][4], rows[0][4]
    assert mismatches(trace) == {len(trace["steps"]) - 1: ["roots"]}


def test_replay_accepts_tables_under_other_names() -> None:
    trace, _ = load("s1_faults_gpaw48", is_op("snapshot", "roots"))
    text = json.dumps(trace).replace('"pt#', '"pt#9')
    assert mismatches(json.loads(text)) == {}


def test_replay_compares_the_page_tables_before_the_teardown() -> None:
    trace, _ = load("s1_faults_gpaw48")
    teardown = next(
        place
        for place, step in enumerate(trace["steps"])
        if str(step.get("text")).startswith("teardown")
    )
    trace["final"][0]["refcount"] += 1
    run = MmuTraceRun("test")
    run.replay(trace)
    assert list(run.mismatches) == [teardown]
    assert run.mismatches[teardown][1][0][0] == "final, row 0 refcount"


def test_replay_compares_what_the_trace_says_of_the_host() -> None:
    trace, _ = load("s4_race_tdx")
    trace["masks"]["shadow_present_mask"] = "0x1"
    assert mismatches(trace) == {-1: ["shadow_present_mask"]}


def test_replay_goes_on_when_the_model_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> bool:
        raise RuntimeError("broken")

    monkeypatch.setattr(tdp_mmu, "kvm_tdp_mmu_gpa_is_mapped", fail)
    trace, _ = load("s1_faults_gpaw48", is_op("snapshot", "roots"))
    run = MmuTraceRun("test")
    run.replay(trace)
    _, differences = next(
        entry for entry in run.mismatches.values() if entry[0].startswith("is_mapped")
    )
    assert differences[0] == ("ret", "False", "no answer (RuntimeError: broken)")
    assert run.compared == len(trace["steps"])


# -- operations and arguments that the packaged traces do not have


def answers(trace: Trace, *steps: tuple[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """What the model answers to these operations on the VM of a trace."""
    found: list[dict[str, Any]] = []

    class Listening(MmuTraceRun):
        def _compare_step(self, step: dict[str, Any], results: dict[str, Any]) -> None:
            found.append(results)

    trace["steps"] = [{"op": op, "args": args} for op, args in steps]
    Listening("test").replay(trace)
    return found


#: The operations that the recorder had, apart from bookkeeping.
RECORDED = """
slot attr fault fault_noreload map_page pre_fault tdp_map unmap age test_age zap_leafs zap_gfn_range
zap_sp zap_all zap_all_fast invalidate_roots zap_invalidated flush_shadow_all destroy_vcpu uninit_vm
hkid_release split recover wrprot_slot clear_dirty_slot clear_dirty_pt_masked log_dirty_pt_masked
write_protect_gfn recover_nx dirty_bits notifier is_mapped get_walk getspte setspte hwset iter
scfail make_spte make_mmio make_nonleaf make_small make_huge acc_track spte_pred max_mapping_level
gen reload unload rcu mmio_pf tdx_state premapped
"""


def test_replay_knows_every_operation_of_the_recorder() -> None:
    known = {**ops.OPS, **ops_range.OPS, **ops_spte.OPS, **script.operations(None)}
    assert sorted(known) == sorted(RECORDED.split())


def test_replay_of_attr_is_refused_where_a_vm_has_no_private_memory() -> None:
    trace, _ = load("s1_maxlevel_default")
    private = {"start": 0, "end": 1, "private": 1}
    found = answers(trace, ("attr", private), ("attr", private | {"private": 0}))
    assert [results["ret"] for results in found] == [-EINVAL, 0]
    assert found[0]["stats"]["invalidate_seq"] == 0


def test_replay_of_tdp_map_keeps_fetches_off_large_pages_under_the_nx_workaround() -> None:
    trace, _ = load("s1_maxlevel_default")
    trace["module_init"]["nx"] = 1
    slot = {"id": 0, "base": 0, "npages": "0x400", "hl": 2}
    fetch = {"gpa": 0, "pfn": "0x200000000", "exec": 1}
    _, mapped = answers(trace, ("slot", slot), ("tdp_map", fetch))
    assert (mapped["huge_page_disallowed"], mapped["goal_level"], mapped["req_level"]) == (1, 1, 2)
    assert mapped["stats"]["nx_lpage_splits"] == 1


def test_replay_of_tdx_state_lets_pages_be_mapped_ahead_without_real_hooks() -> None:
    trace, _ = load("s4_race_tdx")
    trace["vm"]["runnable"] = 0
    ahead = ("pre_fault", {"gpa": 0})
    found = answers(trace, ahead, ("tdx_state", {"runnable": 1}), ahead, ("rcu", {}))
    assert [results["ret"] for results in found] == [-EOPNOTSUPP, None, -ENOENT, None]


# -- input that is no trace


def refused(tmp_path: Path, trace: Any) -> str:
    """What the command says of a trace that it refuses, in one line."""
    path = tmp_path / "odd.json"
    path.write_text(json.dumps(trace))
    out, err = io.StringIO(), io.StringIO()
    assert command([str(path)], False, out, err) == 2
    assert out.getvalue() == ""
    (line,) = err.getvalue().splitlines()
    return line.removeprefix(f"tdxlab replay: {path}: ")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"op": "fly"}, "step 0: unknown operation 'fly'"),
        ({"args": {"id": "green", "npages": 1}}, "step 0: 'green' is not a number"),
        ({"args": {"id": 0}}, "step 0: argument 'npages' is missing"),
        ({"op": "zap_sp", "args": {"gfn": 0, "level": 2}}, "step 0: argument 'root' is missing"),
        ({"args": 7}, "step 0: "),
        ({"args": {"vcpu": 99}}, "step 0: "),
    ],
)
def test_replay_of_a_step_that_says_nonsense_names_the_step(
    tmp_path: Path, change: dict[str, Any], complaint: str
) -> None:
    trace, _ = load("s4_race_tdx")
    trace["steps"][0] |= change
    assert refused(tmp_path, trace).startswith(complaint)


@pytest.mark.parametrize(
    ("key", "value", "complaint"),
    [
        ("vm", {"type": "tdx"}, "vm: key 'vcpus' is missing"),
        ("vm", 3, "vm: "),
        ("module_init", {}, "vm: key 'maxpa' is missing"),
        ("masks", {}, "vm: key 'max_gfn' is missing"),
        ("steps", [{}], "step 0: key 'op' is missing"),
    ],
)
def test_replay_of_a_trace_without_a_key_names_it(
    tmp_path: Path, key: str, value: Any, complaint: str
) -> None:
    trace, _ = load("s4_race_tdx")
    trace[key] = value
    assert refused(tmp_path, trace).startswith(complaint.partition("'")[0])


def test_config_refuses_a_vm_type_that_it_does_not_know() -> None:
    trace, _ = load("s4_race_tdx")
    with pytest.raises(TraceError, match="unknown VM type 'snp'; known are default"):
        config(trace["vm"] | {"type": "snp"})


# -- decoding


def test_plain_makes_numbers_and_places_of_words() -> None:
    given = ["0xff", 9, "pt#3", "pfn:0x10", "direct", None, {"x": "0x2"}]
    assert plain(given) == (255, 9, ("pt", 3), ("pfn", 16), "direct", None, {"x": 2})


def test_integer_reads_hex_strings_and_negative_errnos() -> None:
    assert [integer("0x10"), integer(-16), integer("7")] == [16, -16, 7]
    with pytest.raises(TraceError, match="None is not a number"):
        integer(None)


def test_args_have_defaults_and_can_be_parsed_from_words() -> None:
    args = Args.parse(["vcpu=1", "gfn=0x5"])
    assert (args.number("vcpu"), args.number("gfn"), args.number("slot", 3)) == (1, 5, 3)
    assert not args.flag("private")
    assert "gfn" in args
    assert "gpa" not in args


def test_params_are_the_recorders_defaults_where_a_trace_is_silent() -> None:
    found = params({"maxpa": 52, "ad": 1, "xo": 1})
    assert not found.nx_huge_pages
    assert found.eager_page_split
    assert not found.l1tf
    assert found.mmio_caching


# -- recording


LEAF, LINK = 0x8600_0000_0000_0B77, 0x8000_0000_0000_0907


def changes(*rows: tuple[int, int, int, int, int]) -> list[tuple[Any, ...]]:
    recorder = Recorder()
    for row in rows:
        recorder(("spte_changed", *row))
    return recorder.changes()


def leaves(level: int, count: int) -> Iterator[tuple[int, int, int, int, int]]:
    size = 512 ** (level - 1)
    for index in range(count):
        spte = LEAF | index * size << 12 | (level > 1) << 7
        yield 0, level, index * size, SHADOW_NONPRESENT_VALUE, spte


@pytest.mark.parametrize("level", [1, 2, 3])
def test_changes_fold_leaves_whose_pages_follow_each_other(level: int) -> None:
    (row,) = changes(*leaves(level, 5))
    assert row[2] == 0
    assert row[4:] == (None, LEAF | (level > 1) << 7, ("pfn", 0), 5)


@pytest.mark.parametrize(
    "second",
    [
        (0, 1, 2, SHADOW_NONPRESENT_VALUE, LEAF | 1 << 12),
        (1, 1, 1, SHADOW_NONPRESENT_VALUE, LEAF | 1 << 12),
        (0, 2, 1, SHADOW_NONPRESENT_VALUE, LEAF | 1 << 12),
        (0, 1, 1, FROZEN_SPTE, LEAF | 1 << 12),
        (0, 1, 1, SHADOW_NONPRESENT_VALUE, LEAF | 2 << 12),
        (0, 1, 1, SHADOW_NONPRESENT_VALUE, LEAF ^ 2 | 1 << 12),
    ],
)
def test_changes_do_not_fold_what_does_not_go_on(second: tuple[int, int, int, int, int]) -> None:
    assert len(changes((0, 1, 0, SHADOW_NONPRESENT_VALUE, LEAF), second)) == 2


def test_changes_never_fold_tables() -> None:
    rows = [(0, 2, 512 * i, LINK | i << 12, SHADOW_NONPRESENT_VALUE) for i in (1, 2)]
    assert [row[4] for row in changes(*rows)] == [("pt", 1 << 12), ("pt", 2 << 12)]


def test_stride_is_none_for_a_table_and_zero_for_what_is_not_present() -> None:
    assert stride(LINK, 2) is None
    assert stride(LEAF, 1) == 1 << 12
    assert stride(LEAF | 1 << 7, 2) == 1 << 21
    assert stride(FROZEN_SPTE, 2) == 0


def test_split_spte_keeps_a_non_present_entry_whole() -> None:
    assert split_spte(FROZEN_SPTE, 1) == (FROZEN_SPTE, None)
    assert split_spte(LINK | 5 << 12, 3) == (LINK, ("pt", 5 << 12))
    assert split_spte(LEAF | HPA_MASK, 1) == (LEAF, ("pfn", HPA_MASK >> 12))


def test_recorder_folds_equal_neighbours_before_it_picks_hooks_and_flushes() -> None:
    recorder = Recorder()
    flush, hook = ("kvm_flush_remote_tlbs",), ("free_external_spt", 0, 1)
    for event in (flush, flush, hook, ("yield", "write"), flush):
        recorder.add(event)
    assert recorder.flushes() == [(*flush, {"x": 2}), flush]
    assert recorder.hooks() == [hook]
    assert len(recorder.unfolded()) == 5


def test_table_names_are_a_bijection() -> None:
    names = TableNames()
    assert names.same((1, ("pt", 1)), (1, ("pt", 0x1000)))
    assert names.same({"a": ("pt", 2)}, {"a": ("pt", 0x2000)})
    assert not names.same(("pt", 1), ("pt", 0x2000))
    assert not names.same(("pt", 3), ("pt", 0x1000))
    assert not names.same(("pt", 3), ("pfn", 3))
    assert not names.same((1, 2), (1,))
    assert not names.same({"a": 1}, {"b": 1})


def test_show_writes_values_as_traces_do() -> None:
    assert show((9, 16, ("pfn", 16), None, {"x": 2})) == "[9, 0x10, pfn:0x10, None, {x: 2}]"


# -- the recorder's surroundings


def test_countdown_is_due_while_the_latest_call_is_among_its_calls() -> None:
    countdown = Countdown(2, 2, "what")
    found = []
    for _ in range(4):
        countdown.count()
        found.append(countdown.is_due)
    assert found == [False, True, True, False]


def test_resched_stays_pending_until_the_cpu_was_given_up() -> None:
    resched = Resched(3)
    assert [resched() for _ in range(4)] == [False, False, True, True]
    resched.given_up()
    assert [resched() for _ in range(2)] == [False, True]


@pytest.mark.parametrize("level", [1, 2, 3])
def test_user_pages_follow_from_slot_and_level(level: int) -> None:
    hva = hva_of_slot(2, level, 1)
    page = UserPages().fault_in(hva, write=True)
    assert host_level_of(hva) == level
    assert page == (0x2_0000_0000 + (level - 1) * 0x800_0000 + 2 * 0x100_0000 + 1, True, level)


def test_guest_pages_follow_from_slot_and_index() -> None:
    assert GuestPages().get_pfn(3, 7) == 0x1_0000_0000 + 3 * 0x1000_0000 + 7


def test_fresh_pages_are_never_used_twice() -> None:
    pages = FreshPages()
    first = pages.alloc_page("table")
    pages.free_page(first)
    assert pages.alloc_page("table") != first
