"""Every attack of a hostile host: what stops it, on what evidence, and that it succeeds without."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from functools import cache, partialmethod
from typing import Any

import pytest

from tdxlab.abi.leaves import TDH_MEM_PAGE_ADD, TDH_MEM_PAGE_REMOVE, TDH_PHYMEM_PAGE_WBINVD
from tdxlab.attacks import ATTACKS, LACKS, Report, attack, command, kernel, make_stage, verdict
from tdxlab.attacks.stage import DATA, FREE_GPA, SECRET, SOURCE_HPA, Stage
from tdxlab.cli import main
from tdxlab.host_td import HostTd
from tdxlab.kvm.roots import KVM_MIRROR_ROOTS, for_each_tdp_mmu_root
from tdxlab.memory import LINE_SIZE, MachineCheck
from tdxlab.seam import checks, page_checks, rules, stepping
from tdxlab.seam.leaves import mem, mng, phymem
from tdxlab.seam.td import ATTRIBUTES_DEBUG
from tdxlab.study.aes_xts import BLOCK, AesXts

WIDTHS = pytest.mark.parametrize("gpaw", [48, 52])

#: attack -> (what stops it, "" for nothing; what the host has all the same).
EXPECTED = {
    "read-private": ("encryption", "nothing"),
    "write-private": ("TD-owner bit", "denial of service"),
    "replay-in-software": ("TD-owner bit", "denial of service"),
    "overwrite-secure-ept": ("TD-owner bit", "denial of service"),
    "compare-ciphertext": ("", "traffic analysis"),
    "forge-on-the-bus": ("MAC", "denial of service"),
    "splice-on-the-bus": ("MAC", "denial of service"),
    "replay-on-the-bus": ("", "replay"),
    "map-at-two-gpas": ("PAMT", "nothing"),
    "map-in-two-tds": ("PAMT", "nothing"),
    "reuse-page-in-use": ("PAMT", "nothing"),
    "replace-page": ("Secure EPT state", "nothing"),
    "use-shared-gpa": ("operand checks", "nothing"),
    "copy-through-the-module": ("operand checks", "nothing"),
    "fake-keyid": ("KeyID table", "nothing"),
    "look-with-debug-calls": ("TD attributes", "nothing"),
    "add-after-launch": ("life cycle", "nothing"),
    "remove-without-block": ("TLB tracking", "nothing"),
    "stale-tlb": ("TLB tracking", "denial of service"),
    "reclaim-early": ("life cycle", "denial of service"),
    "skip-vcpu-flush": ("life cycle", "nothing"),
    "skip-cache-flush": ("life cycle", "denial of service"),
    "write-back-late": ("MAC", "denial of service"),
    "read-leftovers": ("encryption", "denial of service"),
    "corrupt-mirror": ("Secure EPT state", "nothing"),
    "swap-for-zeros": ("guest acceptance", "denial of service"),
    "lie-about-conversion": ("guest acceptance", "denial of service"),
    "lie-about-sharing": ("shared bit", "denial of service"),
    "watch-faults": ("", "traffic analysis"),
    "step-through-faults": ("stepping filter", "traffic analysis"),
    "never-run": ("", "denial of service"),
}


@cache
def report(name: str, gpaw: int = 48, lacks: str = "nothing") -> Report:
    return attack(name, gpaw=gpaw, lacks=lacks, cipher=AesXts())


@WIDTHS
@pytest.mark.parametrize("name", EXPECTED)
def test_attack_is_stopped_by_what_stops_it(name: str, gpaw: int) -> None:
    found = report(name, gpaw)
    assert (found.stopped_by, found.gained) == EXPECTED[name]
    assert found.evidence
    assert found.moves
    assert all(move.answer for move in found.moves)


def test_every_attack_is_expected_and_every_mechanism_stops_one() -> None:
    assert list(ATTACKS) == list(EXPECTED)
    assert {stopper for stopper, _ in EXPECTED.values()} == {*verdict.MECHANISMS, ""}
    assert {gain for _, gain in EXPECTED.values()} <= set(verdict.GAINS)
    assert all(found.what.endswith(".") for found in ATTACKS.values())


@pytest.mark.parametrize(
    ("name", "status"),
    [
        ("map-at-two-gpas", "TDX_PAGE_METADATA_INCORRECT (R8)"),
        ("replace-page", "TDX_EPT_ENTRY_STATE_INCORRECT (RCX)"),
        ("use-shared-gpa", "TDX_OPERAND_INVALID (RCX)"),
        ("copy-through-the-module", "TDX_OPERAND_INVALID (R9)"),
        ("fake-keyid", "TDX_HKID_NOT_FREE, TDX_OPERAND_INVALID (RDX)"),
        ("add-after-launch", "TDX_OP_STATE_INCORRECT"),
        ("remove-without-block", "TDX_GPA_RANGE_NOT_BLOCKED (RCX)"),
        ("stale-tlb", "TDX_TLB_TRACKING_NOT_DONE (RCX)"),
        ("skip-vcpu-flush", "TDX_FLUSHVP_NOT_DONE"),
        ("skip-cache-flush", "TDX_WBCACHE_NOT_COMPLETE"),
    ],
)
def test_the_evidence_is_the_status_of_the_module(name: str, status: str) -> None:
    assert report(name).evidence == status


@pytest.mark.parametrize("name", ["map-in-two-tds", "reuse-page-in-use", "fake-keyid"])
def test_a_refused_attack_changes_nothing(name: str) -> None:
    stage = make_stage(name)
    before = stage.machine.digest(counters=False)
    ATTACKS[name].run(stage)
    assert stage.machine.digest(counters=False) == before


def test_the_moves_can_be_taken_back_and_made_again() -> None:
    stage = make_stage("read-leftovers")
    before = stage.machine.digest()
    ATTACKS["read-leftovers"].run(stage)
    after, answers = stage.machine.digest(), [move.answer for move in stage.moves]
    stage.tape.seek(0)
    assert stage.machine.digest() == before
    assert stage.moves == []
    stage.tape.seek(len(stage.tape))
    assert stage.machine.digest() == after
    assert [move.answer for move in stage.moves] == answers


# -- without what stops it


@pytest.mark.parametrize(
    ("name", "lacks", "gained"),
    [
        ("read-private", "encryption and integrity", "the secret"),
        ("read-leftovers", "encryption and integrity", "the secret"),
        ("write-private", "encryption and integrity", "control of the guest's data"),
        ("replay-in-software", "encryption and integrity", "replay"),
        ("overwrite-secure-ept", "encryption and integrity", "control of the guest's data"),
        ("forge-on-the-bus", "MACs", "garbage in the guest's data"),
        ("splice-on-the-bus", "MACs", "garbage in the guest's data"),
        ("replay-on-the-bus", "MACs", "replay"),
        ("write-back-late", "MACs", "garbage in the guest's data"),
        ("write-back-late", "encryption and integrity", "control of the guest's data"),
        ("swap-for-zeros", "a careful guest", "control of the guest's data"),
    ],
)
def test_an_attack_succeeds_where_the_stage_lacks_what_stops_it(
    name: str, lacks: str, gained: str
) -> None:
    found = report(name, 48, lacks)
    assert (found.stopped_by, found.gained) == ("", gained)


def test_what_a_stage_lacks_helps_nothing_else() -> None:
    for lacks in ("MACs", "a careful guest"):
        helped = {name for name in EXPECTED if report(name, 48, lacks).stopped_by == ""}
        never = {name for name, (stopper, _) in EXPECTED.items() if not stopper}
        stopped = {"MACs": {"forge-on-the-bus", "splice-on-the-bus", "write-back-late"}}
        assert helped - never == stopped.get(lacks, {"swap-for-zeros"})


def _any_page(call: Any, hpa: int, _operand: int, *_: Any, **__: Any) -> int:
    """A PAMT that nobody looks into."""
    return int(call.module.pamt.entry(hpa, 0))


def _pamt_off(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(mem, "lock_free_range", _any_page)
    patch.setattr(mem, "lock_page", _any_page)


def _sept_off(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(mem, "refuse_entry", lambda *_: None)
    patch.setattr(mem, "require_sept_state", lambda *_: None)
    patch.setattr(checks, "refuse_entry", lambda *_: None)


def _tracking_off(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(checks, "tracking_applies", lambda *_: False)


def _life_cycle_off(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(phymem, "TD_TEARDOWN", rules.TD_KEYS_CONFIGURED)


def _key_table_off(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(mng, "HKID_FREE", rules.HKID_ASSIGNED)


def _operands_off(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(page_checks, "is_shared_hpa", lambda *_: True)


def _debug_on(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(HostTd, "__init__", partialmethod(HostTd.__init__, attributes=ATTRIBUTES_DEBUG))


def _stepping_off(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(stepping, "THRESHOLD", 1 << 10)


@pytest.mark.parametrize(
    ("name", "turn_off"),
    [
        ("map-at-two-gpas", _pamt_off),
        ("map-in-two-tds", _pamt_off),
        ("reuse-page-in-use", _pamt_off),
        ("replace-page", _sept_off),
        ("remove-without-block", _tracking_off),
        ("stale-tlb", _tracking_off),
        ("reclaim-early", _life_cycle_off),
        ("fake-keyid", _key_table_off),
        ("copy-through-the-module", _operands_off),
        ("step-through-faults", _stepping_off),
    ],
)
def test_an_attack_succeeds_with_the_mechanism_turned_off(
    name: str, turn_off: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = make_stage(name)
    turn_off(monkeypatch)
    assert ATTACKS[name].run(stage).stopped_by == ""


def test_a_copy_through_the_module_is_the_victims_page(monkeypatch: pytest.MonkeyPatch) -> None:
    _operands_off(monkeypatch)
    stage = make_stage("copy-through-the-module")
    ATTACKS["copy-through-the-module"].run(stage)
    assert stage.machine.memory.page(stage.spare[0]) == DATA


def test_the_debug_calls_read_a_debug_td(monkeypatch: pytest.MonkeyPatch) -> None:
    debug = partialmethod(HostTd.__init__, attributes=ATTRIBUTES_DEBUG)
    monkeypatch.setattr(HostTd, "__init__", debug)
    found = attack("look-with-debug-calls")
    assert (found.stopped_by, found.gained) == ("", "the secret")
    assert found.moves[0].outputs["r8"].to_bytes(8, "little") == SECRET[:8]


def test_a_page_written_back_under_its_own_keyid_has_no_late_lines() -> None:
    stage = make_stage("write-back-late")
    rival, hpa = stage.rival, stage.spare[0]
    stage.store(SOURCE_HPA, bytes(64))
    stage.seamcall(TDH_MEM_PAGE_ADD, rcx=FREE_GPA, rdx=rival.tdr, r8=hpa, r9=SOURCE_HPA)
    stage.seamcall(TDH_MEM_PAGE_REMOVE, rcx=FREE_GPA, rdx=rival.tdr)
    pa = stage.machine.memory.join(hpa, rival.keyid)
    stage.seamcall(TDH_PHYMEM_PAGE_WBINVD, rcx=pa)
    stage.machine.clear(hpa)
    stage.evict(hpa, bytes(64))
    assert stage.moves[-1].answer == "no line is dirty"
    assert not stage.machine.memory.is_td_owned(hpa)


# -- what the host reads


def test_what_the_host_reads_is_aes_xts_of_the_victims_bytes() -> None:
    stage = Stage(cipher=AesXts())
    seen = stage.load(stage.data_hpa, 4096)
    assert isinstance(seen, bytes)
    alike = sum(a == b for a, b in zip(seen, DATA, strict=True))
    assert alike < 64
    lines = [seen[place : place + LINE_SIZE] for place in range(0, 4096, LINE_SIZE)]
    assert len(set(lines)) == len(lines)
    assert DATA[:LINE_SIZE] == DATA[-LINE_SIZE:] == SECRET


def test_one_changed_byte_changes_one_block() -> None:
    cipher, line = AesXts(), bytes(LINE_SIZE)
    one = cipher.encipher(0x4000, 33, line)
    other = cipher.encipher(0x4000, 33, b"\1" + line[1:])
    assert one[:BLOCK] != other[:BLOCK]
    assert one[BLOCK:] == other[BLOCK:]


def test_other_addresses_keys_and_seeds_give_other_bytes() -> None:
    line = bytes(LINE_SIZE)
    seen = {
        AesXts(seed).encipher(hpa, key, line)
        for seed in (0, 1)
        for hpa in (0x4000, 0x4040)
        for key in (33, 34)
    }
    assert len(seen) == 8


def test_decipher_undoes_encipher() -> None:
    cipher = AesXts()
    assert cipher.decipher(0x40, 9, cipher.encipher(0x40, 9, SECRET)) == SECRET


def test_the_probe_puts_back_what_it_took() -> None:
    stage = Stage(cipher=AesXts())
    before = stage.machine.memory.read(stage.data_hpa, LINE_SIZE, stage.keyid)
    stage.inject(stage.data_hpa, stage.probe(stage.data_hpa))
    assert stage.machine.memory.read(stage.data_hpa, LINE_SIZE, stage.keyid) == before == SECRET


def test_the_probe_cannot_put_a_line_under_a_newer_key() -> None:
    stage = Stage(cipher=AesXts())
    memory, old = stage.machine.memory, stage.probe(stage.data_hpa)
    memory.new_key(stage.keyid)
    stage.inject(stage.data_hpa, old)
    with pytest.raises(MachineCheck):
        memory.read(stage.data_hpa, LINE_SIZE, stage.keyid)


@pytest.mark.parametrize("hpa", [1, 1 << 45])
def test_the_probe_refuses_what_is_no_line(hpa: int) -> None:
    stage = Stage()
    line = stage.probe(stage.data_hpa)
    with pytest.raises(ValueError, match=r"choose an address there|give a multiple of 64"):
        stage.inject(hpa, line)


def test_the_mirror_of_the_kernel_stage_leads_to_the_victims_page() -> None:
    stage = make_stage("corrupt-mirror", gpaw=52)
    assert isinstance(stage, kernel.KernelStage)
    assert stage.machine.memory.page(stage.data_hpa) == DATA
    assert next(for_each_tdp_mmu_root(stage.td.vm, KVM_MIRROR_ROOTS)).is_mirror


# -- mistakes, and the command


def test_an_unknown_attack_or_lack_is_refused_with_the_names() -> None:
    with pytest.raises(ValueError, match="there is no attack 'x'; choose one of read-private"):
        attack("x")
    with pytest.raises(ValueError, match="cannot lack 'x'; choose one of nothing, MACs"):
        attack("read-private", lacks="x")
    with pytest.raises(ValueError, match="48 or 52"):
        attack("read-private", gpaw=50)


def printed(*arguments: Any, **options: Any) -> str:
    out = io.StringIO()
    assert command.command(*arguments, out, **options) == 0
    return out.getvalue()


def test_command_prints_a_line_for_each_attack() -> None:
    done: list[tuple[int, int]] = []
    lines = printed("all", 48, False, progress=lambda *numbers: done.append(numbers)).splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(ATTACKS)
    assert sum("NOT STOPPED" in line for line in lines) == 4
    assert done[-1] == (len(ATTACKS), len(ATTACKS))


def test_command_prints_the_moves_of_one_attack() -> None:
    text = printed("stale-tlb", 52, False)
    assert "TDH.MEM.PAGE.REMOVE  RCX=0x40001000" in text
    assert "stopped by: TLB tracking" in text


def test_command_prints_json() -> None:
    (one,) = json.loads(printed("replay-on-the-bus", 48, True, lacks="MACs"))
    assert (one["stopped_by"], one["gained"], one["lacks"]) == (None, "replay", "MACs")
    assert [move["actor"] for move in one["moves"]] == ["bus probe", "guest", "bus probe", "guest"]


@pytest.mark.parametrize("arguments", [["attack", "x"], ["attack", "--without", "x"]])
def test_a_mistake_at_the_command_is_one_line(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert "choose one of" in said.err


def test_lacks_are_arguments_of_a_stage() -> None:
    assert all(isinstance(make_stage("read-private", lacks=lacks), Stage) for lacks in LACKS)
