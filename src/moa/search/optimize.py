"""From loss tables to plans: which elastic rule each KV head takes, for a density budget.

Every profile length is an objective of its own, so the answer is a set of plans of which none is better everywhere
(the paper's multi-objective program): solve each objective alone for the ranges of the others, cut the ranges in
points, and solve each objective again with the others held below every combination of their points.
"""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
from scipy.optimize import linprog

from moa.errors import InfeasibleBudgetError, InputError
from moa.progress import SILENT, Progress
from moa.search.assignment import Assignment, AssignmentProblem, assign
from moa.search.rules import OptimizeConfig, Rules, density_of, largest_total
from moa.search.tables import window_count

_SOLVE_SHARE = 0.8  # of the gap allowed to a plan: what its solve may leave, the rest is for breaking ties
_TIE_SHARE = 0.1  # of the gap allowed to a plan: what the other objectives weigh together in a solve
_GUESS_GAP = 0.05  # a guessed loss is not worth solving to more
_SLACK = 1 + 1e-9  # on limits of losses, so that the plan that set a limit meets it whatever the order of summing


@dataclass(frozen=True)
class ParetoPlan:
    """One plan of the answer.

    Attributes
    ----------
    alpha, beta : float64 [layers, kv_heads]
        The rule of each head (see `moa.plan.elastic_spans`).
    losses : dict[int, float]
        For each profile length, the sum of its heads' losses.
    densities : dict[int, float]
        For each constrained length, the mean over heads of span(N) / N.
    gap : float or None
        Certified: in the objective the plan was solved for, no plan within the same limits is better by more than
        this share of the loss. None: nothing is.
    """

    alpha: np.ndarray
    beta: np.ndarray
    losses: dict[int, float]
    densities: dict[int, float]
    gap: float | None

    @classmethod
    def of(
        cls, rules: Rules, choice: np.ndarray, tables: Mapping[int, np.ndarray], gap: float | None = None
    ) -> "ParetoPlan":
        """The plan of these numbers of rules, int64 [layers, heads]; ``tables`` as for `optimize`."""
        layer, head = np.ogrid[: choice.shape[0], : choice.shape[1]]
        return cls(
            alpha=rules.alpha[choice],
            beta=rules.beta[choice],
            losses={length: float(rules.losses(length, tables)[layer, head, choice].sum()) for length in tables},
            densities={
                length: density_of(spans[choice].sum(), choice.size, length) for length, spans in rules.spans.items()
            },
            gap=gap,
        )


def optimize(losses: Mapping[int, np.ndarray], config: OptimizeConfig, progress: Progress = SILENT) -> list[ParetoPlan]:
    """Plans within the density budget, none of which is worse than another at every profile length.

    Plans closer to each other than ``config.gap`` at every length count as one. At lengths that are constrained but
    not profiled the budget goes to the heads that lose most at the nearest profile length, as far as that takes
    nothing from the profile lengths. Deterministic.

    Parameters
    ----------
    losses : mapping from profile length N to float64 [layers, kv_heads, windows]
        Laid out as `moa.search.tables` says. A span that covers all of N has no loss; rules with shorter spans than
        the tables know of are not used.
    config : OptimizeConfig
    progress : Progress

    Returns
    -------
    list of ParetoPlan
        By rising loss at the shortest profile length; one plan if there is one profile length.

    Raises
    ------
    InfeasibleBudgetError
        If even the cheapest rules take more than the density; its ``nearest`` says what can be met.
    InputError
        If a table is missing, of the wrong shape, negative or not finite.
    """
    tables = _checked(losses)
    lengths = tuple(tables)
    rules = Rules.within(lengths, config).told_by(lengths)
    cost = np.stack([rules.losses(length, tables) for length in lengths])
    unprofiled = [rules.losses(length, tables) for length in rules.spans if length not in tables]
    search = _Search(cost, np.sum(unprofiled, axis=0) if unprofiled else None, rules, config)
    return [ParetoPlan.of(rules, found.choice, tables, found.gap) for found in search.run(progress)]


def _checked(losses: Mapping[int, np.ndarray]) -> dict[int, np.ndarray]:
    """The tables as float64, by rising length, or an `InputError`."""
    if not losses:
        raise InputError("no loss tables: profile at least one length before optimizing")
    tables = {length: np.asarray(losses[length], dtype=np.float64) for length in sorted(losses)}
    heads = next(iter(tables.values())).shape[:2]
    for length, table in tables.items():
        if length < 1:
            raise InputError(f"profile length {length} is not possible: give a token count of at least 1")
        windows = window_count(length)
        if table.ndim != 3 or table.size == 0 or table.shape != (*heads, windows):
            raise InputError(
                f"the loss table of length {length} has shape {table.shape}, expected (layers, KV heads, {windows}) "
                "with the same layers and heads at every length"
            )
        if not np.isfinite(table).all() or table.min() < 0:
            raise InputError(
                f"the loss table of length {length} holds values that are negative or not finite; profile again "
                "(float32 overflows where a model is run in float16)"
            )
    return tables


