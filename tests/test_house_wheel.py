"""The wheel, in a clean environment outside the checkout, can do what the checkout can."""

import json
import os
import socket
import subprocess
import sys
import sysconfig
import urllib.request
from pathlib import Path
from urllib.parse import parse_qs, urlsplit
from zipfile import ZipFile

import pytest

from tdxlab import lab
from tests.lab_process import private_jupyter, running_lab

CHECKOUT = Path(__file__).resolve().parent.parent
TRACE = "tdx_module/s1_life_gpaw48.json.gz"


def run(*command: str | Path, cwd: Path, status: int = 0) -> str:
    """Run `command` in `cwd`; its output, once it ended with `status`."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(
        *(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, "."),
        cwd=CHECKOUT,
    )
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def clean(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with tdxlab from the wheel; its dependencies are those of the tests."""
    folder = tmp_path_factory.mktemp("clean")
    run(sys.executable, "-m", "venv", "--without-pip", folder / "env", cwd=folder)
    python = folder / "env" / "bin" / "python"
    site = Path(
        run(
            python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder
        ).strip()
    )
    install = ("install", "--quiet", "--no-deps", "--no-index", wheel)
    run(sys.executable, "-m", "pip", "--python", python, *install, cwd=folder)
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (folder / "env" / "share").symlink_to(Path(sys.prefix) / "share")
    return folder


def test_wheel_holds_notebooks_data_and_types_but_no_tests(wheel: Path) -> None:
    names = ZipFile(wheel).namelist()
    assert "tdxlab/py.typed" in names
    assert f"tdxlab/_packaged/data/conformance/{TRACE}" in names
    assert any(name.startswith("tdxlab/_packaged/notebooks/00-") for name in names)
    assert "tdxlab/_packaged/notebooks/instructor/02.md" in names
    tops = {name.split("/")[0] for name in names}
    assert len(tops) == 2
    assert "tdxlab" in tops
    assert not any(".ipynb_checkpoints" in name for name in names)


def test_wheel_is_what_runs_in_the_clean_environment(clean: Path) -> None:
    code = "import tdxlab, tdxlab.resources as r; print(tdxlab.__file__, r.notebooks(), r.traces())"
    places = run(clean / "env" / "bin" / "python", "-c", code, cwd=clean).split()
    assert all(place.startswith(str(clean / "env")) for place in places)


def test_demo_works_from_the_wheel(clean: Path) -> None:
    text = run(clean / "env" / "bin" / "tdxlab", "demo", cwd=clean)
    assert "TDH.MNG.CREATE" in text


def test_replay_works_on_packaged_data(clean: Path) -> None:
    code = "import tdxlab.resources as r; print(r.traces())"
    traces = run(clean / "env" / "bin" / "python", "-c", code, cwd=clean).strip()
    text = run(
        clean / "env" / "bin" / "tdxlab", "replay", "--json", Path(traces) / TRACE, cwd=clean
    )
    result = json.loads(text)
    assert result["traces"] == 1
    assert result["compared"] > 0
    assert result["mismatched"] == 0


def test_doctor_is_content_with_the_wheel(clean: Path) -> None:
    text = run(clean / "env" / "bin" / "tdxlab", "doctor", cwd=clean)
    assert "MISSING" not in text


def test_lab_from_the_wheel_serves_a_copy_on_the_next_free_port(clean: Path) -> None:
    with socket.socket() as taken:
        taken.bind((lab.HOST, 0))
        taken.listen()
        port = taken.getsockname()[1]
        command = [str(clean / "env" / "bin" / "tdxlab"), "lab", "--port", str(port)]
        environment = os.environ | private_jupyter(clean) | {"TDXLAB_NO_BROWSER": "1"}
        environment.pop("TDXLAB_NOTEBOOKS", None)
        with running_lab(command, environment, clean) as running:
            assert f"Port {port} is taken" in "".join(running.said)
            place = urlsplit(running.url)
            assert place.port != port
            (token,) = parse_qs(place.query)["token"]
            with urllib.request.urlopen(running.url, timeout=30) as answer:
                assert answer.status == 200
                assert "JupyterLab" in answer.read().decode()
            contents = f"http://{place.netloc}/api/contents?token={token}"
            with urllib.request.urlopen(contents, timeout=30) as answer:
                served = {entry["name"] for entry in json.load(answer)["content"]}
    assert Path(place.path).name in served
    assert served == {path.name for path in (clean / lab.DEFAULT_FOLDER).iterdir()}
    with socket.socket() as probe:
        assert probe.connect_ex((lab.HOST, place.port)) != 0
