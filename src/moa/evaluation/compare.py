"""The table of `moa eval`: what plans cost in quality and give in memory and speed, beside the dense model."""

import os
import platform
import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from rich import box
from rich.table import Table
from transformers import DynamicCache

from moa.cache import SpanCache
from moa.errors import InputError
from moa.evaluation.tasks import (
    TaskItem,
    default_evaluation_text,
    lines_items,
    logits_at,
    passkey_items,
    score,
    text_chunks,
    text_perplexity,
)
from moa.models import LoadedModel
from moa.plan import Plan
from moa.progress import SILENT, Progress
from moa.runtime import apply

PASSKEY = "passkey"
LINES = "lines"
PERPLEXITY = "perplexity"
TASKS = (PASSKEY, LINES, PERPLEXITY)

# Prompts of one length are answered together, up to this many tokens.
_BATCH_TOKENS = 8192
# Rounds of decode steps: the first warms up, the median of the others counts.
_ROUNDS = 6


@dataclass(frozen=True)
class EvaluateConfig:
    """What to measure.

    Attributes
    ----------
    lengths : tuple of int
        Total lengths N, prompt and new tokens.
    items : int
        Prompts of each retrieval task and length.
    tasks : tuple of str
        Of `TASKS`.
    max_new_tokens : int
        Tokens a method may write to answer; the prompts are so much shorter than N.
    chunks : int
        Stretches of text, of N tokens each, for the perplexity.
    decode_steps : int
        Tokens in a timed round at the longest length; 0 leaves speed out.
    seed : int
        Of the retrieval tasks.
    """

    lengths: tuple[int, ...]
    items: int = 20
    tasks: tuple[str, ...] = TASKS
    max_new_tokens: int = 12
    chunks: int = 4
    decode_steps: int = 16
    seed: int = 0


@dataclass(frozen=True)
class Row:
    """One method at one length; None is what was not measured.

    Attributes
    ----------
    method : str
        A plan's name, or the dense model's.
    length : int
        N, tokens.
    density : float
        Stored over all KV tokens, by the plan.
    kv_bytes : int
        Keys and values of one sequence of N tokens, measured in the cache.
    dense_kv_bytes : int
        The same if every token were stored.
    passkey, lines : float, optional
        Share of ``items`` prompts answered right.
    perplexity : float, optional
        Of held-out text, in chunks of N tokens.
    decode_tokens_per_s : float, optional
        One sequence, near the end of N tokens; at the longest length only.
    """

    method: str
    length: int
    density: float
    kv_bytes: int
    dense_kv_bytes: int
    items: int
    passkey: float | None = None
    lines: float | None = None
    perplexity: float | None = None
    decode_tokens_per_s: float | None = None


def evaluate(
    loaded: LoadedModel, plans: Mapping[str, Plan | None], config: EvaluateConfig, progress: Progress = SILENT
) -> list[Row]:
    """Measure several plans on the same prompts and texts.

    Parameters
    ----------
    plans : mapping from a method's name to its plan
        None stands for the model as it is, with transformers' own cache.

    Returns
    -------
    list of Row
        For each length, in rising order, one row for each method, in the order given.

    Raises
    ------
    InputError
        If a length is beyond the model's context or too short for a task, a task is unknown, or no plan is given.
    PlanError
        If a plan does not fit the model.
    """
    _check(loaded, plans, config)
    text = default_evaluation_text()
    lengths = sorted(set(config.lengths))
    chunks = {length: text_chunks(loaded.tokenizer, text, length, config.chunks) for length in lengths}
    prompts = {
        (length, task): _items(loaded, text, task, length - config.max_new_tokens, config)
        for length in lengths
        for task in config.tasks
        if task != PERPLEXITY
    }
    rows = []
    for length, (name, plan) in progress.track(
        [(n, method) for n in lengths for method in plans.items()], "Evaluating"
    ):
        measured: dict[str, float] = {}
        for task in config.tasks:
            if task == PERPLEXITY:
                with _in_force(loaded, plan):
                    measured[task] = text_perplexity(loaded.model, chunks[length])
            else:
                measured[task] = _accuracy(loaded, plan, prompts[length, task], config.max_new_tokens)
        rows.append(
            Row(
                method=name,
                length=length,
                density=1.0 if plan is None else plan.density(length),
                kv_bytes=_kv_bytes(loaded, plan, chunks[length][0]),
                dense_kv_bytes=Plan.dense(loaded.identity).kv_bytes(length, loaded.model.dtype),
                items=config.items,
                passkey=measured.get(PASSKEY),
                lines=measured.get(LINES),
                perplexity=measured.get(PERPLEXITY),
            )
        )
    if config.decode_steps:
        speeds = _decode_speeds(loaded, plans, chunks[lengths[-1]][0], config.decode_steps)
        last = len(rows) - len(plans)
        rows[last:] = [replace(row, decode_tokens_per_s=speeds[row.method]) for row in rows[last:]]
    return rows


