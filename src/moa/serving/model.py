"""`MoAForCausalLM`: vLLM's Transformers model, whose attention layers hold one attention for each KV head."""

from collections.abc import Iterable
from functools import cached_property, partial
from typing import Any

import torch
from transformers import PretrainedConfig
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.transformers import TransformersForCausalLM
from vllm.model_executor.models.utils import extract_layer_index

from moa.errors import PlanError, UnsupportedModelError
from moa.plan import ModelIdentity, Plan
from moa.serving.attention import SpanBackend
from moa.serving.deal import dealable, dealt
from moa.serving.groups import HeadGroups, head_groups
from moa.serving.pages import SpanSpec
from moa.serving.support import check_servable

_LOG = init_logger("vllm.moa")  # of which vLLM shows what it says


class SpanAttention(Attention):
    """vLLM's attention of one KV head, which sees its sink and its window.

    Parameters
    ----------
    span, sink, group : int
        Of the head's group.
    kwargs
        For vLLM's attention.
    """

    def __init__(self, span: int, sink: int, group: int, **kwargs: Any):
        super().__init__(**kwargs, per_layer_sliding_window=span - sink, attn_backend=SpanBackend)
        self._sink, self._group = sink, group

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> SpanSpec:
        """What this head's pages are like."""
        return SpanSpec(
            block_size=vllm_config.cache_config.block_size,
            num_kv_heads=1,
            head_size=self.head_size,
            dtype=self.kv_cache_torch_dtype,
            sliding_window=self.sliding_window,
            sink=self._sink,
            group=self._group,
        )


class SpanLayer(torch.nn.Module):
    """The attention of a layer: that of its KV heads on this rank, side by side.

    Parameters
    ----------
    groups : HeadGroups
    num_heads, num_kv_heads : int
        Of this rank.
    prefix : str
        vLLM's name for the layer.
    kwargs
        For vLLM's attention.
    """

    def __init__(self, groups: HeadGroups, num_heads: int, num_kv_heads: int, prefix: str, **kwargs: Any):
        super().__init__()
        own = [
            name for name in ("logits_soft_cap", "sinks", "per_layer_sliding_window") if kwargs.get(name) is not None
        ]
        if own:
            raise UnsupportedModelError(
                f"{prefix} has {', '.join(own)}, which serving a plan does not cover; serve this model without a plan, "
                "or run it with moa.apply"
            )
        kwargs.pop("logits_soft_cap", None)
        rank = get_tensor_model_parallel_rank()
        places = groups.place[extract_layer_index(prefix), rank * num_kv_heads : (rank + 1) * num_kv_heads]
        self.heads = torch.nn.ModuleList(
            SpanAttention(
                # the name says what the head stores, not where it sits: so it is the same on every rank
                prefix=f"moa.heads.{place}",
                span=int(groups.spans[place // groups.size]),
                sink=groups.plan.sink,
                group=place // groups.size,
                num_heads=num_heads // num_kv_heads,
                num_kv_heads=1,
                **kwargs,
            )
            for place in places.tolist()
        )

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Attention, as vLLM's `Attention.forward`: [tokens, heads * head_dim]; heads of a KV head are neighbours."""
        parts = zip(*(tensor.chunk(len(self.heads), -1) for tensor in (query, key, value)), strict=True)
        found = [
            head(*(part.contiguous() for part in together)) for head, together in zip(self.heads, parts, strict=True)
        ]
        return torch.cat(found, -1)


class MoAForCausalLM(TransformersForCausalLM):
    """Any decoder of plain attention under the plan that its config names (``moa_plan``, a file)."""

    @cached_property
    def _groups(self) -> HeadGroups:
        return served_groups(self.vllm_config)

    def _get_attn_cls(self) -> Any:
        return partial(SpanLayer, self._groups)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """As vLLM's, with the heads in the order in which they are dealt to the ranks."""
        if self._groups.dealt:
            weights = dealt(weights, self._groups.order)
        found: set[str] = super().load_weights(weights)
        return found


def served_groups(vllm_config: VllmConfig) -> HeadGroups:
    """The groups that an engine of this configuration serves.

    Raises
    ------
    PlanError
        If there is no plan, or it is for another model.
    UnsupportedModelError
        If the engine is asked for what it cannot do under a plan.
    """
    config: PretrainedConfig = vllm_config.model_config.hf_config
    source = getattr(config, "moa_plan", None)
    if source is None:
        raise PlanError('no plan is named; pass --hf-overrides \'{"moa_plan": "plan.json", ...}\', or use `moa serve`')
    _check(vllm_config)
    check_servable(config)
    plan = Plan.load(source)
    plan.check_fits(ModelIdentity.of(config))
    length = getattr(config, "moa_length", None) or vllm_config.model_config.max_model_len
    ranks = vllm_config.parallel_config.tensor_parallel_size
    # the layout of quantized weights is their own, and adapters are loaded elsewhere
    plain = vllm_config.quant_config is None and vllm_config.lora_config is None
    deals = ranks > 1 and plain and dealable(config)
    groups = head_groups(plan, length, ranks, deals=deals)
    _LOG.info_once(
        "Plan %s at %d tokens: density %.3f, %.3f as served in %d groups of heads",
        source,
        length,
        plan.density(length),
        groups.density,
        len(groups.spans),
    )
    return groups


def _check(vllm_config: VllmConfig) -> None:
    parallel = vllm_config.parallel_config
    asked = {
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
        "context parallelism": parallel.decode_context_parallel_size > 1,
        "speculative decoding": vllm_config.speculative_config is not None,
        "a KV cache in another format than the model's": vllm_config.cache_config.cache_dtype != "auto",
        "transferring the KV cache": vllm_config.kv_transfer_config is not None,
        "one pool of pages for all layers (--disable-hybrid-kv-cache-manager)": (
            vllm_config.scheduler_config.disable_hybrid_kv_cache_manager is True
        ),
    }
    for what, wanted in asked.items():
        if wanted:
            raise UnsupportedModelError(f"under a plan vLLM does not serve with {what}; leave it out")
