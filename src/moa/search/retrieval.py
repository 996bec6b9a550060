"""Retrieval items: conversations about facts hidden in real text, with the answers of the dense model itself.

One text serves several questions: reading it is what costs, so measuring eight answers costs little more than one. And
the other facts are what a model may take for the one that is asked for. A head that helps to find *a* fact is not yet
one that helps to find *the* fact; texts with one fact, and texts with several of a kind, tell the two apart.

Only the tokens of the value that was asked for carry loss. The other words of an answer repeat the question; a model
says them right without having found anything, and whether it says them in the dense model's way tells nothing.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from moa.errors import InputError
from moa.models import LoadedModel, chat_frame, chat_turn
from moa.progress import Progress
from moa.search.answers import greedy_answers
from moa.search.facts import Fact
from moa.search.items import CalibrationItem
from moa.search.text import TokenStream, token_ids

_INTRO = "Read this text with care. You will be asked for a detail in it.\n\n"
# An answer ends with the model's turn, or here.
_ANSWER = 24
# Texts read for each item needed; then what is missing is filled up with right answers that the model did not give.
_TRIES = 4
# Facts in a text, each number as often as the others; in shorter texts fewer, so that most of a text is text.
_FACTS = (1, 2, 4, 8)
_TOKENS_A_FACT = 256
_LEAST_TEXT = 32  # fewer tokens make no long-range dependency


@dataclass(frozen=True)
class _Turn:
    """A question, int64 ids, and what answers it."""

    question: np.ndarray
    value: str
    expected: np.ndarray

    def told(self, tokenizer: PreTrainedTokenizerBase, answer: np.ndarray) -> np.ndarray:
        """Which tokens of an answer spell the value, as a word of its own and commas aside: bool [answer tokens]."""
        said = [str(tokenizer.decode(answer[:count])).replace(",", "") for count in range(len(answer) + 1)]
        found = re.search(rf"\b{re.escape(self.value)}\b", said[-1])
        if found is None:
            return np.zeros(len(answer), bool)
        ends = np.array([len(text) for text in said])
        return (ends[1:] > found.start()) & (ends[:-1] < found.end())


@dataclass(frozen=True)
class _Conversation:
    """An item before its answers are known.

    ``text`` has the facts in it and is longer than any item needs: as much is taken as fits, so that the facts stay
    where they are whatever the length of the answers. ``gap`` stands between the text and a question, ``ask`` between a
    question and its answer, ``between`` between an answer and the next question.
    """

    before: np.ndarray
    text: np.ndarray
    turns: tuple[_Turn, ...]
    gap: np.ndarray
    ask: np.ndarray
    between: np.ndarray

    def prompt(self, turn: _Turn, tokens: int) -> np.ndarray:
        """One question alone, in exactly so many tokens: int64 [tokens]."""
        after = np.concatenate([self.gap, turn.question, self.ask])
        return np.concatenate([self.before, self.text[: tokens - len(self.before) - len(after)], after])

    def answered(
        self, tokenizer: PreTrainedTokenizerBase, length: int, answers: Mapping[int, np.ndarray]
    ) -> CalibrationItem:
        """The item of ``length`` tokens with these answers, by number of turn; turns without one are left out."""
        pieces: list[tuple[np.ndarray, np.ndarray | None]] = []  # tokens; of an answer also which carry loss
        lead = self.gap
        for number, answer in sorted(answers.items()):
            turn = self.turns[number]
            told = turn.told(tokenizer, answer)
            told |= not told.any()  # an answer cut short
            pieces += [(np.concatenate([lead, turn.question, self.ask]), None), (answer, told)]
            lead = self.between[1:] if answer[-1] == self.between[0] else self.between
        room = length - len(self.before) - sum(len(tokens) for tokens, _ in pieces)
        pieces = [(self.before, None), (self.text[:room], None), *pieces]
        said = np.concatenate([np.full(len(tokens), told is not None) for tokens, told in pieces])
        loss = np.concatenate([np.zeros(len(tokens), bool) if told is None else told for tokens, told in pieces])
        return CalibrationItem(
            np.concatenate([tokens for tokens, _ in pieces]), np.flatnonzero(said), np.flatnonzero(loss)
        )


def retrieval_items(
    loaded: LoadedModel,
    stream: TokenStream,
    length: int,
    facts: Sequence[Fact],
    count: int,
    rng: np.random.Generator,
    progress: Progress,
) -> list[CalibrationItem]:
    """Conversations of ``length`` tokens about these kinds of facts, in which the model answers right.

    The first few are as mixed as all of them: kinds take turns, and depths are spread evenly whatever the number.
    """
    done: dict[int, CalibrationItem] = {}
    failed: dict[int, _Conversation] = {}
    tries = _TRIES * count
    kinds = _in_turn(rng, list(range(len(facts))), tries)
    hidden = _in_turn(rng, list(_FACTS), tries)
    shift = rng.random()
    asked = 0
    while len(done) < count and asked < tries:
        numbers = range(asked, min(tries, asked + count - len(done)))
        asked = numbers.stop
        read = {
            number: _conversation(
                loaded.tokenizer,
                stream,
                length,
                facts[kinds[number]],
                min(hidden[number], max(1, length // _TOKENS_A_FACT)),
                (evenly(number) + shift) % 1,
                rng,
            )
            for number in numbers
        }
        prompts = [talk.prompt(turn, length - _ANSWER) for talk in read.values() for turn in talk.turns]
        said = iter(greedy_answers(loaded, np.stack(prompts), _ANSWER))
        for number, talk in read.items():
            answers = {index: next(said) for index in range(len(talk.turns))}
            right = {
                index: answer
                for index, answer in answers.items()
                if talk.turns[index].told(loaded.tokenizer, answer).any()
            }
            if right:
                done[number] = talk.answered(loaded.tokenizer, length, right)
            else:
                failed[number] = talk
    missing = count - len(done)
    if missing:
        progress.say(
            f"{loaded.name} found facts in {len(done)} of {asked} texts of {length:,} tokens; "
            f"{missing} of {count} retrieval items have answers that it did not write itself"
        )
    for number in sorted(failed)[:missing]:
        talk = failed[number]
        expected = {index: turn.expected for index, turn in enumerate(talk.turns)}
        done[number] = talk.answered(loaded.tokenizer, length, expected)
    return [done[number] for number in sorted(done)]


def evenly(index: int) -> float:
    """The van der Corput sequence, 0 to 1: any first few of its numbers are spread evenly."""
    return sum((index >> bit & 1) / 2 ** (bit + 1) for bit in range(index.bit_length()))


def _in_turn(rng: np.random.Generator, choices: list[int], count: int) -> np.ndarray:
    """``count`` of the choices, all of them in every ``len(choices)``, in chance order."""
    return np.concatenate([rng.permutation(choices) for _ in range(0, count, len(choices))])[:count]


def _conversation(
    tokenizer: PreTrainedTokenizerBase,
    stream: TokenStream,
    length: int,
    kind: Fact,
    count: int,
    depth: float,
    rng: np.random.Generator,
) -> _Conversation:
    """Facts of a kind in real text, the first at ``depth`` (0 to 1), and questions about all of them."""
    keys = rng.permutation(kind.keys)[:count].tolist()
    if isinstance(kind.values, int):
        values = [str(rng.integers(10 ** (kind.values - 1), 10**kind.values)) for _ in keys]
    else:
        values = rng.permutation(kind.values)[: len(keys)].tolist()
    drawn = list(zip(keys, values, strict=True))
    facts = [token_ids(tokenizer, f"\n\n{kind.statement.format(key=key, value=value)}\n\n") for key, value in drawn]
    ending = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    turns: list[_Turn] = []
    for key, value in drawn:
        question = kind.question.format(key=key)
        expected = [*token_ids(tokenizer, kind.answer.format(key=key, value=value)), *ending][:_ANSWER]
        turns.append(_Turn(token_ids(tokenizer, question), value, np.array(expected, np.int64)))
    start, ask = (np.asarray(part, np.int64) for part in chat_frame(tokenizer))
    before = np.concatenate([start, token_ids(tokenizer, _INTRO)])
    gap, between = token_ids(tokenizer, "\n\n"), np.asarray(chat_turn(tokenizer), np.int64)
    talk = len(gap) + sum(len(turn.question) + len(ask) + _ANSWER + len(between) for turn in turns)
    room = text_room("retrieval", length, len(before) + sum(map(len, facts)) + talk)
    depths = np.concatenate([[depth], rng.random(len(facts) - 1)])
    filler = stream.draw(room + talk, rng)
    pieces, done = [], 0
    for which in np.argsort(depths):
        place = int(depths[which] * room)
        pieces += [filler[done:place], facts[which]]
        done = place
    return _Conversation(before, np.concatenate([*pieces, filler[done:]]), tuple(turns), gap, ask, between)


def text_room(source: str, length: int, taken: int) -> int:
    """Tokens left for text in an item.

    Raises
    ------
    InputError
        If they are too few.
    """
    least = -(-(taken + _LEAST_TEXT) // 64) * 64
    if length < least:
        raise InputError(f"{length} tokens are too few for a {source} item; the shortest length is {least}")
    return length - taken
