"""What a plan must not break: finding a pass key, finding one line among many, predicting real text.

Prompts end with the first words of the answer, so that the next few tokens are the number, whatever style of answer a
model has been taught.
"""

import ast
import inspect
import math
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moa.errors import InputError
from moa.models import chat_frame
from moa.search.text import TokenStream

_PASSKEY_INTRO = "A pass key, a number of five digits, is hidden in the following text. Find it and remember it.\n\n"
_PASSKEY_NEEDLE = "The pass key is {key}. Remember it. {key} is the pass key.\n\n"
_PASSKEY_QUESTION = "What is the pass key, the number of five digits hidden in the text?"
_PASSKEY_ANSWER = "The pass key is"

_LINES_INTRO = (
    "Below is a record of lines I want you to remember. Each line begins with 'line <line index>' and contains a "
    "'<REGISTER_CONTENT>' at the end of the line as a numerical value. Now the record starts:\n\n"
)
_LINES_LINE = "line {name}: REGISTER_CONTENT is <{value}>\n"
_LINES_QUESTION = "Now the record is over. Tell me what is the <REGISTER_CONTENT> in line {name}? I need the number."
_LINES_ANSWER = "The <REGISTER_CONTENT> in line {name} is"

# Some 6,400 names: enough lines for 128k tokens.
_ADJECTIVES = (
    "torpid brisk mellow jagged hollow vivid placid somber nimble rustic gaudy lucid feral tepid ornate quaint dapper "
    "frugal humid ironic jovial keen lanky morbid nasal opaque pious rancid savory tawdry unruly valiant wistful zesty "
    "arid blunt crisp dense eager fuzzy grim hasty idle juicy lofty muddy noisy plush rigid shaky ashen bleak coarse "
    "drowsy earthy fickle gentle husky inert jolly kindly limber mighty neat oval prim quiet rapid silky tidy upbeat "
    "vast wavy young zany bold calm damp elfin frail glum"
)
_NOUNS = (
    "kid anvil badger canyon dagger easel falcon gadget hammer icicle jacket kettle ladder magnet napkin orchid pebble "
    "quiver ribbon saddle tunnel urchin velvet walnut yogurt zipper acorn beacon candle donkey engine fabric goblet "
    "helmet island jungle kernel lantern meadow needle oyster parcel quartz rocket sponge turtle violin wagon abbey "
    "bucket carpet dragon eagle feather garden harbor insect jewel kitten lemon mirror nephew onion pillow quarry "
    "raven shovel temple uncle valley window anchor basket cactus desert elbow forest guitar hornet"
)

# Logits are kept for this many positions of a chunk, spread evenly: all of a long chunk might not fit in memory.
_SCORED_POSITIONS = 1024

_NUMBER = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?")

_NOT_PROSE = re.compile(r"^\s|^[-*=.:+|@]|>>>|::|--", re.MULTILINE)


@dataclass(frozen=True)
class TaskItem:
    """A prompt, and the number that the model should answer.

    Attributes
    ----------
    prompt_ids : int64 array [length]
    answer : str
        Five digits.
    """

    prompt_ids: np.ndarray
    answer: str


def passkey_items(
    tokenizer: PreTrainedTokenizerBase, text: str, length: int, items: int, seed: int = 0
) -> list[TaskItem]:
    """Questions for a pass key hidden in real text (the task of Landmark Attention, arXiv 2305.16300).

    Parameters
    ----------
    text : str
        Filler that calibration has not seen; each item shows another stretch of it.
    length : int
        Tokens of each prompt, exactly.
    items : int
        How many; the keys lie at depths spread evenly over the text.

    Raises
    ------
    InputError
        If the length leaves no room for the task, or the text is too short for it.
    """
    rng = np.random.default_rng(seed)
    stream = TokenStream.of(tokenizer, text)
    before, after = _frame(tokenizer, _PASSKEY_INTRO, _PASSKEY_QUESTION, _PASSKEY_ANSWER)
    built = []
    for index in range(items):
        key = str(rng.integers(10_000, 100_000))
        needle = _ids(tokenizer, _PASSKEY_NEEDLE.format(key=key))
        filler = stream.draw(_room("pass key", length, before, needle, after), rng)
        depth = _depth(index, items, len(filler))
        built.append(TaskItem(np.concatenate([before, filler[:depth], needle, filler[depth:], after]), key))
    return built


