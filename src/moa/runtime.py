"""Running a model under a plan: `apply` switches its attention to spans, and back.

Nothing of transformers is replaced. Transformers' own registries carry the attention function and the mask function; a
SpanCache hands each layer's new keys to the attention function together with itself. Two methods are set on the model
*object* (not on its class): transformers' hook for making a cache, since only `generate` knows how long the sequences
will become, and ``forward``, which replays decode steps on a GPU (`moa.decode_graph`).
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from types import TracebackType
from typing import Any

import numpy as np
import torch
from transformers import AttentionInterface, PreTrainedModel
from transformers.generation import GenerationMode
from transformers.masking_utils import AttentionMaskInterface

from moa.attention import backends
from moa.attention.options import AttentionOptions
from moa.cache import SpanCache
from moa.decode_graph import DecodeGraphs
from moa.errors import CacheError, UnsupportedModelError
from moa.plan import ModelIdentity, Plan
from moa.support import check_plannable, masked_window, text_part

NAME = "moa_span"
_TOKENS_AT_ONCE = 16384  # of all rows together; a longer prompt is read in chunks, whose activations take less memory
_LEAST_CHUNK = 512


def prompt_chunk(rows: int) -> int:
    """How many tokens of each of ``rows`` long prompts are read at once."""
    return max(_LEAST_CHUNK, _TOKENS_AT_ONCE // rows)


@dataclass(frozen=True)
class _InForce:
    plan: Plan
    backend: str | None


_IN_FORCE: "weakref.WeakKeyDictionary[torch.nn.Module, _InForce]" = weakref.WeakKeyDictionary()  # by attention module


class AppliedPlan:
    """A plan in force on a model; ends with `remove` or with the ``with`` block it opens."""

    def __init__(self, model: PreTrainedModel, plan: Plan, backend: str | None, compiles: bool):
        self.model, self.plan, self.backend, self._compiles = model, plan, backend, compiles
        self._previous: str | dict[str, str] | None = None
        self._own_forward = model.__dict__.get("forward")  # where another library has set one on the object

    def __enter__(self) -> "AppliedPlan":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def remove(self) -> None:
        """Give the model its own attention back; calling it twice does no harm."""
        if self._previous is None:
            return
        self._graphs.forget()
        self.model.set_attn_implementation(self._previous)
        self._previous = None
        for module in self.model.modules():
            _IN_FORCE.pop(module, None)
        object.__delattr__(self.model, "_prepare_cache_for_generation")
        object.__delattr__(self.model, "forward")
        if self._own_forward is not None:
            object.__setattr__(self.model, "forward", self._own_forward)

    def _put_in_force(self) -> None:
        name, text = text_part(self.model)
        previous = text._attn_implementation
        self.model.set_attn_implementation(NAME if name is None else {name: NAME})
        if text._attn_implementation != NAME:
            raise UnsupportedModelError(
                f"{text.model_type} models do not let their attention be exchanged (transformers keeps "
                f"{text._attn_implementation!r}), so a plan cannot be applied to them"
            )
        self._previous = previous if name is None else {name: previous}
        for module in self.model.modules():
            if hasattr(module, "layer_idx"):
                _IN_FORCE[module] = _InForce(self.plan, self.backend)
        # on the object alone; nn.Module's types only know tensors and modules
        object.__setattr__(self.model, "_prepare_cache_for_generation", self._prepare_cache)
        self._graphs = DecodeGraphs(self.model, self.model.forward, self._compiles)
        object.__setattr__(self.model, "forward", self._graphs)

    def _prepare_cache(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: GenerationMode,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """Make or grow the SpanCache of one ``generate`` call, whose rows end at ``max_cache_length + 1`` columns."""
        if generation_config.use_cache is False or generation_config.cache_implementation is not None:
            raise CacheError(
                "a plan runs from a SpanCache: call generate without use_cache=False and without cache_implementation "
                f"(given: use_cache={generation_config.use_cache}, "
                f"cache_implementation={generation_config.cache_implementation!r})"
            )
        if generation_mode in (GenerationMode.ASSISTED_GENERATION, GenerationMode.DOLA_GENERATION):
            raise UnsupportedModelError(f"{generation_mode.value} takes tokens back, which a SpanCache has evicted")
        mask = model_kwargs.get("attention_mask")  # None where nothing is padded
        given = getattr(generation_config, "_mask_length", None) if mask is None else mask.shape[1]
        new = generation_config.max_new_tokens
        # the prompt may be what is new alone, and the mask then tells how long it is with what is cached
        columns = given + new if given and new else max_cache_length + 1
        padding = 0 if mask is None else (mask == 0).sum(dim=1).cpu().numpy()
        lengths: Any = np.asarray(columns - padding)
        rows = batch_size * max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
        only_text = text_part(self.model)[0] is None and model_kwargs.get("inputs_embeds") is None
        if generation_config.prefill_chunk_size is None and only_text:
            chunk = prompt_chunk(rows)
            # the last column is the last new token's, so the prompt is no longer than this
            if max_cache_length > chunk:
                generation_config.prefill_chunk_size = chunk
        cache = model_kwargs.get("past_key_values")
        if cache is None:
            model_kwargs["past_key_values"] = self._graphs.new_cache(self.plan, lengths, rows)
        elif isinstance(cache, SpanCache):
            _check_nothing_cached_is_hidden(cache, mask)
            self._graphs.forget()  # growing moves what it was recorded on
            cache.grow(lengths)
        else:
            raise CacheError(f"under a plan past_key_values must be a SpanCache, not {type(cache).__name__}")


def apply(model: PreTrainedModel, plan: Plan, backend: str | None = None, *, compile: bool = False) -> AppliedPlan:
    """Make ``model`` attend by ``plan``, until the handle's ``remove`` or the end of its ``with`` block.

    Parameters
    ----------
    model : PreTrainedModel
        Any decoder whose attention goes through transformers' AttentionInterface.
    plan : Plan
        Made for this model.
    backend : str, optional
        ``"triton"`` or ``"sdpa"``; without it the environment variable MOA_BACKEND, else our kernels on an NVIDIA GPU
        and PyTorch's operators elsewhere.
    compile : bool
        Compile decode steps before they are recorded (`torch.compile`), where they are: on a GPU. That fuses the small
        operations between products. Each recording then takes as long as compiling the model: whenever rows or lengths
        differ from the last call's, and at every turn of a conversation that grows.

    Returns
    -------
    AppliedPlan
        ``with moa.apply(model, plan): model.generate(...)``.

    Raises
    ------
    InputError
        If ``backend`` is none we have.
    PlanError
        If the plan is for another model.
    UnsupportedModelError
        If the model's attention cannot carry a plan, or a plan is already in force on it.
    """
    check_plannable(model)
    _, text = text_part(model)
    if text._attn_implementation == NAME:
        raise UnsupportedModelError("a plan is already in force on this model; remove it first")
    plan.check_fits(ModelIdentity.of(model.config))
    if backend is not None:
        backends.check(backend)
    applied = AppliedPlan(model, plan, backend, compile)
    applied._put_in_force()
    return applied


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    position_bias: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function that transformers calls; tensors [rows, heads, tokens, dim], mask bool [rows, tokens]."""
    in_force = _IN_FORCE.get(module)
    if in_force is None:
        raise UnsupportedModelError(f"attention {NAME!r} was called on a module without a plan; use moa.apply")
    plan = in_force.plan
    if dropout or position_bias is not None or is_causal is False:
        raise UnsupportedModelError("plans cover causal attention without dropout and without position biases")
    if key.shape[1] != plan.model.kv_heads:
        raise UnsupportedModelError(
            f"layer {module.layer_idx} has {key.shape[1]} KV heads, but the plan has rules for {plan.model.kv_heads}"
        )
    if attention_mask is not None and attention_mask.ndim != 2:
        raise UnsupportedModelError("under a plan the attention mask must be 2-D [rows, tokens], ones for real tokens")
    if sliding_window is None:
        sliding_window = masked_window(module)
    options = AttentionOptions(query.shape[3] ** -0.5 if scaling is None else scaling, softcap, s_aux, sliding_window)
    valid = None if attention_mask is None else attention_mask.cpu().numpy()
    handle = getattr(key, "span_cache", None)
    if handle is not None:
        cache, layer = handle
        if cache.plan is not plan and cache.plan != plan:
            raise CacheError("the SpanCache was made for another plan than the one in force; make a new cache")
        output = cache.attend(layer, query, key, value, valid, options, in_force.backend)
    elif key.shape[2] != query.shape[2]:
        raise CacheError(
            "a cache that is not a SpanCache was used under a plan; pass past_key_values=SpanCache(plan, lengths=...), "
            "or let generate make the cache"
        )
    else:
        output = _without_cache(in_force, module.layer_idx, query, key, value, valid, options)
    return output.transpose(1, 2).contiguous(), None


