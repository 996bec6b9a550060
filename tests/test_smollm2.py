"""A real model (SmolLM2-135M-Instruct, float32) under plans: the tokens of the explicit mask, from fewer bytes.

With ``pytest -m gpu`` the same on an NVIDIA GPU, where the Triton kernels run.
"""

import json
import os
import subprocess
import sys

import pytest
import torch

import moa
from masked_model import masked_logits
from moa.models import chat_prompt, load_model
from tiny_models import random_plan

NEW = 16
TEXT = "The tide tables of the harbour were printed every spring, and the harbour master corrected them by hand. "


GPU = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")])


@pytest.fixture(scope="module", params=["cpu", GPU])
def model(demo_model, request):
    if request.param == "cpu":
        return demo_model.model
    return load_model("demo", "float32", request.param).model


@pytest.fixture(scope="module", params=["full", "short"])
def plan(model, request):
    return random_plan(model, seed=3, full=request.param == "full")


def prompt(demo_model, tokens, seed=0):
    """A chat prompt of exactly so many tokens."""
    ids = chat_prompt(demo_model.tokenizer, f"{seed}. " + TEXT * (tokens // 15) + " Write down what you remember.")
    return torch.tensor([[*ids[: tokens - 40], *ids[-40:]]])


def generate(model, ids, **options):
    ids = ids.to(model.device)
    return model.generate(ids, do_sample=False, max_new_tokens=NEW, min_new_tokens=NEW, **options)


def assert_greedy(model, plan, tokens, prompt_length, length=None):
    eos = model.generation_config.eos_token_id
    logits = masked_logits(model, plan, tokens, length or tokens.shape[1])[:, prompt_length - 1 : -1]
    logits[..., eos] = -torch.inf  # generation above never ends early
    assert tokens[:, prompt_length:].tolist() == logits.argmax(-1).tolist()


def test_one_prompt_whole_and_in_uneven_chunks(demo_model, model, plan):
    ids = prompt(demo_model, 500)
    with moa.apply(model, plan):
        tokens = generate(model, ids)
        assert generate(model, ids, prefill_chunk_size=173).tolist() == tokens.tolist()
    assert_greedy(model, plan, tokens, 500)


def test_a_left_padded_batch_of_three(demo_model, model, plan):
    lengths = [500, 333, 90]
    ids, mask = torch.full((3, 500), demo_model.tokenizer.pad_token_id), torch.zeros(3, 500, dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, 500 - length :] = prompt(demo_model, length, seed=row)
        mask[row, 500 - length :] = 1
    with moa.apply(model, plan):
        batch = generate(model, ids, attention_mask=mask.to(model.device))
        for row, length in enumerate(lengths):
            solo = generate(model, ids[row : row + 1, 500 - length :])
            assert batch[row, 500:].tolist() == solo[0, length:].tolist()
    assert_greedy(model, plan, batch[:1], 500)


def test_three_turns_on_one_cache(demo_model, model):
    """With constant spans every turn equals one run under the mask; growing spans: see test_runtime."""
    plan = moa.Plan.from_arrays(
        demo_model.identity,
        torch.full((30, 3), 192.0).numpy(),
        torch.zeros(30, 3).numpy(),
    )
    ids, cache, starts = prompt(demo_model, 300), moa.SpanCache(plan, 1), []
    with moa.apply(model, plan):
        for turn in range(3):
            starts.append(ids.shape[1])
            ids = generate(model, ids, past_key_values=cache)
            ids = torch.cat([ids, prompt(demo_model, 80, seed=turn).to(ids.device)], dim=1)
    for start in starts:
        assert_greedy(model, plan, ids[:, : start + NEW], start)


MEASURE = """
import contextlib, json, psutil, sys, torch, moa
from moa.models import load_model
from transformers import DynamicCache
N, CHUNK = 2048, 256
model = load_model("demo", "float32").model
plan = moa.Plan.uniform(moa.ModelIdentity.of(model.config), 0.5) if sys.argv[1] == "moa" else None
ids = torch.arange(N)[None] % 1000 + 10
resident = lambda: psutil.Process().memory_info().rss

def grow(total):
    cache = DynamicCache() if plan is None else moa.SpanCache(plan, total)
    before = most = resident()
    for start in range(0, total, CHUNK):
        model(ids[:, start:start + CHUNK], past_key_values=cache, logits_to_keep=1)
        most = max(most, resident())
    return cache, most - before

with torch.no_grad(), moa.apply(model, plan) if plan else contextlib.nullcontext():
    grow(2 * CHUNK)  # what any chunk needs is there from here on
    cache, grown = grow(N)
held = cache.nbytes() if plan else sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
print(json.dumps({"held": held, "grown": grown}))
"""


@pytest.mark.slow
def test_half_the_density_is_half_the_memory(demo_model):
    """Bytes of the cache at N = 2048, and growth of the whole process while the sequence grows to N."""
    # glibc otherwise keeps some of what a chunk has given back, now more, now less
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    measured = {}
    for method in ("dense", "moa"):
        run = subprocess.run(
            [sys.executable, "-c", MEASURE, method], capture_output=True, text=True, check=True, env=environment
        )
        measured[method] = json.loads(run.stdout)
    dense = moa.Plan.dense(demo_model.identity).kv_bytes(2048, torch.float32)
    assert measured["dense"]["held"] == dense
    assert measured["moa"]["held"] <= 0.51 * dense
    assert measured["dense"]["grown"] > 0.9 * dense, "the whole process shows what the cache takes"
    assert measured["moa"]["grown"] <= 0.55 * measured["dense"]["grown"], measured
