"""Fixtures for all tests. No test reaches the network."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is first imported

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined: the kernels' tests run in the interpreter


@pytest.fixture(scope="session")
def demo_model():
    """SmolLM2-135M-Instruct in float32 on the CPU; nobody may leave it changed."""
    from moa.models import load_model

    return load_model("demo", dtype="float32", device="cpu")
