"""`moa bench ...`: speed next to what people would otherwise use."""

import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Annotated, Any

import typer

from moa.cli.options import Device, DType, Quiet, densities_of, load, numbers_of, out, plans_of
from moa.errors import InputError

_AGAINST = "dense-dynamic,dense-static,uniform"


def attention(
    json: Annotated[Path | None, typer.Option("--json", help="Write the numbers here, and a .md table beside.")] = None,
    quiet: Quiet = False,
) -> None:
    """Our kernels on an NVIDIA GPU, next to dense attention and other ways to run the same mask."""
    from moa.benchmark.attention import bench_attention as measure
    from moa.benchmark.attention import to_markdown
    from moa.progress import Progress

    report(json, to_markdown, lambda left, keep: measure(Progress(quiet)))


def profile(
    items: Annotated[int, typer.Option(help="Calibration items at each length.")] = 50,
    json: Annotated[Path | None, typer.Option("--json", help="Write the numbers here, and a .md table beside.")] = None,
    quiet: Quiet = False,
) -> None:
    """The profile stage on models of 7B and 8B shape (random weights), next to plain forward and backward passes."""
    from moa.benchmark.profile import bench_profile as measure
    from moa.benchmark.profile import to_markdown
    from moa.progress import Progress

    report(json, to_markdown, lambda left, keep: measure(items, Progress(quiet)))


def throughput(
    model: Annotated[
        str | None, typer.Argument(help="Folder, Hub name, .gguf file or demo; or leave it out and give --shape.")
    ] = None,
    shape: Annotated[
        str | None, typer.Option(help="llama-7b, llama-13b, llama3-8b, llama3-70b or qwen2.5-7b, with random weights.")
    ] = None,
    plan: Annotated[list[Path] | None, typer.Option("--plan", help="A plan file (repeat the option).")] = None,
    density: Annotated[str, typer.Option(help="Without a --plan: densities of typical plans.")] = "0.5",
    against: Annotated[str, typer.Option(help="Of dense-dynamic, dense-static, uniform; or none.")] = _AGAINST,
    lengths: Annotated[str, typer.Option(help="Total lengths N, prompt and new tokens.")] = "4096",
    batch: Annotated[str, typer.Option(help="Sequences at once, or max: as many as fit on the GPU.")] = "1",
    ladder: Annotated[
        bool,
        typer.Option("--ladder", help="From dense to our kernels, one thing after another; on a GPU."),
    ] = False,
    steps: Annotated[int, typer.Option(min=1, help="Tokens in each of six timed rounds.")] = 16,
    json: Annotated[Path | None, typer.Option("--json", help="Write the numbers here, and a .md table beside.")] = None,
    dtype: DType = "auto",
    device: Device = "auto",
    quiet: Quiet = False,
) -> None:
    """How fast a whole model decodes under plans and without, and how close to what its bytes allow."""
    import torch

    from moa.benchmark.decoding import DENSE_DYNAMIC, DENSE_STATIC, Method
    from moa.benchmark.shapes import SHAPES, random_model
    from moa.benchmark.throughput import Row, check_searches, to_markdown, typical_plan
    from moa.benchmark.throughput import bench_throughput as measure
    from moa.benchmark.throughput import ladder as rungs
    from moa.machine import device_info
    from moa.models import pick_device, pick_dtype
    from moa.plan import Plan
    from moa.progress import Progress

    if (model is None) == (shape is None):
        raise InputError("give a model or a --shape, one of the two")
    if shape is not None and shape not in SHAPES:
        raise InputError(f"unknown --shape {shape!r}; expected one of {', '.join(SHAPES)}")
    others = [] if against == "none" else against.split(",")
    dense = {method.name: method for method in (DENSE_DYNAMIC, DENSE_STATIC)}
    if set(others) - {*dense, "uniform"}:
        raise InputError(f"--against {against!r}: expected some of {', '.join(dense)}, uniform; or none")
    wanted = numbers_of(lengths, "--lengths") or ()
    batches = None if batch == "max" or ladder else numbers_of(batch, "--batch") or ()
    if batches is not None and len(batches) != 1:
        raise InputError(f"--batch {batch!r}: expected one number of sequences, or max")
    rows = None if batches is None else batches[0]
    plans = plans_of(plan)
    densities = [] if plans else densities_of(density)
    if ladder and batch != "1":
        raise InputError("--ladder takes as many sequences as fit; leave --batch out")
    if ladder and against != _AGAINST:
        raise InputError("--ladder has its own rungs from dense on; leave --against out")
    if ladder and len(plans) + len(densities) != 1:
        raise InputError("--ladder takes one --plan or one --density")
    on = pick_device(device)
    if rows is None:
        check_searches(on)
    if shape is not None:
        weights = pick_dtype(dtype, on)
        loaded = random_model(shape, on, weights if isinstance(weights, torch.dtype) else torch.bfloat16)
    else:
        loaded = load(str(model), dtype, device, quiet)
    for rules in plans.values():
        rules.check_fits(loaded.identity)
    plans |= {f"MoA {100 * each:g} %": typical_plan(loaded.identity, each) for each in densities}
    if ladder:
        methods = [rung for name, rules in plans.items() for rung in rungs(name, rules)]
    else:
        if "uniform" in others:
            budgets = {round(max(rules.density(length) for length in wanted), 4) for rules in plans.values()}
            plans |= {f"uniform {100 * each:.3g} %": Plan.uniform(loaded.identity, each) for each in sorted(budgets)}
        methods = [dense[name] for name in others if name in dense]
        methods += [Method(name, rules) for name, rules in plans.items()]

    machine = {"device": device_info([device])}
    settings = {
        **machine,
        "model": asdict(loaded.identity),
        "plans": {name: rules.to_dict() for name, rules in plans.items()},
        "columns": [column.name for column in fields(Row)],
    }

    def run(left: dict[str, Any], keep: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        known = left.get("rows", [])
        return machine | measure(loaded, methods, wanted, rows, steps, Progress(quiet), known, keep)

    report(json, to_markdown, run, settings)


def report(
    json: Path | None,
    to_markdown: Callable[[dict[str, Any]], str],
    run: Callable[[dict[str, Any], Callable[[dict[str, Any]], None]], dict[str, Any]],
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Run a benchmark, print its table, and write both where ``json`` says.

    ``run`` takes what an interrupted call of the same command with the same ``settings`` has left (or nothing), and
    what keeps its own.
    """
    from rich.markdown import Markdown

    from moa.cli.partial import Partial
    from moa.files import write_json, write_text

    command = {"command": "moa " + " ".join(sys.argv[1:])}
    partial = Partial(json, command | dict(settings or {}))
    result = command | run(partial.left, partial.keep)
    out.print(Markdown(to_markdown(result)))
    if json:
        write_json(json, result)
        write_text(json.with_suffix(".md"), to_markdown(result))
        partial.finish()
