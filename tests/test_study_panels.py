"""The panel: state k is a function of k, errors are shown, the text carries the numbers."""

from __future__ import annotations

import base64
from random import Random

import pytest
from matplotlib.figure import Figure

from tdxlab.scenarios import CODE_GPA, booted_machine, life_of_a_td
from tdxlab.study import plots, tables
from tdxlab.study.panel_life import LifePanel, who_may_touch
from tdxlab.study.panels import Panel, operand_rows, trace_line
from tdxlab.tape import Tape


class Counter(Panel):
    """A small panel over any tape."""

    title = "counter"
    broken = False

    def views(self) -> dict[str, str]:
        if self.broken:
            raise RuntimeError("a view broke")
        return {"one": f"<p>{self.tape.position}</p>", "two": "<p>2</p>"}

    def summary(self) -> str:
        return f"{self.numbers()['calls']} calls."

    def numbers(self) -> dict[str, int]:
        return {"calls": sum(row.calls for row in tables.seamcalls_per_phase(self.tape))}

    def figure(self, figure: Figure) -> None:
        plots.calls_over_time(
            tables.seamcalls_over_time(self.tape), plots.side_by_side(figure, 1)[0]
        )


@pytest.fixture
def panel() -> Counter:
    return Counter(life_of_a_td())


@pytest.fixture
def life() -> LifePanel:
    return LifePanel(gpaw=48)


def shown(panel: Panel) -> tuple[str, ...]:
    """Everything a reader sees except the picture."""
    widgets = (panel._sentence, panel._line, panel._numbers, *panel._views.children)
    return tuple(widget.value for widget in widgets)


def test_state_is_a_function_of_the_position_alone(panel: Counter) -> None:
    seen: dict[int, tuple[str, str, tuple[str, ...]]] = {}
    random = Random(4)
    for _ in range(60):
        panel.scrub.value = random.randint(0, len(panel.tape))
        position = panel.tape.position
        now = (panel.machine.digest(), panel.text(), shown(panel))
        assert seen.setdefault(position, now) == now
    assert len(seen) > 20


def test_buttons_move_the_tape_and_the_slider(panel: Counter) -> None:
    panel.reset.click()
    assert (panel.tape.position, panel.scrub.value) == (0, 0)
    panel.step.click()
    panel.step.click()
    panel.back.click()
    assert (panel.tape.position, panel.scrub.value) == (1, 1)
    assert panel.scrub.max == len(panel.tape)


def test_a_fast_slider_ends_in_the_right_state(panel: Counter) -> None:
    for position in (3, 50, 17, 80, 41):
        panel.scrub.value = position
    assert panel.tape.position == 41
    assert f"Step 41 of {len(panel.tape)}" in panel.text()


def test_controls_can_be_found_by_their_classes(panel: Counter) -> None:
    found = [panel.reset, panel.back, panel.step, panel.play, panel.scrub]
    names = ["reset", "back", "step", "play", "scrub"]
    for control, name in zip(found, names, strict=True):
        assert f"tdxlab-{name}" in control._dom_classes


def test_mistakes_are_shown_and_forgotten_with_the_next_event(
    panel: Counter, capsys: pytest.CaptureFixture[str]
) -> None:
    panel.step.click()
    assert "end of the tape" in panel.error
    assert 'role="alert"' in panel._problem.value
    assert "error: this is the end" in panel.text()
    panel.back.click()
    assert panel.error == panel._problem.value == ""
    panel.reset.click()
    panel.back.click()
    assert "beginning" in panel.error
    assert capsys.readouterr() == ("", "")


def test_a_broken_view_is_shown_with_the_place_where_it_broke(panel: Counter) -> None:
    panel.broken = True
    panel.back.click()
    assert panel.error == "RuntimeError: a view broke"
    assert "test_study_panels.py" in panel._problem.value


def test_the_sentence_is_a_live_region(panel: Counter) -> None:
    assert 'role="status" aria-live="polite"' in panel._sentence.value
    assert "68 calls." in panel._sentence.value


def test_bundle_has_widget_picture_and_text(panel: Counter) -> None:
    bundle = panel._repr_mimebundle_()
    view = bundle["application/vnd.jupyter.widget-view+json"]
    assert view["model_id"] == panel.widget.model_id
    assert base64.b64decode(bundle["image/png"]).startswith(b"\x89PNG")
    assert bundle["text/plain"] == panel.text()
    assert "calls: 68\none: view " in panel.text()


