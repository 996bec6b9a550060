"""`moa search`, and its stages one by one."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from moa.cli.options import (
    DEFAULT_RUN,
    Constrained,
    Dataset,
    Density,
    Device,
    DType,
    Grid,
    Items,
    Lengths,
    Mixture,
    MixtureNames,
    Model,
    Output,
    Points,
    Quiet,
    Refine,
    RulesPerLayer,
    RunDir,
    Seed,
    TextFiles,
    ValidationItems,
    ValidationLength,
    calibration_text,
    load,
    numbers_of,
    open_run,
    out,
    weights_of,
)
from moa.search.defaults import ITEMS, VALIDATION_ITEMS


class EstimatorName(StrEnum):
    """`moa.search.influence.Estimator` by name, without importing torch to show a help text."""

    joint = "joint"
    paper = "paper"


Estimate = Annotated[EstimatorName, typer.Option("--estimator", help="Joint influence, or the paper's sum of |E|.")]


def search(
    model: Model,
    output: Output,
    density: Density = 0.5,
    lengths: Lengths = None,
    items: Items = ITEMS,
    mixture: Mixture = None,
    text: TextFiles = None,
    dataset: Dataset = None,
    validation_length: ValidationLength = None,
    validation_items: ValidationItems = VALIDATION_ITEMS,
    estimator: Estimate = EstimatorName.joint,
    constrained: Constrained = None,
    rules_per_layer: RulesPerLayer = None,
    grid: Grid = "scaled",
    points: Points = 1,
    refine: Refine = None,
    seed: Seed = 0,
    run_dir: RunDir = DEFAULT_RUN,
    dtype: DType = "auto",
    device: Device = "auto",
    quiet: Quiet = False,
) -> None:
    """Find a plan for a model: calibrate, profile, optimize, refine, validate. Resumes what the run directory holds."""
    from moa.files import check_writable
    from moa.progress import Progress
    from moa.search.influence import Estimator
    from moa.search.pipeline import search as run_search
    from moa.search.settings import BudgetConfig, DataConfig

    check_writable(output)
    data = DataConfig(
        numbers_of(lengths, "--lengths"), validation_length, items, validation_items, weights_of(mixture), seed
    )
    budget = BudgetConfig(density, numbers_of(constrained, "--constrained"), rules_per_layer, grid, points, refine)
    source = calibration_text(text, dataset)
    plan = run_search(
        load(model, dtype, device, quiet), source, run_dir, data, budget, Estimator(estimator.value), Progress(quiet)
    )
    plan.save(output)
    _announce(plan, output)


def calibrate(
    model: Model,
    lengths: Lengths = None,
    items: Items = ITEMS,
    mixture: MixtureNames = None,
    text: TextFiles = None,
    dataset: Dataset = None,
    validation_length: ValidationLength = None,
    validation_items: ValidationItems = VALIDATION_ITEMS,
    seed: Seed = 0,
    run_dir: RunDir = DEFAULT_RUN,
    dtype: DType = "auto",
    device: Device = "auto",
    quiet: Quiet = False,
) -> None:
    """First stage: build items whose answers the dense model writes itself."""
    from moa.search.pipeline import run_calibrate
    from moa.search.settings import DataConfig

    data = DataConfig(
        numbers_of(lengths, "--lengths"), validation_length, items, validation_items, weights_of(mixture), seed
    )
    source = calibration_text(text, dataset)
    result, _ = run_calibrate(open_run(run_dir, quiet), load(model, dtype, device, quiet), source, data)
    for (length, name), members in sorted(result.profile.items.items()):
        out.print(f"{len(members)} items of {length} tokens: {name}")


def profile(
    model: Model,
    estimator: Estimate = EstimatorName.joint,
    run_dir: RunDir = DEFAULT_RUN,
    dtype: DType = "auto",
    device: Device = "auto",
    quiet: Quiet = False,
) -> None:
    """Second stage: measure every head's loss for every window, by gradients on the calibrated items."""
    from moa.search.influence import Estimator
    from moa.search.pipeline import calibrated, run_profile

    run = open_run(run_dir, quiet)
    loaded = load(model, dtype, device, quiet)
    calibration, key = calibrated(run, loaded)
    tables, _ = run_profile(run, loaded, calibration, key, Estimator(estimator.value))
    for (length, name), table in sorted(tables.tables.items()):
        counts = zip(table.shape, ("items", "layers", "heads", "windows"), strict=True)
        out.print(f"N = {length}, {name}: {' x '.join(f'{count} {what}' for count, what in counts)}")