def lines_items(tokenizer: PreTrainedTokenizerBase, length: int, items: int, seed: int = 0) -> list[TaskItem]:
    """Questions for one line of a long record (the task of LongEval).

    Parameters
    ----------
    length : int
        Tokens of each prompt, exactly: as many lines as fit, then line breaks.
    items : int
        How many; the lines asked for lie at depths spread evenly over the record.

    Raises
    ------
    InputError
        If the length leaves no room for a line, or asks for more lines than there are names.
    """
    rng = np.random.default_rng(seed)
    names = [f"{adjective}-{noun}" for adjective in _ADJECTIVES.split() for noun in _NOUNS.split()]
    line_break = _ids(tokenizer, "\n")[-1:]
    built = []
    for index in range(items):
        drawn = [(names[pick], str(rng.integers(10_000, 100_000))) for pick in rng.permutation(len(names))]
        lines = [
            _LINES_LINE.format(name=name, value=value) for name, value in drawn[: length // 8 + 1]
        ]  # surely enough
        encoded = [np.asarray(ids) for ids in tokenizer(lines, add_special_tokens=False)["input_ids"]]
        target, answer = drawn[0]
        before, after = _frame(
            tokenizer, _LINES_INTRO, _LINES_QUESTION.format(name=target), _LINES_ANSWER.format(name=target)
        )
        room = _room("lines", length, before, encoded[0], after) + len(encoded[0])
        fitting = int(np.searchsorted(np.cumsum([len(line) for line in encoded]), room, side="right"))
        if fitting == len(names):
            raise InputError(f"the lines task has names for {len(names)} lines, too few for {length:,} tokens")
        others = encoded[1:fitting]
        depth = _depth(index, items, len(others))
        record = np.concatenate([*others[:depth], encoded[0], *others[depth:]])
        blank = np.repeat(line_break, room - len(record))
        built.append(TaskItem(np.concatenate([before, record, blank, after]), answer))
    return built


def score(prediction: str, answer: str) -> bool:
    """Whether the first number in the prediction is the answer; commas between thousands do not matter."""
    found = _NUMBER.search(prediction)
    return found is not None and found.group().replace(",", "") == answer


def text_chunks(tokenizer: PreTrainedTokenizerBase, text: str, length: int, chunks: int) -> np.ndarray:
    """Stretches of a text, spread evenly over it: int64 [chunks, length], each with the tokenizer's first token.

    Raises
    ------
    InputError
        If the text has fewer than ``length`` tokens.
    """
    first = np.asarray(tokenizer("")["input_ids"], np.int64)
    ids = TokenStream.of(tokenizer, text).ids
    tokens = length - len(first)
    if tokens > len(ids):
        raise InputError(f"the text has {len(ids):,} tokens, and {tokens:,} are needed; give more text")
    starts = np.linspace(0, len(ids) - tokens, chunks).astype(np.int64)
    return np.stack([np.concatenate([first, ids[start : start + tokens]]) for start in starts])


@torch.no_grad()
def text_perplexity(model: PreTrainedModel, chunks: np.ndarray) -> float:
    """Perplexity of the model on real text, each chunk read from its start, without a cache.

    Parameters
    ----------
    chunks : int64 array [chunks, length]
        At most 1024 positions of each, spread evenly, are scored.
    """
    length = chunks.shape[1]
    positions = torch.linspace(0, length - 2, min(length - 1, _SCORED_POSITIONS), device=model.device).long()
    losses = []
    for ids in torch.as_tensor(chunks, device=model.device):
        logits = logits_at(model, ids[None], positions, use_cache=False)[0]
        losses.append(torch.nn.functional.cross_entropy(logits.float(), ids[positions + 1]).item())
    return math.exp(sum(losses) / len(losses))


def logits_at(model: PreTrainedModel, ids: torch.Tensor, positions: torch.Tensor, **options: Any) -> torch.Tensor:
    """Logits [batch, positions, vocabulary] of a forward pass; the others are not computed, where the model allows it.

    Parameters
    ----------
    ids : int64 tensor [batch, tokens]
    positions : int64 tensor [positions]
        Of the tokens in ``ids``.
    options
        For the model's forward, such as ``past_key_values``.
    """
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        return model(ids, logits_to_keep=positions, **options).logits
    return model(ids, **options).logits[:, positions]


@cache
def default_evaluation_text() -> str:
    """Prose from the docstrings of Python's standard library: about 600,000 characters.

    It shares nothing with the language reference that calibration uses by default (`moa.search.text.default_text`).
    """
    paragraphs = dict.fromkeys(_prose())  # in order, without the many that occur twice
    return "\n\n".join(paragraphs)


def _prose() -> Iterator[str]:
    """Paragraphs of full sentences from all docstrings, each on one line."""
    root = Path(sysconfig.get_path("stdlib"))
    for file in sorted(root.rglob("*.py")):
        if {"site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data"} & set(file.parts):
            continue
        try:
            tree = ast.parse(file.read_bytes())
        except (SyntaxError, ValueError):  # templates and samples of bad code
            continue
        for node in ast.walk(tree):
            if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            for paragraph in re.split(r"\n\s*\n", ast.get_docstring(node) or ""):
                letters = sum(character.isalpha() or character.isspace() for character in paragraph)
                if len(paragraph) >= 120 and letters >= 0.9 * len(paragraph) and not _NOT_PROSE.search(paragraph):
                    yield " ".join(paragraph.split())


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> np.ndarray:
    return np.asarray(tokenizer(text, add_special_tokens=False)["input_ids"], np.int64)


def _frame(tokenizer: PreTrainedTokenizerBase, intro: str, question: str, answer: str) -> tuple[np.ndarray, np.ndarray]:
    """All that comes before and after the text of a task; ``answer`` is how the answer begins."""
    before, after = chat_frame(tokenizer)
    return (
        np.concatenate([before, _ids(tokenizer, intro)]).astype(np.int64),
        np.concatenate([_ids(tokenizer, question), after, _ids(tokenizer, answer)]).astype(np.int64),
    )


def _room(task: str, length: int, *parts: np.ndarray) -> int:
    """Tokens left for text."""
    taken = sum(len(part) for part in parts)
    if length <= taken:
        raise InputError(f"{length} tokens are too few for the {task} task, which takes {taken} without any text")
    return length - taken


def _depth(index: int, items: int, length: int) -> int:
    """Where item ``index`` of ``items`` hides what is asked for, in 0..length."""
    return round((index + 0.5) / items * length)
