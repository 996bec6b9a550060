"""What must hold for the plans that the optimize stage returns, whatever solver is inside."""

import time

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp

from moa.errors import InfeasibleBudgetError, InputError
from moa.plan import ElasticRule, elastic_spans
from moa.search.optimize import ParetoPlan, optimize
from moa.search.rules import OptimizeConfig, RuleGrid
from moa.search.tables import BLOCK, SHORTEST, window_count

SMALL_GRID = RuleGrid(
    tuple(ElasticRule(alpha, beta) for alpha in (-128.0, 128.0, 256.0) for beta in (0.0, 0.25, 0.5, 1.0))
)


def loss_tables(seed, layers, heads, lengths):
    """Losses that fall with the window, at a pace of each head's own, to 0 where the window covers everything."""
    rng = np.random.default_rng(seed)
    size = rng.lognormal(0, 1.5, (layers, heads, 1))
    reach = np.exp(rng.uniform(np.log(0.02), np.log(0.8), (layers, heads, 1))) * max(lengths)
    shape = rng.uniform(0.3, 1, (layers, heads, 1))
    tables = {}
    for length in lengths:
        windows = window_count(length)
        fall = np.exp(-((BLOCK * np.arange(1, windows + 1) / reach) ** shape))
        tables[length] = size * rng.lognormal(0, 0.3, (layers, heads, 1)) * (fall - fall[..., -1:])
    return tables


def told(grid, tables):
    """The rules that tables know of: none shorter than their first entry."""
    return RuleGrid(tuple(r for r in grid.rules if all(r.span(n) >= min(SHORTEST, n) for n in tables)))


