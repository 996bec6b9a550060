"""A question about a text is asked alone, and found or lost once, whatever its answer's length."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import moa
from moa.cache import SpanCache
from moa.evaluation.likelihood import divergences
from moa.plan import ModelIdentity, Plan
from moa.search import divergence
from moa.search.divergence import Divergence, by_source, lost
from moa.search.items import CalibrationItem, CalibrationSet, Question
from tiny_models import random_ids, random_plan, tiny_model

NO = np.zeros(0, np.int64)
LENGTH = 300


def item(*tokens):
    """An item with questions of which so many tokens carry loss."""
    questions = tuple(Question(np.zeros(count + 1, np.int64), np.arange(1, count + 1)) for count in tokens)
    return CalibrationItem(NO, NO, NO, NO, questions)


def test_all_questions_count_alike_however_long_their_answers():
    nats = np.array([3.0, 0.0, 0.5, 0.5, 0.0])
    assert lost(item(1, 1, 3), nats) == pytest.approx((1 - np.exp(-3)) / 3 + (1 - np.exp(-1)) / 3)
    assert lost(item(1), nats[:1]) == pytest.approx(1 - np.exp(-3))


def test_an_answer_is_lost_by_any_of_its_tokens():
    found, wrong = [0, 0, 0], [1, 1]
    assert lost(item(3, 2), np.array([*found, *wrong])) == pytest.approx((1 - np.exp(-2)) / 2)
    assert lost(item(3), np.array([9.0, 0, 0])) == lost(item(3), np.array([0, 0, 9.0]))
    assert lost(item(3), np.zeros(3)) == 0
    assert 0.99 < lost(item(2), np.array([100.0, 100.0])) <= 1, "no more than all"


def about(text, *lengths, seed):
    """An item with questions of so many tokens about this text."""
    ids = random_ids(len(lengths), max(lengths), seed=seed).numpy()
    questions = tuple(
        Question(row[:count], np.arange(count - 4, count)) for row, count in zip(ids, lengths, strict=True)
    )
    return CalibrationItem(NO, NO, NO, text, questions)


@pytest.mark.parametrize("held", [1000, 3, 1])
def test_a_question_is_answered_as_if_it_were_the_only_one(monkeypatch, held):
    """However many fit in memory side by side."""
    model = tiny_model()
    identity = ModelIdentity.of(model.config)
    row = LENGTH * 2 * identity.layers * identity.kv_heads * identity.head_dim * 4
    monkeypatch.setattr(divergence, "_CACHE_BYTES", held * row)
    texts = random_ids(4, 270, seed=1).numpy()
    shapes = ((10, 30, 22), (30,), (8, 9), (15, 15, 15))
    items = [about(text, *lengths, seed=index) for index, (text, lengths) in enumerate(zip(texts, shapes, strict=True))]
    loaded = SimpleNamespace(model=model, identity=identity)
    measure = Divergence(loaded, CalibrationSet({(LENGTH, "retrieval"): tuple(items)}), {"retrieval": 1.0})
    plan = random_plan(model, sink=4, block=16)

    def log_probs(plan, text, question):
        with moa.apply(model, plan), torch.no_grad():
            cache = SpanCache(plan, LENGTH)
            model(torch.from_numpy(text)[None], past_key_values=cache)
            logits = model(torch.from_numpy(question.input_ids)[None], past_key_values=cache).logits[0]
        return logits[question.loss - 1].log_softmax(-1)

    def expected(item):
        dense = Plan.dense(identity)
        return [
            1 - np.exp(-divergences(*(log_probs(p, item.text, question) for p in (dense, plan))).sum())
            for question in item.questions
        ]

    losses = [np.mean(expected(item)) for item in items]
    assert min(losses) > 1e-4
    assert by_source(measure.losses(plan))["retrieval"] == pytest.approx(np.mean(losses), rel=1e-3)


def test_the_error_is_that_of_a_difference_on_the_same_items(monkeypatch):
    """Sources by their weights, lengths alike."""
    rng = np.random.default_rng(0)
    first = {(length, source): rng.random(8) for length in (64, 128) for source in ("retrieval", "text")}
    change = {key: 0.1 * rng.standard_normal(8) for key in first}
    shortest = {key: np.full(8, 0.5) for key in first}
    loaded = SimpleNamespace(model=tiny_model(), identity=ModelIdentity.of(tiny_model().config))
    monkeypatch.setattr(Divergence, "losses", lambda self, plan: shortest)
    measure = Divergence(loaded, CalibrationSet({}), {"retrieval": 1.0, "text": 3.0})
    assert measure.total(by_source(shortest)) == pytest.approx(4.0)
    assert measure.error(first, {key: first[key] + 1 for key in first}) == pytest.approx(0, abs=1e-9)
    second = {key: first[key] + change[key] for key in first}
    variance = sum(
        (weight / 0.5 / 2) ** 2 * change[length, source].var(ddof=1) / 8
        for source, weight in (("retrieval", 1), ("text", 3))
        for length in (64, 128)
    )
    assert measure.error(first, second) == measure.error(second, first) == pytest.approx(np.sqrt(variance))
    alone = {(64, "text"): np.array([1.0])}
    assert measure.error(alone, {(64, "text"): np.array([2.0])}) == 0
