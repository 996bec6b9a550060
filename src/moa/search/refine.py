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
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from moa.files import read_json, write_json
from moa.models import LoadedModel
from moa.plan import Plan
from moa.progress import SILENT, Progress
from moa.search.calibrate import RETRIEVAL, CalibrationSet
from moa.search.divergence import Divergence
from moa.search.exchange import Budget, exchange
from moa.search.optimize import OptimizeConfig, ParetoPlan, Rules

_STAIRS = (
    0.7,
    0.85,
    1.0,
)  # budgets on the way down, as powers of the density: 25 % is reached from 38 % by way of 31 %
_STEP = 2  # a head tries the rules so many places cheaper and dearer than its own, the cheapest and the dearest
_TRIED = 4  # rules of a head in a sweep, at most
_SWEEPS = 3  # an allowance too small for so many sweeps over all heads sweeps over some of them
_LEAST_HEADS = 8
_TOKENS = {RETRIEVAL: 16384}  # measured on items of so many tokens for each length
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
    candidates: Callable[[OptimizeConfig], Sequence[ParetoPlan]],
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
    candidates : callable
        Plans to start from, for a budget.
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
    lengths = {length for length, _ in items.items}
    return _Refinement(loaded, candidates, lengths, _some(items), weights, config, evaluations, progress, partial).run()


class _Refinement:
    """Plans are int64 [layers, heads], numbers of ``rules``."""

    def __init__(
        self,
        loaded: LoadedModel,
        candidates: Callable[[OptimizeConfig], Sequence[ParetoPlan]],
        lengths: Iterable[int],
        items: CalibrationSet,
        weights: Mapping[str, float],
        config: OptimizeConfig,
        evaluations: int,
        progress: Progress,
        partial: Path | None,
    ):
        self.loaded, self.candidates, self.config, self.progress = loaded, candidates, config, progress
        self.evaluations, self.partial = evaluations, partial
        self.divergence = Divergence(loaded, items, weights)
        self.rules = Rules.within(lengths, config)  # by rising cost
        plain = (self.rules.alpha == 0) | (self.rules.beta == 0) | (self.rules.beta > 1)
        self.plain = np.flatnonzero(plain)  # the rules that heads try
        self.heads = loaded.identity.layers * loaded.identity.kv_heads
        self.heads_a_sweep = min(self.heads, max(_LEAST_HEADS, evaluations // (_SWEEPS * _TRIED)))
        self.random = np.random.default_rng(0)
        self.known: dict[str, float] = {} if partial is None or not partial.is_file() else read_json(partial)
        self.measured: set[str] = set()

    def run(self) -> Refined:
        budget = self.budget(1.0)
        start = plan = min(self.starts(budget), key=self.loss)
        if self.heads_a_sweep == self.heads:  # else too few heads change to come down with
            above = min(self.starts(self.budget(_STAIRS[0])), key=self.loss)
            for power in _STAIRS[1:]:
                above = self.sweep(above, self.budget(power))
            if budget.fits(above):
                plan = min(plan, above, key=self.loss)
        vain = 0  # sweeps in a row
        while not self.finished and vain * self.heads_a_sweep < self.heads:
            before = self.loss(plan)
            plan = self.sweep(plan, budget)
            vain = 0 if self.loss(plan) < (1 - _LEAST_GAIN) * before else vain + 1
        alpha, beta = self.rules.alpha[plan], self.rules.beta[plan]
        return Refined(alpha, beta, self.loss(plan), self.loss(start), len(self.measured))

    @property
    def finished(self) -> bool:
        return len(self.measured) >= self.evaluations

    def budget(self, power: float) -> Budget:
        return Budget(self.rules, replace(self.config, density=self.config.density**power))

    def starts(self, budget: Budget) -> list[np.ndarray]:
        found = self.candidates(replace(budget.config, points=1))
        return [self.rules.numbers(plan.alpha, plan.beta) for plan in found]

    def loss(self, plan: np.ndarray) -> float:
        """Measured, once."""
        rules = Plan.from_arrays(self.loaded.identity, self.rules.alpha[plan], self.rules.beta[plan])
        key = hashlib.sha256(repr((rules.alpha, rules.beta)).encode()).hexdigest()[:16]
        if key not in self.known:
            self.known[key] = self.divergence.total(self.divergence.by_source(rules))
        self.measured.add(key)
        return self.known[key]

    def sweep(self, plan: np.ndarray, budget: Budget) -> np.ndarray:
        """The best plan found within the budget; the plan itself, if none is better or none is within."""
        density = budget.config.density
        heads = sorted(self.random.permutation(self.heads)[: self.heads_a_sweep].tolist())
        trials = [(head, rule) for head in heads for rule in self.tried(plan.flat[head])]
        before = self.loss(plan)
        change = np.full((plan.size, len(self.rules.alpha)), np.inf)
        change[np.arange(plan.size), plan.reshape(-1)] = 0.0
        for head, rule in self.progress.track(trials, f"refine, density {density:.3f}"):
            if self.finished:
                break
            trial = plan.copy()
            trial.flat[head] = rule
            change[head, rule] = self.loss(trial) - before
        found, most = [plan] if budget.fits(plan) else [], plan.size
        while most >= 1:
            proposal = exchange(plan, change.reshape(*plan.shape, -1), budget, most)
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


def _some(items: CalibrationSet) -> CalibrationSet:
    """The items that are measured on, of every length."""
    return CalibrationSet(
        {
            (length, source): members[: max(1, _TOKENS.get(source, _OTHER_TOKENS) // length)]
            for (length, source), members in items.items.items()
        }
    )
