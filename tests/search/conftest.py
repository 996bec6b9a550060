"""Fixtures for the tests of the search."""

import pytest

from moa.models import LoadedModel
from moa.plan import ModelIdentity
from tiny_models import tiny_model


@pytest.fixture(scope="module")
def random_model(demo_model):
    """A model that answers nothing right, with a real tokenizer."""
    tokenizer = demo_model.tokenizer
    model = tiny_model("llama", vocab_size=len(tokenizer), hidden_size=32, eos_token_id=tokenizer.eos_token_id)
    return LoadedModel(model, tokenizer, "random", ModelIdentity.of(model.config), 1024)