def _check_nothing_cached_is_hidden(cache: SpanCache, mask: torch.Tensor | None) -> None:
    """Raise CacheError if a mask of several turns hides tokens that the cache holds, or shows some that it does not."""
    layer = cache.span_layers[0]
    if not layer.is_initialized:
        return
    if mask is None:
        real = np.full(len(layer.seen), layer.columns)
    else:
        real = (mask[:, : layer.columns] != 0).sum(dim=1).cpu().numpy()
    if len(real) == len(layer.seen) and (real != layer.seen).any():
        raise CacheError(
            f"the attention mask has {real.tolist()} real tokens a row where the SpanCache holds "
            f"{layer.seen.tolist()}: what is in the cache can be neither hidden nor shown later, such as the padding "
            "behind an answer that ended before the others of its batch. Go on with one conversation at a time, or "
            "give the whole of it to a new cache"
        )


def _without_cache(
    in_force: _InForce,
    layer: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    valid: np.ndarray | None,
    options: AttentionOptions,
) -> torch.Tensor:
    """Attention of whole sequences: N is each row's own length."""
    rows, _, tokens, _ = query.shape
    plan = in_force.plan
    backend = backends.pick(key.device, key.dtype, key.shape[-1], in_force.backend)
    if valid is None:
        spans = np.repeat(plan.spans(tokens)[layer][None], rows, axis=0)
        return backend.prefill(query, key, value, spans, plan.sink, options)
    output = value.new_zeros(*query.shape[:3], value.shape[3])
    for row in range(rows):
        columns = torch.from_numpy(np.flatnonzero(valid[row])).to(query.device)
        if len(columns):
            q, k, v = (tensor[row : row + 1].index_select(2, columns) for tensor in (query, key, value))
            spans = plan.spans(len(columns))[layer][None]
            output[row, :, columns] = backend.prefill(q, k, v, spans, plan.sink, options)[0]
    return output


