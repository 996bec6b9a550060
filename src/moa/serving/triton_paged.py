"""Span attention over an engine's pages on an NVIDIA GPU: all heads of a layer in one launch, whatever their spans.

Every KV head has pages and a table of its own, so a kernel finds them through addresses: one row of int64 for each
head. A step of single tokens is cut by tokens, not by heads, as in `moa.attention.triton_decode`: pieces of equal
length, from a list that depends on the spans alone, for each request; how much of a piece is filled is read on the
device, so that a CUDA graph can hold the step. A step with chunks of prompts walks over sink and window in tiles. The
definition is `moa.serving.paged.attend`.
"""

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
import triton
import triton.language as tl

from moa.attention.triton_decode import BLOCK, LOG2_E, WorkList, add_pieces, work_list
from moa.attention.triton_prefill import softmax_step
from moa.attention.triton_store import tile_size
from moa.serving.paged import Step

_FIELDS = 6  # of a head: pages, their stride in rows of D numbers, table, its stride, slots, window
_PROGRAMS = 132 * 8  # about as many pieces for all requests together keep a large GPU busy to the end


# What these two give is kept for good: recorded graphs read it. An engine's pages and tables stay where they are, so
# there are as many as layers, times a few sizes of batches.
@cache
def _addresses(rows: tuple[tuple[int, ...], ...], device: torch.device) -> torch.Tensor:
    """int64 [kv_heads, _FIELDS]."""
    return torch.tensor(rows, dtype=torch.int64).to(device)


@cache
def _pieces(spans: tuple[int, ...], programs: int, device: torch.device) -> WorkList:
    """Pieces of the heads, for one request."""
    return work_list(np.array(spans), device, programs)


