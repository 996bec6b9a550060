"""A question about a fact is found or lost once, whatever its answer's length."""

import numpy as np
import pytest

from moa.search.divergence import lost
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
