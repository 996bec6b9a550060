"""Fixtures for all tests. No test reaches the network."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is first imported

import pytest


@pytest.fixture(scope="session")
def demo_model():
    """SmolLM2-135M-Instruct in float32 on the CPU; nobody may leave it changed."""
    from moa.models import load_model

    return load_model("demo", dtype="float32", device="cpu")
