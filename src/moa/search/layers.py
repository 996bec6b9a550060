"""A model's layers, and how one is made to do something else for a while."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from moa.support import text_part


def decoder_layers(model: PreTrainedModel) -> list[torch.nn.Module]:
    """The layers in order; none where they do not stand in one list."""
    count = text_part(model)[1].num_hidden_layers
    for module in model.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == count:
            places = [{getattr(part, "layer_idx", None) for part in layer.modules()} - {None} for layer in module]
            if places == [{place} for place in range(count)]:
                return list(module)
    return []


@contextmanager
def instead(layer: torch.nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let a layer do something else; on the object alone, for a while."""
    own = layer.__dict__.get("forward")  # where another library has set one on the object
    object.__setattr__(layer, "forward", forward)
    try:
        yield
    finally:
        object.__delattr__(layer, "forward")
        if own is not None:
            object.__setattr__(layer, "forward", own)
