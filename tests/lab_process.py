"""`tdxlab lab` as a process of its own, for the tests that need a real server."""

import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple


class RunningLab(NamedTuple):
    """A lab that answers. url: where a browser goes. said: the lines printed until then."""

    url: str
    said: list[str]
    process: subprocess.Popen[str]


def private_jupyter(folder: Path) -> dict[str, str]:
    """Environment variables that keep Jupyter's settings and state inside `folder`."""
    names = ("JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_DATA_DIR", "IPYTHONDIR")
    lab = ("JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR")
    return {name: str(folder / name.lower()) for name in (*names, *lab)}


@contextmanager
def running_lab(
    command: Sequence[str], environment: Mapping[str, str], cwd: Path
) -> Iterator[RunningLab]:
    """Run `command` (some `tdxlab lab`) until the block ends; it has to end well on SIGTERM."""
    process = subprocess.Popen(
        command, cwd=cwd, env=dict(environment), stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    said: list[str] = []
    try:
        for line in process.stdout:
            said.append(line)
            if line.startswith("JupyterLab: "):
                yield RunningLab(line.split()[1], said, process)
                break
        else:
            raise AssertionError(f"the lab ended before it answered: {said}")
    finally:
        process.terminate()
        status = process.wait(timeout=30)
        process.stdout.close()
    assert status == 0