def table(rows: Sequence[Row]) -> Table:
    """The rows as a table for the terminal, narrow enough for 80 columns."""
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for heading in _HEADINGS:
        method = heading == "method"
        shown.add_column(heading, justify="left" if method else "right", no_wrap=method)
    for row, following in zip_longest(rows, rows[1:]):
        shown.add_row(*_cells(row), end_section=following is not None and following.length != row.length)
    return shown


def to_json(rows: Sequence[Row], command: str, device: Mapping[str, Any]) -> dict[str, Any]:
    """The rows with the command and the machine that made them, ready for `moa.files.write_json`."""
    return {"command": command, "device": dict(device), "rows": [asdict(row) for row in rows]}


def to_markdown(rows: Sequence[Row], command: str, device: Mapping[str, Any]) -> str:
    """The rows as a Markdown table, with the command and the machine below it."""
    ruler = ["---" if heading == "method" else "---:" for heading in _HEADINGS]
    lines = ["| " + " | ".join(cells) + " |" for cells in (_HEADINGS, ruler, *map(_cells, rows))]
    machine = ", ".join(f"{key} {value}" for key, value in device.items())
    return "\n".join([*lines, "", f"Made by `{command}` on {machine}.", ""])


def device_info(device: torch.device) -> dict[str, Any]:
    """What a measured number depends on besides the code."""
    info: dict[str, Any] = {
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    if device.type == "cuda":
        info["gpu"] = torch.cuda.get_device_name(device)
    return info


_HEADINGS = ("method", "N", "density", "KV MB", "smaller", "passkey", "lines", "ppl", "tok/s")


def _cells(row: Row) -> list[str]:
    def optional(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    return [
        row.method,
        str(row.length),
        f"{row.density:.3f}",
        f"{row.kv_bytes / 1e6:.2f}",
        f"{row.dense_kv_bytes / row.kv_bytes:.2f}x",
        optional(row.passkey, ".2f"),
        optional(row.lines, ".2f"),
        optional(row.perplexity, ".2f"),
        optional(row.decode_tokens_per_s, ".1f"),
    ]


def _check(loaded: LoadedModel, plans: Mapping[str, Plan | None], config: EvaluateConfig) -> None:
    if not plans or not config.lengths or config.items < 1 or config.chunks < 1:
        raise InputError("an evaluation needs at least one method, one length, one item and one chunk of text")
    for task in config.tasks:
        if task not in TASKS:
            raise InputError(f"unknown task {task!r}; expected {', '.join(TASKS)}")
    if max(config.lengths) > loaded.context_length:
        raise InputError(
            f"length {max(config.lengths):,} is beyond the context of {loaded.name}, {loaded.context_length:,} tokens; "
            "choose shorter lengths"
        )
    if 2 * _ROUNDS * config.decode_steps > max(config.lengths):
        raise InputError(
            f"{_ROUNDS} rounds of {config.decode_steps} decode steps are more than half of {max(config.lengths):,} "
            "tokens; choose fewer steps or a longer length"
        )
    for plan in plans.values():
        if plan is not None:
            plan.check_fits(loaded.identity)


def _items(loaded: LoadedModel, text: str, task: str, length: int, config: EvaluateConfig) -> list[TaskItem]:
    if task == PASSKEY:
        return passkey_items(loaded.tokenizer, text, length, config.items, config.seed)
    return lines_items(loaded.tokenizer, length, config.items, config.seed)


def _in_force(loaded: LoadedModel, plan: Plan | None) -> AbstractContextManager[Any]:
    return nullcontext() if plan is None else apply(loaded.model, plan)


def _empty_cache(loaded: LoadedModel, plan: Plan | None, length: int) -> Any:
    return DynamicCache(config=loaded.model.config) if plan is None else SpanCache(plan, length)


@torch.no_grad()
def _prefill(loaded: LoadedModel, ids: np.ndarray, cache: Any) -> torch.Tensor:
    """Read ids [tokens] into the cache; returns the greedy next token, int64 [1, 1]."""
    batch = torch.as_tensor(ids, device=loaded.model.device)[None]
    last = torch.tensor([batch.shape[1] - 1], device=loaded.model.device)
    return logits_at(loaded.model, batch, last, past_key_values=cache, use_cache=True).argmax(-1)


def _kv_bytes(loaded: LoadedModel, plan: Plan | None, ids: np.ndarray) -> int:
    """Bytes of keys and values in the cache of one sequence, ids [N]."""
    cache = _empty_cache(loaded, plan, len(ids))
    with _in_force(loaded, plan):
        _prefill(loaded, ids, cache)
    if isinstance(cache, SpanCache):
        return cache.nbytes()
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def _accuracy(loaded: LoadedModel, plan: Plan | None, items: Sequence[TaskItem], max_new_tokens: int) -> float:
    model: Any = loaded.model  # `generate` is not typed as callable
    rows = max(1, _BATCH_TOKENS // len(items[0].prompt_ids))
    right = 0
    with _in_force(loaded, plan):
        for first in range(0, len(items), rows):
            some = items[first : first + rows]
            batch = torch.as_tensor(np.stack([item.prompt_ids for item in some]), device=model.device)
            output = model.generate(
                input_ids=batch,
                attention_mask=torch.ones_like(batch),
                do_sample=False,
                max_new_tokens=max_new_tokens,
            )
            said = loaded.tokenizer.batch_decode(output[:, batch.shape[1] :], skip_special_tokens=True)
            right += sum(score(text, item.answer) for text, item in zip(said, some, strict=True))
    return right / len(items)


@torch.no_grad()
def _decode_speeds(
    loaded: LoadedModel, plans: Mapping[str, Plan | None], ids: np.ndarray, steps: int
) -> dict[str, float]:
    """Tokens per second of each method, one sequence that grows to ids' length N.

    Rounds of the methods alternate, so that a machine that slows down does so for all of them.
    """
    caches, tokens = {}, {}
    for name, plan in plans.items():
        caches[name] = _empty_cache(loaded, plan, len(ids))
        with _in_force(loaded, plan):
            tokens[name] = _prefill(loaded, ids[: len(ids) - _ROUNDS * steps], caches[name])
    seconds: dict[str, list[float]] = {name: [] for name in plans}
    for _ in range(_ROUNDS):
        for name, plan in plans.items():
            with _in_force(loaded, plan):
                _synchronize(loaded)
                started = time.perf_counter()
                for _ in range(steps):
                    logits = loaded.model(tokens[name], past_key_values=caches[name], use_cache=True).logits
                    tokens[name] = logits.argmax(-1)
                _synchronize(loaded)
                seconds[name].append(time.perf_counter() - started)
    return {name: steps / statistics.median(rounds[1:]) for name, rounds in seconds.items()}


def _synchronize(loaded: LoadedModel) -> None:
    if loaded.model.device.type == "cuda":
        torch.cuda.synchronize(loaded.model.device)


def _cpu_name() -> str:
    try:
        described = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:  # not Linux
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in described.splitlines() if line.startswith("model name"))
    return next(names, platform.processor())
