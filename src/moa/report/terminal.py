"""A plan in the terminal: its spans as a heat map, and what it costs."""

from collections.abc import Sequence

import torch
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from moa.plan import Plan

_LOW, _HIGH = (28, 42, 84), (255, 214, 90)  # colours of an empty and of a full span


def heat_map(plan: Plan, length: int) -> RenderableType:
    """Spans by layer (rows) and KV head (columns) as shares of ``length``: darkest for 0, brightest for all of it."""
    shares = plan.spans(length) / length
    grid = Table.grid(padding=(0, 1))
    for layer, row in enumerate(shares):
        cells = Text()
        for share in row:
            red, green, blue = (round(low + (high - low) * share) for low, high in zip(_LOW, _HIGH, strict=True))
            ink = "black" if share > 0.5 else "white"
            cells.append(f"{100 * share:4.0f} ", style=f"{ink} on rgb({red},{green},{blue})")
        grid.add_row(Text(f"layer {layer:2d}", style="dim"), cells)
    title = Text(f"Spans in % of N = {length:,}, by layer and KV head", style="bold")
    return Group(title, grid)


def costs(plan: Plan, lengths: Sequence[int], dtype: torch.dtype) -> Table:
    """Density and KV bytes of one sequence at several lengths, beside dense."""
    table = Table(title=f"KV cache of one sequence, {str(dtype).removeprefix('torch.')}")
    for column in ("N", "density", "stored", "dense", "shortest span", "longest span"):
        table.add_column(column, justify="right")
    dense = Plan.dense(plan.model)
    for length in lengths:
        spans = plan.spans(length)
        table.add_row(
            f"{length:,}",
            f"{plan.density(length):.3f}",
            size(plan.kv_bytes(length, dtype)),
            size(dense.kv_bytes(length, dtype)),
            f"{spans.min():,}",
            f"{spans.max():,}",
        )
    return table


def size(count: float) -> str:
    """Bytes for people: 12.3 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
