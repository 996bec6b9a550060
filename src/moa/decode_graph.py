"""Decode steps as CUDA graphs: the second step of a cache is recorded, all later ones are replayed.

A decode step of a model starts some hundred kernels; the host takes longer to start them than a GPU takes to run
them. Under a plan all of a step's counts lie on the device, so one recording serves every step until the cache's
storage changes. A new cache for sequences of the same lengths takes over the storage of one that nobody holds any
more, and the recording with it.

Compiled first, if asked for, a step runs the model's small operations fused. It is traced as it runs, once: what Python
decides is decided then, as in a recording, and no code of a model or of ours has to suit a compiler.

What is not a plain step of one real token in every row runs as it always does: prompts, chunks, padding, steps that
ask for hidden states, and models that cannot be recorded (the log says why).
"""

import copy
import gc
import inspect
import logging
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from moa.cache import SpanCache
from moa.plan import Plan
from moa.storage import DeviceCounts
from moa.support import text_part

_LOG = logging.getLogger("moa")
_INPUTS = {"input_ids", "attention_mask", "position_ids", "past_key_values"}
_KNOWN = _INPUTS | {"use_cache", "return_dict", "logits_to_keep"}  # the latter change nothing in a step of one token


@dataclass(frozen=True)
class _Step:
    """One token for every row: int64 [rows, 1] on the device; positions as the model takes them."""

    cache: SpanCache
    ids: torch.Tensor
    positions: torch.Tensor


