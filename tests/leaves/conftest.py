"""The bench that all leaf tests work on: booted once, made new for each test."""

import pytest
from leafbench import Bench


@pytest.fixture(scope="session")
def booted() -> Bench:
    return Bench()


@pytest.fixture
def bench(booted: Bench) -> Bench:
    booted.reset()
    return booted
