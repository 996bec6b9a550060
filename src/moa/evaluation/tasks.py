"""Retrieval tasks: what a plan must not break is finding things far back.

Prompts end with the first words of the answer, so that the next few tokens are the number, whatever style of answer a
model has been taught. Wordings, names and seeds differ from those of `moa.search.calibrate`, on purpose.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from moa.errors import InputError
from moa.models import chat_frame
from moa.search.text import TokenStream, token_ids

_PASSKEY_INTRO = "A pass key, a number of five digits, is hidden in the following text. Find it and remember it.\n\n"
_PASSKEY_NEEDLE = "The pass key is {value}. Remember it. {value} is the pass key.\n\n"
_PASSKEY_QUESTION = "What is the pass key, the number of five digits hidden in the text?"
_PASSKEY_ANSWER = "The pass key is"

_BOX_INTRO = (
    "Some notes about boxes of coins are hidden in the following text. Read all of it and remember the notes.\n\n"
)
_BOX_NEEDLE = "Note: the {name} box holds exactly {value} coins.\n\n"
_BOX_QUESTION = "How many coins does the {name} box hold, according to the note in the text?"
_BOX_ANSWER = "The {name} box holds exactly"
_BOXES_QUESTION = (
    "The text has {count} notes about the {name} box, each with another number of coins. What are the {count} numbers?"
)
_BOXES_ANSWER = "The {count} numbers are"
_MULTI = 4  # notes of the tasks with several

_VARIABLE_INTRO = "Assignments of variables are hidden in the following text. Follow them.\n\n"
_VARIABLE_FIRST = "Assignment: {name} = {value}.\n\n"
_VARIABLE_NEXT = "Assignment: {name} = {before}.\n\n"
_VARIABLE_QUESTION = "Which number does the variable {name} hold in the end?"
_VARIABLE_ANSWER = "The variable {name} holds the number"
_HOPS = 3

_LINES_INTRO = (
    "Below is a record of lines I want you to remember. Each line begins with 'line <line index>' and contains a "
    "'<REGISTER_CONTENT>' at the end of the line as a numerical value. Now the record starts:\n\n"
)
_LINES_LINE = "line {name}: REGISTER_CONTENT is <{value}>\n"
_LINES_QUESTION = "Now the record is over. Tell me what is the <REGISTER_CONTENT> in line {name}? I need the number."
_LINES_ANSWER = "The <REGISTER_CONTENT> in line {name} is"

_JSON_INTRO = "Below is a JSON object whose values are numbers.\n\n{\n"
_JSON_LINE = '"{name}": {value},\n'
_JSON_QUESTION = '}}\n\nWhat is the value of the key "{name}" in the JSON object above?'
_JSON_ANSWER = 'The value of "{name}" is'

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

NUMBER = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?")


@dataclass(frozen=True)
class TaskItem:
    """A prompt, and the numbers that the model should answer.

    Attributes
    ----------
    prompt_ids : int64 array [length]
    answers : tuple of str
        Five digits each.
    depth : float
        Where in the text what is asked for lies (the first of several): 0 is its beginning, 1 its end.
    question_start : int
        Tokens from here on are the question; those before are what a cache could be compressed to without knowing it.
    """

    prompt_ids: np.ndarray
    answers: tuple[str, ...]
    depth: float
    question_start: int


@dataclass(frozen=True)
class RetrievalTask:
    """How to make a task's items.

    Attributes
    ----------
    make : callable (tokenizer, text, length, items, seed) -> list of TaskItem
        ``text`` is filler that calibration has not seen, ``length`` the exact number of tokens of each prompt; depths
        are spread evenly over the items. Raises InputError if the length leaves no room for the task, or the text is
        too short for it.
    new_tokens : int
        Room for the answer.
    said : str
        How an answer continues the prompt most directly; empty where that is not one thing.
    """

    make: Callable[[PreTrainedTokenizerBase, str, int, int, int], list[TaskItem]]
    new_tokens: int = 12
    said: str = " {answer}"


def score(prediction: str, answers: Sequence[str]) -> float:
    """Share of the answers among the first ``len(answers)`` numbers of a prediction, in any order.

    Commas between thousands do not matter.
    """
    found = [number.replace(",", "") for number in NUMBER.findall(prediction)[: len(answers)]]
    return len(set(found) & set(answers)) / len(answers)


def _passkey(tokenizer: PreTrainedTokenizerBase, text: str, length: int, items: int, seed: int) -> list[TaskItem]:
    """A pass key hidden in real text (the task of Landmark Attention, arXiv 2305.16300)."""
    frame = _frame(tokenizer, _PASSKEY_INTRO, _PASSKEY_QUESTION, _PASSKEY_ANSWER)
    haystack = _Haystack(tokenizer, text, length, items, seed, "passkey")
    built = []
    for index in range(items):
        (key,) = haystack.numbers(1)
        built.append(haystack.item(frame, [_PASSKEY_NEEDLE.format(value=key)], haystack.depths(index, 1), (key,)))
    return built


def _boxes(notes: int) -> Callable[[PreTrainedTokenizerBase, str, int, int, int], list[TaskItem]]:
    """Notes on different boxes, and a question about one of them."""

    def make(tokenizer: PreTrainedTokenizerBase, text: str, length: int, items: int, seed: int) -> list[TaskItem]:
        haystack = _Haystack(tokenizer, text, length, items, seed, "needle")
        built = []
        for index in range(items):
            names, values = haystack.names(notes), haystack.numbers(notes)
            frame = _frame(
                tokenizer, _BOX_INTRO, _BOX_QUESTION.format(name=names[0]), _BOX_ANSWER.format(name=names[0])
            )
            needles = [_BOX_NEEDLE.format(name=name, value=value) for name, value in zip(names, values, strict=True)]
            built.append(haystack.item(frame, needles, haystack.depths(index, notes), (values[0],)))
        return built

    return make


def _values(tokenizer: PreTrainedTokenizerBase, text: str, length: int, items: int, seed: int) -> list[TaskItem]:
    """Several notes on one box, all of which are asked for."""
    haystack = _Haystack(tokenizer, text, length, items, seed, "multivalue")
    built = []
    for index in range(items):
        (name,), values = haystack.names(1), haystack.numbers(_MULTI)
        frame = _frame(
            tokenizer,
            _BOX_INTRO,
            _BOXES_QUESTION.format(name=name, count=_MULTI),
            _BOXES_ANSWER.format(count=_MULTI),
        )
        needles = [_BOX_NEEDLE.format(name=name, value=value) for value in values]
        built.append(haystack.item(frame, needles, haystack.depths(index, _MULTI), tuple(values)))
    return built


def _tracking(tokenizer: PreTrainedTokenizerBase, text: str, length: int, items: int, seed: int) -> list[TaskItem]:
    """A chain of variables, each set to the one before; the last one is asked for."""
    haystack = _Haystack(tokenizer, text, length, items, seed, "tracking")
    built = []
    for index in range(items):
        names = [name.replace("-", "_").upper() for name in haystack.names(_HOPS)]
        (value,) = haystack.numbers(1)
        needles = [_VARIABLE_FIRST.format(name=names[0], value=value)]
        needles += [_VARIABLE_NEXT.format(name=name, before=names[i]) for i, name in enumerate(names[1:])]
        frame = _frame(
            tokenizer,
            _VARIABLE_INTRO,
            _VARIABLE_QUESTION.format(name=names[-1]),
            _VARIABLE_ANSWER.format(name=names[-1]),
        )
        (first,) = haystack.depths(index, 1)
        depths = first + np.arange(_HOPS) * (1 - first) / _HOPS  # in order
        built.append(haystack.item(frame, needles, depths, (value,)))
    return built


def _records(
    task: str, intro: str, line: str, question: str, answer: str
) -> Callable[[PreTrainedTokenizerBase, str, int, int, int], list[TaskItem]]:
    """As many lines of a record as fit, each with a name and a number, then line breaks; one line is asked for."""

    def make(tokenizer: PreTrainedTokenizerBase, text: str, length: int, items: int, seed: int) -> list[TaskItem]:
        rng = np.random.default_rng(seed)
        names = _all_names()
        line_break = token_ids(tokenizer, "\n")[-1:]
        built = []
        for index in range(items):
            drawn = [(names[pick], str(rng.integers(10_000, 100_000))) for pick in rng.permutation(len(names))]
            lines = [line.format(name=name, value=value) for name, value in drawn[: length // 8 + 1]]  # surely enough
            encoded = [np.asarray(ids) for ids in tokenizer(lines, add_special_tokens=False)["input_ids"]]
            target, value = drawn[0]
            before, after = _frame(tokenizer, intro, question.format(name=target), answer.format(name=target))
            room = _room(task, length, before, encoded[0], after) + len(encoded[0])
            fitting = int(np.searchsorted(np.cumsum([len(ids) for ids in encoded]), room, side="right"))
            if fitting == len(names):
                raise InputError(f"the {task} task has names for {len(names)} lines, too few for {length:,} tokens")
            others = encoded[1:fitting]
            depth = (index + 0.5) / items
            place = round(depth * len(others))
            record = np.concatenate([*others[:place], encoded[0], *others[place:]])
            blank = np.repeat(line_break, room - len(record))
            prompt = np.concatenate([before, record, blank, after])
            built.append(TaskItem(prompt, (value,), depth, length - len(after)))
        return built

    return make


RETRIEVAL: dict[str, RetrievalTask] = {
    "passkey": RetrievalTask(_passkey),
    "needle": RetrievalTask(_boxes(1)),
    "multikey": RetrievalTask(_boxes(_MULTI)),
    "multivalue": RetrievalTask(_values, new_tokens=12 * _MULTI, said=""),
    "tracking": RetrievalTask(_tracking),
    "lines": RetrievalTask(
        _records("lines", _LINES_INTRO, _LINES_LINE, _LINES_QUESTION, _LINES_ANSWER), said=" <{answer}>"
    ),
    "json": RetrievalTask(_records("json", _JSON_INTRO, _JSON_LINE, _JSON_QUESTION, _JSON_ANSWER)),
}


class _Haystack:
    """Real text that facts are hidden in, and what they are made of, all from one seed."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text: str, length: int, items: int, seed: int, task: str):
        self.tokenizer, self.length, self.items, self.task = tokenizer, length, items, task
        self.stream = TokenStream.of(tokenizer, text)
        self.rng = np.random.default_rng(seed)

    def numbers(self, count: int) -> list[str]:
        """Different numbers of five digits."""
        return [str(number) for number in self.rng.choice(90_000, count, replace=False) + 10_000]

    def names(self, count: int) -> list[str]:
        return [str(name) for name in self.rng.choice(_all_names(), count, replace=False)]

    def depths(self, index: int, count: int) -> np.ndarray:
        """The depth of what is asked for, spread evenly over the items, then random ones."""
        return np.concatenate([[(index + 0.5) / self.items], self.rng.random(count - 1)])

    def item(
        self, frame: tuple[np.ndarray, np.ndarray], needles: Sequence[str], depths: np.ndarray, answers: tuple[str, ...]
    ) -> TaskItem:
        """The needles at their depths in a stretch of text, so long that the prompt has its length."""
        before, after = frame
        hidden = [token_ids(self.tokenizer, needle) for needle in needles]
        filler = self.stream.draw(_room(self.task, self.length, before, *hidden, after), self.rng)
        pieces, done = [before], 0
        for which in np.argsort(depths, kind="stable"):
            place = round(depths[which] * len(filler))
            pieces += [filler[done:place], hidden[which]]
            done = place
        prompt = np.concatenate([*pieces, filler[done:], after])
        return TaskItem(prompt, answers, float(depths[0]), self.length - len(after))


def _all_names() -> list[str]:
    return [f"{adjective}-{noun}" for adjective in _ADJECTIVES.split() for noun in _NOUNS.split()]


def _frame(tokenizer: PreTrainedTokenizerBase, intro: str, question: str, answer: str) -> tuple[np.ndarray, np.ndarray]:
    """All that comes before and after the text of a task; ``answer`` is how the answer begins."""
    before, after = chat_frame(tokenizer)
    return (
        np.concatenate([before, token_ids(tokenizer, intro)]).astype(np.int64),
        np.concatenate([token_ids(tokenizer, question), after, token_ids(tokenizer, answer)]).astype(np.int64),
    )


def _room(task: str, length: int, *parts: np.ndarray) -> int:
    """Tokens left for text."""
    taken = sum(len(part) for part in parts)
    if length <= taken:
        raise InputError(f"{length} tokens are too few for the {task} task, which takes {taken} without any text")
    return length - taken
