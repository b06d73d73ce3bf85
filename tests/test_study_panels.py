"""The panel: state k is a function of k, errors are shown, the text carries the numbers."""

from __future__ import annotations

import base64
from random import Random

import pytest
from matplotlib.figure import Figure

from tdxlab.scenarios import booted_machine, life_of_a_td
from tdxlab.study import plots, tables
from tdxlab.study.panel_life import LifePanel
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


def test_say_shows_a_sentence_until_the_action_is_over(panel: Counter) -> None:
    def act() -> None:
        panel.say("1 < 2 of 3 done")
        said.append(panel._sentence.value)

    said: list[str] = []
    before = panel._sentence.value
    panel.button("Work", "tdxlab-work", act).click()
    assert ["1 &lt; 2 of 3 done" in sentence for sentence in said] == [True]
    assert panel._sentence.value == before


def test_the_slider_is_within_its_bounds_after_each_message(
    panel: Counter, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[dict[str, object]] = []
    monkeypatch.setattr(panel.scrub, "_send", lambda message, **_: said.append(message["state"]))
    long, short = panel.tape, Tape(booted_machine())
    for tape in (short, long):
        panel.tape = tape
        panel.act(lambda: None)
    end = len(long)
    assert said == [{"value": 0}, {"max": 1}, {"max": end}, {"value": end}]


def test_where_the_clock_is_the_browser_says_and_nobody_answers(
    panel: Counter, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[dict[str, object]] = []
    monkeypatch.setattr(panel._clock, "_send", lambda message, **_: said.append(message["state"]))
    panel._clock.set_state({"value": len(panel.tape)})
    panel.tape = Tape(booted_machine())
    panel.act(lambda: None)
    panel._clock.set_state({"value": 50})
    assert said == [{"max": 0}]


def test_a_loaded_page_asks_the_slider_where_the_clock_is(panel: Counter) -> None:
    (tie,) = [tie for tie in panel._ties if (panel._clock, "value") in (tie.source, tie.target)]
    assert tie.source == (panel.scrub, "value")


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


def test_two_panels_do_not_disturb_each_other(life: LifePanel) -> None:
    life.build.click()
    text = life.text()
    other = LifePanel(gpaw=52)
    other.build.click()
    other.tear_down.click()
    assert life.text() == text
