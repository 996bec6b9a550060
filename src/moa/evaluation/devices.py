"""An evaluation shared out to several devices: a process each, with a model of its own, makes the dense model's answers
of one length, then takes one method at one length after another."""

import multiprocessing
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from multiprocessing.queues import Queue
from typing import Any

from moa.errors import InputError
from moa.evaluation.compare import EvaluateConfig, Measures, measure, prepare
from moa.evaluation.rows import ANSWERED, Row, in_order
from moa.models import LoadedModel, device_name, load_model
from moa.plan import Plan
from moa.progress import SILENT, Progress
from moa.search.items import CalibrationItem

_worker: Any = None  # model, prompts and settings of this process


def evaluate_on(
    devices: Sequence[str],
    model: str,
    dtype: str,
    plans: Mapping[str, Plan | None],
    config: EvaluateConfig,
    progress: Progress = SILENT,
    known: Sequence[Row] = (),
    keep: Callable[[Sequence[Row]], None] = lambda rows: None,
) -> list[Row]:
    """What `moa.evaluation.compare.evaluate` returns, measured on several devices at once.

    Parameters
    ----------
    devices : sequence of str
        Such as ``cuda:0``, ``cuda:1``; alike, where speed is measured. One named several times has as many processes,
        and speed cannot be measured.
    model, dtype : str
        As for `moa.models.load_model`.
    known, keep
        As for `evaluate`; rows are kept when all of a method's at one length are there.

    Raises
    ------
    InputError, PlanError
        As `evaluate`, and if speed is to be measured on a device that is named several times.
    """
    devices = [device_name(device) for device in devices]
    shared = [device for device, times in Counter(devices).items() if times > 1]
    if shared and config.decode_steps:
        raise InputError(
            f"{shared[0]} is named {devices.count(shared[0])} times, and speed cannot be measured on a device that "
            "works at something else; name it once, or give 0 decode steps"
        )
    context = multiprocessing.get_context("spawn")
    free = context.Queue()
    for device in devices:
        free.put(device)
    with ProcessPoolExecutor(len(devices), context, _start, (free, model, dtype, dict(plans), config)) as pool:
        longest_first = range(len(set(config.lengths)))[::-1]
        rows: list[Row] = []
        try:
            making = {at: pool.submit(_answer, at) for at in longest_first if _to_be_answered(at, plans, config, known)}
            if making:
                for made in progress.track(as_completed(making.values()), "Answers of the dense model", len(making)):
                    made.result()
            answers = {at: made.result() for at, made in making.items()}
            waiting = [
                pool.submit(_measure, name, at, tuple(known), answers.get(at)) for at in longest_first for name in plans
            ]
            for done in progress.track(as_completed(waiting), "Evaluating", len(waiting)):
                rows += done.result()
                keep(rows)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return in_order(rows, list(plans))


def _start(
    free: "Queue[str]", model: str, dtype: str, plans: Mapping[str, Plan | None], config: EvaluateConfig
) -> None:
    global _worker
    _worker = free.get(), model, dtype, plans, config


def _to_be_answered(at: int, plans: Mapping[str, Plan | None], config: EvaluateConfig, known: Sequence[Row]) -> bool:
    """Whether something is to be read on the dense model's answers, at the length that is number ``at``."""
    length = sorted(set(config.lengths))[at]
    have = {(row.method, row.task, row.length) for row in known}
    tasks = set(ANSWERED).intersection(config.tasks_at(length))
    return any((name, task, length) not in have for name in plans for task in tasks)


def _ready() -> tuple[LoadedModel, list[Measures], Mapping[str, Plan | None], EvaluateConfig]:
    """Model, prompts and settings of this process."""
    global _worker
    if len(_worker) == 5:  # here, since what an initialiser raises does not reach the caller
        device, model, dtype, plans, config = _worker
        loaded = load_model(model, dtype, device)
        _worker = loaded, prepare(loaded, plans, config), plans, config
    ready: tuple[LoadedModel, list[Measures], Mapping[str, Plan | None], EvaluateConfig] = _worker
    return ready


def _answer(at: int) -> list[CalibrationItem]:
    """The dense model's answers, at the length that is number ``at``."""
    _, measures, _, _ = _ready()
    return measures[at].answers


def _measure(name: str, at: int, known: Sequence[Row], answers: list[CalibrationItem] | None) -> list[Row]:
    """The rows of one method, at the length that is number ``at``; ``answers`` where any are to be read."""
    loaded, measures, plans, config = _ready()
    if answers is not None:
        measures[at].answers = answers
    if at < len(measures) - 1:  # speed belongs to the longest
        config = replace(config, decode_steps=0)
    return measure(loaded, measures[at : at + 1], {name: plans[name]}, config, known=known)
