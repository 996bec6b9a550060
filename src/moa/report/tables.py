"""The rows of an evaluation as a table: for the terminal, as Markdown, and as JSON."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table

from moa.evaluation.rows import (
    ANSWER_KL,
    ANSWER_PERPLEXITY,
    KV_MB,
    PERPLEXITY,
    RETRIEVAL_MEAN,
    SPEED,
    Row,
    effective_lengths,
    retrieval_means,
)
from moa.evaluation.tasks import RETRIEVAL

_FORMATS = {
    KV_MB: ("KV MB", ".2f"),
    RETRIEVAL_MEAN: ("retrieval", ".3f"),
    PERPLEXITY: ("ppl", ".2f"),
    ANSWER_PERPLEXITY: ("answer ppl", ".3f"),
    ANSWER_KL: ("KL", ".4f"),
    SPEED: ("tok/s", ".1f"),
}
_NAME = 17  # columns for a method; longer names go on below
_COLUMNS = (KV_MB, *RETRIEVAL, RETRIEVAL_MEAN, PERPLEXITY, ANSWER_PERPLEXITY, ANSWER_KL, SPEED)


def table(rows: Sequence[Row]) -> RenderableType:
    """The rows for the terminal: a line for each method and length, a column for each task.

    Where there are several retrieval tasks, they have a table of their own, with their mean.
    """
    if not retrieval_means(rows):
        return _table(rows)
    retrieval = [row for row in rows if row.task in RETRIEVAL]
    others = [row for row in rows if row.task not in RETRIEVAL]
    return Group(_table(retrieval), _table(others)) if others else _table(retrieval)


def _table(rows: Sequence[Row]) -> Table:
    shown = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    headings, lines = _pivot(rows)
    for heading, cells in zip(headings, zip(*lines, strict=True), strict=True):
        method, longest = heading == "method", max(map(len, cells))
        shown.add_column(
            heading,
            justify="left" if method else "right",
            overflow="fold",  # where a terminal is narrow headings go on below, numbers stay whole
            width=min(max(longest, len(heading)), _NAME) if method else None,
            min_width=None if method else longest,
        )
    for line, following in pairwise([*lines, None]):
        assert line is not None
        shown.add_row(*line, end_section=following is not None and following[1] != line[1])
    return shown


def to_json(rows: Sequence[Row], command: str, model: str, device: Mapping[str, Any]) -> dict[str, Any]:
    """The rows with the command, the model and the machine that made them, ready for `moa.files.write_json`."""
    return {
        "command": command,
        "device": dict(device),
        "model": model,
        "effective_length": effective_lengths(rows),
        "retrieval": [row.to_dict() for row in retrieval_means(rows)],
        "rows": [row.to_dict() for row in rows],
    }


def to_markdown(rows: Sequence[Row], command: str, device: Mapping[str, Any]) -> str:
    """The rows as a Markdown table, with the command and the machine below it."""
    headings, lines = _pivot(rows)
    ruler = ["---" if heading == "method" else "---:" for heading in headings]
    text = ["| " + " | ".join(cells) + " |" for cells in (headings, ruler, *lines)]
    effective = [
        f"{found['method']} {found['length']:,} tokens with {found['mean_span']:,} stored ({_times(found)})"
        for found in effective_lengths(rows)
        if found["length"]
    ]
    if effective:
        shortest = min(row.length for row in rows if row.task == "passkey")
        reach = f"passkey at least 0.9 from {shortest:,} tokens up to there"
        text += ["", f"Effective context length ({reach}): {'; '.join(effective)}."]
    machine = ", ".join(f"{key} {value}" for key, value in device.items())
    return "\n".join([*text, "", f"Made by `{command}` on {machine}.", ""])


def _times(found: Mapping[str, Any]) -> str:
    return f"{found['length'] / max(1, found['mean_span']):.1f} x"


def _pivot(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of a table with a line for each method and length."""
    rows = [*rows, *retrieval_means(rows)]
    tasks = sorted({row.task for row in rows}, key=_COLUMNS.index)
    cells = {(row.length, row.method, row.task): row for row in rows}
    methods = {(row.length, row.method): row.density for row in rows}
    lines = []
    for length in sorted({row.length for row in rows}):
        for (at, method), density in methods.items():
            if at == length:
                found = [cells.get((length, method, task)) for task in tasks]
                shown = [
                    "" if row is None else format(row.score, _FORMATS.get(row.task, ("", ".2f"))[1]) for row in found
                ]
                lines.append([method, str(length), f"{density:.3f}", *shown])
    return ["method", "N", "density", *(_FORMATS.get(task, (task, ""))[0] for task in tasks)], lines
