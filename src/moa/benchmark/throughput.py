"""`moa bench throughput`: how fast whole models decode, and how close that is to what their bytes allow.

A row is the steady state at the end of a sequence: the prompt fills the cache up to a few dozen tokens before N, and
the steps to N are timed. A step cannot be faster than reading the weights and the stored keys and values once at the
bandwidth of a large copy, measured in the same run; the fraction of that is in the table.

On a GPU every method has the memory for itself and may take its largest batch, which is found by trying; all of them
decode compiled (`moa.benchmark.decoding`), but for transformers' default cache.
"""

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import transformers

from moa.benchmark.decoding import (
    DENSE_DYNAMIC,
    ROUNDS,
    Decoder,
    Energy,
    Method,
    decode_in_turn,
    kv_bytes,
    weight_bytes,
)
from moa.errors import InputError
from moa.models import LoadedModel
from moa.plan import ModelIdentity, Plan
from moa.progress import SILENT, Progress

_SHRINK = 0.96  # a batch that did not fit is tried again so much smaller
_COPY_BYTES = {"cpu": 1 << 28, "cuda": 1 << 30}
_COPIES = 10


@dataclass(frozen=True)
class Row:
    """One method at one length.

    Attributes
    ----------
    shape, method : str
    density : float
        Stored over all KV tokens at this length, by the plan.
    length, batch : int
        Tokens of each sequence in the end, and sequences.
    tokens_per_s : float
        New tokens of all sequences together.
    step_ms : float
        Median over the timed steps.
    roofline_fraction : float
        The least time for the step's bytes over ``step_ms``.
    peak_gb : float or None
        Most device memory in use, 1e9 bytes, weights and prompt included; None where the device does not count it.
    kv_gb : float
        Stored keys and values, 1e9 bytes.
    prefill_s : float
        Time to read the prompts.
    joules_per_token : float or None
        None where the device does not tell.
    """

    shape: str
    method: str
    density: float
    length: int
    batch: int
    tokens_per_s: float
    step_ms: float
    roofline_fraction: float
    peak_gb: float | None
    kv_gb: float
    prefill_s: float
    joules_per_token: float | None


def typical_plan(identity: ModelIdentity, density: float) -> Plan:
    """A plan like those that searches find, for models without one: a few heads see all, the others half the density.

    Speed depends on the spans alone. The heads that see all are spread evenly over the layers.
    """
    window = density / 2
    whole = (density - window) / (1 - window)
    heads = np.arange(identity.layers * identity.kv_heads)
    full = (np.floor((heads + 1) * whole) > np.floor(heads * whole)).reshape(identity.layers, identity.kv_heads)
    return Plan.from_arrays(identity, np.zeros(full.shape), np.where(full, 1.0, window))


def ladder(name: str, plan: Plan) -> list[Method]:
    """What makes decoding under a plan fast, one thing after another: each method has one more than that before it.

    From transformers' default cache by way of a cache of fixed size, the plan's shorter spans and the larger batch that
    they leave room for, to our kernels (arXiv 2406.14909, its breakdown of the throughput).
    """
    dense, spans = DENSE_DYNAMIC.name, f"+ spans of {name}"
    batch = f"+ largest batch of {name}"
    return [
        DENSE_DYNAMIC,
        Method("+ static cache", static=True, batch_of=dense),
        Method(spans, plan, backend="sdpa", batch_of=dense),
        Method(batch, plan, backend="sdpa"),
        Method("+ kernels", plan, backend="triton", batch_of=batch),
    ]


def bench_throughput(
    loaded: LoadedModel,
    methods: Sequence[Method],
    lengths: Sequence[int],
    batch: int | None = 1,
    steps: int = 16,
    progress: Progress = SILENT,
    known: Sequence[Mapping[str, Any]] = (),
    keep: Callable[[dict[str, Any]], None] = lambda result: None,
) -> dict[str, Any]:
    """Measure every method at every length; returns what the result file holds, without the command and the device.

    Parameters
    ----------
    loaded : LoadedModel
    methods : sequence of Method
        With names of their own.
    lengths : sequence of int
        N, prompt and new tokens.
    batch : int or None
        None: as many sequences as fit, for each method; on a GPU only.
    steps : int
        Tokens of a timed round.
    known : sequence of dict
        Rows of an interrupted call, which are not measured again.
    keep : callable, optional
        Called with the result so far, whenever something was measured.

    Raises
    ------
    InputError
        If a length is beyond the model's context or too short for the steps, the device cannot do it, or has not the
        memory for so many sequences.
    """
    if (batch is not None and batch < 1) or steps < 1 or not lengths:
        raise InputError("a measurement needs at least one length, one sequence and one step")
    cuda = loaded.model.device.type == "cuda"
    for length in lengths:
        if not ROUNDS * steps < length <= loaded.context_length:
            raise InputError(
                f"length {length:,} is not possible: {ROUNDS} rounds of {steps} steps have to fit, and the context of "
                f"{loaded.name} is {loaded.context_length:,} tokens"
            )
    # On a GPU each method has the memory for itself; elsewhere they take turns, since machines slow down.
    groups = [[method] for method in methods] if cuda or batch is None else [list(methods)]
    bandwidth = _copy_bytes_per_second(loaded.model.device)
    rows = [Row(**row) for row in known]
    measured = {(row.length, row.method) for row in rows}
    work = [
        (length, group)
        for length in sorted(set(lengths))
        for group in groups
        if not {(length, method.name) for method in group} <= measured
    ]

    def result() -> dict[str, Any]:
        return {
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            "copy_gb_s": bandwidth / 1e9,
            "rows": [asdict(row) for row in rows],
        }

    for length, group in progress.track(work, "Decoding"):
        found = {row.method: row.batch for row in rows if row.length == length}
        taken = batch or found.get(group[0].batch_of or "")
        if taken is None:
            rows += _at_largest_batch(loaded, group, length, steps, bandwidth)
        else:
            try:
                rows += _measured(loaded, group, length, taken, steps, bandwidth)
            except torch.OutOfMemoryError as error:
                names = ", ".join(method.name for method in group)
                raise InputError(
                    f"{names}: {taken} sequences of {length:,} tokens do not fit on {loaded.model.device}; ask for "
                    "fewer (--batch, or --batch max), or measure without"
                ) from error
        keep(result())
        _free(loaded.model)
    return result()


