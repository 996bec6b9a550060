"""Give every head one rule at the least cost, under a few budgets: a solver for one objective, with a certificate.

The budgets are few (four to six), so the problem is solved from their side. Put a price on each budget, and the
layers fall apart: each takes the menu of rules (all rules, one, or a pair) whose cheapest choices cost it least. The
sum of these minima is a lower bound on every assignment and concave in the prices; cutting planes climb to its top.
There nearly every choice is settled, and a small integer program over what costs hardly more than the best makes the
rest fit. What is left out costs so much that leaving it out is certified.
"""

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
from scipy.optimize import Bounds, LinearConstraint, OptimizeResult, linprog, milp

_SEED_PRICES = (0.0, 0.01, 0.1, 1.0, 10.0)
_FIRST_PRICE_LIMIT, _LAST_PRICE_LIMIT = 1e2, 1e10
_CLIMB_STEPS = 80
_CLIMB_SHARE = 0.1  # of the gap that the climb may leave; the integer program gets the rest
_PROGRAM_SIZES = (300, 1_000, 2_000)
_PROGRAM_NODES = 100
_PROGRAM_SHARE = 0.75  # of the gap that an integer program may leave
_ROW_SCALE = 10.0  # of a limit in an integer program: HiGHS lets a row be violated by 1e-6, here 1e-7 of the limit


@dataclass(frozen=True)
class AssignmentProblem:
    """Minimise the summed cost of one rule per head, within budgets, with at most K distinct rules in a layer.

    Attributes
    ----------
    cost : float64 [layers, heads, rules]
        Not negative.
    usage : float64 [budgets, layers, heads, rules]
        What a choice takes of each budget; not negative.
    limits : float64 [budgets]
        What the heads may take together.
    allowed : bool [layers, heads, rules]
        The choices to search; the others can be left out without making the answer worse.
    rules_per_layer : int or None
        K: 1, 2, or None for any number.
    """

    cost: np.ndarray
    usage: np.ndarray
    limits: np.ndarray
    allowed: np.ndarray
    rules_per_layer: int | None = None

    def menus(self) -> np.ndarray:
        """The sets of rules among which a layer chooses one, int64 [menus, rules of a menu]."""
        rules = self.cost.shape[-1]
        if self.rules_per_layer is None:
            return np.arange(rules)[None]
        if self.rules_per_layer == 1 or rules == 1:
            return np.arange(rules)[:, None]
        return np.stack(np.triu_indices(rules, 1), axis=1)


@dataclass(frozen=True)
class Assignment:
    """An answer to an `AssignmentProblem`.

    Attributes
    ----------
    choice : int64 [layers, heads] or None
        The rule of each head, within all limits exactly; None if none was found.
    value : float
        Its cost; infinity without a choice.
    bound : float
        No assignment within the limits costs less; infinity if it is proven that there is none.
    """

    choice: np.ndarray | None
    value: float
    bound: float


def assign(problem: AssignmentProblem, gap: float = 0.01, incumbent: np.ndarray | None = None) -> Assignment:
    """Solve an assignment problem to a relative gap (value - bound) / value, or as near as the program sizes allow.

    ``incumbent``, int64 [layers, heads], is a choice known to be good; the answer is never worse. Deterministic.
    """
    solver = _Solver(problem, gap, incumbent)
    solver.climb()
    while not solver.finished() and 0 < solver.bound < 0.1 * solver.unit:
        solver.rescale(solver.bound)
        solver.climb()
    for size in _PROGRAM_SIZES:
        if solver.finished():
            break
        solver.solve_program(size, keep_settled=size == _PROGRAM_SIZES[0] and len(solver.menus) > 1)
    return Assignment(solver.choice, solver.value, min(solver.value, solver.bound))


def _take(values: np.ndarray, choice: np.ndarray) -> np.ndarray:
    """Entries of [..., layers, heads, rules] at choice [layers, heads], as [..., layers, heads]."""
    layer, head = np.ogrid[: choice.shape[0], : choice.shape[1]]
    return values[..., layer, head, choice]


def _lowest(values: np.ndarray, count: int) -> tuple[tuple[np.ndarray, ...], float]:
    """Indices of the ``count`` lowest finite entries, and the lowest entry left out (infinity if none is)."""
    flat = values.ravel()
    finite = np.flatnonzero(flat < np.inf)
    left_out = np.inf
    if len(finite) > count:
        order = np.argsort(flat[finite], kind="stable")
        left_out = float(flat[finite[order[count]]])
        finite = np.sort(finite[order[:count]])
    return np.unravel_index(finite, values.shape), left_out


