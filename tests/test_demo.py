"""`tdxlab demo`: a TD's life, phase by phase."""

import io
import json
from pathlib import Path

import pytest

from tdxlab import demo
from tdxlab.cli import main
from tdxlab.study.demo_plot import calls_per_phase
from tdxlab.study.plots import Canvas, side_by_side

PAGES = 2048
MEMORY = PAGES * 4096
PART = PAGES // 8
NAMES = ["build", "launch", "touch", "share", "unshare", "destroy"]


@pytest.fixture(scope="module", params=[(48, 4), (52, 5)])
def levels_and_life(request: pytest.FixtureRequest) -> tuple[int, demo.Life]:
    gpaw, levels = request.param
    return levels, demo.live(gpaw=gpaw, memory=MEMORY, vcpus=3)


@pytest.fixture
def life(levels_and_life: tuple[int, demo.Life]) -> demo.Life:
    return levels_and_life[1]


def phase(life: demo.Life, name: str) -> demo.Phase:
    return next(phase for phase in life.phases if phase.name == name)


def test_life_has_its_phases_in_order(life: demo.Life) -> None:
    assert [phase.name for phase in life.phases] == NAMES
    assert life.memory == MEMORY


def test_build_and_launch_cost_what_vcpus_and_firmware_cost(
    levels_and_life: tuple[int, demo.Life],
) -> None:
    levels, life = levels_and_life
    assert phase(life, "build").seamcalls == {
        "TDH.MNG.CREATE": 1,
        "TDH.MNG.KEY.CONFIG": 2,
        "TDH.MNG.ADDCX": 6,
        "TDH.MNG.INIT": 1,
        "TDH.MNG.RD": 2,
        "TDH.VP.CREATE": 3,
        "TDH.VP.ADDCX": 15,
        "TDH.VP.INIT": 3,
        "TDH.VP.WR": 9,
    }
    assert phase(life, "launch").seamcalls == {
        "TDH.MEM.SEPT.ADD": levels - 1,
        "TDH.MEM.PAGE.ADD": 4,
        "TDH.MR.EXTEND": 64,
        "TDH.MR.FINALIZE": 1,
        "TDH.VP.WR": 1,
    }


def test_touch_costs_an_entry_and_an_aug_a_page(life: demo.Life) -> None:
    calls = phase(life, "touch").seamcalls
    new_tables = PAGES // 512 + 1
    assert calls == {
        "TDH.VP.ENTER": PAGES + 1,
        "TDH.MEM.PAGE.AUG": PAGES,
        "TDH.MEM.SEPT.ADD": new_tables,
    }


def test_sharing_costs_four_calls_a_page_and_coming_back_one(life: demo.Life) -> None:
    there, back = phase(life, "share"), phase(life, "unshare")
    for leaf in ("RANGE.BLOCK", "TRACK", "PAGE.REMOVE"):
        assert there.seamcalls[f"TDH.MEM.{leaf}"] == PART
    assert there.seamcalls["TDH.PHYMEM.PAGE.WBINVD"] == PART
    assert there.tables["direct"]["4K"].entries == PART
    assert back.seamcalls["TDH.MEM.PAGE.AUG"] == PART
    assert back.tables["direct"]["4K"].entries == 0
    assert back.tables["external"] == phase(life, "touch").tables["external"]


def test_destroy_costs_four_calls_a_page_and_a_reclaim_a_table(life: demo.Life) -> None:
    calls, pages = phase(life, "destroy").seamcalls, PAGES + 4
    tables = life.total["TDH.MEM.SEPT.ADD"]
    assert sum(calls.values()) == 4 * pages + tables + 3 * (5 + 2) + 6 + 2 + 4
    assert calls["TDH.PHYMEM.PAGE.RECLAIM"] == tables + 3 * 6 + 6 + 1
    assert phase(life, "destroy").tables == {}


def test_external_tables_are_those_that_were_added(life: demo.Life) -> None:
    tables = phase(life, "unshare").tables["external"]
    added = sum(life.total[leaf] for leaf in ("TDH.MEM.SEPT.ADD",))
    assert sum(level.tables for level in tables.values()) == added + 1
    assert tables["4K"].entries == PAGES + 4


def test_json_has_what_the_life_has(life: demo.Life) -> None:
    out = io.StringIO()
    assert demo.command(life, True, out) == 0
    found = json.loads(out.getvalue())
    assert list(found) == ["gpaw", "memory", "phases", "total"]
    assert (found["gpaw"], found["memory"]) == (life.gpaw, MEMORY)
    assert found["total"] == life.total
    for plain, real in zip(found["phases"], life.phases, strict=True):
        assert plain["seamcalls"] == real.seamcalls
    direct = found["phases"][3]["tables"]["direct"]["4K"]
    assert direct == {"tables": 1, "entries": PART, "capacity": 512, "bytes": 4096}


def test_text_shows_every_leaf_and_every_phase(life: demo.Life) -> None:
    lines = list(demo.as_text(life))
    assert lines[0] == f"A TD with 8 MiB of memory and GPAW {life.gpaw}"
    assert lines[2].split() == ["SEAMCALLs", *NAMES, "total"]
    rows = {line.split()[0]: line.split()[1:] for line in lines if line.startswith("TDH.")}
    assert set(rows) == set(life.total)
    assert rows["TDH.MEM.PAGE.AUG"] == [".", ".", str(PAGES), ".", str(PART), ".", "2304"]
    assert max(map(len, lines)) < 100


def test_demo_prints_json_and_draws_a_plot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "calls.png"
    arguments = ["demo", "--memory", "64KiB", "--gpaw", "52", "--vcpus", "1", "--json"]
    assert main([*arguments, "--plot", str(file)]) == 0
    assert json.loads(capsys.readouterr().out)["memory"] == 1 << 16
    assert file.read_bytes().startswith(b"\x89PNG")


def test_calls_per_phase_leaves_out_letters_without_room(life: demo.Life) -> None:
    canvas = Canvas(3.0)
    (ax,) = side_by_side(canvas.figure, 1)
    calls_per_phase(life, ax)
    letters = dict.fromkeys(NAMES, "")
    for text in ax.texts[len(NAMES) :]:
        letters[NAMES[round(text.get_position()[1])]] += text.get_text()
    assert letters["touch"] == "VM"
    assert letters["build"] == letters["launch"] == ""
    assert letters["destroy"] == "MP"


def test_demo_tells_how_far_it_is() -> None:
    told: list[tuple[str, int, int]] = []
    demo.live(memory="64 KiB", progress=lambda *what: told.append(what))
    assert list(dict.fromkeys(name for name, _, _ in told)) == ["touch", "share", "destroy"]
    for name in ("touch", "share", "destroy"):
        done = [(done, total) for phase, done, total in told if phase == name]
        assert done[-1][0] == done[-1][1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--memory", "lots"], ("'lots'", "64 MiB")),
        (["--memory", "100"], ("'100'", "multiple of 4 KiB")),
        (["--memory", "1TiB"], ("'1TiB'", "at most 64 GiB")),
        (["--vcpus", "0"], ("'0'", "1 to 256")),
        (["--gpaw", "57"], ("57", "48, 52")),
        (["--memory", "4KiB", "--plot", "/no/such/place.png"], ("/no/such/place.png",)),
    ],
)
def test_a_mistake_in_the_arguments_is_one_line_and_status_2(
    arguments: list[str], words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = main(["demo", *arguments])
    except SystemExit as exit_:
        status = int(exit_.code or 0)
    printed = capsys.readouterr()
    assert status == 2
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert [word for word in words if word not in printed.err] == []
