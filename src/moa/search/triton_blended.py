"""Blended attention on an NVIDIA GPU (`moa.search.blended_attention` says what it is), linear in memory.

The forward pass is that of a prompt, once for each span, and keeps every span's output and log-sum-exp. Backward, all
spans share one attention matrix, that of the longest: with C and E of the definition times its sum, each a number for
every row and band, gradients are those of plain attention but for two factors. So a program walks over the keys (or
rows) of one band after another; tiles on the border of two are visited for both. There are no atomic additions:
repeated runs are bit-identical.
"""

from functools import cache

import torch
import triton
import triton.language as tl

from moa.attention.options import AttentionOptions
from moa.attention.triton_decode import LOG2_E, softcapped
from moa.attention.triton_prefill import launch as launch_forward
from moa.attention.triton_store import tile_size

_ROWS = 64  # of a tile, where nothing is multiplied
_MOST_LOG2 = 100.0  # how much less a span may see than the longest, in powers of two, before it counts as seeing more


@triton.jit
def _gradients(q, k, v, d_o, lse, c, e, seen, scale_log2, softcap, SOFTCAP: tl.constexpr):
    """Blended attention and the gradient of the logits of a tile: rows times keys, both."""
    s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
    if SOFTCAP:
        s = softcapped(s, softcap)
    p = tl.where(seen, tl.exp2(s - lse[:, None]), 0.0)
    flow = p * (c[:, None] * tl.dot(d_o, tl.trans(v), input_precision="ieee") - e[:, None])
    if SOFTCAP:
        tanh = s / (softcap * LOG2_E)
        flow = flow * (1 - tanh * tanh)
    return p * c[:, None], flow


