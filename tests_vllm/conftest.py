"""The demo model, a plan for it, and what `moa.apply` says under that plan."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import moa
from moa.models import load_model, locate
from moa.plan import Plan
from moa.progress import SILENT
from moa.serving.groups import head_groups
from moa.serving.launch import ARCHITECTURE

LENGTH = 3328  # the longest sequence, prompt and answer


@pytest.fixture(scope="session")
def folder():
    return locate("demo", SILENT)


@pytest.fixture(scope="session")
def dense():
    return load_model("demo", "float32", "cpu")


@pytest.fixture(scope="session")
def plan_file(dense, tmp_path_factory):
    """A plan like those of a search: a third of the heads see all, the others a little, each its own share."""
    rng = np.random.default_rng(1)
    shape = dense.identity.layers, dense.identity.kv_heads
    beta = np.where(rng.random(shape) < 0.3, 1.0, rng.uniform(0.01, 0.2, shape))
    file = tmp_path_factory.mktemp("plan") / "plan.json"
    Plan.from_arrays(dense.identity, np.zeros(shape), beta).save(file)
    return file


@pytest.fixture(scope="session")
def expected(dense, plan_file):
    """Greedy tokens of `moa.apply` and `generate`, and of the dense model: functions of prompts and counts."""

    def under(plan, prompts, tokens):
        found = []
        for ids, count in zip(prompts, tokens, strict=True):
            batch = torch.tensor([ids])
            options = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False}
            with moa.apply(dense.model, plan):
                output = dense.model.generate(input_ids=batch, attention_mask=torch.ones_like(batch), **options)
            found.append(output[0, len(ids) :].tolist())
        return found

    def answer(prompts, tokens, ranks=1, length=LENGTH, plan=plan_file):
        return under(head_groups(Plan.load(plan), length, ranks).plan, prompts, tokens)

    answer.dense = lambda prompts, tokens: under(Plan.dense(dense.identity), prompts, tokens)
    return answer


@pytest.fixture
def run_engine(folder, tmp_path):
    """Runs `engine.py`; ``plan`` None is vLLM's own dense model."""

    def run(rounds, plan, **options):
        if plan is not None:
            options["hf_overrides"] = {"architectures": [ARCHITECTURE], "moa_plan": str(plan)}
        options = {"model": folder, "max_model_len": LENGTH, "block_size": 32, **options}
        options.setdefault("kv_cache_memory_bytes", 1 << 30)
        (tmp_path / "job.json").write_text(json.dumps({"options": options, "rounds": rounds}))
        command = [sys.executable, Path(__file__).with_name("engine.py"), "job.json", "result.json"]
        done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(done.stdout[-3000:] + done.stderr[-3000:])
        return json.loads((tmp_path / "result.json").read_text())

    return run


def environment():
    # "nobind": vLLM would give every rank cores of its own, and there may be fewer
    return {
        **os.environ,
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "INFO",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2"),
    }
