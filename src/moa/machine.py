"""The machine that a number was measured on."""

import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from moa.models import device_name


def device_info(devices: Sequence[str]) -> dict[str, Any]:
    """What a measured number depends on besides the code; ``devices`` as for `moa.models.load_model`."""
    info: dict[str, Any] = {
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        **_VERSIONS,
    }
    if names := _gpu_names(devices):
        info["gpu"] = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
    return info


def arithmetic_info(devices: Sequence[str]) -> dict[str, Any]:
    """What a computed number depends on besides the code: of `device_info`, not how many cards or cores share work."""
    return {**_VERSIONS, "on": sorted({_kind(device_name(device)) for device in devices})}


def _kind(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{_cpu_name()}, {torch.get_num_threads()} threads" if device == "cpu" else device.partition(":")[0]


_VERSIONS = {
    "python": platform.python_version(),
    "torch": torch.__version__,
    "transformers": transformers.__version__,
}


def _gpu_names(devices: Sequence[str]) -> list[str]:
    """Of each card; none on a CPU."""
    each = dict.fromkeys(map(device_name, devices))
    return [] if "cpu" in each else [torch.cuda.get_device_name(name) for name in each if name.startswith("cuda")]


def _cpu_name() -> str:
    try:
        described = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:  # not Linux
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in described.splitlines() if line.startswith("model name"))
    return next(names, platform.processor())
