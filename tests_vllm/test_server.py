"""`moa serve`: the OpenAI server under a plan, and plans that cannot be served."""

import json
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import replace

import numpy as np
import openai
import pytest
from engine import random_prompts

from conftest import environment
from moa.plan import Plan

MOA = [sys.executable, "-c", "from moa.cli import main; main()"]
LENGTH = 1024


@pytest.fixture(scope="module")
def server(plan_file, tmp_path_factory):
    """A client of a running server, and its log."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log.txt"
    options = ["--dtype", "float32", "--max-model-len", str(LENGTH), "--enforce-eager", "--port", str(port)]
    options += ["--kv-cache-memory-bytes", str(256 << 20), "--max-num-batched-tokens", "64", "--max-num-seqs", "16"]
    command = [*MOA, "serve", "demo", "--plan", str(plan_file), *options]
    with log.open("w") as file:
        process = subprocess.Popen(command, env=environment(), stdout=file, stderr=subprocess.STDOUT)
    try:
        for _ in range(240):
            time.sleep(1)
            assert process.poll() is None, log.read_text()[-3000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
                break
            except OSError:
                continue
        yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none"), log
    finally:
        process.terminate()
        process.wait(60)


def test_the_server_says_what_moa_says(server, dense, expected):
    client, log = server
    prompts = random_prompts([3, 80, 400, 900])
    wanted = expected(prompts, [16] * 4, length=LENGTH)
    plain = client.completions.create(
        model="demo",
        prompt=prompts,
        max_tokens=16,
        temperature=0,
        extra_body={"min_tokens": 16, "return_token_ids": True},
    )
    assert [choice.token_ids for choice in plain.choices] == wanted
    assert "as served in" in log.read_text()


def test_streaming_logprobs_and_stop_strings(server, dense, expected):
    client, _ = server
    (ids,) = random_prompts([500], seed=8)
    (wanted,) = expected([ids], [16], length=LENGTH)
    text = dense.tokenizer.decode(wanted)
    options = {"model": "demo", "prompt": ids, "max_tokens": 16, "temperature": 0, "extra_body": {"min_tokens": 16}}
    streamed = "".join(part.choices[0].text for part in client.completions.create(**options, stream=True))
    assert streamed == text
    logged = client.completions.create(**options, logprobs=1).choices[0].logprobs
    assert len(logged.token_logprobs) == 16
    assert all(value <= 0 for value in logged.token_logprobs)
    stop = text[len(text) // 2 :][:3]
    del options["extra_body"]  # a least number of tokens would come before the stop string
    assert client.completions.create(**options, stop=[stop]).choices[0].text == text[: text.index(stop)]


def moa_serve(*arguments):
    return subprocess.run([*MOA, "serve", *arguments], env=environment(), capture_output=True, text=True, check=False)


def bad_plans(good):
    heads = (good.model.layers, good.model.kv_heads)
    other = replace(good.model, kv_heads=heads[1] + 1)
    foreign = Plan.from_arrays(other, np.ones((heads[0], heads[1] + 1)), np.zeros((heads[0], heads[1] + 1)))
    return {
        "another model": (foreign.to_dict(), "the plan is for another model"),
        "a future version": ({**good.to_dict(), "schema": 99}, "plan schema 99, this version of MoA reads schema"),
        "damaged": ({"schema": 1}, "is a damaged plan file"),
    }


@pytest.mark.parametrize("kind", ["another model", "a future version", "damaged"])
def test_a_bad_plan_stops_the_start(kind, plan_file, tmp_path, run_engine):
    data, message = bad_plans(Plan.load(plan_file))[kind]
    (tmp_path / "bad.json").write_text(json.dumps(data))
    done = moa_serve("demo", "--plan", str(tmp_path / "bad.json"))
    assert done.returncode == 1
    assert message in done.stderr.replace("\n", " ")
    assert "Traceback" not in done.stdout + done.stderr
    with pytest.raises(RuntimeError, match=message):
        run_engine([[{"ids": [5], "tokens": 1}]], tmp_path / "bad.json", max_model_len=64)


def test_ranks_that_cannot_share_the_heads(plan_file):
    done = moa_serve("demo", "--plan", str(plan_file), "--tensor-parallel-size", "2")
    assert done.returncode == 1
    assert "3 KV heads, which 2 tensor-parallel ranks cannot share" in done.stderr.replace("\n", " ")


def test_what_an_engine_cannot_do_under_a_plan_is_refused(plan_file, run_engine):
    with pytest.raises(RuntimeError, match="does not serve with a KV cache in another format"):
        run_engine([[{"ids": [5], "tokens": 1}]], plan_file, max_model_len=64, kv_cache_dtype="fp8")
