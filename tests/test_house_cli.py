"""The command `tdxlab`: its help, its complaints, its port, its browser."""

import http.client
import os
import socket
import subprocess
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from unittest.mock import Mock

import pytest

import tdxlab
from tdxlab import lab
from tdxlab.cli import main

CHECKOUT = Path(__file__).resolve().parent.parent
COMMANDS = ("lab", "demo", "replay", "explore", "faults", "measure", "bench", "doctor")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """What a person at the keyboard gets."""
    command = [sys.executable, "-m", "tdxlab", *arguments]
    return subprocess.run(
        command, cwd=CHECKOUT, capture_output=True, text=True, timeout=60, check=False
    )


def test_version_is_the_package_version() -> None:
    assert run("--version").stdout == f"tdxlab {tdxlab.__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command_succeeds(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([command, "--help"])
    assert exit_.value.code == 0
    assert f"tdxlab {command}" in capsys.readouterr().out


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert all(f"\n    {command} " in text for command in COMMANDS)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ([], "COMMAND"),
        (["fly"], "'fly'"),
        (["demo", "--loudly"], "--loudly"),
        (["lab", "--port", "70000"], "'70000'"),
        (["lab", "--port", "0"], "'0'"),
        (["lab", "--port", "http"], "'http'"),
        (["replay", "no/such/trace.json"], "no/such/trace.json"),
        (["replay", "pyproject.toml"], "pyproject.toml"),
        (["measure"], "IMAGE"),
        (["measure", "no/such/image.fd"], "no/such/image.fd"),
        (["measure", "pyproject.toml"], "pyproject.toml"),
        (["explore"], "SCENARIO"),
        (["explore", "fly"], "same-page, fresh-region"),
        (["explore", "same-page", "--break", "fly"], "no-freeze, early-publish"),
        (["explore", "same-page", "--vcpus", "4"], "4 vCPUs"),
        (["faults", "--leaf", "TDH.MEM.FLY"], "choose one of TDH.MNG.CREATE"),
        (["lab", "--no-browser", "--dir", "pyproject.toml/mine"], "pyproject.toml/mine"),
        (["lab", "--no-browser", "--dir", "pyproject.toml"], "pyproject.toml"),
    ],
)
def test_a_mistake_is_one_line_on_stderr_and_status_2(arguments: list[str], word: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("tdxlab")
    assert done.stderr.count("\n") == 1
    assert word in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["replay", "no\nsuch"],
        ["measure", "no\nsuch"],
        ["explore", "no\nsuch"],
        ["demo", "--memory", "no\nsuch"],
        ["no\nsuch"],
        ["doctor", "--no\nsuch"],
    ],
)
def test_a_line_break_in_an_argument_is_no_line_break_of_the_complaint(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = main(arguments)
    except SystemExit as end:
        status = int(str(end.code))
    printed = capsys.readouterr()
    assert (status, printed.out) == (2, "")
    assert printed.err.count("\n") == 1
    assert "no\\nsuch" in printed.err


def test_no_permission_to_write_is_one_line_and_status_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(path: Path, *_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert main(["lab", "--no-browser", "--dir", str(tmp_path / "mine")]) == 2
    assert capsys.readouterr().err == f"tdxlab: {tmp_path / 'mine'}: Permission denied\n"


def test_a_reader_that_leaves_early_is_no_mistake() -> None:
    command = [sys.executable, "-m", "tdxlab", "doctor"]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, timeout=60, check=False)
    os.close(writer)
    assert done.stderr == b""


def test_free_port_passes_over_a_taken_one() -> None:
    with socket.socket() as taken:
        taken.bind((lab.HOST, 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert port < lab.free_port(port) < port + lab.PORTS_TRIED
    assert lab.free_port(port) == port


def test_free_port_refuses_when_all_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind((lab.HOST, 0))
        taken.listen()
        monkeypatch.setattr(lab, "PORTS_TRIED", 1)
        with pytest.raises(lab.LabError, match="--port"):
            lab.free_port(taken.getsockname()[1])


def test_lab_waits_on_when_the_port_answers_with_something_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    problems = [http.client.BadStatusLine("GET /api HTTP/1.1"), ConnectionRefusedError()]

    def urlopen(_address: str, timeout: int) -> AbstractContextManager[None]:
        if problems:
            raise problems.pop()
        return nullcontext()

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    lab._wait_until_it_answers(lab.Server(Mock(poll=lambda: None), 8888, "token"))
    assert problems == []


def test_lab_says_what_to_install_without_jupyterlab(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    assert main(["lab", "--dir", str(tmp_path / "mine")]) == 2
    assert "pip install jupyterlab" in capsys.readouterr().err
    assert not (tmp_path / "mine").exists()


@pytest.mark.parametrize(
    ("environment", "platform", "wanted"),
    [
        ({"DISPLAY": ":0"}, "linux", True),
        ({"WAYLAND_DISPLAY": "wayland-0"}, "linux", True),
        ({}, "linux", False),
        ({}, "darwin", True),
        ({"DISPLAY": ":0", "TDXLAB_NO_BROWSER": "1"}, "linux", False),
        ({"DISPLAY": ":0", "TDXLAB_NO_BROWSER": "0"}, "linux", True),
        ({"TDXLAB_NO_BROWSER": "1"}, "darwin", False),
    ],
)
def test_wants_browser_only_where_there_is_a_screen(
    environment: dict[str, str], platform: str, wanted: bool
) -> None:
    assert lab.wants_browser(environment, platform) is wanted


@pytest.mark.parametrize(("user", "allowed"), [(0, True), (1000, False)])
def test_command_allows_root_only_to_root(
    user: int, allowed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: user)
    assert ("--allow-root" in lab.command(tmp_path, 8888)) is allowed
