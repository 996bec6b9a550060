"""Models of well-known shapes with random weights, for measurements that do not depend on what a model knows."""

from typing import Any, cast

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen2Config

from moa.models import LoadedModel
from moa.plan import ModelIdentity

_CONTEXT = 131072

SHAPES: dict[str, PretrainedConfig] = {
    "llama-7b": LlamaConfig(max_position_embeddings=_CONTEXT),
    "llama-13b": LlamaConfig(
        hidden_size=5120,
        intermediate_size=13824,
        num_hidden_layers=40,
        num_attention_heads=40,
        max_position_embeddings=_CONTEXT,
    ),
    "llama3-8b": LlamaConfig(
        vocab_size=128256,
        intermediate_size=14336,
        num_key_value_heads=8,
        max_position_embeddings=_CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    ),
    "llama3-70b": LlamaConfig(
        vocab_size=128256,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        max_position_embeddings=_CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    ),
    "qwen2.5-7b": Qwen2Config(
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        max_position_embeddings=_CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
    ),
}


def weight_bytes(config: PretrainedConfig, element: int = 2) -> int:
    """Bytes of the weights of a model with this config, at ``element`` bytes each."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return element * sum(weights.numel() for weights in model.parameters())


def random_model(shape: str, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> LoadedModel:
    """A model of one of `SHAPES`; it has no tokenizer, since it has no words."""
    config = SHAPES[shape]
    torch.manual_seed(0)
    with torch.device(device):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return LoadedModel(
        model=model.eval().requires_grad_(False),
        tokenizer=cast(Any, None),
        name=shape,
        identity=ModelIdentity.of(config),
        context_length=_CONTEXT,
    )