def _mask(
    batch_size: int,
    q_length: int,
    q_offset: int = 0,
    attention_mask: torch.Tensor | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> torch.Tensor | None:
    """Which of the new tokens are real: bool [rows, q_length], or None if all are. No N x N mask is ever made."""
    if not allow_is_causal_skip:
        raise UnsupportedModelError(
            "under a plan attention is causal with padding at most: packed sequences and masks of the model's own "
            "(bidirectional blocks, images) are not covered"
        )
    if attention_mask is None:
        return None
    new = attention_mask[:, q_offset : q_offset + q_length]
    if new.shape[1] != q_length:
        raise CacheError(
            f"the attention mask has {attention_mask.shape[1]} columns, but there are {q_offset} cached and {q_length} "
            "new tokens, which need one each"
        )
    return None if new.all() else new


@contextmanager
def hidden_from_compilers() -> Iterator[None]:
    """Inside, `torch.compile` calls our attention as it is instead of looking into it."""
    AttentionInterface.register(NAME, _opaque_attention())
    try:
        yield
    finally:
        AttentionInterface.register(NAME, _attention)


@cache
def _opaque_attention() -> Callable[..., Any]:
    """Made once, since compilers tell functions apart by identity, and when asked for: it loads the compiler."""
    opaque: Callable[..., Any] = torch.compiler.disable(_attention)
    return opaque


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)
