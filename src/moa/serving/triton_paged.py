"""Span attention over an engine's pages on an NVIDIA GPU: all heads of a layer in one launch, whatever their spans.

Every KV head has pages and a table of its own, so a kernel finds them through addresses: one row of int64 for each
head. A step of single tokens is cut by tokens, not by heads, as in `moa.attention.triton_decode`: pieces of equal
length, from a list that depends on the spans alone, for each request; how much of a piece is filled is read on the
device, so that a CUDA graph can hold the step. Chunks of prompts walk over sink and window in tiles of queries. Where a
step has both, either kernel passes over the other's requests. The definition is `moa.serving.paged.attend`.
"""

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
import triton
import triton.language as tl

from moa.attention.triton_decode import BLOCK, LOG2_E, LONGEST, WorkList, add_pieces, work_list
from moa.attention.triton_prefill import softmax_step
from moa.attention.triton_store import tile_size
from moa.serving.paged import Step

_FIELDS = 6  # of a head: pages, their stride in rows of D numbers, table, its stride, slots, window
_PROGRAMS = 132 * 8  # about as many pieces for all requests together keep a large GPU busy to the end
_MANY = 32  # requests; of more, pieces may be longer
_HALF, _FULL = (64, 64, 4), (32, 32, 8)  # of a chunk: queries and keys of a tile, and warps; in float32 the latter


# What these two give is kept for good: recorded graphs read it. An engine's pages and tables stay where they are, so
# there are as many as layers, times a few sizes of batches.
@cache
def _addresses(rows: tuple[tuple[int, ...], ...], device: torch.device) -> torch.Tensor:
    """int64 [kv_heads, _FIELDS]."""
    return torch.tensor(rows, dtype=torch.int64).to(device)


