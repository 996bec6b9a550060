"""How far a plan takes a model from its dense self: measured, on the dense model's own answers.

Summaries and texts count by the token. A question about a fact has one answer, found or lost, however many tokens it
takes to say: once the first is said the others are mere copying, and their mean would hide that the first was wrong.
So a question costs ``1 - exp(-D)``, D the divergence over its whole answer: where the dense model is sure, that is the
chance that the answer is another one. It also keeps a few questions that are lost for good from outweighing all those
that may still be saved.

Every question about a text is asked first. In a conversation the later ones would have an answer before them that shows
how the text says such things, and be easier to answer.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Protocol

import numpy as np
import torch

from moa.cache import SpanCache
from moa.evaluation.likelihood import divergences, logits_at
from moa.models import LoadedModel
from moa.plan import Plan
from moa.runtime import apply
from moa.search.answers import rows_together
from moa.search.items import CalibrationItem, CalibrationSet
from moa.search.layer_outputs import LayerOutputs
from moa.search.tables import SHORTEST

MEASURE = "lost-answers-asked-alone"  # part of the keys of results: what was measured in another way is not that
_CACHE_BYTES = 4 << 30  # of questions that are asked together, if nothing of their texts were left out


# of every item, float64 [items], by length and source
Losses = dict[tuple[int, str], np.ndarray]


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
        self._loaded, self._items = loaded, items
        self._base: Plan | None = None
        self._kept = False  # whether the base has run
        tokens = sum(_tokens(item) for members in items.items.values() for item in members)
        self._outputs = LayerOutputs(loaded.model, tokens)
        identity = loaded.identity
        dense = Plan.dense(identity)
        with apply(loaded.model, dense):
            self._dense = {key: self._log_probs(key, dense, _run) for key in items.items}
        shortest = np.full((identity.layers, identity.kv_heads), float(SHORTEST))
        unit = by_source(self.losses(Plan.from_arrays(identity, shortest, 0 * shortest)))
        self._worth = {source: weights[source] / max(loss, 1e-12) for source, loss in unit.items()}

    def around(self, plan: Plan) -> None:
        """Say that the plans to come are like this one in most heads: what they have in common is computed once."""
        if plan != self._base:
            self.forget()
            self._base = plan

    def forget(self) -> None:
        """Give the memory back that `around` took."""
        self._base, self._kept = None, False
        self._outputs.forget()

    def losses(self, plan: Plan) -> Losses:
        """Loss of every item.

        Questions: `lost`, 0 to 1. Other sources: nats per token that carries loss.
        """
        run: _Pass = _run
        if self._base is not None:
            if plan == self._base:
                run, self._kept = self._outputs.keep, True
            else:
                if not self._kept:
                    self.losses(self._base)
                run = partial(self._outputs.resume, shared=_shared_layers(plan, self._base))
        found: Losses = {}
        with apply(self._loaded.model, plan):
            for key, items in self._items.items.items():
                answers = zip(items, self._dense[key], self._log_probs(key, plan, run), strict=True)
                loss = lost if items[0].questions else _mean
                found[key] = np.array([loss(item, divergences(dense, other)) for item, dense, other in answers])
        return found

    def total(self, by_source: Mapping[str, float]) -> float:
        """The weighted sum; the sum of the weights when every head has the shortest span."""
        return sum(self._worth[source] * loss for source, loss in by_source.items())

    def error(self, losses: Losses, others: Losses) -> float:
        """Standard error of the difference of two plans' totals: both are measured on the same items, drawn by chance.

        Of a length and source with one item nothing is known; it counts as if it were sure.
        """
        lengths = Counter(source for _, source in losses)
        variances = [
            (self._worth[source] / lengths[source]) ** 2 * (others[length, source] - items).var(ddof=1) / len(items)
            for (length, source), items in losses.items()
            if len(items) > 1
        ]
        return float(np.sqrt(sum(variances)))

    @torch.no_grad()
    def _log_probs(self, key: tuple[int, str], plan: Plan, run: "_Pass") -> list[torch.Tensor]:
        """Log-probabilities of the tokens that carry loss, for each item: float32 [tokens, vocabulary].

        Under ``plan``, which is in force.
        """
        items = self._items.items[key]
        rows = rows_together(self._loaded.model.device, key[0])
        if items[0].questions:
            rows = min(rows, self._rows_cached(key[0]))
        result: list[torch.Tensor] = []
        for first in range(0, len(items), rows):
            together = items[first : first + rows]
            if together[0].questions:
                result += self._asked((key, first), key[0], together, plan, run)
            else:
                result += self._read((key, first), together, run)
        return result

    def _read(self, name: Hashable, items: Sequence[CalibrationItem], run: "_Pass") -> list[torch.Tensor]:
        """As `_log_probs`, of whole sequences."""
        model = self._loaded.model
        ids = torch.as_tensor(np.stack([item.input_ids for item in items]), device=model.device)
        start = min(int(item.loss[0]) for item in items)
        positions = torch.arange(start - 1, ids.shape[1] - 1, device=model.device)
        logits = run(name, run=partial(logits_at, model, ids, positions, use_cache=False))
        return [row[item.loss - start].float().log_softmax(-1) for row, item in zip(logits, items, strict=True)]

    def _asked(
        self, name: Hashable, length: int, items: Sequence[CalibrationItem], plan: Plan, run: "_Pass"
    ) -> list[torch.Tensor]:
        """As `_log_probs`, of questions: a text is read once, and each question goes on from there by itself."""
        model = self._loaded.model
        texts = torch.as_tensor(np.stack([item.text for item in items]), device=model.device)
        asked = [(row, question) for row, item in enumerate(items) for question in item.questions]
        longest = max(len(question.input_ids) for _, question in asked)
        ids = np.zeros((len(asked), longest), np.int64)  # what follows a question changes nothing for it
        for place, (_, question) in zip(ids, asked, strict=True):
            place[: len(question.input_ids)] = question.input_ids
        start = min(int(question.loss[0]) for _, question in asked)
        positions = torch.arange(start - 1, longest - 1, device=model.device)
        places = texts.shape[1] + torch.arange(longest, device=model.device)[None]
        together = self._rows_cached(length)

        def ask() -> torch.Tensor:
            cache = SpanCache(plan, length)
            logits_at(model, texts, positions[:1], past_key_values=cache, use_cache=True)
            logits = []
            for first in range(0, len(asked), together):
                batch = torch.as_tensor(ids[first : first + together], device=model.device)
                fork = cache.selected(np.array([row for row, _ in asked[first : first + together]]))
                options = {"past_key_values": fork, "position_ids": places.expand(len(batch), -1), "use_cache": True}
                logits.append(logits_at(model, batch, positions, **options))
            return torch.cat(logits)

        logits = run(name, run=ask)
        answers = iter([answer[question.loss - start] for answer, (_, question) in zip(logits, asked, strict=True)])
        each = (torch.cat(list(islice(answers, len(item.questions)))) for item in items)
        return [answer.float().log_softmax(-1) for answer in each]

    def _rows_cached(self, length: int) -> int:
        """How many sequences of so many tokens may be in a cache at once."""
        model = self._loaded.identity
        token = 2 * model.layers * model.kv_heads * model.head_dim * self._loaded.model.dtype.itemsize
        return max(1, _CACHE_BYTES // (length * token))


def by_source(losses: Losses) -> dict[str, float]:
    """Loss for each source: the mean over items, then over lengths."""
    found: dict[str, list[float]] = {}
    for (_, source), items in losses.items():
        found.setdefault(source, []).append(float(items.mean()))
    return {source: float(np.mean(means)) for source, means in found.items()}


def lost(item: CalibrationItem, nats: np.ndarray) -> float:
    """Mean over an item's questions of ``1 - exp(-D)``, D the sum of ``nats`` of its tokens that carry loss."""
    ends = np.cumsum([len(question.loss) for question in item.questions])
    return float(np.mean([-np.expm1(-answer.sum()) for answer in np.split(nats, ends[:-1])]))


def _tokens(item: CalibrationItem) -> int:
    """That are read to measure an item, about."""
    if not item.questions:
        return len(item.input_ids)
    return len(item.text) + sum(len(question.input_ids) for question in item.questions)


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
