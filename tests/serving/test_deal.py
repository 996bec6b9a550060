"""Heads dealt to ranks: like spans on each, and the same model in another order."""

from pathlib import Path

import numpy as np
import pytest
import torch

from moa.plan import ModelIdentity, Plan
from moa.serving.deal import deal, dealable, dealt
from moa.serving.groups import head_groups
from tiny_models import random_ids, tiny_model

PLANS = Path(__file__).parents[2] / "benchmarks" / "results"


@pytest.mark.parametrize(("heads", "ranks"), [(8, 2), (8, 4), (8, 8), (3, 3), (2, 2)])
@pytest.mark.parametrize("seed", range(4))
def test_ranks_hold_the_same_spans(heads, ranks, seed):
    spans = np.random.default_rng(seed).choice([64, 300, 4096], (32, heads), p=[0.5, 0.3, 0.2])
    order = deal(spans, ranks)
    assert (np.sort(order, axis=1) == np.arange(heads)).all()
    shares = np.take_along_axis(spans, order, 1).reshape(len(spans), ranks, -1).transpose(1, 0, 2).reshape(ranks, -1)
    for span in (300, 4096):
        assert np.ptp((shares >= span).sum(1)) <= 1, "as many of at least this span on each rank, or one more"


@pytest.mark.parametrize("run", ["search_qwen2.5_0.5b/25", "search_qwen2.5_0.5b/50", "search_smollm2_135m/50"])
def test_plans_of_searches_cost_several_ranks_what_they_cost_one(run):
    plan = Plan.load(PLANS / run / "plan.json")
    ranks = plan.model.kv_heads
    shared, as_they_are = (head_groups(plan, 4096, ranks, deals=deals) for deals in (True, False))
    alone = head_groups(plan, 4096, most=len(shared.spans))
    assert len(alone.spans) == len(shared.spans)
    assert shared.density == pytest.approx(alone.density, abs=0.01)
    assert as_they_are.density > alone.density + 0.03


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gemma3_text", "granite"])
def test_the_model_with_dealt_weights_says_the_same(kind):
    model = tiny_model(kind, num_attention_heads=8, num_key_value_heads=4)
    assert dealable(model.config)
    rng = np.random.default_rng(0)
    order = np.stack([rng.permutation(4) for _ in range(ModelIdentity.of(model.config).layers)])
    moved = dict(dealt(model.state_dict().items(), order))
    other = tiny_model(kind, seed=1, num_attention_heads=8, num_key_value_heads=4)
    other.load_state_dict(moved)
    ids = random_ids(2, 40)
    with torch.no_grad():
        torch.testing.assert_close(other(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-4)
    assert not torch.equal(
        moved["model.layers.0.self_attn.o_proj.weight"], model.model.layers[0].self_attn.o_proj.weight
    )
    keys = torch.unflatten(model.model.layers[1].self_attn.k_proj.weight, 0, (4, -1))
    assert torch.equal(torch.unflatten(moved["model.layers.1.self_attn.k_proj.weight"], 0, (4, -1)), keys[order[1]])


@pytest.mark.parametrize(("kind", "heads"), [("phi3", 4), ("olmo2", 4), ("gpt_oss", 4), ("gpt_oss", 16)])
def test_models_with_other_weights_of_heads_are_not_dealt(kind, heads):
    """Projections in one, norms over all heads, a logit for each head (also where a head has as many dimensions)."""
    assert not dealable(tiny_model(kind, num_attention_heads=heads).config)


def test_weights_of_no_head_of_the_plan_are_left_alone():
    order = np.array([[1, 0]])
    names = ["lm_head.weight", "model.layers.0.mlp.up_proj.weight", "model.layers.1.self_attn.q_proj.weight", "7"]
    for name in names:
        ((found, tensor),) = dealt([(name, torch.arange(6))], order)
        assert found == name
        assert tensor.tolist() == list(range(6))


def test_nothing_is_dealt_to_one_rank_or_where_heads_must_stay():
    plan = Plan.load(PLANS / "search_qwen2.5_0.5b/25/plan.json")
    assert head_groups(plan, 4096, 2).dealt
    assert not head_groups(plan, 4096, 1).dealt
    assert not head_groups(plan, 4096, 2, deals=False).dealt
