"""What a search is asked for: the data that it measures on, and what the plan may cost."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from moa.errors import InputError
from moa.search.calibrate import RETRIEVAL, SOURCES, SUMMARY, TEXT
from moa.search.defaults import ITEMS, VALIDATION_ITEMS
from moa.search.rules import OptimizeConfig, RuleGrid

# By density, what sources count. With an eighth of the KV cache text and facts compete for every head, and with more
# weight on text no head is left for facts; with half there is room for both, and summaries keep answers close to the
# dense model's. From Qwen2.5-0.5B-Instruct, see docs/accuracy.md.
_DENSITIES = (0.125, 0.25, 0.5, 0.75)
_WEIGHTS = {RETRIEVAL: (1.0, 1.0, 1.0, 1.0), SUMMARY: (0.2, 0.5, 1.0, 2.0), TEXT: (1.4, 2.3, 0.5, 0.8)}


def default_weights(density: float, sources: Collection[str]) -> dict[str, float]:
    """Weights of calibration sources for plans of a density: as measured at four densities, between them interpolated.

    Beyond them the nearest holds.
    """
    return {source: round(float(np.interp(density, _DENSITIES, _WEIGHTS[source])), 4) for source in sorted(sources)}


@dataclass(frozen=True)
class DataConfig:
    """What is calibrated and validated on.

    Attributes
    ----------
    lengths : tuple of int, optional
        Profile lengths; by default L/4, L/2 and L with L = 8192, or less where the model's context is shorter.
    validation_length : int, optional
        Held-out items have this length and the profile lengths; by default half as long again as the longest of them.
    items, validation_items : int
        Items per length and source.
    weights : dict, optional
        Calibration sources, and what each one counts, in loss tables and in measured losses; by default all of them,
        weighted by the plan's density (`default_weights`).
    seed : int
    """

    lengths: tuple[int, ...] | None = None
    validation_length: int | None = None
    items: int = ITEMS
    validation_items: int = VALIDATION_ITEMS
    weights: Mapping[str, float] | None = None
    seed: int = 0

    @property
    def sources(self) -> tuple[str, ...]:
        """Calibration sources, by name."""
        return tuple(sorted(SOURCES if self.weights is None else self.weights))

    def resolved(self, context_length: int) -> "DataConfig":
        """With the default lengths for a model of this context filled in.

        Raises
        ------
        InputError
            If a length is beyond the context, or nothing is asked for.
        """
        lengths = self.lengths
        if lengths == () or self.items < 1 or self.validation_items < 1:
            raise InputError("a search needs at least one length, one item and one validation item")
        if lengths is None:
            longest = min(8192, 64 * int(context_length / 1.5 // 64))
            lengths = tuple(sorted({64 * (longest // share // 64) for share in (4, 2, 1)}))
        validation = self.validation_length or 64 * round(1.5 * max(lengths) / 64)
        if self.validation_length is None:
            validation = min(validation, context_length)
        for length in (*lengths, validation):
            if length > context_length:
                raise InputError(
                    f"length {length} is beyond the model's context of {context_length} tokens; give shorter --lengths"
                )
        return replace(self, lengths=tuple(sorted(set(lengths))), validation_length=validation)


@dataclass(frozen=True)
class BudgetConfig:
    """What the plan may cost.

    Attributes
    ----------
    density : float
        Stored KV tokens over all KV tokens, at every constrained length.
    constrained : tuple of int, optional
        Lengths beside the profile lengths at which the density must hold; by default twice the longest.
    rules_per_layer : int, optional
        At most so many distinct rules in a layer (the paper: 2).
    grid : str
        "scaled", "paper", "proportional" or "binary"; see `moa.search.rules.RuleGrid`.
    points : int
        Cuts of each objective's range.
    evaluations : int, optional
        Plans to measure in the refine stage; 0 leaves it out. By default 800, and at least ten for each KV head; half
        as many, on up to twice the items, from a density of 0.5 on (`moa.search.refine.plans_to_measure`).
    """

    density: float = 0.5
    constrained: tuple[int, ...] | None = None
    rules_per_layer: int | None = None
    grid: str = "scaled"
    points: int = 1
    evaluations: int | None = None

    def config(self, lengths: Iterable[int]) -> OptimizeConfig:
        """What the optimizer takes, for these profile lengths.

        Raises
        ------
        InputError
            If there is no such grid.
        """
        longest = max(lengths)
        grids = {
            "scaled": RuleGrid.scaled(longest),
            "paper": RuleGrid.paper(),
            "proportional": RuleGrid.proportional(),
            "binary": RuleGrid.binary(),
        }
        if self.grid not in grids:
            raise InputError(f"unknown grid {self.grid!r}; expected one of {sorted(grids)}")
        return OptimizeConfig(
            density=self.density,
            lengths_constrained=(2 * longest,) if self.constrained is None else self.constrained,
            rules_per_layer=self.rules_per_layer,
            points=self.points,
            grid=grids[self.grid],
        )
