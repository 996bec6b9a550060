"""The validate stage: of several plans, one that is close to the dense model on held-out items.

Every plan runs for real, also at a length that was not profiled. Held-out items are few: that one plan loses less there
than another may be chance, and the standard error of the difference says how easily. So of all plans that lose no more
than the best one, but for two such errors, the plan is taken that lost least where refine measured.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from moa.models import LoadedModel
from moa.plan import Plan
from moa.progress import SILENT, Progress
from moa.search.divergence import Divergence, means
from moa.search.items import CalibrationSet

RULE = "least-measured-within-two-errors"  # part of the keys of results, as `moa.search.divergence.MEASURE`

# So many standard errors of a difference may be chance: one would be few even if the items were independent.
_ERRORS = 2


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
    error : float
        Standard error of the difference to the row with the lowest loss, as if all items were independent; they share
        text and kinds of questions, so the true one is larger.
    """

    plan: int
    loss: float
    by_source: dict[str, float]
    error: float


def validate(
    loaded: LoadedModel,
    plans: Sequence[Plan],
    items: CalibrationSet,
    weights: Mapping[str, float],
    progress: Progress = SILENT,
) -> list[ValidationRow]:
    """What every plan loses on held-out items; ``weights`` as for `Divergence`."""
    divergence = Divergence(loaded, items, weights)
    losses = [divergence.by_item(plan) for plan in progress.track(plans, "validate")]
    sources = [means(found) for found in losses]
    rows = [ValidationRow(plan, divergence.total(found), found, 0.0) for plan, found in enumerate(sources)]
    lowest = losses[lowest_of(rows).plan]
    return [replace(row, error=divergence.error(losses[row.plan], lowest)) for row in rows]


def best(rows: Sequence[ValidationRow], measured: Sequence[float]) -> ValidationRow:
    """Of the rows whose loss is the lowest, or above it by no more than two errors, the one that was best before.

    Parameters
    ----------
    rows : sequence of ValidationRow
    measured : sequence of float
        What refine measured that each plan loses; all the same where it measured nothing. Of equals the one with the
        lowest loss is taken.
    """
    lowest = lowest_of(rows)
    near = [lowest, *(row for row in rows if row.loss - _ERRORS * row.error <= lowest.loss)]
    return min(near, key=lambda row: (measured[row.plan], row.loss))


def lowest_of(rows: Sequence[ValidationRow]) -> ValidationRow:
    """The row with the lowest loss; one that is not a number is no low one."""
    return min(rows, key=lambda row: (np.isnan(row.loss), row.loss))
