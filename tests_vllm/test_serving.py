"""vLLM under a plan says what `moa.apply` says, and holds the pages that the plan keeps."""

from dataclasses import replace

import numpy as np
import pytest
from engine import random_prompts

from conftest import LENGTH
from moa.plan import Plan
from moa.serving.groups import head_groups
from moa.serving.sizing import page_bytes, request_pages

LENGTHS = [1, 2, 3, 31, 32, 33, 64, 100, 200, 333, 500, 700, 1000, 1500, 2100, 3000]
NEW = 12


def round_of(prompts, tokens=NEW):
    return [{"ids": ids, "tokens": tokens} for ids in prompts]


@pytest.fixture(scope="module")
def prompts():
    return random_prompts(LENGTHS)


@pytest.fixture(scope="module")
def answers(expected, prompts):
    found = expected(prompts, [NEW] * len(prompts))
    assert sum(map(list.__ne__, found, expected.dense(prompts, [NEW] * len(prompts)))) >= 4, "or dense would pass, too"
    return found


def test_a_batch_of_prompts_of_mixed_length(run_engine, plan_file, prompts, answers):
    result = run_engine([round_of(prompts)], plan_file, max_num_batched_tokens=4096)
    assert result["outputs"] == [answers]
    assert result["groups"] > 1
    assert not result["padding"]
    assert result["free_after"] == [result["free_before"]]


def test_chunks_of_64_tokens_and_cached_prefixes(run_engine, plan_file, prompts, answers):
    """The second round finds its prefixes in the cache, sinks and windows."""
    result = run_engine([round_of(prompts), round_of(prompts)], plan_file, max_num_batched_tokens=64, max_num_seqs=16)
    assert result["outputs"] == [answers, answers]
    assert result["cached_tokens"] > sum(LENGTHS) / 2
    assert result["free_after"] == [result["free_before"]] * 2


def test_a_sink_of_several_pages(run_engine, plan_file, expected, tmp_path):
    """It ends within its third page, and prompts end within it, behind it, and far behind it."""
    replace(Plan.load(plan_file), sink=70).save(tmp_path / "plan.json")
    prompts = random_prompts([33, 69, 71, 100, 333, 1000, 2100], seed=6)
    tokens = [NEW] * len(prompts)
    answers = expected(prompts, tokens, plan=tmp_path / "plan.json")
    assert answers != expected(prompts, tokens), "or the sink of the other plan would pass, too"
    result = run_engine([round_of(prompts), round_of(prompts)], tmp_path / "plan.json", max_num_batched_tokens=64)
    assert result["outputs"] == [answers, answers]
    assert result["cached_tokens"] > 0
    assert result["free_after"] == [result["free_before"]] * 2


def test_prompts_that_share_a_beginning(run_engine, plan_file, expected):
    """Also where the window of the shared part has gone on, or the sink's pages have been taken by others."""
    shared, *ends = random_prompts([900, 40, 300, 1200], seed=3)
    family = [shared + end for end in ends]
    others = random_prompts([2000, 2500], seed=4)
    rounds = [family[:1], others, family[1:], family]
    result = run_engine(
        [round_of(each) for each in rounds], plan_file, max_num_batched_tokens=256, kv_cache_memory_bytes=110 << 20
    )
    for given, found in zip(rounds, result["outputs"], strict=True):
        assert found == expected(given, [NEW] * len(given))
    assert result["cached_tokens"] > 0


def test_preempted_requests_say_the_same(run_engine, plan_file, expected):
    prompts = random_prompts([60] * 8, seed=5)
    result = run_engine(
        [round_of(prompts, 140)],
        plan_file,
        kv_cache_memory_bytes=20 << 20,
        max_model_len=256,
        enable_prefix_caching=False,
    )
    assert result["preemptions"] > 0
    assert result["outputs"] == [expected(prompts, [140] * 8, length=256)]
    assert result["free_after"] == [result["free_before"]]


def test_three_ranks(run_engine, plan_file, prompts, expected):
    """Each gets heads of the same spans, in another order than the model's."""
    groups = head_groups(Plan.load(plan_file), LENGTH, ranks=3)
    assert (groups.order != np.arange(3)).any()
    assert groups.density == pytest.approx(head_groups(Plan.load(plan_file), LENGTH).density, abs=0.01)
    some = prompts[::3]
    result = run_engine([round_of(some)], plan_file, tensor_parallel_size=3, distributed_executor_backend="mp")
    assert result["outputs"] == [expected(some, [NEW] * len(some), ranks=3)]


