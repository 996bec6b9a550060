"""Span attention over an engine's pages, by PyTorch's operators: right on any device, and what the kernels mean.

An engine keeps a request's keys and values in pages, and a table of pages for each request. Heads with one span share
such a table (a group); every head has pages of its own in it. What a step reads depends on the group alone, so where
the keys lie and who sees them is worked out once for a group and serves all of its heads. Requests that decode one
token are attended together; a chunk of a prompt by itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch.nn.functional import scaled_dot_product_attention


@dataclass(frozen=True)
class Reading:
    """What the queries of some requests, all with as many queries, read.

    Attributes
    ----------
    queries : int64 [requests, queries]
        Rows of the step's tokens.
    page, offset : int64 [requests, keys]
        Where the keys lie; anywhere where none is.
    mask : bool [requests, 1, queries, keys]
        What each query sees.
    """

    queries: torch.Tensor
    page: torch.Tensor
    offset: torch.Tensor
    mask: torch.Tensor


@dataclass(frozen=True)
class Step:
    """An engine's step, for the heads of a group.

    Attributes
    ----------
    table : int32 [requests, pages]
        Pages of each request in the order of its tokens; anything where none is held.
    slots : int64 [tokens]
        Where each new token goes: page times ``size`` plus its place there; below 0 where nothing is stored.
    starts : int32 [requests + 1]
        New tokens of a request are rows ``starts[request]`` to ``starts[request + 1]``.
    lengths : int32 [requests]
        Tokens of each request, the new ones included; 0 where there is none.
    most : int
        New tokens of the request that has most.
    sink, window : int
        Query i sees key j if j <= i and (j < sink or i - j < window).
    size : int
        Tokens of a page.
    """

    table: torch.Tensor
    slots: torch.Tensor
    starts: torch.Tensor
    lengths: torch.Tensor
    most: int
    sink: int
    window: int
    size: int

    @cached_property
    def stored(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """int64: rows of the new tokens that are stored, and the page and place that each goes to."""
        rows = torch.nonzero(self.slots >= 0)[:, 0]
        slots = self.slots[rows]
        return rows, slots // self.size, slots % self.size

    @cached_property
    def readings(self) -> tuple[Reading, ...]:
        """Who reads what."""
        starts, lengths = self.starts.cpu().long(), self.lengths.cpu().long()
        counts = starts.diff()
        one = torch.nonzero((counts == 1) & (lengths > 0))[:, 0]
        groups = [one] if len(one) else []
        groups += [request[None] for request in torch.nonzero((counts > 1) & (lengths > 0))[:, 0]]
        return tuple(
            self._reading(starts[which], int(counts[which[0]]), lengths[which], self.table[which].long())
            for which in groups
        )

    def _reading(self, starts: torch.Tensor, queries: int, lengths: torch.Tensor, table: torch.Tensor) -> Reading:
        first = lengths - queries  # position of the first query
        begin = (first - self.window + 1).clamp(min=self.sink)  # of the window, beyond the sink
        window = begin[:, None] + torch.arange(max(0, int((lengths - begin).max())))
        key = torch.cat([torch.arange(self.sink).expand(len(starts), -1), window], 1)
        query = first[:, None] + torch.arange(queries)
        distance = query[:, :, None] - key[:, None, :]
        seen = (distance >= 0) & ((key[:, None, :] < self.sink) | (distance < self.window))
        key = key.minimum(lengths[:, None] - 1)  # what is not there is not seen
        device = table.device
        return Reading(
            queries=(starts[:, None] + torch.arange(queries)).to(device),
            page=table.gather(1, (key // self.size).to(device)),
            offset=(key % self.size).to(device),
            mask=seen[:, None].to(device),
        )


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pages: Sequence[torch.Tensor],
    steps: Sequence[Step],
    scaling: float,
    output: torch.Tensor,
) -> None:
    """Store a step's new tokens, then attend over all that is stored.

    Parameters
    ----------
    query, output : [tokens, query heads, head_dim]
        The query heads of a KV head are neighbours. ``output`` is written, but for rows of no request.
    key, value : [tokens, kv_heads, head_dim]
    pages : for each KV head, [pages, size, 2 * head_dim]
        Keys, then values.
    steps : for each KV head, Step
    scaling : float
    """
    d = query.shape[2]
    grouped = query.unflatten(1, (key.shape[1], -1))
    written = output.view(grouped.shape)
    for head, (page, step) in enumerate(zip(pages, steps, strict=True)):
        rows, number, place = step.stored
        page[number, place] = torch.cat([key[rows, head], value[rows, head]], -1).to(page.dtype)
        for reading in step.readings:
            read = page[reading.page, reading.offset].to(query.dtype)[:, None]  # [requests, 1, keys, 2 head_dim]
            keys, values = read.split(d, -1)
            q = grouped[reading.queries, head].transpose(1, 2)  # [requests, query heads, queries, head_dim]
            heads = (-1, q.shape[1], -1, -1)
            found = scaled_dot_product_attention(
                q, keys.expand(heads), values.expand(heads), attn_mask=reading.mask, scale=scaling
            )
            written[reading.queries, head] = found.transpose(1, 2)
