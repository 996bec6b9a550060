"""The descent: from the dense model down to a budget, one measured step after another.

Where the answer is already lost, one head more changes nothing; so plans are approached from above, where every head's
part can still be seen. A step shortens one head by a rung, and its price is the loss it costs for each token it saves.
Prices change with every step: of two heads that stand in for each other the second becomes precious when the first is
shortened. Measuring them all after each step would take too long. But as heads are shortened prices rise, as a rule;
so the price that was measured last says which steps cannot be the cheapest, and only those in front are measured again
(the accelerated greedy algorithm of Minoux, 1978), as far as the allowance goes. Now and then all are, since some fall:
a head that copies what another one found is worth nothing without it.

The last step may go below the budget by what a head stores. So in the end the dearest steps that fit are taken back.

A head goes from all of the text to a quarter of it in one step. Half a text would keep half of the facts at half the
price, which looks like a fair step, and a model of such heads knows half of everything.
"""

from collections.abc import Callable
from math import ceil, log

import numpy as np

from moa.progress import SILENT, Progress
from moa.search.exchange import Budget

_WINDOW = 1 / 4  # share of the text that a head below the top of the ladder sees at most
_RUNG = 3 / 4  # of the rung above, at most
_STAGE = 0.015  # of the tokens stored go between two plans that others are neighbours of; a step may take more
_LEAST_STAGE = 5  # plans measured in a stage, or stages are fewer
LEAST_EVALUATIONS = 6  # for each head; with fewer, most steps would be taken at a price of long ago


def ladder(budget: Budget) -> np.ndarray:
    """Numbers of the rules that the descent passes, from the dearest to the cheapest: int64 [rungs].

    At no length do these store a larger share than at the shortest one, so that a plan within the budget there is
    within it everywhere. They end where `Budget.worth_measuring` does.
    """
    lengths = np.array(list(budget.rules.spans))
    share = budget.spans / lengths[:, None]
    known = budget.worth_measuring
    below = known & (share.max(axis=0) <= share[0]) & (share[0] <= max(_WINDOW, share[0, known].min()))
    rungs = [budget.spans.shape[1] - 1]
    for span in np.unique(budget.spans[0, below])[::-1]:
        if span <= _RUNG * budget.spans[0, rungs[-1]]:
            rungs.append(int(np.flatnonzero(below & (budget.spans[0] == span))[-1]))
    return np.array(rungs)


def descend(
    loss: Callable[[np.ndarray], float],
    heads: tuple[int, int],
    budget: Budget,
    evaluations: int,
    progress: Progress = SILENT,
    around: Callable[[np.ndarray], None] = lambda plan: None,
) -> np.ndarray:
    """A plan that is within the budget's density, reached by measured steps.

    Parameters
    ----------
    loss : callable
        Loss of a plan, an int64 array [layers, heads] of numbers of rules.
    heads : (layers, heads)
    budget : Budget
        Its limit at the shortest length counts; rules per layer do not. Where the ladder ends before the budget, the
        foot of the ladder is the answer.
    evaluations : int
        Plans to measure, about: half of them of all heads side by side, half of those in front.
    around : callable, optional
        Called with a plan from which the plans to come differ in a head or a few.

    Returns
    -------
    int64 [layers, heads]
    """
    descent = _Descent(loss, heads, budget)
    whole, limit = descent.stored, budget.limits(descent.place.size)[0]
    density = min(1.0, limit / whole)
    stages = max(1, min(ceil(log(density) / log(1 - _STAGE)), evaluations // (2 * _LEAST_STAGE)))
    keep = density ** (2 * descent.place.size / evaluations)  # of the tokens stored, until all heads are measured again
    renewed = np.inf
    for goal in progress.track(whole * np.geomspace(1, density, stages + 1)[1:], "descend", total=stages):
        descent.allowance += evaluations / (2 * stages)
        goal = max(goal, limit)
        if descent.done(goal):
            continue
        around(descent.plan)
        if descent.stored <= keep * renewed:
            descent.measure_all()
            renewed = descent.stored
        while not descent.done(goal):
            descent.step()
    descent.take_back(limit)
    return descent.plan


class _Descent:
    """Where it stands: ``place`` int64 [layers, heads], each head's rung."""

    def __init__(self, loss: Callable[[np.ndarray], float], heads: tuple[int, int], budget: Budget):
        self.loss = loss
        self.rungs = ladder(budget)
        self.spans, self.foot = budget.spans[0, self.rungs], len(self.rungs) - 1
        self.place = np.zeros(heads, np.int64)
        self.allowance = 0.0  # plans that may be measured before a step is taken
        self.standing: float | None = None  # loss of the plan it stands at, where that is known
        self.after: dict[int, float] = {}  # by head: loss of that plan after the head's next step
        # of each head's next step, as last measured: loss for each token saved, and tokens saved
        self.price: dict[int, tuple[float, int]] = {}
        self.paid: dict[tuple[int, int], float] = {}  # by head and rung reached, when the step was taken

    @property
    def plan(self) -> np.ndarray:
        rules: np.ndarray = self.rungs[self.place]
        return rules

    @property
    def stored(self) -> int:
        return int(self.spans[self.place].sum())

    def done(self, goal: float) -> bool:
        """Whether no more than ``goal`` tokens are stored, or no head has a step left."""
        return self.stored <= goal or bool(self.place.min() == self.foot)

    def measure_all(self) -> None:
        """Price every head's next step, at no charge."""
        for head in np.flatnonzero(self.place < self.foot).tolist():
            self.measure(head)

    def measure(self, head: int) -> None:
        """Price one head's next step."""
        if self.standing is None:
            self.standing = self.loss(self.plan)
        rung = int(self.place.flat[head])
        lower = self.place.copy()
        lower.flat[head] = rung + 1
        self.after[head] = self.loss(self.rungs[lower])
        saved = int(self.spans[rung] - self.spans[rung + 1])
        # what seems to gain is chance; of steps that cost nothing the longest come first
        self.price[head] = max(0.0, self.after[head] - self.standing) / saved, -saved

    def step(self) -> None:
        """Take the cheapest step, after measuring those in front as long as the allowance lasts."""
        ahead = np.flatnonzero(self.place < self.foot).tolist()
        while True:
            head = min(ahead, key=self.price.__getitem__)
            if head in self.after or self.allowance < 1:
                break
            self.measure(head)
            self.allowance -= 1
        self.place.flat[head] += 1
        self.paid[head, int(self.place.flat[head])] = self.price[head][0]
        self.standing = self.after.get(head)
        self.after.clear()

    def take_back(self, limit: int) -> None:
        """Undo last steps of heads, the dearest first, as long as no more than ``limit`` tokens are stored."""
        while True:
            room = limit - self.stored
            back = [
                (head, rung)
                for head, rung in self.paid
                if self.place.flat[head] == rung and self.spans[rung - 1] - self.spans[rung] <= room
            ]
            if not back:
                return
            head, _ = max(back, key=self.paid.__getitem__)
            self.place.flat[head] -= 1
