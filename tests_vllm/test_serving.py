"""vLLM under a plan says what `moa.apply` says, and holds the pages that the plan keeps."""

import pytest

from engine import random_prompts

LENGTHS = [1, 2, 3, 31, 32, 33, 64, 100, 200, 333, 500, 700, 1000, 1500, 2100, 3000]
NEW = 12


def round_of(prompts, tokens=NEW, **more):
    return [{"ids": ids, "tokens": tokens, **more} for ids in prompts]


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


def test_prompts_that_share_a_beginning(run_engine, plan_file, expected):
    """Also where the window of the shared part has gone on, or the sink's pages have been taken by others."""
    shared, *ends = random_prompts([900, 40, 300, 1200], seed=3)
    family = [shared + end for end in ends]
    others = random_prompts([2000, 2500], seed=4)
    rounds = [family[:1], others, family[1:], family]
    result = run_engine([round_of(each) for each in rounds], plan_file, kv_cache_memory_bytes=90 << 20)
    for given, found in zip(rounds, result["outputs"], strict=True):
        assert found == expected(given, [NEW] * len(given))
    assert result["cached_tokens"] > 0


def test_preempted_requests_say_the_same(run_engine, plan_file, expected):
    prompts = random_prompts([350] * 10, seed=5)
    result = run_engine(
        [round_of(prompts, 120)], plan_file, kv_cache_memory_bytes=40 << 20, max_model_len=512, enable_prefix_caching=False
    )
    assert result["preemptions"] > 0
    assert result["outputs"] == [expected(prompts, [120] * 10, length=512)]
    assert result["free_after"] == [result["free_before"]]


def test_three_ranks(run_engine, plan_file, prompts, expected):
    some = prompts[::3]
    result = run_engine([round_of(some)], plan_file, tensor_parallel_size=3, distributed_executor_backend="mp")
    assert result["outputs"] == [expected(some, [NEW] * len(some), ranks=3)]
