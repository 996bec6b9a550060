"""The table of `moa eval`: what methods keep of the dense model's answers, in how many bytes, and how fast.

A method is a plan, or no plan: the untouched dense model with its own cache. All methods see the same items.
"""

import os
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from rich.table import Table
from transformers import DynamicCache
from transformers.cache_utils import Cache

from moa.cache import SpanCache
from moa.errors import InputError
from moa.evaluation import TASKS
from moa.evaluation.tasks import TaskItem, lines_items, passkey_items, score, text_chunks, text_perplexity
from moa.models import LoadedModel
from moa.plan import Plan
from moa.progress import SILENT, Progress
from moa.report.terminal import size
from moa.runtime import apply

DENSE = "dense"
_BATCH = 4  # prompts of one task have one length, so they need no padding
_UNITS = {"memory": "kv_bytes", "speed": "decode_tokens_per_s"}


@dataclass(frozen=True)
class EvaluateConfig:
    """What is measured.

    Attributes
    ----------
    lengths : tuple of int
        Prompt lengths in tokens.
    tasks : tuple of str
        Of `TASKS`: passkey and lines are accuracies over ``items`` prompts; perplexity is that of ``chunks`` stretches
        of text; memory is the bytes of K and V in the cache after a prompt; speed is the rate of greedy decoding of
        one sequence behind a prompt, from the median time of a step over all rounds.
    items, chunks : int
    new_tokens : int
        Longest answer.
    rounds, steps : int
        Decoding is timed ``rounds`` times, ``steps`` tokens each, the methods taking turns.
    seed : int
    """

    lengths: tuple[int, ...]
    tasks: tuple[str, ...] = TASKS
    items: int = 20
    chunks: int = 4
    new_tokens: int = 8
    rounds: int = 5
    steps: int = 8
    seed: int = 2406

    def __post_init__(self) -> None:
        unknown = set(self.tasks) - set(TASKS)
        if unknown or not self.tasks:
            raise InputError(f"unknown tasks {sorted(unknown)}; choose from {', '.join(TASKS)}")
        if not self.lengths or min(self.lengths) < 1 or min(self.items, self.chunks, self.rounds, self.steps) < 1:
            raise InputError("lengths, items, chunks, rounds and steps must all be at least 1")


@dataclass(frozen=True)
class Row:
    """One measured number.

    Attributes
    ----------
    method : str
    density : float
        Stored KV over all KV by the plan, at ``length``.
    task : str
        passkey, lines, perplexity, kv_bytes or decode_tokens_per_s.
    length : int
        Tokens of the prompt or text.
    score : float
    n : int
        Items, chunks or timed steps behind the score.
    """

    method: str
    density: float
    task: str
    length: int
    score: float
    n: int


def evaluate(
    loaded: LoadedModel,
    methods: Mapping[str, Plan | None],
    text: str,
    config: EvaluateConfig,
    progress: Progress = SILENT,
) -> list[Row]:
    """Measure all methods on the same items.

    Parameters
    ----------
    methods : mapping of name to Plan or None
        None is the dense model.
    text : str
        Real text that no search has seen.

    Raises
    ------
    InputError
        If a length with its new tokens is beyond the model's context, or the text is too short.
    """
    extra = max(config.new_tokens, 1 + config.rounds * config.steps if "speed" in config.tasks else 0)
    for length in config.lengths:
        if length + extra > loaded.context_length:
            raise InputError(
                f"{length} tokens and {extra} new ones are beyond the context of {loaded.context_length} tokens of "
                f"{loaded.name}; evaluate at shorter lengths"
            )
    rows = []
    for length in config.lengths:
        for task in (name for name in TASKS if name in config.tasks):
            measured = _MEASURES[task](loaded, methods, text, length, config, progress)
            for name, (value, count) in measured.items():
                plan = methods[name]
                density = 1.0 if plan is None else plan.density(length)
                rows.append(Row(name, density, _UNITS.get(task, task), length, value, count))
    return rows