def half_plan(identity, folder, length, own=False):
    """A plan of density 0.5: full heads and short ones, of one span or each of its own; and its density as served."""
    shape = identity.layers, identity.kv_heads
    rng = np.random.default_rng(2)
    whole = rng.permutation(np.arange(np.prod(shape)) < 0.4 * np.prod(shape)).reshape(shape)
    plan = Plan.from_arrays(
        identity, np.zeros(shape), np.where(whole, 1.0, rng.uniform(0.02, 0.28, shape) if own else 0.15)
    )
    plan.save(folder / "half.json")
    assert 0.48 < plan.density(length) < 0.5
    return folder / "half.json", head_groups(plan, length).density


def test_pages_are_given_back(run_engine, dense, tmp_path):
    """One request of 4k tokens: what it holds while it decodes, next to vLLM's dense model, and by our arithmetic."""
    length, most = 4096, {}
    prompts = random_prompts([length - 20])
    plans = {"dense": None}
    for name, own in (("one span", False), ("spans of their own", True)):
        folder = tmp_path / name
        folder.mkdir()
        plans[name], most[name] = half_plan(dense.identity, folder, length, own)
    assert most["one span"] < 0.5 < most["spans of their own"], "the second is rounded up"
    held, bytes_of = {}, {}
    for name, file in plans.items():
        result = run_engine([round_of(prompts, 16)], file, max_model_len=length, max_num_batched_tokens=256)
        held[name] = result["last_used"] * result["block_bytes"]
        assert result["free_after"] == [result["free_before"]]
        groups = head_groups(Plan.dense(dense.identity) if file is None else Plan.load(file), length)
        bytes_of[name] = request_pages(groups, 32) * page_bytes(groups, 32, 4)
        if file is not None:
            assert result["concurrency"] == result["blocks"] / request_pages(groups, 32, result["in_flight"])
    assert held["one span"] < 0.55 * held["dense"]
    assert held["spans of their own"] < 0.60 * held["dense"]
    for name, bytes_held in held.items():
        assert 0.95 * bytes_of[name] < bytes_held <= bytes_of[name], name


def test_the_same_memory_holds_more_requests(run_engine, dense, tmp_path):
    length = 1024
    plan, _ = half_plan(dense.identity, tmp_path, length)
    prompts = random_prompts([length - 100] * 16)
    running = {}
    for name, rules in (("dense", None), ("moa", plan)):
        result = run_engine(
            [round_of(prompts, 80)],
            rules,
            max_model_len=length,
            max_num_batched_tokens=512,
            kv_cache_memory_bytes=280 << 20,
            enable_prefix_caching=False,
        )
        running[name] = result["most_before_preemption"]
    assert running["moa"] >= 1.7 * running["dense"]


def test_two_hundred_requests_under_load(run_engine, plan_file, expected):
    """Random lengths, arrivals and cancellations, and too little memory: nothing breaks, leaks or changes."""
    rng = np.random.default_rng(6)
    prompts = random_prompts(rng.integers(1, 600, 200).tolist(), seed=7)
    load = [
        {
            "ids": ids,
            "tokens": int(rng.integers(1, 40)),
            "arrives": int(rng.integers(0, 400)),
            "cancel_after": int(rng.integers(1, 20)) if rng.random() < 0.2 else None,
        }
        for ids in prompts
    ]
    result = run_engine(
        [load],
        plan_file,
        max_model_len=768,
        max_num_batched_tokens=512,
        max_num_seqs=24,
        kv_cache_memory_bytes=64 << 20,
    )
    assert result["free_after"] == [result["free_before"]]
    (outputs,) = result["outputs"]
    for request, output in zip(load, outputs, strict=True):
        limit = request["cancel_after"] or request["tokens"]
        assert min(limit, request["tokens"]) <= len(output) <= request["tokens"]
    sample = rng.choice(200, 12, replace=False)
    solo = expected([prompts[n] for n in sample], [len(outputs[n]) for n in sample], length=768)
    assert [outputs[n] for n in sample] == solo
