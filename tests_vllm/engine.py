"""One vLLM engine in a process of its own: reads a job from a file, writes what came out, and vLLM's own counters.

python engine.py job.json result.json
"""

import json
import os
import sys
from pathlib import Path

import numpy as np
import torch

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the scheduler's counters are read from here


def main(job_file, result_file):
    job = json.loads(Path(job_file).read_text())
    from vllm import LLM

    eager = not torch.cuda.is_available()  # on a GPU steps are compiled and recorded
    llm = LLM(**job["options"], enforce_eager=eager, dtype="float32", seed=0, disable_log_stats=True)
    engine = llm.llm_engine
    scheduler = engine.engine_core.engine_core.scheduler
    result = counters(scheduler, engine.vllm_config)
    for round_ in job["rounds"]:
        result["outputs"].append(serve(engine, scheduler, round_, result))
        result["free_after"].append(scheduler.kv_cache_manager.block_pool.get_num_free_blocks())
    Path(result_file).write_text(json.dumps(result))


def counters(scheduler, engine_config):
    """What the engine starts with."""
    from vllm.v1.core.kv_cache_utils import get_max_concurrency_for_kv_cache_config

    config = scheduler.kv_cache_config
    sizes = [tensor.size for tensor in config.kv_cache_tensors]
    if hasattr(engine_config, "max_in_flight_tokens"):
        in_flight = engine_config.max_in_flight_tokens
        memory = max(sizes)  # which the groups share
    else:  # vLLM 0.23
        in_flight = engine_config.scheduler_config.max_num_batched_tokens
        memory = sum(sizes)  # of each layer of a group
    return {
        "blocks": config.num_blocks,
        "in_flight": in_flight,
        "concurrency": get_max_concurrency_for_kv_cache_config(engine_config, config),  # printed at the start
        "block_bytes": memory / config.num_blocks,
        "groups": len(config.kv_cache_groups),
        "padding": len({len(group.layer_names) for group in config.kv_cache_groups}) > 1,
        "free_before": scheduler.kv_cache_manager.block_pool.get_num_free_blocks(),
        "free_after": [],
        "outputs": [],
        "last_used": 0,  # blocks, by all requests together, before the last step
        "most_before_preemption": 0,  # requests that ran together
        "preemptions": 0,
        "cached_tokens": 0,
    }


def serve(engine, scheduler, prompts, result):
    """Run prompts, each ``{"ids", "tokens", "cancel_after", "arrives"}``: steps of the engine; the tokens of each."""
    from vllm import SamplingParams

    waiting = sorted(range(len(prompts)), key=lambda number: prompts[number].get("arrives", 0))
    tokens = {number: [] for number in waiting}
    steps = 0
    pool = scheduler.kv_cache_manager.block_pool
    while waiting or engine.has_unfinished_requests():
        while waiting and prompts[waiting[0]].get("arrives", 0) <= steps:
            number = waiting.pop(0)
            tokens_wanted = prompts[number]["tokens"]
            # no end before the last token, as generate's min_new_tokens has it
            params = SamplingParams(temperature=0, max_tokens=tokens_wanted, min_tokens=tokens_wanted)
            engine.add_request(str(number), {"prompt_token_ids": prompts[number]["ids"]}, params)
        result["last_used"] = result["blocks"] - 1 - pool.get_num_free_blocks()
        for output in engine.step():
            number = int(output.request_id)
            tokens[number] = list(output.outputs[0].token_ids)
            result["cached_tokens"] += (output.num_cached_tokens or 0) if output.finished else 0
            limit = prompts[number].get("cancel_after")
            if limit is not None and len(tokens[number]) >= limit and not output.finished:
                engine.abort_request([str(number)])
        steps += 1
        preempted = sum(request.num_preemptions for request in scheduler.requests.values())
        result["preemptions"] = max(result["preemptions"], preempted)
        if not result["preemptions"]:
            result["most_before_preemption"] = max(result["most_before_preemption"], len(scheduler.running))
    return [tokens[number] for number in sorted(tokens)]


def random_prompts(lengths, seed=0, vocabulary=40_000):
    """Token ids, as many as the lengths say."""
    rng = np.random.default_rng(seed)
    return [rng.integers(100, vocabulary, length).tolist() for length in lengths]


if __name__ == "__main__":
    main(*sys.argv[1:])
