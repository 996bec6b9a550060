"""The evaluation: the same numbers for the same plan, real bytes, and nothing lost by an interruption."""

import json
import math
from dataclasses import replace

import pytest

from moa import Plan
from moa.errors import InputError, PlanError
from moa.evaluation import compare, devices
from moa.evaluation.compare import EvaluateConfig, Measures, evaluate
from moa.evaluation.devices import evaluate_on
from moa.evaluation.rows import TASKS, Row
from moa.progress import SILENT

CONFIG = EvaluateConfig((512, 448), items=2, tasks=TASKS, decode_steps=2)


@pytest.fixture(scope="module")
def rows(random_model):
    identity = random_model.identity
    plans = {"as it is": None, "full plan": Plan.dense(identity), "half": Plan.uniform(identity, 0.5)}
    return evaluate(random_model, plans, CONFIG)


def by(rows, task, length):
    return [row for row in rows if (row.task, row.length) == (task, length)]


def test_there_is_a_row_for_each_length_task_and_method(rows):
    expected = [
        (length, task, method)
        for length in (448, 512)
        for task in (*TASKS, "kv_mb")
        for method in ("as it is", "full plan", "half")
    ]
    expected += [(512, "tokens_per_s", method) for method in ("as it is", "full plan", "half")]
    assert [(row.length, row.task, row.method) for row in rows] == expected
    assert all(math.isfinite(row.score) and row.score >= 0 and row.stderr >= 0 for row in rows)
    assert all(row.score > 0 for row in rows if row.task == "tokens_per_s")


def test_a_plan_with_full_spans_measures_as_the_dense_model_and_a_short_one_does_not(rows):
    for length in (448, 512):
        for task in ("perplexity", "answer_perplexity"):
            dense, full, half = by(rows, task, length)
            assert full.score == pytest.approx(dense.score, rel=1e-5)
            assert half.score != pytest.approx(dense.score, rel=1e-5)
            assert full.parts == pytest.approx(dense.parts, rel=1e-5)
        dense, full, half = by(rows, "answer_kl", length)
        assert dense.score == 0
        assert full.score == pytest.approx(0, abs=1e-6)
        assert half.score > 1e-5


def test_perplexity_is_the_exponential_of_the_mean_loss_and_its_parts_are_positions(rows):
    (dense, *_) = by(rows, "perplexity", 512)
    assert dense.n == 2
    assert len(dense.parts) == 5
    assert math.log(dense.score) == pytest.approx(sum(math.log(part) for part in dense.parts) / 5, rel=1e-2)


def test_bytes_are_those_in_the_cache(rows):
    for length in (448, 512):
        dense, full, half = by(rows, "kv_mb", length)
        expected = 2 * 2 * 16 * length * 2 * 4 / 1e6  # layers x KV heads x head_dim x tokens x (K, V) x float32
        assert dense.score == full.score == expected
        assert half.score == pytest.approx(half.density * expected)
        assert half.density == pytest.approx(0.5, abs=0.1)


def test_a_task_can_be_asked_for_at_one_length(random_model):
    config = EvaluateConfig((256, 320), items=1, tasks=("needle@320", "perplexity"), decode_steps=0)
    rows = evaluate(random_model, {"dense": None}, config)
    assert [(row.length, row.task) for row in rows] == [
        (256, "perplexity"),
        (256, "kv_mb"),
        (320, "needle"),
        (320, "perplexity"),
        (320, "kv_mb"),
    ]
    with pytest.raises(InputError, match="needle@300"):
        evaluate(random_model, {"dense": None}, EvaluateConfig((320,), tasks=("needle@300",), decode_steps=0))


def test_an_interrupted_evaluation_goes_on(random_model, monkeypatch):
    config = EvaluateConfig((256, 320), items=4, tasks=("needle", "perplexity"), decode_steps=0)
    plans = {"dense": None, "half": Plan.uniform(random_model.identity, 0.5)}
    kept, done = [], []

    def keep(rows):
        kept[:] = [Row.from_dict(json.loads(json.dumps(row.to_dict()))) for row in rows]
        if len(rows) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(random_model, plans, config, keep=keep)
    assert len(kept) == 5
    of = Measures.of
    monkeypatch.setattr(Measures, "of", lambda self, task, plan: done.append(task) or of(self, task, plan))
    rows = evaluate(random_model, plans, config, known=kept)
    assert len(rows) == 12
    assert len(done) == 7, "the five are not measured again"
    assert [row.to_dict() for row in rows] == [row.to_dict() for row in evaluate(random_model, plans, config)]