def loss_of(table, spans, length):
    """The loss that a table [layers, heads, windows] gives to spans [layers, heads]."""
    total = 0.0
    for layer, head in np.ndindex(spans.shape):
        if spans[layer, head] < length:
            total += table[layer, head, (spans[layer, head] - 64) // 64 - 1]
    return total


def oracle(tables, density, lengths, grid, rules_per_layer, objective, limits=None):
    """The least loss at one length by one monolithic integer program; infinity if there is no plan."""
    alpha, beta = (np.array([getattr(rule, name) for rule in told(grid, tables).rules]) for name in ("alpha", "beta"))
    layers, heads = tables[objective].shape[:2]
    rules = len(alpha)
    takes = layers * heads * rules  # then one variable per layer and rule: is the rule used in the layer?
    variables = takes + layers * rules

    def every_choice(values):  # [rules] or [layers, heads, rules], as one row
        return np.append(np.broadcast_to(values, (layers, heads, rules)).ravel(), np.zeros(layers * rules))

    def losses(length):
        spans = np.broadcast_to(elastic_spans(alpha, beta, length), (layers, heads, rules))
        return np.array(
            [
                [[loss_of(tables[length][[[i]], [[h]]], spans[i, h, None, [r]], length) for r in range(rules)]
                 for h in range(heads)]
                for i in range(layers)
            ]
        )  # fmt: skip

    one_each = sp.hstack(
        [sp.kron(sp.eye(layers * heads), np.ones((1, rules))), sp.csr_array((layers * heads, layers * rules))]
    )
    constraints = [LinearConstraint(one_each, 1, 1)]
    for length in lengths:
        share = elastic_spans(alpha, beta, length) / length / (layers * heads)
        constraints.append(LinearConstraint(every_choice(share)[None], -np.inf, density + 1e-9))
    for length, limit in (limits or {}).items():
        constraints.append(LinearConstraint(every_choice(losses(length))[None], -np.inf, limit))
    if rules_per_layer is not None:
        used = sp.kron(sp.eye(layers), sp.kron(np.ones((heads, 1)), sp.eye(rules)))
        constraints.append(LinearConstraint(sp.hstack([sp.eye(takes), -used]), -np.inf, 0))
        count = sp.hstack([sp.csr_array((layers, takes)), sp.kron(sp.eye(layers), np.ones((1, rules)))])
        constraints.append(LinearConstraint(count, -np.inf, rules_per_layer))
    result = milp(
        every_choice(losses(objective)), integrality=np.ones(variables), bounds=Bounds(0, 1), constraints=constraints
    )
    return np.inf if result.x is None else result.fun


def check_plan(plan: ParetoPlan, tables, config: OptimizeConfig, lengths):
    assert set(plan.densities) == set(lengths)
    for length, density in plan.densities.items():
        spans = elastic_spans(plan.alpha, plan.beta, length)
        assert density == spans.mean() / length
        assert density <= config.density
    assert set(plan.losses) == set(tables)
    for length, loss in plan.losses.items():
        assert loss == pytest.approx(loss_of(tables[length], elastic_spans(plan.alpha, plan.beta, length), length))
    if config.rules_per_layer:
        for alpha, beta in zip(plan.alpha, plan.beta, strict=True):
            assert len(set(zip(alpha, beta, strict=True))) <= config.rules_per_layer
    assert plan.gap >= 0


def check_front(plans):
    losses = [np.array(list(plan.losses.values())) for plan in plans]
    for i, own in enumerate(losses):
        for j, other in enumerate(losses):
            assert i == j or not (other <= own).all()


@pytest.mark.parametrize("rules_per_layer", [None, 1, 2])
@pytest.mark.parametrize("seed", range(3))
def test_one_length_is_solved_as_well_as_by_a_monolithic_program(seed, rules_per_layer):
    tables = loss_tables(seed, 3, 3, [1024])
    for density in (0.2, 0.35, 0.6):
        config = OptimizeConfig(density, rules_per_layer=rules_per_layer, grid=SMALL_GRID)
        (plan,) = optimize(tables, config)
        check_plan(plan, tables, config, (1024, 2048))
        best = oracle(tables, density, (1024, 2048), SMALL_GRID, rules_per_layer, 1024)
        assert plan.losses[1024] * (1 - plan.gap) <= best * (1 + 1e-6), "the certified gap holds"
        assert plan.losses[1024] <= best * (1 + config.gap) + 1e-9
        assert plan.losses[1024] >= best * (1 - 1e-4) - 1e-9


@pytest.mark.parametrize("rules_per_layer", [None, 1, 2])
def test_several_lengths_hold_every_single_optimum_and_no_plan_dominates_another(rules_per_layer):
    tables = loss_tables(7, 3, 3, [512, 1024])
    config = OptimizeConfig(0.4, (1536,), rules_per_layer, grid=SMALL_GRID)
    plans = optimize(tables, config)
    check_front(plans)
    for plan in plans:
        check_plan(plan, tables, config, (512, 1024, 1536))
    for length in tables:
        best = oracle(tables, 0.4, (512, 1024, 1536), SMALL_GRID, rules_per_layer, length)
        assert min(plan.losses[length] for plan in plans) <= best * (1 + config.gap)
    assert [plan.losses[512] for plan in plans] == sorted(plan.losses[512] for plan in plans)


def test_plans_between_the_ends_are_the_best_within_their_losses():
    tables = {512: loss_tables(3, 6, 3, [512])[512], 2048: loss_tables(4, 6, 3, [2048])[2048]}
    config = OptimizeConfig(0.5, (), grid=SMALL_GRID)
    plans = optimize(tables, config)
    assert len(plans) >= 3
    for plan in plans:
        limits = {512: plan.losses[512] * (1 + 1e-6)}
        best = oracle(tables, 0.5, (512, 2048), SMALL_GRID, None, 2048, limits)
        assert plan.losses[2048] <= best * (1 + 3 * config.gap)  # itself, and a neighbour that stands for it


def test_a_length_without_influence_on_the_budget_does_not_spoil_the_others():
    """The optimum at one length leaves the spans at other lengths open: they must not be wasted."""
    tables = loss_tables(5, 4, 4, [512, 4096])
    plans = optimize(tables, OptimizeConfig(0.5))
    rule = ElasticRule(0.0, 0.5)
    uniform = {length: loss_of(table, np.full((4, 4), rule.span(length)), length) for length, table in tables.items()}
    assert all(plan.losses[512] < uniform[512] for plan in plans)
    assert all(plan.densities[4096] > 0.4 for plan in plans)


@pytest.mark.parametrize("density", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("rules_per_layer", [None, 1, 2])
def test_better_than_one_window_for_all_heads(density, rules_per_layer):
    tables = loss_tables(11, 6, 4, [1024, 2048])
    spans = {length: np.full((6, 4), int(density * length)) for length in tables}
    uniform = np.array([loss_of(tables[length], spans[length], length) for length in tables])
    plans = optimize(tables, OptimizeConfig(density, rules_per_layer=rules_per_layer, points=3))
    assert any((np.array(list(plan.losses.values())) < 0.9 * uniform).all() for plan in plans)


def test_the_same_tables_give_the_same_plans():
    tables = loss_tables(2, 6, 2, [512, 1024, 2048])
    config = OptimizeConfig(0.3, points=3, grid=SMALL_GRID)
    first, second = optimize(tables, config), optimize(dict(reversed(tables.items())), config)
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one.alpha, other.alpha)
        np.testing.assert_array_equal(one.beta, other.beta)
        assert (one.losses, one.densities, one.gap) == (other.losses, other.densities, other.gap)


@pytest.mark.parametrize("rules_per_layer", [None, 1, 2])
def test_density_one_keeps_everything(rules_per_layer):
    tables = loss_tables(0, 2, 3, [500, 1024])
    (plan,) = optimize(tables, OptimizeConfig(1.0, rules_per_layer=rules_per_layer))
    assert plan.losses == {500: 0, 1024: 0}
    assert plan.densities == {500: 1, 1024: 1, 2048: 1}
    assert (elastic_spans(plan.alpha, plan.beta, 1_000_000) == 1_000_000).all(), "at any length, not only these"


@pytest.mark.parametrize("rules_per_layer", [None, 2])
def test_the_budget_of_a_length_that_was_not_profiled_is_used(rules_per_layer):
    """A head that keeps all of 1024 tokens may do so with a constant span, which would be half of 2048."""
    tables = loss_tables(3, 8, 8, [1024])
    grid = RuleGrid((*RuleGrid.scaled(1024).rules, ElasticRule(1024.0, 0.0)))
    (plan,) = optimize(tables, OptimizeConfig(0.5, rules_per_layer=rules_per_layer, grid=grid))
    assert plan.densities[2048] > 0.49


def test_tables_without_any_loss_cost_nothing():
    (plan,) = optimize({512: np.zeros((2, 2, 7)), 1024: np.zeros((2, 2, 15))}, OptimizeConfig(0.5))
    assert plan.losses == {512: 0, 1024: 0}
    assert plan.gap == 0


def test_losses_of_any_size_give_the_same_plan():
    tables = loss_tables(4, 6, 4, [1024])
    (plan,) = optimize(tables, OptimizeConfig(0.5))
    for factor in (1e-12, 1e9):
        (scaled,) = optimize({1024: tables[1024] * factor}, OptimizeConfig(0.5))
        assert scaled.losses[1024] == pytest.approx(plan.losses[1024] * factor, rel=0.01)
        assert scaled.gap <= 0.01


def test_a_few_heads_that_outweigh_the_rest_by_far_do_not_hide_them():
    tables = loss_tables(4, 8, 4, [1024])
    tables[1024] = tables[1024] * np.where(np.arange(4) == 0, 1e6, 1.0)[:, None]
    (plan,) = optimize(tables, OptimizeConfig(0.5, ()))
    best = oracle(tables, 0.5, (1024,), RuleGrid.scaled(1024), None, 1024)
    assert plan.losses[1024] <= best * 1.01


@pytest.mark.parametrize(
    ("sink", "block", "length"), [(64, 64, 40), (64, 64, 100), (64, 64, 1000), (16, 32, 333), (0, 128, 1024)]
)
def test_any_length_sink_and_block(sink, block, length):
    tables = loss_tables(1, 2, 3, [length])
    config = OptimizeConfig(1.0 if length <= SHORTEST else 0.7, (), sink=sink, block=block)
    (plan,) = optimize(tables, config)
    spans = elastic_spans(plan.alpha, plan.beta, length, sink, block)
    assert spans.mean() / length == plan.densities[length] <= config.density
    assert spans.min() >= min(SHORTEST, length), "tables say nothing about shorter ones"
    assert plan.losses[length] == pytest.approx(loss_of(tables[length], spans, length))


def test_a_budget_below_the_cheapest_rules_names_the_nearest():
    tables = loss_tables(0, 2, 2, [320, 1024])
    with pytest.raises(InfeasibleBudgetError, match=r"0\.4000") as caught:
        optimize(tables, OptimizeConfig(0.2))
    assert caught.value.nearest == pytest.approx({320: 128 / 320, 1024: 128 / 1024, 2048: 128 / 2048})
    optimize(tables, OptimizeConfig(0.4))


def test_budgets_that_no_plan_meets_together_name_the_nearest():
    grid = RuleGrid((ElasticRule(1024.0, 0.0), ElasticRule(0.0, 0.5)))
    tables = loss_tables(0, 2, 2, [1024])
    with pytest.raises(InfeasibleBudgetError, match=r"0\.5") as caught:
        optimize(tables, OptimizeConfig(0.4, (8192,), grid=grid))
    assert set(caught.value.nearest) == {1024, 8192}
    (plan,) = optimize(tables, OptimizeConfig(max(caught.value.nearest.values()), (8192,), grid=grid))
    assert plan.densities[8192] <= 0.5


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"density": 0.0}, "density"),
        ({"density": -0.5}, "density"),
        ({"density": 1.01}, "density"),
        ({"density": float("nan")}, "density"),
        ({"rules_per_layer": 0}, "rules_per_layer 0"),
        ({"rules_per_layer": 3}, "rules_per_layer 3"),
        ({"points": 0}, "points 0"),
        ({"gap": 0.0}, "gap"),
        ({"lengths_constrained": (0,)}, "lengths_constrained"),
        ({"block": 0}, "block 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options, words):
    with pytest.raises(InputError, match=words):
        OptimizeConfig(**{"density": 0.5, **options})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tables: tables.clear(), "no loss tables"),
        (lambda tables: tables[512].__setitem__((0, 0, 0), np.nan), "512 .* not finite"),
        (lambda tables: tables[512].__setitem__((0, 0, 0), np.inf), "512 .* not finite"),
        (lambda tables: tables[512].__setitem__((1, 1, 2), -1e-3), "512 .* negative"),
        (lambda tables: tables.update({512: tables[512][..., :-1]}), r"512 has shape \(2, 2, 6\)"),
        (lambda tables: tables.update({512: tables[512][:1]}), "same layers and heads"),
        (lambda tables: tables.update({512: tables[512][0]}), "shape"),
        (lambda tables: tables.update({0: tables[512]}), "length 0"),
        (lambda tables: tables.update({512: tables[512][:0], 1024: tables[1024][:0]}), "shape"),
    ],
)
def test_damaged_tables_are_refused(change, words):
    tables = loss_tables(0, 2, 2, [512, 1024])
    change(tables)
    with pytest.raises(InputError, match=words):
        optimize(tables, OptimizeConfig(0.5))


