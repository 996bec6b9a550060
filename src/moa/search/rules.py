"""The rules a head may have, what they store, and the budget for all heads.

A `RuleGrid` is a set of elastic rules; `Rules` are those of it that differ at the lengths that count, with their spans
there, by rising cost. The optimizer and the measured steps of refine number rules by these.
"""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moa.errors import InputError
from moa.plan import BLOCK, SINK, ElasticRule, check_density, elastic_spans
from moa.search.tables import SHORTEST, entry

_SLOPES = (*(step / 32 for step in range(1, 8)), *(step / 16 for step in range(4, 17)))


@dataclass(frozen=True)
class RuleGrid:
    """The elastic rules among which every head chooses."""

    rules: tuple[ElasticRule, ...]

    def __post_init__(self) -> None:
        if not self.rules:
            raise InputError("the rule grid is empty: give at least one ElasticRule")

    @classmethod
    def paper(cls) -> "RuleGrid":
        """The paper's 54 rules: 6 values of alpha over [-2048, 8192], 9 of beta over [0, 1]."""
        return cls(_product(np.linspace(-2048, 8192, 6), np.linspace(0, 1, 9)))

    @classmethod
    def proportional(cls) -> "RuleGrid":
        """Shares of N and nothing else: beta in steps of 1/32 up to 1/4 and of 1/16 up to 1."""
        return cls(_product([0.0], _SLOPES))

    @classmethod
    def binary(cls, window: int = 256) -> "RuleGrid":
        """Everything, or the sink and one window: the full and streaming heads of DuoAttention."""
        return cls((ElasticRule(float(SINK + window), 0.0), ElasticRule(0.0, 1.0)))

    @classmethod
    def scaled(cls, longest: int, sink: int = SINK, block: int = BLOCK) -> "RuleGrid":
        """Some two hundred rules that scale with the longest profile length.

        Constant spans, finer where they are short, from the shortest on; small shares of N, for heads that are short at
        short lengths and need not stay as short; and alpha + beta * N, with beta in steps of 1/32 up to 1/4
        and of 1/16 up to 1, and alpha in whole blocks from ``-longest / 2`` to ``longest / 2``. The full rule (0, 1) is
        one of them. Rules ``2 N - L`` see all from L on and little at L / 2:
        where a budget has room for few full heads at short lengths, and for more at long ones; measuring alone finds
        them, since loss tables say nothing about spans as short as theirs at L / 2.
        """
        shortest = int(elastic_spans(0.0, 0.0, 1 << 62, sink, block))
        steps = {step * block << power for power in range(longest.bit_length()) for step in (2, 3)}
        constants = [shortest, *sorted(alpha for alpha in steps if shortest < alpha < longest)]
        small = [part / (1 << power) for power in range(6, longest.bit_length()) for part in (1, 3)]
        shifts = {
            sign * block * round(longest * part / block)
            for part in (0, 1 / 16, 1 / 8, 1 / 4, 1 / 2)
            for sign in (-1, 1)
        }
        switches = [-block * round(longest * part / block) for part in (1, 1 / 2)]
        return cls(
            _product(constants, [0.0])
            + _product([0.0], [slope for slope in small if slope * longest >= shortest])
            + _product(sorted(shifts), _SLOPES)
            + _product(switches, [2.0])
        )


def _product(alphas: Iterable[float], betas: Iterable[float]) -> tuple[ElasticRule, ...]:
    return tuple(ElasticRule(float(alpha), float(beta)) for alpha, beta in itertools.product(alphas, betas))


