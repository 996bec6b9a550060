"""Passes that begin in the middle give what whole passes give, and leave out what they can."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from moa.plan import ModelIdentity, Plan
from moa.search import layer_outputs
from moa.search.divergence import Divergence
from moa.search.items import CalibrationItem, CalibrationSet
from moa.search.layer_outputs import LayerOutputs
from tiny_models import EXTRA, random_ids, random_plan, tiny_model

LAYERS = 4
WEIGHTS = {"retrieval": 1.0, "text": 0.5}


def divergence_of(model):
    loaded = SimpleNamespace(model=model, identity=ModelIdentity.of(model.config))
    answer = np.arange(290, 300)
    cells = {(length, source): 3 for length in (300, 400) for source in WEIGHTS}
    items = {
        key: tuple(
            CalibrationItem(ids, answer, answer) for ids in random_ids(count, key[0], seed=len(key[1]) + key[0]).numpy()
        )
        for key, count in cells.items()
    }
    return Divergence(loaded, CalibrationSet(items), WEIGHTS)


def neighbours(plan):
    """The plan with one layer changed, for every layer, from the last to the first."""
    alpha, beta = np.array(plan.alpha), np.array(plan.beta)
    for layer in reversed(range(len(alpha))):
        other = alpha.copy(), beta.copy()
        other[0][layer], other[1][layer] = 48, 0
        yield Plan.from_arrays(plan.model, *other, plan.sink, plan.block)


@pytest.mark.parametrize("model_type", [*EXTRA])
def test_measured_around_a_plan_is_as_measured_alone(model_type):
    model = tiny_model(model_type, num_hidden_layers=LAYERS)
    plan = random_plan(model, sink=4, block=16)
    plans = [*neighbours(plan), plan, replace(plan, sink=20), Plan.dense(plan.model)]
    measure = divergence_of(model)
    alone = [measure.by_source(other) for other in plans]
    assert len({str(losses) for losses in alone}) == len(plans), "each layer matters, or the test could not fail"
    measure.around(plan)
    for other, losses in zip(plans, alone, strict=True):
        assert measure.by_source(other) == pytest.approx(losses, rel=1e-3, abs=1e-6)
    measure.around(plans[0])
    assert measure.by_source(plans[1]) == pytest.approx(alone[1], rel=1e-3, abs=1e-6)


def passes(model, run):
    """How many times each layer's attention ran meanwhile."""
    counts = [0] * LAYERS

    def counter(layer):
        def count(*args):
            counts[layer] += 1

        return count

    hooks = [layer.self_attn.register_forward_hook(counter(i)) for i, layer in enumerate(model.model.layers)]
    run()
    for hook in hooks:
        hook.remove()
    return counts


@pytest.mark.parametrize(("held", "skipped"), [(None, [0, 1, 2, 3]), (2, [0, 0, 2, 2])])
def test_shared_layers_are_left_out(monkeypatch, held, skipped):
    model = tiny_model(num_hidden_layers=LAYERS)
    if held is not None:  # as many layers fit
        monkeypatch.setattr(layer_outputs, "_MOST_BYTES", held * 4 * 3 * 700 * 64 * 2)
    plan = random_plan(model)
    measure = divergence_of(model)
    whole = passes(model, lambda: measure.by_source(plan))[0]
    measure.around(plan)
    measure.by_source(plan)
    for layer, other in zip(reversed(range(LAYERS)), neighbours(plan), strict=True):
        counts = passes(model, lambda other=other: measure.by_source(other))
        assert counts == [0] * skipped[layer] + [whole] * (LAYERS - skipped[layer])
    measure.forget()
    assert passes(model, lambda: measure.by_source(plan)) == [whole] * LAYERS
    assert all("forward" not in layer.__dict__ for layer in model.model.layers)


def test_layers_that_hand_on_more_than_their_output_all_run():
    """A model whose last layer reads what the first one left elsewhere."""
    model = tiny_model(num_hidden_layers=LAYERS)
    left = []
    first, last = model.model.layers[0], model.model.layers[-1]
    first.mlp.register_forward_hook(lambda module, args, output: left.append(output))
    last.mlp.register_forward_hook(lambda module, args, output: output + left.pop() if left else output)
    plan = random_plan(model)
    measure = divergence_of(model)
    alone = [measure.by_source(other) for other in neighbours(plan)]
    measure.around(plan)
    for other, losses in zip(neighbours(plan), alone, strict=True):
        assert measure.by_source(other) == pytest.approx(losses, rel=1e-3)


def test_a_forward_of_somebody_else_is_put_back():
    model = tiny_model(num_hidden_layers=LAYERS)
    calls = []
    own = model.model.layers[0].forward

    def counted(*args, **kwargs):
        calls.append(1)
        return own(*args, **kwargs)

    model.model.layers[0].forward = counted
    ids = random_ids(1, 50)
    outputs = LayerOutputs(model, 50)
    with torch.no_grad():
        whole = outputs.keep("a", lambda: model(ids).logits)
        assert len(calls) == 1
        assert torch.equal(outputs.resume("a", 3, lambda: model(ids).logits), whole)
    assert len(calls) == 1
    assert model.model.layers[0].forward is counted
