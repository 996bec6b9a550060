"""Stage 1: items with long-range dependencies, answered by the dense model itself.

Three sources. *Retrieval*: a few facts hidden in real text, and a question about one of them. *Summary*: several
passages to be summarised together. Only the answers carry loss, and an answer is what the dense model writes, so that
profiling measures what this model would lose, not how it differs from another writer (arXiv 2406.14909, "long-range
dependency" and "model alignment"). *Text*: real text, of which the end carries loss, for plain prediction.
"""

import os
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from moa.errors import InputError
from moa.files import read_tensors, write_tensors
from moa.models import LoadedModel, chat_frame
from moa.progress import SILENT, Progress
from moa.search.facts import FACTS, Fact
from moa.search.text import TokenStream, token_ids

RETRIEVAL = "retrieval"
SUMMARY = "summary"
TEXT = "text"
SOURCES = (RETRIEVAL, SUMMARY, TEXT)

# An answer to a retrieval question ends with the model's turn, or here.
_RETRIEVAL_ANSWER = 24
# At the end of a stretch of text so many tokens carry loss, or a quarter of it.
_TEXT_ANSWER = 256
# Questions asked for each one needed; then what is missing is filled up with right answers that the model did not give.
_TRIES = 4
# Prompts of one length are answered together, up to this many tokens: decoding one by one would cost as much again.
_BATCH_TOKENS = {"cpu": 8192, "cuda": 65536}
# Fewer tokens of text than this make no long-range dependency.
_LEAST_TEXT = 32

_RETRIEVAL_INTRO = "Read this text with care. You will be asked for a detail in it.\n\n"
_SUMMARY_INTRO = "Here are {count} passages.\n\n"
_SUMMARY_QUESTION = "Write a one-page summary of all of them."


@dataclass(frozen=True)
class CalibrationItem:
    """One prompt with its answer.

    Attributes
    ----------
    input_ids : int64 array [N]
    answer_start : int
        Tokens ``answer_start`` to N - 1 are the answer; only they carry loss.
    """

    input_ids: np.ndarray
    answer_start: int


