"""Layers compiled for forward passes: the small operations between products fused.

A small model's norms, rotations and gates take as long as its products: they do little but read and write memory.
Attention is ours already, and stays as it is.
"""

import logging
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from transformers import PreTrainedModel

from moa.runtime import hidden_from_compilers
from moa.search.layers import decoder_layers, instead

_LOG = logging.getLogger("moa")


class CompiledLayers:
    """Runs a model's forward passes with compiled layers.

    Parameters
    ----------
    model : PreTrainedModel
        Without a plan, or under one.
    backend : str
        Of `torch.compile`.
    """

    def __init__(self, model: PreTrainedModel, backend: str = "inductor"):
        # kernels tuned by timing could add up otherwise in another search, and plans must be the same
        options: Any = {"deterministic": True} if backend == "inductor" else None
        self._layers = [
            (layer, torch.compile(layer.forward, backend=backend, options=options)) for layer in decoder_layers(model)
        ]

    def run(self, forward: Callable[[], torch.Tensor]) -> torch.Tensor:
        """What ``forward`` returns, a call of the model; from where the compiler fails on, without it."""
        try:
            with hidden_from_compilers(), ExitStack() as stack:
                for layer, compiled in self._layers:
                    stack.enter_context(instead(layer, compiled))
                return forward()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # compilers fail in many ways
            if not self._layers:
                raise
            result = forward()  # an error of the model's own comes again
            self._layers = []
            _LOG.warning("layers are not compiled, and measuring will be slower: %s: %s", type(error).__name__, error)
            return result
