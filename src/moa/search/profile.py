"""The profile stage: what every window of every query head would cost, from one backward pass per calibration item.

The model runs as it is, with its attention exchanged for `influence_attention` through transformers' registry. Only
the answer's tokens carry loss; the gradient enters at the embeddings, the weights stay frozen, and layers are computed
a second time in the backward pass, so that memory does not grow with depth.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial as bind
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_layers import GradientCheckpointingLayer

from moa.attention.options import AttentionOptions
from moa.errors import InputError, UnsupportedModelError
from moa.files import read_tensors, write_tensors
from moa.models import LoadedModel
from moa.plan import ModelIdentity
from moa.progress import SILENT, Progress
from moa.search.influence import Estimator, InfluenceCollector, influence_attention
from moa.search.items import CalibrationItem, CalibrationSet
from moa.support import check_plannable, masked_window, text_part

NAME = "moa_influence"


@dataclass(frozen=True)
class ProfileConfig:
    """Settings of the profile stage.

    Attributes
    ----------
    estimator : Estimator
        JOINT measures the negative log-odds of the answer's tokens, which do not saturate where the model is sure;
        PAPER measures their cross-entropy.
    strip : int
        Query rows worked on at a time, where the Triton kernels do not run: memory grows with it.
    backend : str, optional
        As in `moa.attention.backends.pick`.
    """

    estimator: Estimator = Estimator.JOINT
    strip: int = 128
    backend: str | None = None


@dataclass(frozen=True)
class Profile:
    """Loss tables of the calibration items.

    Attributes
    ----------
    tables : dict of (length, source) to float64 [items, layers, query_heads, W]
        Entry w is the loss when every key beyond the sink and a window of ``BLOCK * (w + 1)`` is masked.
    """

    tables: dict[tuple[int, str], np.ndarray]

    @property
    def sources(self) -> set[str]:
        """The calibration sources, by name."""
        return {source for _, source in self.tables}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the tables as safetensors, under names like ``4096/retrieval``."""
        write_tensors(path, {f"{length}/{source}": table for (length, source), table in self.tables.items()})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Profile":
        """Read a profile written by `save`.

        Raises
        ------
        InputError
            If the file is missing, damaged or not a profile.
        """
        tables = {}
        for name, table in read_tensors(path).items():
            length, slash, source = name.partition("/")
            if not (length.isdecimal() and slash and table.ndim == 4):
                raise InputError(
                    f"{path} is not a profile: found {name!r} of shape {table.shape}; run the search again"
                )
            tables[int(length), source] = table
        return cls(dict(sorted(tables.items())))


def profile(
    loaded: LoadedModel,
    calibration: CalibrationSet,
    config: ProfileConfig,
    progress: Progress = SILENT,
    partial: Path | None = None,
) -> Profile:
    """Measure the loss tables of a model.

    Parameters
    ----------
    loaded : LoadedModel
        Left exactly as it was, also after an error.
    calibration : CalibrationSet
    config : ProfileConfig
    partial : Path, optional
        Folder for the tables of single items. What is already there is not measured again, so that an interrupted
        call continues; files of other items, models or estimators are not taken for it.

    Raises
    ------
    InputError
        If there is nothing to measure, or an item has no answer.
    UnsupportedModelError
        If the attention of some layer cannot be exchanged or is not plain causal attention, or a table is not finite.
    """
    work = [(key, item) for key, items in sorted(calibration.items.items()) for item in items]
    if not work:
        raise InputError("the calibration set is empty; nothing can be profiled")
    tables: dict[tuple[int, str], list[np.ndarray]] = {}
    with differentiable(loaded.model), _influence_attention_in(loaded.model):
        for key, item in progress.track(work, "profile"):
            file = partial / _file_name(loaded, key, item, config.estimator) if partial else None
            if file is not None and file.exists():
                table = read_tensors(file)["table"]
            else:
                table = _measure(loaded, item, config)
                if file is not None:
                    write_tensors(file, {"table": table})
            tables.setdefault(key, []).append(table)
    return Profile({key: np.stack(measured) for key, measured in tables.items()})


def item_losses(profile: Profile, kv_heads: int, weights: Mapping[str, float]) -> dict[int, dict[str, np.ndarray]]:
    """Loss tables per KV head of every item, in units of their source.

    Parameters
    ----------
    profile : Profile
    kv_heads : int
        A KV head's loss is the sum over its query heads.
    weights : mapping of source to float
        Every source counts as much as its weight: that is its items' mean total at the shortest window.

    Returns
    -------
    dict of length to dict of source to float64 [items, layers, kv_heads, W]

    Raises
    ------
    InputError
        If the weights do not name exactly the profile's sources, or kv_heads does not divide the query heads.
    """
    if set(weights) != profile.sources:
        raise InputError(
            f"weights are given for {sorted(weights)}, but the profile has {sorted(profile.sources)}; name the same"
        )
    losses: dict[int, dict[str, np.ndarray]] = {}
    for (length, source), table in sorted(profile.tables.items()):
        items, layers, query_heads, windows = table.shape
        if query_heads % kv_heads:
            raise InputError(f"{query_heads} query heads cannot be shared by {kv_heads} KV heads; check the model")
        grouped = table.reshape(items, layers, kv_heads, -1, windows).sum(axis=3)
        total = grouped[..., 0].sum() / items
        # at lengths that one window covers nothing can be lost
        losses.setdefault(length, {})[source] = grouped * (weights[source] / total) if total > 0 else grouped
    return losses


