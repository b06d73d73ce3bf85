"""What every panel does: it tells its story step by step and back, and is shown to everybody."""

from __future__ import annotations

import random

from tdxlab.study.panels import Panel


def story_faults(panel: Panel, *, seed: int, places: int) -> list[str]:
    """What is wrong on the way from the beginning of the tape to its end, and back: two positions
    look the same, or a position that is scrubbed to looks other than before.

    seed, places: of the positions that are scrubbed to, and how many.
    """
    seen = [panel.text()]
    while panel.tape.position < len(panel.tape):
        panel.step.click()
        assert panel.error == ""
        seen.append(panel.text())
    faults = [] if len(set(seen)) == len(panel.tape) + 1 else ["two positions look the same"]
    for place in random.Random(seed).choices(range(len(seen)), k=places):
        panel.scrub.value = place
        if panel.text() != seen[place]:
            faults.append(f"position {place} looks different")
    panel.reset.click()
    if panel.text() != seen[0]:
        faults.append("the beginning looks different")
    return faults


def missing_from_output(panel: Panel) -> list[str]:
    """Of widget, picture and text, those that a notebook would not show."""
    bundle = panel._repr_mimebundle_()
    is_there = {
        "widget": bool(bundle["application/vnd.jupyter.widget-view+json"]["model_id"]),
        "picture": bundle["image/png"].startswith("iVBOR"),
        "text": bundle["text/plain"] == panel.text(),
    }
    return [name for name, found in is_there.items() if not found]


def maps_with_words(panel: Panel) -> list[bool]:
    """Of each view that is a drawing: has it a label for those who do not see it?"""
    maps = [view for view in panel.views().values() if "<svg" in view]
    return ['role="img"' in view and "aria-label=" in view for view in maps]
