"""`moa serve` and `moa size`."""

import os
from pathlib import Path
from typing import Annotated

import typer

from moa.cli.bench import report
from moa.cli.options import Model, densities_of, numbers_of, plans_of
from moa.errors import InputError


def serve(
    context: typer.Context,
    model: Model,
    plan: Annotated[Path, typer.Option("--plan", help="A plan file.")],
    length: Annotated[
        int | None, typer.Option(help="N at which spans are fixed (default: the longest sequence served).")
    ] = None,
) -> None:
    """Serve a plan with vLLM (extra `vllm`); options that are not ours are vLLM's, such as --max-model-len."""
    from moa.progress import Progress
    from moa.serving.launch import server_command

    command = server_command(model, str(plan), length, context.args, Progress())
    os.execv(command[0], command)  # vLLM takes over the process, its signals and its exit code


def size(
    model: Annotated[
        str | None, typer.Argument(help="Folder, Hub name, .gguf file or demo; or leave it out and give --shape.")
    ] = None,
    shape: Annotated[str | None, typer.Option(help="llama-7b, llama-13b, llama3-8b, llama3-70b or qwen2.5-7b.")] = None,
    plan: Annotated[list[Path] | None, typer.Option("--plan", help="A plan file (repeat the option).")] = None,
    density: Annotated[str, typer.Option(help="Without a --plan: densities of typical plans.")] = "0.5",
    lengths: Annotated[str, typer.Option(help="Tokens of every sequence.")] = "32768",
    gpus: Annotated[str, typer.Option(help="Tensor-parallel sizes.")] = "1",
    memory: Annotated[float, typer.Option(min=1, help="GB of each GPU.")] = 80,
    block_size: Annotated[int, typer.Option(min=1, help="Tokens of a page.")] = 16,
    json: Annotated[Path | None, typer.Option("--json", help="Write the numbers here, and a .md table beside.")] = None,
) -> None:
    """How many sequences fit on GPUs when vLLM serves a plan, by arithmetic, next to the dense model."""
    from moa.benchmark.shapes import SHAPES, weight_bytes
    from moa.benchmark.throughput import typical_plan
    from moa.models import load_config
    from moa.plan import ModelIdentity
    from moa.serving.deal import dealable
    from moa.serving.sizing import sizes, to_json, to_markdown
    from moa.serving.support import check_servable

    if (model is None) == (shape is None):
        raise InputError("give a model or a --shape, one of the two")
    if shape is not None and shape not in SHAPES:
        raise InputError(f"unknown --shape {shape!r}; expected one of {', '.join(SHAPES)}")
    config = load_config(str(model)) if shape is None else SHAPES[shape]
    check_servable(config)
    identity = ModelIdentity.of(config)
    plans = plans_of(plan)
    for rules in plans.values():
        rules.check_fits(identity)
    if not plans:
        plans = {f"MoA {100 * each:g} %": typical_plan(identity, each) for each in densities_of(density)}
    weights, deals = weight_bytes(config), dealable(config)
    rows = [
        row
        for ranks in numbers_of(gpus, "--gpus") or ()
        for length in numbers_of(lengths, "--lengths") or ()
        for row in sizes(
            shape or str(model), identity, weights, plans, length, ranks, 1e9 * memory, block_size, deals=deals
        )
    ]
    report(json, to_markdown, lambda left, keep: to_json(rows, 1e9 * memory, block_size))
