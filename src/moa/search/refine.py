"""The refine stage: the last choices are made by measurement.

A loss table is of first order and knows one head at a time: it cannot see that two heads stand in for each other, or
that a head matters only while another one works. So the optimizer's plan is a start. A *sweep* tries, for each head
alone, a few rules beside its own, and measures what the model then loses. An exact program picks the best set of these
changes within the budget; since each was measured alone, ever fewer of them are made at once until the loss of the
whole, measured, falls.

A plan that is short of memory is a bad place to start from: where the answer is lost, one head more changes nothing. So
the start is a plan for a larger budget, and the first sweeps lead down to the one asked for.
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import scipy.sparse as sp
from scipy.optimize import Bounds, LinearConstraint, milp

from moa.files import read_json, write_json
from moa.models import LoadedModel
from moa.plan import Plan
from moa.progress import SILENT, Progress
from moa.search.calibrate import RETRIEVAL, CalibrationSet
from moa.search.divergence import Divergence
from moa.search.optimize import OptimizeConfig, RuleGrid, Rules, largest_total, optimize

_STAIRS = (
    0.7,
    0.85,
    1.0,
)  # budgets on the way down, as powers of the density: 25 % is reached from 38 % by way of 31 %
_STEP = 2  # a head tries the rules so many places cheaper and dearer than its own, the cheapest and the dearest
_TRIED = 4  # rules of a head in a sweep, at most
_SWEEPS = 3  # an allowance too small for so many sweeps over all heads sweeps over some of them
_LEAST_HEADS = 8
_LENGTHS = 2  # measured at so many of the profile lengths, the shortest: longer ones cost more than they tell
_TOKENS = {RETRIEVAL: 20480}  # measured on items of so many tokens for each length
_OTHER_TOKENS = 8192  # of sources with longer answers
_LEAST_GAIN = 1e-3  # of the loss; smaller gains end the search


@dataclass(frozen=True)
class Refined:
    """A plan, and how it was reached.

    Attributes
    ----------
    alpha, beta : float64 [layers, kv_heads]
    loss : float
        Weighted divergence from the dense model on the calibration items, measured.
    start : float
        That of the optimizer's best plan within the budget.
    evaluations : int
        Plans measured.
    """

    alpha: np.ndarray
    beta: np.ndarray
    loss: float
    start: float
    evaluations: int


def refine(
    loaded: LoadedModel,
    losses: Mapping[int, np.ndarray],
    items: CalibrationSet,
    weights: Mapping[str, float],
    config: OptimizeConfig,
    evaluations: int,
    progress: Progress = SILENT,
    partial: Path | None = None,
) -> Refined:
    """Improve a plan by measured exchanges of rules between heads.

    Parameters
    ----------
    loaded : LoadedModel
    losses : mapping from profile length N to float64 [layers, kv_heads, windows]
        As for `moa.search.optimize.optimize`, which gives the start.
    items : CalibrationSet
        What is measured on.
    weights : mapping of source to float
        As for `Divergence`.
    config : OptimizeConfig
        The budget, the rules, and how many of them a layer may have.
    evaluations : int
        Plans to measure. A sweep that uses up the last of them ends with what it has, and a few plans more.
    partial : Path, optional
        File of what was measured so far; an interrupted call goes on from it.

    Raises
    ------
    InfeasibleBudgetError, InputError
        As `optimize`.
    """
    return _Refinement(loaded, losses, items, weights, config, evaluations, progress, partial).run()


class _Refinement:
    """Plans are int64 [layers, heads], numbers of ``rules``."""

    def __init__(
        self,
        loaded: LoadedModel,
        losses: Mapping[int, np.ndarray],
        items: CalibrationSet,
        weights: Mapping[str, float],
        config: OptimizeConfig,
        evaluations: int,
        progress: Progress,
        partial: Path | None,
    ):
        self.loaded, self.losses, self.config, self.progress = loaded, losses, config, progress
        self.evaluations, self.partial = evaluations, partial
        self.divergence = Divergence(loaded, _some(items), weights)
        extra = (2 * max(losses),) if config.lengths_constrained is None else config.lengths_constrained
        lengths = sorted({*losses, *extra})
        grid = config.grid or RuleGrid.scaled(max(losses), config.sink, config.block)
        self.rules = Rules.of(grid, lengths, config)  # by rising cost
        self.spans = np.stack([self.rules.spans[length] for length in lengths])  # [lengths, rules]
        self.lengths = lengths
        plain = (self.rules.alpha == 0) | (self.rules.beta == 0) | (self.rules.beta > 1)
        self.plain = np.flatnonzero(plain)  # the rules that heads try
        self.shape = loaded.identity.layers, loaded.identity.kv_heads
        self.heads_a_sweep = min(math.prod(self.shape), max(_LEAST_HEADS, evaluations // (_SWEEPS * _TRIED)))
        self.random = np.random.default_rng(0)
        self.known: dict[str, float] = {} if partial is None or not partial.is_file() else read_json(partial)
        self.measured: set[str] = set()

    def run(self) -> Refined:
        start = plan = min(self.starts(self.config.density), key=self.loss)
        if self.heads_a_sweep == math.prod(self.shape):  # else too few heads change to come down with
            above = min(self.starts(self.config.density ** _STAIRS[0]), key=self.loss)
            for power in _STAIRS[1:]:
                above = self.sweep(above, self.config.density**power)
            if self.fits(above, self.config.density):
                plan = min(plan, above, key=self.loss)
        vain = 0  # sweeps in a row
        while not self.finished and vain * self.heads_a_sweep < math.prod(self.shape):
            before = self.loss(plan)
            plan = self.sweep(plan, self.config.density)
            vain = 0 if self.loss(plan) < (1 - _LEAST_GAIN) * before else vain + 1
        alpha, beta = self.rules.alpha[plan], self.rules.beta[plan]
        return Refined(alpha, beta, self.loss(plan), self.loss(start), len(self.measured))

    @property
    def finished(self) -> bool:
        return len(self.measured) >= self.evaluations

    def starts(self, density: float) -> list[np.ndarray]:
        """The optimizer's plans."""
        found = optimize(self.losses, replace(self.config, density=density), self.progress)
        number = {rule: index for index, rule in enumerate(zip(self.rules.alpha, self.rules.beta, strict=True))}
        return [
            np.array([number[rule] for rule in zip(plan.alpha.flat, plan.beta.flat, strict=True)]).reshape(self.shape)
            for plan in found
        ]

    def loss(self, plan: np.ndarray) -> float:
        """Measured, once."""
        rules = Plan.from_arrays(self.loaded.identity, self.rules.alpha[plan], self.rules.beta[plan])
        key = hashlib.sha256(repr((rules.alpha, rules.beta)).encode()).hexdigest()[:16]
        if key not in self.known:
            self.known[key] = self.divergence.total(self.divergence.by_source(rules))
        self.measured.add(key)
        return self.known[key]

    def fits(self, plan: np.ndarray, density: float) -> bool:
        return bool((self.spans[:, plan].sum((1, 2)) <= self.limits(density)).all())

    def limits(self, density: float) -> np.ndarray:
        """Tokens that all heads may store together at each length."""
        return np.array([largest_total(density, math.prod(self.shape), length) for length in self.lengths])

    def sweep(self, plan: np.ndarray, density: float) -> np.ndarray:
        """The best plan found within the density; the plan itself, if none is better or none is within."""
        everything = self.random.permutation(math.prod(self.shape))[: self.heads_a_sweep]
        trials = [(int(head), rule) for head in sorted(everything) for rule in self.tried(plan.flat[head])]
        before = self.loss(plan)
        change: dict[tuple[int, int], float] = {}
        for head, rule in self.progress.track(trials, f"refine, density {density:.3f}"):
            if self.finished:
                break
            trial = plan.copy()
            trial.flat[head] = rule
            change[head, rule] = self.loss(trial) - before
        found, most = [plan] if self.fits(plan, density) else [], plan.size
        while most >= 1:
            proposal = self.exchange(plan, change, density, most)
            if proposal is None:
                break
            found.append(proposal)
            if self.loss(proposal) < before and len(found) > 1 and self.loss(proposal) > self.loss(found[-2]):
                break  # fewer changes were worse: it only gets closer to where we are
            most = min(most, int((proposal != plan).sum())) // 2
        best = min(found, key=self.loss, default=plan)
        if self.partial is not None:
            write_json(self.partial, self.known)
        self.progress.say(f"refine: loss {before:.4f} -> {self.loss(best):.4f} at density {density:.3f}")
        return best

    def tried(self, own: int) -> list[int]:
        """What a head tries instead of its own rule."""
        cheaper, dearer = self.plain[self.plain < own], self.plain[self.plain > own]
        near = [*cheaper[-_STEP:][:1], *cheaper[:1], *dearer[:_STEP][-1:], *dearer[-1:]]
        return sorted({int(rule) for rule in near})

    def exchange(
        self, plan: np.ndarray, change: Mapping[tuple[int, int], float], density: float, most: int
    ) -> np.ndarray | None:
        """The changes with the least sum, of at most so many heads, that are within the density; None if none are."""
        own = [(head, int(rule)) for head, rule in enumerate(plan.flat)]
        choices = sorted({*own, *change})
        heads, rules = np.array(choices).T
        count, limits = len(choices), self.limits(density)
        # A layer's rules get variables of their own behind those of the choices, to be counted.
        layers, pairs = heads // self.shape[1], np.zeros((0, 2), np.int64)
        if self.config.rules_per_layer is not None:
            pairs, pair_of = np.unique(np.stack([layers, rules], 1), axis=0, return_inverse=True)
        rows = [
            LinearConstraint(_matrix(heads, np.arange(count), (plan.size, count + len(pairs))), 1, 1),
            LinearConstraint(_padded(self.spans[:, rules] / limits[:, None], len(pairs)), -np.inf, 1),
            LinearConstraint(_padded(np.array([[choice in change for choice in choices]], float), len(pairs)), 0, most),
        ]
        if len(pairs):
            each = np.arange(count)
            chosen = _matrix(each, each, (count, count + len(pairs)))
            counted = _matrix(each, count + pair_of.reshape(-1), (count, count + len(pairs)))
            by_layer = _matrix(pairs[:, 0], count + np.arange(len(pairs)), (self.shape[0], count + len(pairs)))
            rows += [
                LinearConstraint(chosen - counted, -np.inf, 0),
                LinearConstraint(by_layer, 0, self.config.rules_per_layer),
            ]
        cost = np.array([change.get(choice, 0.0) for choice in choices] + [0.0] * len(pairs))
        answer = milp(
            cost / (np.abs(cost).max() or 1.0), constraints=rows, integrality=cost * 0 + 1, bounds=Bounds(0, 1)
        )
        if answer.x is None:
            return None
        result = plan.copy()
        for taken in np.flatnonzero(answer.x[:count] > 0.5):
            result.flat[heads[taken]] = rules[taken]
        return result if self.fits(result, density) else None


def _matrix(rows: np.ndarray, columns: np.ndarray, shape: tuple[int, int]) -> sp.csr_array:
    """Ones at these places."""
    return sp.csr_array((np.ones(len(rows)), (rows, columns)), shape=shape)


def _padded(matrix: np.ndarray, columns: int) -> np.ndarray:
    return np.pad(matrix, ((0, 0), (0, columns)))


def _some(items: CalibrationSet) -> CalibrationSet:
    """The items that are measured on."""
    lengths = sorted({length for length, _ in items.items})[:_LENGTHS]
    return CalibrationSet(
        {
            (length, source): members[: max(1, _TOKENS.get(source, _OTHER_TOKENS) // length)]
            for (length, source), members in items.items.items()
            if length in lengths
        }
    )
