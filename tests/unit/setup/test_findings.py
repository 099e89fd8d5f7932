"""Checks as rows: each runs once, as soon as what it needs is known, in the order of the rows."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest

from megatron_tropd.errors import ConfigError
from megatron_tropd.setup.findings import Check, Findings
from megatron_tropd.setup.validate import CHECKS


def test_a_check_runs_once_and_as_soon_as_its_needs_are_known():
    ran: list[tuple[Any, ...]] = []

    def note(name: str) -> Callable[..., None]:
        return lambda *given: ran.append((name, *given))

    found = Findings(
        [
            Check("both", ("model", "config"), note("both")),
            Check("config", ("config",), note("config")),
            Check("data", ("data",), note("data")),
        ]
    )
    found.learn(config=1)
    assert ran == [("config", 1)]
    found.learn(model=2)
    assert ran == [("config", 1), ("both", 2, 1)]  # in the order of its needs, not of their discovery
    found.learn(data=3, config=4)
    assert ran == [("config", 1), ("both", 2, 1), ("data", 3)]
    found.finish()


def test_the_first_check_that_fails_speaks_and_no_later_one_runs():
    def refuse() -> None:
        raise ConfigError("first")

    found = Findings([Check("a", (), refuse), Check("b", (), lambda: pytest.fail("ran"))])
    with pytest.raises(ConfigError, match="first"):
        found.learn()


def test_a_check_that_nobody_gave_its_needs_is_not_forgotten_in_silence():
    found = Findings([Check("lengths", ("data", "config"), lambda *_: None)])
    found.learn(config=1)
    with pytest.raises(AssertionError, match=r"never ran.*'lengths': \['data'\]"):
        found.finish()


def test_every_check_is_given_as_much_as_it_takes_and_has_a_name_of_its_own():
    assert len({check.name for check in CHECKS}) == len(CHECKS)
    for check in CHECKS:
        inspect.signature(check.function).bind(*check.needs)
