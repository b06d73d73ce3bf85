"""`tdxlab faults` as a person at the keyboard sees it."""

import json

import pytest

from tdxlab.campaign import WAYS
from tdxlab.cli import main
from tdxlab.kvm.pages import HostPages

ONE_LEAF = ["faults", "--leaf", "TDH.MR.FINALIZE"]


def test_faults_prints_a_table_and_succeeds_where_the_books_balance(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(ONE_LEAF) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Each call of a TD's life fails, GPAW 48: 4 lives"
    assert lines[3].split() == (
        "TDH.MR.FINALIZE 1 BUSY once, twice usable nothing none".split()  # noqa: SIM905
    )
    assert "not finalised" in lines[4]
    assert lines[5].split()[-3:] == ["dead", "KVM_BUG_ON", "none"]
    assert lines[-1] == "every page is free, or leaked with a cause"


def test_faults_says_what_is_done_for_ever(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["faults", "--leaf", "TDH.MEM.SEPT.ADD", "--leaf", "TDH.MNG.INIT"]) == 0
    text = capsys.readouterr().out
    assert "For ever, until a signal comes, KVM calls again: TDH.MEM.SEPT.ADD\n" in text
    assert "in every way" in text


def test_faults_prints_json_with_every_life(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*ONE_LEAF, "--gpaw", "52", "--runs", "3", "--seed", "9", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["gpaw"], printed["seed"], printed["balanced"]) == (52, 9, True)
    assert [run["number"] for run in printed["runs"]] == [None] * len(WAYS) + [0, 1, 2]
    assert printed["runs"][0]["failures"][0]["target"] == "TDH.MR.FINALIZE"
    assert [run["outcome"] for run in printed["runs"]][:4] == [
        "usable",
        "usable",
        "not finalised",
        "dead",
    ]


def test_faults_plays_one_random_life_again(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["faults", "--seed", "5", "--only", "4"]) == 0
    first = capsys.readouterr().out
    assert first.startswith("GPAW 48, seed 5, run 4: ")
    assert "the life: init VM, vCPU 0" in first
    assert main(["faults", "--seed", "5", "--only", "4"]) == 0
    assert capsys.readouterr().out == first


def test_faults_counts_random_lives(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*ONE_LEAF, "--runs", "5", "--seed", "2"]) == 0
    assert "5 random lives of seed 2: " in capsys.readouterr().out


def test_faults_fails_with_the_way_to_see_it_again_where_they_do_not(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HostPages, "leak", lambda pages, hpa, why: None)
    assert main(["faults", "--leaf", "TDH.MNG.KEY.FREEID"]) == 1
    text = capsys.readouterr().out
    assert "does not balance: GPAW 48, TDH.MNG.KEY.FREEID number 1: TDX_OPERAND_BUSY" in text
    assert "nobody has it" in text
    assert "again: tdxlab faults --gpaw 48 --leaf TDH.MNG.KEY.FREEID" in text
    assert "every page is free" not in text


def test_faults_names_seed_and_number_of_a_random_life_that_does_not_balance(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HostPages, "leak", lambda pages, hpa, why: None)
    assert main(["faults", "--seed", "3", "--runs", "12", *ONE_LEAF[1:], "--json"]) == 1
    runs = json.loads(capsys.readouterr().out)["runs"]
    wrong = next(run["number"] for run in runs if run["broken"])
    assert main(["faults", "--seed", "3", "--only", str(wrong)]) == 1
    text = capsys.readouterr().out
    assert f"again: tdxlab faults --gpaw 48 --seed 3 --only {wrong}" in text


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--leaf", "TDH.MEM.FLY"], "choose one of TDH.MNG.CREATE"),
        (["--gpaw", "57"], "48, 52"),
        (["--runs", "-1"], "'-1'"),
        (["--seed", "0x10"], "'0x10'"),
    ],
)
def test_faults_refuses_a_mistake_in_one_line(
    arguments: list[str], word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = main(["faults", *arguments])
    except SystemExit as end:
        status = int(str(end.code))
    printed = capsys.readouterr()
    assert (status, printed.out) == (2, "")
    assert word in printed.err
    assert printed.err.count("\n") == 1
