"""What vLLM asks of an attention: a backend, what a step of it is, and the attention of a layer under a plan.

Each group of heads has a table of pages of its own, for which vLLM describes every step. A layer's heads are of several
groups, and attended at once: by our kernels on a GPU, by PyTorch's operators elsewhere.
"""

from typing import Any, ClassVar

import torch
from vllm.forward_context import get_forward_context
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)

from moa.serving import paged
from moa.serving.paged import Step


class SpanMetadataBuilder(AttentionMetadataBuilder[Step]):
    """A group's `Step` from what vLLM says about all groups. On a GPU nothing is read from the device."""

    # a recorded graph holds steps of single tokens; their tables, slots and lengths stay where they are
    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._sink, self._window = kv_cache_spec.sink, kv_cache_spec.sliding_window
        self._size = kv_cache_spec.block_size

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Step:
        """What vLLM calls once for each step and group."""
        common = common_attn_metadata
        return Step(
            table=common.block_table_tensor,
            slots=common.slot_mapping[: common.num_actual_tokens],
            starts=common.query_start_loc[: common.num_reqs + 1],
            lengths=common.seq_lens[: common.num_reqs],
            most=common.max_query_len,
            sink=self._sink,
            window=self._window,
            size=self._size,
        )


class SpanAttentionImpl(AttentionImpl):
    """Attention of a layer: of all of its KV heads on this rank, and their query heads."""

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
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Step | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Store the new tokens, then attend.

        Parameters
        ----------
        layer : moa.serving.model.SpanLayer
            Whose ``heads`` name the pages and the step of each KV head.
        query, output : [tokens, query heads, head_dim]
        key, value : [tokens, kv_heads, head_dim]
        kv_cache, attn_metadata
            The first head's, as vLLM has it; without metadata, vLLM warms up.
        """
        if attn_metadata is None:
            return output.zero_()
        steps = get_forward_context().attn_metadata
        if query.is_cuda:
            from moa.serving.triton_paged import attend
        else:
            attend = paged.attend
        attend(
            query,
            key,
            value,
            [head.kv_cache[:, 0] for head in layer.heads],  # [pages, 1, size, 2 * head_dim] each
            [steps[head.layer_name] for head in layer.heads],
            self.scale,
            output,
        )
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

    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int, block_size: int, num_kv_heads: int, head_size: int, cache_dtype_str: str = "auto"
    ) -> tuple[int, ...]:
        """Keys, then values, of each token; later versions of vLLM have this shape by themselves."""
        return num_blocks, num_kv_heads, block_size, 2 * head_size

    @classmethod
    def supports_sliding_window(cls) -> bool:
        """Each group is one."""
        return True
