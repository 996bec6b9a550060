"""Calibration items: sequences of which some tokens are answers, and their file."""

import os
from collections import defaultdict
from dataclasses import dataclass, field, fields

import numpy as np

from moa.errors import InputError
from moa.files import read_tensors, write_tensors

FORMAT = 2  # part of the keys of results


@dataclass(frozen=True)
class Question:
    """A question and its answer.

    Attributes
    ----------
    input_ids : int64 array [tokens]
        What follows the text that it is about.
    loss : int64 array [tokens that carry loss]
        Their places in ``input_ids``, rising; the first token is none of them.
    """

    input_ids: np.ndarray
    loss: np.ndarray


_QUESTION = tuple(part.name for part in fields(Question))


@dataclass(frozen=True)
class CalibrationItem:
    """One prompt with its answer, or a conversation with several.

    Attributes
    ----------
    input_ids : int64 array [N]
    answer : int64 array [answer tokens]
        Places of the tokens of the answers, rising; the first token of the sequence is none of them.
    loss : int64 array [tokens that carry loss]
        Those of them that carry loss.
    text : int64 array [T]
        Of a conversation about a text, the text (with what comes before it), and perhaps some more of it. T is the same
        for all items of a length, and text and question have N tokens at most.
    questions : tuple of Question
        The questions of the conversation, each as if it were the first.
    """

    input_ids: np.ndarray
    answer: np.ndarray
    loss: np.ndarray
    text: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    questions: tuple[Question, ...] = ()

    @property
    def answer_start(self) -> int:
        """Place of the first token of an answer."""
        return int(self.answer[0])

    def arrays(self) -> dict[str, np.ndarray]:
        """All that it is made of, by name."""
        found = {"input_ids": self.input_ids, "answer": self.answer, "loss": self.loss, "text": self.text}
        for number, question in enumerate(self.questions):
            found |= {f"question/{number}/{part}": getattr(question, part) for part in _QUESTION}
        return found

    @classmethod
    def of_arrays(cls, arrays: dict[str, np.ndarray]) -> "CalibrationItem":
        """The item that `arrays` came from; KeyError where one is missing."""
        numbers = range(sum(name.startswith("question/") for name in arrays) // 2)
        questions = [Question(*(arrays[f"question/{number}/{part}"] for part in _QUESTION)) for number in numbers]
        return cls(arrays["input_ids"], arrays["answer"], arrays["loss"], arrays["text"], tuple(questions))


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
        tensors = {
            f"{length}/{source}/{index}/{name}": array
            for (length, source), items in self.items.items()
            for index, item in enumerate(items)
            for name, array in item.arrays().items()
        }
        write_tensors(path, tensors)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "CalibrationSet":
        """Read what `save` wrote.

        Raises
        ------
        InputError
            If the file is missing, damaged, or holds something else.
        """
        arrays: defaultdict[tuple[int, str, int], dict[str, np.ndarray]] = defaultdict(dict)
        found: defaultdict[tuple[int, str], list[CalibrationItem]] = defaultdict(list)
        try:
            for path_in_file, array in read_tensors(path).items():
                length, source, index, name = path_in_file.split("/", 3)
                arrays[int(length), source, int(index)][name] = array
            for (number, source, _), parts in sorted(arrays.items()):
                found[number, source].append(CalibrationItem.of_arrays(parts))
        except (KeyError, ValueError) as error:
            raise InputError(f"{path} does not hold calibration items; delete it and calibrate again") from error
        return cls({key: tuple(items) for key, items in found.items()})
