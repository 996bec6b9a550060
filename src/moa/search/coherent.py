"""Plans for items that lose as a whole: where many heads miss the same key, they are not many small losses.

The optimizer adds up what heads lose one by one, mean over items, so to it a window over half of the text costs a head
half as much as none. But a fact in the first half is then lost by all such heads together. Here each item's loss is the
square of the sum over its heads of what they lose on it, so that losses which meet on one item count more than the same
losses on different items. It is no longer a sum over heads, so no program solves it; exchanges do.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

import numpy as np

from moa.errors import InfeasibleBudgetError
from moa.plan import ElasticRule
from moa.progress import SILENT, Progress
from moa.search.exchange import Budget, exchange
from moa.search.optimize import ParetoPlan, optimize
from moa.search.profile import mean_losses
from moa.search.rules import OptimizeConfig, RuleGrid, Rules

_SWEEPS = 40
_LEAST_GAIN = 1e-3  # of the loss


class CoherentLoss:
    """What plans lose, by the loss tables of single items.

    Parameters
    ----------
    items : mapping from profile length N to mapping from source to float64 [items, layers, kv_heads, windows]
        As from `moa.search.profile.item_losses`.
    weights : mapping of source to float
        What each source counts, in units of what it loses when every head has the shortest span.
    rules : Rules
    """

    def __init__(
        self,
        items: Mapping[int, Mapping[str, np.ndarray]],
        weights: Mapping[str, float],
        rules: Rules,
    ):
        self._parts: list[tuple[float, np.ndarray]] = []  # weight, effect [items, layers, heads, rules]
        for length in rules.spans:
            nearest = min(items, key=lambda other: abs(np.log(other / length)))
            for source, tables in items[nearest].items():
                effects = rules.losses(length, {nearest: tables})
                unit = np.square(effects.max(-1).sum((1, 2))).mean()
                # at lengths that one window covers nothing can be lost
                self._parts.append((weights[source] / unit if unit > 0 else 0.0, effects))

    def __call__(self, plan: np.ndarray) -> float:
        """Loss of a plan, an int64 array [layers, heads] of numbers of rules."""
        return sum(weight * float(np.square(_total(effects, plan)).mean()) for weight, effects in self._parts)

    def change(self, plan: np.ndarray) -> np.ndarray:
        """What the loss changes by when one head takes a rule: float64 [layers, heads, rules]."""
        result = np.zeros(self._parts[0][1].shape[1:])
        for weight, effects in self._parts:
            step = effects - _own(effects, plan)[..., None]
            totals = _total(effects, plan)[:, None, None, None]
            result += weight * (step * (step + 2 * totals)).mean(0)
        return result


def _own(effects: np.ndarray, plan: np.ndarray) -> np.ndarray:
    layer, head = np.ogrid[: plan.shape[0], : plan.shape[1]]
    return effects[:, layer, head, plan]


def _total(effects: np.ndarray, plan: np.ndarray) -> np.ndarray:
    return _own(effects, plan).sum((1, 2))


def candidates(
    items: Mapping[int, Mapping[str, np.ndarray]],
    weights: Mapping[str, float],
    config: OptimizeConfig,
    progress: Progress = SILENT,
) -> list[ParetoPlan]:
    """The optimizer's plans, the best of one share of N for each head and for each layer, and last the one of the least
    `CoherentLoss` that exchanges lead to, from all these and from the best plan of the cheapest and the dearest rule.

    By their tables the plans of shares are no better; but tables are of first order, and when plans run, simple rules
    have at times kept more.

    Parameters
    ----------
    items, weights
        As for `CoherentLoss`.
    config : OptimizeConfig
    progress : Progress
    """
    losses = mean_losses(items)
    found = optimize(losses, config, progress)
    for limit in dict.fromkeys((config.rules_per_layer, 1)):
        with suppress(InfeasibleBudgetError):
            found += optimize(
                losses, replace(config, grid=RuleGrid.proportional(), rules_per_layer=limit, points=1), progress
            )
    rules = Rules.within(items, config).told_by(items)
    ends = RuleGrid(tuple(ElasticRule(rules.alpha[end], rules.beta[end]) for end in (0, -1)))
    starts = list(found)
    with suppress(InfeasibleBudgetError):  # the rule that is cheapest on the whole need not be so at every length
        starts += optimize(losses, replace(config, grid=ends, points=1))
    numbers = [rules.numbers(start.alpha, start.beta) for start in starts]
    best = improve(numbers, CoherentLoss(items, weights, rules), Budget(rules, config), progress)
    return [*found, ParetoPlan.of(rules, best, losses)]


def improve(
    starts: Sequence[np.ndarray], loss: CoherentLoss, budget: Budget, progress: Progress = SILENT
) -> np.ndarray:
    """The best plan that exchanges of rules between heads lead to, from any of the starts.

    Parameters
    ----------
    starts : sequence of int64 [layers, heads]
        Plans within the budget.
    """
    found = []
    for start in progress.track(starts, "Optimize, items as a whole"):
        plan, value, most = start, loss(start), start.size
        for _ in range(_SWEEPS):
            change = loss.change(plan)
            proposal = None
            while most >= 1:
                proposal = exchange(plan, change, budget, most)
                if proposal is not None and loss(proposal) < (1 - _LEAST_GAIN) * value:
                    break
                most //= 2
            if proposal is None or most < 1:
                break
            plan, value = proposal, loss(proposal)
            most = min(plan.size, 2 * most)
        found.append((value, plan))
    return min(found, key=lambda pair: pair[0])[1]
