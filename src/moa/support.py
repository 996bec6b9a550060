"""Which models a plan can cover: those whose decoder has plain attention, full or sliding, in every layer."""

from typing import Any

from transformers import PreTrainedModel

from moa.errors import UnsupportedModelError

_LAYER_TYPES = {"full_attention", "sliding_attention"}
_WINDOW_IN_MASK = {"phimoe", "qwen2_moe"}  # whose attention is not told of its layer's sliding window


def text_part(model: PreTrainedModel) -> tuple[str | None, Any]:
    """Config of the decoder, and its name inside a composite config."""
    text = model.config.get_text_config(decoder=True)
    name = next((key for key in model.config.sub_configs if getattr(model.config, key) is text), None)
    return name, text


def check_plannable(model: PreTrainedModel) -> None:
    """Raise UnsupportedModelError, saying why, where a plan cannot cover the model."""
    _, text = text_part(model)
    if model.config.is_encoder_decoder:
        raise UnsupportedModelError(f"{model.config.model_type} is an encoder-decoder; plans are for decoders")
    if getattr(text, "kv_lora_rank", None):
        raise UnsupportedModelError(
            f"{text.model_type} stores compressed keys (MLA), which have no KV heads to plan; plans need plain KV heads"
        )
    if getattr(text, "num_kv_shared_layers", 0):
        raise UnsupportedModelError(
            f"the last {text.num_kv_shared_layers} layers of this {text.model_type} model attend keys of earlier ones; "
            "plans cover models in which each layer has its own"
        )
    foreign = set(getattr(text, "layer_types", None) or ()) - _LAYER_TYPES
    if foreign:
        raise UnsupportedModelError(
            f"{text.model_type} has layers of type {sorted(foreign)}; plans cover {sorted(_LAYER_TYPES)}"
        )


def masked_window(module: Any) -> int | None:
    """Tokens that an attention module's layer sees where the model leaves its sliding window to the mask, else None."""
    config: Any = getattr(module, "config", None)
    if getattr(config, "model_type", None) not in _WINDOW_IN_MASK:
        return None
    kinds = getattr(config, "layer_types", None)
    slides = kinds is None or kinds[module.layer_idx] == "sliding_attention"
    window: int | None = config.sliding_window if slides else None
    return window
