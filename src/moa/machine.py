"""The machine that a number was measured on."""

import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers


def device_info(devices: Sequence[str]) -> dict[str, Any]:
    """What a measured number depends on besides the code; ``devices`` as for `moa.models.load_model`."""
    info: dict[str, Any] = {
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    if torch.cuda.is_available() and "cpu" not in devices:
        each = dict.fromkeys("cuda" if device == "auto" else device for device in devices)
        names = list(map(torch.cuda.get_device_name, each))
        info["gpu"] = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
    return info


def _cpu_name() -> str:
    try:
        described = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:  # not Linux
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in described.splitlines() if line.startswith("model name"))
    return next(names, platform.processor())
