"""Losses of real text and of the dense model's answers."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from moa.errors import InputError
from moa.evaluation.likelihood import answer_log_probs, text_chunks, text_losses
from moa.search.items import CalibrationItem
from tiny_models import random_ids, tiny_model


@pytest.fixture(scope="module")
def tokenizer(demo_model):
    return demo_model.tokenizer


def test_losses_are_the_models_own():
    model = tiny_model("llama")
    chunks = random_ids(3, 100).numpy()
    expected = np.mean([model(ids[None], labels=ids[None]).loss.item() for ids in torch.from_numpy(chunks)])
    assert text_losses(model, chunks).mean() == pytest.approx(expected, rel=1e-4)


def test_losses_of_models_that_give_all_logits_and_of_long_chunks():
    class Uniform(torch.nn.Module):
        device = torch.device("cpu")

        def forward(self, ids, use_cache):
            return SimpleNamespace(logits=torch.zeros(*ids.shape, 50))

    losses = text_losses(Uniform(), np.zeros((2, 1500), np.int64))
    assert losses.shape == (2, 1024)
    assert losses == pytest.approx(np.full((2, 1024), np.log(50)), rel=1e-5)


def test_chunks_are_spread_over_the_text(tokenizer):
    text = " ".join(str(number) for number in range(4000))
    chunks = text_chunks(tokenizer, text, 128, 4)
    assert chunks.shape == (4, 128)
    first = [int(tokenizer.decode(chunk).split()[1]) for chunk in chunks]
    assert first[0] < 10
    assert first[-1] > 3800
    assert first == sorted(first)


def test_a_text_gives_no_more_chunks_than_it_has_without_overlap(tokenizer):
    ids = tokenizer(" ".join(str(number) for number in range(400)))["input_ids"]
    text, special = tokenizer.decode(ids), len(tokenizer("")["input_ids"])
    chunks = text_chunks(tokenizer, text, 100 + special, 1000)
    assert chunks.shape == (len(ids) // 100, 100 + special)
    told = [" ".join(tokenizer.decode(chunk[special:]).split()[1:-1]) for chunk in chunks]  # but for cut-off numbers
    starts, ends = [text.index(words) for words in told], [text.index(words) + len(words) for words in told]
    assert all(end < start for end, start in zip(ends, starts[1:], strict=False))


def test_texts_that_are_too_short_are_refused(tokenizer):
    with pytest.raises(InputError, match="the text has"):
        text_chunks(tokenizer, "only a few words", 512, 1)


def test_answers_are_scored_where_they_are_predicted():
    model, ids = tiny_model("llama"), random_ids(1, 60)
    found = answer_log_probs(
        model, CalibrationItem(ids[0].numpy(), np.arange(50, ids.shape[1]), np.arange(60, ids.shape[1]))
    )
    expected = model(ids).logits[0, 49:59].log_softmax(-1)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
