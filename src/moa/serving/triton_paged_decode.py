"""Attention of single tokens over an engine's pages on an NVIDIA GPU.

A step is cut by tokens, not by heads, as in `moa.attention.triton_decode`: pieces of equal length, from a list that
depends on the spans alone, for each request; how much of a piece is filled is read on the device, so that a CUDA graph
can hold the step.
"""

from functools import cache

import numpy as np
import torch
import triton
import triton.language as tl

from moa.attention.triton_decode import BLOCK, LOG2_E, LONGEST, WorkList, add_pieces, work_list
from moa.attention.triton_prefill import softmax_step
from moa.attention.triton_store import tile_size
from moa.serving.paged import Step

_PROGRAMS = 132 * 8  # about as many pieces for all requests together keep a large GPU busy to the end
_MANY = 32  # requests; of more, pieces may be longer


# Kept for good: recorded graphs read it. There are as many as layers, times a few sizes of batches.
@cache
def _pieces(spans: tuple[int, ...], share: int, device: torch.device) -> WorkList:
    """Pieces of one request's heads, where there are about ``share`` requests."""
    programs = max(_PROGRAMS // share, len(spans))
    return work_list(np.array(spans), device, programs, LONGEST * max(1, share // _MANY))


@triton.jit
def _decode_kernel(
    query,
    heads,
    starts,
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
    start = tl.load(piece_start + piece)
    head = tl.load(piece_head + piece)
    entry = heads + head * FIELDS
    q_row = tl.load(starts + request)
    tokens = tl.load(lengths + request)
    visible = tl.minimum(tokens, sink + tl.load(entry + 5).to(tl.int32))
    if (start >= visible) | (tl.load(starts + request + 1) - q_row != 1):
        return
    pages = tl.multiple_of(tl.load(entry).to(tl.pointer_type(query.dtype.element_ty)), 16)
    stride = tl.load(entry + 1)
    table = tl.load(entry + 2).to(tl.pointer_type(tl.int32)) + request * tl.load(entry + 3)
    gap = tokens - visible  # tokens between sink and window
    stop = tl.minimum(start + length, visible)

    g = tl.arange(0, GROUP_TILE)
    d = tl.arange(0, D_TILE)
    n = tl.arange(0, BLOCK)
    q_mask = (g < GROUP)[:, None] & (d < D)[None, :]
    q_at = query + q_row.to(tl.int64) * q_token + (head * GROUP + g)[:, None].to(tl.int64) * q_head + d[None, :]
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
    row = (request.to(tl.int64) * tl.num_programs(0) + piece) * GROUP + g
    tl.store(partial_high + row, high, mask=g < GROUP)
    tl.store(partial_sum + row, total, mask=g < GROUP)
    tl.store(partial + row[:, None] * D + d[None, :], mixed, mask=q_mask)


@triton.jit(do_not_specialize=["pieces"])
def _combine_kernel(
    partial,
    partial_high,
    partial_sum,
    heads,
    starts,
    lengths,
    first,
    output,
    pieces,
    length,
    sink,
    o_token,
    o_head,
    FIELDS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    D_TILE: tl.constexpr,
    PIECES: tl.constexpr,
):
    request = tl.program_id(0)
    head = tl.program_id(1)
    g = tl.program_id(2)
    o_row = tl.load(starts + request)
    visible = tl.minimum(tl.load(lengths + request), sink + tl.load(heads + head * FIELDS + 5).to(tl.int32))
    if (visible <= 0) | (tl.load(starts + request + 1) - o_row != 1):
        return
    begin = request.to(tl.int64) * pieces + tl.load(first + head)
    end = begin + tl.cdiv(visible, length)
    high = tl.load(partial_high + begin * GROUP + g)
    mixed, total = add_pieces(
        partial, partial_high, partial_sum, begin, end, g, high, high * 0, GROUP, D, D_TILE, PIECES
    )
    d = tl.arange(0, D_TILE)
    at = output + o_row.to(tl.int64) * o_token + (head * GROUP + g).to(tl.int64) * o_head
    tl.store(at + d, (mixed / total).to(output.dtype.element_ty), mask=d < D)


def attend_tokens(
    query: torch.Tensor,
    addresses: torch.Tensor,
    step: Step,
    scaling: float,
    output: torch.Tensor,
    group: int,
    shape: tuple[int, int, int],
    rows: int,
    spans: tuple[int, ...],
) -> None:
    """Requests of one token; ``rows`` of keys and values have room on the chip."""
    requests = len(step.lengths)
    work = _pieces(spans, triton.next_power_of_2(requests), query.device)
    pieces, d = len(work.pair), shape[0]
    partial = torch.empty(requests * pieces * group, d, dtype=torch.float32, device=query.device)
    high = torch.empty(requests * pieces * group, dtype=torch.float32, device=query.device)
    total = torch.empty_like(high)
    _decode_kernel[(pieces, requests)](
        query,
        addresses,
        step.starts,
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
        addresses.shape[1],
        group,
        tile_size(group),
        *shape,
        BLOCK,
        num_warps=2 if group == 1 else 8,
        num_stages=min(max(rows // BLOCK, 1), 4),
    )
    _combine_kernel[(requests, len(spans), group)](
        partial,
        high,
        total,
        addresses,
        step.starts,
        step.lengths,
        work.first,
        output,
        pieces,
        work.length,
        step.sink,
        *output.stride()[:2],
        addresses.shape[1],
        group,
        *shape[:2],
        64,
        num_warps=4,
    )
