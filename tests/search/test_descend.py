"""The descent keeps what only shows once other heads are gone, and ends within the budget."""

import numpy as np
import pytest

from moa.search.descend import LEAST_EVALUATIONS, descend, ladder
from moa.search.exchange import Budget
from moa.search.rules import OptimizeConfig, RuleGrid, Rules

LENGTHS = (2048, 4096, 8192)
SHAPE = (6, 2)


def budget(density, grid=None, lengths=LENGTHS):
    config = OptimizeConfig(density, grid=grid)
    return Budget(Rules.within(lengths, config), config)


def reach(budget, plan):
    """Share of the text that each head sees at the shortest length: [layers, heads]."""
    return budget.spans[0][plan] / LENGTHS[0]


@pytest.mark.parametrize(("density", "shortest"), [(0.1, 32), (0.125, 32), (0.25, 64), (0.3, 96), (0.75, 192)])
def test_the_ladder_goes_from_all_to_a_quarter_and_to_an_eighth_of_the_mean(density, shortest):
    some = budget(density)
    spans = some.spans[:, ladder(some)]
    rungs = [2048, 512, 384, 256, 192, 128, 96, 64, 48, 32]
    assert spans[0].tolist() == rungs[: rungs.index(shortest) + 1]
    assert spans[0, -1] >= density * 2048 / 8
    shares = spans / np.array(list(some.rules.spans))[:, None]
    assert (shares.max(0) == shares[0]).all(), "no dearer at longer lengths"


@pytest.mark.parametrize("lengths", [LENGTHS, (8192,)])
def test_the_ladder_of_another_grid_has_its_rules(lengths):
    """Where the grid has none between, heads go below an eighth of the mean: 512 of 8192 at one half."""
    some = budget(0.5, RuleGrid.binary(), lengths)
    assert some.rules.spans[8192][ladder(some)].tolist() == [8192, 272]


