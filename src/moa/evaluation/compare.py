"""The evaluation: what plans cost in quality and give in memory and speed, beside the dense model."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

from moa.benchmark.decoding import ROUNDS, Method, decode_in_turn, kv_bytes
from moa.cache import SpanCache
from moa.errors import InputError
from moa.evaluation.answers import scores
from moa.evaluation.likelihood import answer_log_probs, divergences, logits_at, text_chunks, text_losses
from moa.evaluation.rows import ANSWER_KL, ANSWER_PERPLEXITY, ANSWERED, KV_MB, PERPLEXITY, SPEED, TASKS, Row, in_order
from moa.evaluation.tasks import RETRIEVAL, TaskItem
from moa.evaluation.text import default_evaluation_text
from moa.models import LoadedModel
from moa.plan import Plan
from moa.progress import SILENT, Progress
from moa.runtime import apply
from moa.search.calibrate import RETRIEVAL as RETRIEVAL_ANSWERS
from moa.search.calibrate import SUMMARY, CalibrateConfig, calibrate
from moa.search.items import CalibrationItem

# Prompts of one length are answered together, up to this many tokens; on a GPU no more than half of its free memory
# takes, at a token's keys and values and so many times its hidden state.
_BATCH_TOKENS = {"cpu": 8192, "cuda": 262_144}
_HIDDEN_STATES = 40
# Depths of a text and positions in it are reported in so many parts.
_PARTS = 5
# Answers are made with a seed of their own; calibration uses small ones.
_ANSWER_SEED = 1_000_003


@dataclass(frozen=True)
class EvaluateConfig:
    """What to measure.

    Attributes
    ----------
    lengths : tuple of int
        Total lengths N, prompt and new tokens.
    items : int
        Prompts of each retrieval task and length; of the dense model's answers half are to questions, half summaries.
        For the perplexity of text as many stretches of N tokens, or as the text has.
    tasks : tuple of str
        Of `TASKS`; ``lines@2048`` is measured at that length only.
    decode_steps : int
        Tokens in a timed round at the longest length; 0 leaves speed out.
    seed : int
        Of the retrieval tasks.
    """

    lengths: tuple[int, ...]
    items: int = 20
    tasks: tuple[str, ...] = ("passkey", "lines", PERPLEXITY)
    decode_steps: int = 16
    seed: int = 0

    def tasks_at(self, length: int) -> tuple[str, ...]:
        """The tasks that are measured at one of the lengths."""
        split = (task.partition("@") for task in self.tasks)
        return tuple(dict.fromkeys(task for task, at, only in split if not at or only == str(length)))


def evaluate(
    loaded: LoadedModel,
    plans: Mapping[str, Plan | None],
    config: EvaluateConfig,
    progress: Progress = SILENT,
    known: Sequence[Row] = (),
    keep: Callable[[Sequence[Row]], None] = lambda rows: None,
) -> list[Row]:
    """Measure several plans on the same prompts and texts.

    Parameters
    ----------
    plans : mapping from a method's name to its plan
        None stands for the model as it is, with transformers' own cache.
    known : sequence of Row
        What an interrupted call has kept; not measured again.
    keep : callable
        Called with all rows so far whenever there are more.

    Returns
    -------
    list of Row
        By rising length, in the order of `TASKS`, then in that of the methods given.

    Raises
    ------
    InputError
        If a length is beyond the model's context or too short for a task, a task is unknown, or no plan is given.
    PlanError
        If a plan does not fit the model.
    """
    rows = measure(loaded, prepare(loaded, plans, config), plans, config, progress, known, keep)
    return in_order(rows, list(plans))


def prepare(loaded: LoadedModel, plans: Mapping[str, Plan | None], config: EvaluateConfig) -> list["Measures"]:
    """The prompts and texts of every length, by rising length; errors as in `evaluate`."""
    _check(loaded, plans, config)
    return [Measures(loaded, config, length) for length in sorted(set(config.lengths))]


def measure(
    loaded: LoadedModel,
    measures: Sequence["Measures"],
    plans: Mapping[str, Plan | None],
    config: EvaluateConfig,
    progress: Progress = SILENT,
    known: Sequence[Row] = (),
    keep: Callable[[Sequence[Row]], None] = lambda rows: None,
) -> list[Row]:
    """The rows that `evaluate` returns, as they are measured, for prompts and texts that are `prepare`d."""
    have = {(row.method, row.task, row.length): row for row in known}
    rows = []
    work = [(at, task, name) for at in measures for task in (*config.tasks_at(at.length), KV_MB) for name in plans]
    for at, task, name in progress.track(work, "Evaluating"):
        row = have.get((name, task, at.length))
        if row is None:
            plan = plans[name]
            values, parts = at.of(task, plan)
            density = 1.0 if plan is None else plan.density(at.length)
            row = _row(name, density, task, at.length, values, parts)
        rows.append(row)
        keep(rows)
    if config.decode_steps:
        longest = measures[-1]
        methods = [Method(name, plan) for name, plan in plans.items()]
        for decoder, seconds in decode_in_turn(loaded, methods, longest.length, 1, config.decode_steps):
            name, plan = decoder.method.name, decoder.method.plan
            density = 1.0 if plan is None else plan.density(longest.length)
            rows.append(_row(name, density, SPEED, longest.length, [1 / second for second in seconds], ()))
    return rows


def _row(name: str, density: float, task: str, length: int, values: Sequence[float], parts: tuple[float, ...]) -> Row:
    """The row of what was measured, item by item: perplexities are exponentials of mean losses, speeds are medians."""
    mean = statistics.median(values) if task == SPEED else float(np.mean(values))
    error = float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else 0.0
    if task in (PERPLEXITY, ANSWER_PERPLEXITY):
        mean = math.exp(mean)
        error, parts = mean * error, tuple(math.exp(part) for part in parts)
    return Row(name, density, task, length, mean, len(values), error, parts)


def _check(loaded: LoadedModel, plans: Mapping[str, Plan | None], config: EvaluateConfig) -> None:
    if not plans or not config.lengths or config.items < 1:
        raise InputError("an evaluation needs at least one method, one length and one item")
    for entry in config.tasks:
        task, at, only = entry.partition("@")
        if task not in TASKS:
            raise InputError(f"unknown task {task!r}; expected {', '.join(TASKS)}")
        if at and only not in map(str, config.lengths):
            raise InputError(f"task {entry!r} asks for a length that is none of {config.lengths}")
    if min(config.lengths) < 2:
        raise InputError(f"length {min(config.lengths)} has no token that another predicts; choose 2 or more")
    if max(config.lengths) > loaded.context_length:
        raise InputError(
            f"length {max(config.lengths):,} is beyond the context of {loaded.name}, {loaded.context_length:,} tokens; "
            "choose shorter lengths"
        )
    if 2 * ROUNDS * config.decode_steps > max(config.lengths):
        raise InputError(
            f"{ROUNDS} rounds of {config.decode_steps} decode steps are more than half of {max(config.lengths):,} "
            "tokens; choose fewer steps or a longer length"
        )
    for plan in plans.values():
        if plan is not None:
            plan.check_fits(loaded.identity)


class Measures:
    """The prompts and texts of one length, and what a method makes of them."""

    def __init__(self, loaded: LoadedModel, config: EvaluateConfig, length: int):
        self.loaded, self.config, self.length = loaded, config, length
        text = default_evaluation_text()
        self.chunks = text_chunks(loaded.tokenizer, text, length, config.items)
        self.items: dict[str, list[TaskItem]] = {
            task: RETRIEVAL[task].make(
                loaded.tokenizer, text, length - RETRIEVAL[task].new_tokens, config.items, config.seed
            )
            for task in config.tasks_at(length)
            if task in RETRIEVAL
        }
        self._last: tuple[Plan | None, dict[str, list[float]]] | None = None

    @cached_property
    def answers(self) -> list[CalibrationItem]:
        """The dense model's answers to questions, and its summaries: made when they are first asked for."""
        sources = (RETRIEVAL_ANSWERS, SUMMARY)
        each = math.ceil(self.config.items / len(sources))
        settings = CalibrateConfig((self.length,), each, sources, seed=_ANSWER_SEED + self.config.seed)
        made = calibrate(self.loaded, default_evaluation_text(), settings)
        return [item for items in made.items.values() for item in items]

    def of(self, task: str, plan: Plan | None) -> tuple[list[float], tuple[float, ...]]:
        """Values of the single items, and means by depth or position."""
        if task == KV_MB:
            return [_kv_bytes(self.loaded, plan, self.chunks[0]) / 1e6], ()
        if task == PERPLEXITY:
            with _in_force(self.loaded, plan):
                losses = text_losses(self.loaded.model, self.chunks)
            return losses.mean(1).tolist(), tuple(part.mean() for part in np.array_split(losses.mean(0), _PARTS))
        if task in ANSWERED:
            return self._answered(plan)[task], ()
        items = self.items[task]
        with _in_force(self.loaded, plan):
            values = scores(
                self.loaded.model,
                self.loaded.tokenizer,
                RETRIEVAL[task],
                items,
                lambda length: _empty_cache(self.loaded, plan, length),
                _batch_tokens(self.loaded),
            )
        fifth = np.minimum([int(item.depth * _PARTS) for item in items], _PARTS - 1)
        by_depth = (values[fifth == part] for part in range(_PARTS))
        return values.tolist(), tuple(float(some.mean()) if len(some) else math.nan for some in by_depth)

    def _answered(self, plan: Plan | None) -> dict[str, list[float]]:
        """Loss of the dense answers, and divergence from the dense model on them, nats a token of each.

        Both come from one reading: what a plan was found to say is kept until another plan is asked for.
        """
        if self._last is None or self._last[0] != plan:
            found: dict[str, list[float]] = {ANSWER_PERPLEXITY: [], ANSWER_KL: []}
            for item in self.answers:
                dense = answer_log_probs(self.loaded.model, item)
                said = dense
                if plan is not None:
                    with _in_force(self.loaded, plan):
                        said = answer_log_probs(self.loaded.model, item)
                answer = torch.as_tensor(item.input_ids[item.answer], device=said.device)
                found[ANSWER_PERPLEXITY].append(float(-said.gather(1, answer[:, None]).mean()))
                found[ANSWER_KL].append(float(divergences(dense, said).mean()))
            self._last = plan, found
        return self._last[1]


def _batch_tokens(loaded: LoadedModel) -> int:
    device = loaded.model.device
    most = _BATCH_TOKENS.get(device.type, _BATCH_TOKENS["cpu"])
    if device.type != "cuda":
        return most
    identity, size = loaded.identity, loaded.model.dtype.itemsize
    stored = 2 * identity.layers * identity.kv_heads * identity.head_dim * size
    hidden = loaded.model.config.get_text_config(decoder=True).hidden_size * size
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    return min(most, free // 2 // (stored + _HIDDEN_STATES * hidden))


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
    return kv_bytes(cache)
