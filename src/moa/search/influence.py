"""Attention that measures, while it is differentiated, what every window of every query head would cost.

The idea: as in a FlashAttention backward no N x N matrix exists. Rows are visited in strips; for a strip of S rows the
attention A and the softmax gradient dS_ij = A_ij (dA_ij - R_i) are [heads, S, keys], and everything follows from them:

- Masking a set M of a row changes the loss by DL = -sum_M dS / kappa, where kappa is the mass of the keys that are kept.
  A row of dS sums to 0, so DL = sum_kept dS / kappa as well: taking the sum over the smaller side loses no digits,
  and 1 - A, which is what makes the textbook form ill-conditioned, never appears.
- Keys are stored in reversed order. Column c of a strip is then at distance c - (S - 1 - row), so rows shifted by one
  element each are a *view* with row stride ``keys - 1``: sums by blocks of distance need no gather and no copy. What
  such a shifted row reads beyond its end are the next row's keys that lie in the future, which are 0.
- Sums over blocks, accumulated from the near and from the far end, give all windows at once.

Memory is O(strip x N) per head; time is that of a usual attention backward plus two reads of [heads, S, keys].
`moa.search.influence_reference` is the definition.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple

import torch

from moa.plan import BLOCK, SINK


class Estimator(StrEnum):
    """How the cost of masking is estimated from one backward pass."""

    JOINT = "joint"  # the exact first-order effect of masking the whole set, squared, summed over rows
    PAPER = "paper"  # absolute effects of masking single keys, summed over rows and keys


def window_count(length: int) -> int:
    """Windows in a loss table at sequence length ``length``: multiples of BLOCK until nothing but the sink is outside."""
    return max(1, -(-(length - SINK) // BLOCK))


@dataclass
class InfluenceCollector:
    """Where the backward passes of `influence_attention` leave their loss tables.

    Attributes
    ----------
    estimator : Estimator
    strip : int
        Query rows worked on at a time.
    tables : dict of int to float64 [query_heads, W]
        Loss table per layer, on the device of the model.
    """

    estimator: Estimator
    strip: int = 128
    tables: dict[int, torch.Tensor] = field(default_factory=dict)

    def add(self, layer: int, table: torch.Tensor) -> None:
        """Add a table to those of ``layer``."""
        self.tables[layer] = self.tables[layer] + table if layer in self.tables else table


@dataclass(frozen=True)
class LogitRule:
    """How the products of queries and keys become attention logits.

    Attributes
    ----------
    scaling : float
        Factor of the products.
    softcap : float, optional
        Logits s become ``softcap * tanh(s / softcap)`` (Gemma 2).
    sliding_window : int, optional
        The model's own window: only keys with i - j < sliding_window are visible.
    """

    scaling: float
    softcap: float | None = None
    sliding_window: int | None = None


def influence_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rule: LogitRule,
    collector: InfluenceCollector,
    layer: int,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of one sequence; its backward pass also adds a loss table to ``collector``.

    Parameters
    ----------
    query : [query_heads, N, head_dim]
    key, value : [kv_heads, N, head_dim]
        Query heads are consecutive per KV head. float64 is worked on in float64, any other dtype in float32.
    rule : LogitRule
    collector : InfluenceCollector
    layer : int
        Under which the table is filed.
    sinks : [query_heads], optional
        Learned sinks (gpt_oss): one more logit per row, whose value is 0. They get no gradient.

    Returns
    -------
    [query_heads, N, head_dim], dtype of ``query``
    """
    result: torch.Tensor = _InfluenceAttention.apply(query, key, value, sinks, rule, collector, layer)
    return result