@pytest.mark.slow
def test_several_devices_measure_what_one_does(random_model, random_folder):
    config = EvaluateConfig(
        (320,), items=2, tasks=("perplexity", "passkey", "answer_kl", "passkey@320"), decode_steps=0
    )
    shares = {"half": 0.5, "quarter": 0.25}
    plans = {"dense": None, **{name: Plan.uniform(random_model.identity, share) for name, share in shares.items()}}
    alone = evaluate(random_model, plans, config)
    assert [row.task for row in alone] == ["passkey"] * 3 + ["perplexity"] * 3 + ["answer_kl"] * 3 + ["kv_mb"] * 3
    known = [replace(row, score=-1.0) for row in alone if row.method == "dense"]
    kept = []
    together = evaluate_on(["cpu", "cpu"], str(random_folder), "float32", plans, config, SILENT, known, kept.extend)
    assert [(row.method, row.task, row.length, row.n) for row in together] == [
        (row.method, row.task, row.length, row.n) for row in alone
    ]
    for row, other in zip(together, alone, strict=True):
        score = -1.0 if row.method == "dense" else pytest.approx(other.score, rel=1e-4)
        assert row.score == score, "what is known is not measured again"
    assert {(row.method, row.task) for row in kept} == {(row.method, row.task) for row in alone}


def test_answers_are_made_once_and_only_where_something_is_to_be_read_on_them(random_model, monkeypatch):
    made = []
    calibrate = compare.calibrate
    monkeypatch.setattr(compare, "calibrate", lambda *given: made.append(given[2].lengths) or calibrate(*given))
    config = EvaluateConfig((256, 320), items=2, tasks=("perplexity", "answer_kl@320"), decode_steps=0)
    plans = {"dense": None, "half": Plan.uniform(random_model.identity, 0.5)}
    rows = evaluate(random_model, plans, config)
    assert made == [(320,)]
    assert evaluate(random_model, plans, config, known=rows) == rows
    assert made == [(320,)], "all is known"


def test_a_process_reads_the_answers_that_another_made(random_model, monkeypatch):
    config = EvaluateConfig((320,), items=2, tasks=("answer_kl",), decode_steps=0)
    plans = {"dense": None, "half": Plan.uniform(random_model.identity, 0.5)}
    rows = evaluate(random_model, plans, config)
    (other,) = compare.prepare(random_model, plans, config)
    answers = other.answers
    monkeypatch.setattr(devices, "_worker", (random_model, compare.prepare(random_model, plans, config), plans, config))
    monkeypatch.setattr(compare, "calibrate", lambda *_: pytest.fail("made again"))
    assert devices._measure("half", 0, (), answers) == [row for row in rows if row.method == "half"]
    assert devices._to_be_answered(0, plans, config, ())
    assert not devices._to_be_answered(0, plans, config, rows)


def test_speed_is_not_measured_on_a_device_named_twice():
    config = EvaluateConfig((320,), items=2, decode_steps=4)
    with pytest.raises(InputError, match=r"cpu is named 2 times.*0 decode steps"):
        evaluate_on(["cpu", "cpu"], "demo", "float32", {"dense": None}, config)


def test_evaluation_items_share_nothing_with_calibration(random_model):
    """Neither text nor seeds: not a stretch of 12 tokens of real text is in both."""
    from moa.search.calibrate import CalibrateConfig, calibrate
    from moa.search.text import default_text

    measures = Measures(random_model, EvaluateConfig((448,), items=2, tasks=TASKS), 448)
    calibration = calibrate(random_model, default_text().text, CalibrateConfig((448,), items=4))
    size = 12
    seen = {
        tuple(item.input_ids[start : start + size].tolist())
        for items in calibration.items.values()
        for item in items
        for start in range(64, item.answer_start - 64)  # between the wordings of the tasks
    }
    tested = [item.prompt_ids for items in measures.items.values() for item in items]
    tested += [item.input_ids[64 : item.answer_start - 64] for item in measures.answers]
    assert len(tested) > 14
    for ids in tested:
        assert seen.isdisjoint(tuple(ids[start : start + size].tolist()) for start in range(len(ids) - size))


def test_the_model_is_left_as_it_was(random_model, rows):
    before = random_model.model.config._attn_implementation
    evaluate(
        random_model,
        {"half": Plan.uniform(random_model.identity, 0.5)},
        EvaluateConfig((256,), tasks=(), decode_steps=0),
    )
    assert random_model.model.config._attn_implementation == before


def test_only_the_asked_tasks_are_measured(random_model):
    rows = evaluate(random_model, {"dense": None}, EvaluateConfig((256,), tasks=("perplexity",), decode_steps=0))
    assert [row.task for row in rows] == ["perplexity", "kv_mb"]


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (EvaluateConfig((2048,)), "2,048 is beyond the context"),
        (EvaluateConfig((1,)), "length 1 has no token"),
        (EvaluateConfig((64,), decode_steps=0), "too few"),
        (EvaluateConfig((256,), tasks=("poems",)), "poems"),
        (EvaluateConfig((256,), decode_steps=64), "decode steps"),
        (EvaluateConfig(()), "at least one"),
    ],
)
def test_what_cannot_be_measured_is_refused(random_model, config, reason):
    with pytest.raises(InputError, match=reason):
        evaluate(random_model, {"dense": None}, config)


def test_a_plan_for_another_model_is_refused_before_any_work(random_model, demo_model):
    with pytest.raises(PlanError):
        evaluate(random_model, {"other": Plan.dense(demo_model.identity)}, CONFIG)
