"""Span attention with PyTorch's own operators, on any device: what runs where no kernel of ours does.

A pair is one KV head of one row; the query heads of its GQA group share it. Pairs of equal span form a group, and a
group is one batched operation. A prompt is cut in strips of queries; a strip meets the sink and the keys of its own
window only, and its mask is [strip, keys], shared by the whole group. Decoding reads the stored keys of a group in
place, without any mask.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (PyTorch's own convention)

from moa.attention.options import AttentionOptions, effective_span
from moa.storage import SpanStore

STRIP = 256  # queries a strip: larger costs memory and masked work, smaller costs calls
_SHARED = 2048  # keys of a pair that are worth sharing among threads; measured with two of them


def prefill(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    spans: np.ndarray,
    sink: int,
    options: AttentionOptions,
) -> torch.Tensor:
    """Attention of whole sequences without padding.

    Parameters
    ----------
    query : [rows, query_heads, tokens, head_dim]
    key, value : [rows, kv_heads, tokens, dim]
    spans : int64 [rows, kv_heads]
    sink : int
    options : AttentionOptions

    Returns
    -------
    [rows, query_heads, tokens, value_dim]
    """
    groups = equal_rows(spans.reshape(-1, 1))
    pieces = []
    for (head_span,), pairs in groups:
        span, layer_sink = effective_span(int(head_span), sink, options.sliding_window)
        pieces.append(prefill_pairs(pairs, query, key, value, span, layer_sink, options))
    if len(pieces) == 1:
        output = pieces[0]
    else:
        back = np.argsort(np.concatenate([pairs for _, pairs in groups]))
        output = torch.cat(pieces).index_select(0, torch.from_numpy(back).to(query.device))
    return output.reshape(*query.shape[:3], -1)


def attend(
    store: SpanStore,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    valid: np.ndarray | None,
    options: AttentionOptions,
) -> torch.Tensor:
    """Attention of new tokens over what is stored and over each other; then they are stored.

    Parameters
    ----------
    store : SpanStore
    query : [rows, query_heads, new, head_dim]
    key, value : [rows, kv_heads, new, dim]
    valid : bool [rows, new], optional
        False where a new token is padding: it is not stored and its output is 0.

    Returns
    -------
    [rows, query_heads, new, value_dim]
    """
    if valid is None and query.shape[2] == 1:
        return _decode(store, query, key, value, options)
    if valid is None:
        return _extend(store, np.arange(store.rows), query, key, value, options)
    output = value.new_zeros(*query.shape[:3], value.shape[3])
    for row in range(store.rows):  # rows with padding differ in length, so each is a sequence of its own
        columns = torch.from_numpy(np.flatnonzero(valid[row])).to(query.device)
        if len(columns):
            q, k, v = (tensor[row : row + 1].index_select(2, columns) for tensor in (query, key, value))
            output[row, :, columns] = _extend(store, np.array([row]), q, k, v, options)[0]
    return output


def recordable(store: SpanStore) -> bool:
    """Never: slots are counted on the host."""
    return False


def transposed(dtype: torch.dtype) -> bool:
    """Where full precision is stored; a CPU's products of bfloat16 take longer so."""
    return dtype in (torch.float32, torch.float64)


def _decode(
    store: SpanStore, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, options: AttentionOptions
) -> torch.Tensor:
    """One new token in every row: stored first, then everything stored is read in place."""
    rows, query_heads, _, dim = query.shape
    pairs = len(store.capacity)
    store.append(key.reshape(pairs, -1), value.reshape(pairs, -1))
    query = query.reshape(pairs, -1, dim)
    sink_logits = _logits_per_pair(options.sink_logits, rows, query.shape[:2])
    if not store.in_order:
        query = query.index_select(0, store.to_order)
        sink_logits = None if sink_logits is None else sink_logits.index_select(0, store.to_order)
    stored = store.stored()[store.order].tolist()
    outputs = []
    for group in store.groups:
        members = slice(group.first, group.last)
        filled = stored[members]
        most = max(filled)
        full = most == group.keys.shape[1]
        outputs.append(
            decode_group(
                query[members],
                group.keys if full else group.keys[:, :most],
                group.values if full else group.values[:, :most],
                options,
                None if sink_logits is None else sink_logits[members],
                None if min(filled) == most else torch.tensor(filled, device=query.device),
            )
        )
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    if not store.in_order:
        output = output.index_select(0, store.from_order)
    return output.view(rows, query_heads, 1, -1)


