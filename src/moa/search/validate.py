"""The validate stage: of several plans, the one closest to the dense model at a length that was not profiled.

Every plan runs for real on held-out items.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moa.models import LoadedModel
from moa.plan import Plan
from moa.progress import SILENT, Progress
from moa.search.divergence import Divergence
from moa.search.items import CalibrationSet


@dataclass(frozen=True)
class ValidationRow:
    """What one plan scored.

    Attributes
    ----------
    plan : int
        Index of the plan.
    loss : float
        What it loses of the dense model, weighted; see `Divergence.total`.
    by_source : dict[str, float]
        As `Divergence.by_source`.
    """

    plan: int
    loss: float
    by_source: dict[str, float]


def validate(
    loaded: LoadedModel,
    plans: Sequence[Plan],
    items: CalibrationSet,
    weights: Mapping[str, float],
    progress: Progress = SILENT,
) -> list[ValidationRow]:
    """What every plan loses on held-out items; ``weights`` as for `Divergence`."""
    divergence = Divergence(loaded, items, weights)
    rows = []
    for index, plan in enumerate(progress.track(plans, "validate")):
        losses = divergence.by_source(plan)
        rows.append(ValidationRow(index, divergence.total(losses), losses))
    return rows


def best(rows: Sequence[ValidationRow]) -> ValidationRow:
    """The plan with the lowest loss; the first of equals."""
    return min(rows, key=lambda row: row.loss)