@dataclass(frozen=True)
class CalibrationSet:
    """Calibration items by length N and source; every item has exactly N tokens."""

    items: dict[tuple[int, str], tuple[CalibrationItem, ...]]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write as one safetensors file, all or nothing.

        Raises
        ------
        InputError
            If the file cannot be written.
        """
        tensors = {}
        for (length, source), items in self.items.items():
            for index, item in enumerate(items):
                tensors[f"{length}/{source}/{index}/input_ids"] = item.input_ids
                tensors[f"{length}/{source}/{index}/answer_start"] = np.array([item.answer_start])
        write_tensors(path, tensors)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "CalibrationSet":
        """Read what `save` wrote.

        Raises
        ------
        InputError
            If the file is missing, damaged, or holds something else.
        """
        tensors = read_tensors(path)
        found: defaultdict[tuple[int, str], dict[int, CalibrationItem]] = defaultdict(dict)
        try:
            for name in tensors:
                length, source, index, part = name.split("/")
                if part == "input_ids":
                    start = int(tensors[f"{length}/{source}/{index}/answer_start"][0])
                    found[int(length), source][int(index)] = CalibrationItem(tensors[name], start)
        except (KeyError, ValueError) as error:
            raise InputError(f"{path} does not hold calibration items; delete it and calibrate again") from error
        return cls({key: tuple(items[index] for index in sorted(items)) for key, items in sorted(found.items())})


@dataclass(frozen=True)
class CalibrateConfig:
    """What to calibrate on.

    Attributes
    ----------
    lengths : tuple of int
        Tokens of the items, prompt and answer: the profile lengths.
    items : int
        Items of each length and source.
    sources : tuple of str
        Of `SOURCES`.
    answer_tokens : int
        Length of the summaries, at most a quarter of the item.
    seed : int
        Same seed, text and model: same items.
    """

    lengths: tuple[int, ...]
    items: int = 8
    sources: tuple[str, ...] = (RETRIEVAL, TEXT)
    answer_tokens: int = 64
    seed: int = 0


def calibrate(loaded: LoadedModel, text: str, config: CalibrateConfig, progress: Progress = SILENT) -> CalibrationSet:
    """Build the items that profiling will measure the model on.

    Parameters
    ----------
    loaded : LoadedModel
        The dense model; it answers its own questions, greedily.
    text : str
        Real text of at least as many tokens as the longest length; a hundred thousand make the items differ.

    Returns
    -------
    CalibrationSet
        ``config.items`` items for each length and source.

    Raises
    ------
    InputError
        If a length is beyond the model's context or too short for an item, the text is too short, or a source unknown.
    """
    stream = TokenStream.of(loaded.tokenizer, text)
    _check(loaded, stream, config)
    makers = {RETRIEVAL: _retrieval, SUMMARY: _summary, TEXT: _text}
    cells = [(length, source) for length in sorted(set(config.lengths)) for source in config.sources]
    items = {}
    for length, source in progress.track(cells, "Calibrating"):
        rng = np.random.default_rng([config.seed, length, SOURCES.index(source)])
        items[length, source] = tuple(makers[source](loaded, stream, length, config, rng, progress))
    return CalibrationSet(items)


def _check(loaded: LoadedModel, stream: TokenStream, config: CalibrateConfig) -> None:
    if not config.lengths or not config.sources or config.items < 1 or config.answer_tokens < 1:
        raise InputError("calibration needs at least one length, one source, one item and one answer token")
    for source in config.sources:
        if source not in SOURCES:
            raise InputError(f"unknown calibration source {source!r}; expected one of {', '.join(SOURCES)}")
    longest = max(config.lengths)
    if longest > loaded.context_length:
        raise InputError(
            f"length {longest:,} is beyond the context of {loaded.name}, {loaded.context_length:,} tokens; "
            "choose shorter lengths"
        )
    if longest > len(stream.ids):
        raise InputError(
            f"the text has {len(stream.ids):,} tokens, and items of {longest:,} need at least as many; "
            "give more text or shorter lengths"
        )


@dataclass(frozen=True)
class _Question:
    """A retrieval item before its answer is known.

    ``text`` has the facts in it and is longer than any prompt needs: a prompt takes as much of it as fits, so that the
    facts stay where they are whatever the length of the answer.
    """

    before: np.ndarray
    text: np.ndarray
    after: np.ndarray
    value: str
    expected: np.ndarray

    def prompt(self, tokens: int) -> np.ndarray:
        """The prompt in exactly so many tokens: int64 [tokens]."""
        return np.concatenate([self.before, self.text[: tokens - len(self.before) - len(self.after)], self.after])

    def answered(self, length: int, answer: np.ndarray) -> CalibrationItem:
        """The item of ``length`` tokens with this answer."""
        start = length - len(answer)
        return CalibrationItem(np.concatenate([self.prompt(start), answer]), start)


def _retrieval(
    loaded: LoadedModel,
    stream: TokenStream,
    length: int,
    config: CalibrateConfig,
    rng: np.random.Generator,
    progress: Progress,
) -> list[CalibrationItem]:
    """Questions that the model answers right, with its answers.

    The first few are as mixed as all of them: kinds take turns, and depths are spread evenly whatever the number.
    """
    right: dict[int, CalibrationItem] = {}
    failed: dict[int, _Question] = {}
    tries = _TRIES * config.items
    kinds = np.concatenate([rng.permutation(len(FACTS)) for _ in range(0, tries, len(FACTS))])
    shift = rng.random()
    asked = 0
    while len(right) < config.items and asked < tries:
        numbers = range(asked, min(tries, asked + config.items - len(right)))
        asked = numbers.stop
        questions = {
            number: _question(
                loaded.tokenizer, stream, length, FACTS[kinds[number]], (_evenly(number) + shift) % 1, rng
            )
            for number in numbers
        }
        # Asked with room for the expected answer: where the model gives it, nothing has to be shifted afterwards.
        by_room = sorted(questions, key=lambda number: len(questions[number].expected))
        for reserved, group in groupby(by_room, key=lambda number: len(questions[number].expected)):
            alike = list(group)
            prompts = np.stack([questions[number].prompt(length - reserved) for number in alike])
            for number, answer in zip(alike, _greedy(loaded, prompts, _RETRIEVAL_ANSWER), strict=True):
                if questions[number].value in str(loaded.tokenizer.decode(answer)).replace(",", ""):
                    right[number] = questions[number].answered(length, answer)
                else:
                    failed[number] = questions[number]
    missing = config.items - len(right)
    if missing:
        progress.say(
            f"{loaded.name} found {len(right)} of {asked} facts at {length:,} tokens; "
            f"{missing} of {config.items} retrieval items have an answer that it did not write itself"
        )
    for number in sorted(failed)[:missing]:
        right[number] = failed[number].answered(length, failed[number].expected)
    return [right[number] for number in sorted(right)]


def _evenly(index: int) -> float:
    """The van der Corput sequence, 0 to 1: any first few of its numbers are spread evenly."""
    return sum((index >> bit & 1) / 2 ** (bit + 1) for bit in range(index.bit_length()))


def _question(
    tokenizer: PreTrainedTokenizerBase,
    stream: TokenStream,
    length: int,
    kind: Fact,
    depth: float,
    rng: np.random.Generator,
) -> _Question:
    """One to three facts of a kind in real text, and a question about the one at ``depth`` (0 to 1)."""
    depths = np.concatenate([[depth], rng.random(rng.integers(3))])
    keys = rng.choice(kind.keys, len(depths), replace=False)
    if isinstance(kind.values, int):
        values = [str(rng.integers(10 ** (kind.values - 1), 10**kind.values)) for _ in keys]
    else:
        values = rng.choice(kind.values, len(depths), replace=False).tolist()
    facts = [
        token_ids(tokenizer, f"\n\n{kind.statement.format(key=key, value=value)}\n\n")
        for key, value in zip(keys, values, strict=True)
    ]
    start, end = chat_frame(tokenizer)
    before = np.concatenate([start, token_ids(tokenizer, _RETRIEVAL_INTRO)]).astype(np.int64)
    after = np.concatenate([token_ids(tokenizer, "\n\n" + kind.question.format(key=keys[0])), end]).astype(np.int64)
    room = _room(RETRIEVAL, length, len(before) + sum(map(len, facts)) + len(after) + _RETRIEVAL_ANSWER)
    filler = stream.draw(room + _RETRIEVAL_ANSWER, rng)
    pieces, done = [], 0
    for which in np.argsort(depths):
        place = int(depths[which] * room)
        pieces += [filler[done:place], facts[which]]
        done = place
    answer = token_ids(tokenizer, kind.answer.format(key=keys[0], value=values[0]))
    ending = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return _Question(
        before=before,
        text=np.concatenate([*pieces, filler[done:]]),
        after=after,
        value=values[0],
        expected=np.concatenate([answer, ending])[:_RETRIEVAL_ANSWER].astype(np.int64),
    )


def _summary(
    loaded: LoadedModel,
    stream: TokenStream,
    length: int,
    config: CalibrateConfig,
    rng: np.random.Generator,
    progress: Progress,
) -> list[CalibrationItem]:
    """Numbered passages from all over the text, and the beginning of the model's summary of them all."""
    tokenizer = loaded.tokenizer
    answer_tokens = min(config.answer_tokens, length // 4)
    count = min(max(length // 512, 3), 6)
    start, end = chat_frame(tokenizer)
    before = np.concatenate([start, token_ids(tokenizer, _SUMMARY_INTRO.format(count=count))])
    heads = [token_ids(tokenizer, f"\n\nPassage {number}:\n") for number in range(1, count + 1)]
    after = np.concatenate([token_ids(tokenizer, "\n\n" + _SUMMARY_QUESTION), end])
    room = _room(SUMMARY, length, len(before) + sum(map(len, heads)) + len(after) + answer_tokens)
    cuts = np.linspace(0, room, count + 1).astype(int)
    prompts = []
    for _ in range(config.items):
        passages = [stream.draw(tokens, rng) for tokens in np.diff(cuts)]
        numbered = [part for head, passage in zip(heads, passages, strict=True) for part in (head, passage)]
        prompts.append(np.concatenate([before, *numbered, after]).astype(np.int64))
    answers = _greedy(loaded, np.stack(prompts), answer_tokens, exactly=True)
    return [
        CalibrationItem(np.concatenate([prompt, answer]), len(prompt))
        for prompt, answer in zip(prompts, answers, strict=True)
    ]


def _text(
    loaded: LoadedModel,
    stream: TokenStream,
    length: int,
    config: CalibrateConfig,
    rng: np.random.Generator,
    progress: Progress,
) -> list[CalibrationItem]:
    """Stretches of the text, each with the tokenizer's first token."""
    first = token_ids(loaded.tokenizer, "", special=True)
    start = length - min(_TEXT_ANSWER, length // 4)
    return [
        CalibrationItem(np.concatenate([first, stream.draw(length - len(first), rng)]), start)
        for _ in range(config.items)
    ]


def rows_together(device: torch.device, tokens: int) -> int:
    """How many sequences of so many tokens a device reads at once."""
    return max(1, _BATCH_TOKENS.get(device.type, _BATCH_TOKENS["cpu"]) // tokens)


@torch.no_grad()
def _greedy(loaded: LoadedModel, prompts: np.ndarray, tokens: int, exactly: bool = False) -> Iterator[np.ndarray]:
    """The model's own answers to prompts of one length, each int64 [up to ``tokens``].

    Parameters
    ----------
    prompts : int64 array [items, prompt tokens]
    exactly : bool
        Do not let the model end its turn before ``tokens`` tokens; else the answer ends with its turn.
    """
    model: Any = loaded.model  # `generate` is not typed as callable
    rows = rows_together(model.device, prompts.shape[1])
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
            yield answer[: ends[0] + 1] if len(ends) else answer


def _room(source: str, length: int, taken: int) -> int:
    """Tokens left for text."""
    least = -(-(taken + _LEAST_TEXT) // 64) * 64
    if length < least:
        raise InputError(f"{length} tokens are too few for a {source} item; the shortest length is {least}")
    return length - taken
