"""Which pages a request holds in vLLM: those of the sink and those of the window, as the window moves on.

A group of heads with one span is to vLLM a sliding window that never lets go of the first pages. Cached prefixes are
found if both the pages of the window and those of the sink are still there.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHashListWithBlockSize, KVCacheBlock
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

    def max_admission_blocks_per_request(self, *args: Any, max_model_len: int, **kwargs: Any) -> int:
        """Pages that one request holds at most."""
        window: int = super().max_admission_blocks_per_request(*args, max_model_len=max_model_len, **kwargs)
        return min(window + self.sink_blocks, -(-max_model_len // self.block_size))


class SpanManager(SlidingWindowManager):
    """Lets go of the pages between sink and window."""

    def __init__(self, kv_cache_spec: SpanSpec, **kwargs: Any):
        super().__init__(kv_cache_spec, **kwargs)
        self._sink_blocks = kv_cache_spec.sink_blocks

    def remove_skipped_blocks(self, request_id: str, processed_computed_tokens: int, *args: Any) -> None:
        """Free what no token to come will see, last page first: before a page that is gone, all are."""
        held = self.req_to_blocks.get(request_id, [])
        skipped = min(self.get_num_skipped_tokens(processed_computed_tokens) // self.block_size, len(held))
        freed = []
        for place in range(skipped - 1, self._sink_blocks - 1, -1):
            if held[place] is self._null_block:
                break
            freed.append(held[place])
            held[place] = self._null_block
        self.block_pool.free_blocks(freed)

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
        self._hold_sink(request_id, new_computed_blocks)

    def allocate_new_computed_blocks(
        self, request_id: str, new_computed_blocks: Sequence[KVCacheBlock], *args: Any, **kwargs: Any
    ) -> None:
        """As `add_local_computed_blocks`, which vLLM 0.23 does not have."""
        super().allocate_new_computed_blocks(request_id, new_computed_blocks, *args, **kwargs)
        self._hold_sink(request_id, new_computed_blocks)

    def _hold_sink(self, request_id: str, cached: Sequence[KVCacheBlock]) -> None:
        held = self.req_to_blocks[request_id]
        for place, block in enumerate(cached[: self._sink_blocks]):
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
    ) -> Any:
        """The longest cached prefix whose window and sink are all there."""
        hit = super().find_longest_cache_hit(
            block_hashes,
            max_length,
            kv_cache_group_ids,
            block_pool,
            kv_cache_spec,
            drop_eagle_block,
            alignment_tokens,
            **kwargs,
        )
        counted = isinstance(hit[-1], int)  # vLLM 0.23 returns the pages alone, later ones the tokens as well
        found = hit[0] if counted else hit
        size, unit = kv_cache_spec.block_size, block_pool.hash_block_size
        if size != unit and not isinstance(block_hashes, BlockHashListWithBlockSize):
            block_hashes = BlockHashListWithBlockSize(block_hashes, unit, size)
        for place in range(min(kv_cache_spec.sink_blocks, len(found[0]))):
            cached = block_pool.get_cached_block(block_hashes[place], kv_cache_group_ids)
            if not cached:
                nothing: tuple[list[KVCacheBlock], ...] = tuple([] for _ in kv_cache_group_ids)
                return (nothing, 0) if counted else nothing
            for blocks, block in zip(found, cached, strict=True):
                blocks[place] = block
        return hit

    @classmethod
    def reachable_block_mask(cls, start_block: int, end_block: int, *args: Any, **kwargs: Any) -> list[bool] | None:
        """Which pages are worth caching; those of the sink always are."""
        mask: list[bool] | None = super().reachable_block_mask(start_block, end_block, *args, **kwargs)
        spec = kwargs["kv_cache_spec"] if "kv_cache_spec" in kwargs else args[1]
        if spec.sliding_window == 1:
            return None  # vLLM would keep nothing for such a window, and find no prefix
        if mask is not None:
            for block in range(start_block, min(end_block, spec.sink_blocks)):
                mask[block - start_block] = True
        return mask


def _register() -> None:
    KVCacheSpecRegistry.check_kv_cache_spec_registry({})  # vLLM's own come first, or would not come at all
    KVCacheSpecRegistry.register(SpanSpec, SpanManager)


_register()