def test_a_grid_without_rules_or_with_a_rule_that_is_no_number_is_refused():
    with pytest.raises(InputError, match="empty"):
        RuleGrid(())
    with pytest.raises(InputError, match="finite"):
        optimize(loss_tables(0, 1, 1, [512]), OptimizeConfig(0.5, grid=RuleGrid((ElasticRule(float("nan"), 0.0),))))


def test_the_papers_grid():
    rules = RuleGrid.paper().rules
    assert len(set(rules)) == 54
    assert {rule.alpha for rule in rules} == {-2048, 0, 2048, 4096, 6144, 8192}
    assert {rule.beta for rule in rules} == {0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1}


@pytest.mark.parametrize("longest", [64, 320, 1024, 8192, 131072])
def test_the_default_grid_holds_the_full_and_the_shortest_span(longest):
    rules = RuleGrid.scaled(longest).rules
    assert len(set(rules)) == len(rules) <= 400
    for length in (longest, 2 * longest):
        spans = [rule.span(length) for rule in rules]
        assert max(spans) == length
        assert min(spans) == min(32, length)
    assert ElasticRule(0.0, 1.0) in rules
    if longest >= 1024:
        short = {32, 48, 64, 96, 128, 192, 256, 384, 512}
        assert short <= {rule.alpha for rule in rules if rule.beta == 0}
        shares = {rule.span(longest // 4) for rule in rules if rule.alpha == 0 and 0 < rule.beta <= 1 / 4}
        assert {span for span in short if 32 <= span <= longest // 16} <= shares, "each of them may grow with N"


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_plans_meet_their_budgets_whatever_the_tables(data):
    layers, heads = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    lengths = data.draw(st.lists(st.integers(130, 1500), min_size=1, max_size=3, unique=True))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    kind = data.draw(st.sampled_from(["falling", "any", "sparse"]))
    tables = {}
    for length in lengths:
        table = rng.exponential(1, (layers, heads, max(1, -(-(length - 64) // 64))))
        if kind == "falling":
            table = np.flip(np.cumsum(table, axis=-1), axis=-1)
        if kind == "sparse":
            table = table * (rng.random(table.shape) < 0.2)
        tables[length] = table
    rules_per_layer = data.draw(st.sampled_from([None, 1, 2]))
    density = data.draw(st.floats(0.05, 1))
    config = OptimizeConfig(density, rules_per_layer=rules_per_layer, points=2, grid=SMALL_GRID)
    constrained = sorted({*lengths, 2 * max(lengths)})
    least = max(128 / length for length in constrained)
    if density < least:
        with pytest.raises(InfeasibleBudgetError) as caught:
            optimize(tables, config)
        assert max(caught.value.nearest.values()) == pytest.approx(least)
        return
    plans = optimize(tables, config)
    assert plans
    check_front(plans)
    for plan in plans:
        check_plan(plan, tables, config, constrained)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layers", "heads", "grid", "rules_per_layer"),
    [(32, 16, RuleGrid.paper(), 2), (32, 4, None, None)],
)
def test_a_model_of_usual_size_takes_seconds(layers, heads, grid, rules_per_layer):
    tables = loss_tables(0, layers, heads, [2048, 4096, 8192])
    config = OptimizeConfig(0.5, rules_per_layer=rules_per_layer, points=3, grid=grid)
    started = time.process_time()
    plans = optimize(tables, config)
    assert time.process_time() - started < 60, "about 5 s of work on a laptop's core"
    assert max(plan.gap for plan in plans) < 0.01
    check_front(plans)
    for plan in plans:
        check_plan(plan, tables, config, (2048, 4096, 8192, 16384))
