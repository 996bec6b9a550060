"""Attention of heads that have not decided on a span yet: a weighted mean of what each span would give.

With weights that may be any numbers, what a plan loses becomes a smooth function of how much of each span a head has,
and one backward pass tells the slope for every span of every head at once (`moa.search.anneal`).

The spans of a head are nested: a longer one sees all that a shorter one sees. So keys fall into *bands* of distance:
band b is what span b sees and the shorter ones do not; the sink is of band 0. With e the exponential of a score and l_r
the sum of e over what span r sees, row i gives key j of band b the weight

    e_ij C_ib,  C_ib = sum over r >= b of w_r / l_ir

and, with D_ir the mean of dA over what span r sees, the gradients are

    dw_r = sum over rows of D_ir,  dS_ij = e_ij (C_ib dA_ij - E_ib),  E_ib = sum over r >= b of w_r D_ir / l_ir

so that the gradients for all spans together cost hardly more than those for the longest one alone.
"""

from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch

from moa.attention.options import AttentionOptions, effective_span
from moa.search.influence import kernels_take

_STRIP = 128  # query rows worked on at a time, where the Triton kernels do not run: memory grows with it


def blended_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    weights: torch.Tensor,
    spans: Sequence[int],
    sink: int,
    options: AttentionOptions,
    backend: str | None = None,
) -> torch.Tensor:
    """Sum over spans of ``weights[:, r]`` times span attention with ``spans[r]``, for one sequence.

    Parameters
    ----------
    query : [query_heads, N, head_dim]
    key, value : [kv_heads, N, head_dim]
        Query heads are consecutive per KV head. float64 is worked on in float64, any other dtype in float32.
    weights : [kv_heads, spans]
        All heads of a GQA group share their KV head's.
    spans : rising integers
        Sink included, each longer than the sink.
    sink : int
        First tokens that are always seen.
    options : AttentionOptions
        Learned sink logits get no gradient.
    backend : str, optional
        As in `moa.attention.backends.pick`.

    Returns
    -------
    [query_heads, N, head_dim], dtype of ``query``
    """
    within = [effective_span(span, sink, options.sliding_window) for span in spans]
    sink = within[0][1]
    # a layer's own sliding window makes equals of longer spans
    windows = sorted({min(span - sink, query.shape[1]) for span, _ in within})
    if len(windows) < len(spans):
        place = [windows.index(min(span - sink, query.shape[1])) for span, _ in within]
        equal = torch.nn.functional.one_hot(torch.tensor(place, device=weights.device), len(windows))
        weights = weights @ equal.to(weights.dtype)
    result: torch.Tensor = _Blended.apply(query, key, value, weights, windows, sink, options, backend)
    return result


class _Blended(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        weights: torch.Tensor,
        windows: list[int],
        sink: int,
        options: AttentionOptions,
        backend: str | None,
    ) -> torch.Tensor:
        ctx.windows, ctx.sink, ctx.options = windows, sink, options
        ctx.kernels = _kernels(query, backend)
        if ctx.kernels is None:
            ctx.save_for_backward(query, key, value, weights)
            return _Strips(query, key, value, weights, windows, sink, options).forward().to(query.dtype)
        with torch.cuda.device_of(query):
            rest = windows, sink, options
            blended, outs, lse = ctx.kernels.blended_forward(query, key, value, weights, *rest)
            ctx.save_for_backward(query, key, value, weights, outs, lse)
            result: torch.Tensor = blended
            return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, weights, *kept = ctx.saved_tensors
        rest = ctx.windows, ctx.sink, ctx.options
        if ctx.kernels is None:
            gradients = _Strips(query, key, value, weights, *rest).backward(d_out)
        else:
            with torch.cuda.device_of(query):
                gradients = ctx.kernels.blended_backward(query, key, value, weights, d_out, *kept, *rest)
        like = zip(gradients, (query, key, value, weights), strict=True)
        return *(gradient.to(tensor.dtype) for gradient, tensor in like), None, None, None, None


def _kernels(query: torch.Tensor, backend: str | None) -> ModuleType | None:
    if not kernels_take(query, backend):
        return None
    from moa.search import triton_blended  # where Triton is not installed, nobody asks for it

    return triton_blended


class _Band(NamedTuple):
    """Keys of one band that some row of a strip sees: their columns, and which row sees which."""

    number: int
    columns: slice
    seen: torch.Tensor  # bool [rows, columns]


