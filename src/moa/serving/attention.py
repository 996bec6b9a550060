"""Span attention over vLLM's pages, by PyTorch's operators: right on any device, made for the CPU build of vLLM.

What a step reads depends on the group alone, so the pages' slots and the masks are worked out once for a group and
serve all of its heads. Requests that decode one token are attended together; a chunk of a prompt by itself.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.nn.functional import scaled_dot_product_attention
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)


@dataclass(frozen=True)
class Reading:
    """What the queries of some requests, all with as many queries, read.

    Attributes
    ----------
    queries : int64 [requests, queries]
        Rows of the step's tokens.
    page, offset : int64 [requests, keys]
        Where the keys lie; anywhere where none is.
    mask : bool [requests, 1, queries, keys]
        What each query sees.
    """

    queries: torch.Tensor
    page: torch.Tensor
    offset: torch.Tensor
    mask: torch.Tensor


@dataclass(frozen=True)
class SpanMetadata:
    """A step, for the heads of a group.

    Attributes
    ----------
    page, offset : int64 [tokens]
        Where the keys and values of the new tokens go.
    readings : tuple of Reading
    """

    page: torch.Tensor
    offset: torch.Tensor
    readings: tuple[Reading, ...]


class SpanMetadataBuilder(AttentionMetadataBuilder[SpanMetadata]):
    """Works out a group's `SpanMetadata` from vLLM's block table."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._sink, self._window = kv_cache_spec.sink, kv_cache_spec.sliding_window
        self._size = kv_cache_spec.block_size

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> SpanMetadata:
        """What vLLM calls once for each step and group."""
        common = common_attn_metadata
        starts = common.query_start_loc_cpu[: common.num_reqs + 1].long()
        lengths = common.seq_lens[: common.num_reqs].cpu().long()
        counts = starts.diff()
        slots = common.slot_mapping[: common.num_actual_tokens].long()
        one = torch.nonzero((counts == 1) & (lengths > 0))[:, 0]
        groups = [one] if len(one) else []
        groups += [request[None] for request in torch.nonzero((counts > 1) & (lengths > 0))[:, 0]]
        table = common.block_table_tensor
        readings = tuple(
            self._reading(starts[which], counts[which], lengths[which], table[which.to(table.device)].long())
            for which in groups
        )
        return SpanMetadata(slots // self._size, slots % self._size, readings)

    def _reading(
        self, starts: torch.Tensor, counts: torch.Tensor, lengths: torch.Tensor, table: torch.Tensor
    ) -> Reading:
        queries = int(counts[0])
        first = lengths - queries  # position of the first query
        begin = (first - self._window + 1).clamp(min=self._sink)  # of the window, beyond the sink
        window = begin[:, None] + torch.arange(max(0, int((lengths - begin).max())))
        key = torch.cat([torch.arange(self._sink).expand(len(starts), -1), window], 1)
        query = first[:, None] + torch.arange(queries)
        distance = query[:, :, None] - key[:, None, :]
        seen = (distance >= 0) & ((key[:, None, :] < self._sink) | (distance < self._window))
        key = key.minimum(lengths[:, None] - 1)  # what is not there is not seen
        device = table.device
        return Reading(
            queries=(starts[:, None] + torch.arange(queries)).to(device),
            page=table.gather(1, (key // self._size).to(device)),
            offset=(key % self._size).to(device),
            mask=seen[:, None].to(device),
        )


class SpanAttentionImpl(AttentionImpl):
    """Attention of one KV head and its query heads."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None,
        sliding_window: int | None,
        kv_cache_dtype: str,
        *args: Any,
        **kwargs: Any,
    ):
        self.num_heads, self.head_size, self.scale, self.num_kv_heads = num_heads, head_size, scale, num_kv_heads
        self.kv_cache_dtype = kv_cache_dtype

    def forward(
        self,
        layer: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: SpanMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Store the new tokens, then attend.

        Parameters
        ----------
        query, output : [tokens, query heads, head_dim]
        key, value : [tokens, 1, head_dim]
        kv_cache : [pages, 1, tokens of a page, 2 * head_dim]
            Keys, then values.
        attn_metadata : SpanMetadata or None
            None where vLLM warms up.
        """
        if attn_metadata is None:
            return output.zero_()
        pages = kv_cache[:, 0]
        new = torch.cat([key[:, 0], value[:, 0]], -1)[: len(attn_metadata.page)]
        pages[attn_metadata.page, attn_metadata.offset] = new.to(pages.dtype)
        for reading in attn_metadata.readings:
            stored = pages[reading.page, reading.offset].to(query.dtype)[:, None]  # [requests, 1, keys, 2 head_dim]
            keys, values = stored.split(self.head_size, -1)
            q = query[reading.queries].transpose(1, 2)  # [requests, query heads, queries, head_dim]
            heads = (-1, self.num_heads, -1, -1)
            found = scaled_dot_product_attention(
                q, keys.expand(heads), values.expand(heads), attn_mask=reading.mask, scale=self.scale
            )
            output[reading.queries] = found.transpose(1, 2)
        return output


class SpanBackend(AttentionBackend):
    """What vLLM asks about the above."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    forward_includes_kv_cache_update = True

    @staticmethod
    def get_name() -> str:
        """A name that vLLM knows."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[SpanAttentionImpl]:
        """The attention."""
        return SpanAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[SpanMetadataBuilder]:
        """What prepares a step."""
        return SpanMetadataBuilder

    @classmethod
    def supports_sliding_window(cls) -> bool:
        """Each group is one."""
        return True
