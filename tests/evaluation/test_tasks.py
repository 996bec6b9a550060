"""Evaluation tasks: exact lengths, answers that are really there, and a score that is not fooled."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from moa.errors import InputError
from moa.evaluation.tasks import (
    default_evaluation_text,
    lines_items,
    passkey_items,
    score,
    text_chunks,
    text_perplexity,
)
from moa.search.text import default_text
from tiny_models import random_ids, tiny_model


@pytest.fixture(scope="module")
def tokenizer(demo_model):
    return demo_model.tokenizer


def make(task, tokenizer, length, items, seed=0):
    if task == "passkey":
        return passkey_items(tokenizer, default_evaluation_text(), length, items, seed)
    return lines_items(tokenizer, length, items, seed)


@pytest.mark.parametrize("task", ["passkey", "lines"])
@pytest.mark.parametrize("length", [256, 511, 2048])
def test_prompts_have_the_exact_length_and_hold_their_answers_at_all_depths(tokenizer, task, length):
    depths = []
    for item in make(task, tokenizer, length, 6):
        assert item.prompt_ids.shape == (length,)
        assert item.prompt_ids.dtype == np.int64
        prompt = tokenizer.decode(item.prompt_ids)
        assert item.answer in prompt
        assert len(item.answer) == 5
        depths.append(prompt.index(item.answer) / len(prompt))
    if length == 2048:
        assert depths == sorted(depths)
        assert depths[0] < 0.25
        assert depths[-1] > 0.75


def test_the_line_asked_for_is_in_the_record_once(tokenizer):
    for item in lines_items(tokenizer, 2048, 4):
        prompt = tokenizer.decode(item.prompt_ids)
        record, question = prompt.split("Now the record is over.")
        line = next(line for line in record.splitlines() if line.endswith(f"<{item.answer}>"))
        name = line.removeprefix("line ").partition(":")[0]
        assert f"in line {name}?" in question
        assert record.count(f"line {name}:") == 1
        assert record.count("REGISTER_CONTENT is") > 70, "as many lines as fit"


@pytest.mark.parametrize("task", ["passkey", "lines"])
def test_the_seed_decides(tokenizer, task):
    first, again, other = (make(task, tokenizer, 512, 3, seed) for seed in (0, 0, 1))
    assert [item.prompt_ids.tolist() for item in first] == [item.prompt_ids.tolist() for item in again]
    assert {item.answer for item in first}.isdisjoint(item.answer for item in other)
    assert len({item.answer for item in first}) == 3


@pytest.mark.parametrize("task", ["passkey", "lines"])
def test_lengths_without_room_are_refused(tokenizer, task):
    with pytest.raises(InputError, match="50 tokens are too few"):
        make(task, tokenizer, 50, 1)


def test_texts_that_are_too_short_are_refused(tokenizer):
    with pytest.raises(InputError, match="the text has"):
        passkey_items(tokenizer, "only a few words", 512, 1)
    with pytest.raises(InputError, match="the text has"):
        text_chunks(tokenizer, "only a few words", 512, 1)


@pytest.mark.parametrize(
    ("prediction", "right"),
    [
        (" 68213.", True),
        ("The pass key is 68213. Remember it.", True),
        ("<68213>", True),
        ("68,213", True),
        ("**68213**", True),
        ("68213 or 11111", True),
        ("11111 or 68213", False),
        ("682130", False),
        ("168213", False),
        ("6821", False),
        ("6 8 2 1 3", False),
        ("68213.5", False),
        ("", False),
        ("none", False),
    ],
)
def test_the_first_number_counts(prediction, right):
    assert score(prediction, "68213") is right


def test_perplexity_is_the_exponential_of_the_mean_loss():
    model = tiny_model("llama")
    chunks = random_ids(3, 100).numpy()
    expected = np.mean([model(ids[None], labels=ids[None]).loss.item() for ids in torch.from_numpy(chunks)])
    assert text_perplexity(model, chunks) == pytest.approx(math.exp(expected), rel=1e-4)


def test_perplexity_of_models_that_give_all_logits_and_of_long_chunks():
    class Uniform(torch.nn.Module):
        device = torch.device("cpu")

        def forward(self, ids, use_cache):
            return SimpleNamespace(logits=torch.zeros(*ids.shape, 50))

    assert text_perplexity(Uniform(), np.zeros((2, 1500), np.int64)) == pytest.approx(50, rel=1e-4)


def test_chunks_are_spread_over_the_text(tokenizer):
    text = " ".join(str(number) for number in range(4000))
    chunks = text_chunks(tokenizer, text, 128, 4)
    assert chunks.shape == (4, 128)
    first = [int(tokenizer.decode(chunk).split()[1]) for chunk in chunks]
    assert first[0] < 10
    assert first[-1] > 3800
    assert first == sorted(first)


def test_the_default_text_is_prose_that_calibration_does_not_see():
    text = default_evaluation_text()
    assert len(text) >= 200_000
    calibration = " ".join(default_text().text.split())
    paragraphs = text.split("\n\n")
    assert len(set(paragraphs)) == len(paragraphs)
    shared = sum(paragraph in calibration for paragraph in paragraphs)
    assert shared <= len(paragraphs) // 200
    assert ">>>" not in text


@pytest.mark.slow
def test_the_demo_model_finds_the_pass_key(demo_model):
    items = passkey_items(demo_model.tokenizer, default_evaluation_text(), 500, 4)
    prompts = torch.from_numpy(np.stack([item.prompt_ids for item in items]))
    tokens = demo_model.model.generate(
        prompts, attention_mask=torch.ones_like(prompts), do_sample=False, max_new_tokens=12
    )
    said = demo_model.tokenizer.batch_decode(tokens[:, 500:])
    assert sum(score(text, item.answer) for text, item in zip(said, items, strict=True)) >= 3
