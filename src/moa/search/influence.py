"""Attention that measures, while it is differentiated, what every window of every query head would cost.

The idea: as in a FlashAttention backward no N x N matrix exists. Rows are visited in strips; for a strip of S rows the
attention A and the softmax gradient dS_ij = A_ij (dA_ij - R_i) are [heads, S, keys], and all else follows from them:

- Masking a set M of a row changes the loss by DL = -sum_M dS / kappa, where kappa is the mass of the keys kept. A row
  of dS sums to 0, so DL = sum_kept dS / kappa as well: the sum over the side with less mass loses no digits, and
  1 - m, which makes the textbook form ill-conditioned, never appears.
- Keys are stored in reversed order. Column c of a strip is then at distance c - (S - 1 - row), so rows shifted by one
  element each are a *view* with row stride ``keys - 1``: sums by blocks of distance need no gather and no copy. What
  such a shifted row reads beyond its end are the next row's keys that lie in the future, which are 0.
- Sums over blocks, accumulated from the near and from the far end, give all windows at once.

Memory is O(strip x N) per head; time is that of a usual attention backward plus two reads of [heads, S, keys].
`moa.search.influence_reference` is the definition; on an NVIDIA GPU `moa.search.triton_influence` does the same in
tiles.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from types import ModuleType
from typing import Any, NamedTuple

import torch

from moa.attention import backends, sdpa
from moa.attention.options import AttentionOptions, effective_span
from moa.search.tables import BLOCK, SINK, window_count


class Estimator(StrEnum):
    """How the cost of masking is estimated from one backward pass."""

    JOINT = "joint"  # the exact first-order effect of masking the whole set, squared, summed over rows
    PAPER = "paper"  # absolute effects of masking single keys, summed over rows and keys


@dataclass
class InfluenceCollector:
    """Where the backward passes of `influence_attention` leave their loss tables.

    Attributes
    ----------
    estimator : Estimator
    strip : int
        Query rows worked on at a time, where the Triton kernels do not run.
    backend : str, optional
        As in `moa.attention.backends.pick`.
    tables : dict of int to float64 [query_heads, W]
        Loss table per layer, on the device of the model.
    """

    estimator: Estimator
    strip: int = 128
    backend: str | None = None
    tables: dict[int, torch.Tensor] = field(default_factory=dict)

    def add(self, layer: int, table: torch.Tensor) -> None:
        """Add a table to those of ``layer``."""
        self.tables[layer] = self.tables[layer] + table if layer in self.tables else table


def influence_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    options: AttentionOptions,
    collector: InfluenceCollector,
    layer: int,
) -> torch.Tensor:
    """Causal attention of one sequence; its backward pass also adds a loss table to ``collector``.

    Parameters
    ----------
    query : [query_heads, N, head_dim]
    key, value : [kv_heads, N, head_dim]
        Query heads are consecutive per KV head. float64 is worked on in float64, any other dtype in float32.
    options : AttentionOptions
        Learned sink logits get no gradient.
    collector : InfluenceCollector
    layer : int
        Under which the table is filed.

    Returns
    -------
    [query_heads, N, head_dim], dtype of ``query``
    """
    result: torch.Tensor = _InfluenceAttention.apply(query, key, value, options, collector, layer)
    return result


class _InfluenceAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        options: AttentionOptions,
        collector: InfluenceCollector,
        layer: int,
    ) -> torch.Tensor:
        ctx.options, ctx.collector, ctx.layer = options, collector, layer
        lse = None
        if not _kernels_take(query, collector.backend):
            out = _Strips(query, key, value, options, collector.strip).forward()
        else:
            with torch.cuda.device_of(query):
                out, lse = _kernels().influence_forward(*_contiguous_rows(query, key, value), *_arguments(options))
        ctx.save_for_backward(query, key, value, out, lse)  # out unrounded: R_i from half precision is too coarse
        return out.to(query.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        options, estimator = ctx.options, ctx.collector.estimator
        if lse is None:
            strips = _Strips(query, key, value, options, ctx.collector.strip)
            d_query, d_key, d_value, table = strips.backward(out, d_out, estimator)
        else:
            with torch.cuda.device_of(query):
                d_query, d_key, d_value, table = _kernels().influence_backward(
                    *_contiguous_rows(query, key, value),
                    out,
                    lse,
                    *_contiguous_rows(d_out.to(query.dtype)),
                    estimator is Estimator.JOINT,
                    window_count(query.shape[1]),
                    *_arguments(options),
                )
        ctx.collector.add(ctx.layer, table)
        return d_query.to(query.dtype), d_key.to(key.dtype), d_value.to(value.dtype), None, None, None


def _kernels_take(query: torch.Tensor, backend: str | None) -> bool:
    if backends.pick(query.device, query.dtype, query.shape[-1], backend) is sdpa:
        return False
    return query.dtype != torch.float32 or query.shape[-1] <= 128  # wider tiles of float32 do not fit on the chip


def _kernels() -> ModuleType:
    from moa.search import triton_influence  # where Triton is not installed, nobody asks for it

    return triton_influence


def _contiguous_rows(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in tensors]


def _arguments(options: AttentionOptions) -> tuple[float, float, int | None, torch.Tensor | None]:
    return options.scaling, options.softcap or 0.0, options.sliding_window, options.sink_logits


class _Strip(NamedTuple):
    """Queries start..stop-1 and keys low..stop-1, of which those before ``first`` are visible to no row."""

    start: int
    stop: int
    first: int
    low: int

    @property
    def rows(self) -> slice:
        return slice(self.start, self.stop)


class _Probabilities(NamedTuple):
    attention: torch.Tensor  # [query_heads, rows, keys], 0 where a key is not visible
    learned_mass: torch.Tensor  # [query_heads, rows], what a learned sink takes of each row
    tanh: torch.Tensor | None  # [query_heads, rows, keys], capped logits / softcap


class _Strips:
    """One attention call, in the arithmetic dtype, keys and values in reversed order."""

    def __init__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        options: AttentionOptions,
        strip: int,
    ):
        self.options, self.strip = options, strip
        self.query = query
        self.heads, self.length, _ = query.shape
        self.kv_heads = key.shape[0]
        self.dtype = torch.promote_types(query.dtype, torch.float32)
        self.window = options.sliding_window or self.length
        _, self.sink = effective_span(SINK, SINK, options.sliding_window)
        # Shifted rows must end in zeros. Without a sink to overwrite, one block of invisible keys does it.
        self.padding = BLOCK - self.sink
        self.key, self.value = (
            torch.nn.functional.pad(tensor.to(self.dtype).flip(1), (0, 0, 0, self.padding)) for tensor in (key, value)
        )
        # Buffers are made once per call: fresh memory for every strip costs as much as the arithmetic on a CPU.
        self._buffers: dict[str, torch.Tensor] = {}

    def __iter__(self) -> Iterator[_Strip]:
        for start in range(0, self.length, self.strip):
            first = max(0, start - self.window + 1)
            yield _Strip(start, min(start + self.strip, self.length), first, first - self.padding)

    def buffer(self, name: str, strip: _Strip) -> torch.Tensor:
        """Uninitialised [query_heads, rows, keys]; the same memory for the same name."""
        if name not in self._buffers:
            rows, keys = min(self.strip, self.length), min(self.length, self.window + self.strip) + self.padding
            self._buffers[name] = self.key.new_empty(self.heads * rows * keys)
        shape = self.heads, strip.stop - strip.start, strip.stop - strip.low
        return self._buffers[name][: shape[0] * shape[1] * shape[2]].view(shape)

    def by_kv_head(self, per_query_head: torch.Tensor) -> torch.Tensor:
        """[query_heads, rows, x] as [kv_heads, group * rows, x], so that a group shares one matrix product."""
        return per_query_head.reshape(self.kv_heads, -1, per_query_head.shape[-1])

    def keys(self, reversed_tensor: torch.Tensor, strip: _Strip) -> torch.Tensor:
        """The strip's keys, [kv_heads, keys, head_dim], last key first."""
        return reversed_tensor[:, self.length - strip.stop : self.length - strip.low]

    def scaled_query(self, strip: _Strip) -> torch.Tensor:
        return self.by_kv_head(self.query[:, strip.rows].to(self.dtype) * self.options.scaling)

    def probabilities(self, strip: _Strip) -> _Probabilities:
        options = self.options
        logits = self.buffer("logits", strip)
        torch.bmm(self.scaled_query(strip), self.keys(self.key, strip).mT, out=self.by_kv_head(logits))
        tanh = None
        if options.softcap is not None:
            tanh = logits.div_(options.softcap).tanh_()
            logits = torch.mul(tanh, options.softcap, out=self.buffer("capped", strip))
        rows, keys = logits.shape[1:]
        row = torch.arange(rows, device=logits.device).unsqueeze(1)
        column = torch.arange(keys, device=logits.device)
        # distance i - j = column - (rows - 1 - row)
        logits[..., :rows].masked_fill_(column[:rows] < rows - 1 - row, -torch.inf)
        logits[..., self.window :].masked_fill_(column[self.window :] >= self.window + rows - 1 - row, -torch.inf)
        logits[..., strip.stop :] = -torch.inf
        if options.sink_logits is None:
            attention = torch.softmax(logits, -1, out=self.buffer("attention", strip))
            return _Probabilities(attention, attention.new_zeros(attention.shape[:2]), tanh)
        sink_logits = options.sink_logits.to(logits).view(-1, 1, 1).expand(-1, rows, 1)
        full = torch.cat([logits, sink_logits], -1).softmax(-1)
        return _Probabilities(full[..., :keys].contiguous(), full[..., keys], tanh)

    def forward(self) -> torch.Tensor:
        """Attention output [query_heads, N, head_dim] in the arithmetic dtype."""
        out = self.value.new_empty(self.heads, self.length, self.value.shape[-1])
        for strip in self:
            attention = self.by_kv_head(self.probabilities(strip).attention)
            out[:, strip.rows] = (attention @ self.keys(self.value, strip)).view(self.heads, -1, out.shape[-1])
        return out

    def backward(
        self, out: torch.Tensor, d_out: torch.Tensor, estimator: Estimator
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gradients of query, key and value, and the loss table float64 [query_heads, W]."""
        losses = _joint_losses if estimator is Estimator.JOINT else _paper_losses
        missing_sink = (SINK - self.sink) // BLOCK  # blocks that such a layer's window has on top
        d_query = self.key.new_empty(self.query.shape)
        d_key, d_value = torch.zeros_like(self.key), torch.zeros_like(self.value)
        table = d_query.new_zeros(self.heads, window_count(self.length), dtype=torch.float64)
        for strip in self:
            attention, learned_mass, tanh = self.probabilities(strip)
            d_rows = d_out[:, strip.rows].to(self.dtype)
            row_mean = (d_rows * out[:, strip.rows]).sum(-1)  # R_i
            d_rows = self.by_kv_head(d_rows)
            self.keys(d_value, strip).baddbmm_(self.by_kv_head(attention).mT, d_rows)

            flow = self.buffer("flow", strip)  # dA, then dS
            torch.bmm(d_rows, self.keys(self.value, strip).mT, out=self.by_kv_head(flow))
            flow.sub_(row_mean.unsqueeze(-1)).mul_(attention)
            d_logits = self.by_kv_head(flow if tanh is None else tanh.square_().neg_().add_(1).mul_(flow))
            d_strip = torch.bmm(d_logits, self.keys(self.key, strip)).mul_(self.options.scaling)
            d_query[:, strip.rows] = d_strip.view(self.heads, -1, d_query.shape[-1])
            self.keys(d_key, strip).baddbmm_(d_logits.mT, self.scaled_query(strip))

            blocks = -(-(strip.stop - max(self.sink, strip.first)) // BLOCK)  # blocks of distance that can be masked
            entries = blocks - 1 - missing_sink
            if entries > 0:
                learned_flow = -learned_mass * row_mean  # a learned sink has no value, so its dA is 0
                found = losses(attention, flow, learned_mass, learned_flow, self.sink, blocks)
                table[:, :entries] += found[:, missing_sink:]
        return d_query, d_key[:, : self.length].flip(1), d_value[:, : self.length].flip(1), table


def _joint_losses(
    attention: torch.Tensor,
    flow: torch.Tensor,
    learned_mass: torch.Tensor,
    learned_flow: torch.Tensor,
    sink: int,
    blocks: int,
) -> torch.Tensor:
    """Sum over rows of DL^2 for windows of 1..blocks-1 blocks: float64 [query_heads, blocks - 1].

    ``attention`` and ``flow`` (dS) are [query_heads, rows, keys], and are overwritten; their last ``sink`` columns are
    the sink. ``learned_mass`` and ``learned_flow`` are those of the learned sink, [query_heads, rows].
    """
    kept_mass, _ = _kept_and_masked(attention, learned_mass, sink, blocks)
    kept_flow, masked_flow = _kept_and_masked(flow, learned_flow, sink, blocks)
    # The side with less mass has the more exact sum. A kept mass of 0, by underflow, counts as no effect.
    effect = torch.where(kept_mass < 0.5, kept_flow, -masked_flow) / kept_mass.clamp_min(_tiny(attention))
    return effect.square().sum(1)


def _paper_losses(
    attention: torch.Tensor,
    flow: torch.Tensor,
    learned_mass: torch.Tensor,
    learned_flow: torch.Tensor,
    sink: int,
    blocks: int,
) -> torch.Tensor:
    """Sum over rows and masked keys of |E|; arguments and result as in `_joint_losses`."""
    # E = -dS / (1 - A). For the largest key of a row, where 1 - A may have no digits left, both parts are sums over the
    # other keys instead; they are 0 in a row with one key.
    largest = attention.max(-1, keepdim=True).indices
    attention.scatter_(-1, largest, 0)
    flow.scatter_(-1, largest, 0)
    other_mass = attention.sum(-1, keepdim=True) + learned_mass.unsqueeze(-1)
    other_flow = flow.sum(-1, keepdim=True) + learned_flow.unsqueeze(-1)
    effect = flow.div_(attention.neg_().add_(1))
    effect.scatter_(-1, largest, other_flow / other_mass.clamp_min(_tiny(attention)))
    effect[..., effect.shape[-1] - sink :] = 0
    return _from_far_end(_by_distance(effect.abs_(), blocks).sum((1, 3))[..., 1:].double())


def _kept_and_masked(
    strip: torch.Tensor, learned: torch.Tensor, sink: int, blocks: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row's sums inside and outside of windows of 1..blocks-1 blocks: float64 [heads, rows, blocks - 1] both.

    The sink columns of ``strip`` [heads, rows, keys] and ``learned`` [heads, rows] are inside; the columns are zeroed.
    """
    sink_columns = strip[..., strip.shape[-1] - sink :]
    always = sink_columns.sum(-1) + learned
    sink_columns.zero_()
    by_block = _by_distance(strip, blocks).sum(-1).double()
    return by_block[..., :-1].cumsum(-1) + always.unsqueeze(-1), _from_far_end(by_block[..., 1:])


def _by_distance(strip: torch.Tensor, blocks: int) -> torch.Tensor:
    """View of a contiguous [heads, rows, keys] as [heads, rows, blocks, BLOCK], ordered by distance from the row."""
    heads, rows, keys = strip.shape
    return strip.as_strided(
        (heads, rows, blocks, BLOCK), (rows * keys, keys - 1, BLOCK, 1), strip.storage_offset() + rows - 1
    )


def _from_far_end(blocks: torch.Tensor) -> torch.Tensor:
    """Sums of each entry and all behind it, along the last dimension."""
    return blocks.flip(-1).cumsum(-1).flip(-1)


def _tiny(tensor: torch.Tensor) -> float:
    return torch.finfo(tensor.dtype).tiny
