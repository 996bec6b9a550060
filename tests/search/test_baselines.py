"""Plans of restricted kinds: inside the budget, of their kind, and never better than the full grid's."""

import numpy as np
import pytest

from moa import ModelIdentity
from moa.errors import InfeasibleBudgetError, InputError
from moa.search.baselines import NAMES, baseline
from moa.search.optimize import optimize
from moa.search.rules import OptimizeConfig

IDENTITY = ModelIdentity("llama", 4, 4, 8, 16, "0123456789abcdef")
LENGTHS = (1024, 2048)


@pytest.fixture(scope="module")
def losses():
    """Falling tables; some heads need only what is near, some all."""
    rng = np.random.default_rng(0)
    tables = {}
    for length in LENGTHS:
        windows = -(-(length - 64) // 64)
        reach = rng.choice([0.05, 0.3, 1.0], (4, 4, 1))
        left = 1 - np.arange(1, windows + 1) / windows
        tables[length] = rng.uniform(0.5, 2, (4, 4, 1)) * left ** (1 / reach)
    return tables


def cost(plan, losses):
    total = 0.0
    for length, table in losses.items():
        entry = np.minimum((plan.spans(length) - 64) // 64 - 1, table.shape[2] - 1)
        total += np.take_along_axis(table, entry[..., None], 2).sum()
    return total


@pytest.mark.parametrize("name", NAMES)
def test_a_baseline_is_of_its_kind_and_within_the_density(name, losses):
    plan = baseline(name, losses, IDENTITY, 0.5)
    for length in (*LENGTHS, 4096):
        assert plan.density(length) <= 0.5
        spans = plan.spans(length)
        if name == "per-layer":
            assert (spans == spans[:, :1]).all()
        if name == "binary-heads":
            assert set(np.unique(spans)) == {272, length}
    assert name in plan.provenance["baseline"]


def test_the_ladder_falls(losses):
    found = optimize(losses, OptimizeConfig(0.5))
    elastic = min(sum(plan.losses.values()) for plan in found)
    per_layer, per_head = (cost(baseline(name, losses, IDENTITY, 0.5), losses) for name in ("per-layer", "per-head"))
    assert elastic <= per_head <= per_layer


@pytest.mark.parametrize(("near", "short"), [(128, 144), (256, 272)])
def test_binary_heads_have_the_window_that_loses_less(near, short):
    """All heads but one lose next to nothing from ``near`` tokens on; a shorter window has room for more full heads."""
    tables = {}
    for length in (2048, 4096):
        span = 64 * np.arange(2, -(-length // 64) + 1)  # of the entries
        losses = np.where(span >= near, 0.01, 1.0) * np.ones((4, 4, 1))
        losses[0, 0] = np.where(span >= length, 0.0, 2.0)
        tables[length] = np.where(span >= length, 0.0, losses)
    plan = baseline("binary-heads", tables, IDENTITY, 0.25)
    assert set(np.unique(plan.spans(4096))) == {short, 4096}
    assert plan.spans(4096)[0, 0] == 4096


def test_binary_heads_keep_to_the_density_with_the_short_window(losses):
    at_least = 272 / LENGTHS[0]
    plan = baseline("binary-heads", losses, IDENTITY, 0.9 * at_least)
    assert plan.spans(LENGTHS[0]).min() == 144


def test_what_cannot_be_is_refused(losses):
    with pytest.raises(InputError, match="magic"):
        baseline("magic", losses, IDENTITY, 0.5)
    with pytest.raises(InfeasibleBudgetError):
        baseline("binary-heads", losses, IDENTITY, 0.1)
