"""Span attention by our Triton kernels: the same two functions as `moa.attention.sdpa`, for NVIDIA GPUs.

Everything a step needs lies on the device, so decoding asks the host nothing.
"""

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import ParamSpec, TypeVar

import numpy as np
import torch

from moa.attention.options import AttentionOptions, effective_span
from moa.attention.triton_decode import WorkList, decode, work_list
from moa.attention.triton_prefill import prefill as prefill_kernel
from moa.attention.triton_store import store as store_kernel
from moa.errors import CacheError
from moa.storage import SpanStore

_PROGRAMS_PER_PROCESSOR = 3  # pieces of a decode step: enough to even out, few enough to add up fast
HEAD_DIMS = (16, 256)
_WORK = "work_list"  # where a store keeps its work list


def unsupported(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why the kernels cannot take this case, or None."""
    if device.type != "cuda" and not _interpreted():
        return f"they need an NVIDIA GPU, not {device.type}"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"they take float32, bfloat16 and float16, not {dtype}"
    if not HEAD_DIMS[0] <= head_dim <= HEAD_DIMS[1]:
        return f"they take head dimensions of {HEAD_DIMS[0]} to {HEAD_DIMS[1]}, not {head_dim}"
    return None


P = ParamSpec("P")
T = TypeVar("T")


def _on_its_device(function: Callable[P, T]) -> Callable[P, T]:
    """Triton launches on the current device, which need not be that of the tensors."""

    @wraps(function)
    def run(*arguments: P.args, **options: P.kwargs) -> T:
        with torch.cuda.device_of(next(argument for argument in arguments if isinstance(argument, torch.Tensor))):
            return function(*arguments, **options)

    return run


@_on_its_device
def prefill(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    spans: np.ndarray,
    sink: int,
    options: AttentionOptions,
) -> torch.Tensor:
    """Attention of whole sequences without padding; see `moa.attention.sdpa.prefill`."""
    capacity = spans if options.sliding_window is None else np.minimum(spans, options.sliding_window)
    counts = torch.from_numpy(capacity.reshape(-1).astype(np.int32)).to(query.device)
    nothing = torch.zeros_like(counts)
    key, value = _rows_contiguous(key), _rows_contiguous(value)
    return prefill_kernel(
        _rows_contiguous(query),
        key,
        value,
        key,
        value,
        nothing,
        counts,
        nothing,
        nothing[: len(query)],
        effective_span(0, sink, options.sliding_window)[1],
        False,
        False,
        options.scaling,
        options.softcap or 0.0,
        options.sink_logits,
    )


@_on_its_device
def attend(
    store: SpanStore,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    valid: np.ndarray | None,
    options: AttentionOptions,
) -> torch.Tensor:
    """Attention of new tokens, which are stored; see `moa.attention.sdpa.attend`.

    Raises
    ------
    CacheError
        If padding is not on the left of a row's new tokens.
    """
    counts = store.on_device
    new = query.shape[2]
    if valid is None:
        first_columns = np.zeros(store.rows, np.int64)
        first = _zeros(store.rows, query.device)
    else:
        first_columns = new - valid.sum(axis=1)
        if not (valid == (np.arange(new) >= first_columns[:, None])).all():
            raise CacheError(
                "new tokens have padding after real tokens; pad on the left, and give generate() an attention_mask: "
                "without one it takes every padding token for padding"
            )
        first = torch.from_numpy(first_columns.astype(np.int32)).to(query.device)
    past = bool(store.written.any())
    store.written += np.repeat(new - first_columns, store.heads)
    softcap = options.softcap or 0.0
    query, key, value = _rows_contiguous(query), _rows_contiguous(key), _rows_contiguous(value)
    if new == 1 and valid is None:
        work = _work(store)
        output = decode(
            query[:, :, 0],
            key[:, :, 0],
            value[:, :, 0],
            store.keys,
            store.values,
            counts.offset,
            counts.capacity,
            counts.written,
            work.pair,
            work.start,
            work.first,
            work.length,
            store.sink,
            options.scaling,
            softcap,
            options.sink_logits,
        )
        return output[:, :, None]
    output = prefill_kernel(
        query,
        key,
        value,
        store.keys,
        store.values,
        counts.offset,
        counts.capacity,
        counts.written,
        first,
        store.sink,
        past,
        valid is not None,
        options.scaling,
        softcap,
        options.sink_logits,
    )
    store_kernel(
        key, value, store.keys, store.values, counts.offset, counts.capacity, counts.written, first, store.sink
    )
    return output


def transposed(dtype: torch.dtype) -> bool:
    """Never: the kernels read keys and values by rows."""
    return False


def recordable(store: SpanStore) -> bool:
    """Whether decode steps may become part of a CUDA graph: from the second one on, they leave the host alone."""
    return store.keys.is_cuda and _WORK in store.__dict__


def _work(store: SpanStore) -> WorkList:
    """The store's work list, built at its first decode step."""
    found: WorkList | None = store.__dict__.get(_WORK)
    if found is None:
        found = work_list(store.capacity, store.keys.device, _PROGRAMS_PER_PROCESSOR * _processors(store.keys.device))
        store.__dict__[_WORK] = found
    return found


@lru_cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 4
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@lru_cache
def _zeros(rows: int, device: torch.device) -> torch.Tensor:
    return torch.zeros(rows, dtype=torch.int32, device=device)


def _rows_contiguous(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _interpreted() -> bool:
    from triton import knobs

    return bool(knobs.runtime.interpret)
