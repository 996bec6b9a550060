"""What the dense model answers, greedily: many prompts of one length at once.

The model runs under a plan by which every head sees all. On a GPU its decode steps are replayed then, and our kernels
add up in a fixed order.
"""

from typing import Any

import numpy as np
import torch

from moa.models import LoadedModel
from moa.plan import Plan
from moa.runtime import apply

# Prompts of one length are answered together, up to this many tokens: decoding one by one would cost as much again.
_BATCH_TOKENS = {"cpu": 8192, "cuda": 65536}


def rows_together(device: torch.device, tokens: int) -> int:
    """How many sequences of so many tokens a device reads at once."""
    return max(1, _BATCH_TOKENS.get(device.type, _BATCH_TOKENS["cpu"]) // tokens)


@torch.no_grad()
def greedy_answers(loaded: LoadedModel, prompts: np.ndarray, tokens: int, exactly: bool = False) -> list[np.ndarray]:
    """The model's own answers to prompts of one length, each int64 [up to ``tokens``].

    Parameters
    ----------
    loaded : LoadedModel
        With no plan in force.
    prompts : int64 array [items, prompt tokens]
    exactly : bool
        Do not let the model end its turn before ``tokens`` tokens; else the answer ends with its turn.
    """
    model: Any = loaded.model  # `generate` is not typed as callable
    rows = rows_together(model.device, prompts.shape[1])
    answers: list[np.ndarray] = []
    with apply(model, Plan.dense(loaded.identity)):
        for first in range(0, len(prompts), rows):
            batch = torch.as_tensor(prompts[first : first + rows], device=model.device)
            output = model.generate(
                input_ids=batch,
                attention_mask=torch.ones_like(batch),
                do_sample=False,
                max_new_tokens=tokens,
                min_new_tokens=tokens if exactly else None,
            )
            for answer in output[:, batch.shape[1] :].cpu().numpy():
                ends = np.flatnonzero(np.isin(answer, model.generation_config.eos_token_id))
                answers.append(answer[: ends[0] + 1] if len(ends) else answer)
    return answers