Measured = dict[str, tuple[float, int]]  # method -> (score, n)


def _retrieval(
    loaded: LoadedModel,
    methods: Mapping[str, Plan | None],
    items: Sequence[TaskItem],
    what: str,
    config: EvaluateConfig,
    progress: Progress,
) -> Measured:
    model: Any = loaded.model  # transformers' own types do not know that it generates
    right = dict.fromkeys(methods, 0)
    batches = [items[start : start + _BATCH] for start in range(0, len(items), _BATCH)]
    for batch in progress.track(batches, what):
        prompts = torch.from_numpy(np.stack([item.prompt_ids for item in batch])).to(loaded.model.device)
        for name, plan in methods.items():
            with _under(loaded, plan):
                tokens = model.generate(
                    prompts,
                    attention_mask=torch.ones_like(prompts),
                    max_new_tokens=config.new_tokens,
                    do_sample=False,
                )
            answers = loaded.tokenizer.batch_decode(tokens[:, prompts.shape[1] :], skip_special_tokens=True)
            right[name] += sum(score(answer, item.answer) for answer, item in zip(answers, batch, strict=True))
    return {name: (count / len(items), len(items)) for name, count in right.items()}


def _passkey(
    loaded: LoadedModel,
    methods: Mapping[str, Plan | None],
    text: str,
    length: int,
    config: EvaluateConfig,
    progress: Progress,
) -> Measured:
    items = passkey_items(loaded.tokenizer, text, length, config.items, config.seed)
    return _retrieval(loaded, methods, items, f"passkey at {length}", config, progress)


def _lines(
    loaded: LoadedModel,
    methods: Mapping[str, Plan | None],
    text: str,
    length: int,
    config: EvaluateConfig,
    progress: Progress,
) -> Measured:
    items = lines_items(loaded.tokenizer, length, config.items, config.seed)
    return _retrieval(loaded, methods, items, f"lines at {length}", config, progress)


def _perplexity(
    loaded: LoadedModel,
    methods: Mapping[str, Plan | None],
    text: str,
    length: int,
    config: EvaluateConfig,
    progress: Progress,
) -> Measured:
    chunks = text_chunks(loaded.tokenizer, text, length, config.chunks)
    measured = {}
    for name, plan in progress.track(methods.items(), f"perplexity at {length}", len(methods)):
        with _under(loaded, plan):
            measured[name] = (text_perplexity(loaded.model, chunks), config.chunks)
    return measured


def _memory(
    loaded: LoadedModel,
    methods: Mapping[str, Plan | None],
    text: str,
    length: int,
    config: EvaluateConfig,
    progress: Progress,
) -> Measured:
    measured = {}
    for name, plan in progress.track(methods.items(), f"memory at {length}", len(methods)):
        cache, _ = _prefilled(loaded, plan, text, length, new=0)
        measured[name] = (float(_cache_bytes(cache)), 1)
    return measured


def _speed(
    loaded: LoadedModel,
    methods: Mapping[str, Plan | None],
    text: str,
    length: int,
    config: EvaluateConfig,
    progress: Progress,
) -> Measured:
    new = 1 + config.rounds * config.steps
    state = {name: _prefilled(loaded, plan, text, length, new) for name, plan in methods.items()}
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for _ in progress.track(range(config.rounds), f"decode speed at {length}"):
        for name, plan in methods.items():
            cache, token = state[name]
            with _under(loaded, plan), torch.no_grad():
                for _ in range(config.steps):
                    _wait(loaded)
                    started = time.perf_counter()
                    logits = loaded.model(token, past_key_values=cache, logits_to_keep=1).logits
                    token = logits[:, -1:].argmax(-1)
                    _wait(loaded)
                    seconds[name].append(time.perf_counter() - started)
            state[name] = cache, token
    return {name: (1 / float(np.median(times)), len(times)) for name, times in seconds.items()}


