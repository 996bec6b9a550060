"""`moa show` and `moa convert`."""

from pathlib import Path
from typing import Annotated

import typer

from moa.cli.options import Output, numbers_of, out
from moa.errors import InputError


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
    wanted = numbers_of(lengths, "--lengths")
    kind = getattr(torch, dtype, None)
    if not isinstance(kind, torch.dtype):
        raise InputError(f"--dtype {dtype!r} is not a torch dtype, such as bfloat16")
    if at < 1:
        raise InputError(f"--at {at}: expected a positive length")
    assert wanted is not None
    out.print(f"{plan}: {loaded.model}", highlight=False)
    out.print(heat_map(loaded, at))
    out.print(costs(loaded, wanted, kind))


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
