"""Which implementation of span attention runs: picked once per storage, and said in the log.

All have the same functions: ``prefill`` (whole sequences), ``attend`` (new tokens over a SpanStore), ``recordable``
(whether decode steps over a SpanStore may be recorded as a CUDA graph), and ``transposed`` (whether keys and values of
a dtype lie best so in a SpanStore).
"""

import logging
import os
from functools import cache
from importlib.util import find_spec
from types import ModuleType

import torch

from moa.attention import sdpa
from moa.errors import InputError, UnsupportedModelError

NAMES = ("triton", "sdpa")
_LOG = logging.getLogger("moa")


def pick(device: torch.device, dtype: torch.dtype, head_dim: int, wanted: str | None = None) -> ModuleType:
    """The backend for tensors of this kind: our kernels on an NVIDIA GPU, else PyTorch's operators.

    ``wanted`` ("triton" or "sdpa"), or without it the environment variable MOA_BACKEND, overrides the choice.

    Raises
    ------
    InputError
        If what is wanted is no backend.
    UnsupportedModelError
        If it cannot take the case; the message says why.
    """
    return _pick(wanted or os.environ.get("MOA_BACKEND", ""), device, dtype, head_dim)


def check(name: str) -> None:
    """Raise InputError unless a backend is called so."""
    if name not in NAMES:
        raise InputError(f"backend {name!r} (an argument, or MOA_BACKEND) is none of {', '.join(NAMES)}")


@cache
def _pick(wanted: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> ModuleType:
    if wanted:
        check(wanted)
    reason = _against_triton(device, dtype, head_dim)
    if wanted == "triton" and reason:
        raise UnsupportedModelError(
            f"the Triton kernels were asked for, but {reason}; leave the backend open (argument or MOA_BACKEND)"
        )
    use_triton = wanted == "triton" or (not wanted and device.type == "cuda" and reason is None)
    name = "triton" if use_triton else "sdpa"
    because = f" ({reason})" if reason and device.type == "cuda" else ""
    _LOG.info("span attention on %s, %s, head_dim %d: %s%s", device, dtype, head_dim, name, because)
    if use_triton:
        from moa.attention import kernels

        return kernels
    return sdpa


def _against_triton(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why the Triton kernels cannot take this case, or None."""
    if find_spec("triton") is None:
        return "triton is not installed"
    from moa.attention import kernels

    return kernels.unsupported(device, dtype, head_dim)
