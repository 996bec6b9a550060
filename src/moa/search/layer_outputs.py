"""Forward passes that begin in the middle of a model.

Plans that are measured one after another differ in a head or two, and up to the layer of the first of them they compute
the same. So the outputs of the layers are kept once, and a pass that departs from the kept one at some layer reads what
comes before instead of computing it: half of the work, on average.

Layers that may not be left out, because later ones need more of them than their output, are found by trying.
"""

from collections.abc import Callable, Hashable
from contextlib import ExitStack
from typing import Any

import torch
from transformers import PreTrainedModel

from moa.search.layers import decoder_layers, instead
from moa.support import text_part

_MOST_BYTES = 4 << 30  # kept, of all passes together; a larger model keeps the outputs of every second layer, or third


class LayerOutputs:
    """What the layers of a model gave in some forward passes.

    Parameters
    ----------
    model : PreTrainedModel
    tokens : int
        Of all passes that will be kept.
    """

    def __init__(self, model: PreTrainedModel, tokens: int):
        self._layers = decoder_layers(model)
        each = tokens * text_part(model)[1].hidden_size * model.dtype.itemsize
        step = max(1, -(-each * len(self._layers) // _MOST_BYTES))
        # a pass may begin at these layers, with what the one before gave
        self._starts = list(range(step, len(self._layers), step))
        self._tried = False
        self._kept: dict[tuple[Hashable, int], Any] = {}

    def forget(self) -> None:
        """Give the memory back."""
        self._kept.clear()

    def keep(self, name: Hashable, run: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Result of a forward pass, whose layers' outputs are kept under ``name``."""

        def keeper(start: int) -> Callable[..., None]:
            def keep(module: torch.nn.Module, args: Any, output: Any) -> None:
                self._kept[name, start] = output

            return keep

        with ExitStack() as stack:
            for start in self._starts:
                stack.enter_context(self._layers[start - 1].register_forward_hook(keeper(start)))
            result = run()
        if self._starts and not self._tried:
            self._tried = True
            again = self.resume(name, self._starts[len(self._starts) // 2], run)
            rounding = torch.finfo(result.dtype).eps * result.abs().max()
            if not (again - result).abs().max() <= rounding:
                self._starts = []
                self.forget()
        return result

    def resume(self, name: Hashable, shared: int, run: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Result of a forward pass whose first ``shared`` layers do what they did in the pass kept under ``name``."""
        start = max((start for start in self._starts if start <= shared), default=0)
        if not start:
            return run()
        output = self._kept[name, start]
        with ExitStack() as stack:
            for layer in self._layers[: start - 1]:
                stack.enter_context(instead(layer, lambda hidden, *args, **kwargs: hidden))
            stack.enter_context(instead(self._layers[start - 1], lambda *args, **kwargs: output))
            return run()
