"""Writing new tokens into the slots of a `moa.storage.SpanStore` on an NVIDIA GPU.

A program moves one tile of one pair's new tokens. Only tokens that will still be there at the end are written, each to
a slot of its own, so that programs do not meet.
"""

import torch
import triton
import triton.language as tl

TILE = 32  # tokens of a program


@triton.jit
def _store_kernel(
    key,
    value,
    keys,
    values,
    offset,
    capacity,
    written,
    first,
    sink,
    new,
    kv_heads,
    key_row,
    key_head,
    key_token,
    value_row,
    value_head,
    value_token,
    D: tl.constexpr,
    DV: tl.constexpr,
    D_TILE: tl.constexpr,
    DV_TILE: tl.constexpr,
    TILE: tl.constexpr,
    ALONE: tl.constexpr,
):
    pair = tl.program_id(0)
    row = pair // kv_heads
    head = pair % kv_heads
    count = tl.load(written + pair)
    room = tl.load(capacity + pair)
    begin = tl.load(first + row)
    ring = room - sink

    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    token = count + column - begin
    total = count + new - begin
    kept = (column >= begin) & (column < new) & ((token < sink) | (token >= total - ring))
    slot = tl.where(token < room, token, sink + (token - sink) % tl.maximum(ring, 1)) + tl.load(offset + pair)

    d = tl.arange(0, D_TILE)
    dv = tl.arange(0, DV_TILE)
    k_mask = kept[:, None] & (d < D)[None, :]
    v_mask = kept[:, None] & (dv < DV)[None, :]
    k_from = key + row.to(tl.int64) * key_row + head.to(tl.int64) * key_head + column[:, None].to(tl.int64) * key_token
    v_from = (
        value
        + row.to(tl.int64) * value_row
        + head.to(tl.int64) * value_head
        + column[:, None].to(tl.int64) * value_token
    )
    tl.store(keys + slot[:, None].to(tl.int64) * D + d[None, :], tl.load(k_from + d[None, :], mask=k_mask), mask=k_mask)
    tl.store(
        values + slot[:, None].to(tl.int64) * DV + dv[None, :], tl.load(v_from + dv[None, :], mask=v_mask), mask=v_mask
    )
    if ALONE:  # the only program of this pair: nobody else reads the count
        tl.store(written + pair, total)


def tile_size(size: int) -> int:
    """The power of two, at least 16, that a tile of this width takes."""
    return max(16, triton.next_power_of_2(size))


@torch.library.custom_op("moa::store", mutates_args=("keys", "values", "written"))
def store(
    key: torch.Tensor,
    value: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    offset: torch.Tensor,
    capacity: torch.Tensor,
    written: torch.Tensor,
    first: torch.Tensor,
    sink: int,
) -> None:
    """Store new tokens and count them.

    Parameters
    ----------
    key, value : [rows, kv_heads, new, dim]
        The last dimension contiguous.
    keys, values : [slots, dim]
    offset, capacity, written : int32 [pairs]
        As in `SpanStore`, on the device; ``written`` is advanced.
    first : int32 [rows]
        Each row's first column that is no padding.
    """
    rows, kv_heads, new, d = key.shape
    dv = value.shape[3]
    tiles = triton.cdiv(new, TILE)
    _store_kernel[(rows * kv_heads, tiles)](
        key,
        value,
        keys,
        values,
        offset,
        capacity,
        written,
        first,
        sink,
        new,
        kv_heads,
        key.stride(0),
        key.stride(1),
        key.stride(2),
        value.stride(0),
        value.stride(1),
        value.stride(2),
        d,
        dv,
        tile_size(d),
        tile_size(dv),
        TILE if new > 1 else 1,
        tiles == 1,
        num_warps=4 if new > 1 else 1,
    )
    if tiles > 1:
        written += (new - first).repeat_interleave(kv_heads)


@store.register_fake
def _(key, value, keys, values, offset, capacity, written, first, sink):  # type: ignore[no-untyped-def]
    return None