@pytest.mark.parametrize("density", [0.1, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("evaluations", [LEAST_EVALUATIONS * 12, 360])
def test_the_plan_is_within_the_budget_at_all_lengths_and_close_to_it(density, evaluations):
    some = budget(density)
    price = np.random.default_rng(0).random(SHAPE)
    plan = descend(lambda plan: float(((1 - reach(some, plan)) * price).sum()), SHAPE, some, evaluations)
    assert some.fits(plan)
    stored, rungs = some.spans[0][plan].sum(), ladder(some)
    place = [int(np.flatnonzero(rungs == rule)[0]) for rule in plan.flat]
    steps = [some.spans[0][rungs[at - 1]] - some.spans[0][rungs[at]] for at in place if at]
    assert stored + min(steps) > some.limits(plan.size)[0], "no step can be taken back"


@pytest.mark.parametrize("pair", [((0, 0), (0, 1)), ((0, 0), (3, 1)), ((5, 0), (5, 1))])
def test_heads_that_stand_in_for_each_other_are_not_both_shortened(pair):
    """Each alone costs least of all heads."""
    some = budget(0.3)

    def loss(plan):
        seen = reach(some, plan)
        return 10 * (1 - max(seen[head] for head in pair)) + 0.1 * float(
            (1 - seen).sum() - 2 + sum(map(seen.__getitem__, pair))
        )

    seen = reach(some, descend(loss, SHAPE, some, 144))
    assert sorted(seen[head] for head in pair)[1] == 1
    assert sorted(seen[head] for head in pair)[0] < 1 / 4


def greedy(loss, some):
    """The definition: before each step all heads are measured."""
    rungs, place = ladder(some), np.zeros(SHAPE, np.int64)
    spans = some.spans[0][rungs]

    def after(head):
        lower = place.copy()
        lower.flat[head] += 1
        return lower

    while spans[place].sum() > some.limits(place.size)[0]:
        price = {
            head: (loss(rungs[after(head)]) - loss(rungs[place])) / (spans[place] - spans[after(head)]).sum()
            for head in np.flatnonzero(place < len(rungs) - 1)
        }
        place = after(min(price, key=price.__getitem__))
    return rungs[place]


@pytest.mark.parametrize("seed", range(4))
def test_measuring_what_is_in_front_is_as_good_as_measuring_all(seed):
    """Prices of heads depend on each other and rise, unevenly."""
    some, measured = budget(0.25), []
    random = np.random.default_rng(seed)
    worth, together = random.gamma(0.5, size=12), random.gamma(0.5, size=(12, 12)) ** 2

    def loss(plan):
        measured.append(plan)
        gone = 1 - reach(some, plan).reshape(-1)
        return float(gone**2 @ worth + gone @ together @ gone)

    plan = descend(loss, SHAPE, some, 144)
    assert len(measured) <= 144
    assert loss(plan) <= 1.01 * loss(greedy(loss, some))


def test_plans_are_near_the_one_it_was_told_that_they_are_around():
    some, told = budget(0.25), []

    def loss(plan):
        assert (plan != told[-1]).sum() <= 3
        return float((1 - reach(some, plan)).sum())

    descend(loss, SHAPE, some, 240, around=told.append)
    assert len(told) >= 12, "as often as a head goes from all of the text to a quarter"


def test_what_seems_to_gain_is_worth_no_more_than_what_costs_nothing():
    some = budget(11.3 / 12)

    def loss(plan):
        seen = reach(some, plan)
        return float(1 - seen[1:5].mean()) - 0.01 * (1 - seen[5, 1])

    seen = reach(some, descend(loss, SHAPE, some, 144))
    assert seen[0, 0] == 1 / 4, "the first of several"
    assert seen[5, 1] == 1


def test_a_head_that_has_become_worthless_is_found():
    """The first head copies what the second found: once that one is short, it is nothing that matters."""
    some = budget(0.41)

    def loss(plan):
        seen = reach(some, plan)
        others = float((1 - seen[1:]).sum())
        return (1 - seen[0, 1]) + 50 * (1 - seen[0, 0]) * (seen[0, 1] > 0.99) + 10 * others

    seen = reach(some, descend(loss, SHAPE, some, 144))
    assert seen[0].max() < 1 / 8
    assert seen[1:].min() >= 1 / 4, "what they store no more the others do"


def test_the_dearest_step_that_fits_is_taken_back():
    """The last step saves 1536 tokens, 178 too many: room for one of the two that saved 128 before."""
    some = budget(19_890 / (12 * 2048))
    rungs = ladder(some)
    spans = some.spans[0][rungs]
    price = np.full((12, len(rungs)), 50.0)  # of a token, by head and rung reached
    price[0, 1] = price[1, 1] = 0
    price[:3, 2] = 1, 2, 50
    price[2, 1] = 3

    def loss(plan):
        steps = [range(1, int(np.flatnonzero(rungs == rule)[0]) + 1) for rule in plan.flat]
        return sum(price[head, rung] * (spans[rung - 1] - spans[rung]) for head in range(12) for rung in steps[head])

    plan = descend(loss, SHAPE, some, LEAST_EVALUATIONS * 12)
    assert some.spans[0][plan].reshape(-1).tolist() == [384, 512, 512, *[2048] * 9]


def test_the_allowance_is_kept_and_a_larger_one_is_used():
    """Prices that depend on each other: without a limit a hundred plans and more would be measured."""
    some, counts = budget(0.25), []
    together = np.random.default_rng(0).gamma(0.5, size=(12, 12)) ** 2
    for evaluations in (LEAST_EVALUATIONS * 12, 144):
        measured = []

        def loss(plan, measured=measured):
            measured.append(plan)
            gone = 1 - reach(some, plan).reshape(-1)
            return float(gone @ together @ gone)

        descend(loss, SHAPE, some, evaluations)
        assert len(measured) <= evaluations
        counts.append(len(measured))
    assert counts[0] < counts[1]


def test_where_the_ladder_ends_above_the_budget_its_foot_is_the_answer():
    some = budget(0.2)  # at 2048 all heads at the foot are 1/64
    tight = Budget(some.rules, OptimizeConfig(0.01))
    assert (descend(lambda plan: 0.0, SHAPE, tight, 120) == ladder(tight)[-1]).all()
