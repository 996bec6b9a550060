"""Plans to compare with: chosen from the same influence by the same optimizer as ours, from fewer kinds of rules."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace

import numpy as np

from moa.errors import InfeasibleBudgetError, InputError
from moa.plan import ModelIdentity, Plan
from moa.search.optimize import optimize
from moa.search.rules import OptimizeConfig, RuleGrid

# grids of which the best is taken, the one with the cheapest rule first, and rules in a layer
_KINDS = {
    "per-layer": ((RuleGrid.proportional(),), 1),
    "per-head": ((RuleGrid.proportional(),), None),
    "binary-heads": ((RuleGrid.binary(128), RuleGrid.binary(256)), None),
}
NAMES = tuple(_KINDS)


def baseline(name: str, losses: Mapping[int, np.ndarray], model: ModelIdentity, density: float) -> Plan:
    """The best plan of a restricted kind.

    Parameters
    ----------
    name : str
        ``per-layer``: one share of N for all heads of a layer. ``per-head``: a share of N for each head.
        ``binary-heads``: heads that keep everything and heads that keep the sink and a window (DuoAttention), here
        ranked by influence; the window has 256 tokens or 128, whichever loses less.
    losses : dict of length to float64 [layers, kv_heads, W]
        As from `moa.search.profile.kv_losses`.
    model : ModelIdentity
    density : float
        At every profile length and twice the longest.

    Raises
    ------
    InputError
        If there is no such kind.
    InfeasibleBudgetError
        If no plan of the kind is within the density.
    """
    if name not in _KINDS:
        raise InputError(f"unknown baseline {name!r}; expected one of {', '.join(NAMES)}")
    (cheapest, *others), rules = _KINDS[name]
    config = OptimizeConfig(density, rules_per_layer=rules, grid=cheapest)
    found = optimize(losses, config)
    for grid in others:
        with suppress(InfeasibleBudgetError):
            found += optimize(losses, replace(config, grid=grid))
    best = min(found, key=lambda plan: sum(plan.losses.values()))
    return Plan.from_arrays(model, best.alpha, best.beta, provenance={"baseline": f"{name} {density}"})
