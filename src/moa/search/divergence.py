"""How far a plan takes a model from its dense self: measured, on the dense model's own answers.

Summaries and texts count by the token. A question about a fact has one answer, found or lost, however many tokens it
takes to say: once the first is said the others are mere copying, and their mean would hide that the first was wrong.
So a question costs ``1 - exp(-D)``, D the divergence over its whole answer: where the dense model is sure, that is the
chance that the answer is another one. It also keeps a few questions that are lost for good from outweighing all those
that may still be saved.

Of several questions about a text the first counts as much as all the others together. Those have an answer before them
that shows how the text says such things, and are easier to answer.

One plan serves all lengths. Of retrieval the mean over lengths counts. A summary or a text that it spoils at one length
is not made good by others that it leaves alone; so of these the length counts at which the plan loses most.
"""

from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping
from functools import partial
from typing import Protocol

import numpy as np
import torch

from moa.evaluation.likelihood import divergences, logits_at
from moa.models import LoadedModel
from moa.plan import Plan
from moa.runtime import apply
from moa.search.answers import rows_together
from moa.search.calibrate import RETRIEVAL
from moa.search.compiled_layers import CompiledLayers
from moa.search.items import CalibrationItem, CalibrationSet
from moa.search.layer_outputs import LayerOutputs
from moa.search.tables import SHORTEST

ItemLosses = dict[tuple[int, str], np.ndarray]  # by length and source: float64 [items]

MEASURE = "lost-first-answers-worst-spread-texts"  # part of the keys of results: another measure, another key


