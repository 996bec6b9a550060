"""The evaluation table: the same numbers for the same plan, real bytes, and nothing lost on the way to a file."""

import io
import json

import pytest
from rich.console import Console

from moa import ModelIdentity, Plan
from moa.errors import InputError, PlanError
from moa.evaluation.compare import EvaluateConfig, Row, device_info, evaluate, table, to_json, to_markdown
from moa.models import LoadedModel
from tiny_models import tiny_model

CONFIG = EvaluateConfig((384, 256), items=1, max_new_tokens=8, chunks=1, decode_steps=2)
ROWS = [
    Row("dense", 2048, 1.0, 94_371_840, 94_371_840, 20, 0.95, 0.1, 35.25, 15.5),
    Row("MoA half", 2048, 0.5, 47_185_920, 94_371_840, 20, 0.85),
]


@pytest.fixture(scope="module")
def loaded(demo_model):
    tokenizer = demo_model.tokenizer
    model = tiny_model("llama", vocab_size=len(tokenizer), hidden_size=32, eos_token_id=tokenizer.eos_token_id)
    return LoadedModel(model, tokenizer, "random", ModelIdentity.of(model.config), 1024)


@pytest.fixture(scope="module")
def rows(loaded):
    identity = loaded.identity
    plans = {"as it is": None, "full plan": Plan.dense(identity), "half": Plan.uniform(identity, 0.5)}
    return evaluate(loaded, plans, CONFIG)


def test_there_is_a_row_for_each_length_and_method(rows):
    assert [(row.length, row.method) for row in rows] == [
        (length, method) for length in (256, 384) for method in ("as it is", "full plan", "half")
    ]
    assert all(row.items == 1 and row.passkey is not None and row.lines is not None for row in rows)
    assert all((row.decode_tokens_per_s or 0) > 0 for row in rows if row.length == 384)
    assert all(row.decode_tokens_per_s is None for row in rows if row.length == 256)


def test_a_plan_with_full_spans_measures_as_the_dense_model_and_a_short_one_does_not(rows):
    for dense, full, half in (rows[:3], rows[3:]):
        assert full.perplexity == pytest.approx(dense.perplexity, rel=1e-4)
        assert half.perplexity != pytest.approx(dense.perplexity, rel=1e-4)


def test_bytes_are_those_in_the_cache(rows):
    for dense, full, half in (rows[:3], rows[3:]):
        expected = 2 * 2 * 16 * dense.length * 2 * 4  # layers x KV heads x head_dim x tokens x (K, V) x float32
        assert dense.kv_bytes == full.kv_bytes == dense.dense_kv_bytes == expected
        assert half.kv_bytes == half.density * expected
        assert half.density == pytest.approx(0.5, abs=0.1)


def test_the_model_is_left_as_it_was(loaded, rows):
    before = loaded.model.config._attn_implementation
    evaluate(loaded, {"half": Plan.uniform(loaded.identity, 0.5)}, EvaluateConfig((256,), tasks=(), decode_steps=0))
    assert loaded.model.config._attn_implementation == before


def test_only_the_asked_tasks_are_measured(loaded):
    (row,) = evaluate(loaded, {"dense": None}, EvaluateConfig((256,), tasks=("perplexity",), chunks=1, decode_steps=0))
    assert row.perplexity is not None
    assert row.passkey is row.lines is row.decode_tokens_per_s is None


def test_json_and_markdown_hold_the_numbers_the_command_and_the_machine(loaded):
    machine = device_info(loaded.model.device)
    assert {"platform", "cpu", "cores", "torch", "transformers"} <= machine.keys()
    written = json.loads(json.dumps(to_json(ROWS, "moa eval demo", machine)))
    assert [Row(**row) for row in written["rows"]] == ROWS
    assert written["command"] == "moa eval demo"
    assert written["device"]["torch"] == machine["torch"]
    markdown = to_markdown(ROWS, "moa eval demo", machine)
    lines = markdown.splitlines()
    assert len({line.count("|") for line in lines[:4]}) == 1
    for number in ("1.000", "94.37", "1.00x", "0.95", "0.10", "35.25", "15.5"):
        assert number in lines[2]
    for number in ("0.500", "47.19", "2.00x", "0.85"):
        assert number in lines[3]
    assert "moa eval demo" in markdown
    assert machine["torch"] in markdown


def test_the_table_fits_a_terminal():
    terminal = Console(file=io.StringIO(), width=80)
    terminal.print(table(ROWS))
    shown = terminal.file.getvalue()
    for number in ("MoA half", "0.500", "47.19", "2.00x", "35.25"):
        assert number in shown


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (EvaluateConfig((2048,)), "2,048 is beyond the context"),
        (EvaluateConfig((64,), decode_steps=0), "too few"),
        (EvaluateConfig((256,), tasks=("poems",)), "poems"),
        (EvaluateConfig((256,), decode_steps=64), "decode steps"),
        (EvaluateConfig(()), "at least one"),
    ],
)
def test_what_cannot_be_measured_is_refused(loaded, config, reason):
    with pytest.raises(InputError, match=reason):
        evaluate(loaded, {"dense": None}, config)


def test_a_plan_for_another_model_is_refused_before_any_work(loaded, demo_model):
    with pytest.raises(PlanError):
        evaluate(loaded, {"other": Plan.dense(demo_model.identity)}, CONFIG)