class DecodeGraphs:
    """The ``forward`` of a model under a plan: replays a step where it can, else calls the model's own.

    Parameters
    ----------
    model : PreTrainedModel
    forward : callable
        The model's own forward.
    compiles : bool
        Whether steps are compiled before they are recorded.
    """

    def __init__(self, model: PreTrainedModel, forward: Callable[..., Any], compiles: bool = False):
        self._model, self._forward, self._compiles = model, forward, compiles
        self.__signature__ = inspect.signature(forward)  # generate reads it
        self._recording: _Recording | None = None
        self._able = {"input_ids", "position_ids"} <= self.__signature__.parameters.keys()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        step = self._step(args, kwargs) if self._able else None
        recording = self._recording
        if step is None:
            if recording is not None and recording.cache() is None:
                self.forget()  # nobody takes its storage over any more
            return self._forward(*args, **kwargs)
        if recording is None or not recording.serves(step):
            del recording
            self.forget()  # its memory goes first
            recording = self._recording = self._record(step)
            if recording is None:
                return self._forward(*args, **kwargs)
        return recording.replay(step)

    def __deepcopy__(self, memo: dict[int, Any]) -> "DecodeGraphs":
        """For a copy of the model; recordings stay behind."""
        return DecodeGraphs(copy.deepcopy(self._model, memo), copy.deepcopy(self._forward, memo), self._compiles)

    def new_cache(self, plan: Plan, lengths: Any, rows: int) -> SpanCache:
        """A cache for ``rows`` sequences of ``lengths`` tokens (a number, or int64 [rows]).

        It takes over storage and recording of the last cache, if that was for the same lengths and nobody holds it.
        """
        recording = self._recording
        if (
            recording is None
            or recording.cache() is not None
            or not np.array_equal(recording.lengths, lengths if np.ndim(lengths) else np.full(rows, lengths))
            or recording.outdated(self._model)
        ):
            self.forget()
            return SpanCache(plan, lengths)
        cache = SpanCache(plan, lengths, recording.stores)
        recording.cache = weakref.ref(cache)
        return cache

    def forget(self) -> None:
        """Give the recording's memory back."""
        if self._recording is not None:
            self._recording = None
            if self._compiles:
                gc.collect()  # what was traced holds the storage, and itself

    def _step(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Step | None:
        """The step, if this is one that can be recorded."""
        given = self.__signature__.bind_partial(*args, **kwargs).arguments if args else kwargs
        ids, cache, mask = given.get("input_ids"), given.get("past_key_values"), given.get("attention_mask")
        if not isinstance(cache, SpanCache) or ids is None or ids.shape[1] != 1 or not cache.recordable():
            return None
        if torch.is_grad_enabled() or self._model.training or given.get("return_dict") is False:
            return None
        if any(value is not None and value is not False for name, value in given.items() if name not in _KNOWN):
            return None
        positions = given.get("position_ids")
        # a row whose new token is padding stores nothing: that is another step
        if mask is not None and (mask.ndim != 2 or positions is None or not mask[:, -1].all()):
            return None
        if positions is None:
            positions = torch.full((1, 1), cache.get_seq_length(), device=ids.device)
        return _Step(cache, ids, positions)

    def _record(self, step: _Step) -> "_Recording | None":
        """Record the step, which has not run then; None if the model does not let itself be recorded."""
        reason = _against(self._model)
        recording = None
        if reason is None:
            step = replace(step, ids=_own(step.ids), positions=_own(step.positions))
            try:
                with _unchanged(step.cache):
                    recording = _Recording(self._model, self._to_record(step), step)
            except torch.OutOfMemoryError:
                raise
            except torch.AcceleratorError as error:
                if "out of memory" in str(error):  # so the driver says it, which holds the graph
                    raise torch.OutOfMemoryError(str(error)) from error
                reason = f"{type(error).__name__}: {error}"
            except RuntimeError as error:
                reason = f"{type(error).__name__}: {error}"
        if reason is not None:
            self._able = False
            _LOG.warning("decode steps are not recorded as CUDA graphs and will be slower: %s", reason)
        return recording

    def _to_record(self, step: _Step) -> Callable[..., Any]:
        """What makes the step: compiled, if that is asked for and possible."""
        if not self._compiles:
            return self._forward
        try:
            return _compiled(self._forward, step)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # compilers fail in many ways
            self._compiles = False
            _LOG.warning("decode steps are not compiled: %s: %s", type(error).__name__, error)
            return self._forward


class _Recording:
    """A step as a CUDA graph on its own tensors, those of ``step``."""

    def __init__(self, model: PreTrainedModel, forward: Callable[..., Any], step: _Step):
        self.cache = weakref.ref(step.cache)
        self.stores = step.cache.stores()
        self.lengths = step.cache.row_lengths()
        self._counts: list[DeviceCounts] = [store.on_device for store in self.stores]
        self._addresses = _addresses(model)
        self._weight = next(model.parameters())
        self._ids, self._positions = step.ids, step.positions
        inputs = {"input_ids": self._ids, "position_ids": self._positions, "past_key_values": step.cache}
        self._logits, self._run = _capture(forward, inputs)

    def serves(self, step: _Step) -> bool:
        """Whether a replay would be this step: the same storage, weights and shapes."""
        stores = step.cache.stores()
        return (
            len(stores) == len(self.stores)
            and all(store is mine for store, mine in zip(stores, self.stores, strict=True))
            and all(store.on_device is counts for store, counts in zip(stores, self._counts, strict=True))
            and step.ids.shape == self._ids.shape
            and step.positions.shape == self._positions.shape
            and self._weight.data_ptr() == self._addresses[0]
        )

    def outdated(self, model: PreTrainedModel) -> bool:
        """Whether the model has changed since."""
        return _against(model) is not None or _addresses(model) != self._addresses

    def replay(self, step: _Step) -> CausalLMOutputWithPast:
        step.cache.count_step()
        self.cache = weakref.ref(step.cache)
        self._ids.copy_(step.ids)
        self._positions.copy_(step.positions)
        self._run()
        return CausalLMOutputWithPast(logits=self._logits.clone(), past_key_values=step.cache)


def _own(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)


@contextmanager
def _unchanged(cache: SpanCache) -> Iterator[None]:
    """Steps inside count nothing. The slots that they write are those that the next step writes."""
    counts = cache.counts()
    written = [store.on_device.written.clone() for store in cache.stores()]
    try:
        yield
    finally:
        cache.set_counts(counts)
        for store, before in zip(cache.stores(), written, strict=True):
            store.on_device.written.copy_(before)


def _compiled(forward: Callable[..., Any], step: _Step) -> Callable[..., CausalLMOutputWithPast]:
    """A decode step on the storage of this one; called like ``forward``, it counts on the device only."""

    def logits(ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = forward(
            input_ids=ids, position_ids=positions, past_key_values=step.cache, use_cache=True
        ).logits
        return found

    with _unchanged(step.cache):
        traced = make_fx(logits)(step.ids, step.positions)
    compiled = torch.compile(traced, dynamic=False)
    with _unchanged(step.cache):
        compiled(step.ids, step.positions)

    def run(input_ids: torch.Tensor, position_ids: torch.Tensor, **others: Any) -> CausalLMOutputWithPast:
        return CausalLMOutputWithPast(logits=compiled(input_ids, position_ids))

    return run


def _capture(forward: Callable[..., Any], inputs: dict[str, Any]) -> tuple[torch.Tensor, Callable[[], None]]:
    """Where the logits of a call of ``forward`` will be, and what makes that call; it has not been made yet."""
    graph, device = torch.cuda.CUDAGraph(), inputs["input_ids"].device
    with (
        _random_numbers_of(device),
        torch.cuda.device(device),
        torch.cuda.stream(torch.cuda.current_stream(device)),  # a recording that breaks does not put it back
        torch.cuda.graph(graph, capture_error_mode="thread_local"),
    ):
        logits: torch.Tensor = forward(**inputs, use_cache=True).logits
    return logits, graph.replay


@contextmanager
def _random_numbers_of(device: torch.device) -> Iterator[None]:
    """A recording that breaks leaves PyTorch's generator as if it still went on; then it gets the state from before."""
    generator = torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]
    before = generator.clone_state()
    try:
        yield
    except BaseException:
        generator.graphsafe_set_state(before)
        raise


def _addresses(model: PreTrainedModel) -> list[int]:
    return [parameter.data_ptr() for parameter in model.parameters()]


def _against(model: PreTrainedModel) -> str | None:
    """Why a replay would not do what a call of the model does, or None."""
    for module in model.modules():
        if type(module).__module__.split(".")[0] == "peft":
            return "the model has adapters, which may be switched between steps"
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
            # transformers' own collect what is asked for (hidden states), and then nothing is replayed
            if getattr(hook, "__module__", "").split(".")[0] != "transformers":
                return f"the model has forward hooks ({hook!r}), which a replay would pass by"
    if text_part(model)[0] is not None:
        return "models of text and images have positions of their own"
    config = model.config
    if config.output_hidden_states or config.output_attentions or not config.return_dict:
        return "its config asks for more than logits, or for tuples"
    if getattr(model, "_hf_peft_config_loaded", False):
        return "the model has adapters, which may be switched between steps"
    if len({parameter.device for parameter in model.parameters()}) > 1:
        return "the model is spread over several devices"
    return None
