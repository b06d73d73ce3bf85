"""The workshop: tables, plots, page-table maps, panels and exercises for the notebooks.

    from tdxlab.study import check, exercise, gpaw

The only place for numpy, matplotlib and ipywidgets. A notebook imports its panel from
`tdxlab.study.panel_*`; everything here reads machines, and changes them through tapes only.
"""

from __future__ import annotations

from tdxlab.study.exercises import check, exercise
from tdxlab.study.parameters import gpaw

__all__ = ["check", "exercise", "gpaw"]
