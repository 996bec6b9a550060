"""`moa eval` and `moa lm-eval`."""

import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Annotated, Any

import typer

from moa.cli.options import (
    DEFAULT_RUN,
    Devices,
    DType,
    Mixture,
    Model,
    Quiet,
    load,
    numbers_of,
    out,
    plans_of,
    weights_of,
)
from moa.errors import InfeasibleBudgetError, InputError


def evaluate(
    model: Model,
    plan: Annotated[list[Path] | None, typer.Option("--plan", help="A plan file (repeat the option).")] = None,
    against: Annotated[
        str,
        typer.Option(help="Of dense, uniform, per-layer, per-head, binary-heads (at each plan's density); or none."),
    ] = "dense,uniform",
    lengths: Annotated[str, typer.Option(help="Total lengths N, prompt and new tokens.")] = "1024",
    tasks: Annotated[
        str,
        typer.Option(
            help="Of passkey, needle, multikey, multivalue, tracking, lines, json, perplexity, answer_perplexity, "
            "answer_kl; or all, or none. lines@2048: at that length only."
        ),
    ] = "passkey,lines,perplexity",
    items: Annotated[int, typer.Option(help="Prompts per task, and stretches of text if it has as many.")] = 20,
    decode_steps: Annotated[
        int, typer.Option(min=0, help="Tokens in each timed round of decoding; 0 for no timing.")
    ] = 16,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the items.")] = 0,
    json: Annotated[Path | None, typer.Option("--json", help="Write the numbers here, and a .md table beside.")] = None,
    heat_map: Annotated[Path | None, typer.Option(help="Draw retrieval by length and depth into this PNG.")] = None,
    run_dir: Annotated[
        Path, typer.Option("--run-dir", help="The finished search that baselines other than uniform are chosen from.")
    ] = DEFAULT_RUN,
    mixture: Mixture = None,
    dtype: DType = "auto",
    device: Devices = "auto",
    quiet: Quiet = False,
) -> None:
    """Measure plans against dense attention and other plans: answers, bytes and speed in one table.

    With --json an interrupted call keeps what it measured, and a call with the same model, items and seed goes on from
    there on devices of the same kind, however many: rows of plans with the same rules are not measured again.
    """
    from moa.cli.partial import Partial
    from moa.evaluation.compare import EvaluateConfig
    from moa.evaluation.compare import evaluate as measure
    from moa.evaluation.devices import evaluate_on
    from moa.evaluation.rows import TASKS, Row, effective_lengths
    from moa.files import check_writable, write_json, write_text
    from moa.machine import arithmetic_info, device_info
    from moa.models import load_config
    from moa.plan import ModelIdentity, Plan
    from moa.progress import Progress
    from moa.report.heat_maps import check_drawing, heat_maps
    from moa.report.tables import table, to_json, to_markdown
    from moa.search import baselines
    from moa.search.profile import kv_losses
    from moa.search.settings import default_weights

    for path in (json, heat_map):
        if path:
            check_writable(path)
    wanted = numbers_of(lengths, "--lengths") or ()
    chosen = {"none": (), "all": TASKS}.get(tasks, tuple(tasks.split(",")))
    if heat_map:
        check_drawing([task.partition("@")[0] for task in chosen])
    config = EvaluateConfig(wanted, items, chosen, decode_steps=decode_steps, seed=seed)
    others = [] if against == "none" else against.split(",")
    if set(others) - {"dense", "uniform", *baselines.NAMES}:
        raise InputError(
            f"--against {against!r}: expected some of dense, uniform, {', '.join(baselines.NAMES)}; or none"
        )
    plans = plans_of(plan)
    identity = ModelIdentity.of(load_config(model))
    tables: Any = _tables(run_dir, identity) if set(others) & set(baselines.NAMES) else None
    methods: dict[str, Plan | None] = {"dense": None} if "dense" in others else {}
    for name, rules in plans.items():
        rules.check_fits(identity)
        budget = rules.provenance.get("budget", {}).get("density")  # of what it was searched for, if it was
        density = budget or round(max(rules.density(length) for length in wanted), 4)
        for other in others:
            label = f"{other} {100 * density:.3g} %"
            if other == "uniform":
                methods[label] = Plan.uniform(identity, density)
            elif other != "dense":
                weights = weights_of(mixture) or default_weights(density, tables.sources)
                losses = kv_losses(tables, identity.kv_heads, weights)
                try:
                    methods[label] = baselines.baseline(other, losses, identity, density)
                except InfeasibleBudgetError as error:
                    out.print(f"{label} is left out: {error}", highlight=False)
        methods[name] = rules
    if not methods:
        raise InputError("nothing to evaluate; give a --plan, or --against dense")
    devices = device.split(",")
    command, machine = "moa " + " ".join(sys.argv[1:]), device_info(devices)
    told = {name: chosen and chosen.to_dict() for name, chosen in methods.items()}
    backend = os.environ.get("MOA_BACKEND", "")
    settings = {"name": model, "dtype": dtype, "backend": backend, "items": items, "seed": seed}
    made_with = {"model": asdict(identity), **settings, **arithmetic_info(devices)}
    partial = Partial(json, {**made_with, "columns": [column.name for column in fields(Row)]})
    same = [name for name, rules in partial.left.get("methods", {}).items() if name in told and told[name] == rules]
    known = [Row.from_dict(row) for row in partial.left.get("rows", ()) if row["method"] in same]
    have = {(row.method, row.task, row.length): row.to_dict() for row in known}

    def keep(rows: Sequence[Row]) -> None:
        have.update({(row.method, row.task, row.length): row.to_dict() for row in rows})
        partial.keep({"command": command, "methods": told, "rows": list(have.values())})

    if len(devices) > 1:
        rows = evaluate_on(devices, model, dtype, methods, config, Progress(quiet), known, keep)
    else:
        rows = measure(load(model, dtype, device, quiet), methods, config, Progress(quiet), known, keep)
    out.print(table(rows))
    for found in effective_lengths(rows):
        reach = (
            f"up to {found['length']:,} tokens, {found['mean_span']:,} stored" if found["length"] else "at no length"
        )
        out.print(f"{found['method']}: 0.9 of the passkeys found {reach}", highlight=False)
    if json:
        write_json(json, to_json(rows, command, str(identity), machine))
        write_text(json.with_suffix(".md"), to_markdown(rows, command, machine))
        partial.finish()
        out.print(f"Wrote {json} and {json.with_suffix('.md').name}", highlight=False)
    if heat_map:
        heat_maps(rows, heat_map)
        out.print(f"Wrote {heat_map}", highlight=False)


def _tables(run_dir: Path, model: Any) -> Any:
    """Loss tables, a `moa.search.profile.Profile`, of a finished search of the model, which is a `ModelIdentity`."""
    from moa.progress import SILENT
    from moa.search.pipeline import profiled
    from moa.search.run import Run

    tables, _, identity = profiled(Run(run_dir, SILENT))
    if identity != model:
        raise InputError(
            f"--against: {run_dir} holds the search of another model ({identity}), not of this one ({model}); give the "
            "--run-dir of a search of it"
        )
    return tables


def lm_eval(context: typer.Context) -> None:
    """EleutherAI's lm-eval with the model `moa`: run --model moa --model_args pretrained=MODEL,plan=FILE --tasks ..."""
    try:
        from lm_eval.__main__ import cli_evaluate

        import moa.evaluation.lm_eval  # noqa: F401 (registers the model)
    except ImportError as error:
        raise InputError(f"lm-eval is not installed ({error}); pip install 'moa-spans[lm-eval]'") from error
    sys.argv = ["lm_eval", *context.args]  # its own parser reads them there
    cli_evaluate()
