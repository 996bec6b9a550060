"""A model's own eager attention under the explicit mask of a plan: what running under the plan must equal."""

import sys
from contextlib import contextmanager

import numpy as np
import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from moa.attention.reference import visible_keys

_CURRENT: dict = {}


def _eager_under_mask(module, query, key, value, attention_mask, **kwargs):
    tokens = key.shape[2]
    spans = torch.from_numpy(_CURRENT["spans"][:, module.layer_idx])  # [rows, kv_heads]
    valid = torch.ones(len(query), tokens, dtype=torch.bool)
    window = kwargs.get("sliding_window") if attention_mask is None else int(attention_mask)
    seen = visible_keys(spans, _CURRENT["sink"], valid, tokens, window)
    mask = torch.zeros(seen.shape, dtype=query.dtype).masked_fill(~seen, torch.finfo(query.dtype).min).to(query.device)
    eager = sys.modules[type(module).__module__].eager_attention_forward
    mask = mask.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    return eager(module, query, key, value, mask, **kwargs)


AttentionInterface.register("test_eager_under_mask", _eager_under_mask)
# in place of a mask the window that it would apply, which not all models hand to their attention as well
AttentionMaskInterface.register(
    "test_eager_under_mask", lambda local_size=None, **kwargs: None if local_size is None else torch.tensor(local_size)
)


@contextmanager
def _attention(model, name):
    text = model.config.get_text_config(decoder=True)
    previous = text._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(previous)


def masked_logits(model, plan, ids, length):
    """Logits [rows, tokens, vocabulary] of whole sequences ``ids``, planned for ``length`` tokens, without a cache."""
    _CURRENT.update(spans=np.repeat(plan.spans(length)[None], len(ids), axis=0), sink=plan.sink)
    with _attention(model, "test_eager_under_mask"), torch.no_grad():
        return model(ids, use_cache=False).logits


def eager_logits(model, ids):
    """Logits of the untouched model with eager attention."""
    with _attention(model, "eager"), torch.no_grad():
        return model(ids, use_cache=False).logits