class _Solver:
    """The best choice and the best bound so far, and the two steps that bring them together."""

    def __init__(self, problem: AssignmentProblem, gap: float, incumbent: np.ndarray | None):
        self.problem, self.gap = problem, gap
        self.menus = problem.menus()
        self.choice: np.ndarray | None = None
        self.value = np.inf
        self.bound = self.priced_bound = -np.inf
        if incumbent is not None:
            self.offer(incumbent)
        # No assignment costs more than the ceiling, so a bound above it proves that there is none.
        self.ceiling = float(problem.cost.max(axis=-1).sum())
        self.unit = min(self.value, self.ceiling) or 1.0
        self.cost = np.where(problem.allowed, problem.cost / self.unit, np.inf)
        scale = np.where(problem.limits > 0, problem.limits, 1.0)
        self.usage = problem.usage / scale[:, None, None, None]
        self.limits = problem.limits / scale
        self.prices = np.zeros(len(scale))
        # One cut per evaluation of the bound: a choice [layers, heads], the menus [layers] it is from, its cost
        # [layers] and its usage [budgets, layers].
        self.cuts: list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = []
        self.settled = np.full(problem.cost.shape[0], -1)  # the menu of a layer about which no doubt is left, or -1

    def rescale(self, unit: float) -> None:
        """Measure costs in another unit: HiGHS works with absolute tolerances, made for values around one."""
        factor, self.unit = self.unit / unit, unit
        self.cost = self.cost * factor
        self.prices = self.prices * factor
        self.cuts = [(choice, menu, cost * factor, usage) for choice, menu, cost, usage in self.cuts]

    def finished(self) -> bool:
        if self.bound > self.ceiling:
            return True
        return self.choice is not None and self.value - self.bound <= self.gap * self.value

    def offer(self, choice: np.ndarray) -> None:
        """Keep a choice if it is within all limits and the best so far."""
        value = float(_take(self.problem.cost, choice).sum())
        used = _take(self.problem.usage, choice).sum(axis=(1, 2))
        if value < self.value and np.all(used <= self.problem.limits):
            self.choice, self.value = choice, value

    # ------------------------------------------------------------------ the bound

    def priced(self, prices: np.ndarray) -> np.ndarray:
        """Cost with budgets paid for, [layers, heads, rules], in units."""
        return self.cost + np.tensordot(prices, self.usage, 1)

    def menu_costs(self, priced: np.ndarray) -> np.ndarray:
        """What each menu costs a layer whose heads choose from it freely, [layers, menus]."""
        if len(self.menus) == 1:
            return priced.min(axis=-1).sum(axis=1)[:, None]
        if self.menus.shape[1] == 1:
            return priced.sum(axis=1)
        by_head = np.ascontiguousarray(priced.transpose(1, 0, 2))
        pairs = (np.minimum(by_head[..., r, None], by_head[..., r + 1 :]) for r in range(priced.shape[-1] - 1))
        return np.concatenate([pair.sum(axis=0) for pair in pairs], axis=1)

    def cut(self, prices: np.ndarray) -> None:
        """Evaluate the bound at these prices, and keep the choice that gives it as a cut."""
        priced = self.priced(prices)
        costs = self.menu_costs(priced)
        menu = costs.argmin(axis=1)
        rules = self.menus[menu]
        best = np.take_along_axis(priced, rules[:, None, :], axis=-1).argmin(axis=-1)
        choice = np.take_along_axis(rules, best, axis=1)
        bound = float(costs.min(axis=1).sum() - prices @ self.limits) * self.unit
        if bound > self.bound:
            self.bound = self.priced_bound = bound
            self.prices = prices
        self.cuts.append((choice, menu, _take(self.cost, choice).sum(axis=1), _take(self.usage, choice).sum(axis=2)))
        self.offer(choice)

    def climb(self) -> None:
        """Raise the bound to its top over the prices (Kelley's cutting planes, one for each layer and cut).

        The dual of the last step weighs the cuts of each layer: where one has all the weight, the layer is settled.
        """
        layers, budgets = len(self.cost), len(self.limits)
        for price in _SEED_PRICES:
            self.cut(np.full(budgets, price))
        price_limit = _FIRST_PRICE_LIMIT
        for _ in range(_CLIMB_STEPS):
            if self.finished():
                return
            choices, menus, costs, usages = (np.stack(part) for part in zip(*self.cuts, strict=True))
            # Variables: the prices, then each layer's minimum, which every cut bounds from above.
            rows = sp.hstack(
                [
                    sp.csr_array(-usages.transpose(0, 2, 1).reshape(-1, budgets)),
                    sp.kron(np.ones((len(costs), 1)), sp.eye_array(layers)),
                ],
                format="csr",
            )
            bounds = [(0.0, price_limit)] * budgets + [(None, None)] * layers
            objective = np.concatenate([self.limits, -np.ones(layers)])
            top = linprog(objective, A_ub=rows, b_ub=costs.ravel(), bounds=bounds, method="highs")
            if top.x is None:
                return
            weights = -top.ineqlin.marginals.reshape(-1, layers)
            heaviest = weights.argmax(axis=0)
            self.settled = np.where(weights.max(axis=0) > 0.999, menus[heaviest, np.arange(layers)], -1)
            self.offer(choices[heaviest, np.arange(layers)])
            prices = top.x[:budgets]
            limited = prices.max() > 0.999 * price_limit and price_limit < _LAST_PRICE_LIMIT
            if -top.fun * self.unit - self.bound <= _CLIMB_SHARE * self.gap * self.bound and not limited:
                return
            price_limit *= 10 if limited else 1
            self.cut(0.7 * prices + 0.3 * self.prices)  # between the model's top and the best point: steadier

    # ------------------------------------------------------------------ the choice

    def solve_program(self, size: int, keep_settled: bool) -> None:
        """Improve choice and bound by an integer program over the cheapest ``size`` alternatives.

        Its columns are a layer's menus, each with every head's best rule in it, and switches: a head of a menu's
        column takes another rule of the menu. Under the prices each has an excess over the bound; a solution that
        uses anything left out costs at least the bound and the lowest excess left out.
        With ``keep_settled`` a settled layer keeps its menu, and nothing is certified.
        """
        priced = self.priced(self.prices)
        costs = self.menu_costs(priced)
        excess = costs - costs.min(axis=1, keepdims=True)
        if keep_settled:
            other = np.arange(excess.shape[1]) != self.settled[:, None]
            excess = np.where(self.settled[:, None] < 0, excess, np.where(other, np.inf, 0.0))
        heads = np.arange(priced.shape[1])
        cheapest = np.arange(excess.shape[1]) == excess.argmin(axis=1)[:, None]
        # Of every layer the cheapest menu, so that there is one even where many cost the same.
        (layer, menu), left_out = _lowest(np.where(cheapest, -1.0, excess), max(len(excess), size // 8))
        rules = self.menus[menu]
        options = priced[layer[:, None, None], heads[None, :, None], rules[:, None, :]]  # [columns, heads, of menu]
        best = options.argmin(axis=-1)
        base = np.take_along_axis(rules, best, axis=1)  # [columns, heads]
        extra = excess[layer, menu][:, None, None] + options - options.min(axis=-1, keepdims=True)
        extra[np.arange(rules.shape[1]) == best[..., None]] = np.inf
        (column, head, slot), switch_left_out = _lowest(extra, size)
        left_out = min(left_out, switch_left_out)
        before, after = base[column, head], rules[column, slot]

        at = layer[:, None], heads[None]
        column_cost = self.cost[*at, base].sum(axis=1)
        column_usage = self.usage[:, *at, base].sum(axis=2)
        at = layer[column], head
        switch_cost = self.cost[*at, after] - self.cost[*at, before]
        switch_usage = self.usage[:, *at, after] - self.usage[:, *at, before]

        columns, switches = len(layer), len(column)
        pick = sp.csr_array(
            (np.ones(columns), (layer, np.arange(columns))), shape=(len(priced), columns + switches)
        )  # one column a layer
        switched, row = np.unique(column * len(heads) + head, return_inverse=True)
        allow = sp.csr_array(
            (
                np.concatenate([np.ones(switches), -np.ones(len(switched))]),
                (
                    np.concatenate([row, np.arange(len(switched))]),
                    np.concatenate([columns + np.arange(switches), switched // len(heads)]),
                ),
            ),
            shape=(len(switched), columns + switches),
        )  # one switch a head, and only in a column picked
        result = milp(
            np.concatenate([column_cost, switch_cost]),
            integrality=np.ones(columns + switches),
            bounds=Bounds(0, 1),
            constraints=[
                LinearConstraint(pick, 1, 1),
                LinearConstraint(allow, -np.inf, 0),
                LinearConstraint(
                    _ROW_SCALE * np.concatenate([column_usage, switch_usage], axis=1),
                    -np.inf,
                    _ROW_SCALE * self.limits,
                ),
            ],
            # Presolve takes longer here than it saves.
            options={"mip_rel_gap": _PROGRAM_SHARE * self.gap, "node_limit": _PROGRAM_NODES, "presolve": False},
        )
        if result.x is not None:
            picked = np.flatnonzero(result.x[:columns] > 0.5)
            taken = np.flatnonzero(result.x[columns:] > 0.5)
            choice = np.empty(priced.shape[:2], dtype=np.int64)
            choice[layer[picked]] = base[picked]
            choice[layer[column[taken]], head[taken]] = after[taken]
            self.offer(choice)
        if not keep_settled:
            bound = min(_program_bound(result), self.priced_bound / self.unit + left_out) * self.unit
            if bound < np.inf or self.choice is None:  # an answer in hand outweighs a proof in floating point
                self.bound = max(self.bound, bound)


def _program_bound(result: OptimizeResult) -> float:
    """The lower bound that HiGHS proved for an integer program."""
    if result.status == 2:  # infeasible
        return np.inf
    return -np.inf if result.mip_dual_bound is None else float(result.mip_dual_bound)
