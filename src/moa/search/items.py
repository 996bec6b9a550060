"""Calibration items: sequences of which some tokens are answers, and their file."""

import os
from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from moa.errors import InputError
from moa.files import read_tensors, write_tensors


@dataclass(frozen=True)
class CalibrationItem:
    """One prompt with its answer, or a conversation with several.

    Attributes
    ----------
    input_ids : int64 array [N]
    answer : int64 array [answer tokens]
        Places of the tokens of the answers, rising; the first token of the sequence is none of them.
    loss : int64 array [tokens that carry loss]
        Those of them that the search measures.
    """

    input_ids: np.ndarray
    answer: np.ndarray
    loss: np.ndarray

    @property
    def answer_start(self) -> int:
        """Place of the first token of an answer."""
        return int(self.answer[0])

    @property
    def questions(self) -> list[np.ndarray]:
        """Places in ``loss`` that answer one question: stretches of neighbours in the text."""
        return np.split(np.arange(len(self.loss)), np.flatnonzero(np.diff(self.loss) > 1) + 1)


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
                tensors[f"{length}/{source}/{index}/answer"] = item.answer
                tensors[f"{length}/{source}/{index}/loss"] = item.loss
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
                    answer, loss = (tensors[f"{length}/{source}/{index}/{part}"] for part in ("answer", "loss"))
                    found[int(length), source][int(index)] = CalibrationItem(tensors[name], answer, loss)
        except (KeyError, ValueError) as error:
            raise InputError(f"{path} does not hold calibration items; delete it and calibrate again") from error
        return cls({key: tuple(items[index] for index in sorted(items)) for key, items in sorted(found.items())})
