"""JupyterLab on a copy of the notebooks: free port, private token, nothing leaves the machine."""

from __future__ import annotations

import http.client
import importlib.util
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import webbrowser
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO
from urllib.parse import quote

from tdxlab import resources, workspace

DEFAULT_PORT = 8888
DEFAULT_FOLDER = "tdxlab-notebooks"
HOST = "127.0.0.1"
PORTS_TRIED = 50
START_SECONDS = 60
_CONFIG = Path(__file__).resolve().parent / "jupyter_config"


class LabError(Exception):
    """JupyterLab cannot be started; the message says why and what to do."""


@dataclass(frozen=True)
class Server:
    """One JupyterLab server that runs.

    process: the server. port: TCP port on 127.0.0.1. token: what a browser shows to be let in.
    """

    process: subprocess.Popen[bytes]
    port: int
    token: str

    def url(self, path: str = "") -> str:
        """The address that opens `path`, relative to the working folder, in JupyterLab."""
        place = f"lab/tree/{quote(path)}" if path else "lab"
        return f"http://{HOST}:{self.port}/{place}?token={self.token}"


def run(folder: Path, port: int, browser: bool, out: TextIO, instructor: bool = False) -> int:
    """Copy the notebooks to `folder`, serve them, print the URL and wait until the server ends.

    port: the first TCP port to try, 1..65535. browser: open the URL in a browser too.
    instructor: copy the solutions and the instructor notes too.
    Returns 0 after Ctrl-C or a shutdown from the menu, the server's own exit status otherwise.
    Refuses, in order: LabError if JupyterLab is not installed; OSError if `folder` cannot be
    written; LabError if no port is free or the server does not start.
    """
    if importlib.util.find_spec("jupyterlab") is None:
        raise LabError("JupyterLab is not installed: pip install jupyterlab")
    copies = workspace.copy_fresh(resources.notebooks(), folder, instructor)
    edition = "with solutions and notes" if instructor else "without solutions"
    print(f"Notebooks, {edition}: {folder.resolve()} ({len(copies)} new)", file=out)
    free = free_port(port)
    if free != port:
        print(f"Port {port} is taken; using {free}.", file=out)
    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.default_int_handler)
    server = start(folder, free)
    try:
        _wait_until_it_answers(server)
        _announce(server, folder, browser, out)
        return server.process.wait()
    except KeyboardInterrupt:
        return 0
    finally:
        _stop(server)


def free_port(first: int) -> int:
    """The first port from `first` on (at most 50 are tried) that nobody listens on."""
    for port in range(first, min(first + PORTS_TRIED, 65536)):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
            return port
    raise LabError(f"no port is free from {first} on: name another one with --port")


def start(folder: Path, port: int) -> Server:
    """Start JupyterLab on `folder`; it needs a second or two until it answers."""
    token = secrets.token_hex(16)
    search = os.pathsep.join(filter(None, [str(_CONFIG), os.environ.get("JUPYTER_CONFIG_PATH")]))
    environment = os.environ | {"JUPYTER_TOKEN": token, "JUPYTER_CONFIG_PATH": search}
    return Server(subprocess.Popen(command(folder, port), env=environment), port, token)


def command(folder: Path, port: int) -> list[str]:
    """The command line of the server; root has to say `--allow-root`."""
    flags = [
        "--no-browser",
        "--log-level=WARN",
        f"--ServerApp.ip={HOST}",
        f"--ServerApp.port={port}",
        "--ServerApp.port_retries=0",
        "--ServerApp.answer_yes=True",
        f"--ServerApp.root_dir={folder.resolve()}",
        "--LabApp.extension_manager=readonly",
    ]
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        flags.append("--allow-root")
    return [sys.executable, "-m", "jupyterlab", *flags]


def wants_browser(environment: Mapping[str, str], platform: str = sys.platform) -> bool:
    """True unless TDXLAB_NO_BROWSER is set or this Linux machine has no screen."""
    if environment.get("TDXLAB_NO_BROWSER", "0") not in ("", "0"):
        return False
    has_screen = environment.get("DISPLAY") or environment.get("WAYLAND_DISPLAY")
    return not platform.startswith("linux") or bool(has_screen)


def _wait_until_it_answers(server: Server) -> None:
    """Poll the server until it answers; LabError if it ends or stays silent for a minute.

    A port that nobody listens on yet may answer with our own words: on one of those that the
    operating system gives to clients, a connection can meet itself.
    """
    address = f"http://{HOST}:{server.port}/api?token={server.token}"
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            raise LabError(f"JupyterLab ended with status {server.process.returncode} at once")
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except (urllib.error.URLError, http.client.HTTPException, OSError):
            time.sleep(0.1)
    raise LabError(f"JupyterLab did not answer on port {server.port} in {START_SECONDS} seconds")


def _announce(server: Server, folder: Path, browser: bool, out: TextIO) -> None:
    """Print the URL of the first notebook (of the folder if it has none) and open it if asked."""
    first = min((path.name for path in folder.glob("*.ipynb")), default="")
    url = server.url(first)
    print(f"JupyterLab: {url}\nStop it with Ctrl-C.", file=out, flush=True)
    if browser:
        webbrowser.open(url)


def _stop(server: Server) -> None:
    """End the server, and with it its kernels, if it still runs."""
    if server.process.poll() is None:
        server.process.send_signal(signal.SIGTERM)
        server.process.wait()