def test_text_changes_with_every_view() -> None:
    panel = Counter(life_of_a_td())
    before = panel.text().splitlines()
    panel.back.click()
    after = panel.text().splitlines()
    assert [line for line in before if line.startswith("two")] == after[-1:]
    assert before[-2] != after[-2]


def test_the_figure_is_reused(panel: Counter) -> None:
    assert panel._canvas is not None
    axes = list(panel._canvas.figure.axes)
    panel.reset.click()
    assert list(panel._canvas.figure.axes) == axes


def test_a_panel_without_a_figure_has_no_picture() -> None:
    class Plain(Counter):
        figure_height = 0

    bundle = Plain(Tape(booted_machine()))._repr_mimebundle_()
    assert "image/png" not in bundle


def test_trace_line_shows_registers_before_and_after() -> None:
    tape = life_of_a_td()
    lines = [trace_line(action) for action in tape.actions]
    assert trace_line(None) == "nothing has happened yet"
    assert lines[0] == (
        "LP 0  SEAMCALL TDH.MNG.CREATE  RAX=0x9 RCX=0x100000000 RDX=0x21  ->  SUCCESS"
    )
    assert lines[52] == "LP 0  clear 64 x MOVDIR64B  hpa=0x100011000"
    assert operand_rows(tape.actions[0])[0] == ("RAX", 9, "leaf number")
    assert operand_rows(tape.actions[52]) == []


# -- the life-cycle panel


def test_life_panel_lives_the_story_of_the_scenario(life: LifePanel) -> None:
    life.build.click()
    life.page.value = 1
    life.touch.click()
    life.remove.click()
    life.tear_down.click()
    names = [action.name for action in life.tape.actions if action.kind == "SEAMCALL"]
    story = [action.name for action in life_of_a_td().actions if action.kind == "SEAMCALL"]
    assert names == story
    assert life.numbers()["pages owned"] == 0


@pytest.mark.parametrize(("gpaw", "calls"), [(48, 38), (52, 39)])
def test_life_panel_builds_a_td_of_the_width(gpaw: int, calls: int) -> None:
    life = LifePanel(gpaw=gpaw)
    life.build.click()
    assert life.numbers()["SEAMCALLs"] == calls
    assert life.numbers()["S-EPT tables"] == {48: 3, 52: 4}[gpaw]


def test_life_panel_refuses_what_makes_no_sense_and_changes_nothing(life: LifePanel) -> None:
    for button, complaint in ((life.touch, "no TD"), (life.remove, "no TD")):
        button.click()
        assert complaint in life.error
    life.build.click()
    before = life.machine.digest()
    life.page.value = 3
    for button, complaint in ((life.build, "already"), (life.remove, "no page is mapped")):
        button.click()
        assert complaint in life.error
    assert life.machine.digest() == before


def test_life_panel_goes_on_from_where_it_was_stepped_back_to(life: LifePanel) -> None:
    life.build.click()
    for page in (1, 2):
        life.page.value = page
        life.touch.click()
    life.tear_down.click()
    life.scrub.value = life.tape.position - 3
    life.remove.click()
    assert life.error == ""
    assert life.numbers()["pages mapped"] == 2
    life.reset.click()
    for button in (life.build, life.touch):
        button.click()
    life.page.value = 1
    life.touch.click()
    assert life.numbers()["pages mapped"] == 3


def test_life_panel_touches_the_page_that_the_slider_chooses(life: LifePanel) -> None:
    life.build.click()
    before = life.tape.position
    life.page.value = 5
    assert life.tape.position == before
    life.touch.click()
    gpas = [action.inputs["gpa"] for action in life.actions_of("touch") if "gpa" in action.inputs]
    assert set(gpas) == {CODE_GPA + 5 * 4096}


def test_who_may_touch_shows_text_to_the_guest_and_noise_to_the_host(life: LifePanel) -> None:
    life.build.click()
    life.page.value = 1
    life.touch.click()
    code, heap = who_may_touch(life)
    assert code.guest_reads == "the guest's firs"
    assert heap.guest_reads == "." * 16
    assert {code.host_reads, heap.host_reads}.isdisjoint({code.guest_reads, heap.guest_reads})
    pending = next(i for i, a in enumerate(life.tape.actions) if a.name == "TDH.MEM.PAGE.AUG") + 1
    life.scrub.value = pending
    before = life.machine.digest()
    assert [row.guest_reads for row in who_may_touch(life)][1] == "(no access)"
    assert life.machine.digest() == before


def test_two_panels_do_not_disturb_each_other(life: LifePanel) -> None:
    life.build.click()
    text = life.text()
    other = LifePanel(gpaw=52)
    other.build.click()
    other.tear_down.click()
    assert life.text() == text
