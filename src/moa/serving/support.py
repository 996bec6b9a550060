"""Which models can be served under a plan."""

import torch
from transformers import PretrainedConfig

from moa.errors import UnsupportedModelError


def check_servable(config: PretrainedConfig) -> None:
    """Raise UnsupportedModelError, saying why, where a served plan would not be what `moa.apply` makes of it.

    To vLLM a head's window is its span; a layer's own window and caps on its logits have no place there.
    """
    text = config.get_text_config(decoder=True)
    window, context = getattr(text, "sliding_window", None), getattr(text, "max_position_embeddings", None)
    types = getattr(text, "layer_types", None)
    slides = "sliding_attention" in types if types else window and getattr(text, "use_sliding_window", True)
    own = []
    if slides and not (window and context and window >= context):
        own.append(f"layers with sliding windows of their own ({window} tokens)")
    if getattr(text, "attn_logit_softcapping", None):
        own.append(f"a soft cap on attention logits ({text.attn_logit_softcapping:g})")
    if own:
        raise UnsupportedModelError(
            f"{text.model_type} has {' and '.join(own)}, which serving a plan does not cover; serve this model without "
            "a plan, or run it with moa.apply"
        )


def check_modules(model: torch.nn.Module) -> None:
    """As `check_servable`, for what only the model itself shows."""
    for name, module in model.named_modules():
        if not getattr(module, "is_causal", True):
            raise UnsupportedModelError(f"{name} is not causal; a plan is for decoders, serve this model without one")
        if hasattr(module, "sinks"):
            raise UnsupportedModelError(
                f"{name} has learned sinks, which serving a plan does not cover; serve this model without a plan, or "
                "run it with moa.apply"
            )
