"""From a plan to what an engine with pages can serve: few groups of heads, each with one span.

A paged engine gives every group of heads its own table of pages, and all pages have one size. So a page holds the keys
and values of some tokens for as many heads as a group has, groups are equally large, and there are few of them. The
heads are put in order of their spans and cut into groups of one size; each head is given the largest span of its group,
so that no head sees less than the plan says. Nothing is lost to padding; what the larger spans cost is in `density`.
Several ranks are first dealt heads of like spans (`moa.serving.deal`), since groups are the same on all of them.
"""

import hashlib
from dataclasses import dataclass

import numpy as np

from moa.errors import PlanError
from moa.plan import Plan
from moa.serving.deal import deal

MOST_GROUPS = 16  # more would follow plans more closely; each takes the engine's host some time in every step


@dataclass(frozen=True)
class HeadGroups:
    """Heads by groups of one span, for sequences of up to ``length`` tokens.

    Attributes
    ----------
    plan : Plan
        What is served: a constant span for each head.
    order : int64 [layers, kv_heads]
        The model's heads as the ranks have them: the first equal share is rank 0's.
    place : int64 [layers, kv_heads]
        Each of ``order``'s heads' place among those of its rank, by falling span; ``size`` neighbours make a group.
    spans : int64 [groups]
        Tokens that a head of the group sees, sink included; falling.
    size : int
        Heads of a group on each rank.
    length : int
    ranks : int
        Tensor-parallel ranks; each has an equal share of every group's heads.
    """

    plan: Plan
    order: np.ndarray
    place: np.ndarray
    spans: np.ndarray
    size: int
    length: int
    ranks: int

    @property
    def dealt(self) -> bool:
        """Whether any head has another place than in the model."""
        return bool((self.order != np.arange(self.order.shape[1])).any())

    @property
    def density(self) -> float:
        """Stored KV tokens over all KV tokens at ``length``."""
        return self.plan.density(self.length)

    def digest(self) -> str:
        """Tells these groups from others."""
        parts = [self.order, self.place, self.spans, np.array([self.size, self.plan.sink])]
        return hashlib.sha256(repr([part.tolist() for part in parts]).encode()).hexdigest()[:16]


def head_groups(plan: Plan, length: int, ranks: int = 1, most: int = MOST_GROUPS, deals: bool = True) -> HeadGroups:
    """The groups that store least, of all ways to cut the heads into at most ``most`` groups of one size.

    Parameters
    ----------
    plan : Plan
    length : int
        N, at which the plan's rules are resolved: the longest sequence served. Shorter ones get the same spans.
    ranks : int
        Tensor-parallel ranks, each with its share of every layer's KV heads.
    most : int
    deals : bool
        Whether heads can be dealt to the ranks; else each has the neighbouring ones that it has in the model.

    Raises
    ------
    PlanError
        If the KV heads cannot be shared out to so many ranks.
    """
    layers, heads = plan.model.layers, plan.model.kv_heads
    if heads % ranks:
        raise PlanError(
            f"the model has {heads} KV heads, which {ranks} tensor-parallel ranks cannot share equally; use a number "
            f"of ranks that divides {heads}"
        )
    spans = plan.spans(length)
    order = deal(spans, ranks) if deals and ranks > 1 else np.tile(np.arange(heads), (layers, 1))
    # [ranks, heads of a rank]
    of_rank = np.take_along_axis(spans, order, 1).reshape(layers, ranks, -1).transpose(1, 0, 2).reshape(ranks, -1)
    falling = np.argsort(-of_rank, axis=1, kind="stable")
    longest = np.take_along_axis(of_rank, falling, 1).max(0)  # of the heads at each place, over ranks
    each = of_rank.shape[1]
    cuts = [count for count in range(1, min(most, each) + 1) if each % count == 0]
    groups = min(cuts, key=lambda count: (longest[:: each // count].sum() * (each // count), count))
    size = each // groups
    place = np.empty_like(of_rank)
    np.put_along_axis(place, falling, np.broadcast_to(np.arange(each), of_rank.shape), 1)
    place = place.reshape(ranks, layers, heads // ranks).transpose(1, 0, 2).reshape(layers, heads)
    of_group = longest[::size]
    served = np.empty(place.shape)
    np.put_along_axis(served, order, of_group[place // size].astype(float), 1)
    return HeadGroups(
        Plan.from_arrays(
            plan.model,
            served,
            np.zeros(place.shape),
            plan.sink,
            plan.block,
            {**plan.provenance, "served": {"length": length, "ranks": ranks, "groups": int(groups)}},
        ),
        order,
        place,
        of_group,
        size,
        length,
        ranks,
    )
