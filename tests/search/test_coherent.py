"""Exchanges are the best there are, and items that lose as a whole get full heads rather than many half ones."""

import itertools

import numpy as np
import pytest

from moa.plan import ElasticRule
from moa.search.coherent import CoherentLoss, candidates, improve
from moa.search.exchange import Budget, exchange
from moa.search.optimize import optimize
from moa.search.rules import OptimizeConfig, RuleGrid, Rules
from moa.search.tables import BLOCK, SINK, window_count

N = 1024
GRID = RuleGrid((*(ElasticRule(alpha, 0.0) for alpha in (128.0, 256.0, 512.0)), ElasticRule(0.0, 1.0)))


def budget_of(density, **options):
    config = OptimizeConfig(density, lengths_constrained=(), grid=GRID, points=1, **options)
    return Budget(Rules.within((N,), config), config)


@pytest.mark.parametrize("rules_per_layer", [None, 1])
@pytest.mark.parametrize("most", [1, 2, 4])
@pytest.mark.parametrize("seed", range(4))
def test_an_exchange_is_the_best_of_all(seed, most, rules_per_layer):
    rng = np.random.default_rng(seed)
    budget = budget_of(0.45, rules_per_layer=rules_per_layer)
    plan = np.array([[1, 1], [2, 2]])
    change = rng.normal(size=(2, 2, 4))
    change[rng.random(change.shape) < 0.2] = np.inf
    heads = np.arange(2)
    change[heads[:, None], heads, plan] = 0

    def total(choice):
        return change[heads[:, None], heads, choice].sum()

    choices = (np.array(choice).reshape(2, 2) for choice in itertools.product(range(4), repeat=4))
    within = [c for c in choices if (c != plan).sum() <= most and budget.fits(c) and np.isfinite(total(c))]
    best = min(map(total, within))
    found = exchange(plan, change, budget, most)
    assert budget.fits(found)
    assert (found != plan).sum() <= most
    spread = (
        np.where(np.isfinite(change), change, 0).max(-1).sum() - np.where(np.isfinite(change), change, 0).min(-1).sum()
    )
    assert total(found) <= best + 0.01 * spread


def test_a_budget_out_of_reach_is_none():
    budget = budget_of(0.2)
    plan = np.full((2, 2), 3)
    change = np.zeros((2, 2, 4))
    assert exchange(plan, change, budget, 1) is None
    assert budget.fits(exchange(plan, change, budget, 4))
    change[:, 0, :3] = np.inf
    assert exchange(plan, change, budget, 4) is None


def hidden_facts(items=20, layers=3, heads=4):
    """Items with a fact each, which every head loses whose window ends before it: float64 [items, layers, heads, W]."""
    distance = (np.arange(items) + 0.5) / items * (N - SINK)
    windows = BLOCK * np.arange(1, window_count(N) + 1)
    missed = (windows < distance[:, None]).astype(float)
    return np.broadcast_to(missed[:, None, None], (items, layers, heads, len(windows))).copy()


def coherent(items, config):
    return CoherentLoss({N: {"a": items}}, {"a": 1.0}, Rules.within((N,), config).told_by((N,)))


def test_changes_are_differences():
    rng = np.random.default_rng(0)
    config = budget_of(0.5).config
    items = np.sort(rng.random((5, 2, 3, window_count(N))))[..., ::-1]
    loss = CoherentLoss({N: {"a": items, "b": 7 * items[:3]}}, {"a": 1.0, "b": 0.5}, Rules.within((N,), config))
    plan = rng.integers(4, size=(2, 3))
    change = loss.change(plan)
    for layer, head, rule in itertools.product(range(2), range(3), range(4)):
        other = plan.copy()
        other[layer, head] = rule
        assert change[layer, head, rule] == pytest.approx(loss(other) - loss(plan), abs=1e-12)
    assert loss(np.zeros((2, 3), int)) == pytest.approx(1.5), "the weights, with the shortest spans"


def test_full_heads_beat_half_ones():
    items = hidden_facts()
    config = OptimizeConfig(0.5, lengths_constrained=(), points=1)
    rules = Rules.within((N,), config).told_by((N,))
    half = rules.numbers(np.zeros((3, 4)), np.full((3, 4), 0.5))
    loss = coherent(items, config)
    best = improve([half], loss, Budget(rules, config))
    spans = rules.spans[N][best]
    assert Budget(rules, config).fits(best)
    assert loss(best) < 0.75 * loss(half)
    assert (spans == N).sum() >= 4
    # what only adds up cannot tell the two apart
    table = items.mean(0)
    separate = [rules.losses(N, {N: table})[0, 0, plan].sum() for plan in (half, best)]
    assert separate[1] == pytest.approx(separate[0], rel=0.05)


def test_where_nothing_can_be_lost_nothing_is_exchanged():
    config = OptimizeConfig(0.5, lengths_constrained=(), points=1)
    found = candidates({N: {"a": np.zeros((3, 2, 2, window_count(N)))}}, {"a": 1.0}, config)
    assert found[-1].losses == {N: 0.0}


def test_candidates_are_the_optimizers_plans_those_of_shares_and_one_more():
    config = OptimizeConfig(0.4, points=1)
    items = {N: {"a": hidden_facts(heads=3)}}
    found = candidates(items, {"a": 1.0}, config)
    losses = {N: items[N]["a"].mean(0)}
    assert [plan.losses for plan in found[:-3]] == [plan.losses for plan in optimize(losses, config)]
    per_head, per_layer = found[-3:-1]
    for plan in (per_head, per_layer):
        assert (plan.alpha == 0).all()
        assert len(np.unique(plan.beta)) > 1
    assert (per_layer.beta == per_layer.beta[:, :1]).all()
    assert sum(found[0].losses.values()) <= sum(per_head.losses.values()) * 1.02
    assert sum(per_head.losses.values()) <= sum(per_layer.losses.values()) * 1.02
    assert found[-1].gap is None
    assert all(density <= 0.4 for density in found[-1].densities.values())
    rules = Rules.within((N,), config).told_by((N,))
    values = [coherent(items[N]["a"], config)(rules.numbers(plan.alpha, plan.beta)) for plan in found]
    assert values[-1] == min(values)


def test_the_cheapest_rule_on_the_whole_need_not_be_so_at_every_length():
    lengths = (1024, 2048, 4096, 8192)
    items = {length: {"a": np.linspace(1, 0, window_count(length)) * np.ones((2, 2, 2, 1))} for length in lengths}
    found = candidates(items, {"a": 1.0}, OptimizeConfig(0.2, lengths_constrained=(512,), points=1))
    assert all(density <= 0.2 for plan in found for density in plan.densities.values())


def test_where_shares_do_not_fit_the_others_remain():
    long = 16384
    items = {long: {"a": np.linspace(1, 0, window_count(long)) * np.ones((1, 1, 2, 1))}}
    found = candidates(items, {"a": 1.0}, OptimizeConfig(0.02, points=1))
    assert len(found) == 2, "a 32nd of the text is the smallest share"
    assert all(plan.densities[long] <= 0.02 for plan in found)
