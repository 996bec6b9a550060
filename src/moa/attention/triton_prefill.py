"""Span attention of several new tokens per row on an NVIDIA GPU: a prompt, or a chunk of one.

Only tiles with visible keys are visited, and no mask tensor exists. A program holds one tile of queries of one query
head and walks over keys in tiles: what its pair has stored, then the new sink tokens, then the window up to the
diagonal. Tiles that every query sees in full need no comparison; only those on the window's edge, the sink's end and
the diagonal are compared with positions. Stored keys are read where they lie: a ring's order is undone in arithmetic.
Long tiles start first, so that the last programs to run are short ones.
"""

import torch
import triton
import triton.language as tl

from moa.attention.triton_decode import LOG2_E, softcapped
from moa.attention.triton_store import tile_size


@triton.jit
def softmax_step(
    q,
    high,
    total,
    mixed,
    k_at,
    v_at,
    k_mask,
    v_mask,
    seen,
    scale_log2,
    softcap,
    LOADS: tl.constexpr,
    MASKED: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """One step of the running softmax: a tile of keys, with a mask on loads and on scores where asked for."""
    if LOADS:
        k = tl.load(k_at, mask=k_mask, other=0.0)
        v = tl.load(v_at, mask=v_mask, other=0.0)
    else:
        k = tl.load(k_at)
        v = tl.load(v_at)
    s = tl.dot(q, k, input_precision="ieee")
    if SOFTCAP:
        s = softcapped(s * scale_log2, softcap)
        scale_log2 = 1.0
    if MASKED:
        s = tl.where(seen, s, float("-inf"))
        new_high = tl.maximum(high, tl.max(s, 1) * scale_log2)
        safe = tl.where(new_high == float("-inf"), 0.0, new_high)  # nothing seen yet
    else:
        new_high = tl.maximum(high, tl.max(s, 1) * scale_log2)
        safe = new_high  # never -inf here: a tile without a mask has visible keys
    p = tl.exp2(s * scale_log2 - safe[:, None])  # one fused multiply-add before the exponential
    shrink = tl.exp2(high - safe)
    total = total * shrink + tl.sum(p, 1)
    mixed = tl.dot(p.to(v.dtype), v, mixed * shrink[:, None], input_precision="ieee")
    return new_high, total, mixed


@triton.jit
def _prefill_kernel(
    query,
    key,
    value,
    keys,
    values,
    offset,
    capacity,
    written,
    first,
    sink_logits,
    output,
    lse,
    scale_log2,
    softcap,
    sink,
    new,
    heads,
    kv_heads,
    q_row,
    q_head,
    q_token,
    k_row,
    k_head,
    k_token,
    v_row,
    v_head,
    v_token,
    o_row,
    o_head,
    o_token,
    D: tl.constexpr,
    DV: tl.constexpr,
    D_TILE: tl.constexpr,
    DV_TILE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PAST: tl.constexpr,
    SOFTCAP: tl.constexpr,
    LEARNED: tl.constexpr,
    LSE: tl.constexpr,
):
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    row = tl.program_id(2)
    kv_head = head // (heads // kv_heads)
    pair = row * kv_heads + kv_head
    begin = tl.load(first + row)  # columns before are padding
    tokens = new - begin
    first_query = tile * BLOCK_M
    if first_query >= tokens:
        return
    span = tl.load(capacity + pair)
    window = span - sink

    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, D_TILE)
    dv = tl.arange(0, DV_TILE)
    m = first_query + tl.arange(0, BLOCK_M)  # queries, counted among the row's new tokens
    EVEN: tl.constexpr = (D == D_TILE) and (DV == DV_TILE)
    q_at = query + row.to(tl.int64) * q_row + head.to(tl.int64) * q_head + begin.to(tl.int64) * q_token
    q_mask = (m < tokens)[:, None] & (d < D)[None, :]
    q = tl.load(q_at + m[:, None].to(tl.int64) * q_token + d[None, :], mask=q_mask, other=0.0)
    high = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    mixed = tl.zeros([BLOCK_M, DV_TILE], tl.float32)

    past = 0
    if PAST:
        # Stored keys have indices 0 .. past - 1 in order of age, new ones go on from there. In a ring that has
        # wrapped, slot s behind the sink has the age of its distance from the oldest slot.
        given = tl.load(written + pair)
        past = tl.minimum(given, span)
        oldest = tl.where(given > span, (given - sink) % tl.maximum(window, 1), 0)
        base = tl.load(offset + pair).to(tl.int64)
        visible = tl.where(first_query + 1 < window, past, tl.minimum(past, sink))  # behind the window: sink only
        for at in range(0, visible, BLOCK_N):
            slot = at + n
            live = slot < visible
            age = slot - sink - oldest
            j = tl.where(slot < sink, slot, sink + tl.where(age < 0, age + window, age))
            seen = live[None, :] & ((j < sink)[None, :] | (past + m[:, None] - j[None, :] < window))
            high, total, mixed = softmax_step(
                q,
                high,
                total,
                mixed,
                keys + (base + slot[None, :]) * D + d[:, None],
                values + (base + slot[:, None]) * DV + dv[None, :],
                live[None, :] & (d < D)[:, None],
                live[:, None] & (dv < DV)[None, :],
                seen,
                scale_log2,
                softcap,
                True,
                True,
                SOFTCAP,
            )

    # New keys: index b among the row's new tokens, of which the first `near` still belong to the sink.
    near = tl.maximum(sink - past, 0)
    end = tl.minimum(first_query + BLOCK_M, tokens)  # one past the tile's last query
    low = tl.minimum(tl.maximum(first_query - window + 1, 0), first_query)  # first key inside any query's window
    start = low // BLOCK_N * BLOCK_N
    sink_end = tl.minimum(tl.minimum(near, start), end)
    edge = tl.cdiv(tl.maximum(end - window, 0), BLOCK_N) * BLOCK_N  # from here on every query's window is open
    diagonal = first_query // BLOCK_N * BLOCK_N
    edge = tl.maximum(tl.minimum(edge, diagonal), start)
    k_new = key + row.to(tl.int64) * k_row + kv_head.to(tl.int64) * k_head + begin.to(tl.int64) * k_token
    v_new = value + row.to(tl.int64) * v_row + kv_head.to(tl.int64) * v_head + begin.to(tl.int64) * v_token
    k_tile = k_new + n[None, :].to(tl.int64) * k_token + d[:, None]
    v_tile = v_new + n[:, None].to(tl.int64) * v_token + dv[None, :]
    # Tiles that need a mask: the sink's, those on the window's edge, those on the diagonal.
    sink_tiles = tl.cdiv(sink_end, BLOCK_N)
    edge_tiles = (edge - start) // BLOCK_N
    diagonal = tl.maximum(diagonal, start)
    for tile_index in range(sink_tiles + edge_tiles + tl.cdiv(end - diagonal, BLOCK_N)):
        behind = tile_index - sink_tiles
        limit = tl.where(behind < 0, sink_end, tokens)
        at = tl.where(behind < edge_tiles, start + behind * BLOCK_N, diagonal + (behind - edge_tiles) * BLOCK_N)
        at = tl.where(behind < 0, tile_index * BLOCK_N, at)
        b = at + n
        live = b < limit
        seen = (b[None, :] <= m[:, None]) & ((b < near)[None, :] | (m[:, None] - b[None, :] < window))
        high, total, mixed = softmax_step(
            q,
            high,
            total,
            mixed,
            k_tile + tl.cast(at, tl.int64) * k_token,
            v_tile + tl.cast(at, tl.int64) * v_token,
            live[None, :] & (d < D)[:, None],
            live[:, None] & (dv < DV)[None, :],
            live[None, :] & seen,
            scale_log2,
            softcap,
            True,
            True,
            SOFTCAP,
        )
    for at in range(edge, diagonal, BLOCK_N):
        high, total, mixed = softmax_step(
            q,
            high,
            total,
            mixed,
            k_tile + tl.cast(at, tl.int64) * k_token,
            v_tile + tl.cast(at, tl.int64) * v_token,
            (d < D)[:, None],
            (dv < DV)[None, :],
            True,
            scale_log2,
            softcap,
            not EVEN,
            False,
            SOFTCAP,
        )

    if LEARNED:
        learned = tl.load(sink_logits + head).to(tl.float32) * LOG2_E
        top = tl.maximum(high, learned)
        total = total * tl.exp2(high - top) + tl.exp2(learned - top)
        mixed = mixed * tl.exp2(high - top)[:, None]
        high = top
    mixed = mixed / total[:, None]
    if LSE:
        lse_at = lse + (row * heads + head).to(tl.int64) * new + begin
        tl.store(lse_at + m, high + tl.log2(total), mask=m < tokens)
    o_at = output + row.to(tl.int64) * o_row + head.to(tl.int64) * o_head + begin.to(tl.int64) * o_token
    tl.store(
        o_at + m[:, None].to(tl.int64) * o_token + dv[None, :],
        mixed.to(output.dtype.element_ty),
        mask=(m < tokens)[:, None] & (dv < DV)[None, :],
    )


