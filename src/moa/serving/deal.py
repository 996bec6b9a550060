"""Heads dealt to tensor-parallel ranks: each rank gets heads of the same spans, as nearly as there are such heads.

An engine gives rank r the r-th part of every layer's heads, and memory of one layout on all ranks. Where one rank has
more heads with long spans than another, the others would hold as much for nothing. The order of a layer's KV heads is
free, as long as their queries' weights and the output's columns go along; so heads are put in another order when the
weights are loaded.
"""

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

_PROJECTIONS = ("q_proj", "k_proj", "v_proj")  # rows by head; o_proj has columns by head
_OF_ALL_HEADS = ("q_norm", "k_norm")  # where they have one weight for each dimension of a head


def deal(spans: np.ndarray, ranks: int) -> np.ndarray:
    """The order of each layer's heads in which neighbouring equal shares hold the same spans, nearly.

    Parameters
    ----------
    spans : int64 [layers, kv_heads]
    ranks : int
        Divides the heads.

    Returns
    -------
    int64 [layers, kv_heads]
        Heads of the model; the first share is rank 0's.
    """
    heads = spans.shape[1]
    levels, level = np.unique(spans, return_inverse=True)
    level = level.reshape(spans.shape)
    held = np.zeros((ranks, len(levels)), np.int64)  # heads of each span on each rank, so far
    order = np.empty_like(spans)
    for layer in np.argsort(-spans.sum(1), kind="stable"):
        share: list[list[int]] = [[] for _ in range(ranks)]
        for head in np.argsort(-spans[layer], kind="stable").tolist():
            own = level[layer, head]
            free = [rank for rank in range(ranks) if len(share[rank]) < heads // ranks]
            # to whom has fewest of this span and longer ones, then to whom has least
            rank = min(free, key=lambda rank: (held[rank, own:].sum(), held[rank] @ levels, rank))
            share[rank].append(head)
            held[rank, own] += 1
        order[layer] = np.concatenate(share)
    return order


def dealable(config: PretrainedConfig) -> bool:
    """Whether `dealt` knows all weights that belong to single heads: those of plain, separate projections."""
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except ValueError:  # a model whose code is not part of transformers
        return False
    attention = [module for module in model.modules() if hasattr(module, "layer_idx") and hasattr(module, "o_proj")]
    for module in attention:
        if not all(hasattr(module, name) for name in _PROJECTIONS):
            return False
        for name, weights in module.named_parameters():
            part = name.split(".")[0]
            shared = part in _OF_ALL_HEADS and weights.shape == (module.head_dim,)
            if not shared and part not in (*_PROJECTIONS, "o_proj"):
                return False
    return bool(attention)


def dealt(weights: Iterable[tuple[str, torch.Tensor]], order: np.ndarray) -> Iterator[tuple[str, torch.Tensor]]:
    """Weights of a `dealable` model, by name, with each layer's KV heads and their queries in this order.

    Parameters
    ----------
    weights : iterable of (name, tensor)
        Names as in transformers' checkpoints.
    order : int64 [layers, kv_heads]
        As from `deal`.
    """
    heads = order.shape[1]
    for name, tensor in weights:
        parts = ["", *name.split(".")]
        layer = next((int(part) for part in parts if part.isdigit()), None)
        if layer is not None and layer < len(order):  # some checkpoints have layers that the model leaves out
            index = torch.from_numpy(order[layer]).to(tensor.device)
            if parts[-2] in _PROJECTIONS:
                tensor = tensor.unflatten(0, (heads, -1)).index_select(0, index).flatten(0, 1)
            elif parts[-2:] == ["o_proj", "weight"]:
                tensor = tensor.unflatten(1, (heads, -1)).index_select(1, index).flatten(1, 2)
        yield name, tensor
