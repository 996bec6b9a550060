"""The command `moa`: parses, calls, prints."""

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from moa.cli import bench, evaluation, plans, running, search, serving
from moa.cli.options import out
from moa.errors import MoAError

# typer brings click along, under its own name in newer versions
_UsageError: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")

_INTERRUPTED = 130  # exit code, by convention

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


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


_REST = {"allow_extra_args": True, "ignore_unknown_options": True}  # for a program behind ours

for _command in (
    search.search,
    search.calibrate,
    search.profile,
    search.optimize,
    search.refine,
    search.validate,
    plans.show,
    plans.convert,
    running.generate,
    running.chat,
):
    app.command()(_command)
app.command("eval")(evaluation.evaluate)
app.command("lm-eval", context_settings=_REST)(evaluation.lm_eval)
app.command("serve", context_settings=_REST)(serving.serve)
app.command()(serving.size)
app.command("env")(environment)

_benches = typer.Typer(no_args_is_help=True, help="Measure speed next to what people would otherwise use.")
for _measure in (bench.attention, bench.profile, bench.throughput):
    _benches.command()(_measure)
app.add_typer(_benches, name="bench")


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
        complaints.print("interrupted; run the command again to go on from what it has kept, if any", highlight=False)
    sys.exit(code if isinstance(code, int) else 0)
