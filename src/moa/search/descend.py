"""The descent: from the dense model down to a budget, each step the one that measured best.

Where the answer is already lost, one head more changes nothing; so plans are approached from above, where every head's
part can still be seen. A round measures, for each head alone, one step down, and takes the steps that cost least for
the tokens they save, until a few percent of what is stored are gone; the next round measures again, because of two
heads that stand in for each other the second became precious when the first was shortened.

The last step may go below the budget by what a head stores. So in the end the dearest steps that fit are taken back.

A head goes from all of the text to a quarter of it in one step. Half a text would keep half of the facts at half the
price, which looks like a fair step, and a model of such heads knows half of everything.
"""

from collections.abc import Callable, Sequence

import numpy as np

from moa.progress import SILENT, Progress
from moa.search.exchange import Budget

_WINDOW = 1 / 4  # share of the text that a head below the top of the ladder sees at most
_RUNG = 3 / 4  # of the rung above, at most
_LEAST_SHRINK = 0.07  # of the tokens stored go in a round
LEAST_ROUNDS = 6  # fewer would take steps that were not measured side by side


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
    rounds: int,
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
        Its limit at the shortest length counts; rules per layer do not.
    rounds : int
        As many rounds, or fewer; where the ladder ends before the budget, the foot of the ladder is the answer.
    around : callable, optional
        Called with the plan of which all plans of a round are neighbours.

    Returns
    -------
    int64 [layers, heads]
    """
    rungs = ladder(budget)
    spans = budget.spans[0, rungs]
    limit = budget.limits(int(np.prod(heads)))[0]
    place = np.zeros(heads, np.int64)
    keep = min(1 - _LEAST_SHRINK, budget.config.density ** (1 / rounds))
    paid: dict[tuple[int, int], float] = {}  # by head and rung reached: loss for each token saved, when it was taken
    while spans[place].sum() > limit and place.min() < len(rungs) - 1:
        density = spans[place].sum() / spans[0] / place.size
        around(rungs[place])
        standing = loss(rungs[place])
        candidates: Sequence[int] = np.flatnonzero(place < len(rungs) - 1).tolist()
        price: dict[int, tuple[float, int]] = {}
        for head in progress.track(candidates, f"descend from density {density:.3f}, loss {standing:.4f}"):
            lower = place.copy()
            lower.flat[head] += 1
            saved = spans[place.flat[head]] - spans[lower.flat[head]]
            # what seems to gain is chance; of steps that cost nothing the longest come first
            price[head] = max(0.0, loss(rungs[lower]) - standing) / saved, -saved
        goal = max(limit, keep * spans[place].sum())
        for head in sorted(price, key=price.__getitem__):
            if spans[place].sum() <= goal:
                break
            place.flat[head] += 1
            paid[head, int(place.flat[head])] = price[head][0]
    room = limit - spans[place].sum()
    while True:
        back = [step for step in paid if place.flat[step[0]] == step[1] and spans[step[1] - 1] - spans[step[1]] <= room]
        if not back:
            return rungs[place]
        head, rung = max(back, key=paid.__getitem__)
        place.flat[head] -= 1
        room -= spans[rung - 1] - spans[rung]
