"""The model `moa` in lm-eval: its tasks and metrics, under a plan."""

import json

import pytest
import torch

import moa
from moa import cli

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed")
from lm_eval.tasks import TaskManager  # noqa: E402
from lm_eval.tasks.longbench.metrics import get_qa_f1_score, get_rouge_score  # noqa: E402

import moa.evaluation.lm_eval  # noqa: E402 (registers the model)
from moa.models import load_model  # noqa: E402

FACTS = ("The harbour light was painted green in the spring of that year. " * 4, "The gate is open. " * 9)


@pytest.fixture(scope="module")
def plans(random_folder, tmp_path_factory):
    identity = load_model(str(random_folder), "float32", "cpu").identity
    folder = tmp_path_factory.mktemp("plans")
    moa.Plan.dense(identity).save(folder / "dense.json")
    moa.Plan.from_arrays(
        identity, [[128.0] * identity.kv_heads] * identity.layers, [[0.0] * identity.kv_heads] * identity.layers
    ).save(folder / "short.json")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Rows as LongBench has them: input, context, answers, all_classes."""
    file = tmp_path_factory.mktemp("data") / "test.jsonl"
    rows = [
        {
            "input": f"What is said in part {index}?",
            "context": " ".join(FACTS[(index + part) % 2] for part in range(4)),
            "answers": ["the harbour light was painted green"],
            "all_classes": None,
            "choices": [" green", " open", " nothing"],
            "gold": index % 3,
        }
        for index in range(3)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def tasks(data):
    """An F1, a ROUGE and an accuracy task, with the metrics of lm-eval's own LongBench."""
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "doc_to_text": "{{context}}\n\nQuestion: {{input}}\nAnswer:",
    }
    written = {
        **common,
        "output_type": "generate_until",
        "doc_to_target": "{{answers}}",
        "generation_kwargs": {"max_gen_toks": 12, "do_sample": False, "until": []},
    }
    mean = {"aggregation": "mean", "higher_is_better": True}
    return [
        {
            **written,
            "task": "local_f1",
            "process_results": get_qa_f1_score,
            "metric_list": [{"metric": "qa_f1_score", **mean}],
        },
        {
            **written,
            "task": "local_rouge",
            "process_results": get_rouge_score,
            "metric_list": [{"metric": "rouge_score", **mean}],
        },
        {
            **common,
            "task": "local_choice",
            "output_type": "multiple_choice",
            "doc_to_choice": "choices",
            "doc_to_target": "gold",
            "metric_list": [{"metric": "acc", **mean}],
        },
    ]


def run(model, arguments, data):
    found = lm_eval.simple_evaluate(
        model=model,
        model_args=arguments,
        tasks=tasks(data),
        task_manager=TaskManager(include_defaults=False),  # reading all of lm-eval's own takes most of a minute
        log_samples=True,
        bootstrap_iters=0,
    )
    said = {name: [sample["resps"] for sample in samples] for name, samples in found["samples"].items()}
    return found["results"], said


def test_full_spans_score_as_lm_evals_own_model_and_short_ones_do_not(random_folder, plans, data):
    results, said = run("hf", f"pretrained={random_folder},dtype=float32,device=cpu", data)
    assert {"qa_f1_score,none", "rouge_score,none", "acc,none"} <= {
        key for metrics in results.values() for key in metrics
    }
    full, said_full = run("moa", f"pretrained={random_folder},plan={plans}/dense.json,dtype=float32,device=cpu", data)
    short, said_short = run("moa", f"pretrained={random_folder},plan={plans}/short.json,dtype=float32,device=cpu", data)
    assert full.keys() == short.keys() == results.keys()
    assert said_full["local_f1"] == said["local_f1"]
    assert said_full["local_rouge"] == said["local_rouge"]
    dense, same, other = (
        torch.tensor([[choice[0][0] for choice in sample] for sample in answers["local_choice"]])
        for answers in (said, said_full, said_short)
    )
    torch.testing.assert_close(same, dense, atol=1e-3, rtol=1e-4)
    assert (other - dense).abs().max() > 1e-3


def test_generation_is_that_of_apply(random_folder, plans, data):
    _, said = run("moa", f"pretrained={random_folder},plan={plans}/short.json,dtype=float32,device=cpu", data)
    loaded = load_model(str(random_folder), "float32", "cpu")
    row = json.loads(data.read_text(encoding="utf-8").splitlines()[0])
    prompt = f"{row['context']}\n\nQuestion: {row['input']}\nAnswer:"
    ids = loaded.tokenizer(prompt, return_tensors="pt")["input_ids"]
    with moa.apply(loaded.model, moa.Plan.load(plans / "short.json")):
        tokens = loaded.model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12)
    assert said["local_f1"][0][0][0] == loaded.tokenizer.decode(tokens[0, ids.shape[1] :], skip_special_tokens=True)


def test_the_command_knows_the_model(random_folder, plans, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["lm-eval", "run", "--help"])
    assert stopped.value.code == 0
    assert "--model_args" in capsys.readouterr().out
