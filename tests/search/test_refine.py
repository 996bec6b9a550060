"""Refining finds what first-order tables cannot see, within the budget, the same way each time."""

from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest

from moa.plan import SINK, ModelIdentity, Plan
from moa.search import refine as stage
from moa.search.calibrate import CalibrateConfig, calibrate
from moa.search.divergence import Divergence
from moa.search.items import CalibrationItem, CalibrationSet
from moa.search.optimize import optimize
from moa.search.refine import plans_to_measure, refine, tokens_to_measure
from moa.search.rules import OptimizeConfig, RuleGrid
from moa.search.tables import window_count
from moa.search.text import default_text

IDENTITY = ModelIdentity("llama", 4, 2, 4, 16, "")
LENGTH = 2048
ITEMS = CalibrationSet(
    {(LENGTH, "retrieval"): (CalibrationItem(np.zeros(LENGTH, np.int64), np.arange(1, 2), np.arange(1, 2)),)}
)


class Loaded:
    identity = IDENTITY


@pytest.fixture
def measured(monkeypatch):
    """A model whose heads (0, 0) and (0, 1) stand in for each other: without either one all is lost."""
    plans = []

    class Known:
        def __init__(self, loaded, items, weights):
            assert weights == {"retrieval": 1.0}

        def around(self, plan):
            pass

        def by_source(self, plan):
            plans.append(plan)
            reach = plan.spans(LENGTH) / LENGTH
            return {"retrieval": 10 * (1 - reach[0].max()) + float((1 - reach[1:]).sum()) * 0.1}

        def total(self, by_source):
            return by_source["retrieval"]

    monkeypatch.setattr(stage, "Divergence", Known)
    return plans


def tables():
    """What first order sees of that model: the other heads."""
    table = np.linspace(1, 0, window_count(LENGTH))[None, None] * np.full((4, 2, 1), 1.0)
    table[0] *= 0.01
    return {LENGTH: table}


def refined(density=0.3, evaluations=400, partial=None, **config):
    config = OptimizeConfig(density, points=1, **config)
    starts = [plan_of(found) for found in optimize(tables(), config)]
    return refine(Loaded(), starts, ITEMS, {"retrieval": 1.0}, config, evaluations, partial=partial)


def plan_of(found):
    """Of the optimizer's answer, or of what refine found."""
    return found.plan if isinstance(found, stage.Refined) else Plan.from_arrays(IDENTITY, found.alpha, found.beta)


@pytest.mark.parametrize("evaluations", [100, 400])
def test_it_finds_heads_that_stand_in_for_each_other(measured, evaluations):
    start, *_, found = refined(evaluations=evaluations)
    assert start.loss > 5, "first order leaves both heads short"
    assert found.loss < 1.5
    spans = plan_of(found).spans(LENGTH)
    assert spans[0].max() == LENGTH, "one of the two does for both"
    assert 0.3 * LENGTH / 8 <= spans.min() == spans[0].min() <= LENGTH // 16
    assert all(plan_of(found).density(length) <= 0.3 for length in (LENGTH, 2 * LENGTH))
    assert found.evaluations <= len(measured) <= evaluations + 30


def test_plans_get_better_and_are_the_same_each_time(measured):
    for density in (0.1, 0.5, 0.75, 1.0):
        found, again = refined(density), refined(density)
        losses = [plan.loss for plan in found]
        assert losses == sorted(losses, reverse=True)
        assert [plan_of(plan) for plan in found] == [plan_of(plan) for plan in again]
        assert all(plan_of(plan).density(LENGTH) <= density for plan in found)


def test_the_density_holds_at_a_shorter_length_too(measured):
    found = refined(0.3, lengths_constrained=(1024, 4096))
    assert len(found) > 1
    assert all(plan_of(plan).density(length) <= 0.3 for plan in found for length in (1024, LENGTH, 4096))


def test_an_interrupted_call_goes_on(measured, tmp_path, monkeypatch):
    whole = refined()
    count = len(measured)
    real = stage.Divergence.by_source

    def interrupted(self, plan):
        if len(measured) == count + 60:
            raise KeyboardInterrupt
        return real(self, plan)

    monkeypatch.setattr(stage.Divergence, "by_source", interrupted)
    with pytest.raises(KeyboardInterrupt):
        refined(partial=tmp_path / "measured.json")
    monkeypatch.setattr(stage.Divergence, "by_source", real)
    again = refined(partial=tmp_path / "measured.json")
    assert [plan_of(plan) for plan in again] == [plan_of(plan) for plan in whole]
    assert len(measured) < 2 * count + 40, "what was measured was not measured again"


