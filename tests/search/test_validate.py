"""Held-out items choose between plans as far as they can tell them apart."""

from dataclasses import asdict

import numpy as np
import pytest

from moa.plan import ModelIdentity, Plan
from moa.search import validate as stage
from moa.search.divergence import Divergence
from moa.search.validate import ValidationRow, best, validate

IDENTITY = ModelIdentity("llama", 4, 2, 4, 16, "")


def row(plan, loss, error):
    return ValidationRow(plan, loss, {"retrieval": loss}, error)


@pytest.mark.parametrize(
    ("losses", "errors", "measured", "chosen"),
    [
        ((0.9, 0.8, 0.7), (0.1, 0.1, 0.0), (3, 2, 1), 2),  # the lowest of both
        ((0.7, 0.8, 0.9), (0.0, 0.04, 0.11), (3, 2, 1), 2),  # no worse than chance allows
        ((0.7, 0.8, 0.9), (0.0, 0.06, 0.09), (3, 2, 1), 1),  # the third is
        ((0.7, 0.8, 0.9), (0.0, 0.04, 0.09), (3, 2, 1), 0),
        ((0.8, 0.7, 0.9), (0.2, 0.0, 0.3), (0, 0, 0), 1),  # nothing was measured
        ((np.nan, 0.7, 0.9), (np.nan, 0.0, 0.3), (1, 3, 2), 2),
    ],
)
def test_of_plans_that_held_out_items_cannot_tell_apart_the_one_is_taken_that_was_measured_best(
    losses, errors, measured, chosen
):
    rows = [row(plan, loss, error) for plan, (loss, error) in enumerate(zip(losses, errors, strict=True))]
    assert best(rows, measured) == rows[chosen]


class Known(Divergence):
    """Losses of 40 texts at two lengths, nine summaries and a text: each item's own, and of a plan what its first head
    misses."""

    def __init__(self, loaded, items, weights):
        self._weights, self._unit = weights, {"retrieval": 0.5, "summary": 2.0, "text": 1.0}
        random = np.random.default_rng(0)
        counts = {(1024, "retrieval"): 40, (2048, "retrieval"): 40, (1024, "summary"): 9}
        self.items = {key: random.random(count) for key, count in counts.items()}
        self.slopes = {key: random.random(count) for key, count in counts.items()}

    def by_item(self, plan):
        missed = 1 - plan.spans(2048)[0, 0] / 2048
        found = {key: losses + missed * self.slopes[key] for key, losses in self.items.items()}
        return {**found, (1024, "text"): np.array([missed])}


def test_the_error_is_that_of_the_difference_item_by_item(monkeypatch):
    monkeypatch.setattr(stage, "Divergence", Known)
    weights = {"retrieval": 1.0, "summary": 0.5, "text": 3.0}
    plans = [Plan.uniform(IDENTITY, share) for share in (0.25, 0.75, 0.5)]
    rows = validate(None, plans, None, weights)
    known = Known(None, None, weights)
    assert [row.plan for row in rows] == [0, 1, 2]
    assert rows[1].loss == min(row.loss for row in rows)
    assert rows[1].error == 0
    for found, plan in zip(rows, plans, strict=True):
        losses, lowest = known.by_item(plan), known.by_item(plans[1])
        short, long, summaries, text = (losses[key] for key in losses)
        assert found.by_source["retrieval"] == pytest.approx((short.mean() + long.mean()) / 2)
        assert found.loss == pytest.approx(short.mean() + long.mean() + summaries.mean() / 4 + 3 * text[0])
        parts = [(losses[key] - lowest[key]).var(ddof=1) / len(losses[key]) for key in known.items]
        assert found.error == pytest.approx(np.sqrt(parts[0] + parts[1] + parts[2] / 16)), "of the text none is known"
    assert rows[0].error > rows[2].error > 0
    assert ValidationRow(**asdict(rows[0])) == rows[0]
