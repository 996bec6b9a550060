"""Plans to compare with: chosen from the same influence by the same optimizer as ours, from fewer kinds of rules."""

from collections.abc import Mapping

import numpy as np

from moa.errors import InputError
from moa.plan import ModelIdentity, Plan
from moa.search.optimize import OptimizeConfig, RuleGrid, optimize

# grid, and rules in a layer
_KINDS = {
    "per-layer": (RuleGrid.proportional(), 1),
    "per-head": (RuleGrid.proportional(), None),
    "binary-heads": (RuleGrid.binary(), None),
}
NAMES = tuple(_KINDS)


def baseline(name: str, losses: Mapping[int, np.ndarray], model: ModelIdentity, density: float) -> Plan:
    """The best plan of a restricted kind.

    Parameters
    ----------
    name : str
        ``per-layer``: one share of N for all heads of a layer. ``per-head``: a share of N for each head.
        ``binary-heads``: heads that keep everything and heads that keep the sink and 256 tokens (DuoAttention), here
        ranked by influence.
    losses : dict of length to float64 [layers, kv_heads, W]
        As from `moa.search.profile.kv_losses`.
    model : ModelIdentity
    density : float
        At every profile length and twice the longest.

    Raises
    ------
    InputError
        If there is no such kind, or no plan of it is within the density.
    """
    if name not in _KINDS:
        raise InputError(f"unknown baseline {name!r}; expected one of {', '.join(NAMES)}")
    grid, rules = _KINDS[name]
    found = optimize(losses, OptimizeConfig(density, rules_per_layer=rules, grid=grid))
    best = min(found, key=lambda plan: sum(plan.losses.values()))
    return Plan.from_arrays(model, best.alpha, best.beta, provenance={"baseline": f"{name} {density}"})
