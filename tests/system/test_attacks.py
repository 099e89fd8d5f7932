"""No attack of the quick ones gets through, and the tool that repeats them says so when one does."""

from __future__ import annotations

import pytest

from tests.support.attacks import KINDS, Attack, Hole, attacks_of, attempt, table

QUICK = [(kind, attack) for kind in KINDS for attack in attacks_of(kind, quick=True)]


@pytest.mark.parametrize(("kind", "attack"), QUICK, ids=[f"{kind}: {attack.name}" for kind, attack in QUICK])
def test_no_quick_attack_gets_through(kind: str, attack: Attack):
    found = attempt(attack)
    assert found.held, found.said


def test_an_attack_that_gets_through_is_a_row_that_says_so():
    def succeed(directory):
        raise Hole("it read the | key")

    found = attempt(Attack(name="plain", attempt=succeed))
    assert not found.held
    assert "| plain | **got through** | Hole: it read the / key |" in table("some", [found])
