"""The command `moa`: parses, calls, prints."""

import os
import platform
import sys
from collections.abc import Callable
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from moa.errors import InfeasibleBudgetError, InputError, MoAError

# typer brings click along, under its own name in newer versions
_UsageError: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")

_INTERRUPTED = 130  # exit code, by convention

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
out = Console()


class EstimatorName(StrEnum):
    """`moa.search.influence.Estimator` by name, without importing torch to show a help text."""

    joint = "joint"
    paper = "paper"


@app.callback()
def _everywhere(
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error comes from (any command).")] = False,
    backend: Annotated[str, typer.Option(envvar="MOA_BACKEND", help="Attention: triton, sdpa, or by the device.")] = "",
) -> None:
    """MoA, Mixture of Attention Spans: find how far back each attention head of an LLM needs to look, and run it from a
    KV cache that stores only that.
    """
    if backend:
        from moa.attention import backends

        backends.check(backend)
        os.environ["MOA_BACKEND"] = backend  # this process is the command's own


# Options that several commands share ---------------------------------------------------------------------------------

Model = Annotated[str, typer.Argument(help="Hub id, local folder, GGUF file, or 'demo' (SmolLM2-135M-Instruct).")]
RunDir = Annotated[Path, typer.Option("--run-dir", help="Where the stages keep their results; a second call resumes.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="The plan to write.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]
DType = Annotated[str, typer.Option(help="auto (float32 on a CPU, else the checkpoint's), float32, bfloat16, float16.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")]
Lengths = Annotated[str | None, typer.Option(help="Profile lengths, e.g. 1024,2048 (default: by the context).")]
ValidationLength = Annotated[
    int | None, typer.Option(help="One more length of validation (default: 1.5 x the longest).")
]
Items = Annotated[int, typer.Option(help="Calibration items per length and source.")]
ValidationItems = Annotated[int, typer.Option(help="Held-out items per length and source.")]
Mixture = Annotated[str, typer.Option(help="Weights of calibration sources: retrieval, summary, text.")]
Seed = Annotated[int, typer.Option(help="Seed of all random choices.")]
TextFiles = Annotated[list[Path] | None, typer.Option("--text", help="Calibration text files (repeat the option).")]
Dataset = Annotated[str | None, typer.Option(help="Calibration text from an HF dataset: hub name or local path.")]
Estimate = Annotated[EstimatorName, typer.Option("--estimator", help="Joint influence, or the paper's sum of |E|.")]
Density = Annotated[float, typer.Option(help="Stored KV over all KV, above 0 and at most 1.")]
Constrained = Annotated[str | None, typer.Option(help="More lengths at which the density must hold (default: twice).")]
RulesPerLayer = Annotated[int | None, typer.Option(help="At most so many rules in a layer (the paper: 2).")]
Grid = Annotated[str, typer.Option(help="Rules to choose from: scaled, paper, proportional, binary.")]
Points = Annotated[int, typer.Option(help="Cuts of each objective's range.")]
Refine = Annotated[
    int | None,
    typer.Option("--refine", min=0, help="Plans to measure for a better one; 0 for none.", show_default="1000 or more"),
]
PlanFile = Annotated[Path, typer.Option("--plan", help="A plan file.")]

DEFAULT_RUN = Path("runs/search")
DEFAULT_MIXTURE = "retrieval=1,text=0.5,summary=0.25"


def _numbers(text: str | None, option: str) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        values = tuple(int(part) for part in text.split(","))
    except ValueError:
        values = ()
    if not values or min(values) < 1:
        raise InputError(f"{option} {text!r}: expected positive whole numbers with commas, such as 1024,2048")
    return values


def _weights(text: str) -> dict[str, float]:
    try:
        weights = {name: float(weight) for name, weight in (part.split("=") for part in text.split(","))}
    except ValueError:
        weights = {}
    if not weights or min(weights.values()) <= 0:
        raise InputError(f"--mixture {text!r}: expected sources with weights above 0, such as {DEFAULT_MIXTURE}")
    return weights


def _text(files: list[Path] | None, dataset: str | None) -> Any:
    from moa.search.text import default_text, text_from_dataset, text_from_files

    if files and dataset:
        raise InputError("--text and --dataset were both given; choose one")
    if files:
        return text_from_files(files)
    return text_from_dataset(dataset) if dataset else default_text()


def _load(model: str, dtype: str, device: str, quiet: bool) -> Any:
    from moa.models import load_model
    from moa.progress import Progress

    return load_model(model, dtype, device, Progress(quiet))


def _run(folder: Path, quiet: bool) -> Any:
    from moa.progress import Progress
    from moa.search.pipeline import Run

    return Run(folder, Progress(quiet))


# The search ----------------------------------------------------------------------------------------------------------


@app.command()
def search(
    model: Model,
    output: Output,
    density: Density = 0.5,
    lengths: Lengths = None,
    items: Items = 24,
    mixture: Mixture = DEFAULT_MIXTURE,
    text: TextFiles = None,
    dataset: Dataset = None,
    validation_length: ValidationLength = None,
    validation_items: ValidationItems = 12,
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
    from moa.search.pipeline import BudgetConfig, DataConfig
    from moa.search.pipeline import search as run_search

    check_writable(output)
    data = DataConfig(
        _numbers(lengths, "--lengths"), validation_length, items, validation_items, _weights(mixture), seed
    )
    budget = BudgetConfig(density, _numbers(constrained, "--constrained"), rules_per_layer, grid, points, refine)
    source = _text(text, dataset)
    plan = run_search(
        _load(model, dtype, device, quiet), source, run_dir, data, budget, Estimator(estimator.value), Progress(quiet)
    )
    plan.save(output)
    _announce(plan, output)


@app.command()
def calibrate(
    model: Model,
    lengths: Lengths = None,
    items: Items = 24,
    mixture: Mixture = DEFAULT_MIXTURE,
    text: TextFiles = None,
    dataset: Dataset = None,
    validation_length: ValidationLength = None,
    validation_items: ValidationItems = 12,
    seed: Seed = 0,
    run_dir: RunDir = DEFAULT_RUN,
    dtype: DType = "auto",
    device: Device = "auto",
    quiet: Quiet = False,
) -> None:
    """First stage: build items whose answers the dense model writes itself."""
    from moa.search.pipeline import DataConfig, run_calibrate

    data = DataConfig(
        _numbers(lengths, "--lengths"), validation_length, items, validation_items, _weights(mixture), seed
    )
    source = _text(text, dataset)
    result, _ = run_calibrate(_run(run_dir, quiet), _load(model, dtype, device, quiet), source, data)
    for (length, name), members in sorted(result.profile.items.items()):
        out.print(f"{len(members)} items of {length} tokens: {name}")


@app.command()
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

    run = _run(run_dir, quiet)
    loaded = _load(model, dtype, device, quiet)
    calibration, key = calibrated(run, loaded)
    tables, _ = run_profile(run, loaded, calibration, key, Estimator(estimator.value))
    for (length, name), table in sorted(tables.tables.items()):
        counts = zip(table.shape, ("items", "layers", "heads", "windows"), strict=True)
        out.print(f"N = {length}, {name}: {' x '.join(f'{count} {what}' for count, what in counts)}")


@app.command()
def optimize(
    density: Density = 0.5,
    constrained: Constrained = None,
    rules_per_layer: RulesPerLayer = None,
    grid: Grid = "scaled",
    points: Points = 1,
    mixture: Mixture = DEFAULT_MIXTURE,
    run_dir: RunDir = DEFAULT_RUN,
    quiet: Quiet = False,
) -> None:
    """Third stage: choose a rule for every KV head within the budget; several plans."""
    from moa.search.pipeline import BudgetConfig, profiled, run_optimize

    run = _run(run_dir, quiet)
    tables, key, identity = profiled(run)
    budget = BudgetConfig(density, _numbers(constrained, "--constrained"), rules_per_layer, grid, points)
    plans, _ = run_optimize(run, tables, key, identity, _weights(mixture), budget)
    table = Table(title=f"{len(plans)} plans at density {density}")
    lengths = list(plans[0].provenance["predicted_losses"])
    for column in ("plan", *(f"loss at {length}" for length in lengths), "solver gap"):
        table.add_column(column, justify="right")
    for index, plan in enumerate(plans):
        losses = (f"{plan.provenance['predicted_losses'][length]:.4g}" for length in lengths)
        gap = plan.provenance["solver_gap"]
        table.add_row(str(index), *losses, "items as a whole" if gap is None else f"{gap:.2%}")
    out.print(table)


@app.command()
def refine(
    model: Model,
    evaluations: Annotated[
        int | None,
        typer.Option("--refine", min=1, help="Plans to measure for a better one.", show_default="1000 or more"),
    ] = None,
    run_dir: RunDir = DEFAULT_RUN,
    dtype: DType = "auto",
    device: Device = "auto",
    quiet: Quiet = False,
) -> None:
    """Fourth stage: improve the optimizer's best plan by exchanging rules between heads, measured on the model."""
    from dataclasses import replace

    from moa.search.pipeline import calibrated, optimized, run_refine

    run = _run(run_dir, quiet)
    plans, key, weights, budget = optimized(run)
    loaded = _load(model, dtype, device, quiet)
    calibration, _ = calibrated(run, loaded)
    budget = replace(budget, evaluations=evaluations)
    plans, _ = run_refine(run, loaded, calibration, plans, key, weights, budget)
    found = plans[-1].provenance.get("refined")
    if found is None:
        out.print("None of the plans measured is better than the optimizer's best")
    else:
        out.print(f"Loss {found['start']:.4f} before, {found['loss']:.4f} after {found['evaluations']} plans measured")


@app.command()
def validate(
    model: Model,
    output: Output,
    run_dir: RunDir = DEFAULT_RUN,
    dtype: DType = "auto",
    device: Device = "auto",
    quiet: Quiet = False,
) -> None:
    """Last stage: run every plan on held-out items and write the best one."""
    from moa.files import check_writable
    from moa.search.pipeline import calibrated, refined, run_validate

    check_writable(output)
    run = _run(run_dir, quiet)
    plans, key, weights = refined(run)
    loaded = _load(model, dtype, device, quiet)
    calibration, _ = calibrated(run, loaded)
    plan, rows = run_validate(run, loaded, plans, calibration.validation, key, weights)
    plan.save(output)
    table = Table(title="Divergence from the dense model's answers, nats a token")
    for column in ("plan", "weighted", *rows[0].by_source):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(str(row.plan), f"{row.loss:.4f}", *(f"{loss:.4f}" for loss in row.by_source.values()))
    out.print(table)
    _announce(plan, output)


def _announce(plan: Any, output: Path) -> None:
    budget = plan.provenance["densities"]
    densities = ", ".join(f"{density:.3f} at {length}" for length, density in budget.items())
    out.print(f"Wrote {output}: density {densities}", highlight=False)


# Plans ---------------------------------------------------------------------------------------------------------------


@app.command()
def show(
    plan: Annotated[Path, typer.Argument(help="A plan file.")],
    lengths: Annotated[str, typer.Option(help="Sequence lengths for the table.")] = "2048,4096,8192,16384,32768",
    at: Annotated[int, typer.Option("--at", help="Sequence length of the heat map.")] = 8192,
    dtype: Annotated[str, typer.Option(help="dtype of the KV cache for the table.")] = "bfloat16",
) -> None:
    """Draw a plan: spans by layer and head, density and KV bytes at several lengths."""
    import torch

    from moa.plan import Plan
    from moa.report.terminal import costs, heat_map

    loaded = Plan.load(plan)
    wanted = _numbers(lengths, "--lengths")
    kind = getattr(torch, dtype, None)
    if not isinstance(kind, torch.dtype):
        raise InputError(f"--dtype {dtype!r} is not a torch dtype, such as bfloat16")
    if at < 1:
        raise InputError(f"--at {at}: expected a positive length")
    assert wanted is not None
    out.print(f"{plan}: {loaded.model}", highlight=False)
    out.print(heat_map(loaded, at))
    out.print(costs(loaded, wanted, kind))


@app.command()
def convert(
    published: Annotated[Path, typer.Argument(help='A plan of the published code: {"alphas": ..., "betas": ...}.')],
    model: Annotated[str, typer.Option("--model", help="The model it is for (only its config is read).")],
    output: Output,
) -> None:
    """Import a plan in the published format."""
    from moa.files import read_json
    from moa.models import load_config
    from moa.plan import ModelIdentity, Plan

    plan = Plan.from_published(read_json(published), ModelIdentity.of(load_config(model)))
    plan.save(output)
    out.print(f"Wrote {output}: density {plan.density(8192):.3f} at 8192", highlight=False)


# Running -------------------------------------------------------------------------------------------------------------


@app.command()
def generate(
    model: Model,
    plan: PlanFile,
    prompt: Annotated[str, typer.Option(help="The user's message, or - to read it from standard input.")],
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 256,
    dtype: DType = "auto",
    device: Device = "auto",
    quiet: Quiet = False,
) -> None:
    """Answer one message under a plan, streaming."""
    from moa.chat import Conversation
    from moa.plan import Plan

    rules = Plan.load(plan)
    message = sys.stdin.read() if prompt == "-" else prompt
    conversation = Conversation(_load(model, dtype, device, quiet), rules, max_new_tokens)
    for piece in conversation.say(message):
        print(piece, end="", flush=True)
    print()
    _note(quiet, conversation.usage())


@app.command()
def chat(
    model: Model,
    plan: PlanFile,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 256,
    dtype: DType = "auto",
    device: Device = "auto",
    quiet: Quiet = False,
) -> None:
    """Talk to a model under a plan, all turns on one cache; an empty line ends."""
    from moa.chat import Conversation
    from moa.plan import Plan

    conversation = Conversation(_load(model, dtype, device, quiet), Plan.load(plan), max_new_tokens)
    while True:
        try:
            message = input("you> ")
        except EOFError:
            break
        if not message.strip():
            break
        for piece in conversation.say(message):
            print(piece, end="", flush=True)
        print()
        _note(quiet, conversation.usage())


def _note(quiet: bool, text: str) -> None:
    if not quiet:
        Console(stderr=True).print(f"[dim]{text}[/dim]", highlight=False)


@app.command("eval")
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
    items: Annotated[int, typer.Option(help="Prompts per retrieval task.")] = 20,
    decode_steps: Annotated[int, typer.Option(help="Tokens in each timed round of decoding; 0 for no timing.")] = 16,
    seed: Annotated[int, typer.Option(help="Seed of the items.")] = 0,
    json: Annotated[Path | None, typer.Option("--json", help="Write the numbers here, and a .md table beside.")] = None,
    heat_map: Annotated[Path | None, typer.Option(help="Draw retrieval by length and depth into this PNG.")] = None,
    run_dir: Annotated[
        Path, typer.Option("--run-dir", help="The finished search that baselines other than uniform are chosen from.")
    ] = DEFAULT_RUN,
    mixture: Mixture = DEFAULT_MIXTURE,
    dtype: DType = "auto",
    device: Device = "auto",
    quiet: Quiet = False,
) -> None:
    """Measure plans against dense attention and other plans: answers, bytes and speed in one table."""
    from moa.evaluation.compare import (
        TASKS,
        EvaluateConfig,
        device_info,
        effective_lengths,
        table,
        to_json,
        to_markdown,
    )
    from moa.evaluation.compare import evaluate as measure
    from moa.evaluation.devices import evaluate_on
    from moa.files import check_writable, write_json, write_text
    from moa.models import load_config
    from moa.plan import ModelIdentity, Plan
    from moa.progress import Progress
    from moa.search import baselines

    for path in (json, heat_map):
        if path:
            check_writable(path)
    wanted = _numbers(lengths, "--lengths") or ()
    chosen = {"none": (), "all": TASKS}.get(tasks, tuple(tasks.split(",")))
    config = EvaluateConfig(wanted, items, chosen, decode_steps=decode_steps, seed=seed)
    others = [] if against == "none" else against.split(",")
    if set(others) - {"dense", "uniform", *baselines.NAMES}:
        raise InputError(
            f"--against {against!r}: expected some of dense, uniform, {', '.join(baselines.NAMES)}; or none"
        )
    plans = {path.stem: Plan.load(path) for path in plan or ()}
    losses = _losses(run_dir, mixture) if set(others) & set(baselines.NAMES) else {}
    identity = ModelIdentity.of(load_config(model))
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
                try:
                    methods[label] = baselines.baseline(other, losses, identity, density)
                except InfeasibleBudgetError as error:
                    out.print(f"{label} is left out: {error}", highlight=False)
        methods[f"MoA {name}"] = rules
    if not methods:
        raise InputError("nothing to evaluate; give a --plan, or --against dense")
    devices = device.split(",")
    if len(devices) > 1:
        rows = evaluate_on(devices, model, dtype, methods, config, Progress(quiet))
    else:
        rows = measure(_load(model, dtype, device, quiet), methods, config, Progress(quiet))
    out.print(table(rows))
    for found in effective_lengths(rows):
        reach = (
            f"up to {found['length']:,} tokens, {found['mean_span']:,} stored" if found["length"] else "at no length"
        )
        out.print(f"{found['method']}: 0.9 of the passkeys found {reach}", highlight=False)
    if json:
        command = "moa " + " ".join(sys.argv[1:])
        machine = device_info(devices)
        write_json(json, to_json(rows, command, str(identity), machine))
        write_text(json.with_suffix(".md"), to_markdown(rows, command, machine))
        out.print(f"Wrote {json} and {json.with_suffix('.md').name}", highlight=False)
    if heat_map:
        from moa.report.heat_maps import heat_maps

        heat_maps(rows, heat_map)
        out.print(f"Wrote {heat_map}", highlight=False)


def _losses(run_dir: Path, mixture: str) -> Any:
    """Loss tables per KV head of a finished search."""
    from moa.progress import SILENT
    from moa.search.pipeline import Run, profiled
    from moa.search.profile import kv_losses

    tables, _, identity = profiled(Run(run_dir, SILENT))
    return kv_losses(tables, identity.kv_heads, _weights(mixture))


@app.command("lm-eval", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def lm_eval(context: typer.Context) -> None:
    """EleutherAI's lm-eval with the model `moa`: run --model moa --model_args pretrained=MODEL,plan=FILE --tasks ..."""
    try:
        from lm_eval.__main__ import cli_evaluate

        import moa.evaluation.lm_eval  # noqa: F401 (registers the model)
    except ImportError as error:
        raise InputError(f"lm-eval is not installed ({error}); pip install 'moa-spans[lm-eval]'") from error
    sys.argv = ["lm_eval", *context.args]  # its own parser reads them there
    cli_evaluate()


@app.command("serve", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
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


@app.command()
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
    from moa.plan import ModelIdentity, Plan
    from moa.serving.deal import dealable
    from moa.serving.sizing import sizes, to_json, to_markdown

    if (model is None) == (shape is None):
        raise InputError("give a model or a --shape, one of the two")
    if shape is not None and shape not in SHAPES:
        raise InputError(f"unknown --shape {shape!r}; expected one of {', '.join(SHAPES)}")
    config = load_config(str(model)) if shape is None else SHAPES[shape]
    identity = ModelIdentity.of(config)
    plans = {f"MoA {path.stem}": Plan.load(path) for path in plan or ()}
    for rules in plans.values():
        rules.check_fits(identity)
    if not plans:
        plans = {f"MoA {100 * each:g} %": typical_plan(identity, each) for each in _densities(density)}
    weights, deals = weight_bytes(config), dealable(config)
    rows = [
        row
        for ranks in _numbers(gpus, "--gpus") or ()
        for length in _numbers(lengths, "--lengths") or ()
        for row in sizes(
            shape or str(model), identity, weights, plans, length, ranks, 1e9 * memory, block_size, deals=deals
        )
    ]
    _bench(json, to_markdown, lambda left, keep: to_json(rows, 1e9 * memory, block_size))


bench_app = typer.Typer(no_args_is_help=True, help="Measure speed next to what people would otherwise use.")
app.add_typer(bench_app, name="bench")


@bench_app.command("attention")
def bench_attention(
    json: Annotated[Path | None, typer.Option("--json", help="Write the numbers here, and a .md table beside.")] = None,
    quiet: Quiet = False,
) -> None:
    """Our kernels on an NVIDIA GPU, next to dense attention and other ways to run the same mask."""
    from moa.benchmark.attention import bench_attention as measure
    from moa.benchmark.attention import to_markdown
    from moa.progress import Progress

    _bench(json, to_markdown, lambda left, keep: measure(Progress(quiet)))


@bench_app.command("profile")
def bench_profile(
    items: Annotated[int, typer.Option(help="Calibration items at each length.")] = 50,
    json: Annotated[Path | None, typer.Option("--json", help="Write the numbers here, and a .md table beside.")] = None,
    quiet: Quiet = False,
) -> None:
    """The profile stage on models of 7B and 8B shape (random weights), next to plain forward and backward passes."""
    from moa.benchmark.profile import bench_profile as measure
    from moa.benchmark.profile import to_markdown
    from moa.progress import Progress

    _bench(json, to_markdown, lambda left, keep: measure(items, Progress(quiet)))


@bench_app.command("throughput")
def bench_throughput(
    model: Annotated[
        str | None, typer.Argument(help="Folder, Hub name, .gguf file or demo; or leave it out and give --shape.")
    ] = None,
    shape: Annotated[
        str | None, typer.Option(help="llama-7b, llama-13b, llama3-8b, llama3-70b or qwen2.5-7b, with random weights.")
    ] = None,
    plan: Annotated[list[Path] | None, typer.Option("--plan", help="A plan file (repeat the option).")] = None,
    density: Annotated[str, typer.Option(help="Without a --plan: densities of typical plans.")] = "0.5",
    against: Annotated[str, typer.Option(help="Of dense-dynamic, dense-static, uniform; or none.")] = (
        "dense-dynamic,dense-static,uniform"
    ),
    lengths: Annotated[str, typer.Option(help="Total lengths N, prompt and new tokens.")] = "4096",
    batch: Annotated[str, typer.Option(help="Sequences at once, or max: as many as fit on the GPU.")] = "1",
    steps: Annotated[int, typer.Option(min=1, help="Tokens in each of six timed rounds.")] = 16,
    json: Annotated[Path | None, typer.Option("--json", help="Write the numbers here, and a .md table beside.")] = None,
    dtype: DType = "auto",
    device: Device = "auto",
    quiet: Quiet = False,
) -> None:
    """How fast a whole model decodes under plans and without, and how close to what its bytes allow."""
    import torch

    from moa.benchmark.shapes import SHAPES, random_model
    from moa.benchmark.throughput import DENSE_DYNAMIC, DENSE_STATIC, to_markdown, typical_plan
    from moa.benchmark.throughput import bench_throughput as measure
    from moa.evaluation.compare import device_info
    from moa.models import pick_device, pick_dtype
    from moa.plan import Plan
    from moa.progress import Progress

    if (model is None) == (shape is None):
        raise InputError("give a model or a --shape, one of the two")
    if shape is not None and shape not in SHAPES:
        raise InputError(f"unknown --shape {shape!r}; expected one of {', '.join(SHAPES)}")
    others = [] if against == "none" else against.split(",")
    if set(others) - {DENSE_DYNAMIC, DENSE_STATIC, "uniform"}:
        raise InputError(f"--against {against!r}: expected some of {DENSE_DYNAMIC}, {DENSE_STATIC}, uniform; or none")
    wanted = _numbers(lengths, "--lengths") or ()
    rows = None if batch == "max" else (_numbers(batch, "--batch") or (1,))[0]
    plans = {f"MoA {path.stem}": Plan.load(path) for path in plan or ()}
    if shape is not None:
        on = pick_device(device)
        weights = pick_dtype(dtype, on)
        loaded = random_model(shape, on, weights if isinstance(weights, torch.dtype) else torch.bfloat16)
    else:
        loaded = _load(str(model), dtype, device, quiet)
    for rules in plans.values():
        rules.check_fits(loaded.identity)
    if not plans:
        plans = {f"MoA {100 * each:g} %": typical_plan(loaded.identity, each) for each in _densities(density)}
    if "uniform" in others:
        budgets = {round(max(rules.density(length) for length in wanted), 4) for rules in plans.values()}
        plans |= {f"uniform {100 * each:.3g} %": Plan.uniform(loaded.identity, each) for each in sorted(budgets)}
    dense = [name for name in others if name != "uniform"]

    machine = {"device": device_info([device])}

    def run(left: dict[str, Any], keep: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        known = left["rows"] if left.get("device") == machine["device"] else []
        return machine | measure(
            loaded, plans, dense, wanted, rows, steps, Progress(quiet), known, lambda found: keep(machine | found)
        )

    _bench(json, to_markdown, run)


def _densities(text: str) -> list[float]:
    from moa.plan import check_density

    try:
        found = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise InputError(f"--density {text!r}: expected numbers above 0 and up to 1, such as 0.5,0.25") from error
    for each in found:
        check_density(each)
    return found


def _bench(
    json: Path | None,
    to_markdown: Callable[[dict[str, Any]], str],
    run: Callable[[dict[str, Any], Callable[[dict[str, Any]], None]], dict[str, Any]],
) -> None:
    """Run a benchmark, print its table, and write both where ``json`` says.

    ``run`` takes what an interrupted call of the same command has left (or nothing), and what keeps its own.
    """
    from rich.markdown import Markdown

    from moa.files import check_writable, read_json, write_json, write_text

    command = {"command": "moa " + " ".join(sys.argv[1:])}
    partial = None
    left: dict[str, Any] = {}
    if json:
        check_writable(json)
        partial = json.with_suffix(".partial.json")
        left = read_json(partial) if partial.is_file() else {}

    def keep(found: dict[str, Any]) -> None:
        if partial:
            write_json(partial, command | found)

    result = command | run(left if left.get("command") == command["command"] else {}, keep)
    out.print(Markdown(to_markdown(result)))
    if json and partial:
        write_json(json, result)
        write_text(json.with_suffix(".md"), to_markdown(result))
        partial.unlink(missing_ok=True)


@app.command("env")
def environment() -> None:
    """What this installation runs on."""
    import torch

    table = Table.grid(padding=(0, 2))
    table.add_row("moa-spans", _version("moa-spans"))
    table.add_row("python", platform.python_version())
    for name in ("torch", "transformers", "triton", "numpy", "scipy"):
        table.add_row(name, _version(name))
    table.add_row("cpu", f"{platform.machine()}, {torch.get_num_threads()} threads")
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    table.add_row("gpu", ", ".join(gpus) or "none")
    from moa.attention import backends

    device = torch.device("cuda" if gpus else "cpu")
    backend = backends.pick(device, torch.bfloat16, 128)
    table.add_row("attention", f"{backend.__name__} on {device} (bfloat16, head_dim 128)")
    out.print(table, highlight=False)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def main(arguments: list[str] | None = None) -> None:
    """Entry point: errors meant for people are one line and exit code 1; ``--debug`` shows where they come from."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    given = [argument for argument in given if argument != "--debug"]
    complaints = Console(stderr=True)
    try:
        code = app(args=given, standalone_mode=False, prog_name="moa")
    except _UsageError as error:
        if debug:
            raise
        complaints.print(f"error: {error.format_message()} (see --help)", markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)
    except MoAError as error:
        if debug:
            raise
        complaints.print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)
    except (KeyboardInterrupt, typer.Abort):
        if debug:
            raise
        code = _INTERRUPTED
    if code == _INTERRUPTED:  # typer may have caught the interrupt itself
        complaints.print("interrupted; finished work is kept, run the same command again to go on", highlight=False)
    sys.exit(code if isinstance(code, int) else 0)
