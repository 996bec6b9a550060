"""Gradient of the query and the loss table on an NVIDIA GPU, in two kernels.

- rows: a program holds a tile of rows, walks over their keys, and adds up the gradient of the query. On its way it
  leaves, for every row and every block of distance, the sum of A and of dS (or of |E|). A tile of 64 keys covers
  parts of two blocks of distance: for row r of its block and column c, c <= r is the nearer one;
- table: reads those sums once from the near end and once from the far end, so that every window of every row is
  valued from the side that has less mass (see `moa.search.influence`), and adds up the rows.
"""

import triton
import triton.language as tl

from moa.attention.triton_decode import LOG2_E
from moa.search.triton_influence_columns import logits

_LARGE = tl.constexpr(0.75)  # only one key of a row can have more attention than this
_TINY = tl.constexpr(1e-37)


@triton.jit
def _row_tile(
    q,
    d_o,
    lse,
    row_mean,
    d_query,
    k_at,
    v_at,
    k_mask,
    seen,
    scale_log2,
    softcap,
    LOADS: tl.constexpr,
    MASKED: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """Attention A and dS of a tile, and the query's gradient after it."""
    if LOADS:
        k = tl.load(k_at, mask=k_mask, other=0.0)
        v = tl.load(v_at, mask=k_mask, other=0.0)
    else:
        k = tl.load(k_at)
        v = tl.load(v_at)
    s, slope = logits(tl.dot(q, tl.trans(k), input_precision="ieee"), scale_log2, softcap, SOFTCAP)
    p = tl.exp2(s - lse[:, None])
    if MASKED:
        p = tl.where(seen, p, 0.0)
    flow = p * (tl.dot(d_o, tl.trans(v), input_precision="ieee") - row_mean[:, None])
    d_logits = flow
    if SOFTCAP:
        d_logits = flow * slope
    d_query = tl.dot(d_logits.to(k.dtype), k, d_query, input_precision="ieee")
    return p, flow, d_query


@triton.jit
def _binned(
    p,
    flow,
    b,
    m,
    row_block,
    inside,
    carry,
    carry_flow,
    other,
    other_flow,
    largest,
    sums_at,
    plane,
    bin_stride,
    length,
    JOINT: tl.constexpr,
):
    """Add a tile to the blocks of distance it touches: the nearer one is complete and stored, the farther one carried.

    Tiles come far to near, so what the last one carried and this one's nearer part are of one block.
    """
    distance = row_block - b
    at = sums_at + distance.to(tl.int64) * bin_stride
    stored = (distance >= 0) & (m < length)
    if JOINT:
        tl.store(at, carry + tl.sum(tl.where(inside, p, 0.0), 1), mask=stored)
        tl.store(at + plane, carry_flow + tl.sum(tl.where(inside, flow, 0.0), 1), mask=stored)
        carry = tl.sum(tl.where(inside, 0.0, p), 1)
        carry_flow = tl.sum(tl.where(inside, 0.0, flow), 1)
    else:
        large = p > _LARGE
        effect = tl.where(large, 0.0, tl.abs(flow) / (1 - p))
        tl.store(at, carry + tl.sum(tl.where(inside, effect, 0.0), 1), mask=stored)
        carry = tl.sum(tl.where(inside, 0.0, effect), 1)
        other += tl.sum(tl.where(large, 0.0, p), 1)
        other_flow += tl.sum(tl.where(large, 0.0, flow), 1)
        own = tl.where(inside, distance[:, None], distance[:, None] - 1)
        largest = tl.maximum(largest, tl.max(tl.where(large, own, -1), 1))
    return carry, carry_flow, other, other_flow, largest


@triton.jit
def row_kernel(
    query,
    key,
    value,
    d_out,
    lse,
    row_mean,
    sink_logits,
    d_query,
    sums,
    rest,
    scaling,
    scale_log2,
    softcap,
    length,
    window,
    first_row,
    chunk,
    bins,
    plane,
    rest_plane,
    heads,
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
    BLOCK: tl.constexpr,
    JOINT: tl.constexpr,
    SINK: tl.constexpr,
    WINDOWED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    LEARNED: tl.constexpr,
):
    first = first_row + (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    head = tl.program_id(1)
    m = first + tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK)
    d = tl.arange(0, D_TILE)
    live = m < length
    EVEN: tl.constexpr = D == D_TILE
    row_mask = live[:, None] & (d < D)[None, :]
    k_mask = (d < D)[None, :] & (n >= 0)[:, None]
    q_at = query + head.to(tl.int64) * q_head + m[:, None].to(tl.int64) * q_token + d[None, :]
    o_at = d_out + head.to(tl.int64) * o_head + m[:, None].to(tl.int64) * o_token + d[None, :]
    q = tl.load(q_at, mask=row_mask, other=0.0)
    d_o = tl.load(o_at, mask=row_mask, other=0.0)
    row_at = head.to(tl.int64) * length + m
    row_lse = tl.load(lse + row_at, mask=live, other=float("inf"))
    mean = tl.load(row_mean + row_at, mask=live, other=0.0)
    k_tile = key + (head // GROUP).to(tl.int64) * k_head + n[:, None].to(tl.int64) * k_token + d[None, :]
    v_tile = value + (head // GROUP).to(tl.int64) * v_head + n[:, None].to(tl.int64) * v_token + d[None, :]

    row_block = m // BLOCK
    inside = n[None, :] <= (m % BLOCK)[:, None]
    sums_at = sums + head.to(tl.int64) * bins * chunk + (m - first_row)
    d_q = tl.zeros([BLOCK_M, D_TILE], tl.float32)
    carry = tl.zeros([BLOCK_M], tl.float32)
    carry_flow = tl.zeros([BLOCK_M], tl.float32)
    other = tl.zeros([BLOCK_M], tl.float32)  # JOINT: what every window keeps; else: all keys but the largest
    other_flow = tl.zeros([BLOCK_M], tl.float32)
    largest = tl.full([BLOCK_M], -1, tl.int32)
    if LEARNED:
        learned = tl.load(sink_logits + head).to(tl.float32) * LOG2_E
        other = tl.where(live, tl.exp2(learned - row_lse), 0.0)
        other_flow = -other * mean  # a learned sink has no value, so its dA is 0

    begin = 0
    if SINK:
        p, flow, d_q = _row_tile(
            q,
            d_o,
            row_lse,
            mean,
            d_q,
            k_tile,
            v_tile,
            k_mask & (n < length)[:, None],
            n[None, :] <= m[:, None],
            scale_log2,
            softcap,
            True,
            True,
            SOFTCAP,
        )
        if not JOINT:
            large = p > _LARGE
            p = tl.where(large, 0.0, p)
            flow = tl.where(large, 0.0, flow)
        other += tl.sum(p, 1)
        other_flow += tl.sum(flow, 1)
        begin = 1
    diagonal = first // BLOCK
    end = tl.cdiv(tl.minimum(first + BLOCK_M, length), BLOCK)
    if WINDOWED:
        # From where the first row of the block begins, whichever rows of it are ours: all must leave the same blocks.
        begin = tl.maximum(diagonal * BLOCK - window + 1, 0) // BLOCK
        edge = tl.cdiv(tl.maximum(first + BLOCK_M - window, 0), BLOCK)  # from here on every row's window is open
        edge = tl.maximum(tl.minimum(edge, diagonal), begin)
        for b in range(begin, edge):
            j = b * BLOCK + n
            p, flow, d_q = _row_tile(
                q,
                d_o,
                row_lse,
                mean,
                d_q,
                k_tile + tl.cast(b * BLOCK, tl.int64) * k_token,
                v_tile + tl.cast(b * BLOCK, tl.int64) * v_token,
                k_mask,
                m[:, None] - j[None, :] < window,
                scale_log2,
                softcap,
                not EVEN,
                True,
                SOFTCAP,
            )
            carry, carry_flow, other, other_flow, largest = _binned(
                p,
                flow,
                b,
                m,
                row_block,
                inside,
                carry,
                carry_flow,
                other,
                other_flow,
                largest,
                sums_at,
                plane,
                chunk,
                length,
                JOINT,
            )
        begin = edge
    for b in range(begin, diagonal):
        p, flow, d_q = _row_tile(
            q,
            d_o,
            row_lse,
            mean,
            d_q,
            k_tile + tl.cast(b * BLOCK, tl.int64) * k_token,
            v_tile + tl.cast(b * BLOCK, tl.int64) * v_token,
            k_mask,
            True,
            scale_log2,
            softcap,
            not EVEN,
            False,
            SOFTCAP,
        )
        carry, carry_flow, other, other_flow, largest = _binned(
            p,
            flow,
            b,
            m,
            row_block,
            inside,
            carry,
            carry_flow,
            other,
            other_flow,
            largest,
            sums_at,
            plane,
            chunk,
            length,
            JOINT,
        )
    for b in range(tl.maximum(diagonal, begin), end):
        j = b * BLOCK + n
        seen = (j[None, :] <= m[:, None]) & (m[:, None] - j[None, :] < window)
        p, flow, d_q = _row_tile(
            q,
            d_o,
            row_lse,
            mean,
            d_q,
            k_tile + tl.cast(b * BLOCK, tl.int64) * k_token,
            v_tile + tl.cast(b * BLOCK, tl.int64) * v_token,
            k_mask & (j < length)[:, None],
            seen,
            scale_log2,
            softcap,
            True,
            True,
            SOFTCAP,
        )
        carry, carry_flow, other, other_flow, largest = _binned(
            p,
            flow,
            b,
            m,
            row_block,
            inside,
            carry,
            carry_flow,
            other,
            other_flow,
            largest,
            sums_at,
            plane,
            chunk,
            length,
            JOINT,
        )

    tl.store(
        d_query + (m[:, None].to(tl.int64) * heads + head) * D + d[None, :],
        (d_q * scaling).to(d_query.dtype.element_ty),
        mask=row_mask,
    )
    rest_at = rest + head.to(tl.int64) * chunk + (m - first_row)
    if JOINT:
        tl.store(rest_at, other, mask=live)
        tl.store(rest_at + rest_plane, other_flow, mask=live)
    else:
        tl.store(rest_at, tl.abs(other_flow) / tl.maximum(other, _TINY), mask=live)
        tl.store(rest_at + rest_plane, largest.to(tl.float32), mask=live)


@triton.jit
def table_kernel(
    sums,
    rest,
    partial,
    length,
    window,
    first_row,
    chunk,
    bins,
    plane,
    rest_plane,
    partial_plane,
    windows,
    BLOCK: tl.constexpr,
    JOINT: tl.constexpr,
    SINK: tl.constexpr,
):
    """Losses of every window, summed over one block of rows. JOINT leaves two planes: windows valued by what they keep
    and by what they mask.
    """
    block = first_row // BLOCK + tl.program_id(0)
    head = tl.program_id(1)
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = first_row + r < length
    MISSING: tl.constexpr = 0 if SINK else 1  # blocks of distance that such a layer's window has on top
    lowest = 1 if SINK else tl.maximum(block * BLOCK - window + 1, 0) // BLOCK
    last = block - lowest  # the last block of distance that can be masked
    at = sums + head.to(tl.int64) * bins * chunk + r
    rest_at = rest + head.to(tl.int64) * chunk + r
    out = partial + (head.to(tl.int64) * bins + block) * windows
    first = tl.load(rest_at, mask=live, other=0.0)
    second = tl.load(rest_at + rest_plane, mask=live, other=0.0)
    if JOINT:
        kept = first
        kept_flow = second
        crossed = tl.zeros([BLOCK], tl.int32)  # blocks that a row adds before it keeps half of its mass
        for k in range(last):
            kept += tl.load(at + tl.cast(k, tl.int64) * chunk, mask=live, other=0.0)
            kept_flow += tl.load(at + plane + tl.cast(k, tl.int64) * chunk, mask=live, other=0.0)
            less = kept < 0.5
            crossed += less.to(tl.int32)
            effect = tl.where(less, kept_flow / tl.maximum(kept, _TINY), 0.0)
            if k >= MISSING:
                tl.store(out + k - MISSING, tl.sum(effect * effect, 0))
        out += partial_plane
        masked = tl.zeros([BLOCK], tl.float32)
        masked_flow = tl.zeros([BLOCK], tl.float32)
        for step in range(last - MISSING):
            k = last - step
            masked += tl.load(at + tl.cast(k, tl.int64) * chunk, mask=live, other=0.0)
            masked_flow += tl.load(at + plane + tl.cast(k, tl.int64) * chunk, mask=live, other=0.0)
            effect = tl.where(crossed < k, masked_flow / (1 - masked), 0.0)
            tl.store(out + k - 1 - MISSING, tl.sum(effect * effect, 0))
    else:
        running = tl.zeros([BLOCK], tl.float32)
        for step in range(last - MISSING):
            k = last - step
            running += tl.load(at + tl.cast(k, tl.int64) * chunk, mask=live, other=0.0)
            running += tl.where(second == k, first, 0.0)
            tl.store(out + k - 1 - MISSING, tl.sum(running, 0))
