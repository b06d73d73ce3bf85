"""Draw the workloads of `data/workloads` again: `python -m tools.make_workloads`.

The files depend on nothing but `tdxlab.workloads.generate` and its seeds.
"""

from __future__ import annotations

import json
from pathlib import Path

from tdxlab import workloads

FOLDER = Path(__file__).resolve().parent.parent / "data" / "workloads"


def text_of(workload: workloads.Workload) -> str:
    """The file of a workload: one event a line."""
    raw = workloads.to_json(workload)
    events = ",\n    ".join(json.dumps(event) for event in raw.pop("events"))
    head = json.dumps(raw, indent=2).rstrip("\n}")
    return f'{head},\n  "events": [\n    {events}\n  ]\n}}\n'


def main() -> None:
    """Write all files."""
    FOLDER.mkdir(exist_ok=True)
    for name in workloads.names():
        (FOLDER / f"{name}.json").write_text(text_of(workloads.generate(name)))


if __name__ == "__main__":
    main()
