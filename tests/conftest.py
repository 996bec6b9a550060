"""Fixtures for all tests. No test reaches the network."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is first imported

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined: the kernels' tests run in the interpreter


@pytest.fixture
def poisoned_memory():
    """Uninitialised memory is NaN, so that what a kernel forgets to write is seen."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # which fills what torch.empty returns
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture(scope="session")
def demo_model():
    """SmolLM2-135M-Instruct in float32 on the CPU; nobody may leave it changed."""
    from moa.models import load_model

    return load_model("demo", dtype="float32", device="cpu")


@pytest.fixture(scope="session")
def random_model(demo_model):
    """A model that answers nothing right, with a real tokenizer: a search of it takes seconds."""
    from moa.models import LoadedModel
    from moa.plan import ModelIdentity
    from tiny_models import tiny_model

    tokenizer = demo_model.tokenizer
    model = tiny_model("llama", vocab_size=len(tokenizer), hidden_size=32, eos_token_id=tokenizer.eos_token_id)
    return LoadedModel(model, tokenizer, "random", ModelIdentity.of(model.config), 1024)


@pytest.fixture(scope="session")
def random_folder(random_model, tmp_path_factory):
    """The random model as a local folder."""
    folder = tmp_path_factory.mktemp("models") / "random"
    random_model.tokenizer.save_pretrained(folder)
    random_model.model.save_pretrained(folder)
    return folder
