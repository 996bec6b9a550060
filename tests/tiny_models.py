"""Tiny random models of many architectures, and random plans for them."""

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from moa.plan import ModelIdentity, Plan

COMMON = {
    "vocab_size": 199,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
WINDOWED = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 100}
EXTRA = {
    "llama": {},
    "mistral": {"sliding_window": 200},
    "qwen2": {},
    "qwen3": {},
    "gemma2": {**WINDOWED, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 5.0},
    "gemma3_text": {**WINDOWED, "query_pre_attn_scalar": 16},
    "phi3": {"sliding_window": 200},
    "olmo2": {},
    "gpt_oss": {**WINDOWED, "num_local_experts": 4, "num_experts_per_tok": 2},
    "exaone4": WINDOWED,
    "granite": {"attention_multiplier": 0.3},
    "qwen2_moe": {  # only the mask applies the window
        "use_sliding_window": True,
        "sliding_window": 100,
        "max_window_layers": 1,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
    },
    "phimoe": {"sliding_window": 200, "num_local_experts": 4, "num_experts_per_tok": 2},  # so here
}


def tiny_model(model_type="llama", seed=0, **changes):
    """A random float32 model in eval mode whose attention is peaked enough for spans to matter."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **{**COMMON, **EXTRA.get(model_type, {}), **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_proj" in name or "k_proj" in name or "qkv_proj" in name:
                parameter.mul_(8)
            if name.endswith("sinks"):
                parameter.normal_()
    return model


def random_plan(model, seed=0, full=False, sink=64, block=64):
    """Every head its own random rule, some constant, some growing, some full; or all full."""
    identity = ModelIdentity.of(model.config)
    if full:
        return Plan.dense(identity)
    generator = np.random.default_rng(seed)
    shape = (identity.layers, identity.kv_heads)
    beta = generator.choice([0.0, 0.0, 0.25, 0.5, 1.0], shape)
    alpha = np.where(beta == 1, 0, generator.choice([-64.0, 0.0, 128.0, 256.0], shape))
    alpha[0, 0], beta[0, 0] = sink + block, 0.0  # at least one head that evicts almost everything
    return Plan.from_arrays(identity, alpha, beta, sink, block)


def random_ids(rows, tokens, seed=0, vocabulary=199):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocabulary, (rows, tokens), generator=generator)
