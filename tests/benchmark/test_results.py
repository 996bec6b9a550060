"""Committed tables are made from the committed numbers; benchmarks of a GPU are refused without one."""

import json
from pathlib import Path

import pytest
import torch

from moa.errors import InputError

attention = pytest.importorskip("moa.benchmark.attention", reason="triton is not installed")
from moa.benchmark import profile, throughput  # noqa: E402

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


@pytest.mark.parametrize(
    ("file", "to_markdown"),
    [
        ("attention_h100", attention.to_markdown),
        ("influence_h100", profile.to_markdown),
        ("throughput_cpu", throughput.to_markdown),
    ],
)
def test_the_committed_table_is_that_of_the_committed_numbers(file, to_markdown):
    result = json.loads((RESULTS / f"{file}.json").read_text(encoding="utf-8"))
    assert (RESULTS / f"{file}.md").read_text(encoding="utf-8") == to_markdown(result)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("bench", [attention.bench_attention, profile.bench_profile])
def test_without_a_gpu_they_are_refused(bench):
    with pytest.raises(InputError, match="GPU"):
        bench()