def _measured(
    loaded: LoadedModel, methods: Sequence[Method], length: int, batch: int, steps: int, bandwidth: float
) -> list[Row]:
    energy = Energy(loaded.model.device)
    compiles = loaded.model.device.type == "cuda"
    found = decode_in_turn(loaded, methods, length, batch, steps, energy, compiles)
    return [
        _row(
            decoder,
            statistics.median(seconds),
            bandwidth,
            None if energy.joules is None else energy.joules / (len(seconds) * batch),
        )
        for decoder, seconds in found
    ]


def _row(decoder: Decoder, step: float, bandwidth: float, joules_per_token: float | None) -> Row:
    """The result, for the seconds of a step and the energy of a token."""
    model: Any = decoder.loaded.model
    method, length, batch, kv = decoder.method, decoder.length, decoder.batch, kv_bytes(decoder.cache)
    cuda = model.device.type == "cuda"
    return Row(
        shape=decoder.loaded.name,
        method=method.name,
        density=1.0 if method.plan is None else method.plan.density(length),
        length=length,
        batch=batch,
        tokens_per_s=batch / step,
        step_ms=1e3 * step,
        roofline_fraction=(weight_bytes(model) + kv) / bandwidth / step,
        peak_gb=torch.cuda.max_memory_allocated(model.device) / 1e9 if cuda else None,
        kv_gb=kv / 1e9,
        prefill_s=decoder.prefill_s,
        joules_per_token=joules_per_token,
    )


def _at_largest_batch(
    loaded: LoadedModel, methods: Sequence[Method], length: int, steps: int, bandwidth: float
) -> list[Row]:
    """From the batch whose keys and values alone would fill the memory downwards, until one fits."""
    device = loaded.model.device
    check_searches(device)
    plan = methods[0].plan or Plan.dense(loaded.identity)
    _free(loaded.model)
    batch = torch.cuda.mem_get_info(device)[0] // plan.kv_bytes(length, loaded.model.dtype)
    while batch >= 1:
        try:
            return _measured(loaded, methods, length, batch, steps, bandwidth)
        except torch.OutOfMemoryError:
            pass  # what it held is freed only outside of this clause
        _free(loaded.model)
        batch = min(batch - 1, int(batch * _SHRINK))
    names = ", ".join(method.name for method in methods)
    raise InputError(f"{names}: not even one sequence of {length:,} tokens fits on {device}")


def check_searches(device: torch.device) -> None:
    """Raise InputError where the largest batch cannot be looked for."""
    if device.type != "cuda":
        raise InputError(f"the largest batch is looked for on a GPU only, not on {device}; give a number")


def _free(model: Any) -> None:
    """Give back what the last method held, compiled steps included."""
    if model.device.type == "cuda":
        model.__dict__.pop("_compiled_call", None)
        torch._dynamo.reset()
    gc.collect()
    if model.device.type == "cuda":
        torch.cuda.empty_cache()


def to_markdown(result: dict[str, Any]) -> str:
    """The result as a table."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    machine = ", ".join(f"{key} {value}" for key, value in result["device"].items() if key not in result["versions"])
    counted = any(row["joules_per_token"] is not None for row in result["rows"])
    lines = [
        f"`{result['command']}` on {machine}; {versions}; copy {result['copy_gb_s']:.1f} GB/s.",
        "",
        "| model | N | batch | method | density | tokens/s | ms a step | of roofline | KV GB | peak GB | prompt s |"
        + " J a token |" * counted,
        "| --- | ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |" + " ---: |" * counted,
    ]
    lines += [
        f"| {row['shape']} | {row['length']} | {row['batch']} | {row['method']} | {row['density']:.3f} | "
        f"{row['tokens_per_s']:.1f} | {row['step_ms']:.2f} | {row['roofline_fraction']:.2f} | {row['kv_gb']:.3f} | "
        f"{_or_nothing(row['peak_gb'])} | {row['prefill_s']:.1f} |"
        + (f" {_or_nothing(row['joules_per_token'])} |" if counted else "")
        for row in result["rows"]
    ]
    return "\n".join(lines) + "\n"


def _or_nothing(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _copy_bytes_per_second(device: torch.device) -> float:
    """Bytes read and written a second by the fastest of some large copies."""
    source = torch.ones(_COPY_BYTES.get(device.type, _COPY_BYTES["cpu"]), dtype=torch.uint8, device=device)
    target, times = torch.empty_like(source), []
    for _ in range(_COPIES):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        target.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return 2 * source.nbytes / min(times)