@torch.library.custom_op("moa::prefill", mutates_args=())
def prefill(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    offset: torch.Tensor,
    capacity: torch.Tensor,
    written: torch.Tensor,
    first: torch.Tensor,
    sink: int,
    past: bool,
    padded: bool,
    scaling: float,
    softcap: float,
    sink_logits: torch.Tensor | None,
) -> torch.Tensor:
    """Attention of new tokens over what is stored and over each other; nothing is stored here.

    Parameters
    ----------
    query : [rows, query_heads, new, head_dim]
    key, value : [rows, kv_heads, new, dim]
        Last dimensions contiguous.
    keys, values : [slots, dim]
    offset, capacity, written : int32 [pairs]
        As in `moa.storage.SpanStore`, on the device. ``capacity`` is the span.
    first : int32 [rows]
        Each row's first column that is no padding; the output before it is 0.
    sink : int
    past : bool
        False where nothing is stored yet.
    padded : bool
        False where ``first`` is all 0.
    scaling : float
    softcap : float
        0 for none.
    sink_logits : [query_heads], optional

    Returns
    -------
    [rows, query_heads, new, value_dim], as a view of [rows, new, query_heads, value_dim]
    """
    rows, heads, new, _ = query.shape
    # columns of padding are written by no program
    output = (value.new_zeros if padded else value.new_empty)(rows, new, heads, value.shape[3]).transpose(1, 2)
    launch(
        query,
        key,
        value,
        keys,
        values,
        offset,
        capacity,
        written,
        first,
        sink,
        past,
        scaling,
        softcap,
        sink_logits,
        output,
    )
    return output


