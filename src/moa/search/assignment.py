"""Give every head one rule, at the least cost, under a few budgets: a small exact-ish solver with a certificate.

The budgets are few (four to six), so the problem is solved from their side. Put a price on each budget, and the
layers fall apart: each picks the menu of rules (all rules, or any one, or any two) whose cheapest choices cost it
least. The sum of these minima is a lower bound on every assignment, concave in the prices; cutting planes find the
prices where it is highest. There, almost every head's choice is settled: what could still change, because it costs
hardly more than the best, goes into a small integer program, and everything left out costs so much that leaving it
out is certified.
"""

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
from scipy.optimize import Bounds, LinearConstraint, linprog, milp

_ASCENT_STEPS = 80
_PRICE_LIMIT = 1e9
_PROGRAM_SIZES = (1000,4000,16000)
_PROGRAM_NODES = 2_000
PART=100;PART2=1000


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
        Sums of usage must not be greater.
    rules_per_layer : int or None
        K: 1, 2 or None for any number.
    """

    cost: np.ndarray
    usage: np.ndarray
    limits: np.ndarray
    rules_per_layer: int | None = None

    def menus(self) -> np.ndarray:
        """The sets of rules that a layer can choose from, int64 [menus, rules in each]."""
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
        The rule of each head; None if none was found that meets the budgets.
    value : float
        Its cost, infinity if there is none.
    bound : float
        No assignment costs less; infinity if it is proven that none exists.
    prices : float64 [budgets]
        Best prices of the budgets (cost per limit), a good start for a similar problem.
    """

    choice: np.ndarray | None
    value: float
    bound: float
    prices: np.ndarray


def _take(values: np.ndarray, choice: np.ndarray) -> np.ndarray:
    """[..., layers, heads, rules] at choice [layers, heads]: [..., layers, heads]."""
    layer, head = np.ogrid[: choice.shape[0], : choice.shape[1]]
    return values[..., layer, head, choice]


