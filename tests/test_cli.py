"""The command line: what it prints, and that bad input is one line and a non-zero exit."""

import contextlib
import io
import json
import math
import shutil
import subprocess
import sys

import pytest
import torch
from transformers import LlamaConfig

import moa
from moa import cli
from moa.cli.options import plans_of
from moa.evaluation.rows import Row
from moa.models import locate
from moa.progress import SILENT
from moa.search.calibrate import SOURCES
from moa.search.profile import kv_losses
from moa.search.run import Run
from moa.search.settings import default_weights

DATA = ("--lengths", 320, "--items", 1, "--validation-items", 1, "--validation-length", 384)  # of a search
IDENTITY = moa.ModelIdentity("llama", 2, 3, 9, 64, "0123456789abcdef")


def run(*arguments):
    """Exit code of `moa ARGUMENTS`."""
    with pytest.raises(SystemExit) as stopped:
        cli.main([str(argument) for argument in arguments])
    return stopped.value.code


def complaint(capsys, *arguments, code=1):
    assert run(*arguments) == code
    captured = capsys.readouterr().err.strip()
    assert captured.startswith("error: ")
    assert "\n" not in captured
    return captured


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    cli.out.width = 200


@pytest.fixture
def plan_file(tmp_path):
    path = tmp_path / "plan.json"
    moa.Plan.uniform(IDENTITY, 0.25).save(path)
    return path


@pytest.fixture(scope="module")
def demo_plan(demo_model, tmp_path_factory):
    path = tmp_path_factory.mktemp("plans") / "half.json"
    moa.Plan.uniform(demo_model.identity, 0.5).save(path)
    return path


def test_help_waits_for_nothing_heavy():
    """And what the package exports is there when asked for."""
    told = "import sys, moa.cli, moa; print({'torch', 'transformers', 'scipy'} & {*sys.modules}, *map(repr, dir(moa)))"
    found = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, check=True).stdout
    assert found.startswith("set() ")
    assert all(f"'{name}'" in found for name in moa.__all__)
    assert {name: getattr(moa, name).__name__ for name in moa.__all__} == {name: name for name in moa.__all__}
    with pytest.raises(AttributeError, match="'moa' has no attribute 'nothing'"):
        _ = moa.nothing


def test_show_draws_spans_and_costs(plan_file, capsys):
    assert run("show", plan_file, "--at", 1024, "--lengths", "2048,4096") == 0
    shown = capsys.readouterr().out
    assert "N = 1,024" in shown
    assert "layer  1" in shown
    assert shown.count("25") >= 6
    line = next(line for line in shown.splitlines() if "4,096" in line)
    assert "0.250" in line
    assert "1.6 MB" in line  # 2 layers x 3 heads x 1024 tokens x 64 x 2 bytes, K and V
    assert "6.3 MB" in line


def test_plans_of_one_file_name_go_by_their_paths(tmp_path):
    paths = [tmp_path / name for name in ("short/plan.json", "long/plan.json", "other.json")]
    for path, density in zip(paths, (0.25, 0.5, 0.75), strict=True):
        moa.Plan.uniform(IDENTITY, density).save(path)
    assert plans_of(paths) == {
        f"MoA {tmp_path}/short/plan": moa.Plan.uniform(IDENTITY, 0.25),
        f"MoA {tmp_path}/long/plan": moa.Plan.uniform(IDENTITY, 0.5),
        "MoA other": moa.Plan.uniform(IDENTITY, 0.75),
    }
    assert list(plans_of(paths[:1])) == ["MoA plan"]
    assert plans_of(None) == {}


def test_convert_imports_the_published_format(tmp_path, capsys):
    LlamaConfig(num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, hidden_size=64).save_pretrained(
        tmp_path / "model"
    )
    (tmp_path / "published.json").write_text(json.dumps({"alphas": [[0, 64]], "betas": [[0.5, 0]]}))
    target = tmp_path / "plan.json"
    assert run("convert", tmp_path / "published.json", "--model", tmp_path / "model", "-o", target) == 0
    assert moa.Plan.load(target).spans(4096).tolist() == [[2048 + 64]]


def test_env_names_the_versions(capsys):
    assert run("env") == 0
    shown = capsys.readouterr().out
    assert torch.__version__ in shown
    assert "transformers" in shown


