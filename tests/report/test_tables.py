"""Tables of an evaluation: nothing is lost on the way to a terminal or a file."""

import io
import json
import math

import pytest
import torch
from rich.console import Console

from moa.evaluation.rows import TASKS, Row
from moa.machine import arithmetic_info, device_info
from moa.report.tables import table, to_json, to_markdown

ROWS = [
    Row("dense", 1.0, "kv_mb", 2048, 94.37184, 1, 0.0),
    Row("dense", 1.0, "passkey", 2048, 0.95, 20, 0.05, (1.0, 0.75, math.nan, 1.0, 1.0)),
    Row("dense", 1.0, "needle", 2048, 0.55, 20, 0.05, (1.0, 0.75, 0.5, 0.25, 0.25)),
    Row("dense", 1.0, "perplexity", 2048, 35.25, 4, 0.5),
    Row("dense", 1.0, "tokens_per_s", 2048, 15.5, 5, 0.1),
    Row("MoA half", 0.5, "kv_mb", 2048, 47.18592, 1, 0.0),
    Row("MoA half", 0.5, "passkey", 2048, 0.85, 20, 0.08),
]


def test_json_and_markdown_hold_the_numbers_the_command_and_the_machine():
    machine = device_info(["cpu"])
    assert {"platform", "cpu", "cores", "torch", "transformers"} <= machine.keys()
    written = json.loads(json.dumps(to_json(ROWS, "moa eval demo", "llama", machine), allow_nan=False))
    assert [(row["method"], row["task"], row["score"]) for row in written["rows"]] == [
        (row.method, row.task, row.score) for row in ROWS
    ]
    assert written["rows"][1]["parts"] == [1.0, 0.75, None, 1.0, 1.0]
    (mean,) = written["retrieval"]
    assert (mean["method"], mean["score"]) == ("dense", pytest.approx(0.75))
    assert (written["command"], written["model"]) == ("moa eval demo", "llama")
    assert written["device"]["torch"] == machine["torch"]
    markdown = to_markdown(ROWS, "moa eval demo", machine)
    lines = markdown.splitlines()
    assert len({line.count("|") for line in lines[:4]}) == 1
    for number in ("1.000", "94.37", "0.95", "35.25", "15.5"):
        assert number in lines[2]
    for number in ("0.500", "47.19", "0.85"):
        assert number in lines[3]
    assert "moa eval demo" in markdown
    assert machine["torch"] in markdown


def test_a_machine_has_each_gpu_once_however_many_processes_share_it(monkeypatch):
    monkeypatch.setattr("moa.models.pick_device", lambda name: torch.device("cuda" if name == "auto" else name))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "NVIDIA A" if device == "cuda:0" else "NVIDIA B")
    assert device_info(["cuda:0", "cuda:1", "cuda:0", "cuda:1"])["gpu"] == "1 x NVIDIA A, 1 x NVIDIA B"
    assert device_info(["cuda:1", "cuda:2"])["gpu"] == "2 x NVIDIA B"
    assert device_info(["cuda", "cuda:0", "auto"])["gpu"] == "1 x NVIDIA A"
    assert "gpu" not in device_info(["cpu:0"])
    assert arithmetic_info(["cuda:1", "cuda:2"]) == arithmetic_info(["cuda:1"]) != arithmetic_info(["cuda:0"])
    kinds = [arithmetic_info(each) for each in (["cpu"], ["cuda:0"], ["cuda:1"], ["cpu", "cuda:0"], ["mps"])]
    assert len({str(kind) for kind in kinds}) == len(kinds)


def test_one_short_method_leaves_the_heading_whole():
    console = Console(width=60, file=io.StringIO())
    console.print(table([Row("dense", 1.0, "perplexity", 320, 9.5, 4, 0.1)]))
    assert "method" in console.file.getvalue()


def test_the_table_fits_a_terminal():
    terminal = Console(file=io.StringIO(), width=80)
    terminal.print(table(ROWS))
    shown = terminal.file.getvalue()
    for number in ("MoA half", "0.500", "47.19", "35.25"):
        assert number in shown


@pytest.mark.parametrize("name", ["MoA plan", "binary-heads 25 %", "MoA benchmarks/results/searched/25/plan"])
def test_tables_of_all_tasks_are_whole_in_a_narrow_terminal(name):
    measured = (*TASKS, "kv_mb", "tokens_per_s")
    rows = [Row(name, 0.25, task, 131072, 0.51 + at / 100, 20, 0.0) for at, task in enumerate(measured)]
    terminal = Console(file=io.StringIO(), width=80)
    terminal.print(table(rows))
    numbers = [line for line in terminal.file.getvalue().splitlines() if "131072" in line]
    found = [f"{0.51 + at / 100:.2f}" for at in range(7)]
    assert numbers[0].split()[-10:] == ["131072", "0.250", *found, "0.540"]
    assert numbers[1].split()[-5:] == ["0.61", "0.58", "0.590", "0.6000", "0.6"]
    assert all(word[:12] in terminal.file.getvalue() for word in name.split())


def test_effective_lengths_stand_below_the_table():
    rows = [Row("a", 0.25, "passkey", n, score, 20, 0.0) for n, score in [(2048, 0.95), (4096, 1.0), (8192, 0.8)]]
    expected = "(passkey at least 0.9 from 2,048 tokens up to there): a 4,096 tokens with 1,024 stored (4.0 x)."
    assert expected in to_markdown([*rows, Row("a", 0.25, "needle", 512, 0.5, 20, 0.0)], "moa eval", {})


def test_the_mean_stands_between_retrieval_tasks_and_perplexity():
    headings, _, dense, half = to_markdown(ROWS, "moa eval", {}).splitlines()[:4]
    names = [cell.strip() for cell in headings.split("|")[1:-1]]
    assert names == ["method", "N", "density", "KV MB", "passkey", "needle", "retrieval", "ppl", "tok/s"]
    mean = names.index("retrieval")
    assert dense.split("|")[1:-1][mean].strip() == "0.750"
    assert half.split("|")[1:-1][mean].strip() == "", "it has not all tasks"
