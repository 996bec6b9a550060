"""The prompts of `moa eval` for another environment, and the table of what came back. Run with MoA installed:

python items.py export demo --lengths 1024,2048 --tasks passkey,needle --items 20 --output items.jsonl
(run.py in kvpress's own environment: see requirements.txt)
python items.py table said.jsonl --json kvpress.json      (several files of answers make one table)
"""

import argparse
import json
import math
from collections import defaultdict
from pathlib import Path

from moa.evaluation.rows import Row
from moa.evaluation.tasks import RETRIEVAL, score
from moa.evaluation.text import default_evaluation_text
from moa.files import write_json, write_text
from moa.models import load_model
from moa.report.tables import to_json, to_markdown


def export(arguments: argparse.Namespace) -> None:
    loaded = load_model(arguments.model, device="cpu")
    lines = []
    for task in arguments.tasks.split(","):
        for length in map(int, arguments.lengths.split(",")):
            kind = RETRIEVAL[task]
            prompt = length - kind.new_tokens
            for item in kind.make(loaded.tokenizer, default_evaluation_text(), prompt, arguments.items, arguments.seed):
                lines.append(
                    {
                        "task": task,
                        "length": length,
                        "prompt_ids": item.prompt_ids.tolist(),
                        "question_start": item.question_start,
                        "new_tokens": kind.new_tokens,
                        "answers": item.answers,
                        "depth": item.depth,
                    }
                )
    write_text(arguments.output, "".join(json.dumps(line) + "\n" for line in lines))


def table(arguments: argparse.Namespace) -> None:
    cells, commands = defaultdict(list), []
    for file in arguments.said:
        first, *said = map(json.loads, Path(file).read_text(encoding="utf-8").splitlines())
        commands.append(f"{first['command']} (items' sha256 {first['items_sha256'][:12]})")
        for line in said:
            key = line["method"], line["density"], line["task"], line["length"]
            cells[key].append(score(line["text"], line["answers"]))
    command = "; ".join(commands)
    rows = []
    for (method, density, task, length), values in cells.items():
        n, mean = len(values), sum(values) / len(values)
        deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1)) if n > 1 else 0.0
        rows.append(Row(f"{method} {density:.3g}", density, task, length, mean, n, deviation / math.sqrt(n)))
    write_json(arguments.json, to_json(rows, command, first["model"], first["device"]))
    write_text(Path(arguments.json).with_suffix(".md"), to_markdown(rows, command, first["device"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    exporting = commands.add_parser("export")
    exporting.add_argument("model")
    exporting.add_argument("--lengths", default="1024")
    exporting.add_argument("--tasks", default="passkey")
    exporting.add_argument("--items", type=int, default=20)
    exporting.add_argument("--seed", type=int, default=0)
    exporting.add_argument("--output", required=True)
    exporting.set_defaults(run=export)
    tabling = commands.add_parser("table")
    tabling.add_argument("said", nargs="+")
    tabling.add_argument("--json", required=True)
    tabling.set_defaults(run=table)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