@cache
def _pieces(spans: tuple[int, ...], share: int, device: torch.device) -> WorkList:
    """Pieces of one request's heads, where there are about ``share`` requests."""
    programs = max(_PROGRAMS // share, len(spans))
    return work_list(np.array(spans), device, programs, LONGEST * max(1, share // _MANY))


@cache
def _room(device: torch.device) -> int:
    """Bytes that tiles may take on the chip."""
    if device.type != "cuda":
        return 1 << 20
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin - 16 * 1024


@triton.jit(do_not_specialize=["tokens"])
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


@triton.jit
def _rows(table, at, limit, stride, SIZE: tl.constexpr, TILE: tl.constexpr):
    """Where the keys of tokens ``at`` to ``at + TILE`` lie, in rows of D numbers: int64 [TILE].

    ``at`` is a multiple of TILE. A page is looked up once, and those that begin at ``limit`` or later are not.
    """
    n = tl.arange(0, TILE)
    if SIZE % TILE == 0:
        page = tl.load(table + at // SIZE).to(tl.int64)
        rows = page * stride + (at % SIZE + n) * 2
    elif TILE % SIZE == 0:
        rows = (n % SIZE * 2).to(tl.int64)
        for number in tl.static_range(TILE // SIZE):
            page = tl.load(table + at // SIZE + number, mask=at + number * SIZE < limit, other=0).to(tl.int64)
            rows += tl.where(n // SIZE == number, page * stride, 0)
    else:
        page = tl.load(table + (at + n) // SIZE, mask=at + n < limit, other=0).to(tl.int64)
        rows = page * stride + (at + n) % SIZE * 2
    return rows


@triton.jit(do_not_specialize=["requests"])
def _chunk_kernel(
    query,
    heads,
    starts,
    lengths,
    output,
    scale_log2,
    sink,
    requests,
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
    # Request r has the tiles from starts[r] // BLOCK_M + r on, more than it needs by one at most.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    low_request = 0
    high_request = requests
    while low_request < high_request:
        middle = (low_request + high_request) // 2
        if tl.load(starts + middle) // BLOCK_M + middle <= tile:
            low_request = middle + 1
        else:
            high_request = middle
    request = low_request - 1
    head = tl.program_id(1)
    row = tl.load(starts + request)
    new = tl.load(starts + request + 1) - row
    tokens = tl.load(lengths + request)
    first = (tile - row // BLOCK_M - request) * BLOCK_M
    if (first >= new) | (new == 1) | (tokens == 0):
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
    first_query = tokens - new + first
    end = tokens - new + tl.minimum(first + BLOCK_M, new)  # one past the tile's last query
    low = tl.maximum(first_query - window + 1, 0)  # first key in any query's window
    start = low // BLOCK_N * BLOCK_N
    sink_end = tl.minimum(sink, start)
    diagonal = tl.maximum((first_query + 1) // BLOCK_N * BLOCK_N, start)  # keys before are not beyond any query
    edge = tl.cdiv(tl.maximum(end - window, 0), BLOCK_N) * BLOCK_N  # from here on every query's window is open
    edge = tl.maximum(tl.minimum(edge, diagonal), start)
    high = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    mixed = tl.zeros([BLOCK_M, D_TILE], tl.float32)
    # Tiles that need a mask: the sink's, those on the window's edge, those on the diagonal.
    sink_tiles = tl.cdiv(sink_end, BLOCK_N)
    edge_tiles = (edge - start) // BLOCK_N
    for tile_index in range(sink_tiles + edge_tiles + tl.cdiv(end - diagonal, BLOCK_N)):
        behind = tile_index - sink_tiles
        at = tl.where(behind < edge_tiles, start + behind * BLOCK_N, diagonal + (behind - edge_tiles) * BLOCK_N)
        at = tl.where(behind < 0, tile_index * BLOCK_N, at)
        limit = tl.where(behind < 0, sink_end, end)
        j = at + n
        live = (j < limit) & ((j < sink) | (j >= low))  # pages between may be anybody's
        place = _rows(table, at, limit, stride, SIZE, BLOCK_N) * D
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
    for at in range(edge, diagonal, BLOCK_N):
        place = _rows(table, at, diagonal, stride, SIZE, BLOCK_N) * D
        high, total, mixed = softmax_step(
            q,
            high,
            total,
            mixed,
            pages + place[None, :] + d[:, None],
            pages + D + place[:, None] + d[None, :],
            (d < D)[:, None],
            (d < D)[None, :],
            True,
            scale_log2,
            0.0,
            D < D_TILE,
            False,
            False,
        )
    o_at = output + at_row * o_token + head.to(tl.int64) * o_head + d[None, :]
    tl.store(o_at, (mixed / total[:, None]).to(output.dtype.element_ty), mask=q_mask)


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pages: Sequence[torch.Tensor],
    steps: Sequence[Step],
    scaling: float,
    output: torch.Tensor,
) -> None:
    """As `moa.serving.paged.attend`.

    Parameters
    ----------
    query, output : [tokens, query heads, head_dim]
        Last dimension contiguous, as of all. ``output`` is written, but for rows of no request.
    key, value : [tokens, kv_heads, head_dim]
    pages : for each KV head, [pages, size, 2 * head_dim]
        Of the dtype of ``query``; a page's tokens one after the other, pages anywhere.
    steps : for each KV head, Step
        ``lengths`` and ``starts`` are the same in all of them.
    scaling : float

    Raises
    ------
    ValueError
        If pages are laid out in another way.
    """
    query_heads, d = query.shape[1:]
    heads = key.shape[1]
    group = query_heads // heads
    step = steps[0]
    for page in pages:
        if page.dtype != query.dtype or page.stride(0) % d or page.stride()[1:] != (2 * d, 1):
            raise ValueError(
                f"pages of {page.dtype} with strides {page.stride()}; expected {query.dtype}, and {2 * d} numbers of a "
                "token after those of the one before"
            )
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
    tile = 1 if step.most == 1 else 16
    _store_kernel[(triton.cdiv(len(step.slots), tile), heads)](
        key,
        value,
        addresses,
        len(step.slots),
        *key.stride()[:2],
        *value.stride()[:2],
        _FIELDS,
        *shape,
        tile,
        num_warps=4,
    )
    rows = _room(query.device) // (2 * tile_size(d) * query.element_size())
    if step.most > 1:
        _chunk(query, addresses, step, scaling, output, group, shape, rows)
    spans = tuple(min(each.sink + each.window, each.table.shape[1] * each.size) for each in steps)
    _decode(query, addresses, step, scaling, output, group, shape, rows, spans)


def _chunk(
    query: torch.Tensor,
    addresses: torch.Tensor,
    step: Step,
    scaling: float,
    output: torch.Tensor,
    group: int,
    shape: tuple[int, int, int],
    rows: int,
) -> None:
    """``rows`` of keys and values have room on the chip."""
    requests = len(step.lengths)
    block_m, block_n, warps = _HALF if query.element_size() == 2 else _FULL
    _chunk_kernel[(len(query) // block_m + requests, query.shape[1])](
        query,
        addresses,
        step.starts,
        step.lengths,
        output,
        scaling * LOG2_E.value,
        step.sink,
        requests,
        group,
        *query.stride()[:2],
        *output.stride()[:2],
        _FIELDS,
        *shape,
        block_m,
        block_n,
        num_warps=warps,
        num_stages=min(max(rows // block_n - 1, 1), 3),  # the queries take about a stage, too
    )


def _decode(
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
    """``rows`` of keys and values have room on the chip."""
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
        _FIELDS,
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
        _FIELDS,
        group,
        *shape[:2],
        64,
        num_warps=4,
    )
