"""Annealing: spans of all heads at once, by gradient, before single changes are measured.

Every head has a distribution over a palette of rules, and attends by the mean of what these give, weighted by their
probabilities (`moa.search.blended_attention`). So what a plan loses is a smooth function of the probabilities, and a
backward pass tells for every rule of every head how the loss would change if the head had a little more of it, while
all others are as undecided as they are. A step costs the same however many heads a model has; measuring plans one by
one costs more with every head.

The running mean of these slopes, which starts from the loss tables, is what a rule costs. Of all distributions within
the budget the one taken costs least but for an entropy bonus, the temperature:

    p[head, rule] ~ exp(-(cost[head, rule] + sum over lengths of price[N] * span[N, rule] / N) / temperature)

with prices, found by convex minimisation, at which the mean span is within the density at every length. As the
temperature falls heads decide, those first for which it makes the most difference, and the others' slopes take account
of it. In the end a program takes the best single rules. Nothing is drawn at random, and sums have a fixed order.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import minimize

from moa.attention.options import AttentionOptions
from moa.errors import UnsupportedModelError
from moa.evaluation.likelihood import logits_at
from moa.files import read_tensors, write_tensors
from moa.models import LoadedModel
from moa.plan import Plan
from moa.progress import SILENT, Progress
from moa.search.assignment import AssignmentProblem, assign
from moa.search.blended_attention import blended_attention
from moa.search.calibrate import RETRIEVAL
from moa.search.defaults import STEPS
from moa.search.differentiable import attending, differentiable
from moa.search.divergence import lost
from moa.search.exchange import Budget
from moa.search.items import CalibrationItem, CalibrationSet
from moa.search.optimize import OptimizeConfig, Rules

ANNEAL = "mixtures"  # part of the keys of results: what was annealed in another way is not that
_TOKENS = 8192  # of each source in a step, in items of one length
_ROWS = 4  # items that run together, at most: their logits are kept
_MEMORY = 0.3  # of the steps: how far back the running mean of slopes reaches
_HOT, _COLD = 0.1, 0.003  # temperature at the first and last step, in units of what a full head pays
_APART = 1.2  # spans of neighbours on the palette, at least
_GAP = 0.002  # relative, of the program in the end
_REMEMBER = 10  # steps between two writes of the file for an interrupted call


def anneal(
    loaded: LoadedModel,
    items: CalibrationSet,
    tables: Mapping[int, np.ndarray],
    scales: Mapping[str, float],
    config: OptimizeConfig,
    steps: int = STEPS,
    progress: Progress = SILENT,
    partial: Path | None = None,
) -> Plan | None:
    """A plan within the budget.

    Parameters
    ----------
    loaded : LoadedModel
        With no plan in force.
    items : CalibrationSet
        A step takes some of one length, of every source.
    tables : mapping from profile length N to float64 [layers, kv_heads, windows]
        Loss tables, as for `moa.search.optimize.optimize`.
    scales : mapping of source to float
        What a source's loss counts: weight over unit, as in `moa.search.divergence.Divergence`.
    config : OptimizeConfig
        The budget, the rules, and how many of them a layer may have.
    steps : int
    partial : Path, optional
        File of the state; an interrupted call goes on from it.

    Returns
    -------
    Plan or None
        None if no plan of the palette's rules is within the budget.

    Raises
    ------
    UnsupportedModelError
        As `moa.search.profile.profile`.
    """
    heads = loaded.identity.layers * loaded.identity.kv_heads
    budget = palette(Budget(Rules.within(tables, config), config))
    if (budget.spans.min(1) * heads > budget.limits(heads)).any():
        return None
    state = _State.begin(budget, tables)
    if partial is not None and partial.is_file():
        state = _State(**read_tensors(partial))
    slopes = _Slopes(loaded, items, budget, scales)
    with differentiable(loaded.model):
        for step in progress.track(range(int(state.step[0]), steps), "anneal"):
            temperature = _HOT * (_COLD / _HOT) ** (step / max(1, steps - 1))
            chances = probabilities(state.cost, budget, temperature, state.price)
            number = step % len(slopes.lengths)
            slope = slopes(slopes.lengths[number], step // len(slopes.lengths), chances)
            if not np.isfinite(slope).all():
                raise UnsupportedModelError(
                    f"annealing this {loaded.identity.model_type} model in {loaded.model.dtype} overflows; load it in "
                    "float32 or bfloat16"
                )
            state.costs[number] += min(1.0, len(slopes.lengths) / (_MEMORY * steps)) * (slope - state.costs[number])
            state.step[0] = step + 1
            if partial is not None and (step + 1) % _REMEMBER == 0:
                write_tensors(partial, vars(state))
    cost = state.cost - state.cost.min(-1, keepdims=True)
    problem = AssignmentProblem(
        cost=cost,
        usage=np.broadcast_to(budget.spans[:, None, None, :].astype(float), (len(budget.spans), *cost.shape)),
        limits=budget.limits(heads).astype(float),
        allowed=np.ones(cost.shape, bool),
        rules_per_layer=config.rules_per_layer,
    )
    choice = assign(problem, _GAP, None).choice
    if choice is None or not budget.fits(choice):
        return None
    return Plan.from_arrays(loaded.identity, budget.rules.alpha[choice], budget.rules.beta[choice], config.sink)


def palette(budget: Budget) -> Budget:
    """The same budget with fewer rules: constants, shares of N and rules that switch on at a length, of the first two
    only such as differ by a fifth or more; of those that are worth measuring, and the dearest.
    """
    rules, longest = budget.rules, budget.spans[-1]
    known = budget.worth_measuring
    chosen = known & (rules.beta > 1)
    for kind in (rules.beta == 0, rules.alpha == 0):
        last = 0.0
        for rule in np.flatnonzero(known & kind)[np.argsort(longest[known & kind], kind="stable")]:
            if longest[rule] >= _APART * last:
                chosen[rule], last = True, longest[rule]
    chosen[-1] = True
    spans = {length: own[chosen] for length, own in rules.spans.items()}
    return Budget(Rules(rules.alpha[chosen], rules.beta[chosen], spans), budget.config)


def probabilities(cost: np.ndarray, budget: Budget, temperature: float, price: np.ndarray) -> np.ndarray:
    """The distributions of all heads over rules that cost least, but for the entropy, within the budget.

    Parameters
    ----------
    cost : float64 [layers, heads, rules]
    budget : Budget
        Must have room for the cheapest rules.
    temperature : float
        In units of what a full head pays more than the cheapest; where tokens cost nothing it is next to zero.
    price : float64 [lengths]
        Where to look first; on return the prices found.

    Returns
    -------
    float64 [layers, heads, rules]
    """
    share = budget.spans / np.array(list(budget.rules.spans))[:, None]
    heads = cost[..., 0].size
    limits = budget.limits(heads) / heads / np.array(list(budget.rules.spans))
    flat = cost.reshape(heads, -1)
    scale = max(float(np.ptp(flat, axis=1).mean()), np.finfo(float).tiny)

    def distribution(price: np.ndarray, absolute: float) -> tuple[np.ndarray, float]:
        exponents = -(flat / scale + price @ share) / absolute
        top = exponents.max(1, keepdims=True)
        odds = np.exp(exponents - top)
        total = odds.sum(1, keepdims=True)
        return odds / total, float((np.log(total) + top).mean())

    def dual(price: np.ndarray, absolute: float) -> tuple[float, np.ndarray]:
        chances, free = distribution(price, absolute)
        return float(limits @ price) + absolute * free, limits - (chances @ share.T).mean(0)

    absolute = 1e-3
    for _ in range(2):  # the second time the temperature knows the prices
        if price.any():
            absolute = max(1e-6, temperature * float(price @ np.ptp(share, axis=1)) / scale)
        bounds = [(0.0, None)] * len(price)
        found = minimize(dual, price / scale, (absolute,), jac=True, bounds=bounds, method="L-BFGS-B")
        price[:] = found.x * scale
    return distribution(found.x, absolute)[0].reshape(cost.shape)


class _State:
    """``costs`` float64 [profile lengths, layers, heads, rules], ``price`` float64 [lengths], ``step`` int64 [1]."""

    def __init__(self, costs: np.ndarray, price: np.ndarray, step: np.ndarray):
        self.costs, self.price, self.step = costs, price, step

    @classmethod
    def begin(cls, budget: Budget, tables: Mapping[int, np.ndarray]) -> "_State":
        costs = np.stack([budget.rules.losses(length, tables) for length in sorted(tables)])
        return cls(costs - costs[..., -1:], np.zeros(len(budget.spans)), np.zeros(1, np.int64))

    @property
    def cost(self) -> np.ndarray:
        mean: np.ndarray = self.costs.mean(0)
        return mean


class _Slopes:
    """How the loss changes with the probabilities of rules, on some items."""

    def __init__(self, loaded: LoadedModel, items: CalibrationSet, budget: Budget, scales: Mapping[str, float]):
        self.loaded, self.items, self.budget, self.scales = loaded, items, budget, scales
        self.lengths = sorted({length for length, _ in items.items})

    def __call__(self, length: int, turn: int, chances: np.ndarray) -> np.ndarray:
        """Slopes relative to the dearest rule: float64 [layers, heads, rules].

        ``turn`` says how often the length was had before: items take turns. ``chances`` as from `probabilities`.
        """
        spans, place = np.unique(np.minimum(self.budget.rules.spans[length], length), return_inverse=True)
        rules = np.eye(len(spans))[place]
        weights = torch.as_tensor(chances @ rules, dtype=torch.float32, device=self.loaded.model.device)
        weights.requires_grad_()
        for (own, source), members in self.items.items.items():
            if own == length:
                count = min(len(members), max(1, _TOKENS // length))
                some = [members[(turn * count + index) % len(members)] for index in range(count)]
                for first in range(0, count, _ROWS):
                    group = some[first : first + _ROWS]
                    self.loss(group, source, weights, spans.tolist(), len(group) / count)
        assert weights.grad is not None
        slope = weights.grad.double().cpu().numpy() @ rules.T
        return np.asarray(slope - slope[..., -1:])

    def loss(
        self, items: list[CalibrationItem], source: str, weights: torch.Tensor, spans: list[int], share: float = 1.0
    ) -> torch.Tensor:
        """Mean loss of items of one length, scaled, times ``share``: a scalar. Its gradient is added to that of
        ``weights``, [layers, kv_heads, spans].
        """
        model = self.loaded.model
        places = np.unique(np.concatenate([item.loss for item in items]))
        ids = torch.as_tensor(np.stack([item.input_ids for item in items]), device=model.device)
        before = torch.as_tensor(places - 1, device=model.device)  # a token is predicted one place before it

        def attend(
            query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, options: AttentionOptions, layer: int
        ) -> torch.Tensor:
            each = weights[layer].repeat(len(items), 1)
            return blended_attention(query, key, value, each, spans, self.budget.config.sink, options)

        with torch.no_grad():
            dense = logits_at(model, ids, before, use_cache=False)
        with attending(self.loaded, attend), torch.enable_grad():
            blended = logits_at(model, ids, before, use_cache=False)
            losses = []
            for item, *logits in zip(items, blended, dense, strict=True):
                own = torch.as_tensor(np.searchsorted(places, item.loss), device=model.device)
                log_probs, target = (row[own].float().log_softmax(-1) for row in logits)
                nats = torch.nn.functional.kl_div(log_probs, target, reduction="none", log_target=True).sum(-1)
                losses.append(lost(item, nats) if source == RETRIEVAL else nats.mean())
            mean = torch.stack(losses).mean() * (self.scales[source] * share)
            mean.backward()
        return mean.detach()
