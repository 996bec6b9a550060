"""Stage 1: items with long-range dependencies, answered by the dense model itself.

Three sources. *Retrieval*: facts hidden in real text, and questions about them. *Summary*: several passages to be
summarised together. Only the answers carry loss, and an answer is what the dense model writes, so that profiling
measures what this model would lose, not how it differs from another writer (arXiv 2406.14909, "long-range dependency"
and "model alignment"). *Text*: real text, for plain prediction; of its last three quarters every eighth token carries
loss.
"""

from dataclasses import dataclass

import numpy as np

from moa.errors import InputError
from moa.models import LoadedModel, chat_frame
from moa.progress import SILENT, Progress
from moa.search.answers import greedy_answers
from moa.search.facts import FACTS, Fact
from moa.search.items import CalibrationItem, CalibrationSet
from moa.search.retrieval import retrieval_items, text_room
from moa.search.text import TokenStream, token_ids

RETRIEVAL = "retrieval"
SUMMARY = "summary"
TEXT = "text"
SOURCES = (RETRIEVAL, SUMMARY, TEXT)

TEXT_LOSS = (1 / 4, 8)  # from this share of a text on, one token in so many carries loss: neighbours say much the same
_SUMMARY_INTRO = "Here are {count} passages.\n\n"
_SUMMARY_QUESTION = "Write a one-page summary of all of them."


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
    facts : tuple of Fact
        Kinds of facts that retrieval asks for in turn.
    """

    lengths: tuple[int, ...]
    items: int = 8
    sources: tuple[str, ...] = (RETRIEVAL, TEXT)
    answer_tokens: int = 64
    seed: int = 0
    facts: tuple[Fact, ...] = FACTS


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
    makers = {
        RETRIEVAL: lambda length, rng: retrieval_items(
            loaded, stream, length, config.facts, config.items, rng, progress
        ),
        SUMMARY: lambda length, rng: _summaries(loaded, stream, length, config, rng),
        TEXT: lambda length, rng: _texts(loaded, stream, length, config, rng),
    }
    cells = [(length, source) for length in sorted(set(config.lengths)) for source in config.sources]
    items = {}
    for length, source in progress.track(cells, "Calibrating"):
        rng = np.random.default_rng([config.seed, length, SOURCES.index(source)])
        items[length, source] = tuple(makers[source](length, rng))
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


def _summaries(
    loaded: LoadedModel, stream: TokenStream, length: int, config: CalibrateConfig, rng: np.random.Generator
) -> list[CalibrationItem]:
    """Numbered passages from all over the text, and the beginning of the model's summary of them all."""
    tokenizer = loaded.tokenizer
    answer_tokens = min(config.answer_tokens, length // 4)
    count = min(max(length // 512, 3), 6)
    start, end = chat_frame(tokenizer)
    before = np.concatenate([start, token_ids(tokenizer, _SUMMARY_INTRO.format(count=count))])
    heads = [token_ids(tokenizer, f"\n\nPassage {number}:\n") for number in range(1, count + 1)]
    after = np.concatenate([token_ids(tokenizer, "\n\n" + _SUMMARY_QUESTION), end])
    room = text_room(SUMMARY, length, len(before) + sum(map(len, heads)) + len(after) + answer_tokens)
    cuts = np.linspace(0, room, count + 1).astype(int)
    prompts = []
    for _ in range(config.items):
        passages = [stream.draw(tokens, rng) for tokens in np.diff(cuts)]
        numbered = [part for head, passage in zip(heads, passages, strict=True) for part in (head, passage)]
        prompts.append(np.concatenate([before, *numbered, after]).astype(np.int64))
    answers = greedy_answers(loaded, np.stack(prompts), answer_tokens, exactly=True)
    places = np.arange(length - answer_tokens, length)
    return [
        CalibrationItem(np.concatenate([prompt, answer]), places, places)
        for prompt, answer in zip(prompts, answers, strict=True)
    ]


def _texts(
    loaded: LoadedModel, stream: TokenStream, length: int, config: CalibrateConfig, rng: np.random.Generator
) -> list[CalibrationItem]:
    """Stretches of the text, each with the tokenizer's first token."""
    first = token_ids(loaded.tokenizer, "", special=True)
    start, step = TEXT_LOSS
    answer = np.arange(int(start * length), length)
    return [
        CalibrationItem(np.concatenate([first, stream.draw(length - len(first), rng)]), answer, answer[::step])
        for _ in range(config.items)
    ]
