"""SpanCache: a KV cache that stores, for every row and KV head, the sink and a ring of the most recent tokens.

Storage of a layer is one flat buffer [slots, head_dim] for K and one for V. Each pair (row, KV head) owns ``capacity``
slots from its ``offset`` on, where capacity is the pair's span; pairs of equal capacity lie side by side, so that they
can be read as one tensor [pairs, capacity, head_dim] without a copy. A pair's t-th token goes to slot t while there is
room; then the sink's slots stay and the rest is a ring. Keys are stored after the rotary embedding, so the order inside
the ring does not matter to the softmax.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from moa.attention import sdpa
from moa.attention.options import AttentionOptions, effective_span
from moa.errors import CacheError
from moa.plan import Plan


@dataclass(frozen=True)
class _Group:
    """Pairs of equal capacity: ``first`` to ``last`` in the order of storage."""

    first: int
    last: int
    offset: int  # first slot
    capacity: int

    def view(self, buffer: torch.Tensor) -> torch.Tensor:
        """[pairs, capacity, dim] of a flat buffer, in place."""
        pairs = self.last - self.first
        return buffer[self.offset : self.offset + pairs * self.capacity].view(pairs, self.capacity, -1)


class SpanLayer(CacheLayerMixin):
    """One layer's storage. ``spans`` int64 [rows, kv_heads] are the plan's, before the model's own sliding window."""

    is_compileable = False
    is_croppable = False
    supports_early_init = False
    is_sliding = False

    def __init__(self) -> None:
        super().__init__()
        self.columns = 0  # tokens seen, padding included: what positions and masks count in
        self.keys: torch.Tensor
        self.values: torch.Tensor

    # Allocation ------------------------------------------------------------------------------------------------------

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to do: slots are allocated when the first tokens are attended, and the layer's window is known."""

    def allocate(
        self,
        spans: np.ndarray,
        lengths: np.ndarray,
        sink: int,
        key: torch.Tensor,
        value: torch.Tensor,
        window: int | None,
    ) -> None:
        """Reserve the slots for ``spans`` int64 [rows, kv_heads] of sequences of ``lengths`` int64 [rows] tokens."""
        self.sliding_window = window
        self.sink = effective_span(0, sink, window)[1]
        self.planned_sink = sink
        self.seen = np.zeros(len(spans), np.int64)  # real tokens of each row
        self.lengths = lengths
        self._lay_out(spans, key, value)
        self.is_initialized = True

    def _lay_out(self, spans: np.ndarray, like_key: torch.Tensor, like_value: torch.Tensor) -> None:
        """Empty buffers in the dtype, device and last dimension of the tensors given."""
        self.spans = spans
        rows, heads = spans.shape
        capacity = np.minimum(spans, spans if self.sliding_window is None else self.sliding_window).reshape(-1)
        self.order = np.argsort(capacity, kind="stable")  # storage order -> pair (row * heads + head)
        starts = np.concatenate([[0], np.cumsum(capacity[self.order])])
        self.capacity = capacity
        self.offset = np.empty_like(capacity)
        self.offset[self.order] = starts[:-1]
        self.written = np.zeros(rows * heads, np.int64)
        sizes, firsts = np.unique(capacity[self.order], return_index=True)
        lasts = [*firsts[1:], len(capacity)]
        self.groups = tuple(
            _Group(int(first), int(last), int(starts[first]), int(size))
            for size, first, last in zip(sizes, firsts, lasts, strict=True)
        )
        device = like_key.device
        in_place = bool((self.order == np.arange(len(self.order))).all())
        self.to_storage = None if in_place else torch.from_numpy(self.order).to(device)
        self.to_pairs = None if in_place else torch.from_numpy(np.argsort(self.order)).to(device)
        slots = int(starts[-1])
        self.keys = torch.empty(slots, like_key.shape[-1], dtype=like_key.dtype, device=device)
        self.values = torch.empty(slots, like_value.shape[-1], dtype=like_value.dtype, device=device)

    def grow(self, spans: np.ndarray, lengths: np.ndarray) -> None:
        """Larger spans for a longer sequence. Spans never shrink, and what was evicted stays evicted."""
        self.lengths = np.maximum(self.lengths, lengths)
        self._move(np.arange(len(self.seen)), np.maximum(self.spans, spans))

    def _move(self, rows: np.ndarray, spans: np.ndarray) -> None:
        """New storage whose row i holds what row ``rows[i]`` held, with ``spans`` [len(rows), kv_heads]."""
        heads = spans.shape[1]
        source = (rows[:, None] * heads + np.arange(heads)).reshape(-1)  # pair moved to each new pair
        slots = [self._ordered_slots(pair) for pair in source]
        keys, values = self.keys, self.values
        self._lay_out(spans, keys, values)
        self.written = np.array([len(old) for old in slots], np.int64)
        new = np.concatenate([self.offset[pair] + np.arange(len(old)) for pair, old in enumerate(slots)])
        old = torch.from_numpy(np.concatenate(slots)).to(keys.device)
        target = torch.from_numpy(new).to(keys.device)
        self.keys[target] = keys[old]
        self.values[target] = values[old]

    def _ordered_slots(self, pair: int) -> np.ndarray:
        """Slots of a pair's stored tokens, oldest first."""
        written, capacity = self.written[pair], self.capacity[pair]
        if written <= capacity:
            return self.offset[pair] + np.arange(written)
        ring = capacity - self.sink
        oldest = (written - self.sink) % ring
        return self.offset[pair] + np.concatenate([np.arange(self.sink), self.sink + (oldest + np.arange(ring)) % ring])

    # Attention -------------------------------------------------------------------------------------------------------

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        valid: np.ndarray | None,
        options: AttentionOptions,
    ) -> torch.Tensor:
        """Attention of new tokens over what is stored and over each other; then they are stored.

        Parameters
        ----------
        query : [rows, query_heads, new, head_dim]
        key, value : [rows, kv_heads, new, dim]
        valid : bool [rows, new], optional
            False where a new token is padding: it is not stored and its output is 0.

        Returns
        -------
        [rows, query_heads, new, value_dim]
        """
        new = query.shape[2] if valid is None else valid.sum(axis=1)
        if (self.seen + new > self.lengths).any():
            raise CacheError(
                f"the SpanCache was planned for {self.lengths.tolist()} tokens a row, but would now hold "
                f"{(self.seen + new).tolist()}; give it the total length, or call cache.grow(lengths) first"
            )
        self.seen = self.seen + new
        if query.shape[2] == 1 and valid is None:
            return self._decode(query, key, value, options)
        if valid is None or valid.all():
            return self._prefill(np.arange(len(query)), query, key, value, options)
        output = value.new_zeros(*query.shape[:3], value.shape[3])
        for row in range(len(query)):  # rows with padding differ in length, so each is a sequence of its own
            columns = torch.from_numpy(np.flatnonzero(valid[row])).to(query.device)
            if len(columns):
                q, k, v = (tensor[row : row + 1].index_select(2, columns) for tensor in (query, key, value))
                output[row, :, columns] = self._prefill(np.array([row]), q, k, v, options)[0]
        return output

    def _decode(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, options: AttentionOptions
    ) -> torch.Tensor:
        """One valid new token in every row: stored first, then everything stored is read in place."""
        rows, query_heads = query.shape[:2]
        ring = self.capacity - self.sink
        wrapped = self.sink + (self.written - self.sink) % np.maximum(ring, 1)
        slot = self.offset + np.where(self.written < self.capacity, self.written, wrapped)
        slots = torch.from_numpy(slot).to(query.device)
        self.keys.index_copy_(0, slots, key.reshape(len(slot), -1))
        self.values.index_copy_(0, slots, value.reshape(len(slot), -1))
        self.written = self.written + 1

        grouped = query.reshape(len(slot), -1, query.shape[3])  # [pairs, group, head_dim]
        sink_logits = sdpa.logits_per_pair(options.sink_logits, rows, grouped.shape[:2])
        if self.to_storage is not None:
            grouped = grouped.index_select(0, self.to_storage)
            sink_logits = sink_logits if sink_logits is None else sink_logits.index_select(0, self.to_storage)
        stored = np.minimum(self.written, self.capacity)[self.order]
        outputs = []
        for group in self.groups:
            filled = stored[group.first : group.last]
            most = int(filled.max())
            outputs.append(
                sdpa.decode_group(
                    grouped[group.first : group.last],
                    group.view(self.keys)[:, :most],
                    group.view(self.values)[:, :most],
                    options,
                    None if sink_logits is None else sink_logits[group.first : group.last],
                    None if (filled == most).all() else torch.from_numpy(filled).to(query.device),
                )
            )
        output = torch.cat(outputs)
        if self.to_pairs is not None:
            output = output.index_select(0, self.to_pairs)
        return output.view(rows, query_heads, 1, -1)

    def _prefill(
        self,
        rows: np.ndarray,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        options: AttentionOptions,
    ) -> torch.Tensor:
        """New tokens of ``rows``, all valid; tensors hold these rows only."""
        heads = key.shape[1]
        past = (rows[:, None] * heads + np.arange(heads)).reshape(-1)  # the rows' pairs in the storage
        states = np.stack([self.capacity[past], self.written[past]], axis=1)
        output = value.new_empty(len(past), query.shape[1] // heads, query.shape[2], value.shape[3])
        for (capacity, written), local in sdpa.equal_rows(states):
            pairs = past[local]
            if written:
                slots = torch.from_numpy(np.stack([self._ordered_slots(pair) for pair in pairs])).to(key.device)
                stored = (self.keys[slots], self.values[slots])
            else:
                stored = None
            piece = sdpa.prefill_pairs(local, query, key, value, int(capacity), self.sink, options, stored)
            output[torch.from_numpy(local).to(key.device)] = piece
            self._store(pairs, local, key, value)
        return output.view(*query.shape[:3], -1)

    def _store(self, pairs: np.ndarray, local: np.ndarray, key: torch.Tensor, value: torch.Tensor) -> None:
        """Store new tokens of pairs with equal capacity and count: only those that will still be there at the end."""
        written, capacity, new = int(self.written[pairs[0]]), int(self.capacity[pairs[0]]), key.shape[2]
        tokens = written + np.arange(new)
        ring = capacity - self.sink
        kept = (tokens < self.sink) | (tokens >= written + new - ring)
        index = np.where(tokens < capacity, tokens, self.sink + (tokens - self.sink) % max(ring, 1))
        target = torch.from_numpy((self.offset[pairs][:, None] + index[kept]).reshape(-1)).to(key.device)
        source = torch.from_numpy((local[:, None] * new + np.flatnonzero(kept)).reshape(-1)).to(key.device)
        self.keys.index_copy_(0, target, key.reshape(-1, key.shape[3]).index_select(0, source))
        self.values.index_copy_(0, target, value.reshape(-1, value.shape[3]).index_select(0, source))
        self.written[pairs] = written + new

    # What transformers may ask ---------------------------------------------------------------------------------------

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Count the new tokens and hand them on; `attend` stores them."""
        self.columns += key_states.shape[2]
        return key_states, value_states

    def get_seq_length(self) -> int:
        return self.columns

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.columns + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        """Forget everything and give the slots back."""
        if self.is_initialized:
            del self.keys, self.values
        self.columns, self.is_initialized = 0, False

    def select_rows(self, rows: np.ndarray) -> None:
        """Row i becomes a copy of what row ``rows[i]`` is."""
        if not self.is_initialized:
            return
        self.seen, self.lengths = self.seen[rows], self.lengths[rows]
        self._move(rows, self.spans[rows])

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens, possible while nothing has been evicted.

        Raises
        ------
        CacheError
            If tokens that would have to come back were evicted.
        """
        remove = abs(tokens_to_remove)
        if remove == 0 or not self.is_initialized:
            return
        if (self.written > self.capacity).any() or (self.written < remove).any():
            raise CacheError(
                f"cannot take {remove} tokens back from a SpanCache that has already evicted keys for them; generate "
                "without assisted or prompt-lookup decoding"
            )
        self.written = self.written - remove
        self.seen = self.seen - remove
        self.columns -= remove

    def nbytes(self) -> int:
        """Bytes of K and V held."""
        if not self.is_initialized:
            return 0
        return sum(buffer.numel() * buffer.element_size() for buffer in (self.keys, self.values))


class SpanCache(Cache):
    """The KV cache of a model that runs under a plan; pass it as ``past_key_values`` while `moa.apply` is in force.

    ``model.generate`` makes one by itself. Made by hand it needs the total length N of each row, because spans depend
    on it; a conversation that goes on calls `grow` (``generate`` does so by itself).

    Parameters
    ----------
    plan : Plan
    lengths : int or sequence of int
        N, prompt and new tokens without padding: one for all rows, or one for each.
    """

    def __init__(self, plan: Plan, lengths: int | Sequence[int]):
        self.span_layers = [SpanLayer() for _ in range(plan.model.layers)]
        super().__init__(layers=list(self.span_layers))
        self.plan = plan
        self._lengths = _checked(lengths)
        self._pending: int | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hand the new keys on, marked so that the attention function finds this cache (see `moa.runtime`)."""
        if self._pending is not None:
            raise CacheError(
                f"layer {self._pending} put keys into the SpanCache but never attended through MoA: the model's "
                "attention does not support plans, or moa.apply is not in force, or the last call was interrupted. Use "
                "the cache inside moa.apply, and a new cache after an interruption"
            )
        if layer_idx >= len(self.span_layers):
            raise CacheError(f"the plan has {len(self.span_layers)} layers, but the model uses a layer {layer_idx}")
        self._pending = layer_idx
        key, value = self.span_layers[layer_idx].update(key_states, value_states)
        key.span_cache = (self, layer_idx)  # type: ignore[attr-defined]
        return key, value

    def attend(
        self,
        layer_idx: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        valid: np.ndarray | None,
        options: AttentionOptions,
    ) -> torch.Tensor:
        """Attention of one layer; shapes as in `SpanLayer.attend`."""
        layer = self.span_layers[layer_idx]
        if not layer.is_initialized:
            lengths = self._row_lengths(len(query))
            layer.allocate(self._spans(lengths, layer_idx), lengths, self.plan.sink, key, value, options.sliding_window)
        elif len(query) != len(layer.seen):
            raise CacheError(f"the SpanCache holds {len(layer.seen)} rows, but the model was called with {len(query)}")
        output = layer.attend(query, key, value, valid, options)
        self._pending = None
        return output

    def grow(self, lengths: int | Sequence[int]) -> None:
        """Plan for longer sequences: spans grow with N, never shrink, and what was evicted stays evicted."""
        new = _checked(lengths)
        self._lengths = np.maximum(self._lengths, new)
        for index, layer in enumerate(self.span_layers):
            if layer.is_initialized:
                rows = self._row_lengths(len(layer.seen))
                layer.grow(self._spans(rows, index), rows)

    def nbytes(self) -> int:
        """Bytes of K and V that the cache holds, measured on its buffers."""
        return sum(layer.nbytes() for layer in self.span_layers)

    def reset(self) -> None:
        """Forget everything; the lengths stay."""
        self._pending = None
        super().reset()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        rows = indices.cpu().numpy()
        if self._lengths.ndim:
            self._lengths = self._lengths[rows]
        for layer in self.span_layers:
            layer.select_rows(rows)

    def batch_repeat_interleave(self, repeats: int) -> None:
        rows = len(self.span_layers[0].seen) if self.span_layers[0].is_initialized else 0
        self.batch_select_indices(torch.arange(rows).repeat_interleave(repeats))

    def _row_lengths(self, rows: int) -> np.ndarray:
        if self._lengths.ndim and len(self._lengths) != rows:
            raise CacheError(f"the SpanCache has lengths for {len(self._lengths)} rows, but the batch has {rows}")
        return np.broadcast_to(self._lengths, rows)

    def _spans(self, lengths: np.ndarray, layer_idx: int) -> np.ndarray:
        spans = {length: self.plan.spans(int(length))[layer_idx] for length in np.unique(lengths)}
        return np.stack([spans[length] for length in lengths])


def _checked(lengths: int | Sequence[int]) -> np.ndarray:
    array = np.asarray(lengths, dtype=np.int64)
    if array.ndim > 1 or array.size == 0 or (array < 1).any():
        raise CacheError(f"lengths must be one positive number, or one for each row; got {lengths!r}")
    return array
