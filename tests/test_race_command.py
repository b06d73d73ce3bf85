"""`tdxlab explore` as a person at the keyboard sees it."""

import json

import pytest

from tdxlab.cli import main
from tdxlab.races import build


def test_explore_prints_counts_and_succeeds_where_nothing_is_wrong(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["explore", "same-page"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "same-page with 2 vCPUs: All fault on one page: one maps it"
    assert lines[-1] == "no rule is broken"
    found = build("same-page", 2).explore()
    assert lines[1].startswith(f"{found.schedules:,} schedules, {found.states:,} states")


def test_explore_prints_json_with_the_schedule_of_each_violation(
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["explore", "same-page", "--vcpus", "2", "--break", "no-freeze", "--json"]
    assert main(arguments) == 1
    printed = json.loads(capsys.readouterr().out)
    assert (printed["scenario"], printed["vcpus"], printed["broken"]) == (
        "same-page",
        2,
        "no-freeze",
    )
    assert printed["schedules"] > 0
    assert printed["transitions"] >= printed["states"] - 1
    (violation,) = printed["violations"]
    assert violation["invariant"] == "vm_bugged"
    assert {who for who, _ in violation["schedule"]} == {"vCPU 0", "vCPU 1"}


def test_explore_prints_a_table_of_the_shortest_schedule(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["explore", "zap-enter", "--vcpus", "1", "--break", "no-track"]) == 1
    text = capsys.readouterr().out
    assert "with the break no-track: no new TLB epoch begins" in text
    assert "TLB_TRACKING_NOT_DONE" in text
    assert "punch hole" in text


@pytest.mark.parametrize(("rule", "changes"), [("no-freeze", False), ("no-track", True)])
def test_explore_says_where_a_rule_of_kvm_changes_nothing(
    rule: str, changes: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["explore", "tlb-tracking", "--vcpus", "1", "--break", rule]
    assert main(arguments) == int(changes)
    said = "nothing changes here: it is a rule for KVM" in capsys.readouterr().out
    assert said is not changes


def test_explore_names_what_a_fault_returns(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explore", "same-page", "--break", "no-freeze"]) == 1
    assert "TDH.MEM.PAGE.AUG 0x5000 0x0 0x1000b6000 -> RET_PF_RETRY" in capsys.readouterr().out


def test_explore_looks_inside_seamcalls_if_asked_to(capsys: pytest.CaptureFixture[str]) -> None:
    counts = []
    for arguments in (["same-page"], ["same-page", "--inside-seamcalls"]):
        assert main(["explore", *arguments, "--json"]) == 0
        printed = json.loads(capsys.readouterr().out)
        assert printed["inside_seamcalls"] == (len(arguments) == 2)
        counts.append(printed["schedules"])
    assert counts[0] < counts[1]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["other"], "choose one of same-page, fresh-region, far-apart"),
        (["zap-enter", "--vcpus", "4"], "zap-enter is made for 1 to 3"),
        (["same-page", "--break", "other"], "choose one of no-freeze"),
    ],
)
def test_explore_refuses_a_mistake_in_one_line(
    arguments: list[str], word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["explore", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert word in printed.err
    assert printed.err.count("\n") == 1
