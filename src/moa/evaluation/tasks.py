"""What a plan must not break: finding a pass key, finding one line among many, predicting real text.

All prompts have exactly the asked number of tokens, and end inside the answer, so that a few new tokens decide.
"""

import ast
import inspect
import re
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moa.errors import InputError
from moa.models import chat_frame
from moa.search.text import TokenStream

# Logits are kept for at most this many positions of a chunk, evenly spread: a whole chunk of a model with a large
# vocabulary would not fit in memory.
SCORED_POSITIONS = 1024

_EVALUATION_CHARACTERS = 600_000


@dataclass(frozen=True)
class TaskItem:
    """A prompt and the number that the model should find.

    Attributes
    ----------
    prompt_ids : int64 array [length]
    answer : str
        Digits.
    """

    prompt_ids: np.ndarray
    answer: str


def passkey_items(
    tokenizer: PreTrainedTokenizerBase, text: str, length: int, items: int, seed: int = 0
) -> list[TaskItem]:
    """A five-digit pass key hidden in real text (the task of Landmark Attention, arXiv 2305.16300).

    Parameters
    ----------
    text : str
        Filler, not used in calibration; each item shows another stretch of it.
    length : int
        Tokens of each prompt, exactly.
    items : int
        How many; their keys lie at depths spread evenly over the text.

    Raises
    ------
    InputError
        If the length leaves no room for the task, or the text is too short.
    """
    rng = np.random.default_rng(seed)
    stream = TokenStream.of(tokenizer, text)
    built = []
    for index in range(items):
        key = str(rng.integers(10_000, 100_000))
        needle = _ids(tokenizer, PASSKEY.needle.format(key=key))
        before, after = _framed(tokenizer, PASSKEY, "")
        filler = stream.draw(_room(length, before, needle, after), rng)
        cut = round((index + 0.5) / items * len(filler))
        built.append(TaskItem(np.concatenate([before, filler[:cut], needle, filler[cut:], after]), key))
    return built


def lines_items(tokenizer: PreTrainedTokenizerBase, length: int, items: int, seed: int = 0) -> list[TaskItem]:
    """Many lines with a five-digit number each, and a question about one of them (the task of LongEval).

    Parameters
    ----------
    length : int
        Tokens of each prompt, exactly: as many lines as fit, then blank lines.
    items : int
        How many; the lines asked for lie at depths spread evenly over the record.

    Raises
    ------
    InputError
        If the length leaves no room for two lines.
    """
    rng = np.random.default_rng(seed)
    blank = _ids(tokenizer, "\n")[-1:]
    built = []
    for index in range(items):
        names = [f"{_ADJECTIVES[pick // len(_NOUNS)]}-{_NOUNS[pick % len(_NOUNS)]}" for pick in rng.permutation(len(_ADJECTIVES) * len(_NOUNS))]
        ...
    return built
