"""A model while the search differentiates it: its weights frozen, its attention one of the search's own.

The gradient enters at the embeddings, and layers are computed a second time in the backward pass, so that memory does
not grow with depth. Attention is exchanged through transformers' registry.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial as bind
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_layers import GradientCheckpointingLayer

from moa.attention.options import AttentionOptions
from moa.errors import UnsupportedModelError
from moa.models import LoadedModel
from moa.plan import ModelIdentity
from moa.support import check_plannable, text_part

NAME = "moa_differentiable"

# Attention of sequences of one length, in layer number: query [rows * query_heads, N, head_dim], key and value
# [rows * kv_heads, N, head_dim], options for as many heads.
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, AttentionOptions, int], torch.Tensor]


@contextmanager
def differentiable(model: PreTrainedModel) -> Iterator[None]:
    """Frozen and in eval mode, gradient from the embeddings on, layers recomputed in the backward pass; all undone."""
    with ExitStack() as undo:
        for module in model.modules():
            recomputed = isinstance(module, GradientCheckpointingLayer)
            undo.enter_context(_attributes(module, **(_recomputing(module) if recomputed else {"training": False})))
        for parameter in model.parameters():
            if parameter.requires_grad:
                undo.callback(parameter.requires_grad_)
                parameter.requires_grad_(False)
        embeddings = model.get_input_embeddings()
        undo.callback(embeddings.register_forward_hook(lambda module, inputs, out: out.requires_grad_()).remove)
        yield


@contextmanager
def _attributes(module: torch.nn.Module, **values: Any) -> Iterator[None]:
    """Set attributes of a module object, and put back what was there before, absence included."""
    before = {name: vars(module)[name] for name in values if name in vars(module)}
    try:
        for name, value in values.items():
            setattr(module, name, value)
        yield
    finally:
        for name in values:
            if name in before:
                setattr(module, name, before[name])
            else:
                delattr(module, name)


def _recomputing(layer: torch.nn.Module) -> dict[str, Any]:
    """Attributes that make a layer recompute itself, without dropout.

    Transformers recomputes layers in training mode only, where some layers drop out. So ``training`` is the switch
    alone: while the layer computes, it is off.
    """

    def run(forward: Callable[..., Any], *inputs: Any) -> Any:
        layer.training = False
        try:
            return forward(*inputs)
        finally:
            layer.training = True

    def recompute(forward: Callable[..., Any], *inputs: Any) -> Any:
        return checkpoint(bind(run, forward), *inputs, use_reentrant=False, preserve_rng_state=False)

    return {"training": True, "gradient_checkpointing": True, "_gradient_checkpointing_func": recompute}


# How the model attends now. Not a context variable: on a GPU layers are recomputed in autograd's own thread.
_running: tuple[ModelIdentity, Attend] | None = None


@contextmanager
def attending(loaded: LoadedModel, attend: Attend) -> Iterator[None]:
    """Let a model attend by ``attend``; undone afterwards, also after an error.

    The model then takes sequences of one length without padding, and no cache.

    Raises
    ------
    UnsupportedModelError
        If the attention of some layer cannot be exchanged or is not plain causal attention.
    """
    global _running
    model = loaded.model
    check_plannable(model)
    part, text = text_part(model)
    before = text._attn_implementation, _running

    def switch(implementation: str) -> None:
        model.set_attn_implementation(implementation if part is None else {part: implementation})

    try:
        switch(NAME)
        if text._attn_implementation != NAME:
            raise UnsupportedModelError(
                f"{text.model_type} models do not let their attention be exchanged (transformers keeps "
                f"{text._attn_implementation!r}), so they cannot be profiled"
            )
        _running = loaded.identity, attend
        yield
    finally:
        switch(before[0])
        _running = before[1]


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    position_bias: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function that transformers calls; tensors [rows, heads, N, head_dim], without dropout."""
    if _running is None:
        raise UnsupportedModelError(f"attention {NAME!r} is for the search only; choose another attn_implementation")
    identity, attend = _running
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if attention_mask is not None or position_bias is not None or not causal:
        raise UnsupportedModelError(
            f"{identity.model_type} has masks or position biases of its own; plans cover neither"
        )
    heads = query.shape[1], key.shape[1]
    if heads != (identity.query_heads, identity.kv_heads) or key.shape[-1] != value.shape[-1]:
        raise UnsupportedModelError(
            f"a layer of this {identity.model_type} model attends with {heads[0]} query heads, {heads[1]} KV heads and "
            f"keys and values of {key.shape[-1]} and {value.shape[-1]}, which is not what is stored for the model "
            f"({identity}); latent attention (MLA) and layers of different shapes cannot be profiled"
        )
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    rows = query.shape[0]
    options = AttentionOptions(scaling, softcap, None if s_aux is None else s_aux.repeat(rows), sliding_window)
    out = attend(query.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1), options, module.layer_idx)
    return out.unflatten(0, (rows, -1)).transpose(1, 2).contiguous(), None


def _mask(allow_is_causal_skip: bool = True, **kwargs: Any) -> None:
    """Calibration items have no padding, so no mask is needed."""
    if not allow_is_causal_skip:
        raise UnsupportedModelError("the model masks more than the future of each token; plans are for causal decoders")


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)
