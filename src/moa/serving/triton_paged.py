"""Span attention over an engine's pages on an NVIDIA GPU: all heads of a layer in one launch, whatever their spans.

Every KV head has pages and a table of its own, so a kernel finds them through addresses: one row of int64 for each
head. Single tokens and chunks of prompts have a kernel each (`moa.serving.triton_paged_decode`,
`moa.serving.triton_paged_chunks`); where a step has both, either passes over the other's requests. The definition is
`moa.serving.paged.attend`.
"""

from collections.abc import Sequence
from functools import cache

import torch
import triton
import triton.language as tl

from moa.attention.triton_store import tile_size
from moa.serving.paged import Step
from moa.serving.triton_paged_chunks import attend_chunks
from moa.serving.triton_paged_decode import attend_tokens


# Kept for good: recorded graphs read it. An engine's pages and tables stay where they are, so there are as many as
# layers, times a few sizes of batches.
@cache
def _addresses(rows: tuple[tuple[int, ...], ...], device: torch.device) -> torch.Tensor:
    """int64 [kv_heads, 6]: pages, their stride in rows of D numbers, table, its stride, slots, window."""
    return torch.tensor(rows, dtype=torch.int64).to(device)


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
        addresses.shape[1],
        *shape,
        tile,
        num_warps=4,
    )
    rows = _room(query.device) // (2 * tile_size(d) * query.element_size())
    if step.most > 1:
        attend_chunks(query, addresses, step, scaling, output, group, shape, rows)
    spans = tuple(min(each.sink + each.window, each.table.shape[1] * each.size) for each in steps)
    attend_tokens(query, addresses, step, scaling, output, group, shape, rows, spans)
