"""The five stages in order.

    text -> calibrate -> profile -> optimize -> refine -> validate -> plan

Each stage is a function from the last stage's result to the next; `moa.search.run` remembers what is done.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from moa.errors import InputError
from moa.files import read_json, write_json
from moa.models import LoadedModel
from moa.plan import BLOCK, SINK, ModelIdentity, Plan, check_density
from moa.progress import SILENT, Progress
from moa.search.calibrate import TEXT_LOSS, CalibrateConfig, calibrate
from moa.search.coherent import candidates
from moa.search.divergence import MEASURE
from moa.search.facts import FACTS, HELD_OUT_FACTS
from moa.search.influence import Estimator
from moa.search.items import CalibrationSet
from moa.search.optimize import ParetoPlan, optimize
from moa.search.profile import Profile, ProfileConfig, item_losses, mean_losses, profile
from moa.search.refine import SINKS, plans_to_measure, refine, tokens_to_measure
from moa.search.run import Run
from moa.search.settings import BudgetConfig, DataConfig, default_weights
from moa.search.tables import SHORTEST
from moa.search.text import TextSource, split_text
from moa.search.validate import RULE, ValidationRow, best, lowest_of, validate

_HELD_OUT = 0.25  # share of the text that only validation sees


@dataclass(frozen=True)
class Calibration:
    """Result of the calibrate stage, for both later uses."""

    profile: CalibrationSet
    validation: CalibrationSet

    def save(self, folder: Path) -> None:
        self.profile.save(folder / "items.safetensors")
        self.validation.save(folder / "validation.safetensors")

    @classmethod
    def load(cls, folder: Path) -> "Calibration":
        return cls(
            CalibrationSet.load(folder / "items.safetensors"), CalibrationSet.load(folder / "validation.safetensors")
        )


def run_calibrate(run: Run, loaded: LoadedModel, text: TextSource, data: DataConfig) -> tuple[Calibration, str]:
    """First stage: items for profiling, and items for validation: other text, other kinds of facts."""
    data = data.resolved(loaded.context_length)
    lengths = data.lengths or ()
    validation_lengths = (*lengths, data.validation_length or 0)
    inputs = {
        "model": asdict(loaded.identity),
        "name": loaded.name,
        "weights": loaded.weights,
        "dtype": str(loaded.model.dtype),
        "text": text.description,
        "text_sha256": hashlib.sha256(text.text.encode()).hexdigest(),
        "text_loss": TEXT_LOSS,
        "facts_sha256": hashlib.sha256(repr((FACTS, HELD_OUT_FACTS)).encode()).hexdigest(),
        "data": asdict(data) | {"weights": data.sources},
    }

    def compute(folder: Path) -> Calibration:
        for_profile, held_out = split_text(text.text, (1 - _HELD_OUT, _HELD_OUT))
        settings = CalibrateConfig(lengths, data.items, data.sources, seed=data.seed)
        again = CalibrateConfig(
            validation_lengths, data.validation_items, data.sources, seed=data.seed + 1, facts=HELD_OUT_FACTS
        )
        result = Calibration(
            calibrate(loaded, for_profile, settings, run.progress), calibrate(loaded, held_out, again, run.progress)
        )
        result.save(folder)
        return result

    return run.stage("calibrate", inputs, Calibration.load, compute)


def run_profile(
    run: Run, loaded: LoadedModel, calibration: Calibration, upstream: str, estimator: Estimator
) -> tuple[Profile, str]:
    """Second stage: loss tables by real gradients; resumes item by item."""

    def compute(folder: Path) -> Profile:
        result = profile(loaded, calibration.profile, ProfileConfig(estimator), run.progress, folder / "items")
        result.save(folder / "tables.safetensors")
        return result

    return run.stage("profile", {"calibrate": upstream, "estimator": str(estimator)}, _load_profile, compute)


def run_optimize(
    run: Run, tables: Profile, upstream: str, model: ModelIdentity, weights: Mapping[str, float], budget: BudgetConfig
) -> tuple[list[Plan], str]:
    """Third stage: Pareto plans for ``model`` within the budget; ``weights`` mix the calibration sources."""
    check_density(budget.density)
    rules = repr(budget.config(length for length, _ in tables.tables).grid)
    inputs = {
        "profile": upstream,
        "weights": dict(weights),
        "budget": _without_evaluations(budget),
        "sink": SINK,
        "block": BLOCK,
        "rules_sha256": hashlib.sha256(rules.encode()).hexdigest(),
    }

    def compute(folder: Path) -> list[Plan]:
        losses = item_losses(tables, model.kv_heads, weights)
        for length in sorted(losses):
            if budget.density * length < 1.5 * SHORTEST:
                run.progress.say(
                    f"at {length} tokens density {budget.density} leaves a head {budget.density * length:.0f} on "
                    f"average, and loss tables begin at a span of {SHORTEST}: that leaves little to choose, and binds "
                    "longer lengths too; consider longer --lengths"
                )
        plans = [
            Plan.from_arrays(
                model,
                found.alpha,
                found.beta,
                provenance={
                    "budget": _without_evaluations(budget),
                    "predicted_losses": {str(length): loss for length, loss in found.losses.items()},
                    "densities": {str(length): density for length, density in found.densities.items()},
                    "solver_gap": found.gap,
                },
            )
            for found in _solve(losses, weights, budget, run.progress)
        ]
        write_json(folder / "plans.json", [plan.to_dict() for plan in plans])
        return plans

    return run.stage("optimize", inputs, _load_plans, compute)


def _solve(
    losses: Mapping[int, Mapping[str, np.ndarray]],
    weights: Mapping[str, float],
    budget: BudgetConfig,
    progress: Progress,
) -> list[ParetoPlan]:
    """Restricted grids, which are there to compare with, get the optimizer's plans alone."""
    config = budget.config(losses)
    if budget.grid == "scaled":
        return candidates(losses, weights, config, progress)
    return optimize(mean_losses(losses), config, progress)