class _Strips:
    """One attention call by strips of query rows, in the arithmetic dtype."""

    def __init__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        weights: torch.Tensor,
        windows: list[int],
        sink: int,
        options: AttentionOptions,
    ):
        self.dtype = torch.promote_types(query.dtype, torch.float32)
        self.query, self.key, self.value = (tensor.to(self.dtype) for tensor in (query, key, value))
        self.windows, self.sink, self.options = windows, sink, options
        self.heads, self.length, _ = query.shape
        self.kv_heads = key.shape[0]
        each = weights.to(self.dtype).repeat_interleave(self.heads // self.kv_heads, 0)
        self.weights = each.T.unsqueeze(-1)  # [spans, query_heads, 1]

    def __iter__(self) -> Iterator[slice]:
        for start in range(0, self.length, _STRIP):
            yield slice(start, min(start + _STRIP, self.length))

    def by_kv_head(self, per_query_head: torch.Tensor) -> torch.Tensor:
        """[query_heads, rows, x] as [kv_heads, group * rows, x], so that a group shares one matrix product."""
        return per_query_head.reshape(self.kv_heads, -1, per_query_head.shape[-1])

    def bands(self, rows: slice) -> list[_Band]:
        """The bands of a strip; every visible key of a row is in one of them."""
        i = torch.arange(rows.start, rows.stop, device=self.key.device).unsqueeze(1)

        def band(number: int, first: int, last: int) -> _Band:
            columns = slice(max(first, 0), min(last, rows.stop))
            j = torch.arange(columns.start, columns.stop, device=self.key.device)
            distance = i - j
            if last <= self.sink:
                return _Band(number, columns, distance >= 0)
            near = self.windows[number - 1] if number else 0
            return _Band(number, columns, (distance >= near) & (distance < self.windows[number]) & (j >= self.sink))

        near = [0, *self.windows]
        found = [band(0, 0, self.sink)] if self.sink else []
        for number, window in enumerate(self.windows):
            first, last = max(rows.start - window + 1, self.sink), rows.stop - near[number]
            if last > first:
                found.append(band(number, first, last))
        return found

    def exponentials(self, rows: slice) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """e [query_heads, rows, keys], that of the learned sink [query_heads, rows, 1], and the soft cap's tanh."""
        group_rows = self.by_kv_head(self.query[:, rows] * self.options.scaling)
        logits = (group_rows @ self.key[:, : rows.stop].mT).view(self.heads, -1, rows.stop)
        tanh = None
        if self.options.softcap is not None:
            tanh = torch.tanh(logits / self.options.softcap)
            logits = tanh * self.options.softcap
        i = torch.arange(rows.start, rows.stop, device=logits.device).unsqueeze(1)
        j = torch.arange(rows.stop, device=logits.device)
        seen = (j <= i) & ((j < self.sink) | (i - j < self.windows[-1]))
        logits = logits.masked_fill(~seen, -torch.inf)
        high = logits.amax(-1, keepdim=True)
        learned = torch.zeros_like(high)
        if self.options.sink_logits is not None:
            own = self.options.sink_logits.to(logits).view(-1, 1, 1)
            high = torch.maximum(high, own)
            learned = (own - high).exp()
        return (logits - high).exp_(), learned, tanh

    def sums(self, strip: torch.Tensor, bands: list[_Band]) -> torch.Tensor:
        """Sums of ``strip`` [query_heads, rows, keys] over what each span sees: [spans, query_heads, rows]."""
        result = strip.new_zeros(len(self.windows), *strip.shape[:2])
        for band in bands:
            result[band.number] += (strip[..., band.columns] * band.seen).sum(-1)
        return result.cumsum(0)

    @staticmethod
    def by_band(strip: torch.Tensor, each: torch.Tensor, bands: list[_Band]) -> torch.Tensor:
        """``strip`` [query_heads, rows, keys] times ``each`` [spans, query_heads, rows] of the keys' bands."""
        result = torch.zeros_like(strip)
        for band in bands:
            factor = each[band.number].unsqueeze(-1) * band.seen
            result[..., band.columns] += strip[..., band.columns] * factor
        return result

    def total(self, e: torch.Tensor, learned: torch.Tensor, bands: list[_Band]) -> torch.Tensor:
        """l: [spans, query_heads, rows]."""
        return (self.sums(e, bands) + learned.squeeze(-1)).clamp_min(torch.finfo(self.dtype).tiny)

    def forward(self) -> torch.Tensor:
        """[query_heads, N, head_dim] in the arithmetic dtype."""
        out = torch.empty_like(self.query)
        for rows in self:
            bands = self.bands(rows)
            e, learned, _ = self.exponentials(rows)
            share = _from_longest(self.weights / self.total(e, learned, bands))
            blended = self.by_kv_head(self.by_band(e, share, bands))
            out[:, rows] = (blended @ self.value[:, : rows.stop]).view(self.heads, -1, out.shape[-1])
        return out

    def backward(self, d_out: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Gradients of query, key, value and weights in the arithmetic dtype."""
        d_query, d_key, d_value = (torch.zeros_like(tensor) for tensor in (self.query, self.key, self.value))
        d_weights = self.weights.new_zeros(len(self.windows), self.heads)
        for rows in self:
            bands = self.bands(rows)
            e, learned, tanh = self.exponentials(rows)
            total = self.total(e, learned, bands)
            share = _from_longest(self.weights / total)
            blended = self.by_kv_head(self.by_band(e, share, bands))
            d_rows = self.by_kv_head(d_out[:, rows].to(self.dtype))
            d_value[:, : rows.stop] += blended.mT @ d_rows
            flow = e * (d_rows @ self.value[:, : rows.stop].mT).view_as(e)
            mean = self.sums(flow, bands) / total  # D
            d_weights += mean.sum(-1)
            d_logits = self.by_band(flow, share, bands) - self.by_band(
                e, _from_longest(self.weights * mean / total), bands
            )
            if tanh is not None:
                d_logits = d_logits * (1 - tanh.square())
            d_logits = self.by_kv_head(d_logits) * self.options.scaling
            d_query[:, rows] = (d_logits @ self.key[:, : rows.stop]).view(self.heads, -1, d_query.shape[-1])
            d_key[:, : rows.stop] += d_logits.mT @ self.by_kv_head(self.query[:, rows])
        return d_query, d_key, d_value, d_weights.view(-1, self.kv_heads, self.heads // self.kv_heads).sum(-1).T


def _from_longest(each: torch.Tensor) -> torch.Tensor:
    """Sums over a span and all longer ones, along the first dimension."""
    return each.flip(0).cumsum(0).flip(0)
