"""Plans as engines serve them: no head sees less, nothing is padded, every rank holds the same."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moa.errors import PlanError
from moa.plan import ModelIdentity, Plan
from moa.serving.groups import MOST_GROUPS, head_groups

LENGTH = 4096


def plan_of(layers, kv_heads, seed, sink=4, block=16):
    rng = np.random.default_rng(seed)
    identity = ModelIdentity("llama", layers, kv_heads, 2 * kv_heads, 64)
    beta = rng.choice([0.0, 0.1, 0.25, 1.0], (layers, kv_heads))
    return Plan.from_arrays(identity, np.where(beta == 0, rng.integers(32, 2000, beta.shape), 0), beta, sink, block)


@given(
    layers=st.integers(1, 12),
    of_rank=st.integers(1, 4),
    ranks=st.integers(1, 3),
    seed=st.integers(0, 99),
    most=st.integers(1, 10),
    deals=st.booleans(),
)
def test_every_head_sees_what_the_plan_says_or_more(layers, of_rank, ranks, seed, most, deals):
    plan = plan_of(layers, of_rank * ranks, seed)
    groups = head_groups(plan, LENGTH, ranks, most, deals)
    assert (np.sort(groups.order, axis=1) == np.arange(of_rank * ranks)).all()
    assert deals or (groups.order == np.arange(of_rank * ranks)).all()
    served = groups.plan.spans(LENGTH)
    assert (served >= plan.spans(LENGTH)).all()
    assert len(groups.spans) <= most
    assert set(served.flat) <= set(groups.spans.tolist())
    assert groups.plan.spans(LENGTH // 8).max() <= LENGTH // 8
    for rank in range(ranks):
        mine = np.s_[:, rank * of_rank : (rank + 1) * of_rank]
        places = groups.place[mine]
        assert sorted(places.flat) == list(range(layers * of_rank)), "every place once on each rank"
        heads = np.take_along_axis(served, groups.order, 1)[mine]
        assert (heads == groups.spans[places // groups.size]).all()
    assert groups.size * len(groups.spans) == layers * of_rank, "no padding"


def test_more_groups_store_no_more():
    plan = plan_of(24, 2, 1)
    densities = [head_groups(plan, LENGTH, most=most).density for most in (1, 4, 8, 48)]
    assert densities == sorted(densities, reverse=True)
    assert densities[0] == 1.0
    assert densities[-1] == pytest.approx(plan.density(LENGTH))


def test_a_few_groups_are_enough_for_plans_like_those_of_a_search():
    rng = np.random.default_rng(0)
    identity = ModelIdentity("qwen2", 24, 2, 14, 64)
    beta = np.sort(np.concatenate([np.ones(18), rng.uniform(0.02, 0.4, 30)]))
    plan = Plan.from_arrays(identity, np.zeros((24, 2)), rng.permutation(beta).reshape(24, 2))
    assert head_groups(plan, LENGTH).density < plan.density(LENGTH) + 0.02
    assert len(head_groups(plan, LENGTH).spans) <= MOST_GROUPS


def test_the_served_plan_is_a_plan(tmp_path):
    groups = head_groups(plan_of(6, 3, 2), LENGTH, ranks=3)
    groups.plan.save(tmp_path / "served.json")
    assert Plan.load(tmp_path / "served.json") == groups.plan
    assert groups.plan.provenance["served"] == {"length": LENGTH, "ranks": 3, "groups": len(groups.spans)}


def test_heads_that_ranks_cannot_share():
    with pytest.raises(PlanError, match=r"3 KV heads, which 2 tensor-parallel ranks cannot share.*divides 3"):
        head_groups(plan_of(6, 3, 2), LENGTH, ranks=2)


def test_a_digest_tells_groups_apart():
    """What is compiled for one plan must not be taken for another's."""
    plan = plan_of(6, 4, seed=0)
    others = [head_groups(plan, 8192), head_groups(plan, LENGTH, ranks=2), head_groups(plan_of(6, 4, seed=1), LENGTH)]
    digests = {groups.digest() for groups in [head_groups(plan, LENGTH), *others]}
    assert len(digests) == 4
    assert head_groups(plan_of(6, 4, seed=0), LENGTH).digest() in digests