def kv_losses(profile: Profile, kv_heads: int, weights: Mapping[str, float]) -> dict[int, np.ndarray]:
    """Loss tables per KV head, mean over items, calibration sources mixed; arguments and errors as in `item_losses`.

    Returns
    -------
    dict of length to float64 [layers, kv_heads, W]
    """
    return mean_losses(item_losses(profile, kv_heads, weights))


def mean_losses(items: Mapping[int, Mapping[str, np.ndarray]]) -> dict[int, np.ndarray]:
    """The tables of `item_losses`, mean over items, summed over sources."""
    return {length: np.sum([table.mean(0) for table in tables.values()], axis=0) for length, tables in items.items()}


def answer_loss(logits: torch.Tensor, answer: torch.Tensor, estimator: Estimator) -> torch.Tensor:
    """Mean loss of the answer's tokens, a scalar in float32 or better.

    Parameters
    ----------
    logits : [tokens, vocabulary]
    answer : int64 [tokens]
    estimator : Estimator
        JOINT: negative log-odds ``-(log p - log(1 - p))``. PAPER: cross-entropy ``-log p``.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if estimator is Estimator.PAPER:
        return torch.nn.functional.cross_entropy(logits, answer)
    # log p - log(1 - p) = z_answer - logsumexp of all other z: no 1 - p to lose digits
    own = answer.unsqueeze(1)
    return (logits.scatter(1, own, -torch.inf).logsumexp(1) - logits.gather(1, own).squeeze(1)).mean()


def _measure(loaded: LoadedModel, item: CalibrationItem, config: ProfileConfig) -> np.ndarray:
    """Loss table of one item, float64 [layers, query_heads, W]."""
    model, identity = loaded.model, loaded.identity
    length = len(item.input_ids)
    if not (len(item.loss) and 1 <= item.loss.min() <= item.loss.max() < length):
        raise InputError(
            f"a calibration item of {length} tokens has its answer at {item.loss.tolist()}; expected a prompt and an "
            "answer of at least one token each"
        )
    ids = torch.as_tensor(item.input_ids, dtype=torch.int64, device=model.device)
    empty = InfluenceCollector(config.estimator, config.strip, config.backend)
    with _collecting(identity, empty) as collector, torch.enable_grad():
        places = torch.as_tensor(item.loss, device=model.device)
        # a token is predicted one place before it
        logits = model(input_ids=ids[None], use_cache=False, logits_to_keep=places - 1).logits
        answer_loss(logits[0], ids[places], config.estimator).backward()
    silent = sorted(set(range(identity.layers)) - collector.tables.keys())
    if silent:
        raise UnsupportedModelError(
            f"layers {silent} of this {identity.model_type} model have no attention that could be measured (linear "
            "attention, state spaces or the like); plans need plain attention in every layer"
        )
    table = torch.stack([collector.tables[layer] for layer in range(identity.layers)]).cpu().numpy()
    if not np.isfinite(table).all():
        raise UnsupportedModelError(
            f"profiling this {identity.model_type} model in {model.dtype} overflows; load it in float32 or bfloat16"
        )
    return table


def _file_name(loaded: LoadedModel, key: tuple[int, str], item: CalibrationItem, estimator: Estimator) -> str:
    """Name of an item's file: the same only for the same measurement."""
    digest = hashlib.sha256(np.asarray(item.input_ids, np.int64).tobytes())
    digest.update(repr((item.loss.tolist(), str(estimator), loaded.weights, loaded.identity)).encode())
    return f"{key[0]}-{key[1]}-{digest.hexdigest()[:16]}.safetensors"


# The model while it is measured ---------------------------------------------------------------------------------------


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


@contextmanager
def _influence_attention_in(model: PreTrainedModel) -> Iterator[None]:
    """Exchange the model's attention for `_attention`."""
    check_plannable(model)
    part, text = text_part(model)
    before = text._attn_implementation

    def switch(implementation: str) -> None:
        model.set_attn_implementation(implementation if part is None else {part: implementation})

    try:
        switch(NAME)
        if text._attn_implementation != NAME:
            raise UnsupportedModelError(
                f"{text.model_type} models do not let their attention be exchanged (transformers keeps "
                f"{text._attn_implementation!r}), so they cannot be profiled"
            )
        yield
    finally:
        switch(before)


# Where the attention function of the running `profile` reports. Not a context variable: on a GPU layers are recomputed
# in autograd's own thread.
_running: tuple[ModelIdentity, InfluenceCollector] | None = None


@contextmanager
def _collecting(identity: ModelIdentity, collector: InfluenceCollector) -> Iterator[InfluenceCollector]:
    global _running
    _running = identity, collector
    try:
        yield collector
    finally:
        _running = None


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
    """The attention function that transformers calls; tensors [1, heads, N, head_dim], without dropout."""
    if _running is None:
        raise UnsupportedModelError(f"attention {NAME!r} is for profiling only; choose another attn_implementation")
    identity, collector = _running
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
    if sliding_window is None:
        sliding_window = masked_window(module)
    options = AttentionOptions(scaling, softcap, s_aux, sliding_window)
    out = influence_attention(query[0], key[0], value[0], options, collector, module.layer_idx)
    return out.transpose(0, 1).unsqueeze(0).contiguous(), None


def _mask(allow_is_causal_skip: bool = True, **kwargs: Any) -> None:
    """Calibration items are single sequences without padding, so no mask is needed."""
    if not allow_is_causal_skip:
        raise UnsupportedModelError("the model masks more than the future of each token; plans are for causal decoders")


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)
