"""How far a plan takes a model from its dense self: measured, on the dense model's own answers."""

from collections.abc import Mapping

import numpy as np
import torch

from moa.evaluation.likelihood import divergence, logits_at
from moa.models import LoadedModel
from moa.plan import Plan
from moa.runtime import apply
from moa.search.answers import rows_together
from moa.search.items import CalibrationItem, CalibrationSet
from moa.search.tables import SHORTEST


class Divergence:
    """Kullback-Leibler divergence of a model under a plan from the dense model.

    The dense model's log-probabilities are kept on its device, float32: tokens of all answers times the vocabulary.

    Parameters
    ----------
    loaded : LoadedModel
        With no plan in force.
    items : CalibrationSet
    weights : mapping of source to float
        What each source counts in `total`, in units of what it loses when every head has the shortest span that loss
        tables know of.
    """

    def __init__(self, loaded: LoadedModel, items: CalibrationSet, weights: Mapping[str, float]):
        self._loaded, self._items, self._weights = loaded, items, weights
        self._dense = {key: self._log_probs(members) for key, members in items.items.items()}
        identity = loaded.identity
        shortest = np.full((identity.layers, identity.kv_heads), float(SHORTEST))
        self._unit = self.by_source(Plan.from_arrays(identity, shortest, 0 * shortest))

    def by_source(self, plan: Plan) -> dict[str, float]:
        """Divergence for each source, nats per answer token: mean over tokens, then items, then lengths."""
        found: dict[str, list[float]] = {}
        with apply(self._loaded.model, plan):
            for key, members in self._items.items.items():
                pairs = zip(self._dense[key], self._log_probs(members), strict=True)
                losses = [divergence(dense, other) for dense, other in pairs]
                found.setdefault(key[1], []).append(float(np.mean(losses)))
        return {source: float(np.mean(losses)) for source, losses in found.items()}

    def total(self, by_source: Mapping[str, float]) -> float:
        """The weighted sum; the sum of the weights when every head has that span."""
        return sum(self._weights[source] * loss / max(self._unit[source], 1e-12) for source, loss in by_source.items())

    @torch.no_grad()
    def _log_probs(self, items: tuple[CalibrationItem, ...]) -> list[torch.Tensor]:
        """Log-probabilities at every position of each answer: float32 [answer tokens, vocabulary]."""
        device = self._loaded.model.device
        length = len(items[0].input_ids)
        rows = rows_together(device, length)
        result: list[torch.Tensor] = []
        for first in range(0, len(items), rows):
            together = items[first : first + rows]
            ids = torch.as_tensor(np.stack([item.input_ids for item in together]), device=device)
            start = min(item.answer_start for item in together)
            positions = torch.arange(start - 1, length - 1, device=device)
            logits = logits_at(self._loaded.model, ids, positions, use_cache=False)
            answers = zip(logits, together, strict=True)
            result += [row[item.answer - start].float().log_softmax(-1) for row, item in answers]
        return result
