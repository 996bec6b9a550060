"""The refine stage: the last choices are made by measurement.

A loss table is of first order and knows one head at a time: it cannot see that two heads stand in for each other, or
that a head matters only while another one works. Here plans run for real, at all profile lengths. First, where enough
may be measured, the descent (`moa.search.descend`) comes down from the dense model. Then *sweeps* try, for each head
alone, a few rules beside its own. An exact program picks the best set of these changes within the budget; since each
was measured alone, ever fewer of them are made at once until the loss of the whole, measured, falls. What the budget
has left after them goes to heads that see as much at some lengths and more at others.

Before the descent and after it the sink is chosen: the same spans, with more of the beginning of the text in them and
less of the rest. Where spans are long, a system prompt that all heads see is worth more than as many tokens further
back.

Few items can be measured on. A rule that leaves out the first tenth of a text costs nothing where no fact happens to
lie there; so heads try rules that see at most half of a text, or all of it. Where half of all tokens or more are
stored, plans lose so little that chance decides between them: there half as many are measured, on up to twice the
items.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from moa.files import read_json, write_json
from moa.models import LoadedModel
from moa.plan import SINK, ModelIdentity, Plan
from moa.progress import SILENT, Progress
from moa.search.calibrate import RETRIEVAL, SOURCES
from moa.search.descend import LEAST_EVALUATIONS, descend
from moa.search.divergence import Divergence
from moa.search.exchange import Budget, exchange
from moa.search.items import CalibrationSet
from moa.search.rules import OptimizeConfig, Rules

SINKS = (SINK, 16, 32, 64)  # tried, in tokens
_SINK = 1 / 4  # of the shortest span that is worth measuring, at most
_DESCENT = 1 / 2  # of the plans to measure, at most
_WINDOW = 1 / 2  # share of a text that a head sees at most, unless it sees all
_STEP = 2  # a head tries so many rules that are next cheaper and next dearer than its own, the cheapest and the dearest
_TRIED = 6  # rules of a head in a sweep, at most
_SWEEPS = 3  # an allowance too small for so many sweeps over all heads sweeps over some of them
_LEAST_HEADS = 8
_EVALUATIONS, _HEAD_EVALUATIONS = 800, 10  # plans to measure unless it is said how many: in all, and for each KV head
_TOKENS, _OTHER_TOKENS = 49152, 16384  # measured on items of so many tokens for each length: retrieval, other sources
_CLOSE, _MORE = 1 / 2, 2  # from this density on as many times more tokens, and fewer plans
_REMEMBER = 16  # measurements between two writes of the file for an interrupted call
_LEAST_GAIN = 1e-3  # of the loss; smaller gains end the search


def plans_to_measure(heads: int, density: float) -> int:
    """How many plans of a model with so many KV heads are measured unless it is said how many."""
    plans = max(_EVALUATIONS, _HEAD_EVALUATIONS * heads)
    return plans // _MORE if density >= _CLOSE else plans


def tokens_to_measure(density: float) -> dict[str, int]:
    """Tokens of the items that plans of this density are measured on, at each length, by source."""
    times = _MORE if density >= _CLOSE else 1
    return {source: times * (_TOKENS if source == RETRIEVAL else _OTHER_TOKENS) for source in SOURCES}


@dataclass(frozen=True)
class Refined:
    """A plan on the way.

    Attributes
    ----------
    plan : Plan
    loss : float
        What it loses on the calibration items, weighted, at all profile lengths; see `Divergence.total`.
    evaluations : int
        Plans measured so far.
    """

    plan: Plan
    loss: float
    evaluations: int


def refine(
    loaded: LoadedModel,
    plans: Sequence[Plan],
    items: CalibrationSet,
    weights: Mapping[str, float],
    config: OptimizeConfig,
    evaluations: int,
    progress: Progress = SILENT,
    partial: Path | None = None,
) -> list[Refined]:
    """Better and better plans, by measurement.

    Parameters
    ----------
    loaded : LoadedModel
    plans : sequence of Plan
        The optimizer's plans for ``config``.
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

    Returns
    -------
    list of Refined
        First the optimizer's plans, each with the sink that is best for it. Then, by falling loss, what the descent
        found, the same with another sink, and what each sweep found, as far as each is better than all before. The
        later ones have seen more of the items; held-out items say which to take.
    """
    return _Refinement(loaded, plans, items, weights, config, evaluations, progress, partial).run()


@dataclass(frozen=True)
class _Space:
    """Plans with one sink: int64 [layers, heads], numbers of the budget's rules.

    Attributes
    ----------
    budget : Budget
    tried : int64 array
        Numbers of the rules that sweeps try.
    """

    budget: Budget
    tried: np.ndarray

    @classmethod
    def of(cls, lengths: Sequence[int], config: OptimizeConfig) -> "_Space":
        budget = Budget(Rules.within(lengths, config), config)
        return cls(budget, _tried(budget))

    def plan(self, model: ModelIdentity, numbers: np.ndarray) -> Plan:
        rules, sink = self.budget.rules, self.budget.config.sink
        return Plan.from_arrays(model, rules.alpha[numbers], rules.beta[numbers], sink)

    def numbers(self, plan: Plan) -> np.ndarray:
        """What `plan` is made from; of rules that give the same spans, one."""
        number = {tuple(spans): rule for rule, spans in enumerate(self.budget.spans.T.tolist())}
        spans = np.stack([plan.spans(length) for length in self.budget.rules.spans], axis=-1)
        found = [number[tuple(head)] for head in spans.reshape(-1, spans.shape[-1]).tolist()]
        return np.array(found).reshape(spans.shape[:-1])

    def can_take(self, plan: Plan) -> bool:
        """Whether a plan's spans stay the same with this sink, and the shortest heads' windows long enough."""
        sink = self.budget.config.sink
        same = all((replace(plan, sink=sink).spans(n) == plan.spans(n)).all() for n in self.budget.rules.spans)
        shortest = self.budget.spans[0, self.budget.worth_measuring].min()
        return same and bool(sink <= _SINK * shortest)


class _Refinement:
    """Plans are those of ``space``."""

    def __init__(
        self,
        loaded: LoadedModel,
        plans: Sequence[Plan],
        items: CalibrationSet,
        weights: Mapping[str, float],
        config: OptimizeConfig,
        evaluations: int,
        progress: Progress,
        partial: Path | None,
    ):
        self.loaded, self.plans, self.progress = loaded, plans, progress
        self.evaluations, self.partial = evaluations, partial
        self.items, self.weights = _some(items, tokens_to_measure(config.density)), weights
        self.lengths = sorted({length for length, _ in items.items})
        self.divergence = Divergence(loaded, self.items, weights)
        self.spaces = {sink: _Space.of(self.lengths, replace(config, sink=sink)) for sink in {config.sink, *SINKS}}
        self.space = self.spaces[config.sink]
        self.shape = loaded.identity.layers, loaded.identity.kv_heads
        self.heads = self.shape[0] * self.shape[1]
        self.heads_a_sweep = min(self.heads, max(_LEAST_HEADS, evaluations // (_SWEEPS * _TRIED)))
        self.random = np.random.default_rng(0)
        self.known: dict[str, float] = {} if partial is None or not partial.is_file() else read_json(partial)
        self.measured: set[str] = set()

    def run(self) -> list[Refined]:
        result = [self.refined(self.with_best_sink(plan)) for plan in self.progress.track(self.plans, "sinks")]
        best = min(result, key=lambda start: start.loss)
        plan = self.begin_from(best.plan)

        def keep(better: np.ndarray) -> bool:
            nonlocal best
            if self.loss(better) >= (1 - _LEAST_GAIN) * best.loss:
                return False
            best = self.refined(self.plan(better))
            result.append(best)
            return True

        descended = self.descended()
        if descended is not None and keep(descended):
            plan = self.begin_from(self.with_best_sink(best.plan))
            keep(plan)
        vain = 0  # sweeps in a row
        while len(self.measured) < self.evaluations and vain * self.heads_a_sweep < self.heads:
            plan = self.sweep(plan)
            vain = 0 if keep(plan) else vain + 1
        return result

    def with_best_sink(self, plan: Plan) -> Plan:
        """The plan of the same spans with the sink that is best for it."""
        others = [replace(plan, sink=sink) for sink in SINKS if sink != plan.sink and self.spaces[sink].can_take(plan)]
        return min([plan, *others], key=self.measure)

    def begin_from(self, plan: Plan) -> np.ndarray:
        """The plan as numbers; plans have its sink from now on."""
        self.space = self.spaces[plan.sink]
        self.progress.say(f"refine: loss {self.measure(plan):.4f}, with a sink of {plan.sink} tokens")
        return self.space.numbers(plan)

    def refined(self, plan: Plan) -> Refined:
        return Refined(plan, self.measure(plan), len(self.measured))

    def descended(self) -> np.ndarray | None:
        """The descent's plan; None where the allowance is too small, or no plan near it is within the budget."""
        allowance = int(_DESCENT * self.evaluations)
        if allowance < LEAST_EVALUATIONS * self.heads:
            return None
        budget = self.space.budget
        spans = {length: spans for length, spans in budget.rules.spans.items() if length >= self.lengths[0]}
        plan = descend(
            self.loss,
            self.shape,
            replace(budget, rules=replace(budget.rules, spans=spans)),  # tokens count where it is measured
            allowance,
            self.progress,
            around=lambda plan: self.divergence.around(self.plan(plan)),
        )
        plan = plan if budget.fits(plan) else self.sweep(plan)
        return plan if budget.fits(plan) else None

    def loss(self, plan: np.ndarray) -> float:
        return self.measure(self.plan(plan))

    def measure(self, plan: Plan) -> float:
        """Loss of a plan, measured once."""
        key = hashlib.sha256(repr((plan.alpha, plan.beta, plan.sink)).encode()).hexdigest()[:16]
        if key not in self.known:
            self.known[key] = self.divergence.total(self.divergence.by_source(plan))
            if self.partial is not None and len(self.known) % _REMEMBER == 0:
                write_json(self.partial, self.known)
        self.measured.add(key)
        return self.known[key]

    def plan(self, plan: np.ndarray) -> Plan:
        return self.space.plan(self.loaded.identity, plan)

    def sweep(self, plan: np.ndarray) -> np.ndarray:
        """The best plan found within the budget; the plan itself, if none is better or none is within."""
        heads = sorted(self.random.permutation(self.heads)[: self.heads_a_sweep].tolist())
        trials = [(head, rule) for head in heads for rule in self.beside(plan.flat[head])]
        self.divergence.around(self.plan(plan))
        before = self.loss(plan)
        change = np.full((plan.size, len(self.space.budget.rules.alpha)), np.inf)
        change[np.arange(plan.size), plan.reshape(-1)] = 0.0
        for head, rule in self.progress.track(trials, "refine"):
            if len(self.measured) >= self.evaluations:
                break
            trial = plan.copy()
            trial.flat[head] = rule
            change[head, rule] = self.loss(trial) - before
        found, most = [plan] if self.space.budget.fits(plan) else [], plan.size
        while most >= 1:
            proposal = exchange(plan, change.reshape(*plan.shape, -1), self.space.budget, most)
            if proposal is None:
                break
            proposal = self.filled(proposal)
            found.append(proposal)
            if self.loss(proposal) < before and len(found) > 1 and self.loss(proposal) > self.loss(found[-2]):
                break  # fewer changes were worse: it only gets closer to where we are
            most = min(most, int((proposal != plan).sum())) // 2
        best = min(found, key=self.loss, default=plan)
        self.progress.say(f"refine: loss {before:.4f} -> {self.loss(best):.4f}")
        return best

    def filled(self, plan: np.ndarray) -> np.ndarray:
        """The plan with what the budget has left: heads see as much or more at every length, the sum of shares most."""
        spans = self.space.budget.spans
        lengths = np.array(list(self.space.budget.rules.spans))[:, None, None, None]
        longer = spans[:, None, None, :] - spans[:, plan][..., None]  # [lengths, layers, heads, rules]
        allowed = (longer >= 0).all(axis=0) & np.isin(np.arange(spans.shape[1]), self.space.tried)
        change = np.where(allowed, -(longer / lengths).sum(axis=0), np.inf)
        np.put_along_axis(change, plan[..., None], 0.0, axis=-1)
        found = exchange(plan, change, self.space.budget, plan.size)
        return plan if found is None else found

    def beside(self, own: int) -> list[int]:
        """What a head tries instead of its own rule."""
        tried = self.space.tried
        cheaper, dearer = tried[tried < own], tried[tried > own]
        near = [*cheaper[-_STEP:], *cheaper[:1], *dearer[:_STEP], *dearer[-1:]]
        return sorted({int(rule) for rule in near})


def _tried(budget: Budget) -> np.ndarray:
    """Numbers of the rules that heads try: constants, shares of N, and what sees all from some length on."""
    rules = budget.rules
    share = budget.spans / np.array(list(rules.spans))[:, None]  # lengths rise
    whole = np.logical_and.accumulate(share[::-1] >= 1)[::-1]
    plain = (rules.alpha == 0) | (rules.beta == 0) | (rules.beta > 1)
    known = np.flatnonzero(budget.worth_measuring)
    ends = np.isin(np.arange(len(plain)), known[[0, -1]])
    return known[(ends | plain & (whole | (share <= _WINDOW)).all(axis=0))[known]]


def _some(items: CalibrationSet, tokens: Mapping[str, int]) -> CalibrationSet:
    """The items that are measured on: of every length and source so many tokens, or the first."""
    return CalibrationSet(
        {
            (length, source): members[: max(1, tokens[source] // length)]
            for (length, source), members in items.items.items()
        }
    )
