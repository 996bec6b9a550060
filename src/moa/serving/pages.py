"""Which pages a request holds in vLLM: those of the sink and those of the window, as the window moves on.

A group of heads with one span is to vLLM a sliding window that never lets go of the first pages. Cached prefixes are
found if both the pages of the window and those of the sink are still there.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import KVCacheBlock, resolve_block_hashes
from vllm.v1.core.single_type_kv_cache_manager import SlidingWindowManager
from vllm.v1.kv_cache_interface import SlidingWindowSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry


@dataclass(frozen=True, kw_only=True)
class SpanSpec(SlidingWindowSpec):
    """Pages of one KV head of a group.

    Attributes
    ----------
    sink : int
        First tokens that are always seen; ``sliding_window`` is the rest of the span.
    group : int
        Heads of different groups never share pages, even with equal spans: all groups have one size.
    """

    sink: int
    group: int

    @property
    def sink_blocks(self) -> int:
        """Pages of the sink."""
        return -(-self.sink // self.block_size)

    def max_admission_blocks_per_request(self, max_in_flight_tokens: int, max_model_len: int) -> int:
        """Pages that one request holds at most."""
        window: int = super().max_admission_blocks_per_request(max_in_flight_tokens, max_model_len)
        return min(window + self.sink_blocks, -(-max_model_len // self.block_size))


class SpanManager(SlidingWindowManager):
    """Lets go of the pages between sink and window."""

    def __init__(self, kv_cache_spec: SpanSpec, **kwargs: Any):
        super().__init__(kv_cache_spec, **kwargs)
        self._sink_blocks = kv_cache_spec.sink_blocks

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None
    ) -> None:
        """Free what no token to come will see."""
        skipped = self.get_num_skipped_tokens(processed_computed_tokens) // self.block_size
        self._remove_blocks_in_range(request_id, self._sink_blocks, skipped)

    def get_num_blocks_to_allocate(
        self, request_id: str, num_tokens: int, new_computed_blocks: Sequence[KVCacheBlock], *args: Any, **kwargs: Any
    ) -> int:
        """Pages that a request needs now; sink pages from the prefix cache that nobody holds count, too."""
        needed: int = super().get_num_blocks_to_allocate(request_id, num_tokens, new_computed_blocks, *args, **kwargs)
        total = kwargs["total_computed_tokens"] if "total_computed_tokens" in kwargs else args[0]
        skipped = self.get_num_skipped_tokens(total) // self.block_size
        passed_over: int = self._get_num_evictable_blocks(new_computed_blocks[: min(self._sink_blocks, skipped)])
        return needed + passed_over

    def add_local_computed_blocks(
        self, request_id: str, new_computed_blocks: Sequence[KVCacheBlock], *args: Any, **kwargs: Any
    ) -> None:
        """Take over pages from the prefix cache."""
        super().add_local_computed_blocks(request_id, new_computed_blocks, *args, **kwargs)
        held = self.req_to_blocks[request_id]
        for place, block in enumerate(new_computed_blocks[: self._sink_blocks]):
            if held[place] is not block:  # left out, as before the window
                self.block_pool.touch([block])
                held[place] = block

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: Any,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: BlockPool,
        kv_cache_spec: SpanSpec,
        drop_eagle_block: bool,
        alignment_tokens: int,
        **kwargs: Any,
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        """The longest cached prefix whose window and sink are all there."""
        found, length = super().find_longest_cache_hit(
            block_hashes,
            max_length,
            kv_cache_group_ids,
            block_pool,
            kv_cache_spec,
            drop_eagle_block,
            alignment_tokens,
            **kwargs,
        )
        hashes = resolve_block_hashes(
            block_hashes,
            block_pool.hash_block_size,
            kv_cache_spec.block_size,
            supports_fine_grained_hash_lookup=cls.supports_fine_grained_hash_lookup,
            alignment_tokens=alignment_tokens,
        )
        for place in range(min(kv_cache_spec.sink_blocks, len(found[0]))):
            cached = block_pool.get_cached_block(hashes[place], kv_cache_group_ids)
            if not cached:
                return tuple([] for _ in kv_cache_group_ids), 0
            for blocks, block in zip(found, cached, strict=True):
                blocks[place] = block
        return found, length

    @classmethod
    def reachable_block_mask(cls, start_block: int, end_block: int, *args: Any, **kwargs: Any) -> list[bool] | None:
        """Which pages are worth caching; those of the sink always are."""
        mask: list[bool] | None = super().reachable_block_mask(start_block, end_block, *args, **kwargs)
        spec = kwargs["kv_cache_spec"] if "kv_cache_spec" in kwargs else args[1]
        if mask is not None:
            for block in range(start_block, min(end_block, spec.sink_blocks)):
                mask[block - start_block] = True
        return mask


def _register() -> None:
    KVCacheSpecRegistry.check_kv_cache_spec_registry({})  # vLLM's own come first, or would not come at all
    KVCacheSpecRegistry.register(SpanSpec, SpanManager)


_register()
