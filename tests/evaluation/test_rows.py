"""What the rows of an evaluation say together."""

import pytest

from moa.evaluation.rows import Row, effective_length, effective_lengths, retrieval_means


def test_the_effective_length_ends_at_the_first_failure():
    rows = [
        Row("m", 0.5, "passkey", n, score, 20, 0.0) for n, score in [(8, 1.0), (2, 0.95), (4, 0.9), (16, 0.8), (32, 1)]
    ]
    assert effective_length(rows, "m") == 8
    assert effective_length(rows, "m", share=0.95) == 2
    assert effective_length(rows, "other") == 0


def test_effective_lengths_come_with_the_mean_span():
    rows = [Row("a", 0.25, "passkey", n, score, 20, 0.0) for n, score in [(4096, 1.0), (2048, 0.95), (8192, 0.8)]]
    rows += [Row("b", 0.5, "passkey", 2048, 0.1, 20, 0.0), Row("c", 0.5, "perplexity", 2048, 12.0, 4, 0.0)]
    assert effective_lengths(rows) == [
        {"method": "a", "length": 4096, "mean_span": 1024},
        {"method": "b", "length": 0, "mean_span": 0},
    ]


def test_the_mean_over_retrieval_tasks_is_of_methods_that_have_all_of_them():
    rows = [
        Row("a", 0.25, "passkey", 2048, 1.0, 100, 0.03),
        Row("a", 0.25, "needle", 2048, 0.5, 50, 0.04),
        Row("a", 0.25, "perplexity", 2048, 17.0, 4, 0.5),
        Row("b", 0.5, "passkey", 2048, 1.0, 100, 0.0),
        Row("a", 0.25, "passkey", 4096, 0.9, 100, 0.03),
        Row("c", 1.0, "perplexity", 4096, 15.0, 4, 0.5),
    ]
    (mean,) = retrieval_means(rows)
    assert (mean.method, mean.density, mean.task, mean.length, mean.n) == ("a", 0.25, "retrieval", 2048, 150)
    assert mean.score == pytest.approx(0.75), "tasks count alike, however many items they have"
    assert mean.stderr == pytest.approx(0.025)
