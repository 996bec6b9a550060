"""Whether a model answers right, by greedy decoding, and by teacher forcing where that must give the same.

Most answers continue the prompt in the most direct way. So that way is read along with the prompt: where it is what the
model would have chosen, token by token, and the number ends there, greedy decoding would have said the same, and its
dozen steps are saved. Where the model would have turned off to another number, decoding would have found that one. All
other items are decoded.
"""

import re
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from moa.evaluation.likelihood import logits_at
from moa.evaluation.tasks import NUMBER, RetrievalTask, TaskItem, score
from moa.search.text import token_ids

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
        said = [token_ids(tokenizer, task.said.format(answer=item.answers[0])) for item in items]
        order = sorted(range(len(items)), key=lambda index: len(said[index]))
        for _, group in groupby(order, key=lambda index: len(said[index])):
            alike = list(group)
            for first in range(0, len(alike), rows):
                together = alike[first : first + rows]
                prompts = np.stack([np.concatenate([items[index].prompt_ids, said[index]]) for index in together])
                texts = _continued(model, tokenizer, prompts, length, make_cache(total))
                for index, (text, more) in zip(together, texts, strict=True):
                    if more and _leads_elsewhere(text, items[index].answers):
                        result[index] = 0
                    elif not more and score(text, items[index].answers) == 1:
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
) -> list[tuple[str, bool]]:
    """What greedy decoding says first, as far as ids [rows, tokens] after ``length`` say the same, and one token more;
    and whether the last number in it may go on.

    Where they say the same to the end, two tokens more are looked at, to see where the number ends.
    """
    batch = torch.as_tensor(ids, device=model.device)
    positions = torch.arange(length - 1, batch.shape[1], device=model.device)
    chosen = logits_at(model, batch, positions, past_key_values=cache, use_cache=True).argmax(-1)
    alike = (chosen[:, :-1] == batch[:, length:]).long().cumprod(1).sum(1).tolist()
    answer = batch.shape[1] - length
    if answer in alike:
        after = model(chosen[:, -1:], past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
        chosen = torch.cat([chosen, after], 1)
    texts = []
    for count, row in zip(alike, chosen.tolist(), strict=True):
        whole = count == answer
        text = str(tokenizer.decode(row if whole else row[: count + 1], skip_special_tokens=True))
        texts.append((text, not whole or text[-1:].isdigit()))
    return texts


def _leads_elsewhere(text: str, answers: Sequence[str]) -> bool:
    """Whether the first number of a text, which may go on at its end, cannot become the one answer."""
    found = NUMBER.search(text)
    if found is None or len(answers) > 1:
        return False
    rest = text[found.end() :]
    if rest == "." or re.fullmatch(r"(,\d{0,2})?", rest):  # "12", "12,", "12,3"
        return not answers[0].startswith((found[0] + rest).replace(",", "").rstrip("."))
    return found[0].replace(",", "") != answers[0]
