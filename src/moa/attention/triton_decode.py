"""One decode step of span attention on an NVIDIA GPU.

The stored keys and values are read once, at the speed of the memory; nothing else matters. Heads store different
amounts, so the work is cut by tokens, not by heads: a work list gives every program an equal piece of one pair's slots.
It is built once per storage, from capacities; how much of a piece is filled is read on the device, so that no step asks
the host anything and a CUDA graph can hold it. The query heads of a GQA group sit in one tile and share the piece's
keys. A pair's first piece also takes the new token, from where the model left it, and stores it; nobody reads the slot
that it goes to. A piece leaves its softmax numerator, maximum and sum; a second kernel adds up the pieces of a pair in
order, so that results are bit-identical from run to run, and counts the token.
"""

from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl

from moa.attention.triton_store import tile_size

BLOCK = 64  # keys of one step; pieces are multiples of it
_SHORTEST, LONGEST = 2 * BLOCK, 19 * BLOCK  # shorter pieces cost more to add up, longer ones end at different times
LOG2_E = tl.constexpr(1.4426950408889634)


@dataclass(frozen=True)
class WorkList:
    """Pieces of equal length, one for each program; int32 tensors on the device.

    Attributes
    ----------
    pair, start : [pieces]
        A piece's pair, and its first slot among the pair's slots.
    first : [pairs + 1]
        A pair's pieces are ``first[pair]`` to ``first[pair + 1]``.
    length : int
        Slots of a full piece.
    """

    pair: torch.Tensor
    start: torch.Tensor
    first: torch.Tensor
    length: int


