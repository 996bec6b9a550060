"""Where a layer's keys and values lie: the sink and a ring of recent tokens for every pair (row, KV head).

One flat buffer [slots, head_dim] for K and one for V. Pair p (row * kv_heads + head) owns ``capacity[p]`` slots from
``offset[p]`` on; capacity is its span. Pairs of equal capacity lie side by side, so that they can be read as one
tensor [pairs, capacity, head_dim] without a copy. A pair's t-th token goes to slot t while there is room; then the
sink's slots stay and the rest is a ring. Keys are stored after the rotary embedding, so the order inside the ring does
not matter to the softmax. How many tokens a pair was given, ``written[p]``, is all the state there is.

A pair's keys and values may lie as [dim, capacity] instead, in the same place: products of a few queries with them read
float32 from memory up to twice as fast on a CPU.
"""

import itertools
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch


@dataclass(frozen=True)
class Group:
    """Pairs of equal capacity: ``first`` to ``last`` in the order of storage.

    ``keys`` and ``values`` are their part of the buffers, in place: [pairs, capacity, dim], whichever way they lie.
    """

    first: int
    last: int
    keys: torch.Tensor
    values: torch.Tensor


@dataclass(frozen=True)
class DeviceCounts:
    """``offset``, ``capacity`` and ``written`` of a store for kernels: int32 [pairs] on the buffers' device."""

    offset: torch.Tensor
    capacity: torch.Tensor
    written: torch.Tensor


