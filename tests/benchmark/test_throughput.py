"""Throughput: every method decodes the same way, and a row says what was stored."""

import json
from dataclasses import fields

import numpy as np
import pytest
import torch

from moa.benchmark import decoding, throughput
from moa.benchmark.decoding import DENSE_DYNAMIC, DENSE_STATIC, ROUNDS, Method, decode_in_turn
from moa.benchmark.shapes import random_model
from moa.benchmark.throughput import Row, bench_throughput, ladder, to_markdown, typical_plan
from moa.cli import main
from moa.errors import InputError
from moa.models import LoadedModel
from moa.plan import ModelIdentity, Plan
from tiny_models import tiny_model

LENGTH, STEPS = 640, 2


@pytest.fixture(scope="module")
def loaded():
    model = tiny_model("llama")
    return LoadedModel(model, None, "tiny", ModelIdentity.of(model.config), 1024)


@pytest.mark.parametrize(
    ("shape", "billions"),
    [("llama-7b", 6.74), ("llama-13b", 13.02), ("llama3-8b", 8.03), ("llama3-70b", 70.55), ("qwen2.5-7b", 7.62)],
)
def test_shapes_have_the_sizes_of_their_models(shape, billions):
    loaded = random_model(shape, torch.device("meta"))
    assert sum(weights.numel() for weights in loaded.model.parameters()) / 1e9 == pytest.approx(billions, abs=0.01)


@pytest.mark.parametrize("compiles", [False, True])
def test_plans_compile_where_it_is_asked_for_only(loaded, compiles, monkeypatch):
    """`moa eval`, which times a few steps, does not ask, though one plan may be all that it times."""
    real, asked = decoding.apply, []

    def spy(model, plan, backend, *, compile):
        asked.append(compile)
        return real(model, plan, backend, compile=compile)

    monkeypatch.setattr(decoding, "apply", spy)
    options = {"compiles": True} if compiles else {}
    decode_in_turn(loaded, [Method("half", typical_plan(loaded.identity, 0.5))], LENGTH, 1, STEPS, **options)
    assert set(asked) == {compiles}


@pytest.mark.parametrize("density", [0.125, 0.25, 0.5, 0.75, 1.0])
def test_a_typical_plan_has_its_density_from_a_few_heads_that_see_all(density):
    identity = ModelIdentity("llama", 32, 8, 32, 128, "")
    plan = typical_plan(identity, density)
    assert plan.density(32768) == pytest.approx(density, abs=0.01)
    share = np.array(plan.beta)
    assert (share == 1).mean() == pytest.approx((density / 2) / (1 - density / 2), abs=0.01)
    assert (share == 1).sum(1).max() - (share == 1).sum(1).min() <= 1, "spread over the layers"


def test_rows_say_what_was_stored_and_how_fast_it_went(loaded):
    plan = Plan.uniform(loaded.identity, 0.5)
    result = bench_throughput(loaded, [DENSE_DYNAMIC, DENSE_STATIC, Method("half", plan)], [LENGTH], 2, STEPS)
    rows = {row["method"]: row for row in result["rows"]}
    assert list(rows) == ["dense-dynamic", "dense-static", "half"]
    token = 2 * loaded.identity.layers * loaded.identity.kv_heads * loaded.identity.head_dim * 4
    assert rows["dense-dynamic"]["kv_gb"] == rows["dense-static"]["kv_gb"] == pytest.approx(2 * LENGTH * token / 1e9)
    assert rows["half"]["kv_gb"] == pytest.approx(rows["dense-static"]["kv_gb"] / 2)
    assert rows["half"]["density"] == 0.5
    for row in rows.values():
        assert row["tokens_per_s"] == pytest.approx(2 / (row["step_ms"] / 1e3))
        assert 0 < row["roofline_fraction"] < 1
        assert row["prefill_s"] > 0
        assert row["peak_gb"] is None, "a CPU does not count it"
    table = to_markdown({"command": "moa bench throughput", "device": {"cpu": "some"}, **result})
    assert "| half |" in table.replace(" tiny | 640 | 2 ", "")


def test_all_methods_decode_the_same_tokens_where_nothing_is_left_out(loaded):
    methods = [DENSE_DYNAMIC, DENSE_STATIC, Method("all", Plan.dense(loaded.identity))]
    found = decode_in_turn(loaded, methods, LENGTH, 2, STEPS)
    said = [decoder.tokens.tolist() for decoder, _ in found]
    assert said[0] == said[1] == said[2]
    assert all(len(seconds) == (ROUNDS - 1) * STEPS for _, seconds in found)


def test_an_interrupted_call_goes_on_from_what_it_kept(loaded):
    """On a CPU, the methods of one length are measured together."""
    dense, kept = [DENSE_DYNAMIC], []

    def interrupt(result):
        kept.append(result)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench_throughput(loaded, dense, [320, LENGTH], 1, STEPS, keep=interrupt)
    (first,) = kept
    assert [row["length"] for row in first["rows"]] == [320]
    again = bench_throughput(loaded, dense, [320, LENGTH], 1, STEPS, known=first["rows"], keep=kept.append)
    assert again["rows"][0] == first["rows"][0]
    assert [row["length"] for row in again["rows"]] == [320, LENGTH]
    assert len(kept) == 2, "one length was left"


@pytest.mark.parametrize(
    ("lengths", "batch", "steps", "reason"),
    [
        ([2048], 1, 1, "2,048.*1,024"),
        ([64], 1, 16, "64.*rounds of 16"),
        ([], 1, 1, "at least one length"),
        ([LENGTH], 0, 1, "one sequence"),
        ([LENGTH], None, 1, "on a GPU only"),
    ],
)
def test_what_cannot_be_measured_is_refused(loaded, lengths, batch, steps, reason):
    with pytest.raises(InputError, match=reason):
        bench_throughput(loaded, [DENSE_DYNAMIC], lengths, batch, steps)