def work_list(capacity: np.ndarray, device: torch.device, programs: int, longest: int = LONGEST) -> WorkList:
    """Cut pairs of these capacities, int64 [pairs], into pieces of equal length: about ``programs`` of them, or more
    where they would become longer than ``longest``, a multiple of `BLOCK`.
    """
    length = min(max(BLOCK * -(-int(capacity.sum()) // (BLOCK * programs)), _SHORTEST), longest)
    pieces = np.maximum(-(-capacity // length), 1)
    first = np.concatenate([[0], np.cumsum(pieces)])
    pair = np.repeat(np.arange(len(capacity)), pieces)
    start = (np.arange(first[-1]) - first[pair]) * length

    def move(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array.astype(np.int32)).to(device)

    return WorkList(move(pair), move(start), move(first), length)


@triton.jit
def softcapped(scores_log2, softcap):
    """``softcap * tanh(scores / softcap)``, all in units of log2."""
    limit = softcap * LOG2_E
    return limit * (1 - 2 / (tl.exp(2 * scores_log2 / limit) + 1))


@triton.jit
def _piece_kernel(
    query,
    key,
    value,
    keys,
    values,
    offset,
    capacity,
    written,
    piece_pair,
    piece_start,
    partial,
    partial_high,
    partial_sum,
    scale_log2,
    softcap,
    length,
    sink,
    kv_heads,
    key_row,
    key_head,
    value_row,
    value_head,
    GROUP: tl.constexpr,
    GROUP_TILE: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    D_TILE: tl.constexpr,
    DV_TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    piece = tl.program_id(0)
    pair = tl.load(piece_pair + piece)
    start = tl.load(piece_start + piece)
    count = tl.load(written + pair)
    room = tl.load(capacity + pair)
    first_slot = tl.load(offset + pair).to(tl.int64)
    new_slot = tl.where(count < room, count, sink + (count - sink) % tl.maximum(room - sink, 1))
    stop = tl.minimum(start + length, tl.minimum(count, room))
    base = first_slot + start

    g = tl.arange(0, GROUP_TILE)
    d = tl.arange(0, D_TILE)
    dv = tl.arange(0, DV_TILE)
    n = tl.arange(0, BLOCK)
    q_mask = (g < GROUP)[:, None] & (d < D)[None, :]
    q = tl.load(query + (pair * GROUP + g)[:, None] * D + d[None, :], mask=q_mask, other=0.0)
    high = tl.full([GROUP_TILE], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_TILE], tl.float32)
    mixed = tl.zeros([GROUP_TILE, DV_TILE], tl.float32)
    k_at = keys + (base + n[None, :]) * D + d[:, None]
    v_at = values + (base + n[:, None]) * DV + dv[None, :]
    for at in range(start, stop, BLOCK):
        filled = (at + n < stop) & (at + n != new_slot)
        k = tl.load(k_at, mask=filled[None, :] & (d < D)[:, None], other=0.0)
        v = tl.load(v_at, mask=filled[:, None] & (dv < DV)[None, :], other=0.0)
        s = tl.dot(q, k, input_precision="ieee") * scale_log2
        if SOFTCAP:
            s = softcapped(s, softcap)
        s = tl.where(filled[None, :], s, float("-inf"))
        new_high = tl.maximum(high, tl.max(s, 1))
        safe = tl.where(new_high == float("-inf"), 0.0, new_high)  # a ring of one token holds none but the new one
        p = tl.exp2(s - safe[:, None])
        shrink = tl.exp2(high - safe)
        total = total * shrink + tl.sum(p, 1)
        mixed = tl.dot(p.to(v.dtype), v, mixed * shrink[:, None], input_precision="ieee")
        high = new_high
        k_at += BLOCK * D
        v_at += BLOCK * DV
    if start == 0:
        batch_row = (pair // kv_heads).to(tl.int64)
        head = (pair % kv_heads).to(tl.int64)
        new_k = tl.load(key + batch_row * key_row + head * key_head + d, mask=d < D, other=0.0)
        new_v = tl.load(value + batch_row * value_row + head * value_head + dv, mask=dv < DV, other=0.0)
        s_new = tl.sum(q.to(tl.float32) * new_k.to(tl.float32)[None, :], 1) * scale_log2
        if SOFTCAP:
            s_new = softcapped(s_new, softcap)
        new_high = tl.maximum(high, s_new)
        p_new = tl.exp2(s_new - new_high)
        shrink = tl.exp2(high - new_high)
        total = total * shrink + p_new
        mixed = mixed * shrink[:, None] + p_new[:, None] * new_v.to(tl.float32)[None, :]
        high = new_high
        tl.store(keys + (first_slot + new_slot) * D + d, new_k, mask=d < D)
        tl.store(values + (first_slot + new_slot) * DV + dv, new_v, mask=dv < DV)
    row = piece * GROUP + g
    tl.store(partial_high + row, high, mask=g < GROUP)
    tl.store(partial_sum + row, total, mask=g < GROUP)
    tl.store(partial + row[:, None] * DV + dv[None, :], mixed, mask=(g < GROUP)[:, None] & (dv < DV)[None, :])


@triton.jit
def add_pieces(
    partial,
    partial_high,
    partial_sum,
    begin,
    end,
    g,
    high,
    total,
    GROUP: tl.constexpr,
    DV: tl.constexpr,
    DV_TILE: tl.constexpr,
    PIECES: tl.constexpr,
):
    """Numerator [DV_TILE] and sum of the softmax over pieces ``begin`` to ``end``, from a finite maximum and a sum."""
    dv = tl.arange(0, DV_TILE)
    p = tl.arange(0, PIECES)
    mixed = tl.zeros([DV_TILE], tl.float32)
    for at in range(begin, end, PIECES):
        live = at + p < end
        row = (at + p) * GROUP + g
        piece_high = tl.load(partial_high + row, mask=live, other=float("-inf"))
        new_high = tl.maximum(high, tl.max(piece_high, 0))
        weight = tl.exp2(piece_high - new_high)
        shrink = tl.exp2(high - new_high)
        total = total * shrink + tl.sum(tl.load(partial_sum + row, mask=live, other=0.0) * weight, 0)
        piece = tl.load(partial + row[:, None] * DV + dv[None, :], mask=live[:, None] & (dv < DV)[None, :], other=0.0)
        mixed = mixed * shrink + tl.sum(piece * weight[:, None], 0)
        high = new_high
    return mixed, total


@triton.jit
def _combine_kernel(
    partial,
    partial_high,
    partial_sum,
    first,
    sink_logits,
    output,
    written,
    kv_heads,
    GROUP: tl.constexpr,
    DV: tl.constexpr,
    DV_TILE: tl.constexpr,
    LEARNED: tl.constexpr,
    PIECES: tl.constexpr,
):
    pair = tl.program_id(0)
    g = tl.program_id(1)
    begin = tl.load(first + pair)
    end = tl.load(first + pair + 1)
    dv = tl.arange(0, DV_TILE)
    high = tl.load(partial_high + begin * GROUP + g)
    total = high * 0
    if LEARNED:
        high = tl.load(sink_logits + (pair % kv_heads) * GROUP + g).to(tl.float32) * LOG2_E
        total = high * 0 + 1
    mixed, total = add_pieces(
        partial, partial_high, partial_sum, begin, end, g, high, total, GROUP, DV, DV_TILE, PIECES
    )
    tl.store(output + (pair * GROUP + g) * DV + dv, mixed / total, mask=dv < DV)
    if g == 0:  # all pieces have read the count by now
        tl.store(written + pair, tl.load(written + pair) + 1)


@torch.library.custom_op("moa::decode", mutates_args=("keys", "values", "written"))
def decode(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    offset: torch.Tensor,
    capacity: torch.Tensor,
    written: torch.Tensor,
    piece_pair: torch.Tensor,
    piece_start: torch.Tensor,
    first_piece: torch.Tensor,
    piece_length: int,
    sink: int,
    scaling: float,
    softcap: float,
    sink_logits: torch.Tensor | None,
) -> torch.Tensor:
    """Attention of one new token per row over itself and everything that is stored; the token is stored and counted.

    Parameters
    ----------
    query : [rows, query_heads, head_dim]
    key, value : [rows, kv_heads, dim]
        Last dimensions contiguous.
    keys, values : [slots, dim]
    offset, capacity, written : int32 [pairs]
        As in `moa.storage.SpanStore`, on the device; every capacity is larger than the sink.
    piece_pair, piece_start, first_piece, piece_length
        A `WorkList`.
    sink : int
    scaling : float
    softcap : float
        0 for none.
    sink_logits : [query_heads], optional

    Returns
    -------
    [rows, query_heads, value_dim]
    """
    query = query.contiguous()
    rows, heads, d = query.shape
    dv, pairs, pieces = values.shape[1], len(offset), len(piece_pair)
    group = rows * heads // pairs
    partial = torch.empty(pieces * group, dv, dtype=torch.float32, device=query.device)
    high = torch.empty(pieces * group, dtype=torch.float32, device=query.device)
    total = torch.empty_like(high)
    _piece_kernel[(pieces,)](
        query,
        key,
        value,
        keys,
        values,
        offset,
        capacity,
        written,
        piece_pair,
        piece_start,
        partial,
        high,
        total,
        scaling * LOG2_E.value,
        softcap,
        piece_length,
        sink,
        pairs // rows,
        *key.stride()[:2],
        *value.stride()[:2],
        group,
        tile_size(group),
        d,
        dv,
        tile_size(d),
        tile_size(dv),
        BLOCK,
        softcap > 0,
        num_warps=4,
        num_stages=3 if tile_size(max(d, dv)) * keys.element_size() <= 512 else 1,  # what fits on the chip
    )
    output = torch.empty(rows, heads, dv, dtype=values.dtype, device=query.device)
    _combine_kernel[(pairs, group)](
        partial,
        high,
        total,
        first_piece,
        high if sink_logits is None else sink_logits,
        output,
        written,
        pairs // rows,
        group,
        dv,
        tile_size(dv),
        sink_logits is not None,
        64,
        num_warps=4,
    )
    return output


@decode.register_fake
def _(query, key, value, *others):  # type: ignore[no-untyped-def]
    return query.new_empty(*query.shape[:2], value.shape[2], dtype=value.dtype)