@triton.jit
def _row_kernel(
    query,
    key,
    value,
    d_out,
    lse,
    shares,
    means,
    windows,
    d_query,
    scaling,
    scale_log2,
    softcap,
    sink,
    length,
    heads,
    bands,
    q_head,
    q_token,
    k_head,
    k_token,
    v_head,
    v_token,
    o_head,
    o_token,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    D_TILE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    head = tl.program_id(1)
    m = first + tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, D_TILE)
    live = m < length
    row_mask = live[:, None] & (d < D)[None, :]
    q = tl.load(
        query + head.to(tl.int64) * q_head + m[:, None].to(tl.int64) * q_token + d[None, :], mask=row_mask, other=0.0
    )
    d_o = tl.load(
        d_out + head.to(tl.int64) * o_head + m[:, None].to(tl.int64) * o_token + d[None, :], mask=row_mask, other=0.0
    )
    row_lse = tl.load(lse + head.to(tl.int64) * length + m, mask=live, other=float("inf"))
    k_tile = key + (head // GROUP).to(tl.int64) * k_head + n[:, None].to(tl.int64) * k_token + d[None, :]
    v_tile = value + (head // GROUP).to(tl.int64) * v_head + n[:, None].to(tl.int64) * v_token + d[None, :]
    d_q = tl.zeros([BLOCK_M, D_TILE], tl.float32)
    end = tl.minimum(first + BLOCK_M, length)
    near = 0
    for step in range(bands + 1):
        band = tl.maximum(step - 1, 0)  # first the sink, which is of band 0
        far = tl.load(windows + band)
        at_row = (band * heads + head).to(tl.int64) * length + m
        c = tl.load(shares + at_row, mask=live, other=0.0)
        e = tl.load(means + at_row, mask=live, other=0.0)
        low = tl.where(step == 0, 0, tl.maximum(first - far + 1, sink)) // BLOCK_N * BLOCK_N
        high = tl.where(step == 0, tl.minimum(sink, end), end - near)
        for at in range(low, high, BLOCK_N):
            j = at + n
            key_mask = (j < length)[:, None] & (d < D)[None, :]
            k = tl.load(k_tile + tl.cast(at, tl.int64) * k_token, mask=key_mask, other=0.0)
            v = tl.load(v_tile + tl.cast(at, tl.int64) * v_token, mask=key_mask, other=0.0)
            distance = m[:, None] - j[None, :]
            of_band = (j >= sink)[None, :] & (distance >= near) & (distance < far)
            seen = live[:, None] & tl.where(step == 0, (j < sink)[None, :] & (distance >= 0), of_band)
            _, flow = _gradients(q, k, v, d_o, row_lse, c, e, seen, scale_log2, softcap, SOFTCAP)
            d_q = tl.dot(flow.to(k.dtype), k, d_q, input_precision="ieee")
        near = tl.where(step == 0, 0, far)
    tl.store(
        d_query + (m[:, None].to(tl.int64) * heads + head) * D + d[None, :],
        (d_q * scaling).to(d_query.dtype.element_ty),
        mask=row_mask,
    )


@triton.jit
def _column_kernel(
    query,
    key,
    value,
    d_out,
    lse,
    shares,
    means,
    windows,
    d_key,
    d_value,
    scaling,
    scale_log2,
    softcap,
    sink,
    length,
    heads,
    bands,
    q_head,
    q_token,
    k_head,
    k_token,
    v_head,
    v_token,
    o_head,
    o_token,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    D_TILE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    first = tl.program_id(0) * BLOCK_N  # early keys are seen by the most rows and start first
    head = tl.program_id(1)
    kv_head = head // GROUP
    j = first + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, D_TILE)
    key_mask = (j < length)[:, None] & (d < D)[None, :]
    k = tl.load(
        key + kv_head.to(tl.int64) * k_head + j[:, None].to(tl.int64) * k_token + d[None, :], mask=key_mask, other=0.0
    )
    v = tl.load(
        value + kv_head.to(tl.int64) * v_head + j[:, None].to(tl.int64) * v_token + d[None, :], mask=key_mask, other=0.0
    )
    d_k = tl.zeros([BLOCK_N, D_TILE], tl.float32)
    d_v = tl.zeros([BLOCK_N, D_TILE], tl.float32)
    last = tl.minimum(first + BLOCK_N, length) - 1
    near = 0
    for step in range(bands + 1):
        band = tl.maximum(step - 1, 0)
        far = tl.load(windows + band)
        low = tl.where(step == 0, first, first + near) // BLOCK_M * BLOCK_M
        high = tl.minimum(tl.where(step == 0, tl.where(first < sink, length, 0), last + far), length)
        for at in range(low, high, BLOCK_M):
            i = at + m
            live = i < length
            row_mask = live[:, None] & (d < D)[None, :]
            row = i[:, None].to(tl.int64)
            q = tl.load(query + head.to(tl.int64) * q_head + row * q_token + d[None, :], mask=row_mask, other=0.0)
            d_o = tl.load(d_out + head.to(tl.int64) * o_head + row * o_token + d[None, :], mask=row_mask, other=0.0)
            row_lse = tl.load(lse + head.to(tl.int64) * length + i, mask=live, other=float("inf"))
            at_row = (band * heads + head).to(tl.int64) * length + i
            c = tl.load(shares + at_row, mask=live, other=0.0)
            e = tl.load(means + at_row, mask=live, other=0.0)
            distance = i[:, None] - j[None, :]
            of_band = (j >= sink)[None, :] & (distance >= near) & (distance < far)
            seen = live[:, None] & tl.where(step == 0, (j < sink)[None, :] & (distance >= 0), of_band)
            blended, flow = _gradients(q, k, v, d_o, row_lse, c, e, seen, scale_log2, softcap, SOFTCAP)
            d_v = tl.dot(tl.trans(blended.to(d_o.dtype)), d_o, d_v, input_precision="ieee")
            d_k = tl.dot(tl.trans(flow.to(q.dtype)), q, d_k, input_precision="ieee")
        near = tl.where(step == 0, 0, far)
    at = (head.to(tl.int64) * length + j[:, None]) * D + d[None, :]
    tl.store(d_key + at, d_k * scaling, mask=key_mask)
    tl.store(d_value + at, d_v, mask=key_mask)


@triton.jit
def _blend_kernel(
    outs,
    weights,
    blended,
    length,
    heads,
    bands,
    w_head,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    D_TILE: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """The weighted sum of what the spans give: rows of one head."""
    head = tl.program_id(1)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, D_TILE)
    mask = (m < length)[:, None] & (d < D)[None, :]
    at = (m[:, None].to(tl.int64) * heads + head) * D + d[None, :]
    total = tl.zeros([BLOCK_M, D_TILE], tl.float32)
    for band in range(bands):
        w = tl.load(weights + (head // GROUP).to(tl.int64) * w_head + band)
        total += w * tl.load(outs + tl.cast(band, tl.int64) * length * heads * D + at, mask=mask, other=0.0)
    tl.store(blended + at, total.to(blended.dtype.element_ty), mask=mask)


@triton.jit
def _prepare_kernel(
    outs,
    d_out,
    lse,
    weights,
    shares,
    means,
    slopes,
    length,
    heads,
    bands,
    w_head,
    o_head,
    o_token,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    D_TILE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    MOST_LOG2: tl.constexpr,
):
    """C and E of every row and band, times the sum of the longest span, and each tile's part of dw."""
    tile = tl.program_id(0)
    head = tl.program_id(1)
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, D_TILE)
    live = m < length
    mask = live[:, None] & (d < D)[None, :]
    at = (m[:, None].to(tl.int64) * heads + head) * D + d[None, :]
    o_at = head.to(tl.int64) * o_head + m[:, None].to(tl.int64) * o_token + d[None, :]
    d_o = tl.load(d_out + o_at, mask=mask, other=0.0).to(tl.float32)
    row = head.to(tl.int64) * length + m
    plane = tl.cast(heads, tl.int64) * length
    longest = tl.load(lse + (bands - 1) * plane + row, mask=live, other=0.0)
    share = tl.zeros([BLOCK_M], tl.float32)
    mean = tl.zeros([BLOCK_M], tl.float32)
    for step in range(bands):
        band = bands - 1 - step
        w = tl.load(weights + (head // GROUP).to(tl.int64) * w_head + band)
        own = tl.sum(tl.load(outs + band * plane * D + at, mask=mask, other=0.0).to(tl.float32) * d_o, 1)
        less = longest - tl.load(lse + band * plane + row, mask=live, other=0.0)
        part = w * tl.exp2(tl.minimum(less, MOST_LOG2))
        share += part
        mean += part * own
        tl.store(shares + band * plane + row, share, mask=live)
        tl.store(means + band * plane + row, mean, mask=live)
        tl.store(slopes + (band * heads + head).to(tl.int64) * tl.num_programs(0) + tile, tl.sum(own, 0))


def blended_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    weights: torch.Tensor,
    windows: list[int],
    sink: int,
    options: AttentionOptions,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Blended attention, and what each span gives.

    Parameters
    ----------
    query : [query_heads, N, head_dim]
    key, value : [kv_heads, N, head_dim]
    weights : [kv_heads, spans]
    windows : rising integers
        Spans less the sink.
    sink : int
    options : AttentionOptions

    Returns
    -------
    blended : [query_heads, N, head_dim], dtype of ``query``
    outs : [spans, query_heads, N, head_dim], dtype of ``query``
    lse : float32 [spans, query_heads, N]
        Log-sum-exp of each row in units of log2, learned sink included.
    """
    heads, length, dim = query.shape
    count = len(windows)
    spans, _ = _on_device(tuple(windows), sink, key.shape[0], query.device)
    nothing = torch.zeros_like(spans)
    outs = query.new_empty(count, length, heads, dim).transpose(1, 2)
    lse = torch.empty(count, heads, length, device=query.device)
    q, k, v = (_contiguous_rows(tensor).expand(count, *tensor.shape) for tensor in (query, key, value))
    softcap = options.softcap or 0.0
    launch_forward(
        q,
        k,
        v,
        k,
        v,
        nothing,
        spans,
        nothing,
        nothing,
        sink,
        False,
        options.scaling,
        softcap,
        options.sink_logits,
        outs,
        lse,
    )
    weights = weights.float().contiguous()
    blended = query.new_empty(length, heads, dim).transpose(0, 1)
    group = heads // key.shape[0]
    _blend_kernel[(triton.cdiv(length, _ROWS), heads)](
        outs, weights, blended, length, heads, count, count, group, dim, tile_size(dim), _ROWS
    )
    return blended, outs, lse


def blended_backward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    weights: torch.Tensor,
    d_out: torch.Tensor,
    outs: torch.Tensor,
    lse: torch.Tensor,
    windows: list[int],
    sink: int,
    options: AttentionOptions,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key, value and weights.

    Parameters
    ----------
    d_out : [query_heads, N, head_dim]
    outs, lse
        What `blended_forward` returned; the other parameters are those it was given.
    """
    heads, length, dim = query.shape
    kv_heads = key.shape[0]
    group = heads // kv_heads
    query, key, value, d_out = (_contiguous_rows(tensor) for tensor in (query, key, value, d_out.to(query.dtype)))
    count, tiles = len(windows), triton.cdiv(length, _ROWS)
    _, limits = _on_device(tuple(windows), sink, kv_heads, query.device)
    shares, means = torch.empty(2, count, heads, length, device=query.device)
    slopes = torch.empty(count, kv_heads, group * tiles, device=query.device)
    _prepare_kernel[(tiles, heads)](
        outs,
        d_out,
        lse,
        weights.float().contiguous(),
        shares,
        means,
        slopes,
        length,
        heads,
        count,
        count,
        *d_out.stride()[:2],
        group,
        dim,
        tile_size(dim),
        _ROWS,
        _MOST_LOG2,
    )
    settings = (
        options.scaling,
        options.scaling * LOG2_E.value,
        options.softcap or 0.0,
        sink,
        length,
        heads,
        count,
        *(stride for tensor in (query, key, value, d_out) for stride in tensor.stride()[:2]),
        group,
        dim,
        tile_size(dim),
    )
    inputs = query, key, value, d_out, lse[-1], shares, means, limits
    block_m, block_n, warps, stages = _shape(dim, query.dtype)
    shape = block_m, block_n, options.softcap is not None
    each = torch.empty(2, kv_heads, group, length, dim, device=query.device)  # every query head's part
    _column_kernel[(triton.cdiv(length, block_n), heads)](
        *inputs, *each, *settings, *shape, num_warps=warps, num_stages=stages
    )
    d_query = torch.empty_like(query.transpose(0, 1), memory_format=torch.contiguous_format)
    _row_kernel[(triton.cdiv(length, block_m), heads)](
        *inputs, d_query, *settings, *shape, num_warps=warps, num_stages=stages
    )
    d_key, d_value = each.sum(2)
    return d_query.transpose(0, 1), d_key, d_value, slopes.sum(-1).T


@cache
def _on_device(
    windows: tuple[int, ...], sink: int, kv_heads: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Spans for every KV head, int32 [spans * kv_heads], and windows, int32 [spans]."""
    limits = torch.tensor(windows, dtype=torch.int32, device=device)
    return (limits + sink).repeat_interleave(kv_heads), limits


def _contiguous_rows(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _shape(head_dim: int, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """Rows and keys of a tile, warps and stages."""
    if dtype == torch.float32:
        return 32, 32, 8, 1  # small: Triton unrolls such products, and compiles for long
    return (64, 64, 4, 2) if head_dim <= 128 else (32, 64, 8, 1)
