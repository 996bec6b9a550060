"""A question about a fact is found or lost once, whatever its answer's length."""

import numpy as np
import pytest

from moa.search.divergence import Divergence, lost, means
from moa.search.items import CalibrationItem


def item(*loss):
    return CalibrationItem(np.zeros(20, np.int64), np.arange(4, 20), np.array(loss))


def test_questions_are_stretches_of_the_text():
    assert [found.tolist() for found in item(5, 6, 7, 12, 13).questions] == [[0, 1, 2], [3, 4]]
    assert [found.tolist() for found in item(5).questions] == [[0]]


def test_the_first_question_counts_as_much_as_all_later_ones():
    nats = np.array([3.0, 0.0, 1.0, 0.0])
    assert lost(item(5, 8, 11, 14), nats) == pytest.approx((1 - np.exp(-3)) / 2 + (1 - np.exp(-1)) / 6)
    assert lost(item(5), nats[:1]) == pytest.approx(1 - np.exp(-3))


def test_an_answer_is_lost_by_any_of_its_tokens():
    found, wrong = [0, 0, 0], [1, 1]
    assert lost(item(5, 6, 7, 12, 13), np.array([*found, *wrong])) == pytest.approx((1 - np.exp(-2)) / 2)
    assert lost(item(5, 6, 7), np.array([9.0, 0, 0])) == lost(item(5, 6, 7), np.array([0, 0, 9.0]))
    assert lost(item(5, 6, 7), np.zeros(3)) == 0
    assert 0.99 < lost(item(5, 6), np.array([100.0, 100.0])) <= 1, "no more than all"


def test_texts_and_summaries_count_at_the_length_where_they_lose_most():
    """One plan serves all lengths. Of retrieval the mean over lengths counts."""
    short, long = np.array([0.2, 0.4, 0.6]), np.array([0.9])
    found = means(
        {
            (1024, "retrieval"): short,
            (2048, "retrieval"): long,
            (1024, "summary"): long,
            (2048, "summary"): short,
            (1024, "text"): short,
            (2048, "text"): long,
            (4096, "text"): short,
        }
    )
    assert found == pytest.approx({"retrieval": (0.4 + 0.9) / 2, "summary": 0.9, "text": 0.9})


class OfTexts(Divergence):
    """Without a model, to ask for the error alone."""

    def __init__(self):
        self._weights, self._unit = {"text": 3.0}, {"text": 2.0}


def test_the_error_is_of_the_lengths_that_count():
    """Of plans that are worst at the same length of the differences there, of others of both."""
    random = np.random.default_rng(0)
    low, other_low = random.random((2, 9))
    high, other_high = 1 + random.random((2, 9))
    error = OfTexts().error

    def losses(short, long):
        return {(1024, "text"): short, (2048, "text"): long}

    def variance(numbers):
        return numbers.var(ddof=1) / len(numbers)

    same = error(losses(high, low), losses(other_high, other_low))
    assert same == pytest.approx(1.5 * variance(high - other_high) ** 0.5)
    apart = error(losses(high, low), losses(other_low, other_high))
    assert apart == pytest.approx(1.5 * (variance(high) + variance(other_high)) ** 0.5)