@pytest.mark.parametrize("density", [0.3, 0.45])
def test_what_is_left_of_the_budget_is_given_away(measured, density):
    """No head could see more at some length and as much at the others."""
    *_, found = refined(density)
    space = stage._Space.of([LENGTH], OptimizeConfig(density, points=1, sink=found.plan.sink))
    numbers, spans = space.numbers(found.plan), space.budget.spans
    assert space.budget.fits(numbers)
    for head in np.ndindex(numbers.shape):
        own = spans[:, numbers[head]]
        for rule in space.tried:
            if (spans[:, rule] >= own).all() and (spans[:, rule] > own).any():
                longer = numbers.copy()
                longer[head] = rule
                assert not space.budget.fits(longer), f"head {head} could have rule {rule}"


@pytest.mark.parametrize("limit", [1, 2])
def test_layers_keep_to_their_number_of_rules(measured, limit):
    *_, found = refined(0.5, rules_per_layer=limit)
    assert all(
        len(set(zip(*rules, strict=True))) <= limit for rules in zip(found.plan.alpha, found.plan.beta, strict=True)
    )


def least_at(sink, monkeypatch):
    """The loss is higher by what the sink of a plan is away from this one; other than that as before."""
    real = stage.Divergence.by_source

    def by_source(self, plan):
        found = real(self, plan)
        return {"retrieval": found["retrieval"] + abs(plan.sink - sink) / 1000}

    monkeypatch.setattr(stage.Divergence, "by_source", by_source)


@pytest.mark.parametrize("sink", stage.SINKS)
def test_the_sink_is_the_one_that_loses_least_at_the_same_spans(measured, monkeypatch, sink):
    own = optimize(tables(), OptimizeConfig(0.8, points=1))
    least_at(sink, monkeypatch)
    found = refined(0.8)
    assert len(found) > len(own)
    assert all(refined.plan.sink == sink for refined in found)
    for first, refined_from in zip(own, found, strict=False):
        for length in (LENGTH, 2 * LENGTH):
            np.testing.assert_array_equal(refined_from.plan.spans(length), plan_of(first).spans(length))
    assert all(refined.plan.density(length) <= 0.8 for refined in found for length in (LENGTH, 2 * LENGTH))


def test_the_sink_is_chosen_again_after_the_descent(measured, monkeypatch):
    """A first plan that is best with the sink it has, and others that are not."""
    real, first = stage.Divergence.by_source, []

    def by_source(self, plan):
        first.append(first[0] if first else plan.spans(LENGTH))
        best = SINK if np.array_equal(plan.spans(LENGTH), first[0]) else 32
        return {"retrieval": real(self, plan)["retrieval"] + abs(plan.sink - best) / 1000}

    monkeypatch.setattr(stage.Divergence, "by_source", by_source)
    start, descended, again, *_ = refined(0.5)
    assert (start.plan.sink, descended.plan.sink, again.plan.sink) == (SINK, SINK, 32)
    np.testing.assert_array_equal(again.plan.spans(LENGTH), descended.plan.spans(LENGTH))


@pytest.mark.parametrize(("density", "most"), [(0.9, 64), (0.5, 32), (0.25, 16), (0.1, SINK)])
def test_the_shortest_heads_keep_a_window_three_times_as_long(measured, monkeypatch, density, most):
    least_at(64, monkeypatch)
    *_, found = refined(density)
    assert found.plan.sink == most
    assert found.plan.spans(LENGTH).min() >= 4 * most


def test_no_sink_makes_a_head_longer(measured, monkeypatch):
    least_at(64, monkeypatch)
    alpha, beta = np.zeros((4, 2)), np.full((4, 2), 0.5)
    alpha[1, 0], beta[1, 0] = 32, 0
    own = Plan.from_arrays(IDENTITY, alpha, beta)
    start = refine(Loaded(), [own], ITEMS, {"retrieval": 1.0}, OptimizeConfig(0.9, points=1), 8)[0].plan
    assert start.sink == 16, "with 32 the shortest span would be 48 tokens"
    np.testing.assert_array_equal(start.spans(LENGTH), own.spans(LENGTH))


