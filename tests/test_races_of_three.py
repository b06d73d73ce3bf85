"""Scenarios with three vCPUs and the most states: nothing that the rules forbid comes of them.

`test_races.py` has all others. These take the longest of all explorations.
"""

import pytest

from tdxlab.races import SCENARIOS, build
from tests.test_races import AFFORDABLE

LARGE = ["fresh-region", "zap-enter", "two-teardowns", "accept-block"]


def test_every_scenario_for_three_vcpus_is_explored_with_three() -> None:
    made_for_three = [name for name, scenario in SCENARIOS.items() if scenario.most == 3]
    assert sorted(LARGE + [name for name, vcpus in AFFORDABLE if vcpus == 3]) == sorted(
        made_for_three
    )


@pytest.mark.parametrize("name", LARGE)
def test_explore_finds_nothing_wrong_with_three_vcpus(name: str) -> None:
    found = build(name, 3).explore()
    assert found.complete
    assert [violation.table() for violation in found.violations] == []