@pytest.mark.slow
def test_the_backend_is_an_option_of_every_command(capsys, monkeypatch):
    monkeypatch.setenv("MOA_BACKEND", "")  # put back after the test
    assert run("--backend", "triton", "env") == 0
    assert "moa.attention.kernels" in capsys.readouterr().out
    assert run("--backend", "sdpa", "env") == 0
    assert "moa.attention.sdpa" in capsys.readouterr().out
    assert "magic" in complaint(capsys, "--backend", "magic", "env")


@pytest.fixture(scope="module")
def profiled(random_folder, tmp_path_factory):
    """A run directory that holds the stages calibrate and profile, to be copied."""
    common = ("--run-dir", tmp_path_factory.mktemp("runs") / "profiled", "--quiet")
    with contextlib.redirect_stderr(io.StringIO()) as said:
        assert run("calibrate", random_folder, *DATA, *common) == 0
        assert run("profile", random_folder, *common) == 0
    assert said.getvalue() == "", "--quiet is quiet"
    return common[1]


@pytest.mark.slow
def test_stages_one_by_one_give_the_plan_of_the_search(profiled, random_folder, tmp_path, capsys):
    shutil.copytree(profiled, tmp_path / "run")
    common = ("--run-dir", tmp_path / "run", "--quiet")
    assert run("optimize", "--density", 0.5, *common) == 0
    assert Run(tmp_path / "run").finished("optimize")[0]["weights"] == default_weights(0.5, SOURCES)
    assert run("refine", random_folder, "--refine", 9, *common) == 0
    assert "plans measured" in capsys.readouterr().out
    assert run("validate", random_folder, "-o", tmp_path / "a.json", *common) == 0
    shown, validation = capsys.readouterr().out, moa.Plan.load(tmp_path / "a.json").provenance["validation"]
    assert "retrieval" in shown
    lost, text = f"{validation['retrieval']:.1%} of answers", f"{validation['text']:.4f} nats a token of text"
    assert f"On held-out items it loses {lost}" in shown
    assert text in shown
    assert run("search", random_folder, "-o", tmp_path / "b.json", "--density", 0.5, "--refine", 9, *DATA, *common) == 0
    assert moa.Plan.load(tmp_path / "a.json") == moa.Plan.load(tmp_path / "b.json")
    assert capsys.readouterr().err == "", "--quiet is quiet"
    assert run("profile", random_folder, "--estimator", "paper", *common) == 0
    for command in (("refine", random_folder, "--refine", 9), ("validate", random_folder, "-o", tmp_path / "c.json")):
        assert "run again after optimize" in complaint(capsys, *command, *common)


def test_generate_answers_from_the_smaller_cache(demo_plan, capsys):
    prompt = "What is the capital of France? Answer with one word."
    assert run("generate", "demo", "--plan", demo_plan, "--prompt", prompt, "--max-new-tokens", 12) == 0
    captured = capsys.readouterr()
    assert "Paris" in captured.out
    assert "KV cache" in captured.err


def test_a_prompt_that_is_no_text_is_one_line(demo_plan, capsys, monkeypatch):
    binary = io.TextIOWrapper(io.BytesIO(b"\xff\xfe"), encoding="utf-8", errors="surrogateescape")
    monkeypatch.setattr("sys.stdin", binary)
    assert "not UTF-8" in complaint(capsys, "generate", "demo", "--plan", demo_plan, "--prompt", "-")


def test_chat_keeps_the_conversation(demo_plan, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("My name is Bartholomew.\nWhat is my name?\n\n"))
    assert run("chat", "demo", "--plan", demo_plan, "--max-new-tokens", 24) == 0
    answers = capsys.readouterr().out.split("you> ")
    assert "Bartholomew" in answers[2]


