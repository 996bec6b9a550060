"""Whole models decoding: one method or several in turn, each with its cache filled by a prompt.

Dense models with a static cache decode compiled on a GPU, by transformers' own means, and plans decode recorded, and
compiled where that is asked for (`moa.decode_graph`).
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache, StaticCache

from moa.cache import SpanCache
from moa.evaluation.likelihood import logits_at
from moa.models import LoadedModel
from moa.plan import Plan
from moa.runtime import apply, prompt_chunk

ROUNDS = 6  # the first warms up; methods alternate, so that a machine that slows down does so for all


@dataclass(frozen=True)
class Method:
    """A way to decode.

    Attributes
    ----------
    name : str
    plan : Plan or None
        None: dense.
    static : bool
        A dense model's cache has a fixed size, and on a GPU its steps are compiled.
    backend : str or None
        Of the plan, as for `moa.apply`.
    batch_of : str or None
        Takes the largest batch of the method of this name, measured before it, instead of its own.
    """

    name: str
    plan: Plan | None = None
    static: bool = False
    backend: str | None = None
    batch_of: str | None = None


# transformers' default cache, and its cache of fixed size
DENSE_DYNAMIC = Method("dense-dynamic")
DENSE_STATIC = Method("dense-static", static=True)


class Energy:
    """Joules that a GPU takes between `start` and `stop`, by NVML; ``joules`` stays None where that is missing."""

    def __init__(self, device: torch.device):
        self.joules: float | None = None
        self._nvml: Any = None
        if device.type == "cuda" and find_spec("pynvml") is not None:
            nvml: Any = import_module("pynvml")
            try:
                nvml.nvmlInit()
                uuid = torch.cuda.get_device_properties(device).uuid
                self._handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
                nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)
            except nvml.NVMLError:
                return  # a part of a GPU, say, does not count
            self._nvml = nvml

    def start(self) -> None:
        if self._nvml is not None:
            self._before = self._read()

    def stop(self) -> None:
        if self._nvml is not None:
            self.joules = self._read() - self._before

    def _read(self) -> float:
        return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)) / 1e3  # of millijoules


def decode_in_turn(
    loaded: LoadedModel,
    methods: Sequence[Method],
    length: int,
    batch: int,
    steps: int,
    energy: Energy | None = None,
    compiles: bool = False,
) -> "list[tuple[Decoder, list[float]]]":
    """Seconds of the last steps to ``length`` tokens, for each method; they take turns.

    ``energy`` counts all rounds but the first. ``compiles`` is as for `Decoder`; of several methods each would compile
    anew whenever its turn comes.
    """
    alone = len(methods) == 1
    prompt = length - ROUNDS * steps
    decoders = [Decoder(loaded, method, length, batch, prompt, compiles) for method in methods]
    rounds = []
    with decoders[0].in_force() if alone else nullcontext():  # one alone keeps what it recorded
        for index in range(ROUNDS):
            if energy is not None and index == 1:
                energy.start()
            rounds.append([decoder.decode(steps) for decoder in decoders])
        if energy is not None:
            energy.stop()
    return [
        (decoder, [second for times in later for second in times])
        for decoder, (_, *later) in zip(decoders, zip(*rounds, strict=True), strict=True)
    ]


class Decoder:
    """One method with a prompt of ``prompt`` tokens in its cache, for sequences of ``length`` tokens.

    ``compiles`` is for plans; a dense model with a static cache is always compiled on a GPU.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        method: Method,
        length: int,
        batch: int,
        prompt: int,
        compiles: bool = False,
    ):
        self.loaded, self.method, self.length, self.batch = loaded, method, length, batch
        self._compiles = compiles
        model: Any = loaded.model
        if method.plan is not None:
            self.cache: Any = SpanCache(method.plan, length)
        elif method.static:
            self.cache = StaticCache(config=model.config, max_cache_len=length)
        else:
            self.cache = DynamicCache(config=model.config)
        if model.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(model.device)
        self._applied = False
        self._forward: Any = model
        if method.static and model.device.type == "cuda":
            self._forward = model.get_compiled_call(None)
        ids = np.random.default_rng(0).integers(0, model.config.get_text_config().vocab_size, (batch, prompt))
        self._seen = 0
        started = self._now()
        chunk = prompt_chunk(batch)
        with self.in_force():
            for first in range(0, prompt, chunk):
                self.tokens = self._read(torch.as_tensor(ids[:, first : first + chunk], device=model.device))
        self.prefill_s = self._now() - started

    def decode(self, steps: int) -> list[float]:
        """Seconds of each of so many steps."""
        with self.in_force():
            times = [self._now()]
            for _ in range(steps):
                self.tokens = self._step(self.tokens)
                times.append(self._now())
        return np.diff(times).tolist()

    @torch.no_grad()
    def _read(self, ids: torch.Tensor) -> torch.Tensor:
        last = torch.tensor([ids.shape[1] - 1], device=ids.device)
        self._seen += ids.shape[1]
        return logits_at(self.loaded.model, ids, last, past_key_values=self.cache, use_cache=True).argmax(-1)

    @torch.no_grad()
    def _step(self, token: torch.Tensor) -> torch.Tensor:
        model: Any = self.loaded.model
        if self.method.static:
            # as generate does: masks of fixed shape are made outside of what is compiled
            positions = torch.full_like(token, self._seen)
            inputs = model.prepare_inputs_for_generation(
                token, past_key_values=self.cache, position_ids=positions, use_cache=True
            )
        else:
            inputs = {"input_ids": token, "past_key_values": self.cache, "use_cache": True}
        self._seen += 1
        return self._forward(**inputs).logits.argmax(-1)

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """The method's plan on the model; nothing changes where it already is."""
        if self.method.plan is None or self._applied:
            yield
            return
        with apply(self.loaded.model, self.method.plan, self.method.backend, compile=self._compiles):
            self._applied = True
            try:
                yield
            finally:
                self._applied = False

    def _now(self) -> float:
        if self.loaded.model.device.type == "cuda":
            torch.cuda.synchronize(self.loaded.model.device)
        return time.perf_counter()


def kv_bytes(cache: Any) -> int:
    """Bytes of keys and values in a cache of ours or of transformers."""
    if isinstance(cache, SpanCache):
        return cache.nbytes()
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def weight_bytes(model: Any) -> int:
    """Bytes of the weights that a step reads: all but an embedding that is not also the output layer."""
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    unread = 0 if embedding is head else embedding.nbytes
    return sum(parameter.nbytes for parameter in model.parameters()) - unread
