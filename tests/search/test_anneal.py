"""Annealing finds what heads need together, in budget, the same way each time, and goes on after an interrupt."""

import numpy as np
import pytest
import torch

from moa.errors import UnsupportedModelError
from moa.plan import ModelIdentity
from moa.search import anneal as stage
from moa.search.anneal import anneal, palette, probabilities
from moa.search.exchange import Budget
from moa.search.items import CalibrationItem, CalibrationSet
from moa.search.optimize import OptimizeConfig, RuleGrid, Rules
from moa.search.tables import window_count
from tiny_models import tiny_model

LENGTHS = (2048, 8192)


def budget(density, lengths=LENGTHS, **config):
    config = OptimizeConfig(density, **config)
    return Budget(Rules.within(lengths, config), config)


@pytest.mark.parametrize("density", [0.1, 0.25, 0.75])
def test_the_palette_has_all_and_no_head_below_an_eighth_of_the_mean(density):
    some = palette(budget(density))
    shares = some.spans / np.array(list(some.rules.spans))[:, None]
    assert (shares[:, -1] == 1).all()
    assert shares[0].min() >= density / 8
    assert 8 <= shares.shape[1] <= 60
    assert (some.rules.beta > 1).any() == (density == 0.1), "rules that switch on are short below"
    for kind in (some.rules.alpha == 0, some.rules.beta == 0):
        spans = np.sort(some.spans[-1, kind])
        spans = spans[spans < 2 * LENGTHS[-1]]
        assert (spans[1:] >= stage._APART * spans[:-1]).all()


def test_the_palette_of_two_rules_is_both():
    assert palette(budget(0.5, grid=RuleGrid.binary())).rules.alpha.tolist() == [260.0, 0.0]


@pytest.mark.parametrize("density", [0.125, 0.5, 1.0])
def test_distributions_meet_the_density_and_sharpen_as_it_gets_colder(density):
    some = palette(budget(density))
    shares = some.spans / np.array(list(some.rules.spans))[:, None]
    cost = np.random.default_rng(0).uniform(0, 1, (6, 2, 1)) * (1 - shares.mean(0))
    price, entropies = np.zeros(len(shares)), []
    for temperature in (1.0, 0.1, 0.01):
        heads = probabilities(cost, some, temperature, price)
        np.testing.assert_allclose(heads.sum(-1), 1)
        mean = heads.reshape(12, -1).mean(0) @ shares.T
        assert (mean <= density + 1e-3).all()
        assert mean.max() >= density - 0.02, "what is there is used"
        entropies.append(-(heads * np.log(heads + 1e-300)).sum(-1).mean())
    if density < 1:
        assert entropies[0] > entropies[1] > entropies[2]
    order = cost[..., 0].argsort(axis=None)
    assert heads[..., -1].flat[order[-1]] >= heads[..., -1].flat[order[0]], "who loses most sees most"


LENGTH = 320


class Loaded:
    def __init__(self, model):
        self.model, self.identity, self.name = model, ModelIdentity.of(model.config), "tiny"


@pytest.fixture(scope="module")
def loaded():
    return Loaded(tiny_model("llama", num_hidden_layers=2))


def item(seed, loss):
    ids = np.random.default_rng(seed).integers(3, 199, LENGTH)
    return CalibrationItem(ids, np.asarray(loss), np.asarray(loss))


def items(count=3):
    """Texts, and questions of one token and of two."""
    return CalibrationSet(
        {
            (LENGTH, "retrieval"): tuple(item(seed, [300, 310, 311]) for seed in range(count)),
            (LENGTH, "text"): tuple(item(10 + seed, range(290, 320)) for seed in range(count)),
        }
    )


SCALES = {"retrieval": 1.0, "text": 2.0}
TABLES = {LENGTH: np.ones((2, 2, window_count(LENGTH))) * np.linspace(1, 0, window_count(LENGTH))}


def annealed(loaded, density=0.4, steps=12, some=None, **options):
    config = OptimizeConfig(density, lengths_constrained=(2 * LENGTH,))
    return anneal(loaded, some or items(), TABLES, SCALES, config, steps, **options)


def test_a_plan_is_within_the_budget_and_the_same_each_time(loaded):
    plan, again = annealed(loaded), annealed(loaded)
    assert plan == again
    assert all(plan.density(length) <= 0.4 for length in (LENGTH, 2 * LENGTH))
    assert len(set(plan.spans(LENGTH).ravel().tolist())) > 1