@triton.jit
def _store_kernel(
    key,
    value,
    heads,
    tokens,
    k_token,
    k_head,
    v_token,
    v_head,
    FIELDS: tl.constexpr,
    D: tl.constexpr,
    D_TILE: tl.constexpr,
    SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    head = tl.program_id(1)
    entry = heads + head * FIELDS
    pages = tl.multiple_of(tl.load(entry).to(tl.pointer_type(key.dtype.element_ty)), 16)
    stride = tl.load(entry + 1)
    slots = tl.load(entry + 4).to(tl.pointer_type(tl.int64))
    t = tl.program_id(0) * TILE + tl.arange(0, TILE)
    slot = tl.load(slots + t, mask=t < tokens, other=-1)
    d = tl.arange(0, D_TILE)
    mask = (slot >= 0)[:, None] & (d < D)[None, :]
    at = pages + ((slot // SIZE * stride + slot % SIZE * 2) * D)[:, None] + d[None, :]
    row = t[:, None].to(tl.int64)
    tl.store(at, tl.load(key + row * k_token + head * k_head + d[None, :], mask=mask), mask=mask)
    tl.store(at + D, tl.load(value + row * v_token + head * v_head + d[None, :], mask=mask), mask=mask)


@triton.jit
def _decode_kernel(
    query,
    heads,
    lengths,
    piece_head,
    piece_start,
    partial,
    partial_high,
    partial_sum,
    scale_log2,
    length,
    sink,
    q_token,
    q_head,
    FIELDS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_TILE: tl.constexpr,
    D: tl.constexpr,
    D_TILE: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    piece = tl.program_id(0)
    request = tl.program_id(1)
    head = tl.load(piece_head + piece)
    start = tl.load(piece_start + piece)
    entry = heads + head * FIELDS
    pages = tl.multiple_of(tl.load(entry).to(tl.pointer_type(query.dtype.element_ty)), 16)
    stride = tl.load(entry + 1)
    table = tl.load(entry + 2).to(tl.pointer_type(tl.int32)) + request * tl.load(entry + 3)
    tokens = tl.load(lengths + request)
    visible = tl.minimum(tokens, sink + tl.load(entry + 5).to(tl.int32))
    gap = tokens - visible  # tokens between sink and window
    stop = tl.minimum(start + length, visible)

    g = tl.arange(0, GROUP_TILE)
    d = tl.arange(0, D_TILE)
    n = tl.arange(0, BLOCK)
    q_mask = (g < GROUP)[:, None] & (d < D)[None, :]
    q_at = query + request.to(tl.int64) * q_token + (head * GROUP + g)[:, None].to(tl.int64) * q_head + d[None, :]
    q = tl.load(q_at, mask=q_mask, other=0.0)
    high = tl.full([GROUP_TILE], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_TILE], tl.float32)
    mixed = tl.zeros([GROUP_TILE, D_TILE], tl.float32)
    for at in range(start, stop, BLOCK):
        index = at + n
        live = index < stop
        token = tl.where(index < sink, index, index + gap)
        page = tl.load(table + token // SIZE, mask=live, other=0).to(tl.int64)
        row = (page * stride + token % SIZE * 2) * D
        high, total, mixed = softmax_step(
            q,
            high,
            total,
            mixed,
            pages + row[None, :] + d[:, None],
            pages + D + row[:, None] + d[None, :],
            live[None, :] & (d < D)[:, None],
            live[:, None] & (d < D)[None, :],
            live[None, :],
            scale_log2,
            0.0,
            True,
            True,
            False,
        )
    row = (request * tl.num_programs(0) + piece) * GROUP + g
    tl.store(partial_high + row, high, mask=g < GROUP)
    tl.store(partial_sum + row, total, mask=g < GROUP)
    tl.store(partial + row[:, None] * D + d[None, :], mixed, mask=q_mask)


@triton.jit
def _combine_kernel(
    partial,
    partial_high,
    partial_sum,
    first,
    lengths,
    output,
    pieces,
    o_token,
    o_head,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    D_TILE: tl.constexpr,
    PIECES: tl.constexpr,
):
    request = tl.program_id(0)
    head = tl.program_id(1)
    g = tl.program_id(2)
    begin = request * pieces + tl.load(first + head)
    end = request * pieces + tl.load(first + head + 1)
    high = tl.load(partial_high + begin * GROUP + g)
    mixed, total = add_pieces(
        partial, partial_high, partial_sum, begin, end, g, high, high * 0, GROUP, D, D_TILE, PIECES
    )
    found = tl.where(tl.load(lengths + request) > 0, mixed / total, 0.0)
    d = tl.arange(0, D_TILE)
    at = output + request.to(tl.int64) * o_token + (head * GROUP + g).to(tl.int64) * o_head
    tl.store(at + d, found, mask=d < D)


@triton.jit
def _chunk_kernel(
    query,
    heads,
    starts,
    lengths,
    output,
    scale_log2,
    sink,
    group,
    q_token,
    q_head,
    o_token,
    o_head,
    FIELDS: tl.constexpr,
    D: tl.constexpr,
    D_TILE: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    head = tl.program_id(1)
    request = tl.program_id(2)
    row = tl.load(starts + request)
    new = tl.load(starts + request + 1) - row
    tokens = tl.load(lengths + request)
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M  # the tiles that see most begin first
    if (first >= new) | (tokens == 0):
        return
    entry = heads + head // group * FIELDS
    pages = tl.multiple_of(tl.load(entry).to(tl.pointer_type(query.dtype.element_ty)), 16)
    stride = tl.load(entry + 1)
    table = tl.load(entry + 2).to(tl.pointer_type(tl.int32)) + request * tl.load(entry + 3)
    window = tl.load(entry + 5).to(tl.int32)

    m = first + tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, D_TILE)
    q_mask = (m < new)[:, None] & (d < D)[None, :]
    at_row = (row + m)[:, None].to(tl.int64)
    q = tl.load(query + at_row * q_token + head.to(tl.int64) * q_head + d[None, :], mask=q_mask, other=0.0)
    i = tokens - new + m
    end = tokens - new + tl.minimum(first + BLOCK_M, new)  # one past the tile's last query
    low = tl.maximum(tokens - new + first - window + 1, 0)  # first key in any query's window
    near = tl.minimum(sink, low)
    visible = near + end - low
    high = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    mixed = tl.zeros([BLOCK_M, D_TILE], tl.float32)
    for at in range(0, visible, BLOCK_N):
        index = at + n
        live = index < visible
        j = tl.where(index < near, index, index - near + low)
        page = tl.load(table + j // SIZE, mask=live, other=0).to(tl.int64)
        place = (page * stride + j % SIZE * 2) * D
        seen = (j[None, :] <= i[:, None]) & ((j < sink)[None, :] | (i[:, None] - j[None, :] < window))
        high, total, mixed = softmax_step(
            q,
            high,
            total,
            mixed,
            pages + place[None, :] + d[:, None],
            pages + D + place[:, None] + d[None, :],
            live[None, :] & (d < D)[:, None],
            live[:, None] & (d < D)[None, :],
            live[None, :] & seen,
            scale_log2,
            0.0,
            True,
            True,
            False,
        )
    o_at = output + at_row * o_token + head.to(tl.int64) * o_head + d[None, :]
    tl.store(o_at, mixed / total[:, None], mask=q_mask)


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pages: Sequence[torch.Tensor],
    steps: Sequence[Step],
    scaling: float,
    output: torch.Tensor,
) -> None:
    """As `moa.serving.paged.attend`; a step of single tokens has one for each request.

    Parameters
    ----------
    query, output : [tokens, query heads, head_dim]
        Last dimension contiguous, as of all. ``output`` is written, but for rows of no request.
    key, value : [tokens, kv_heads, head_dim]
    pages : for each KV head, [pages, size, 2 * head_dim]
        Of the dtype of ``query``; tokens of a page one after the other.
    steps : for each KV head, Step
        ``lengths`` and ``starts`` are the same in all of them.
    scaling : float
    """
    query_heads, d = query.shape[1:]
    tokens, heads = len(steps[0].slots), key.shape[1]
    group = query_heads // heads
    step = steps[0]
    addresses = _addresses(
        tuple(
            (
                page.data_ptr(),
                page.stride(0) // d,
                each.table.data_ptr(),
                each.table.stride(0),
                each.slots.data_ptr(),
                each.window,
            )
            for page, each in zip(pages, steps, strict=True)
        ),
        query.device,
    )
    shape = d, tile_size(d), step.size
    stages = 3 if tile_size(d) * query.element_size() <= 512 else 1  # what fits on the chip
    tile = 1 if step.most == 1 else 16
    _store_kernel[(triton.cdiv(tokens, tile), heads)](
        key,
        value,
        addresses,
        tokens,
        *key.stride()[:2],
        *value.stride()[:2],
        _FIELDS,
        *shape,
        tile,
        num_warps=4,
    )
    requests = len(step.lengths)
    if step.most > 1:
        block = 64
        _chunk_kernel[(triton.cdiv(step.most, block), query_heads, requests)](
            query,
            addresses,
            step.starts,
            step.lengths,
            output,
            scaling * LOG2_E.value,
            step.sink,
            group,
            *query.stride()[:2],
            *output.stride()[:2],
            _FIELDS,
            *shape,
            block,
            block,
            num_warps=4,
            num_stages=stages,
        )
        return
    spans = tuple(min(each.sink + each.window, each.table.shape[1] * each.size) for each in steps)
    work = _pieces(spans, max(_PROGRAMS // requests, heads), query.device)
    pieces = len(work.pair)
    partial = torch.empty(requests * pieces * group, d, dtype=torch.float32, device=query.device)
    high = torch.empty(requests * pieces * group, dtype=torch.float32, device=query.device)
    total = torch.empty_like(high)
    _decode_kernel[(pieces, requests)](
        query,
        addresses,
        step.lengths,
        work.pair,
        work.start,
        partial,
        high,
        total,
        scaling * LOG2_E.value,
        work.length,
        step.sink,
        *query.stride()[:2],
        _FIELDS,
        group,
        tile_size(group),
        *shape,
        BLOCK,
        num_warps=2 if group == 1 else 8,
        num_stages=4 if stages == 3 and d <= 128 else stages,
    )
    _combine_kernel[(requests, heads, group)](
        partial,
        high,
        total,
        work.first,
        step.lengths,
        output,
        pieces,
        *output.stride()[:2],
        group,
        *shape[:2],
        64,
        num_warps=4,
    )
