"""How likely a model finds real text, and the answers that the dense model wrote."""

import inspect
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moa.errors import InputError
from moa.search.items import CalibrationItem
from moa.search.text import TokenStream

# Logits are kept for this many positions of a chunk, spread evenly: all of a long chunk might not fit in memory.
_SCORED_POSITIONS = 1024


def text_chunks(tokenizer: PreTrainedTokenizerBase, text: str, length: int, most: int) -> np.ndarray:
    """Stretches of a text, each with the tokenizer's first token, spread evenly and without overlap: as many as the
    text has, or ``most``: int64 [chunks, length].

    Raises
    ------
    InputError
        If the text has fewer than ``length`` tokens.
    """
    first = np.asarray(tokenizer("")["input_ids"], np.int64)
    ids = TokenStream.of(tokenizer, text).ids
    tokens = length - len(first)
    if tokens > len(ids):
        raise InputError(
            f"the text has {len(ids):,} tokens, and {tokens:,} are needed; choose a shorter length, or give more text"
        )
    starts = np.linspace(0, len(ids) - tokens, min(most, len(ids) // tokens)).astype(np.int64)
    return np.stack([np.concatenate([first, ids[start : start + tokens]]) for start in starts])


@torch.no_grad()
def text_losses(model: PreTrainedModel, chunks: np.ndarray) -> np.ndarray:
    """Cross-entropy of real text in nats, each chunk read from its start, without a cache.

    Parameters
    ----------
    chunks : int64 array [chunks, length]

    Returns
    -------
    float64 [chunks, positions]
        At most 1024 positions of each chunk, spread evenly.
    """
    length = chunks.shape[1]
    positions = torch.linspace(0, length - 2, min(length - 1, _SCORED_POSITIONS), device=model.device).long()
    losses = []
    for ids in torch.as_tensor(chunks, device=model.device):
        logits = logits_at(model, ids[None], positions, use_cache=False)[0]
        losses.append(torch.nn.functional.cross_entropy(logits.float(), ids[positions + 1], reduction="none").cpu())
    return torch.stack(losses).double().numpy()


@torch.no_grad()
def answer_log_probs(model: PreTrainedModel, item: CalibrationItem) -> torch.Tensor:
    """Log-probabilities of every token at every position of an item's answer: float32 [tokens, vocabulary]."""
    ids = torch.as_tensor(item.input_ids, device=model.device)[None]
    positions = torch.as_tensor(item.answer - 1, device=model.device)
    return logits_at(model, ids, positions, use_cache=False)[0].float().log_softmax(-1)


def divergences(dense: torch.Tensor, other: torch.Tensor) -> np.ndarray:
    """Kullback-Leibler divergence of ``other`` from ``dense``, log-probabilities [tokens, vocabulary].

    Returns
    -------
    float64 [tokens]
        Nats.
    """
    found = torch.nn.functional.kl_div(other, dense, reduction="none", log_target=True).sum(-1)
    nats: np.ndarray = found.clamp(min=0).double().cpu().numpy()  # rounding may take nothing below 0
    return nats


def logits_at(model: PreTrainedModel, ids: torch.Tensor, positions: torch.Tensor, **options: Any) -> torch.Tensor:
    """Logits [batch, positions, vocabulary] of a forward pass; the others are not computed, where the model allows it.

    Parameters
    ----------
    ids : int64 tensor [batch, tokens]
    positions : int64 tensor [positions]
        Of the tokens in ``ids``.
    options
        For the model's forward, such as ``past_key_values``.
    """
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        return model(ids, logits_to_keep=positions, **options).logits
    return model(ids, **options).logits[:, positions]