def run_refine(
    run: Run,
    loaded: LoadedModel,
    calibration: Calibration,
    plans: list[Plan],
    upstream: str,
    weights: Mapping[str, float],
    budget: BudgetConfig,
) -> tuple[list[Plan], str]:
    """Fourth stage: the optimizer's plans, and better ones by measurement; resumes where it was interrupted."""
    heads = loaded.identity.layers * loaded.identity.kv_heads
    evaluations = plans_to_measure(heads, budget.density) if budget.evaluations is None else budget.evaluations
    if not evaluations:
        return plans, upstream
    tokens = tokens_to_measure(budget.density)
    inputs = {"optimize": upstream, "evaluations": evaluations, "measure": MEASURE, "sinks": SINKS, "tokens": tokens}

    def compute(folder: Path) -> list[Plan]:
        config = budget.config({length for length, _ in calibration.profile.items})
        amounts = "-".join(str(amount) for amount in sorted(set(tokens.values())))
        partial = folder / f"measured-{MEASURE}-{amounts}-{upstream}.json"
        found = refine(loaded, plans, calibration.profile, weights, config, evaluations, run.progress, partial)
        start = min(refined.loss for refined in found[: len(plans)])  # these are the optimizer's
        result = []
        for refined in found:
            provenance = {
                "budget": _without_evaluations(budget),
                "densities": {length: refined.plan.density(int(length)) for length in plans[0].provenance["densities"]},
                **refined.plan.provenance,
                "refined": {"loss": refined.loss, "start": start, "evaluations": refined.evaluations},
            }
            result.append(replace(refined.plan, provenance=provenance))
        write_json(folder / "plans.json", [plan.to_dict() for plan in result])
        return result

    return run.stage("refine", inputs, _load_plans, compute)


