"""Where calibration text comes from: Python's own documentation, the user's files, or a data set."""

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from moa.errors import InputError

# A calibration needs some hundred thousand tokens at most; a data set may hold billions.
DATASET_CHARACTERS = 4_000_000

_LOADERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}


@dataclass(frozen=True)
class TextSource:
    """Some text, and in words where it is from."""

    description: str
    text: str


def default_text() -> TextSource:
    """The language reference that comes with Python (``pydoc_data.topics``): 460,000 characters, always there."""
    from pydoc_data.topics import topics

    return TextSource(
        "Python's language reference (pydoc_data.topics)", "\n\n".join(topics[name].strip() for name in sorted(topics))
    )


def text_from_files(paths: Iterable[str | os.PathLike[str]]) -> TextSource:
    """Read plain text files (UTF-8), joined in the order given.

    Raises
    ------
    InputError
        If there is no file, or one is missing, binary or empty.
    """
    files = [Path(path) for path in paths]
    if not files:
        raise InputError("no text file given; expected at least one")
    return TextSource(", ".join(map(str, files)), "\n\n".join(_read(file) for file in files))


def text_from_dataset(name: str, split: str = "train", column: str | None = None) -> TextSource:
    """Read text from a data set: the rows of one column, joined, up to `DATASET_CHARACTERS` characters.

    Parameters
    ----------
    name : str
        A data set on the hub, a local folder (also one written by ``save_to_disk``) or a local JSON, CSV, Parquet or
        text file. Hub data sets are streamed: only what is used is downloaded.
    split : str
        Which part of it.
    column : str, optional
        Which column; by default ``text``, or the only column that holds strings.

    Raises
    ------
    InputError
        If `datasets` is not installed, the data set, split or column does not exist, or there is no text in it.
    """
    rows = iter(_open_dataset(name, split))
    parts: list[str] = []
    characters = 0
    while characters < DATASET_CHARACTERS:
        try:
            row = next(rows, None)
        except Exception as error:  # streaming reads, and fails, row by row
            raise InputError(f"cannot read data set {name!r}: {error}") from error
        if row is None:
            break
        column = column or _text_column(name, row)
        if not isinstance(row.get(column), str):
            raise InputError(f"data set {name!r} has no text in column {column!r}; its columns: {', '.join(row)}")
        parts.append(row[column])
        characters += len(row[column])
    text = "\n\n".join(parts)
    if not text.strip():
        raise InputError(f"data set {name!r}, split {split!r}, holds no text")
    return TextSource(f"data set {name}, split {split}, column {column}", text)


def split_text(text: str, fractions: Sequence[float]) -> list[str]:
    """Cut a text into consecutive parts that share nothing, each ending where a word ends.

    Parameters
    ----------
    fractions : sequence of float
        Share of the characters in each part; together at most 1, what is left over is dropped.

    Raises
    ------
    InputError
        If a fraction is not positive, or their sum is above 1.
    """
    if any(fraction <= 0 for fraction in fractions) or sum(fractions) > 1 + 1e-9:
        raise InputError(f"cannot split a text by {list(fractions)}; expected positive shares with a sum of at most 1")
    cuts = [0, *(_word_end(text, round(share * len(text))) for share in accumulate(fractions))]
    return [text[start:stop] for start, stop in pairwise(cuts)]


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str, special: bool = False) -> np.ndarray:
    """Tokens of a text, int64 [tokens]; ``special``: with those that the tokenizer adds."""
    return np.asarray(tokenizer(text, add_special_tokens=special)["input_ids"], np.int64)


def _word_end(text: str, position: int) -> int:
    while 0 < position < len(text) and not text[position].isspace():
        position += 1
    return min(position, len(text))


def _read(file: Path) -> str:
    try:
        data = file.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror or error}; expected a text file") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is not UTF-8 text (byte {error.start}); convert it or choose another file") from error
    if "\0" in text:
        raise InputError(f"{file} is a binary file; expected plain text")
    if not text.strip():
        raise InputError(f"{file} is empty; expected plain text")
    return text


def _open_dataset(name: str, split: str) -> Iterable[dict[str, Any]]:
    try:
        import datasets
    except ImportError as error:
        raise InputError("reading a data set needs `pip install 'moa-spans[datasets]'`") from error
    path = Path(name)
    try:
        if path.is_file():
            loader = _LOADERS.get(path.suffix.lower(), "text")
            return datasets.load_dataset(loader, data_files=name, split=split, streaming=True)
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():  # written by save_to_disk
            saved = datasets.load_from_disk(name)
            return saved[split] if isinstance(saved, datasets.DatasetDict) else saved
        return datasets.load_dataset(name, split=split, streaming=True)
    except Exception as error:  # datasets raises many types, some of its own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"cannot open data set {name!r}, split {split!r}: {reason}") from error


def _text_column(name: str, row: dict[str, Any]) -> str:
    strings = [column for column, value in row.items() if isinstance(value, str)]
    if "text" in strings:
        return "text"
    if len(strings) != 1:
        raise InputError(f"data set {name!r} has no column 'text'; choose one of its columns: {', '.join(row)}")
    return strings[0]


@dataclass(frozen=True)
class TokenStream:
    """A text as token ids, to be cut into stretches of exact length.

    Attributes
    ----------
    ids : int64 array [tokens]
    starts : int64 array [paragraphs]
        Index of each paragraph's first token.
    """

    ids: np.ndarray
    starts: np.ndarray

    @classmethod
    @lru_cache(maxsize=4)
    def of(cls, tokenizer: PreTrainedTokenizerBase, text: str) -> "TokenStream":
        """Tokenise a text paragraph by paragraph; the same text again is only looked up."""
        paragraphs = [f"{paragraph}\n\n" for paragraph in re.split(r"\n\s*\n", text) if paragraph.strip()]
        pieces = tokenizer(paragraphs, add_special_tokens=False)["input_ids"] if paragraphs else []
        ends = np.cumsum([len(piece) for piece in pieces], dtype=np.int64)
        ids = np.fromiter(chain.from_iterable(pieces), np.int64)
        return cls(ids, np.concatenate([[0], ends[:-1]]).astype(np.int64))

    def draw(self, tokens: int, rng: np.random.Generator) -> np.ndarray:
        """Consecutive ids from the start of a random paragraph: int64 [tokens].

        Raises
        ------
        InputError
            If the text has fewer tokens.
        """
        if tokens > len(self.ids):
            raise InputError(
                f"the text has {len(self.ids):,} tokens, and {tokens:,} are needed; give more text or shorter lengths"
            )
        start = rng.choice(self.starts[self.starts <= len(self.ids) - tokens])
        return self.ids[start : start + tokens]
