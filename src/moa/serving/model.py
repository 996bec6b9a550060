"""`MoAForCausalLM`: vLLM's Transformers model, in whose layers every KV head has pages of its own."""

from collections.abc import Iterable
from functools import cached_property, partial
from typing import Any

import torch
from transformers import PretrainedConfig
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.models.transformers import TransformersForCausalLM
from vllm.model_executor.models.utils import extract_layer_index

from moa.errors import PlanError, UnsupportedModelError
from moa.plan import ModelIdentity, Plan
from moa.serving.attention import SpanBackend
from moa.serving.deal import dealable, dealt
from moa.serving.groups import HeadGroups, head_groups
from moa.serving.pages import SpanSpec
from moa.serving.support import check_modules, check_servable

_LOG = init_logger("vllm.moa")  # of which vLLM shows what it says


class SpanHead(AttentionLayerBase):
    """A KV head, to vLLM a layer of its own: it has pages, and a step is described for it.

    Parameters
    ----------
    place : int
        Of the head, as in `HeadGroups`. The name that vLLM knows says what the head stores, not where it sits: so it is
        the same on every rank.
    groups : HeadGroups
    num_heads : int
        Query heads of a layer: vLLM describes a step once for all layers that have as many.
    head_size : int
    dtype : torch.dtype
        Of the pages.
    """

    def __init__(self, place: int, groups: HeadGroups, num_heads: int, head_size: int, dtype: torch.dtype):
        self.layer_name, self.num_heads = name_of(place), num_heads
        self.kv_cache = torch.tensor([])  # vLLM puts the pages here
        group = place // groups.size
        sink = groups.plan.sink
        self._spec: dict[str, Any] = {
            "num_kv_heads": 1,
            "head_size": head_size,
            "dtype": dtype,
            "sliding_window": int(groups.spans[group]) - sink,
            "sink": sink,
            "group": group,
        }

    def get_attn_backend(self) -> type[SpanBackend]:
        """As of all heads."""
        return SpanBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> SpanSpec:
        """What this head's pages are like."""
        return SpanSpec(block_size=vllm_config.cache_config.block_size, **self._spec)


def name_of(place: int) -> str:
    """vLLM's name for the head at this place."""
    return f"moa.heads.{place}"


class SpanLayer(Attention):
    """vLLM's attention of a layer under a plan. To vLLM it is the first of its KV heads, but it attends for all.

    Parameters
    ----------
    groups : HeadGroups
    num_heads, num_kv_heads : int
        Of this rank.
    head_size : int
    prefix : str
        vLLM's name for the layer.
    kwargs
        For vLLM's attention.

    Attributes
    ----------
    heads : list of SpanHead or SpanLayer
        With ``layer_name`` and ``kv_cache`` of each KV head; the first is this layer.
    """

    def __init__(
        self, groups: HeadGroups, num_heads: int, head_size: int, num_kv_heads: int, prefix: str, **kwargs: Any
    ):
        own = [
            name for name in ("logits_soft_cap", "sinks", "per_layer_sliding_window") if kwargs.get(name) is not None
        ]
        if own:
            raise UnsupportedModelError(
                f"{prefix} has {', '.join(own)}, which serving a plan does not cover; serve this model without a plan, "
                "or run it with moa.apply"
            )
        rank = get_tensor_model_parallel_rank()
        layer = extract_layer_index(prefix)
        first, *others = groups.place[layer, rank * num_kv_heads : (rank + 1) * num_kv_heads].tolist()
        super().__init__(
            num_heads=num_heads,
            head_size=head_size,
            num_kv_heads=num_kv_heads,
            prefix=name_of(first),
            attn_backend=SpanBackend,
            **kwargs,
        )
        vllm_config = get_current_vllm_config()
        dtype = self.kv_cache_torch_dtype
        if dtype != vllm_config.model_config.dtype:  # as some quantized checkpoints ask for
            raise UnsupportedModelError(
                f"under a plan vLLM does not serve with a KV cache of {dtype} for a model of "
                f"{vllm_config.model_config.dtype}; use a checkpoint whose KV cache is not quantized"
            )
        known = vllm_config.compilation_config.static_forward_context
        self._first = SpanHead(first, groups, num_heads, head_size, dtype)
        self.heads: list[Any] = [self]
        for place in others:
            head = SpanHead(place, groups, num_heads, head_size, dtype)
            known[head.layer_name] = head
            self.heads.append(head)

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> SpanSpec:
        """What the first head's pages are like."""
        return self._first.get_kv_cache_spec(vllm_config)


class MoAForCausalLM(TransformersForCausalLM):
    """Any decoder of plain attention under the plan that its config names (``moa_plan``, a file)."""

    @cached_property
    def _groups(self) -> HeadGroups:
        return served_groups(get_current_vllm_config())

    def _get_attn_cls(self) -> Any:
        check_modules(self.model)
        return partial(SpanLayer, self._groups)

    def create_attention_instances(self) -> dict[int, SpanLayer]:
        """The layers' attention, for versions of vLLM (0.23) that do not ask `_get_attn_cls`."""
        check_modules(self.model)
        config, parallel = self.model_config, self.parallel_config
        size = config.get_head_size()
        return {
            layer: SpanLayer(
                self._groups,
                num_heads=config.get_num_attention_heads(parallel),
                head_size=size,
                num_kv_heads=config.get_num_kv_heads(parallel),
                prefix=f"{layer}.attn",
                scale=size**-0.5,  # until transformers says otherwise
                cache_config=self.cache_config,
                quant_config=self.quant_config,
            )
            for layer in range(self.text_config.num_hidden_layers)
        }

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
    # what vLLM compiles holds the heads' names: under another plan of the same file name it compiles anew
    config.moa_served = groups.digest()
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
