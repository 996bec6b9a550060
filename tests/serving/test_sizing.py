"""How many sequences fit: whole pages, counted by hand."""

import json
from dataclasses import replace

import numpy as np
import pytest

from moa.benchmark.shapes import SHAPES
from moa.cli import main
from moa.errors import InputError, PlanError
from moa.plan import ModelIdentity, Plan
from moa.serving.groups import head_groups
from moa.serving.sizing import ACTIVATIONS, IN_USE, page_bytes, request_pages, sizes

MODEL = ModelIdentity("llama", layers=2, kv_heads=2, query_heads=4, head_dim=8, fingerprint="")
CARD = 10e9


def two_spans(length=1024):
    """Two heads see all, two see 100 tokens."""
    alpha, beta = np.array([[0.0, 100.0]] * 2), np.array([[1.0, 0.0]] * 2)
    return head_groups(Plan.from_arrays(MODEL, alpha, beta), length)


def test_a_request_holds_the_pages_of_sink_and_window_and_one_more():
    groups = two_spans()
    (whole, window) = groups.spans.tolist()
    assert (whole, groups.size) == (1024, 2)
    assert window == 112, "spans come in blocks of 16"
    # 108 tokens of window touch at most 8 pages of 16 tokens; the sink of 4 tokens is one page
    assert request_pages(groups, 16) == 64 + 8 + 1
    # while a chunk of 256 tokens is read, the window is 107 + 256 tokens
    assert request_pages(groups, 16, in_flight=256) == 64 + 23 + 1 + 1
    assert request_pages(groups, 16, in_flight=4096) == 64 + 64, "never more than the sequence has"
    assert page_bytes(groups, 16, 2) == 2 * 16 * 2 * 8 * 2


def test_a_longer_sink_takes_more_pages_and_its_window_fewer():
    groups = two_spans()
    longer = replace(groups, plan=replace(groups.plan, sink=36))
    # 76 tokens of window touch at most 6 pages of 16 tokens; the sink of 36 tokens is three pages
    assert request_pages(longer, 16) == 64 + 6 + 3


def test_dense_takes_every_page_of_every_head():
    groups = head_groups(Plan.dense(MODEL), 1000)
    assert request_pages(groups, 16) == 63
    assert page_bytes(groups, 16, 2) == 4 * 16 * 2 * 8 * 2


@pytest.mark.parametrize("ranks", [1, 2])
def test_what_is_left_beside_weights_and_activations_holds_the_sequences(ranks):
    weights = 3e9
    dense, half = sizes("tiny", MODEL, weights, {"half": Plan.uniform(MODEL, 0.5)}, 4096, ranks, CARD)
    free = ranks * (IN_USE * CARD - ACTIVATIONS) - weights
    for row in (dense, half):
        assert row.free_gb == pytest.approx(free / 1e9)
        assert row.sequences == int(row.free_gb / row.kv_gb)
    assert dense.kv_gb == pytest.approx(4096 * 2 * 2 * 2 * 8 * 2 / 1e9), "of all ranks"
    assert half.sequences == pytest.approx(2 * dense.sequences, rel=0.02)
    assert (dense.density, half.density) == (1, 0.5)


def test_weights_that_do_not_fit_leave_room_for_nothing():
    (dense,) = sizes("large", MODEL, 2 * CARD, {}, 4096, 1, CARD)
    assert dense.sequences == 0
    assert dense.free_gb < 0


def test_ranks_and_lengths_that_make_no_sense_are_refused():
    with pytest.raises(PlanError, match="3 tensor-parallel ranks"):
        sizes("tiny", MODEL, 0, {}, 4096, 3, CARD)
    with pytest.raises(InputError, match="at least 1"):
        sizes("tiny", MODEL, 0, {}, 0, 1, CARD)


def test_the_command_sizes_large_models_without_their_weights(tmp_path, capsys):
    target = tmp_path / "size.json"
    options = ["--density", "0.5,0.25", "--lengths", "32768", "--gpus", "4,8", "--json", str(target)]
    with pytest.raises(SystemExit) as end:
        main(["size", "--shape", "llama3-70b", *options])
    assert not end.value.code
    rows = json.loads(target.read_text(encoding="utf-8"))["rows"]
    assert [(row["ranks"], row["method"]) for row in rows] == [
        (ranks, method) for ranks in (4, 8) for method in ("dense", "MoA 50 %", "MoA 25 %")
    ]
    dense, half, quarter = (row["sequences"] for row in rows[:3])
    assert 1.7 * dense < half < 2.1 * dense
    assert 3 * dense < quarter < 4.1 * dense
    assert target.with_suffix(".md").read_text(encoding="utf-8").count("| llama3-70b |") == 6


def test_the_command_sizes_every_plan_of_one_file_name(tmp_path):
    identity, target = ModelIdentity.of(SHAPES["llama-7b"]), tmp_path / "size.json"
    paths = [tmp_path / folder / "plan.json" for folder in ("half", "quarter")]
    for path, density in zip(paths, (0.5, 0.25), strict=True):
        Plan.uniform(identity, density).save(path)
    given = [part for path in paths for part in ("--plan", str(path))]
    with pytest.raises(SystemExit) as end:
        main(["size", "--shape", "llama-7b", *given, "--lengths", "8192", "--gpus", "1", "--json", str(target)])
    assert not end.value.code
    rows = json.loads(target.read_text(encoding="utf-8"))["rows"]
    assert [(row["method"], round(row["density"], 2)) for row in rows] == [
        ("dense", 1),
        (f"MoA {tmp_path}/half/plan", 0.5),
        (f"MoA {tmp_path}/quarter/plan", 0.25),
    ]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [([], "--shape"), (["--shape", "llama-9b"], "llama3-70b"), (["--shape", "llama-7b", "--gpus", "x"], "--gpus")],
)
def test_the_command_says_what_is_wrong(arguments, reason, capsys):
    with pytest.raises(SystemExit) as end:
        main(["size", *arguments])
    assert end.value.code == 1
    assert reason in capsys.readouterr().err