def test_too_many_sequences_are_an_error_that_says_so(loaded, monkeypatch):
    """What was measured before is kept."""

    def full(loaded, methods, length, *rest):
        if length == LENGTH:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(loaded, methods, length, *rest)

    kept, real = [], throughput._measured
    monkeypatch.setattr(throughput, "_measured", full)
    with pytest.raises(InputError, match=f"dense-dynamic: 3 sequences of {LENGTH:,} tokens do not fit on cpu"):
        bench_throughput(loaded, [DENSE_DYNAMIC], [320, LENGTH], 3, STEPS, keep=kept.append)
    assert [row["length"] for row in kept[-1]["rows"]] == [320]


def test_the_ladder_takes_one_step_after_another(loaded, monkeypatch):
    """Its largest batches are looked for on a GPU; here they are said to be 1 for what is dense and 2 for the plan."""
    pytest.importorskip("triton")
    used, real = [], decoding.Decoder

    def spy(loaded, method, length, batch, *rest):
        used.append((method.plan is not None, method.static, method.backend, batch))
        return real(loaded, method, length, batch, *rest)

    def largest(loaded, methods, length, steps, bandwidth):
        return throughput._measured(loaded, methods, length, 1 + (methods[0].plan is not None), steps, bandwidth)

    monkeypatch.setattr(decoding, "Decoder", spy)
    monkeypatch.setattr(throughput, "_at_largest_batch", largest)
    rungs = ladder("half", Plan.uniform(loaded.identity, 0.5))
    rows = bench_throughput(loaded, rungs, [64], None, 1)["rows"]
    assert used == [
        (False, False, None, 1),
        (False, True, None, 1),
        (True, False, "sdpa", 1),
        (True, False, "sdpa", 2),
        (True, False, "triton", 2),
    ]
    assert [row["method"] for row in rows] == [rung.name for rung in rungs]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "--shape"),
        (["demo", "--shape", "llama-7b"], "one of the two"),
        (["--shape", "llama-8t"], "llama-7b"),
        (["demo", "--density", "half"], "--density 'half'"),
        (["demo", "--against", "per-layer"], "uniform; or none"),
        (["demo", "--batch", "most"], "--batch 'most'"),
        (["demo", "--ladder", "--density", "0.5,0.25"], "one --plan or one --density"),
        (["--shape", "llama-7b", "--dtype", "int7"], "int7"),
        # before the model is made
        (["--shape", "llama-13b", "--device", "cpu", "--batch", "max"], "on a GPU only"),
        (["--shape", "llama-13b", "--device", "cpu", "--ladder"], "on a GPU only"),
    ],
)
def test_the_command_says_what_is_wrong(arguments, reason, capsys):
    with pytest.raises(SystemExit) as end:
        main(["bench", "throughput", *arguments])
    assert end.value.code == 1
    assert reason in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_writes_its_table(tmp_path, demo_model):
    target = tmp_path / "speed.json"
    with pytest.raises(SystemExit) as end:
        main(["bench", "throughput", "demo", "--lengths", "320", "--steps", "1", "--json", str(target), "--quiet"])
    assert not end.value.code
    result = json.loads(target.read_text(encoding="utf-8"))
    assert [row["method"] for row in result["rows"]] == ["dense-dynamic", "dense-static", "MoA 50 %", "uniform 50 %"]
    assert target.with_suffix(".md").read_text(encoding="utf-8").count("\n| demo |") == 4
    assert not target.with_suffix(".partial.json").exists()


@pytest.mark.parametrize(
    ("steps", "gpu", "other", "taken"),
    [
        ("1", "this", {}, True),
        ("2", "this", {}, False),
        ("1", "another", {}, False),
        ("1", "this", {"columns": ["method"]}, False),
        ("1", "this", {"plans": {}}, False),
        ("1", "this", {"model": {}}, False),
    ],
)
def test_the_command_takes_up_what_the_same_command_has_left(loaded, tmp_path, monkeypatch, steps, gpu, other, taken):
    """Rows of another command, another machine, another version or other plans are not taken."""
    monkeypatch.chdir(tmp_path)
    numbers = [field.name for field in fields(Row)[2:]]
    row = {"shape": "llama-7b", "method": "dense-static", **dict.fromkeys(numbers, 1)}
    asked = []

    def measure(*args, **kwargs):
        known, keep = args[6:8]
        asked.append(known)
        result = {"versions": {}, "copy_gb_s": 1.0, "rows": known or [row]}
        keep(result)
        if len(asked) == 1:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr("moa.benchmark.throughput.bench_throughput", measure)
    monkeypatch.setattr("moa.benchmark.shapes.random_model", lambda *_: loaded)
    codes = []
    for steps_now, gpu_now in (("1", "this"), (steps, gpu)):
        monkeypatch.setattr("moa.machine.device_info", lambda _, gpu=gpu_now: {"gpu": gpu})
        arguments = ["bench", "throughput", "--shape", "llama-7b", "--steps", steps_now, "--json", "speed.json"]
        monkeypatch.setattr("sys.argv", ["moa", *arguments])
        with pytest.raises(SystemExit) as end:
            main(arguments)
        codes.append(end.value.code)
        left = tmp_path / "speed.partial.json"
        assert left.exists() == (len(asked) == 1)
        if left.exists():
            left.write_text(json.dumps(json.loads(left.read_text()) | other))
        assert (tmp_path / "speed.json").exists() == (len(asked) > 1)
    assert [bool(code) for code in codes] == [True, False]
    assert asked == [[], [row] if taken else []]