def launch(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    offset: torch.Tensor,
    capacity: torch.Tensor,
    written: torch.Tensor,
    first: torch.Tensor,
    sink: int,
    past: bool,
    scaling: float,
    softcap: float,
    sink_logits: torch.Tensor | None,
    output: torch.Tensor,
    lse: torch.Tensor | None = None,
) -> None:
    """Fill ``output`` as `prefill` says, and ``lse``, float32 [rows, query_heads, new], with each query's
    log-sum-exp in units of log2, learned sink included.
    """
    rows, heads, new, d = query.shape
    dv = value.shape[3]
    block_m, block_n, warps, stages = _shape(d, query.dtype, new)
    _prefill_kernel[(triton.cdiv(new, block_m), heads, rows)](
        query,
        key,
        value,
        keys,
        values,
        offset,
        capacity,
        written,
        first,
        output if sink_logits is None else sink_logits,
        output,
        output if lse is None else lse,
        scaling * LOG2_E.value,
        softcap,
        sink,
        new,
        heads,
        key.shape[1],
        *query.stride()[:3],
        *key.stride()[:3],
        *value.stride()[:3],
        *output.stride()[:3],
        d,
        dv,
        tile_size(d),
        tile_size(dv),
        block_m,
        block_n,
        past,
        softcap > 0,
        sink_logits is not None,
        lse is not None,
        num_warps=warps,
        num_stages=stages,
    )


@prefill.register_fake
def _(query, key, value, *others):  # type: ignore[no-untyped-def]
    rows, heads, new, _ = query.shape
    return value.new_empty(rows, new, heads, value.shape[3]).transpose(1, 2)


def _shape(head_dim: int, dtype: torch.dtype, new: int) -> tuple[int, int, int, int]:
    """Queries and keys of a tile, warps and stages: the fastest of those tried on an H100 in bfloat16, head_dim 128."""
    if dtype == torch.float32:
        return (64, 32, 4, 2) if head_dim <= 128 else (32, 32, 4, 1)
    if head_dim > 128:
        return 64, 64, 4, 2
    return (128, 128, 8, 3) if new >= 16384 else (64, 64, 4, 3)