@dataclass(frozen=True)
class OptimizeConfig:
    """What a plan may cost and how it is searched.

    Attributes
    ----------
    density : float
        Largest mean over heads of span(N) / N, at every constrained length.
    lengths_constrained : tuple of int or None
        Lengths N that must meet the density besides the profile lengths; None: twice the longest profile length.
    rules_per_layer : int or None
        At most so many distinct rules in a layer: 1, 2 (the paper), or None for any number.
    points : int
        Points in which the range of each objective is cut.
    grid : RuleGrid or None
        None: `RuleGrid.scaled` of the longest profile length.
    gap : float
        Relative distance from the optimum that a plan may have.
    sink, block : int
        As in `moa.plan.Plan`.
    """

    density: float
    lengths_constrained: tuple[int, ...] | None = None
    rules_per_layer: int | None = None
    points: int = 5
    grid: RuleGrid | None = None
    gap: float = 0.01
    sink: int = SINK
    block: int = BLOCK

    def __post_init__(self) -> None:
        check_density(self.density)
        if self.rules_per_layer not in (None, 1, 2):
            raise InputError(
                f"rules_per_layer {self.rules_per_layer} is not possible: give 1 or 2, or None for any number"
            )
        if self.points < 1:
            raise InputError(f"points {self.points} is not possible: give at least 1")
        if not 0 < self.gap < 1:
            raise InputError(f"gap {self.gap} is not possible: give a share between 0 and 1, such as 0.01")
        if self.sink < 0 or self.block < 1:
            raise InputError(f"sink {self.sink} and block {self.block} must be at least 0 and 1")
        if min(self.lengths_constrained or (1,)) < 1:
            raise InputError(f"lengths_constrained {self.lengths_constrained} must be token counts of at least 1")


def density_of(total_span: float, heads: int, length: int) -> float:
    """As `Plan.density` computes it, to the last bit."""
    return float(total_span / heads / length)


def largest_total(density: float, heads: int, length: int) -> int:
    """The most tokens that all heads may store together, so that their density is not above ``density``."""
    total = int(density * heads * length) + 1
    while density_of(total, heads, length) > density:
        total -= 1
    return total


@dataclass(frozen=True)
class Rules:
    """Rules that differ at some constrained length, by rising cost: alpha, beta [rules], spans[N] int64 [rules]."""

    alpha: np.ndarray
    beta: np.ndarray
    spans: dict[int, np.ndarray]

    @classmethod
    def of(cls, grid: RuleGrid, lengths: Sequence[int], config: OptimizeConfig) -> "Rules":
        alpha = np.array([rule.alpha for rule in grid.rules])
        beta = np.array([rule.beta for rule in grid.rules])
        if not (np.isfinite(alpha).all() and np.isfinite(beta).all()):
            raise InputError("the rule grid holds an alpha or beta that is not a finite number")
        spans = np.stack([elastic_spans(alpha, beta, length, config.sink, config.block) for length in lengths])
        # Of rules with equal spans at all these lengths the one with the smallest shift stays: its density changes
        # least beyond them.
        order = np.lexsort((beta, alpha, np.abs(alpha), (spans / np.array(lengths)[:, None]).sum(axis=0)))
        _, first = np.unique(spans[:, order], axis=1, return_index=True)
        order = order[np.sort(first)]
        return cls(alpha[order], beta[order], {length: row[order] for length, row in zip(lengths, spans, strict=True)})

    @classmethod
    def within(cls, lengths: Iterable[int], config: OptimizeConfig) -> "Rules":
        """The rules of a config for these profile lengths, told apart at these and at the constrained lengths."""
        longest = max(lengths)
        extra = (2 * longest,) if config.lengths_constrained is None else config.lengths_constrained
        grid = config.grid or RuleGrid.scaled(longest, config.sink, config.block)
        return cls.of(grid, sorted({*lengths, *extra}), config)

    def numbers(self, alpha: np.ndarray, beta: np.ndarray) -> np.ndarray:
        """Numbers of these rules, as they come from `optimize`: int64, shape of alpha and beta."""
        number = {rule: index for index, rule in enumerate(zip(self.alpha, self.beta, strict=True))}
        return np.array([number[rule] for rule in zip(alpha.flat, beta.flat, strict=True)]).reshape(alpha.shape)

    def losses(self, length: int, tables: Mapping[int, np.ndarray]) -> np.ndarray:
        """Loss of every rule at one length: [..., rules], where tables are [..., windows].

        At a length that was not profiled, a guess: the loss at the nearest one that was, at the same density.
        """
        spans = self.spans[length]
        profiled = min(tables, key=lambda other: abs(math.log(other / length)))
        return np.where(spans >= length, 0.0, tables[profiled][..., entry(spans * profiled // length)])

    def told_by(self, lengths: Iterable[int]) -> "Rules":
        """The rules of which the loss tables of these lengths know."""
        known = np.logical_and.reduce([self.spans[length] >= min(SHORTEST, length) for length in lengths])
        if not known.any():
            raise InputError(f"all rules of the grid have spans below {SHORTEST}, where loss tables begin; add longer")
        return Rules(self.alpha[known], self.beta[known], {length: row[known] for length, row in self.spans.items()})
