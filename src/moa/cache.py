"""SpanCache: the KV cache of a model that runs under a plan, as transformers knows caches.

A layer counts rows and columns and refuses what would go wrong; `moa.storage` keeps the bytes, and a backend of
`moa.attention` reads and writes them.
"""

from collections.abc import Sequence

import numpy as np
import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from moa.attention import backends
from moa.attention.options import AttentionOptions, effective_span
from moa.errors import CacheError, UnsupportedModelError
from moa.plan import Plan
from moa.storage import SpanStore


class SpanLayer(CacheLayerMixin):
    """One layer: nothing is allocated before the first tokens are attended, when batch and dtype are known."""

    is_compileable = False
    is_croppable = False
    supports_early_init = False
    is_sliding = False

    def __init__(self) -> None:
        super().__init__()
        self.columns = 0  # tokens seen, padding included: what positions and masks count in

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to do here; see `allocate`."""

    def allocate(
        self,
        spans: np.ndarray,
        lengths: np.ndarray,
        sink: int,
        key: torch.Tensor,
        value: torch.Tensor,
        sliding_window: int | None,
        backend: str | None,
        spare: SpanStore | None,
    ) -> None:
        """Reserve slots for a plan's ``spans`` int64 [rows, kv_heads], for sequences of ``lengths`` int64 [rows].

        ``backend`` is as in `moa.attention.backends.pick`; ``spare`` is storage that nobody uses any more.
        """
        self.seen = np.zeros(len(spans), np.int64)  # real tokens of each row
        self.lengths = lengths
        self.spans = spans
        self.sliding_window = sliding_window
        layer_sink = effective_span(0, sink, sliding_window)[1]
        self.backend = backends.pick(key.device, key.dtype, key.shape[-1], backend)
        like = (self._capacity(), layer_sink, key, value, self.backend.transposed(key.dtype))
        if spare is not None and spare.suits(*like):
            spare.clear()
            self.store = spare
        else:
            self.store = SpanStore(*like)
        self.is_initialized = True

    def _capacity(self) -> np.ndarray:
        return self.spans if self.sliding_window is None else np.minimum(self.spans, self.sliding_window)

    def grow(self, spans: np.ndarray, lengths: np.ndarray) -> None:
        """Larger spans for longer sequences. Spans never shrink, and what was evicted stays evicted."""
        self.lengths = np.maximum(self.lengths, lengths)
        self.spans = np.maximum(self.spans, spans)
        self.store = self.store.moved(np.arange(len(self.seen)), self._capacity())

    def select_rows(self, rows: np.ndarray) -> None:
        """Row i becomes a copy of what row ``rows[i]`` is."""
        if self.is_initialized:
            self.seen, self.lengths, self.spans = self.seen[rows], self.lengths[rows], self.spans[rows]
            self.store = self.store.moved(rows, self._capacity())

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        valid: np.ndarray | None,
        options: AttentionOptions,
    ) -> torch.Tensor:
        """Attention of new tokens, which are stored; shapes as in `moa.attention.sdpa.attend`."""
        self._count(query.shape[2] if valid is None else valid.sum(axis=1))
        return self.backend.attend(self.store, query, key, value, valid, options)

    def count_step(self) -> None:
        """Count one token in every row, which a replayed decode step stores without calling `attend`."""
        self._count(1)
        self.columns += 1
        self.store.written += 1

    def _count(self, new: int | np.ndarray) -> None:
        seen = self.seen + new
        if (seen > self.lengths).any():
            raise CacheError(
                f"the SpanCache was planned for {self.lengths.tolist()} tokens a row, but would now hold "
                f"{seen.tolist()}; give it the total length, or call cache.grow(lengths) first"
            )
        self.seen = seen

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
            del self.store
        self.columns, self.is_initialized = 0, False

    def can_crop(self, tokens: int) -> bool:
        """Whether so many tokens can be taken back: none that would have to come back was evicted."""
        return not self.is_initialized or not (self.store.evicted() | (self.store.written < tokens)).any()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens; right only where `can_crop`."""
        remove = abs(tokens_to_remove)
        if remove == 0 or not self.is_initialized:
            return
        self.store.take_back(remove)
        self.seen = self.seen - remove
        self.columns -= remove

    def nbytes(self) -> int:
        """Bytes of K and V held."""
        return self.store.nbytes() if self.is_initialized else 0