def _extend(
    store: SpanStore,
    rows: np.ndarray,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    options: AttentionOptions,
) -> torch.Tensor:
    """Several new tokens of ``rows``, none of them padding; the tensors hold these rows only."""
    mine = (rows[:, None] * store.heads + np.arange(store.heads)).reshape(-1)  # the rows' pairs in the storage
    output = value.new_empty(len(mine), query.shape[1] // store.heads, query.shape[2], value.shape[3])
    for (capacity, written), pairs in equal_rows(np.stack([store.capacity[mine], store.written[mine]], axis=1)):
        past = None
        if written:
            keys, values = zip(*(store.held(pair) for pair in mine[pairs]), strict=True)
            past = (torch.stack(keys), torch.stack(values))
        piece = prefill_pairs(pairs, query, key, value, int(capacity), store.sink, options, past)
        index = torch.from_numpy(pairs).to(key.device)
        output[index] = piece
        store.extend(mine[pairs], *(tensor.reshape(-1, *tensor.shape[2:])[index] for tensor in (key, value)))
    return output.view(*query.shape[:3], -1)


def prefill_pairs(
    pairs: np.ndarray,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    span: int,
    sink: int,
    options: AttentionOptions,
    past: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Causal attention of some pairs (row * kv_heads + head) that have one span.

    Parameters
    ----------
    pairs : int64 [count]
    query, key, value
        As in `prefill`: the new tokens of all pairs.
    span, sink : int
        Already those of the layer (`effective_span`).
    past : ([count, keys, head_dim], [count, keys, value_dim]), optional
        What the pairs have stored, oldest first. Keys between the sink and the window may be missing.

    Returns
    -------
    [count, group, tokens, value_dim]
    """
    rows, heads, new, _ = key.shape
    index = torch.from_numpy(pairs).to(key.device)
    everything = len(pairs) == rows * heads

    def pick(tensor: torch.Tensor) -> torch.Tensor:
        return tensor if everything else tensor.index_select(0, index)

    queries = pick(query.reshape(rows * heads, -1, new, query.shape[3]))
    keys, values = (pick(tensor.reshape(rows * heads, new, -1)) for tensor in (key, value))
    if past is not None:
        keys, values = torch.cat([past[0], keys], dim=1), torch.cat([past[1], values], dim=1)
    logits = _logits_per_pair(options.sink_logits, rows, (rows * heads, queries.shape[1]))
    return prefill_group(queries, keys, values, span, sink, options, None if logits is None else pick(logits))


def prefill_group(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    span: int,
    sink: int,
    options: AttentionOptions,
    sink_logits: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention in strips, for a group of pairs with one span.

    Parameters
    ----------
    query : [pairs, group, queries, head_dim]
    key, value : [pairs, keys, dim]
        In order; the queries are the last of the keys.
    sink_logits : [pairs, group], optional

    Returns
    -------
    [pairs, group, queries, value_dim]
    """
    queries, keys = query.shape[2], key.shape[1]
    window = span - sink
    plain = options.softcap is None and sink_logits is None
    if plain and queries == keys <= window:  # nothing but causal: the fastest kernels there are
        return F.scaled_dot_product_attention(
            query, key[:, None], value[:, None], is_causal=True, scale=options.scaling, enable_gqa=True
        )
    outputs = []
    for start in range(0, queries, STRIP):
        strip = query[:, :, start : start + STRIP]
        first = keys - queries + start  # index of the strip's first query among the keys
        last = first + strip.shape[2]
        low = max(first - window + 1, 0)
        if low > sink:
            strip_key = torch.cat([key[:, :sink], key[:, low:last]], dim=1)
            strip_value = torch.cat([value[:, :sink], value[:, low:last]], dim=1)
            j = torch.cat([torch.arange(sink), torch.arange(low, last)]).to(key.device)
        else:
            strip_key, strip_value = key[:, :last], value[:, :last]
            j = torch.arange(last, device=key.device)
        i = torch.arange(first, last, device=key.device)[:, None]
        seen = (j <= i) & ((j < sink) | (i - j < window))
        if plain:
            outputs.append(
                F.scaled_dot_product_attention(
                    strip,
                    strip_key[:, None],
                    strip_value[:, None],
                    attn_mask=seen,
                    scale=options.scaling,
                    enable_gqa=True,
                )
            )
        else:
            outputs.append(_softmax_attention(strip, strip_key, strip_value, seen, options, sink_logits))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)


def decode_group(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    options: AttentionOptions,
    sink_logits: torch.Tensor | None = None,
    stored: torch.Tensor | None = None,
) -> torch.Tensor:
    """One new token's attention over everything that a group of pairs has stored.

    Parameters
    ----------
    query : [pairs, group, head_dim]
    key, value : [pairs, keys, dim]
        In any order, the new token's included.
    sink_logits : [pairs, group], optional
    stored : int64 [pairs], optional
        How many of the keys are filled, where that differs between pairs.

    Returns
    -------
    [pairs, group, value_dim]
    """
    if stored is None and sink_logits is None and options.softcap is None:
        crowded = query.shape[0] >= torch.get_num_threads() or key.shape[1] < _SHARED
        if query.device.type == "cpu" and key.stride(-1) == 1 and crowded:
            # the heads of a GQA group as the queries of one head: every key is read once for all of them
            heads = query[:, None], key[:, None], value[:, None]
            output = F.scaled_dot_product_attention(*heads, scale=options.scaling)
            return output[:, 0]
        # PyTorch's attention gives a pair to one thread and wants keys in rows; in these products threads share a pair
        scores = torch.baddbmm(query.new_empty(1), query, key.mT, beta=0, alpha=options.scaling)
        weights = torch.softmax(scores, dim=-1, dtype=_exact(scores.dtype)).to(value.dtype)
        return torch.bmm(weights, value)
    seen = None
    if stored is not None:
        seen = (torch.arange(key.shape[1], device=key.device) < stored[:, None])[:, None, None, :]
    return _softmax_attention(query[:, :, None], key, value, seen, options, sink_logits)[:, :, 0]


def _softmax_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    seen: torch.Tensor | None,
    options: AttentionOptions,
    sink_logits: torch.Tensor | None,
) -> torch.Tensor:
    """Matrix products and a softmax of at least float32; ``seen`` broadcasts to [pairs, group, queries, keys]."""
    pairs, group, queries, dim = query.shape
    scores = torch.bmm((query * options.scaling).reshape(pairs, group * queries, dim), key.transpose(1, 2))
    scores = scores.view(pairs, group, queries, -1)
    scores = scores.to(_exact(scores.dtype))
    if options.softcap is not None:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    if seen is not None:
        scores = scores.masked_fill(~seen, -torch.inf)
    if sink_logits is not None:
        column = sink_logits.to(scores.dtype)[:, :, None, None].expand(pairs, group, queries, 1)
        weights = torch.softmax(torch.cat([scores, column], dim=-1), dim=-1)[..., :-1]
    else:
        weights = torch.softmax(scores, dim=-1)
    mixed = torch.bmm(weights.to(value.dtype).reshape(pairs, group * queries, -1), value)
    return mixed.view(pairs, group, queries, -1)


def _exact(dtype: torch.dtype) -> torch.dtype:
    """At least float32: what a softmax is computed in."""
    return torch.promote_types(dtype, torch.float32)


def _logits_per_pair(sink_logits: torch.Tensor | None, rows: int, shape: Sequence[int]) -> torch.Tensor | None:
    """Learned logits [query_heads] for every pair: ``shape`` is [rows * kv_heads, group]."""
    return None if sink_logits is None else sink_logits.repeat(rows).reshape(*shape)


def equal_rows(states: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Distinct rows of an array [rows, fields], each with the indices where it stands."""
    distinct, inverse = np.unique(states, axis=0, return_inverse=True)
    return [(state, np.flatnonzero(inverse.reshape(-1) == index)) for index, state in enumerate(distinct)]