def test_slopes_are_those_of_the_loss(loaded):
    """By differences: a little more of a rule, a little less of all of the text."""
    some = palette(budget(0.4, (LENGTH,)))
    slopes = stage._Slopes(loaded, items(2), some, SCALES)
    rules = some.spans.shape[1]
    heads = np.full((2, 2, rules), 1 / rules)
    from moa.search.differentiable import differentiable

    def loss(heads):
        spans, place = np.unique(np.minimum(some.rules.spans[LENGTH], LENGTH), return_inverse=True)
        weights = torch.as_tensor(heads @ np.eye(len(spans))[place]).requires_grad_()
        return sum(
            float(slopes.loss(list(members), source, weights, spans.tolist()))
            for (_, source), members in items(2).items.items()
        )

    loaded.model.double()
    try:
        with differentiable(loaded.model):
            found = slopes(LENGTH, 0, heads)
            for place in ((0, 0, 0), (1, 1, rules // 2)):
                more, less = heads.copy(), heads.copy()
                for changed, sign in ((more, 1), (less, -1)):
                    changed[place] += sign * 2e-2
                    changed[(*place[:2], -1)] -= sign * 2e-2
                assert found[place] == pytest.approx((loss(more) - loss(less)) / 4e-2, rel=1e-2)
    finally:
        loaded.model.float()
    assert (found[..., -1] == 0).all()


def test_the_dense_model_loses_nothing(loaded):
    from moa.search.differentiable import differentiable

    slopes = stage._Slopes(loaded, items(1), palette(budget(0.4, (LENGTH,))), SCALES)
    weights = torch.tensor([0.0, 1.0]).repeat(2, 2, 1).requires_grad_()
    with differentiable(loaded.model):
        for (_, source), members in items(1).items.items():
            assert abs(slopes.loss(list(members), source, weights, [64, LENGTH])) < 1e-4


@pytest.mark.parametrize("model_type", ["gemma2", "gpt_oss", "mistral"])
def test_certain_heads_are_those_of_a_plan(model_type):
    """Several items at once, with soft caps, learned sinks and windows of the model's own."""
    from moa.evaluation.likelihood import logits_at
    from moa.plan import Plan
    from moa.runtime import apply
    from moa.search.blended_attention import blended_attention
    from moa.search.differentiable import attending, differentiable

    some = Loaded(tiny_model(model_type))
    spans = [32, 128, LENGTH]
    choice = np.random.default_rng(2).integers(0, 3, (some.identity.layers, some.identity.kv_heads))
    weights = torch.tensor(np.eye(3)[choice], dtype=torch.float32)
    ids = torch.as_tensor(np.stack([item(seed, [1]).input_ids for seed in range(3)]))
    positions = torch.arange(200, LENGTH, 17)

    def attend(query, key, value, options, layer):
        return blended_attention(query, key, value, weights[layer].repeat(3, 1), spans, 4, options)

    with differentiable(some.model), attending(some, attend):
        blended = logits_at(some.model, ids, positions, use_cache=False).detach()
    plan = Plan.from_arrays(some.identity, np.array(spans, float)[choice], 0.0 * choice)
    with torch.no_grad(), apply(some.model, plan):
        planned = logits_at(some.model, ids, positions, use_cache=False)
    torch.testing.assert_close(blended, planned, rtol=1e-4, atol=1e-4)


def test_what_overflows_is_refused(loaded, tmp_path, monkeypatch):
    monkeypatch.setattr(stage._Slopes, "__call__", lambda *arguments: np.full(1, np.nan))
    with pytest.raises(UnsupportedModelError, match="overflows"):
        annealed(loaded, partial=tmp_path / "state.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_head_that_matters_keeps_more(loaded):
    """A model in which one KV head alone can pass anything on: that head sees the most."""
    model = tiny_model("llama", seed=1, num_hidden_layers=2)
    with torch.no_grad():
        for number, layer in enumerate(model.model.layers):
            columns = layer.self_attn.o_proj.weight  # [hidden, query heads * 16], two query heads a KV head
            keep = columns[:, 32:].clone() * 4
            columns.zero_()
            if number == 1:
                columns[:, 32:] = keep
    plan = annealed(Loaded(model), density=0.3, steps=40)
    spans = plan.spans(LENGTH)
    assert spans[1, 1] == spans.max() > 2 * spans[0].max()


def test_an_interrupted_call_goes_on(loaded, tmp_path, monkeypatch):
    whole = annealed(loaded, steps=24)
    real, count = stage._Slopes.__call__, []

    def interrupted(self, *arguments):
        count.append(arguments)
        if len(count) == 15:
            raise KeyboardInterrupt
        return real(self, *arguments)

    monkeypatch.setattr(stage._Slopes, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        annealed(loaded, steps=24, partial=tmp_path / "state.safetensors")
    assert annealed(loaded, steps=24, partial=tmp_path / "state.safetensors") == whole
    assert len(count) == 15 + 24 - 10, "it went on from the tenth step"
    assert not loaded.model.training


def test_where_the_palette_has_no_room_there_is_no_plan(loaded):
    config = OptimizeConfig(0.5, grid=RuleGrid.binary(window=300), rules_per_layer=1)
    assert anneal(loaded, items(1), TABLES, SCALES, config, 1) is None
