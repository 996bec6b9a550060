"""What other environments are given, and the table of what they say."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from moa.evaluation.tasks import RETRIEVAL
from moa.evaluation.text import default_evaluation_text

FOLDER = Path(__file__).parents[2] / "benchmarks" / "peers" / "kvpress"


@pytest.fixture
def items(monkeypatch):
    spec = importlib.util.spec_from_file_location("peer_items", FOLDER / "items.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["items.py", *map(str, arguments)])
        module.main()

    return run


def test_peers_are_given_the_prompts_of_eval(items, demo_model, tmp_path):
    file = tmp_path / "items.jsonl"
    items("export", "demo", "--lengths", 512, "--tasks", "passkey,multivalue", "--items", 2, "--output", file)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["task"] for line in lines] == ["passkey"] * 2 + ["multivalue"] * 2
    for task in ("passkey", "multivalue"):
        kind = RETRIEVAL[task]
        expected = kind.make(demo_model.tokenizer, default_evaluation_text(), 512 - kind.new_tokens, 2, 0)
        given = [line for line in lines if line["task"] == task]
        for line, item in zip(given, expected, strict=True):
            assert np.array_equal(line["prompt_ids"], item.prompt_ids)
            assert line["answers"] == list(item.answers)
            assert len(line["prompt_ids"]) + line["new_tokens"] == line["length"] == 512


def test_what_they_say_is_scored_as_in_eval(items, tmp_path):
    said, table = tmp_path / "said.jsonl", tmp_path / "table.json"
    common = {"method": "SnapKV, blind", "density": 0.5, "task": "passkey", "length": 1024, "depth": 0.5}
    lines = [
        {"command": "run.py", "items_sha256": 64 * "a", "model": "m", "device": {"torch": "2"}},
        {**common, "answers": ["12345"], "text": " 12345."},
        {**common, "answers": ["12345"], "text": " 54321."},
    ]
    said.write_text("".join(json.dumps(line) + "\n" for line in lines))
    more = tmp_path / "more.jsonl"
    lines = [{**lines[0], "command": "run.py again", "items_sha256": 64 * "b"}, {**lines[1], "method": "other"}]
    more.write_text("".join(json.dumps(line) + "\n" for line in lines))
    items("table", said, more, "--json", table)
    result = json.loads(table.read_text())
    row, other = result["rows"]
    assert (row["score"], row["n"], row["stderr"]) == (0.5, 2, pytest.approx(0.5))
    assert (other["method"], other["score"], other["n"]) == ("other 0.5", 1, 1)
    assert result["command"] == f"run.py (items' sha256 {12 * 'a'}); run.py again (items' sha256 {12 * 'b'})"
    assert "SnapKV, blind" in table.with_suffix(".md").read_text()