@dataclass(frozen=True)
class _Found:
    """A choice of rules [layers, heads], its loss at every profile length, and the gap certified for it."""

    choice: np.ndarray
    values: np.ndarray
    gap: float


class _Search:
    """The epsilon-constraint method over one set of rules.

    ``cost`` is float64 [objectives, layers, heads, rules], ``guess`` [layers, heads, rules] the guessed loss at the
    lengths that are constrained but not profiled, None if there are none.
    """

    def __init__(self, cost: np.ndarray, guess: np.ndarray | None, rules: Rules, config: OptimizeConfig):
        self.cost, self.guess, self.config = cost, guess, config
        self.objectives, layers, heads, _ = cost.shape
        limit = config.rules_per_layer
        self.rules_per_layer = None if limit is None or limit >= heads else limit
        self.spans = np.stack(list(rules.spans.values())).astype(np.float64)  # [lengths, rules]
        totals = [largest_total(config.density, layers * heads, length) for length in rules.spans]
        self.budgets = np.array(totals, dtype=np.float64)
        _refuse_tight_budget(rules.spans, self.budgets, config.density, layers * heads)
        self.lengths = np.array(list(rules.spans))
        self.within = np.flatnonzero((self.spans * layers * heads <= self.budgets[:, None]).all(axis=0))
        self.usage = np.broadcast_to(self.spans[:, None, None, :], (len(self.spans), *cost.shape[1:]))
        self.undominated = _undominated(cost, self.spans, self.rules_per_layer)
        self.found: list[_Found] = []

    def run(self, progress: Progress) -> list[_Found]:
        alone = progress.track(range(self.objectives), "Optimize, each length alone")
        bounds = np.array([self.solve_alone(objective) for objective in alone])
        if self.objectives > 1:
            self.solve_between(bounds, progress)
        return self.non_dominated()

    def solve_alone(self, objective: int) -> float:
        """Find the plan that is best at one length and, as far as that leaves a choice, good at the others.

        Returns the lower bound of the loss at that length.
        """
        weights = np.eye(self.objectives)[objective]
        unlimited = np.full(self.objectives, np.inf)
        best = self.assign(weights, unlimited)
        if best.choice is None:
            _refuse_joint_budget(self.spans, self.lengths, self.config.density)
        choice = best.choice
        if self.objectives > 1:
            # Rules that differ only at other lengths are equal so far; half of the gap is theirs to use.
            upper = unlimited.copy()
            upper[objective] = _SLACK * max(best.value, best.bound / (1 - self.config.gap / 2))
            scale = self.cost.max(axis=-1).sum(axis=(1, 2))
            others = np.where(weights > 0, 0.0, 1 / np.where(scale > 0, scale, 1.0))
            improved = self.assign(others, upper, choice).choice
            choice = choice if improved is None else improved
        self.keep(choice, objective, best.bound)
        return best.bound

    def solve_between(self, bounds: np.ndarray, progress: Progress) -> None:
        """Solve each objective with every combination of limits on the others, from loose to tight."""
        ends = np.stack([found.values for found in self.found])
        ideal, nadir = ends.min(axis=0), ends.max(axis=0)
        limits = np.linspace(nadir, ideal, self.config.points) * _SLACK
        targets = [
            (objective, np.insert(np.array(others), objective, np.inf))
            for objective in range(self.objectives)
            for others in itertools.product(*np.delete(limits, objective, axis=1).T)
        ]
        solved: list[tuple[int, np.ndarray, np.ndarray]] = [
            (objective, np.full(self.objectives, np.inf), found.values) for objective, found in enumerate(self.found)
        ]
        for objective, upper in progress.track(targets, "Optimize, all lengths together"):
            # A looser problem without an answer, or whose answer is within these limits, settles this one.
            if any(
                objective == other and (upper <= looser).all() and (values <= upper).all()
                for other, looser, values in solved
            ):
                continue
            # The other losses break ties, with weights too small to spoil what is certified.
            share = _TIE_SHARE * self.config.gap / (self.objectives - 1)
            weights = share * ideal[objective] / np.where(nadir > 0, nadir, 1.0)
            weights[objective] = 1.0
            others = np.arange(self.objectives) != objective
            within = [found for found in self.found if (found.values <= upper).all()]
            start = min(within, key=lambda found: float(weights @ found.values)).choice if within else None
            answer = self.assign(weights, upper, start)
            if answer.choice is None:
                solved.append((objective, upper, np.zeros(self.objectives)))
                continue
            bound = max(bounds[objective], answer.bound - weights[others] @ upper[others])
            solved.append((objective, upper, self.keep(answer.choice, objective, bound)))

    def assign(self, weights: np.ndarray, upper: np.ndarray, start: np.ndarray | None = None) -> Assignment:
        """Minimise the weighted losses within the budgets, every loss at most ``upper``; both [objectives]."""
        limited = np.isfinite(upper)
        counts = limited | (weights > 0)
        cost = np.tensordot(weights, self.cost, 1)
        if start is None and not limited.any() and len(self.within):
            best = self.within[cost[..., self.within].sum(axis=(0, 1)).argmin()]
            start = np.full(cost.shape[:2], best)
        problem = AssignmentProblem(
            cost=cost,
            usage=np.concatenate([self.usage, self.cost[limited]]),
            limits=np.concatenate([self.budgets, upper[limited]]),
            allowed=self.undominated
            if counts.all()
            else _undominated(self.cost[counts], self.spans, self.rules_per_layer),
            rules_per_layer=self.rules_per_layer,
        )
        return assign(problem, _SOLVE_SHARE * self.config.gap, start)

    def keep(self, choice: np.ndarray, objective: int, bound: float) -> np.ndarray:
        """Remember an answer; returns its losses [objectives]."""
        layer, head = np.ogrid[: choice.shape[0], : choice.shape[1]]
        if self.guess is not None:
            # The budgets of lengths that were not profiled are there to be used: of rules that lose no more at any
            # profile length, each head takes what is likely to lose least at the other lengths.
            no_worse = np.logical_and.reduce(self.cost <= self.cost[:, layer, head, choice][..., None], axis=0)
            problem = AssignmentProblem(self.guess, self.usage, self.budgets, no_worse, self.rules_per_layer)
            better = assign(problem, _GUESS_GAP, choice).choice
            choice = choice if better is None else better
        values = self.cost[:, layer, head, choice].sum(axis=(1, 2))
        value = float(values[objective])
        gap = max(0.0, value - float(bound)) / value if value > 0 else 0.0
        self.found.append(_Found(choice, values, gap))
        return values

    def non_dominated(self) -> list[_Found]:
        """The answers of which none is worse than another everywhere, without those that a neighbour stands for."""
        found = sorted(self.found, key=lambda answer: (*answer.values, answer.gap))
        values = np.stack([answer.values for answer in found])
        worse = [
            any((v <= own).all() and ((v < own).any() or i < index) for i, v in enumerate(values))
            for index, own in enumerate(values)
        ]
        front = np.flatnonzero(~np.array(worse))
        best = front[values[front].argmin(axis=0)]
        kept: list[int] = list(dict.fromkeys(best.tolist()))
        scale = np.where(values[best].max(axis=0) > 0, values[best].max(axis=0), 1.0)
        for index in sorted(front.tolist(), key=lambda i: float((values[i] / scale).sum())):
            if not any((values[i] <= (1 + self.config.gap) * values[index]).all() for i in kept):
                kept.append(index)
        return [found[index] for index in sorted(kept)]


