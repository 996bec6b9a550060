"""`moa bench profile`: what the profile stage costs on models of real size, next to a plain forward and backward pass.

The plain passes run the same model with PyTorch's own attention, frozen weights and the gradient from the embeddings
on, as the profile stage does: once with layers recomputed like there, once without, which is faster where it fits.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel

from moa.benchmark.shapes import random_model
from moa.errors import InputError
from moa.models import LoadedModel
from moa.progress import SILENT, Progress
from moa.search.influence import Estimator
from moa.search.items import CalibrationItem, CalibrationSet
from moa.search.profile import ProfileConfig, answer_loss, differentiable, profile

_ANSWER = 64  # tokens that carry loss
_REPEATS = 3
_DEVICE = torch.device("cuda")
_CASES = {"llama-7b": (2048, 4096, 8192), "llama3-8b": (32768,)}
_MANY = "llama-7b"  # of which all calibration items are run


@dataclass(frozen=True)
class Row:
    """One method at one length.

    Attributes
    ----------
    shape : str
    length : int
        Tokens of an item.
    method : str
    items : int
        Items that were run, after one to warm up.
    seconds : float
        Median time of one item; where all calibration items were run, their mean.
    ratio_to_plain : float
        Over the plain pass with layers recomputed.
    peak_gb : float
        Most device memory in use, weights included, 1e9 bytes.
    """

    shape: str
    length: int
    method: str
    items: int
    seconds: float
    ratio_to_plain: float
    peak_gb: float


def bench_profile(items: int = 50, progress: Progress = SILENT) -> dict[str, Any]:
    """Measure all cases; returns what the result file holds, without the command.

    Parameters
    ----------
    items : int
        Calibration items at each length of the 7B shape.

    Raises
    ------
    InputError
        If there is no NVIDIA GPU, or ``items`` is not positive.
    """
    if not torch.cuda.is_available():
        raise InputError("moa bench profile needs an NVIDIA GPU, and PyTorch sees none here")
    if items < 2:
        raise InputError(f"--items {items}: expected at least 2, to time them one after another")
    rows: list[Row] = []
    for shape, lengths in _CASES.items():
        progress.say(f"building {shape} with random weights")
        loaded = random_model(shape, _DEVICE)
        for length in progress.track(lengths, shape):
            rows += _rows(loaded, length, items if shape == _MANY else 1)
        del loaded
        torch.cuda.empty_cache()
    many = [row for row in rows if row.shape == _MANY and row.items == items and row.method == _OURS[Estimator.JOINT]]
    return {
        "device": torch.cuda.get_device_name(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "calibration_minutes": sum(row.seconds * row.items for row in many) / 60,
        "rows": [asdict(row) for row in rows],
    }


def to_markdown(result: dict[str, Any]) -> str:
    """The result as a table."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    lines = [
        f"`{result['command']}` on {result['device']}, {versions}; bfloat16, random weights. All calibration items of "
        f"the 7B shape: {result['calibration_minutes']:.2f} minutes.",
        "",
        "| shape | N | method | items | seconds an item | / plain, recomputing | peak GB |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {row['shape']} | {row['length']} | {row['method']} | {row['items']} | {row['seconds']:.3f} | "
        f"{row['ratio_to_plain']:.2f} | {row['peak_gb']:.1f} |"
        for row in result["rows"]
    ]
    return "\n".join(lines) + "\n"


_OURS = {estimator: f"profile, {estimator} influence" for estimator in Estimator}


def _rows(loaded: LoadedModel, length: int, items: int) -> list[Row]:
    generator = np.random.default_rng(0)
    vocabulary = loaded.model.config.vocab_size
    answer = np.arange(length - _ANSWER, length)
    members = tuple(
        CalibrationItem(generator.integers(0, vocabulary, length), answer, answer) for _ in range(max(items, _REPEATS))
    )
    times: dict[str, tuple[int, float, float]] = {}  # items, seconds, peak

    def measure(method: str, run: Callable[[CalibrationItem], Any]) -> None:
        run(members[0])
        torch.cuda.reset_peak_memory_stats()
        seconds = statistics.median(_seconds(partial(run, item)) for item in members[:_REPEATS])
        times[method] = _REPEATS, seconds, torch.cuda.max_memory_allocated() / 1e9

    plain = "plain SDPA, recomputing"
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        with sdpa_kernel(backend), differentiable(loaded.model):
            measure(f"{plain} ({backend.name.split('_')[0].lower()})", lambda item: _plain(loaded, item))
    fastest = min(times, key=lambda method: times[method][1])
    try:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION if "cudnn" in fastest else SDPBackend.FLASH_ATTENTION):
            measure("plain SDPA, keeping activations", lambda item: _plain(loaded, item))
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()  # does not fit, so there is no row
    for estimator, name in _OURS.items():
        config = ProfileConfig(estimator)
        measure(name, lambda item, config=config: profile(loaded, _set((item,)), config))  # type: ignore[misc]
    if items > 1:
        config = ProfileConfig()
        torch.cuda.reset_peak_memory_stats()
        seconds = _seconds(lambda: profile(loaded, _set(members[:items]), config)) / items
        times[_OURS[config.estimator]] = items, seconds, torch.cuda.max_memory_allocated() / 1e9
    return [
        Row(loaded.name, length, method, count, seconds, seconds / times[fastest][1], peak)
        for method, (count, seconds, peak) in times.items()
    ]


def _set(items: tuple[CalibrationItem, ...]) -> CalibrationSet:
    return CalibrationSet({(len(items[0].input_ids), "random"): items})


def _plain(loaded: LoadedModel, item: CalibrationItem) -> None:
    """A forward and backward pass with the loss on the answer."""
    model = loaded.model
    ids = torch.as_tensor(item.input_ids, device=model.device)[None]
    embedded = model.get_input_embeddings()(ids).requires_grad_()
    logits = model(inputs_embeds=embedded, use_cache=False, logits_to_keep=_ANSWER + 1).logits
    answer_loss(logits[0, :-1], ids[0, -_ANSWER:], Estimator.JOINT).backward()


def _seconds(run: Callable[[], Any]) -> float:
    torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - started
