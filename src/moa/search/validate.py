"""The validate stage: of the Pareto plans, the one that answers best at a length that was not profiled.

Every plan runs for real on held-out items; its loss is the cross-entropy of the dense model's own answers, averaged
over items of a source, then over sources.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (PyTorch's own convention)

from moa.models import LoadedModel
from moa.plan import Plan
from moa.progress import SILENT, Progress
from moa.runtime import apply
from moa.search.calibrate import CalibrationItem, CalibrationSet


@dataclass(frozen=True)
class ValidationRow:
    """What one plan scored.

    Attributes
    ----------
    plan : int
        Index of the plan; -1 is the dense model.
    loss : float
        Mean over sources, nats per answer token.
    by_source : dict[str, float]
    """

    plan: int
    loss: float
    by_source: dict[str, float]


def validate(
    loaded: LoadedModel, plans: Sequence[Plan], items: CalibrationSet, progress: Progress = SILENT
) -> list[ValidationRow]:
    """Loss of the dense model and of every plan on held-out items; the first row is the dense model."""
    rows = []
    for index in progress.track(range(-1, len(plans)), "validate"):
        if index < 0:
            losses = _losses(loaded, items)
        else:
            with apply(loaded.model, plans[index]):
                losses = _losses(loaded, items)
        rows.append(ValidationRow(index, float(np.mean(list(losses.values()))), losses))
    return rows


def best(rows: Sequence[ValidationRow]) -> ValidationRow:
    """The plan with the lowest loss; the first of equals."""
    return min((row for row in rows if row.plan >= 0), key=lambda row: row.loss)


def answer_loss(loaded: LoadedModel, item: CalibrationItem) -> float:
    """Mean cross-entropy of an item's answer tokens, in nats, under whatever plan is in force."""
    ids = torch.from_numpy(item.input_ids)[None].to(loaded.model.device)
    answer = ids.shape[1] - item.answer_start
    with torch.no_grad():
        logits = loaded.model(ids, use_cache=False, logits_to_keep=answer + 1).logits
    return float(F.cross_entropy(logits[0, :-1].float(), ids[0, item.answer_start :]))


def _losses(loaded: LoadedModel, items: CalibrationSet) -> dict[str, float]:
    by_source: dict[str, list[float]] = {}
    for (_, source), members in items.items.items():
        by_source.setdefault(source, []).extend(answer_loss(loaded, item) for item in members)
    return {source: float(np.mean(losses)) for source, losses in by_source.items()}