def test_heads_take_rules_of_the_grid(measured):
    *_, found = refined(0.6, grid=RuleGrid.binary())
    rules = np.stack([found.plan.alpha, found.plan.beta], axis=-1).reshape(-1, 2)
    assert set(map(tuple, rules.tolist())) == {
        (260.0, 0.0),
        (0.0, 1.0),
    }


def test_from_half_on_fewer_plans_are_measured_on_more_items(measured, monkeypatch):
    """As many tokens in all."""
    counts, known = [], stage.Divergence

    def watched(loaded, items, weights):
        counts.append({source: len(members) for (_, source), members in items.items.items()})
        return known(loaded, items, weights)

    monkeypatch.setattr(stage, "Divergence", watched)
    members = 60 * ITEMS.items[LENGTH, "retrieval"]
    items = CalibrationSet({(LENGTH, source): members for source in ("retrieval", "text")})
    plan = Plan.from_arrays(IDENTITY, np.zeros((4, 2)), np.full((4, 2), 0.25))
    for density in (0.49, 0.5, 0.75):
        refine(Loaded(), [plan], items, {"retrieval": 1.0}, OptimizeConfig(density, points=1), 8)
    few, *many = counts
    assert few == {
        source: tokens // LENGTH for source, tokens in tokens_to_measure(0.49).items() if source != "summary"
    }
    assert many == [{source: 2 * count for source, count in few.items()}] * 2
    for heads in (48, 256):
        few_plans, *more = (plans_to_measure(heads, density) for density in (0.5, 0.49, 0.125))
        assert more == [2 * few_plans] * 2


def test_the_optimizer_alone_would_not_do(measured):
    """The trap is real: no plan of first order reaches what was measured."""
    plans = optimize(tables(), OptimizeConfig(0.3, points=1))
    assert all(plan_of(plan).spans(LENGTH)[0].max() < LENGTH for plan in plans)


@pytest.fixture(scope="module")
def divergence(demo_model):
    items = calibrate(demo_model, default_text().text, CalibrateConfig((320,), 2))
    return Divergence(demo_model, items, {"retrieval": 1.0, "text": 0.5}), items


@pytest.mark.slow
def test_divergence_is_none_for_dense_and_the_weights_for_the_shortest_spans(divergence, demo_model):
    measure, _ = divergence
    dense = measure.by_source(Plan.dense(demo_model.identity))
    assert set(dense) == {"retrieval", "text"}
    assert all(abs(loss) < 1e-4 for loss in dense.values())
    shape = (demo_model.identity.layers, demo_model.identity.kv_heads)
    shortest = measure.by_source(Plan.from_arrays(demo_model.identity, np.full(shape, 128.0), np.zeros(shape)))
    assert min(shortest.values()) > 0.01
    assert measure.total(shortest) == pytest.approx(1.5)


@pytest.mark.slow
def test_divergence_is_the_mean_over_items_of_one_by_one(divergence, demo_model):
    """Of a text over its tokens; of retrieval over its questions, the first as much as the others together."""
    import torch

    from moa.evaluation.likelihood import answer_log_probs
    from moa.runtime import apply

    measure, items = divergence
    plan = Plan.uniform(demo_model.identity, 0.6)
    losses = {"retrieval": [], "text": []}
    for (_, source), members in items.items.items():
        for item in members:
            told = replace(item, answer=item.loss)
            dense = answer_log_probs(demo_model.model, told)
            with apply(demo_model.model, plan):
                other = answer_log_probs(demo_model.model, told)
            nats = torch.nn.functional.kl_div(other, dense, log_target=True, reduction="none").sum(-1)
            if source == "retrieval":
                questions = defaultdict(float)
                for rank, (place, number) in enumerate(zip(item.loss, nats.tolist(), strict=True)):
                    questions[place - rank] += number  # neighbours in the text have the same difference
                first, *others = (1 - np.exp(-total) for total in questions.values())
                losses[source].append((first + sum(others) / len(others)) / 2 if others else first)
            else:
                losses[source].append(float(nats.mean()))
    found = measure.by_source(plan)
    for source, expected in losses.items():
        assert found[source] == pytest.approx(np.mean(expected), rel=1e-3)
