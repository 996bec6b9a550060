"""Span attention by its definition, in plain PyTorch: what every other backend is tested against.

Query i of a KV head with span s sees key j if j <= i and (j < sink or i - j < s - sink). Heads of one GQA group share
their KV head's span. Positions count real tokens only: padding is nobody's key.
"""

import torch

from moa.attention.options import AttentionOptions, effective_span


def visible_keys(
    spans: torch.Tensor, sink: int, valid: torch.Tensor, queries: int, sliding_window: int | None = None
) -> torch.Tensor:
    """Which key each query sees.

    Parameters
    ----------
    spans : int64 [rows, kv_heads]
        Keys a head sees at most, sink included.
    sink : int
        First tokens of a row that are always seen.
    valid : bool [rows, keys]
        False where a key is padding.
    queries : int
        The queries are the last ``queries`` of the keys.
    sliding_window : int, optional
        The model's own window in this layer (see `effective_span`).

    Returns
    -------
    bool [rows, kv_heads, queries, keys]
    """
    if sliding_window is not None:
        spans = spans.clamp(max=sliding_window)
    sink = effective_span(0, sink, sliding_window)[1]
    position = valid.cumsum(-1) - 1  # [rows, keys]
    i = position[:, None, -queries:, None]
    j = position[:, None, None, :]
    window = (spans - sink)[:, :, None, None]
    seen = (j <= i) & ((j < sink) | (i - j < window))
    return seen & valid[:, None, None, :] & valid[:, None, -queries:, None]


def span_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    spans: torch.Tensor,
    sink: int,
    options: AttentionOptions,
    valid: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention in which each KV head sees its sink and its window.

    Parameters
    ----------
    query : [rows, query_heads, queries, head_dim]
    key : [rows, kv_heads, keys, head_dim]
        The whole sequence; the queries are its last tokens.
    value : [rows, kv_heads, keys, value_dim]
    spans, sink, valid
        See `visible_keys`; no ``valid`` means no padding.
    options : AttentionOptions

    Returns
    -------
    [rows, query_heads, queries, value_dim], in the dtype of ``value``; zero where a query is padding.
    """
    rows, heads, queries, _ = query.shape
    kv_heads, keys = key.shape[1], key.shape[2]
    group = heads // kv_heads
    if valid is None:
        valid = torch.ones(rows, keys, dtype=torch.bool, device=key.device)
    seen = visible_keys(spans.to(key.device), sink, valid, queries, options.sliding_window).repeat_interleave(
        group, dim=1
    )

    exact = torch.promote_types(query.dtype, torch.float32)
    scores = query.to(exact) @ key.to(exact).repeat_interleave(group, dim=1).transpose(2, 3) * options.scaling
    if options.softcap is not None:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    scores = scores.masked_fill(~seen, -torch.inf)
    if options.sink_logits is not None:
        column = options.sink_logits.to(exact)[None, :, None, None].expand(rows, heads, queries, 1)
        scores = torch.cat([scores, column], dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., :keys]
    weights = weights.masked_fill(~valid[:, None, -queries:, None], 0.0)  # a padding query has no key: 0, not NaN
    return (weights @ value.to(exact).repeat_interleave(group, dim=1)).to(value.dtype)