class _InfluenceAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        sinks: torch.Tensor | None,
        rule: LogitRule,
        collector: InfluenceCollector,
        layer: int,
    ) -> torch.Tensor:
        strips = _Strips(query, key, value, sinks, rule, collector.strip)
        out = strips.forward()
        ctx.save_for_backward(query, key, value, sinks, out)  # out unrounded: R_i from a half-precision out is too coarse
        ctx.rule, ctx.collector, ctx.layer = rule, collector, layer
        return out.to(query.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, sinks, out = ctx.saved_tensors
        strips = _Strips(query, key, value, sinks, ctx.rule, ctx.collector.strip)
        d_query, d_key, d_value, table = strips.backward(out, d_out, ctx.collector.estimator)
        ctx.collector.add(ctx.layer, table)
        return d_query.to(query.dtype), d_key.to(key.dtype), d_value.to(value.dtype), None, None, None, None


class _Strip(NamedTuple):
    """Queries start..stop-1 and keys low..stop-1, of which only those from ``first`` on are visible to any row."""

    start: int
    stop: int
    first: int
    low: int

    @property
    def rows(self) -> slice:
        return slice(self.start, self.stop)


class _Probabilities(NamedTuple):
    attention: torch.Tensor  # [query_heads, rows, keys], 0 where a key is not visible
    learned: torch.Tensor | None  # [query_heads, rows], mass of the learned sink
    tanh: torch.Tensor | None  # [query_heads, rows, keys], logits / softcap


class _Strips:
    """One attention call, in the arithmetic dtype, keys and values in reversed order."""

    def __init__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        sinks: torch.Tensor | None,
        rule: LogitRule,
        strip: int,
    ):
        self.dtype = torch.promote_types(query.dtype, torch.float32)
        self.query = query
        self.key = key.to(self.dtype).flip(1)
        self.value = value.to(self.dtype).flip(1)
        self.sinks = None if sinks is None else sinks.to(self.dtype)
        self.rule, self.strip = rule, strip
        self.heads, self.length, _ = query.shape
        self.kv_heads = key.shape[0]
        # Buffers are made once per call: fresh memory for every strip costs as much as the arithmetic on a CPU.
        self._buffers: dict[str, torch.Tensor] = {}

    def __iter__(self) -> Iterator[_Strip]:
        window = self.rule.sliding_window or self.length
        for start in range(0, self.length, self.strip):
            first = max(0, start - window + 1)
            # one block of invisible keys more, so that shifted rows end in zeros
            yield _Strip(start, min(start + self.strip, self.length), first, max(0, first - BLOCK))

    def buffer(self, name: str, strip: _Strip) -> torch.Tensor:
        """Uninitialised [query_heads, rows, keys]; the same memory for the same name."""
        if name not in self._buffers:
            window = self.rule.sliding_window or self.length
            keys = min(self.length, window + self.strip + BLOCK)
            self._buffers[name] = self.key.new_empty(self.heads * min(self.strip, self.length) * keys)
        shape = self.heads, strip.stop - strip.start, strip.stop - strip.low
        return self._buffers[name][: shape[0] * shape[1] * shape[2]].view(shape)

    def by_kv_head(self, per_query_head: torch.Tensor) -> torch.Tensor:
        """[query_heads, rows, x] as [kv_heads, group * rows, x], so that a group shares one matrix product."""
        return per_query_head.reshape(self.kv_heads, -1, per_query_head.shape[-1])

    def keys(self, reversed_tensor: torch.Tensor, strip: _Strip) -> torch.Tensor:
        """The strip's keys, [kv_heads, keys, head_dim], last key first."""
        return reversed_tensor[:, self.length - strip.stop : self.length - strip.low]

    def scaled_query(self, strip: _Strip) -> torch.Tensor:
        return self.by_kv_head(self.query[:, strip.rows].to(self.dtype) * self.rule.scaling)

    def probabilities(self, strip: _Strip) -> _Probabilities:
        logits = self.buffer("logits", strip)
        torch.bmm(self.scaled_query(strip), self.keys(self.key, strip).mT, out=self.by_kv_head(logits))
        tanh = None
        if self.rule.softcap is not None:
            tanh = logits.div_(self.rule.softcap).tanh_()
            logits = torch.mul(tanh, self.rule.softcap, out=self.buffer("capped", strip))
        rows, keys = logits.shape[1:]
        row = torch.arange(rows, device=logits.device).unsqueeze(1)
        column = torch.arange(keys, device=logits.device)
        # distance i - j = column - (rows - 1 - row)
        logits[..., :rows].masked_fill_(column[:rows] < rows - 1 - row, -torch.inf)
        window = self.rule.sliding_window
        if window is not None:
            logits[..., window:].masked_fill_(column[window:] >= window + rows - 1 - row, -torch.inf)
        if self.sinks is None:
            return _Probabilities(torch.softmax(logits, -1, out=self.buffer("attention", strip)), None, tanh)
        full = torch.cat([logits, self.sinks.view(-1, 1, 1).expand(-1, rows, 1)], -1).softmax(-1)
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
        d_query = self.key.new_empty(self.query.shape)
        d_key, d_value = torch.zeros_like(self.key), torch.zeros_like(self.value)
        table = d_query.new_zeros(self.heads, window_count(self.length), dtype=torch.float64)
        for strip in self:
            attention, learned, tanh = self.probabilities(strip)
            d_rows = d_out[:, strip.rows].to(self.dtype)
            row_mean = (d_rows * out[:, strip.rows]).sum(-1)  # R_i
            d_rows = self.by_kv_head(d_rows)
            self.keys(d_value, strip).baddbmm_(self.by_kv_head(attention).mT, d_rows)

            flow = self.buffer("flow", strip)  # dA, then dS
            torch.bmm(d_rows, self.keys(self.value, strip).mT, out=self.by_kv_head(flow))
            flow.sub_(row_mean.unsqueeze(-1)).mul_(attention)
            d_logits = flow if tanh is None else tanh.square_().neg_().add_(1).mul_(flow)
            d_logits = self.by_kv_head(d_logits)
            d_strip = torch.bmm(d_logits, self.keys(self.key, strip)).mul_(self.rule.scaling)
            d_query[:, strip.rows] = d_strip.view(self.heads, -1, d_query.shape[-1])
            self.keys(d_key, strip).baddbmm_(d_logits.mT, self.scaled_query(strip))

            blocks = -(-(strip.stop - max(SINK, strip.first)) // BLOCK)  # blocks of distance with non-sink keys
            if blocks > 1:
                sink_keys = max(0, SINK - strip.low)
                learned_mass = torch.zeros_like(row_mean) if learned is None else learned
                learned_flow = -learned_mass * row_mean  # the learned sink's value is 0, hence its dA
                losses = _joint_losses if estimator is Estimator.JOINT else _paper_losses
                table[:, : blocks - 1] += losses(attention, flow, learned_mass, learned_flow, sink_keys, blocks)
        return d_query, d_key.flip(1), d_value.flip(1), table


def _joint_losses(
    attention: torch.Tensor,
    flow: torch.Tensor,
    learned_mass: torch.Tensor,
    learned_flow: torch.Tensor,
    sink_keys: int,
    blocks: int,
) -> torch.Tensor:
    """Sum over rows of DL^2 for windows 1..blocks-1 (in blocks): float64 [query_heads, blocks - 1].

    ``attention`` and ``flow`` (dS) are [query_heads, rows, keys], ``learned_*`` [query_heads, rows]; the last
    ``sink_keys`` columns are the sink, and are overwritten.
    """
    sink_mass = attention[..., attention.shape[-1] - sink_keys :]
    sink_flow = flow[..., flow.shape[-1] - sink_keys :]
    always_mass, always_flow = sink_mass.sum(-1) + learned_mass, sink_flow.sum(-1) + learned_flow
    sink_mass.zero_()
    sink_flow.zero_()
    mass = _by_distance(attention, blocks).sum(-1).double()
    change = _by_distance(flow, blocks).sum(-1).double()
    kept_mass = mass[..., :-1].cumsum(-1).add_(always_mass.unsqueeze(-1))
    kept_change = change[..., :-1].cumsum(-1).add_(always_flow.unsqueeze(-1))
    masked_change = _from_far_end(change[..., 1:])
    # the side with less mass is the accurate one; a kept mass below the smallest float32 counts as no effect
    effect = torch.where(kept_mass < 0.5, kept_change, -masked_change) / kept_mass.clamp_min_(1e-37)
    return effect.square_().sum(1)


def _paper_losses(
    attention: torch.Tensor,
    flow: torch.Tensor,
    learned_mass: torch.Tensor,
    learned_flow: torch.Tensor,
    sink_keys: int,
    blocks: int,
) -> torch.Tensor:
    """Sum over rows and masked keys of |E|; arguments and result as in `_joint_losses`, both inputs overwritten."""
    # E = -dS / (1 - A). For the largest key of a row 1 - A has no digits left where A is close to 1: there both
    # parts are sums over the other keys. A row with one key has E = 0.
    largest = attention.max(-1, keepdim=True).indices
    attention.scatter_(-1, largest, 0)
    flow.scatter_(-1, largest, 0)
    other_mass = attention.sum(-1) + learned_mass
    other_flow = flow.sum(-1) + learned_flow
    effect = flow.div_(attention.neg_().add_(1)).abs_()
    effect.scatter_(-1, largest, (other_flow.abs() / other_mass.clamp_min(1e-37)).unsqueeze(-1))
    effect[..., effect.shape[-1] - sink_keys :] = 0
    return _from_far_end(_by_distance(effect, blocks).sum((1, 3)).double()[..., 1:])


def _by_distance(strip: torch.Tensor, blocks: int) -> torch.Tensor:
    """View of a contiguous [heads, rows, keys] as [heads, rows, blocks, BLOCK], ordered by distance from the row."""
    heads, rows, keys = strip.shape
    return strip.as_strided(
        (heads, rows, blocks, BLOCK), (rows * keys, keys - 1, BLOCK, 1), strip.storage_offset() + rows - 1
    )


def _from_far_end(blocks: torch.Tensor) -> torch.Tensor:
    """Sums of each entry and all behind it, along the last dimension."""
    return blocks.flip(-1).cumsum(-1).flip(-1)
