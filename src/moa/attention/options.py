"""What an attention call needs beyond queries, keys, values and spans."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class AttentionOptions:
    """Settings of one attention layer.

    Attributes
    ----------
    scaling : float
        Factor of the scores.
    softcap : float, optional
        Scores become ``softcap * tanh(scores / softcap)`` (Gemma 2).
    sink_logits : [query_heads], optional
        A learned logit per head that takes part in the softmax and has no value (gpt-oss).
    sliding_window : int, optional
        The model's own window in this layer (see `effective_span`).
    """

    scaling: float
    softcap: float | None = None
    sink_logits: torch.Tensor | None = None
    sliding_window: int | None = None


def effective_span(span: int, sink: int, sliding_window: int | None) -> tuple[int, int]:
    """Span and sink of a head in a layer that may have a sliding window of its own.

    Such a layer never sees further back than its window, so it keeps no sink: all of the span, at most the window,
    goes to the most recent tokens.
    """
    if sliding_window is None:
        return span, sink
    return min(span, sliding_window), 0
