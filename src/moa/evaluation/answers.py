"""Whether a model answers right, by greedy decoding, and by teacher forcing where that must give the same.

Most answers continue the prompt in the most direct way. So that way is read along with the prompt: where it is what the
model would have chosen, token by token, and the number ends there, greedy decoding would have said the same, and its
dozen steps are saved. All other items are decoded.
"""

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from moa.evaluation.likelihood import logits_at
from moa.evaluation.tasks import RetrievalTask, TaskItem, score

MakeCache = Callable[[int], Any]


def scores(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    task: RetrievalTask,
    items: Sequence[TaskItem],
    make_cache: MakeCache,
    batch_tokens: int,
    shortcut: bool = True,
) -> np.ndarray:
    """Score of each item, 0 to 1: float64 [items].

    Parameters
    ----------
    model
        Under whatever plan is in force.
    items
        With prompts of one length.
    make_cache : callable
        An empty cache for sequences of so many tokens.
    batch_tokens : int
        Prompts are answered together, up to this many tokens.
    shortcut : bool
        False decodes every item; the scores are the same.
    """
    result = np.full(len(items), np.nan)
    length = len(items[0].prompt_ids)
    total = length + task.new_tokens
    rows = max(1, batch_tokens // total)
    if shortcut and task.said:
        said = [_ids(tokenizer, task.said.format(answer=item.answers[0])) for item in items]
        order = sorted(range(len(items)), key=lambda index: len(said[index]))
        for _, group in groupby(order, key=lambda index: len(said[index])):
            alike = list(group)
            for first in range(0, len(alike), rows):
                together = alike[first : first + rows]
                prompts = np.stack([np.concatenate([items[index].prompt_ids, said[index]]) for index in together])
                texts = _continued(model, tokenizer, prompts, length, make_cache(total))
                for index, text in zip(together, texts, strict=True):
                    if text is not None and score(text, items[index].answers) == 1:
                        result[index] = 1
    open_ = np.flatnonzero(np.isnan(result))
    for first in range(0, len(open_), rows):
        some = open_[first : first + rows]
        batch = torch.as_tensor(np.stack([items[index].prompt_ids for index in some]), device=model.device)
        output = model.generate(
            input_ids=batch,
            attention_mask=torch.ones_like(batch),
            past_key_values=make_cache(total),
            do_sample=False,
            max_new_tokens=task.new_tokens,
        )
        for index, text in zip(some, tokenizer.batch_decode(output[:, length:], skip_special_tokens=True), strict=True):
            result[index] = score(text, items[index].answers)
    return result


@torch.no_grad()
def _continued(
    model: Any, tokenizer: PreTrainedTokenizerBase, ids: np.ndarray, length: int, cache: Any
) -> list[str | None]:
    """What greedy decoding says first, where that is what ids [rows, tokens] hold after ``length``; else None.

    Two tokens more are looked at, to see where the number ends.
    """
    batch = torch.as_tensor(ids, device=model.device)
    positions = torch.arange(length - 1, batch.shape[1], device=model.device)
    chosen = logits_at(model, batch, positions, past_key_values=cache, use_cache=True).argmax(-1)
    followed = (chosen[:, :-1] == batch[:, length:]).all(1).tolist()
    if not any(followed):
        return [None] * len(ids)
    after = model(chosen[:, -1:], past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
    texts: list[str | None] = []
    for right, row in zip(followed, torch.cat([chosen, after], 1).tolist(), strict=True):
        text = str(tokenizer.decode(row, skip_special_tokens=True))
        texts.append(text if right and not text[-1:].isdigit() else None)
    return texts


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> np.ndarray:
    return np.asarray(tokenizer(text, add_special_tokens=False)["input_ids"], np.int64)
