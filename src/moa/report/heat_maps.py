"""Retrieval by length and depth as a picture: a panel for each method and task."""

import os
from collections.abc import Sequence
from importlib.util import find_spec

import numpy as np

from moa.errors import InputError
from moa.evaluation.rows import Row
from moa.evaluation.tasks import RETRIEVAL
from moa.files import write_atomically


def heat_maps(rows: Sequence[Row], path: str | os.PathLike[str]) -> None:
    """Draw the scores by depth of all retrieval tasks into a PNG file.

    Parameters
    ----------
    rows : sequence of Row
        As `moa.evaluation.compare.evaluate` returns them.
    path : path
        A PNG file.

    Raises
    ------
    InputError
        If no row is of a retrieval task, matplotlib is not installed, or the file cannot be written.
    """
    check_drawing([row.task for row in rows])
    shown = [row for row in rows if row.task in RETRIEVAL]
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(row.task for row in shown))
    methods = list(dict.fromkeys(row.method for row in shown))
    lengths = sorted({row.length for row in shown})
    figure = Figure(figsize=(1.2 + 0.5 * len(lengths) * len(tasks) + 0.8 * len(tasks), 1.4 + 1.3 * len(methods)))
    axes = figure.subplots(len(methods), len(tasks), squeeze=False)
    found = {(row.method, row.task, row.length): row.parts for row in shown}
    for i, method in enumerate(methods):
        for j, task in enumerate(tasks):
            depths = len(shown[0].parts)
            cells = [found.get((method, task, length)) or (np.nan,) * depths for length in lengths]
            panel = axes[i, j]
            image = panel.imshow(np.array(cells).T, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
            panel.set_xticks(range(len(lengths)), [_short(length) for length in lengths])
            panel.set_yticks([0, depths - 1], ["first", "last"] if j == 0 else [])
            if i == 0:
                panel.set_title(task, fontsize=9)
            if j == 0:
                panel.set_ylabel(method, fontsize=8)
            panel.tick_params(labelsize=7)
    figure.supxlabel("N, tokens", fontsize=8)
    figure.supylabel("depth in the text", fontsize=8)
    figure.colorbar(image, ax=axes, shrink=0.6, label="share found")
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=150, bbox_inches="tight"))


def check_drawing(tasks: Sequence[str]) -> None:
    """Raise InputError if none of the tasks is a retrieval task, or matplotlib is not installed."""
    if not set(tasks) & set(RETRIEVAL):
        raise InputError("a heat map needs a retrieval task, such as passkey; none is measured")
    if find_spec("matplotlib") is None:
        raise InputError("a heat map needs matplotlib: pip install 'moa-spans[report]'")


def _short(length: int) -> str:
    return f"{length // 1024}k" if length % 1024 == 0 else str(length)
