"""The descent: from the dense model down to a budget, by steps that each measured best.

Where the answer is already lost, one head more changes nothing; so plans are approached from above, where every head's
part can still be seen. A step shortens one head by a rung, and its price is the loss it costs for each token it saves.
Prices change with every step: of two heads that stand in for each other the second becomes precious when the first is
shortened. Measuring them all after each step would take too long. But as heads are shortened prices rise, as a rule;
so the price that was measured last says which steps cannot be the cheapest, and only those in front are measured again
(the accelerated greedy algorithm of Minoux, 1978). Now and then all are, since some fall: a head that copies what
another one found is worth nothing without it.

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
_STEP = 0.015  # of the tokens stored go between two looks at what is in front; a step may take more
_LEAST_LOOK = 5  # plans measured at a look
LEAST_EVALUATIONS = 6  # for each head; with fewer, steps would be taken that were not measured side by side


def ladder(budget: Budget) -> np.ndarray:
    """Numbers of the rules that the descent passes, from the dearest to the cheapest: int64 [rungs].

    At no length do these store a larger share than at the shortest one, so that a plan within the budget there is
    within it everywhere.
    """
    lengths = np.array(list(budget.rules.spans))
    share = budget.spans / lengths[:, None]
    below = (share.max(axis=0) <= share[0]) & (share[0] <= max(_WINDOW, share[0].min()))
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
        Called with the plan of which the plans to come are neighbours.

    Returns
    -------
    int64 [layers, heads]
    """
    descent = _Descent(loss, heads, budget, around)
    whole, limit = descent.stored, budget.limits(descent.place.size)[0]
    density = min(1.0, limit / whole)
    looks = max(1, min(ceil(log(density) / log(1 - _STEP)), evaluations // (2 * _LEAST_LOOK)))
    keep = density ** (2 * descent.place.size / evaluations)  # of the tokens stored, until all heads are measured again
    most = max(1, evaluations // (2 * looks) - 1)
    renewed = np.inf
    for goal in progress.track(whole * np.geomspace(1, density, looks + 1)[1:], "descend", total=looks):
        while descent.stored > max(goal, limit) and descent.place.min() < descent.foot:
            everywhere = descent.stored <= keep * renewed
            renewed = descent.stored if everywhere else renewed
            descent.look(max(goal, limit), most, everywhere)
    descent.take_back(limit)
    return descent.plan


class _Descent:
    """Where it stands: ``place`` int64 [layers, heads], each head's rung."""

    def __init__(
        self,
        loss: Callable[[np.ndarray], float],
        heads: tuple[int, int],
        budget: Budget,
        around: Callable[[np.ndarray], None],
    ):
        self.loss, self.around = loss, around
        self.rungs = ladder(budget)
        self.spans, self.foot = budget.spans[0, self.rungs], len(self.rungs) - 1
        self.place = np.zeros(heads, np.int64)
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

    def look(self, goal: float, most: int, everywhere: bool) -> None:
        """Take the cheapest steps until no more than ``goal`` tokens are stored.

        Plans that are measured differ in one head from the one it starts with: up to ``most`` of those in front, after
        those of all heads if it is to look everywhere.
        """
        self.around(self.plan)
        here = self.place.copy()
        alone = [self.loss(self.plan)] * here.size  # loss of the last plan measured that differs in this head
        ahead: list[int] = np.flatnonzero(here < self.foot).tolist()

        def measure(head: int) -> None:
            lower, rung = here.copy(), int(self.place.flat[head])
            lower.flat[head] = rung + 1
            before, alone[head] = alone[head], self.loss(self.rungs[lower])
            saved = int(self.spans[rung] - self.spans[rung + 1])
            # what seems to gain is chance; of steps that cost nothing the longest come first
            self.price[head] = max(0.0, alone[head] - before) / saved, -saved

        measured = set(ahead) if everywhere else set()  # heads whose next step was measured in this look
        for head in sorted(measured):
            measure(head)
        while ahead and self.stored > goal:
            head = min(ahead, key=self.price.__getitem__)
            if head not in measured and most:
                measure(head)
                measured.add(head)
                most -= 1
                continue
            measured.discard(head)
            self.place.flat[head] += 1
            self.paid[head, int(self.place.flat[head])] = self.price[head][0]
            if self.place.flat[head] == self.foot:
                ahead.remove(head)

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