class SpanStore:
    """Empty slots for ``capacity`` int64 [rows, kv_heads] tokens, in the dtype, device and width of the tensors given.

    Attributes
    ----------
    transposed : bool
        Whether a pair's keys and values lie as [dim, capacity].
    keys : [slots, head_dim]
    values : [slots, value_dim]
        With ``transposed`` the rows of both are no keys and values; see `keys_of` and `values_of`.
    capacity, offset, written : int64 [pairs]
        On the host; a backend that counts on the device (`on_device`) counts here as well.
    order : int64 [pairs]
        Storage order: pair ``order[i]`` is the i-th in the buffers.
    in_order : bool
        Whether that is the order of the pairs.
    groups : tuple of Group
    sink : int
        Slots of a pair that are never overwritten.
    """

    def __init__(
        self,
        capacity: np.ndarray,
        sink: int,
        like_key: torch.Tensor,
        like_value: torch.Tensor,
        transposed: bool = False,
    ):
        self.rows, self.heads = capacity.shape
        self.sink, self.transposed = sink, transposed
        self.capacity = capacity.reshape(-1).astype(np.int64)
        _, first, which = np.unique(self.capacity, return_index=True, return_inverse=True)
        self.order = np.argsort(first[which], kind="stable")  # equal ones where the first of them is
        self.in_order = bool((self.order == np.arange(len(self.order))).all())
        self._ring = np.maximum(self.capacity - sink, 1)
        ordered = self.capacity[self.order]
        starts = np.concatenate([[0], np.cumsum(ordered)])
        self.offset = np.empty_like(self.capacity)
        self.offset[self.order] = starts[:-1]
        self.written = np.zeros_like(self.capacity)
        self._moved_from_evicted = np.zeros(len(self.capacity), bool)  # pairs that lost tokens where they were before
        bounds = [0, *(np.flatnonzero(np.diff(ordered)) + 1).tolist(), len(ordered)]
        self.keys = like_key.new_empty(int(starts[-1]), like_key.shape[-1])
        # a slot that is not filled yet may be read with a weight of 0: what lies there must be a number
        self.values = like_value.new_zeros(int(starts[-1]), like_value.shape[-1])
        self.groups = tuple(
            Group(
                first,
                last,
                self._tokens(self.keys[starts[first] : starts[last]], last - first),
                self._tokens(self.values[starts[first] : starts[last]], last - first),
            )
            for first, last in itertools.pairwise(bounds)
        )

    def _tokens(self, part: torch.Tensor, pairs: int) -> torch.Tensor:
        """A part of a buffer that belongs to so many pairs of equal capacity: [pairs, capacity, dim]."""
        dim = part.shape[1]
        return part.view(pairs, dim, -1).mT if self.transposed else part.view(pairs, -1, dim)

    def keys_of(self, pair: int) -> torch.Tensor:
        """A pair's keys, in place: [capacity, head_dim]."""
        return self._tokens(self.keys[self._own(pair)], 1)[0]

    def values_of(self, pair: int) -> torch.Tensor:
        """A pair's values, in place: [capacity, value_dim]."""
        return self._tokens(self.values[self._own(pair)], 1)[0]

    def _own(self, pair: int) -> slice:
        return slice(int(self.offset[pair]), int(self.offset[pair] + self.capacity[pair]))

    def evicted(self) -> np.ndarray:
        """Which pairs have lost tokens, here or where they were `moved` from: bool [pairs]."""
        return self._moved_from_evicted | (self.written > self.capacity)

    def stored(self) -> np.ndarray:
        """How many tokens each pair holds: int64 [pairs]."""
        return np.minimum(self.written, self.capacity)

    def slot(self, pairs: np.ndarray | slice, tokens: np.ndarray) -> np.ndarray:
        """Slots of the pairs' ``tokens``-th tokens; shapes broadcast."""
        ring = self.sink + (tokens - self.sink) % self._ring[pairs]
        return self.offset[pairs] + np.where(tokens < self.capacity[pairs], tokens, ring)

    def append(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Store one new token of every pair: [pairs, head_dim], [pairs, value_dim]."""
        slots = torch.from_numpy(self.slot(slice(None), self.written)).to(self.keys.device)
        if self.transposed:
            places = {dim: (first + slots[:, None]).view(-1) for dim, first in self._first.items()}
            for buffer, new in ((self.keys, key), (self.values, value)):
                buffer.view(-1).index_copy_(0, places[buffer.shape[1]], new.reshape(-1))
        else:
            self.keys.index_copy_(0, slots, key)
            self.values.index_copy_(0, slots, value)
        self.written += 1

    def extend(self, pairs: np.ndarray, key: torch.Tensor, value: torch.Tensor) -> None:
        """Store new tokens of pairs that have equal capacity and count: only those that will still be there at the end.

        Parameters
        ----------
        pairs : int64 [count]
        key, value : [count, new, dim]
        """
        written, capacity, new = int(self.written[pairs[0]]), int(self.capacity[pairs[0]]), key.shape[1]
        tokens = written + np.arange(new)
        kept = (tokens < self.sink) | (tokens >= written + new - (capacity - self.sink))
        source = torch.from_numpy(np.flatnonzero(kept)).to(key.device)
        slots = self.slot(pairs[:1], tokens[kept]) - self.offset[pairs[0]]
        place = torch.from_numpy(slots).to(key.device)
        for pair, new_keys, new_values in zip(pairs, key, value, strict=True):
            self.keys_of(pair).index_copy_(0, place, new_keys.index_select(0, source))
            self.values_of(pair).index_copy_(0, place, new_values.index_select(0, source))
        self.written[pairs] += new

    def held(self, pair: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What a pair holds, oldest first: copies [tokens, head_dim] and [tokens, value_dim]."""
        slots = torch.from_numpy(self.ordered_slots(pair) - self.offset[pair]).to(self.keys.device)
        return self.keys_of(pair)[slots], self.values_of(pair)[slots]

    def ordered_slots(self, pair: int) -> np.ndarray:
        """Slots of what a pair holds, oldest first."""
        written, capacity = self.written[pair], self.capacity[pair]
        tokens = np.arange(max(written - capacity, 0), written)
        if written > capacity:
            tokens[: self.sink] = np.arange(self.sink)
        return self.slot(np.array(pair), tokens)

    def moved(self, rows: np.ndarray, capacity: np.ndarray) -> "SpanStore":
        """New storage whose row i holds what row ``rows[i]`` holds here, in ``capacity`` [len(rows), kv_heads] slots.

        No pair may get less room than it has. Its tokens are laid out in order of age, as if there had been no others.
        """
        source = (rows[:, None] * self.heads + np.arange(self.heads)).reshape(-1)  # the pair behind each new pair
        slots = [self.ordered_slots(pair) for pair in source]
        target = SpanStore(capacity, self.sink, self.keys, self.values, self.transposed)
        target.written = np.array([len(old) for old in slots], np.int64)
        target._moved_from_evicted = self.evicted()[source]
        if self.transposed:
            for pair, (old, tokens) in enumerate(zip(source, target.written, strict=True)):
                target.keys_of(pair)[:tokens], target.values_of(pair)[:tokens] = self.held(old)
            return target
        new = np.concatenate([start + np.arange(len(old)) for start, old in zip(target.offset, slots, strict=True)])
        index = torch.from_numpy(np.concatenate(slots)).to(self.keys.device)
        place = torch.from_numpy(new).to(self.keys.device)
        target.keys[place], target.values[place] = self.keys[index], self.values[index]
        return target

    def suits(
        self,
        capacity: np.ndarray,
        sink: int,
        like_key: torch.Tensor,
        like_value: torch.Tensor,
        transposed: bool = False,
    ) -> bool:
        """Whether a store made with these arguments would be like this one."""
        return (
            (self.rows, self.heads) == capacity.shape
            and self.transposed == transposed
            and self.keys.is_inference() == torch.is_inference_mode_enabled()  # no other may be written to
            and self.sink == sink
            and np.array_equal(self.capacity, capacity.reshape(-1))
            and all(
                (mine.dtype, mine.device, mine.shape[-1]) == (other.dtype, other.device, other.shape[-1])
                for mine, other in ((self.keys, like_key), (self.values, like_value))
            )
        )

    def clear(self) -> None:
        """Forget everything, in place."""
        self.written[:] = 0
        self._moved_from_evicted[:] = False
        if "on_device" in self.__dict__:
            self.on_device.written.zero_()

    def take_back(self, tokens: int) -> None:
        """Forget each pair's last tokens; right only while nothing was overwritten."""
        self.written -= tokens
        self.__dict__.pop("on_device", None)

    @cached_property
    def on_device(self) -> DeviceCounts:
        """The counts as they are now, for a backend that advances them on the device from here on."""
        counts = (self.offset, self.capacity, self.written)
        return DeviceCounts(*(torch.from_numpy(count.astype(np.int32)).to(self.keys.device) for count in counts))

    @cached_property
    def to_order(self) -> torch.Tensor:
        """`order` on the buffers' device: int64 [pairs]."""
        return torch.from_numpy(self.order).to(self.keys.device)

    @cached_property
    def from_order(self) -> torch.Tensor:
        """Where each pair lies in the order of storage: int64 [pairs] on the buffers' device."""
        return torch.from_numpy(np.argsort(self.order)).to(self.keys.device)

    @cached_property
    def _first(self) -> dict[int, torch.Tensor]:
        """By width of a transposed buffer, int64 [pairs, width]: slot plus this are the places of its numbers."""
        return {
            dim: torch.from_numpy(self.offset[:, None] * (dim - 1) + self.capacity[:, None] * np.arange(dim)).to(
                self.keys.device
            )
            for dim in {self.keys.shape[1], self.values.shape[1]}
        }

    def nbytes(self) -> int:
        """Bytes of K and V held."""
        return self.keys.nbytes + self.values.nbytes