class SpanCache(Cache):
    """The KV cache of a model that runs under a plan; pass it as ``past_key_values`` while `moa.apply` is in force.

    ``model.generate`` makes one by itself. Made by hand it needs the total length N of each row, because spans depend
    on it; a conversation that goes on calls `grow` (``generate`` does so by itself).

    Parameters
    ----------
    plan : Plan
    lengths : int or sequence of int
        N, prompt and new tokens without padding: one for all rows, or one for each.
    spare : sequence of SpanStore
        Storage of each layer that nobody uses any more, taken over where it suits.
    """

    def __init__(self, plan: Plan, lengths: int | Sequence[int], spare: Sequence[SpanStore] = ()):
        self.span_layers = [SpanLayer() for _ in range(plan.model.layers)]
        super().__init__(layers=list(self.span_layers))
        self.plan = plan
        self._lengths = _checked(lengths)
        self._spare = dict(enumerate(spare))
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
        backend: str | None = None,
    ) -> torch.Tensor:
        """Attention of one layer; shapes as in `SpanLayer.attend`.

        ``backend``, as in `moa.attention.backends.pick`, counts when the layer's first tokens come.

        Raises
        ------
        CacheError
            If rows are more or fewer than before, or tokens more than planned for.
        UnsupportedModelError
            If no new keys were put in for this call.
        """
        if self._pending != layer_idx:
            raise UnsupportedModelError(
                f"the keys of layer {layer_idx} were attended again, by another layer or a second time: plans cover "
                "models in which each layer attends its own keys once"
            )
        layer = self.span_layers[layer_idx]
        if not layer.is_initialized:
            lengths = self._row_lengths(len(query))
            spans = self._spans(lengths, layer_idx)
            spare = self._spare.pop(layer_idx, None)
            layer.allocate(spans, lengths, self.plan.sink, key, value, options.sliding_window, backend, spare)
        elif len(query) != len(layer.seen):
            raise CacheError(f"the SpanCache holds {len(layer.seen)} rows, but the model was called with {len(query)}")
        output = layer.attend(query, key, value, valid, options)
        self._pending = None
        return output

    def grow(self, lengths: int | Sequence[int]) -> None:
        """Plan for longer sequences: spans grow with N, never shrink, and what was evicted stays evicted."""
        new = _checked(lengths)
        if self._lengths.ndim and new.ndim and len(self._lengths) != len(new):
            raise CacheError(
                f"the SpanCache has lengths for {len(self._lengths)} rows, and was given {len(new)}; give one length "
                "for all rows, or as many as generate has rows (beams count)"
            )
        self._lengths = np.maximum(self._lengths, new)
        for index, layer in enumerate(self.span_layers):
            if layer.is_initialized:
                rows = self._row_lengths(len(layer.seen))
                layer.grow(self._spans(rows, index), rows)

    # Decode steps that are recorded and replayed (`moa.decode_graph`) ------------------------------------------------

    def recordable(self) -> bool:
        """Whether a step of one real token in every row does the same on the device each time and asks it nothing."""
        return self._pending is None and all(
            layer.is_initialized and layer.backend.recordable(layer.store) for layer in self.span_layers
        )

    def stores(self) -> list[SpanStore]:
        """Storage of each layer that has any."""
        return [layer.store for layer in self.span_layers if layer.is_initialized]

    def row_lengths(self) -> np.ndarray:
        """N of each row: int64 [rows]; only once there are rows."""
        return self.span_layers[0].lengths

    def counts(self) -> list[tuple[int, np.ndarray, np.ndarray]]:
        """What the host counts in each layer; `set_counts` puts it back."""
        return [(layer.columns, layer.seen, layer.store.written.copy()) for layer in self.span_layers]

    def set_counts(self, counts: Sequence[tuple[int, np.ndarray, np.ndarray]]) -> None:
        self._pending = None
        for layer, (columns, seen, written) in zip(self.span_layers, counts, strict=True):
            layer.columns, layer.seen, layer.store.written = columns, seen, written

    def count_step(self) -> None:
        """Count one token in every row of every layer, as calling the model would."""
        for layer in self.span_layers:
            layer.count_step()

    def nbytes(self) -> int:
        """Bytes of K and V that the cache holds, measured on its buffers."""
        return sum(layer.nbytes() for layer in self.span_layers)

    def reset(self) -> None:
        """Forget everything; the lengths stay."""
        self._pending = None
        super().reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens in all layers, or in none.

        Raises
        ------
        CacheError
            If tokens that would have to come back were evicted.
        """
        remove = abs(tokens_to_remove)
        if remove and not all(layer.can_crop(remove) for layer in self.span_layers):
            raise CacheError(
                f"cannot take {remove} tokens back from a SpanCache that has already evicted keys for them; generate "
                "without assisted or prompt-lookup decoding"
            )
        super().crop(tokens_to_remove)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        rows = indices.cpu().numpy()
        if self._lengths.ndim:
            self._lengths = self._lengths[rows]
        for layer in self.span_layers:
            layer.select_rows(rows)

    def batch_repeat_interleave(self, repeats: int) -> None:
        first = self.span_layers[0]
        rows = len(first.seen) if first.is_initialized else self._lengths.size
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
