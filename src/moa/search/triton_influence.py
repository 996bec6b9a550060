"""Influence on an NVIDIA GPU: attention, its gradients and the loss table in memory linear in the length.

Three kernels follow the forward pass, which is that of a prompt and also leaves the log-sum-exp of each row: one for
the gradients of key and value (`moa.search.triton_influence_columns`), one for the gradient of the query, which leaves
sums by distance, and one that makes the table of these (`moa.search.triton_influence_rows`).

The sums of the middle step are as large as [heads, N / 64, rows]; rows are worked on in chunks, so that this too stays
linear. There are no atomic additions: repeated runs are bit-identical.
"""

import torch
import triton

from moa.attention.triton_decode import LOG2_E
from moa.attention.triton_prefill import launch as launch_forward
from moa.attention.triton_store import tile_size
from moa.search.tables import BLOCK
from moa.search.triton_influence_columns import column_kernel
from moa.search.triton_influence_rows import row_kernel, table_kernel

_ROWS_AT_ONCE = 4096


@torch.library.custom_op("moa::influence_forward", mutates_args=())
def influence_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
    softcap: float,
    window: int | None,
    sink_logits: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention of one sequence: weights are rounded to the values' dtype, what they add up to is not.

    Parameters
    ----------
    query : [query_heads, N, head_dim]
    key, value : [kv_heads, N, head_dim]
        Last dimensions contiguous.
    scaling : float
    softcap : float
        0 for none.
    window : int, optional
        The layer's own sliding window, or None; such a layer keeps no sink.
    sink_logits : [query_heads], optional

    Returns
    -------
    out : float32 [query_heads, N, head_dim], as a view of [N, query_heads, head_dim]
    lse : float32 [query_heads, N]
        Log-sum-exp of each row in units of log2, learned sink included.
    """
    heads, length, _ = query.shape
    spans = torch.full((key.shape[0],), min(window or length, length), dtype=torch.int32, device=query.device)
    nothing = torch.zeros_like(spans)
    out = torch.empty(1, length, heads, value.shape[-1], dtype=torch.float32, device=query.device).transpose(1, 2)
    lse = torch.empty(heads, length, dtype=torch.float32, device=query.device)
    q, k, v = query[None], key[None], value[None]
    launch_forward(
        q, k, v, k, v, nothing, spans, nothing, nothing[:1], 0, False, scaling, softcap, sink_logits, out, lse
    )
    return out[0], lse


@influence_forward.register_fake
def _(query, key, value, *others):  # type: ignore[no-untyped-def]
    heads, length, dim = query.shape
    out = query.new_empty(length, heads, dim, dtype=torch.float32).transpose(0, 1)
    return out, query.new_empty(heads, length, dtype=torch.float32)


@torch.library.custom_op("moa::influence_backward", mutates_args=())
def influence_backward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    d_out: torch.Tensor,
    joint: bool,
    windows: int,
    scaling: float,
    softcap: float,
    window: int | None,
    sink_logits: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key and value, and the loss table.

    Parameters
    ----------
    query, key, value, scaling, softcap, window, sink_logits
        As in `influence_forward`.
    out, lse
        What it returned.
    d_out : [query_heads, N, head_dim]
        Last dimension contiguous.
    joint : bool
        Which estimator: joint or the paper's.
    windows : int
        Entries of the table, W.

    Returns
    -------
    d_query, d_key, d_value
        Shapes and dtypes of query, key and value.
    table : float64 [query_heads, W]
    """
    heads, length, d = query.shape
    kv_heads = key.shape[0]
    row_mean = (d_out.float() * out).sum(-1)  # R_i
    window_size = min(window or length, length)
    windowed = window_size < length
    blocks = triton.cdiv(length, BLOCK)
    options = scaling, scaling * LOG2_E.value, softcap, length, window_size
    strides = tuple(stride for tensor in (query, key, value, d_out) for stride in tensor.stride()[:2])
    group = heads // kv_heads
    rows_shape, columns_shape = _shapes(d, query.dtype)

    d_key, d_value = (
        torch.empty_like(tensor.transpose(0, 1), memory_format=torch.contiguous_format) for tensor in (key, value)
    )
    block_m, block_n, warps, stages = columns_shape
    column_kernel[(triton.cdiv(length, block_n), kv_heads)](
        query,
        key,
        value,
        d_out,
        lse,
        row_mean,
        d_key,
        d_value,
        *options,
        kv_heads,
        *strides,
        group,
        d,
        tile_size(d),
        block_m,
        block_n,
        windowed,
        softcap > 0,
        num_warps=warps,
        num_stages=stages,
    )

    d_query = torch.empty_like(query.transpose(0, 1), memory_format=torch.contiguous_format)
    chunk = min(_ROWS_AT_ONCE, blocks * BLOCK)
    sums = row_mean.new_empty(2 if joint else 1, heads, blocks, chunk)
    rest = row_mean.new_empty(2, heads, chunk)
    partial = row_mean.new_zeros(2 if joint else 1, heads, blocks, windows)
    planes = heads * blocks * chunk, heads * chunk
    block_m, warps, stages = rows_shape
    for first_row in range(0, length, chunk):
        rows = min(chunk, length - first_row)
        row_kernel[(triton.cdiv(rows, block_m), heads)](
            query,
            key,
            value,
            d_out,
            lse,
            row_mean,
            row_mean if sink_logits is None else sink_logits,
            d_query,
            sums,
            rest,
            *options,
            first_row,
            chunk,
            blocks,
            *planes,
            heads,
            *strides,
            group,
            d,
            tile_size(d),
            block_m,
            BLOCK,
            joint,
            window is None,
            windowed,
            softcap > 0,
            sink_logits is not None,
            num_warps=warps,
            num_stages=stages,
        )
        table_kernel[(triton.cdiv(rows, BLOCK), heads)](
            sums,
            rest,
            partial,
            length,
            window_size,
            first_row,
            chunk,
            blocks,
            *planes,
            heads * blocks * windows,
            windows,
            BLOCK,
            joint,
            window is None,
            num_warps=2,
        )
    table = partial.sum((0, 2), dtype=torch.float64)
    return d_query.transpose(0, 1), d_key.transpose(0, 1), d_value.transpose(0, 1), table


@influence_backward.register_fake
def _(query, key, value, out, lse, d_out, joint, windows, *others):  # type: ignore[no-untyped-def]
    gradients = (tensor.new_empty(*tensor.transpose(0, 1).shape).transpose(0, 1) for tensor in (query, key, value))
    return *gradients, query.new_empty(query.shape[0], windows, dtype=torch.float64)


def _shapes(head_dim: int, dtype: torch.dtype) -> tuple[tuple[int, int, int], tuple[int, int, int, int]]:
    """Tiles of the row kernel (rows, warps, stages) and of the column kernel (rows, keys, warps, stages): the fastest
    of those tried on an H100 in bfloat16, head_dim 128.
    """
    if dtype == torch.float32:
        return (32, 8, 1), (32, 32, 8, 1)  # small: Triton unrolls such products, and compiles for long
    if head_dim > 128:
        return (64, 8, 1), (32, 64, 8, 1)
    return (64, 4, 2), (64, 64, 4, 2)