def run_validate(
    run: Run,
    loaded: LoadedModel,
    plans: list[Plan],
    items: CalibrationSet,
    upstream: str,
    weights: Mapping[str, float],
) -> tuple[Plan, list[ValidationRow]]:
    """Last stage: every plan on held-out items; the plan that wins, with its provenance."""

    def compute(folder: Path) -> list[ValidationRow]:
        rows = validate(loaded, plans, items, weights, run.progress)
        write_json(folder / "table.json", [asdict(row) for row in rows])
        return rows

    def read(folder: Path) -> list[ValidationRow]:
        try:
            return [ValidationRow(**row) for row in read_json(folder / "table.json")]
        except TypeError as error:  # another version's
            raise InputError(f"{folder / 'table.json'} has not what this version writes ({error})") from error

    inputs = {"plans": upstream, "weights": dict(weights), "measure": MEASURE, "rule": RULE}
    rows, _ = run.stage("validate", inputs, read, compute)
    winner = best(rows, [plan.provenance.get("refined", {}).get("loss", 0.0) for plan in plans])
    made_from = {
        "calibration": {name: value for name, value in run.finished("calibrate")[0].items() if name != "model"},
        "estimator": run.finished("profile")[0]["estimator"],
        "weights": dict(weights),
        "validation": {
            "loss": winner.loss,
            **winner.by_source,
            "candidates": len(plans),
            "lowest_loss": lowest_of(rows).loss,
            "error": winner.error,
        },
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    chosen = plans[winner.plan]
    return replace(chosen, provenance={**chosen.provenance, **made_from}), rows


def search(
    loaded: LoadedModel,
    text: TextSource,
    folder: Path,
    data: DataConfig | None = None,
    budget: BudgetConfig | None = None,
    estimator: Estimator = Estimator.JOINT,
    progress: Progress = SILENT,
) -> Plan:
    """Find a plan for a model: all five stages, resuming what ``folder`` already holds.

    Parameters
    ----------
    loaded : LoadedModel
    text : TextSource
        Calibration text; a quarter is held out for validation.
    folder : Path
        The run directory.
    data, budget : DataConfig, BudgetConfig
        What to calibrate on, and what the plan may cost.
    estimator : Estimator

    Returns
    -------
    Plan
        The one that validation chose; see `moa.search.validate.best`.
    """
    data, budget = (data or DataConfig()).resolved(loaded.context_length), budget or BudgetConfig()
    check_density(budget.density)  # before the long stages
    budget.config(data.lengths or ())
    weights = data.weights or default_weights(budget.density, data.sources)
    run = Run(folder, progress)
    calibration, key = run_calibrate(run, loaded, text, data)
    tables, key = run_profile(run, loaded, calibration, key, estimator)
    plans, key = run_optimize(run, tables, key, loaded.identity, weights, budget)
    plans, key = run_refine(run, loaded, calibration, plans, key, weights, budget)
    plan, _ = run_validate(run, loaded, plans, calibration.validation, key, weights)
    return plan


# Results of earlier stages, for the commands that run one stage alone ------------------------------------------------


def calibrated(run: Run, loaded: LoadedModel) -> tuple[Calibration, str]:
    """The finished calibrate stage and its key.

    Raises
    ------
    InputError
        If it is not there, or was made with another model.
    """
    inputs, key = run.finished("calibrate")
    if (inputs.get("weights"), inputs["model"]) != (loaded.weights, asdict(loaded.identity)):
        raise InputError(
            f"{run.folder} was calibrated with {inputs['name']} in {inputs['dtype']}, and config or weights of "
            f"{loaded.name} in {loaded.model.dtype} are not the same; use another --run-dir"
        )
    return Calibration.load(run.folder / "calibrate"), key


def profiled(run: Run) -> tuple[Profile, str, ModelIdentity]:
    """The finished profile stage, its key, and the model.

    Raises
    ------
    InputError
        If it is not there, or calibrate was run again since.
    """
    inputs, key = run.finished("profile")
    calibrated_with, calibrate_key = run.finished("calibrate")
    if inputs["calibrate"] != calibrate_key:
        raise InputError(
            f"{run.folder}: calibrate was run again after profile, whose tables are of what it gave before; run "
            "`moa profile` again"
        )
    return _load_profile(run.folder / "profile"), key, ModelIdentity(**calibrated_with["model"])


def optimized(run: Run) -> tuple[list[Plan], str, dict[str, float], BudgetConfig]:
    """The finished optimize stage, its key, and the weights and budget it was run with.

    Raises
    ------
    InputError
        If it is not there, or an earlier stage was run again since.
    """
    inputs, key = run.finished("optimize")
    profile, profile_key = run.finished("profile")
    if inputs["profile"] != profile_key or profile["calibrate"] != run.finished("calibrate")[1]:
        raise InputError(
            f"{run.folder}: calibrate or profile was run again after optimize, whose plans are from what they gave "
            "before; run the stages after it again, or all of them with `moa search`"
        )
    return _load_plans(run.folder / "optimize"), key, inputs["weights"], _budget(inputs["budget"])


def refined(run: Run) -> tuple[list[Plan], str, dict[str, float]]:
    """The plans to validate, their key and weights: the refine stage's, where it was run on the last optimize stage."""
    plans, key, weights, _ = optimized(run)
    manifest = run.folder / "refine" / "manifest.json"
    if manifest.is_file() and run.finished("refine")[0]["optimize"] == key:
        return _load_plans(run.folder / "refine"), run.finished("refine")[1], weights
    return plans, key, weights


def _without_evaluations(budget: BudgetConfig) -> dict[str, Any]:
    """What the optimize stage depends on."""
    return {name: value for name, value in asdict(budget).items() if name != "evaluations"}


def _budget(values: Mapping[str, Any]) -> BudgetConfig:
    constrained = values["constrained"]
    return BudgetConfig(**{**values, "constrained": None if constrained is None else tuple(constrained)})


def _load_profile(folder: Path) -> Profile:
    return Profile.load(folder / "tables.safetensors")


def _load_plans(folder: Path) -> list[Plan]:
    return [Plan.from_dict(data, str(folder / "plans.json")) for data in read_json(folder / "plans.json")]
