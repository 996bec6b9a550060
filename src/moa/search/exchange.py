"""Steps of a local search over plans: the best set of changes, if each is worth what it is worth alone."""

from dataclasses import dataclass

import numpy as np

from moa.search.assignment import AssignmentProblem, assign
from moa.search.rules import OptimizeConfig, Rules, largest_total

_GAP = 0.002  # relative, of a step's program
_LEAST = 1 / 8  # of what heads store on average


@dataclass(frozen=True)
class Budget:
    """What plans may store. A plan is an int64 array [layers, heads] of numbers of rules.

    Attributes
    ----------
    rules : Rules
    config : OptimizeConfig
        Its density holds at every length of ``rules``.
    """

    rules: Rules
    config: OptimizeConfig

    @property
    def spans(self) -> np.ndarray:
        """int64 [lengths, rules]."""
        return np.stack(list(self.rules.spans.values()))

    @property
    def worth_measuring(self) -> np.ndarray:
        """Which rules heads are given by measuring: bool [rules].

        Not those with less than an eighth, at the shortest length, of what a head stores on average. Down from there a
        head saves little, and what a few items say that it loses is less than the truth. Where a grid has none between
        that and all of the text, all of them.
        """
        length = min(self.rules.spans)
        spans = self.rules.spans[length]
        enough = spans >= _LEAST * self.config.density * length
        return enough if (spans[enough] < length).any() else np.ones_like(enough)

    def limits(self, heads: int) -> np.ndarray:
        """Tokens that so many heads may store together: [lengths]."""
        return np.array([largest_total(self.config.density, heads, length) for length in self.rules.spans])

    def fits(self, plan: np.ndarray) -> bool:
        """Whether a plan is within the density at all lengths, and has no more rules in a layer than it may."""
        most = self.config.rules_per_layer or plan.shape[1]
        few = all(len(np.unique(layer)) <= most for layer in plan)
        return few and bool((self.spans[:, plan].sum((1, 2)) <= self.limits(plan.size)).all())


def exchange(plan: np.ndarray, change: np.ndarray, budget: Budget, most: int) -> np.ndarray | None:
    """The plan within the budget with the least sum of changes, of at most so many heads; None if there is none.

    Parameters
    ----------
    plan : int64 [layers, heads]
        Need not be within the budget itself.
    change : float64 [layers, heads, rules]
        What the loss changes by when one head takes a rule; infinite where it must not. 0 at the plan's own rules.
    budget : Budget
    most : int
    """
    layer, head = np.ogrid[: plan.shape[0], : plan.shape[1]]
    allowed = np.isfinite(change)
    cost = np.where(allowed, change, 0.0)
    cost = np.where(allowed, cost - np.where(allowed, change, np.inf).min(-1, keepdims=True), 0.0)  # not negative
    changed = np.ones(change.shape)
    changed[layer, head, plan] = 0.0
    spans = np.broadcast_to(budget.spans[:, None, None, :].astype(float), (len(budget.spans), *change.shape))
    found = assign(
        AssignmentProblem(
            cost=cost,
            usage=np.concatenate([spans, changed[None]]),
            limits=np.append(budget.limits(plan.size), most).astype(float),
            allowed=allowed,
            rules_per_layer=budget.config.rules_per_layer,
        ),
        _GAP,
        plan if budget.fits(plan) else None,
    ).choice
    return found if found is not None and budget.fits(found) else None
