"""Chunks of prompts over an engine's pages on an NVIDIA GPU: tiles of queries walk over sink and window."""

import torch
import triton
import triton.language as tl

from moa.attention.triton_decode import LOG2_E
from moa.attention.triton_prefill import softmax_step
from moa.serving.paged import Step

_HALF, _FULL = (64, 64, 4), (32, 32, 8)  # queries and keys of a tile, and warps; in float32 the latter


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


def attend_chunks(
    query: torch.Tensor,
    addresses: torch.Tensor,
    step: Step,
    scaling: float,
    output: torch.Tensor,
    group: int,
    shape: tuple[int, int, int],
    rows: int,
) -> None:
    """Requests of several tokens; ``rows`` of keys and values have room on the chip."""
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
        addresses.shape[1],
        *shape,
        block_m,
        block_n,
        num_warps=warps,
        num_stages=min(max(rows // block_n - 1, 1), 3),  # the queries take about a stage, too
    )