@pytest.mark.slow
def test_eval_takes_baselines_from_a_search_and_draws(profiled, random_folder, tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    mixed, mix = [], kv_losses

    def spy(tables, kv_heads, weights):
        mixed.append(weights)
        return mix(tables, kv_heads, weights)

    monkeypatch.setattr("moa.search.profile.kv_losses", spy)
    shutil.copytree(profiled, tmp_path / "run")
    work = ("--run-dir", tmp_path / "run", "--quiet")
    plan = tmp_path / "plan.json"
    assert run("search", random_folder, "-o", plan, "--density", 0.8, "--refine", 0, *DATA, *work) == 0
    options = ("--tasks", "needle", "--items", 2, "--decode-steps", 0, "--lengths", 320)
    drawn = ("--against", "per-layer,per-head,binary-heads", "--heat-map", tmp_path / "map.png")
    assert run("eval", random_folder, "--plan", plan, *options, *drawn, *work) == 0
    shown = capsys.readouterr().out
    for name in ("per-layer", "per-head", "binary-heads", "MoA plan"):
        assert name in shown
    assert mixed == [default_weights(0.8, SOURCES)] * 3, "as the plan's density has it"
    assert (tmp_path / "map.png").stat().st_size > 5000


@pytest.mark.slow
def test_eval_compares_and_writes_its_numbers(demo_plan, tmp_path, capsys):
    target = tmp_path / "table.json"
    options = ("--lengths", 300, "--items", 2, "--tasks", "passkey", "--decode-steps", 2, "--quiet", "--json", target)
    assert run("eval", "demo", "--plan", demo_plan, *options) == 0
    shown = capsys.readouterr().out
    result = json.loads(target.read_text())
    rows = {(row["method"], row["task"]): row for row in result["rows"]}
    methods = ("dense", "uniform 53.3 %", "MoA half")
    assert [rows[method, "kv_mb"]["score"] * 1e6 for method in methods] == pytest.approx(
        [tokens * 30 * 3 * 64 * 4 * 2 for tokens in (300, 160, 160)]
    )
    assert rows["dense", "passkey"]["score"] == 1
    assert all(rows[method, "tokens_per_s"]["score"] > 0 for method in methods)
    assert "llama" in result["model"]
    for text in (shown, target.with_suffix(".md").read_text()):
        assert "uniform 53.3 %" in text
        assert "7.37" in text  # MB


def test_eval_refuses_a_device_that_is_not_there(capsys, monkeypatch):
    """On a machine with a GPU, too, whose name goes into the result."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "'nowhere' cannot be used here" in complaint(capsys, "eval", "demo", "--device", "cpu,nowhere")


def test_eval_wants_what_draws_before_it_measures(demo_plan, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("moa.evaluation.compare.evaluate", lambda *_: pytest.fail("measured"))
    drawn = ("eval", "demo", "--plan", demo_plan, "--heat-map", tmp_path / "map.png")
    assert "moa-spans[report]" in complaint(capsys, *drawn)


def test_eval_goes_on_where_the_same_measurement_was_interrupted(demo_plan, tmp_path, monkeypatch):
    """Whatever else is measured now; but nothing is taken of a plan whose rules have changed, of other items, or of
    rows that another version wrote."""
    target, plan, other = (tmp_path / name for name in ("table.json", "plan.json", "other.json"))
    for path in (plan, other):
        path.write_text(demo_plan.read_text())
    partial = target.with_suffix(".partial.json")
    known_each = []
    interrupted = True

    def measure(loaded, plans, config, progress, known, keep):
        """Each call has one more row, and does not repeat the others."""
        known_each.append(len(known))
        keep([Row("MoA plan", 0.5, "passkey", 300 + len(known), 1.0, 2, 0.0, (1.0, math.nan))])
        if interrupted:
            raise KeyboardInterrupt
        return known

    monkeypatch.setattr("moa.evaluation.compare.evaluate", measure)
    call = ("eval", "demo", "--plan", plan, "--lengths", 300, "--tasks", "passkey", "--quiet", "--json", target)
    assert all(run(*call) for _ in range(3))
    assert run(*call, "--plan", other, "--lengths", "300,400", "--tasks", "passkey,lines")
    assert run(*call, "--items", 3)
    assert run(*call)
    same_architecture = locate("demo", SILENT), *call[2:]
    assert run("eval", *same_architecture)
    assert run(*call)
    left = json.loads(partial.read_text())
    older = {"columns": left["columns"][:-1], "rows": [{"method": "MoA plan", "score": 1.0}]}
    partial.write_text(json.dumps(left | older))
    assert run(*call)
    changed = json.loads(plan.read_text())
    changed["sink"] += 1
    plan.write_text(json.dumps(changed))
    assert run(*call)
    interrupted = False
    assert run(*call) == 0
    assert known_each == [0, 1, 2, 3, 0, 0, 0, 0, 0, 0, 1]
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["other.json", "plan.json", "table.json", "table.md"]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("show", "nowhere.json"), "nowhere.json"),
        (("show", "PLAN", "--lengths", "many"), "--lengths 'many'"),
        (("show", "PLAN", "--dtype", "string"), "--dtype"),
        (("search", "demo", "-o", "OUT", "--density", "0"), "density 0"),
        (("search", "demo", "-o", "OUT", "--density", "1.5"), "density 1.5"),
        (("search", "demo", "-o", "OUT", "--lengths", "100000"), "beyond the model's context"),
        (("search", "demo", "-o", "OUT", "--lengths", "0"), "--lengths '0'"),
        (("search", "demo", "-o", "OUT", "--mixture", "retrieval"), "--mixture"),
        (("search", "demo", "-o", "OUT", "--mixture", "poems=1", "--lengths", "320"), "poems"),
        (("search", "demo", "-o", "OUT", "--text", "EMPTY"), "empty"),
        (("search", "demo", "-o", "OUT", "--text", "BINARY"), "binary"),
        (("search", "demo", "-o", "OUT", "--text", "SHORT"), "tokens"),
        (("search", "/no/such/model", "-o", "OUT"), "/no/such/model"),
        (("search", "demo", "-o", "PLAN/plan.json"), "cannot write"),
        (("profile", "demo", "--run-dir", "RUN"), "moa calibrate"),
        (("optimize", "--run-dir", "RUN"), "moa profile"),
        (("eval", "demo", "--plan", "PLAN"), "another model"),
        (("eval", "demo", "--lengths", "8193"), "beyond the context"),
        (("eval", "demo", "--tasks", "chess"), "chess"),
        (("eval", "demo", "--tasks", "perplexity", "--heat-map", "OUT"), "needs a retrieval task"),
        (("eval", "demo", "--json", "table.md"), "ends in .json"),
        (("bench", "throughput", "demo", "--json", "table"), "ends in .json"),
        (("bench", "throughput", "demo", "--batch", "1,4"), "--batch '1,4'"),
        (("bench", "throughput", "demo", "--ladder", "--batch", "4"), "leave --batch out"),
        (("bench", "throughput", "demo", "--ladder", "--against", "none"), "leave --against out"),
        (("search", "demo", "-o", "OUT", "--mixture", "text=nan"), "--mixture"),
        (("eval", "demo", "--against", "magic"), "--against"),
        (("generate", "demo", "--plan", "PLAN", "--prompt", "Hello"), "another model"),
        (("generate", "demo", "--plan", "DEMO", "--prompt", "word " * 9000), "context of 8192"),
        (("generate", "demo", "--plan", "DEMO", "--prompt", " "), "empty"),
        (("convert", "PLAN", "--model", "demo", "-o", "OUT"), "published plan"),
    ],
)
def test_bad_input_is_one_line(arguments, reason, plan_file, demo_plan, tmp_path, capsys, demo_model):
    (tmp_path / "empty.txt").write_text("  \n")
    (tmp_path / "binary.txt").write_bytes(b"MZ\x00\x01" * 99)
    (tmp_path / "short.txt").write_text("Far too short a text. " * 9)
    names = {"PLAN": plan_file, "DEMO": demo_plan, "OUT": tmp_path / "out.json", "RUN": tmp_path / "run"}
    names |= {name.upper(): tmp_path / f"{name}.txt" for name in ("empty", "binary", "short")}
    given = [names.get(argument, argument) for argument in arguments]
    if arguments[2:4] == ("-o", "PLAN/plan.json"):
        given[3] = plan_file / "plan.json"
    if arguments[0] == "search":
        given += ["--run-dir", tmp_path / "run"]
    assert reason in complaint(capsys, *given)
    assert not (tmp_path / "out.json").exists()


def test_refine_measures_at_least_one_plan(capsys, tmp_path):
    assert "--refine" in complaint(capsys, "refine", "demo", "--refine", 0, "--run-dir", tmp_path, code=2)


def test_wrong_usage_is_one_line(capsys):
    assert "No such command" in complaint(capsys, "serch", code=2)
    assert "--nope" in complaint(capsys, "show", "x", "--nope", code=2)


def test_debug_shows_where_an_error_comes_from():
    with pytest.raises(moa.MoAError):
        cli.main(["show", "nowhere.json", "--debug"])


def test_an_interrupt_is_no_traceback(monkeypatch, capsys, plan_file):
    def interrupted(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(moa.Plan, "load", interrupted)
    assert run("show", plan_file) == 130
    assert "interrupted" in capsys.readouterr().err