_MEASURES = {"passkey": _passkey, "lines": _lines, "perplexity": _perplexity, "memory": _memory, "speed": _speed}


@contextmanager
def _under(loaded: LoadedModel, plan: Plan | None) -> Iterator[None]:
    if plan is None:
        yield
    else:
        with apply(loaded.model, plan):
            yield


def _prefilled(loaded: LoadedModel, plan: Plan | None, text: str, length: int, new: int) -> tuple[Cache, torch.Tensor]:
    """A cache that holds a prompt of ``length`` tokens of text, with room for ``new`` more, and the next token."""
    ids = torch.from_numpy(text_chunks(loaded.tokenizer, text, length, 1)).to(loaded.model.device)
    cache = DynamicCache(config=loaded.model.config) if plan is None else SpanCache(plan, length + new)
    with _under(loaded, plan), torch.no_grad():
        logits = loaded.model(ids, past_key_values=cache, logits_to_keep=1).logits
    return cache, logits[:, -1:].argmax(-1)


def _cache_bytes(cache: Cache) -> int:
    if isinstance(cache, SpanCache):
        return cache.nbytes()
    tensors = (tensor for layer in cache.layers for tensor in (layer.keys, layer.values))  # type: ignore[union-attr]
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def _wait(loaded: LoadedModel) -> None:
    if loaded.model.device.type == "cuda":
        torch.cuda.synchronize(loaded.model.device)


# What a person, a file and a document get to see ----------------------------------------------------------------------


def table(rows: Sequence[Row]) -> Table:
    """One line per length and method, one column per task."""
    view = Table()
    header, lines = _lines_of(rows)
    for index, column in enumerate(header):
        view.add_column(column, justify="left" if index == 1 else "right")
    previous = lines[0][0] if lines else ""
    for line in lines:
        if line[0] != previous:
            view.add_section()
            previous = line[0]
        view.add_row(*line)
    return view


def to_markdown(rows: Sequence[Row], command: str) -> str:
    """The same table for a document, with the command and the machine that made it."""
    header, lines = _lines_of(rows)
    ruled = [header, ["---"] * len(header), *lines]
    machine = ", ".join(str(value) for value in machine_info().values())
    body = "\n".join("| " + " | ".join(line) + " |" for line in ruled)
    return f"`{command}`\n\n{machine}\n\n{body}\n"


def to_json(rows: Sequence[Row], command: str, model: str) -> dict[str, Any]:
    """Everything measured, with where it comes from."""
    return {"command": command, "device": machine_info(), "model": model, "rows": [asdict(row) for row in rows]}


def _lines_of(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    shown = {
        "passkey": ("passkey", lambda value: f"{value:.2f}"),
        "lines": ("lines", lambda value: f"{value:.2f}"),
        "perplexity": ("perplexity", lambda value: f"{value:.2f}"),
        "kv_bytes": ("KV cache", size),
        "decode_tokens_per_s": ("decode tok/s", lambda value: f"{value:.1f}"),
    }
    tasks = [task for task in shown if any(row.task == task for row in rows)]
    cells: dict[tuple[int, str, float], dict[str, str]] = {}
    for row in rows:
        cells.setdefault((row.length, row.method, row.density), {})[row.task] = shown[row.task][1](row.score)
    header = ["N", "method", "density", *(shown[task][0] for task in tasks)]
    lines = [
        [f"{length:,}", method, f"{density:.3f}", *(values.get(task, "") for task in tasks)]
        for (length, method, density), values in cells.items()
    ]
    return header, lines


def machine_info() -> dict[str, str]:
    """The machine and the versions behind a measurement."""
    info = {
        "cpu": f"{_cpu_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "python": f"Python {platform.python_version()}",
        "torch": f"torch {torch.__version__}",
        "transformers": f"transformers {transformers.__version__}",
    }
    if torch.cuda.is_available():
        info["gpu"] = torch.cuda.get_device_name()
    return info


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