class _Solver:
    def __init__(self, problem: AssignmentProblem, gap: float):
        self.problem = problem
        self.gap = gap
        self.scale = np.where(problem.limits > 0, problem.limits, 1.0)
        self.usage = problem.usage / self.scale[:, None, None, None]
        self.limits = problem.limits / self.scale
        self.menus = problem.menus()
        self.ceiling = float(problem.cost.max(axis=-1).sum())
        self.choice: np.ndarray | None = None
        self.value = np.inf
        self.bound = -np.inf
        self.prices = np.zeros(len(self.limits))
        self.cuts_choice = []; self.cuts_menu = []
        self.settled=np.zeros(len(problem.cost),bool)
        self.fixed=np.zeros(problem.cost.shape[:2],int)
        self.cuts_cost: list[np.ndarray] = []  # each [layers]
        self.cuts_usage: list[np.ndarray] = []  # each [budgets, layers]

    def offer(self, choice: np.ndarray) -> np.ndarray:
        used = _take(self.problem.usage, choice).sum(axis=(1, 2))
        value = float(_take(self.problem.cost, choice).sum())
        excess = used - self.problem.limits
        if value < self.value and np.all(excess <= 0):
            self.choice, self.value = choice, value
        return excess

    def done(self) -> bool:
        return self.bound > self.ceiling or (self.choice is not None and self.value - self.bound <= self.gap * abs(self.value))

    def priced(self, prices: np.ndarray) -> np.ndarray:
        return self.problem.cost + np.tensordot(prices, self.usage, 1)

    def menu_values(self, priced: np.ndarray) -> np.ndarray:
        """[layers, menus]"""
        k = self.menus.shape[1]
        if len(self.menus) == 1:
            return priced.min(axis=-1).sum(axis=1)[:, None]
        if k == 1:
            return priced.sum(axis=1)
        by_head = np.ascontiguousarray(priced.transpose(1, 0, 2))
        rules = priced.shape[-1]
        values = [np.minimum(by_head[:, :, r, None], by_head[:, :, r + 1 :]).sum(axis=0) for r in range(rules - 1)]
        return np.concatenate(values, axis=1)

    def price(self, prices: np.ndarray) -> float:
        """Evaluate the lower bound at these prices and keep its cut."""
        priced = self.priced(prices)
        values = self.menu_values(priced)
        menu = values.argmin(axis=1)
        layers = np.arange(len(menu))
        options = np.take_along_axis(priced, self.menus[menu][:, None, :], axis=-1)
        choice = np.take_along_axis(self.menus[menu], options.argmin(axis=-1), axis=1)
        bound = float(values[layers, menu].sum() - prices @ self.limits)
        if bound > self.bound:
            self.bound, self.prices = bound, prices
        self.cuts_cost.append(_take(self.problem.cost, choice).sum(axis=1))
        self.cuts_usage.append(_take(self.usage, choice).sum(axis=2))
        self.cuts_choice.append(choice); self.cuts_menu.append(menu)
        self.offer(choice)
        return bound

    def ascend(self, start):
        budgets = len(self.limits)
        self.price(np.zeros(budgets))
        if start is not None:
            for f in (0.5,1.0,2.0):
                self.price(start * f)
            for b in range(budgets):
                for f in (0.3, 3.0):
                    s = start.copy(); s[b]=max(s[b], .01*start.max())* f
                    self.price(s)
        else:
            for scale in (0.01, 0.1, 1.0, 10.0):
                self.price(np.full(budgets, scale * 1.0))
        box = 100.0
        step=0
        for step in range(_ASCENT_STEPS):
            if self.done():
                break
            layers = len(self.cuts_cost[0])
            cuts = len(self.cuts_cost)
            usage = np.stack(self.cuts_usage)  # [cuts, budgets, layers]
            a = sp.hstack([
                sp.csr_array(-usage.transpose(0, 2, 1).reshape(cuts * layers, budgets)),
                sp.csr_array(sp.kron(np.ones((cuts, 1)), sp.eye(layers))),
            ]).tocsr()
            b = np.concatenate(self.cuts_cost)
            c = np.concatenate([self.limits, -np.ones(layers)])
            r = linprog(c, A_ub=a, b_ub=b, bounds=[(0, box)] * budgets + [(None, None)] * layers, method="highs")
            if r.x is None:
                break
            model = -r.fun
            at = r.x[:budgets]
            weights = -r.ineqlin.marginals.reshape(cuts, layers)
            top = weights.argmax(axis=0)
            self.settled = weights.max(axis=0) > 0.999
            self.fixed_menu = np.stack(self.cuts_menu)[top, np.arange(layers)]
            self.fixed = np.stack(self.cuts_choice)[top, np.arange(layers)]
            if model - self.bound <= 0.1 * self.gap * abs(self.bound) :
                if at.max() >= box * .999 and box < _PRICE_LIMIT:
                    box *= 10
                    continue
                break
            if at.max() >= box * .999 and box < _PRICE_LIMIT:
                    box *= 10
            self.price(0.7 * at + 0.3 * self.prices)
        self.steps = step

    def program(self, size: int, settled, fixed) -> float:
        priced = self.priced(self.prices)
        values = self.menu_values(priced)
        excess = values - values.min(axis=1, keepdims=True)
        if settled.any():
            keep=self.fixed_menu[settled]; e=excess[settled].copy(); i=np.arange(len(e)); v=e[i,keep]; e[:]=np.inf; e[i,keep]=0; excess[settled]=e
        layer, menu, threshold = self.lowest(excess, size if not isinstance(size,tuple) else size[0])
        rules = self.menus[menu]  # [columns, k]
        heads = priced.shape[1]
        options = priced[layer[:, None, None], np.arange(heads)[None, :, None], rules[:, None, :]]  # [columns, heads, k]
        first = options.argmin(axis=-1)
        base = np.take_along_axis(rules, first, axis=1)  # [columns, heads]
        extra = excess[layer, menu][:, None, None] + options - options.min(axis=-1, keepdims=True)
        extra[np.arange(rules.shape[1]) == first[:, :, None]] = np.inf
        column, head, slot, t2 = self.lowest(extra, size if not isinstance(size,tuple) else size[1])
        threshold = min(threshold, t2)
        hs = np.arange(heads)[None]
        cost = self.problem.cost
        y_cost = cost[layer[:, None], hs, base].sum(axis=1)
        y_use = self.usage[:, layer[:, None], hs, base].sum(axis=2)
        to = rules[column, slot]
        z_cost = cost[layer[column], head, to] - cost[layer[column], head, base[column, head]]
        z_use = self.usage[:, layer[column], head, to] - self.usage[:, layer[column], head, base[column, head]]
        n, q = len(layer), len(column)
        _, row = np.unique(layer, return_inverse=True)
        pick = sp.csr_array((np.ones(n), (row, np.arange(n))), shape=(row.max() + 1, n + q))
        group_id, group = np.unique(column * heads + head, return_inverse=True)
        g = len(group_id)
        link = sp.csr_array(
            (np.concatenate([np.ones(q), -np.ones(g)]),
             (np.concatenate([group, np.arange(g)]), np.concatenate([n + np.arange(q), group_id // heads]))),
            shape=(g, n + q))
        S = 1e3
        budget = np.concatenate([y_use, z_use], axis=1) * S
        left = self.limits
        constraints = [LinearConstraint(pick, 1, 1), LinearConstraint(budget, -np.inf, left * S)]
        if q:
            constraints.append(LinearConstraint(link, -np.inf, 0))
        c = np.concatenate([y_cost, z_cost])
        spent = _take(self.problem.cost, fixed)[settled].sum()
        rg = self.gap / 2 
        if 0: rg = min(1,self.gap*.2 * self.bound / max(self.bound-spent, 1e-9))
        r = milp(c, integrality=np.ones(n + q), bounds=Bounds(0, 1), constraints=constraints,
                 options={"mip_rel_gap": rg, "node_limit": _PROGRAM_NODES})
        self.last = ((~settled).sum(), n, q, r.status, r.mip_node_count)
        if r.x is not None:
            y = np.flatnonzero(r.x[:n] > 0.5)
            choice = fixed.copy()
            choice[layer[y]] = base[y]
            z = np.flatnonzero(r.x[n:] > 0.5)
            choice[layer[column[z]], head[z]] = to[z]
            self.offer(choice)
        if not settled.any():
            dual = r.mip_dual_bound if r.mip_dual_bound is not None else (np.inf if r.status == 2 else -np.inf)
            self.bound = max(self.bound, min(dual, self.lag + threshold))
        return threshold

    def lowest(self, values, count):
        """indices of the count lowest finite entries, and the lowest left out"""
        flat = values.ravel()
        finite = np.flatnonzero(flat < np.inf)
        threshold = np.inf
        if len(finite) > count:
            order = np.argpartition(flat[finite], count)
            threshold = flat[finite[order[count]]]
            finite = np.sort(finite[order[:count]])
        return (*np.unravel_index(finite, values.shape), threshold)


def solve(problem, gap=0.01, start=None, incumbent=None, verbose=False):
    import time
    t0=time.time()
    s = _Solver(problem, gap)
    if incumbent is not None:
        s.offer(incumbent)
    s.ascend(start)
    t1=time.time()
    s.lag = s.bound
    info=[]
    v0=s.value
    s.offer(s.fixed)
    if not s.done() and len(s.menus)>1:
        t=time.time()
        _=s.program((PART,PART2), s.settled, s.fixed)
        info.append(("part", s.last, s.value, round(time.time()-t,2)))
    for size in _PROGRAM_SIZES:
        if s.done():
            break
        t=time.time()
        th = s.program(size, np.zeros_like(s.settled),s.fixed)
        info.append((size, s.last, th, s.value, s.bound, round(time.time()-t,2)))
        if s.lag + th >= s.value or th==np.inf:
            break
    if verbose:
        print(f"ascent {t1-t0:.2f}s cuts {len(s.cuts_cost)} lag {s.lag:.5g} v0 {v0:.5g} -> {s.value:.5g} bound {s.bound:.5g} gap {(s.value-s.bound)/abs(s.value) if s.value<np.inf else np.nan:.4f} total {time.time()-t0:.2f}", info, "prices", s.prices)
    return Assignment(s.choice, s.value, s.bound, s.prices)