class Divergence:
    """Divergence (Kullback-Leibler, nats) of a model under a plan from the dense model.

    The dense model's log-probabilities are kept on its device, float32: tokens that carry loss times the vocabulary.

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
        self._base: Plan | None = None
        self._kept = False  # whether the base has run
        tokens = sum(len(item.input_ids) for members in items.items.values() for item in members)
        self._outputs = LayerOutputs(loaded.model, tokens)
        self._compiled = CompiledLayers(loaded.model) if loaded.model.device.type == "cuda" else None
        self._dense = {key: self._log_probs(key, _run) for key in items.items}
        identity = loaded.identity
        shortest = np.full((identity.layers, identity.kv_heads), float(SHORTEST))
        self._unit = self.by_source(Plan.from_arrays(identity, shortest, 0 * shortest))

    def around(self, plan: Plan) -> None:
        """Say that the plans to come are like this one in most heads: what they have in common is computed once."""
        if plan != self._base:
            self.forget()
            self._base = plan

    def forget(self) -> None:
        """Give the memory back that `around` took."""
        self._base, self._kept = None, False
        self._outputs.forget()

    def by_source(self, plan: Plan) -> dict[str, float]:
        """Loss for each source.

        Retrieval: `lost`, 0 to 1, the mean over items, then over lengths. Other sources: nats per token that carries
        loss, the mean over items, at the length where it is highest.
        """
        return means(self.by_item(plan))

    def by_item(self, plan: Plan) -> ItemLosses:
        """Loss of each item, as in `by_source`."""
        run: _Pass = _run
        if self._base is not None:
            if plan == self._base:
                run, self._kept = self._outputs.keep, True
            else:
                if not self._kept:
                    self.by_item(self._base)
                run = partial(self._outputs.resume, shared=_shared_layers(plan, self._base))
        found: ItemLosses = {}
        with apply(self._loaded.model, plan):
            for key, items in self._items.items.items():
                answers = zip(items, self._dense[key], self._log_probs(key, run), strict=True)
                loss = lost if key[1] == RETRIEVAL else _mean
                found[key] = np.array([loss(item, divergences(dense, other)) for item, dense, other in answers])
        return found

    def total(self, by_source: Mapping[str, float]) -> float:
        """The weighted sum; the sum of the weights when every head has that span."""
        return sum(self._weight(source) * loss for source, loss in by_source.items())

    def _weight(self, source: str) -> float:
        return self._weights[source] / max(self._unit[source], 1e-12)

    def error(self, losses: ItemLosses, others: ItemLosses) -> float:
        """Standard error of the difference in `total` between two plans, whose losses `by_item` returned.

        Where there is one item of a length and source, its part is not known and counts as none.
        """
        shares, other_shares = _shares(losses), _shares(others)
        parts = [
            self._weight(key[1]) * _error(shares[key] * found - other_shares[key] * others[key])
            for key, found in losses.items()
            if len(found) > 1
        ]
        return float(np.linalg.norm(parts))

    @torch.no_grad()
    def _log_probs(self, key: tuple[int, str], run: "_Pass") -> list[torch.Tensor]:
        """Log-probabilities of the tokens that carry loss, for each item: float32 [tokens, vocabulary]."""
        model, items = self._loaded.model, self._items.items[key]
        length = len(items[0].input_ids)
        rows = rows_together(model.device, length)
        result: list[torch.Tensor] = []
        for first in range(0, len(items), rows):
            together = items[first : first + rows]
            ids = torch.as_tensor(np.stack([item.input_ids for item in together]), device=model.device)
            places = np.unique(np.concatenate([item.loss for item in together]))
            positions = torch.as_tensor(places - 1, device=model.device)
            forward = partial(run, (key, first), run=partial(logits_at, model, ids, positions, use_cache=False))
            logits = forward() if self._compiled is None else self._compiled.run(forward)
            answers = zip(logits, together, strict=True)
            result += [row[np.searchsorted(places, item.loss)].float().log_softmax(-1) for row, item in answers]
        return result


def means(found: ItemLosses) -> dict[str, float]:
    """Loss for each source, as in `Divergence.by_source`."""
    result: dict[str, float] = defaultdict(float)
    for key, share in _shares(found).items():
        result[key[1]] += share * float(found[key].mean())
    return dict(result)


def _shares(found: ItemLosses) -> dict[tuple[int, str], float]:
    """What the items of each length count in the loss of their source; all lengths of a source together 1."""
    lengths: dict[str, list[int]] = defaultdict(list)
    for length, source in found:
        lengths[source].append(length)
    shares = {}
    for source, at in lengths.items():
        worst = max(at, key=lambda length: float(found[length, source].mean()))
        for length in at:
            shares[length, source] = 1 / len(at) if source == RETRIEVAL else float(length == worst)
    return shares


def _error(numbers: np.ndarray) -> float:
    """Standard error of their mean."""
    return float(numbers.std(ddof=1)) / len(numbers) ** 0.5


def lost(item: CalibrationItem, nats: np.ndarray) -> float:
    """Mean over an item's questions of ``1 - exp(-D)``, D the sum of ``nats`` (of each token of ``item.loss``).

    The first question counts one half, where there are others.
    """
    first, *later = (float(-np.expm1(-nats[tokens].sum())) for tokens in item.questions)
    return float(np.mean([first, np.mean(later)])) if later else first


def _mean(item: CalibrationItem, nats: np.ndarray) -> float:
    return float(nats.mean())


class _Pass(Protocol):
    """A forward pass under a name; see `LayerOutputs`."""

    def __call__(self, name: Hashable, /, *, run: Callable[[], torch.Tensor]) -> torch.Tensor: ...


def _run(name: Hashable, /, *, run: Callable[[], torch.Tensor]) -> torch.Tensor:
    return run()


def _shared_layers(plan: Plan, other: Plan) -> int:
    """How many layers of both have the same rules, from the first on."""
    if (plan.sink, plan.block) != (other.sink, other.block):
        return 0
    same = [
        (plan.alpha[layer], plan.beta[layer]) == (other.alpha[layer], other.beta[layer])
        for layer in range(plan.model.layers)
    ]
    return same.index(False) if False in same else len(same)