def optimize(
    density: Density = 0.5,
    constrained: Constrained = None,
    rules_per_layer: RulesPerLayer = None,
    grid: Grid = "scaled",
    points: Points = 1,
    mixture: Mixture = None,
    run_dir: RunDir = DEFAULT_RUN,
    quiet: Quiet = False,
) -> None:
    """Third stage: choose a rule for every KV head within the budget; several plans."""
    from moa.search.pipeline import profiled, run_optimize
    from moa.search.settings import BudgetConfig, default_weights

    run = open_run(run_dir, quiet)
    tables, key, identity = profiled(run)
    budget = BudgetConfig(density, numbers_of(constrained, "--constrained"), rules_per_layer, grid, points)
    weights = weights_of(mixture) or default_weights(density, tables.sources)
    plans, _ = run_optimize(run, tables, key, identity, weights, budget)
    table = Table(title=f"{len(plans)} plans at density {density}")
    lengths = list(plans[0].provenance["predicted_losses"])
    for column in ("plan", *(f"loss at {length}" for length in lengths), "solver gap"):
        table.add_column(column, justify="right")
    for index, plan in enumerate(plans):
        losses = (f"{plan.provenance['predicted_losses'][length]:.4g}" for length in lengths)
        gap = plan.provenance["solver_gap"]
        table.add_row(str(index), *losses, "items as a whole" if gap is None else f"{gap:.2%}")
    out.print(table)


def refine(
    model: Model,
    evaluations: Annotated[
        int | None,
        typer.Option(
            "--refine",
            min=1,
            help="Plans to measure for a better one.",
            show_default="800 or more, half from density 0.5 on",
        ),
    ] = None,
    run_dir: RunDir = DEFAULT_RUN,
    dtype: DType = "auto",
    device: Device = "auto",
    quiet: Quiet = False,
) -> None:
    """Fourth stage: find better plans than the optimizer's, by measuring on the model."""
    from dataclasses import replace

    from moa.search.pipeline import calibrated, optimized, run_refine

    run = open_run(run_dir, quiet)
    plans, key, weights, budget = optimized(run)
    loaded = load(model, dtype, device, quiet)
    calibration, _ = calibrated(run, loaded)
    budget = replace(budget, evaluations=evaluations)
    plans, _ = run_refine(run, loaded, calibration, plans, key, weights, budget)
    found = plans[-1].provenance["refined"]
    if found["loss"] >= found["start"]:
        out.print("None of the plans measured is better than the optimizer's best")
    else:
        out.print(f"Loss {found['start']:.4f} before, {found['loss']:.4f} after {found['evaluations']} plans measured")


def validate(
    model: Model,
    output: Output,
    run_dir: RunDir = DEFAULT_RUN,
    dtype: DType = "auto",
    device: Device = "auto",
    quiet: Quiet = False,
) -> None:
    """Last stage: run every plan on held-out items and write the best one.

    Of plans that are no worse than the lowest loss by more than two standard errors of the difference, that is the one
    that the refine stage measured to lose least.
    """
    from moa.files import check_writable
    from moa.search.pipeline import calibrated, refined, run_validate

    check_writable(output)
    run = open_run(run_dir, quiet)
    plans, key, weights = refined(run)
    loaded = load(model, dtype, device, quiet)
    calibration, _ = calibrated(run, loaded)
    plan, rows = run_validate(run, loaded, plans, calibration.validation, key, weights)
    plan.save(output)
    table = Table(title="Lost answers (retrieval), and divergence in nats a token")
    for column in ("plan", "weighted", "error", *rows[0].by_source):
        table.add_column(column, justify="right")
    for row in rows:
        losses = row.loss, row.error, *row.by_source.values()
        table.add_row(str(row.plan), *(f"{loss:.4f}" for loss in losses))
    out.print(table)
    _announce(plan, output)


def _announce(plan: Any, output: Path) -> None:
    """What was written, and what it costs: a mixture can ask for a plan that keeps text and finds nothing."""
    from moa.search.calibrate import RETRIEVAL, SUMMARY, TEXT

    budget, validation = plan.provenance["densities"], plan.provenance["validation"]
    densities = ", ".join(f"{density:.3f} at {length}" for length, density in budget.items())
    costs = [f"{validation[RETRIEVAL]:.1%} of answers about facts"] if RETRIEVAL in validation else []
    costs += [
        f"{validation[source]:.4f} nats a token of {source}" for source in (SUMMARY, TEXT) if source in validation
    ]
    out.print(f"Wrote {output}: density {densities}", highlight=False)
    out.print(f"On held-out items it loses {', '.join(costs)}", highlight=False)
