"""The journal's protocol, explored exhaustively: no LOSS, no LEAK, and no rule too many."""

from __future__ import annotations

from typing import Any

import pytest
from support.journal_model import RULES, Model, explore

CASTS: dict[str, dict[str, Any]] = {
    "two writers and a check": {},
    "a writer and a restorer": {"restores": True},
    "two writers": {"has_check": False},
    "one writer": {"writers": 1},
}

WITHOUT = {
    "stage first": ("LOSS", "LEAK"),
    "adopt what is listed": ("LOSS",),
    "deleting refuses": ("LOSS",),
    "rows are locked": ("LOSS",),
    "the journal decides": ("LOSS",),
    "deleting is terminal": ("LOSS",),
    "quarantine": ("LEAK",),
    "check condemns": ("LOSS",),
    "check asks again": ("LOSS",),
    "worker asks rows": ("LOSS",),
}
"""What happens without a rule."""

NEEDS: dict[str, dict[str, Any]] = {
    "deleting is terminal": {"restores": True},
    "worker asks rows": {"bypasses": True},
}
"""Who has to take part for a rule to matter."""


@pytest.mark.slow
@pytest.mark.parametrize("cast", CASTS)
def test_nothing_is_lost_and_nothing_is_left(cast: str) -> None:
    """In any order, with a crash at each step, and with requests that take effect late."""
    states, found = explore(Model(**CASTS[cast]))

    assert found == {}
    assert states > 100


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
def test_every_rule_is_needed(rule: str) -> None:
    """Leaving out one of them loses or leaks."""
    _, found = explore(Model(without=[rule], **NEEDS.get(rule, {})), stops_at=WITHOUT[rule])

    assert set(WITHOUT[rule]) <= found.keys(), found


def test_a_statement_past_the_triggers() -> None:
    """It loses nothing, as long as the lease outlives its transaction; what it replaced is left."""
    _, found = explore(Model(writers=1, bypasses=True))

    assert set(found) == {"LEAK"}