def _undominated(cost: np.ndarray, spans: np.ndarray, rules_per_layer: int | None) -> np.ndarray:
    """Where no other rule is at most as costly at every length and loses at most as much in every objective.

    ``cost`` [objectives, layers, heads, rules], ``spans`` [lengths, rules], no two alike; returns bool [layers, heads,
    rules]. Where rules per layer are limited, the other rule must be as good for all heads of the layer.
    """
    keep = np.ones(cost.shape[1:], dtype=bool)
    for rule in range(spans.shape[1]):
        cheaper = np.flatnonzero((spans <= spans[:, [rule]]).all(axis=0) & (np.arange(spans.shape[1]) != rule))
        better = np.asarray((cost[..., cheaper] <= cost[..., [rule]]).all(axis=0))
        if rules_per_layer is not None:
            better = np.asarray(better.all(axis=1, keepdims=True))
        keep[..., rule] = ~np.logical_or.reduce(better, axis=-1)
    return keep


def _rounded_up(density: float) -> str:
    return f"{math.ceil(density * 1e4 - 1e-6) / 1e4:.4f}"


def _refuse_tight_budget(spans: Mapping[int, np.ndarray], budgets: np.ndarray, density: float, heads: int) -> None:
    """Raise if even the cheapest rule at some length is above its budget."""
    nearest = {length: density_of(int(row.min()) * heads, heads, length) for length, row in spans.items()}
    if any(row.min() * heads > budget for row, budget in zip(spans.values(), budgets, strict=True)):
        least = ", ".join(f"{value:.4f} at {length}" for length, value in nearest.items())
        raise InfeasibleBudgetError(
            f"density {density} cannot be met: the cheapest rules already take {least} tokens; ask for at least "
            f"{_rounded_up(max(nearest.values()))}, or use longer lengths",
            nearest,
        )


def _refuse_joint_budget(spans: np.ndarray, lengths: np.ndarray, density: float) -> NoReturn:
    """Raise because each budget can be met, but not all by one plan; mixes of rules say what could be."""
    densities = spans / lengths[:, None]
    count = densities.shape[1]
    mix = linprog(
        np.append(np.zeros(count), 1.0),
        A_ub=np.hstack([densities, -np.ones((len(lengths), 1))]),
        b_ub=np.zeros(len(lengths)),
        A_eq=np.append(np.ones(count), 0.0)[None],
        b_eq=[1.0],
        method="highs",
    )
    nearest = {int(length): float(mix.fun) for length in lengths}
    raise InfeasibleBudgetError(
        f"density {density} cannot be met at {', '.join(map(str, nearest))} tokens by one plan of this rule grid; ask "
        f"for at least {_rounded_up(mix.fun)}, or add rules that are short at all of these lengths",
        nearest,
    )
