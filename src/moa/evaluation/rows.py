"""What an evaluation found, row by row, and what many rows say together."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from moa.evaluation.tasks import RETRIEVAL

PERPLEXITY = "perplexity"
ANSWER_PERPLEXITY = "answer_perplexity"
ANSWER_KL = "answer_kl"
KV_MB = "kv_mb"
SPEED = "tokens_per_s"
RETRIEVAL_MEAN = "retrieval"
ANSWERED = (ANSWER_PERPLEXITY, ANSWER_KL)  # read on the dense model's answers
TASKS = (*RETRIEVAL, PERPLEXITY, *ANSWERED)


@dataclass(frozen=True)
class Row:
    """One number: a method, at one length, in one task.

    Attributes
    ----------
    method : str
        A plan's name, or the dense model's.
    density : float
        Stored over all KV tokens at this length, by the plan.
    task : str
        Of `TASKS`, or ``kv_mb``, ``tokens_per_s`` or ``retrieval``.
    length : int
        N, tokens.
    score : float
        Retrieval tasks: share of right answers; ``retrieval``: mean over them. ``perplexity``: of held-out text.
        ``answer_perplexity``: of answers that the dense model wrote; ``answer_kl``: Kullback-Leibler divergence from
        the dense model there, nats a token. ``kv_mb``: keys and values of one sequence, measured in the cache, 1e6
        bytes. ``tokens_per_s``: decoding one sequence near the end of N tokens.
    n : int
        Items measured.
    stderr : float
        Standard error of the score over the items.
    parts : tuple of float
        Retrieval: the score by depth of what was asked for; perplexity: by position in the text; each in fifths, first
        to last. NaN where there was none.
    """

    method: str
    density: float
    task: str
    length: int
    score: float
    n: int
    stderr: float
    parts: tuple[float, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return {**asdict(self), "parts": [None if math.isnan(part) else part for part in self.parts]}

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> "Row":
        """What `to_dict` wrote."""
        return cls(**{**row, "parts": tuple(math.nan if part is None else part for part in row["parts"])})


def effective_length(rows: Sequence[Row], method: str, task: str = "passkey", share: float = 0.9) -> int:
    """The longest length up to which, without a gap, a method scores at least ``share``; 0 if there is none."""
    longest = 0
    for row in sorted((row for row in rows if row.method == method and row.task == task), key=lambda row: row.length):
        if row.score < share:
            break
        longest = row.length
    return longest


def effective_lengths(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Effective context length of each method for passkeys, beside the mean span there: method, length, mean_span."""
    found = []
    for method in dict.fromkeys(row.method for row in rows if row.task == "passkey"):
        length = effective_length(rows, method)
        density = next((row.density for row in rows if (row.method, row.length) == (method, length)), 0.0)
        found.append({"method": method, "length": length, "mean_span": round(density * length)})
    return found


def in_order(rows: Iterable[Row], methods: Sequence[str]) -> list[Row]:
    """Rows measured method by method, as `evaluate` returns them."""
    tasks = [*TASKS, KV_MB]
    order = {method: index for index, method in enumerate(methods)}
    return sorted(
        rows,
        key=lambda row: (
            (math.inf, 0) if row.task == SPEED else (row.length, tasks.index(row.task)),
            order[row.method],
        ),
    )


def retrieval_means(rows: Sequence[Row]) -> list[Row]:
    """Each method's mean over the retrieval tasks at each length, where there are several and it has them all.

    One task has one kind of text and of question; which of two plans is better at it says little about the next.
    """
    means = []
    for length in sorted({row.length for row in rows}):
        found = [row for row in rows if row.length == length and row.task in RETRIEVAL]
        tasks = {row.task for row in found}
        for method in dict.fromkeys(row.method for row in found):
            own = [row for row in found if row.method == method]
            if len(own) == len(tasks) > 1:
                mean = sum(row.score for row in own) / len(own)
                error = math.hypot(*(row.stderr for row in own)) / len(own)
                n = sum(row.n for row in own)
                means.append(Row(method, own[0].density, RETRIEVAL_MEAN, length, mean, n, error))
    return means
