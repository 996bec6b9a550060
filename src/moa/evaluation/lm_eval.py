"""MoA as a model of EleutherAI's lm-eval, so that RULER, LongBench and all its other tasks run under a plan.

    moa lm-eval run --model moa --model_args pretrained=MODEL,plan=plan.json --tasks longbench

is lm-eval's own command with this model registered; from Python, importing this module registers it.
"""

from typing import Any

from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from moa.models import load_model
from moa.plan import Plan
from moa.runtime import apply


@register_model("moa")
class MoALM(HFLM):
    """A Hugging Face model under a plan.

    Parameters
    ----------
    pretrained : str
        As for every command of MoA: hub id, local folder, GGUF file or ``demo``.
    plan : str
        A plan file.
    attention : str, optional
        ``triton`` or ``sdpa``; see `moa.apply`.
    dtype, device : str
        As in `moa.models.load_model`.
    batch_size : int
        Where likelihoods are measured, lm-eval pads on the right and says not how far: N is then the batch's longest
        row. With 1, the default, it is each row's own.
    **others
        As for lm-eval's ``hf``.

    Raises
    ------
    InputError, PlanError, UnsupportedModelError
        As `moa.models.load_model`, `Plan.load` and `moa.apply` do.
    """

    def __init__(
        self,
        pretrained: str,
        plan: str,
        attention: str | None = None,
        dtype: str = "auto",
        device: str | None = "auto",
        batch_size: int | str = 1,
        **others: Any,
    ):
        rules = Plan.load(plan)
        loaded = load_model(pretrained, dtype, device or "auto")
        super().__init__(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=batch_size, **others)
        self.applied = apply(loaded.model, rules, attention)
