"""The whole search: on a real small model it ends with a plan in budget; it resumes, and redoes only what changed.

What resumes and what is done again does not depend on the model, so a random one, of which a search takes seconds, is
searched for that.
"""

import shutil
from dataclasses import replace

import numpy as np
import pytest

from moa.errors import InfeasibleBudgetError, InputError
from moa.plan import ModelIdentity, Plan
from moa.progress import Progress
from moa.runtime import apply
from moa.search import pipeline
from moa.search import profile as profile_stage
from moa.search.calibrate import SOURCES
from moa.search.facts import FACTS, HELD_OUT_FACTS
from moa.search.influence import Estimator
from moa.search.items import CalibrationSet
from moa.search.pipeline import Calibration, run_optimize, search
from moa.search.profile import Profile
from moa.search.run import Run
from moa.search.settings import BudgetConfig, DataConfig, default_weights
from moa.search.tables import window_count
from moa.search.text import TextSource, default_text
from moa.search.validate import ValidationRow

DATA = DataConfig(lengths=(320,), items=1, validation_items=1, validation_length=384)
STAGES = ("calibrate", "profile", "optimize", "refine", "validate")
COMPUTE = ("calibrate", "profile", "candidates", "refine", "validate")  # what computes them
BUDGET = BudgetConfig(0.5, evaluations=12)


@pytest.fixture(scope="module")
def finished(demo_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "search"
    return folder, search(demo_model, default_text(), folder, DATA, replace(BUDGET, evaluations=6))


@pytest.fixture(scope="module")
def small(random_model, tmp_path_factory):
    """Folder and plan of a finished search of the random model."""
    folder = tmp_path_factory.mktemp("runs") / "search"
    return folder, search(random_model, default_text(), folder, DATA, BUDGET)


@pytest.fixture
def ran(monkeypatch):
    """What really computes, in order."""
    names = []
    for name in COMPUTE:
        real = getattr(pipeline, name)

        def spy(*arguments, _name=name, _real=real):
            names.append(_name)
            return _real(*arguments)

        monkeypatch.setattr(pipeline, name, spy)
    return names


@pytest.mark.slow
def test_a_search_ends_with_a_plan_within_its_budget(finished, demo_model):
    folder, plan = finished
    assert all(plan.density(length) <= 0.5 for length in (320, 640))
    assert len({span for row in plan.spans(640).tolist() for span in row}) > 1
    assert plan.provenance["estimator"] == "joint"
    assert plan.provenance["calibration"]["data"]["lengths"] == [320]
    with apply(demo_model.model, plan):
        pass
    assert sorted(path.name for path in folder.iterdir()) == [".lock", *sorted(STAGES)]
    assert {path.suffix for stage in STAGES for path in (folder / stage).rglob("*") if path.is_file()} == {
        ".json",
        ".safetensors",
    }


def test_a_second_call_reads_and_a_changed_setting_redoes_its_stages_only(small, random_model, ran, monkeypatch):
    folder, plan = small
    assert search(random_model, default_text(), folder, DATA, BUDGET) == plan
    assert ran == []
    other = search(random_model, default_text(), folder, DATA, replace(BUDGET, density=0.6))
    assert list(dict.fromkeys(ran)) == ["candidates", "refine", "validate"]
    assert other.density(640) > plan.density(640)
    assert (plan.provenance["weights"], other.provenance["weights"]) == tuple(
        default_weights(density, SOURCES) for density in (0.5, 0.6)
    )
    ran.clear()
    monkeypatch.setattr(pipeline, "MEASURE", "another")
    search(random_model, default_text(), folder, DATA, replace(BUDGET, density=0.6))
    assert list(dict.fromkeys(ran)) == ["refine", "validate"]
    ran.clear()
    monkeypatch.setattr(pipeline, "tokens_to_measure", lambda density: dict.fromkeys(SOURCES, 12345))
    search(random_model, default_text(), folder, DATA, replace(BUDGET, density=0.6))
    assert list(dict.fromkeys(ran)) == ["refine", "validate"]
    ran.clear()
    monkeypatch.setattr(pipeline, "TEXT_LOSS", "other tokens")
    search(random_model, default_text(), folder, DATA, replace(BUDGET, density=0.6))
    assert list(dict.fromkeys(ran)) == list(COMPUTE)


@pytest.mark.slow
def test_of_plans_that_validation_cannot_tell_apart_the_one_wins_that_was_measured_best(
    finished, demo_model, tmp_path, monkeypatch
):
    shutil.copytree(finished[0], tmp_path / "run")
    run, ran = Run(tmp_path / "run"), []
    plans = [replace(finished[1], sink=sink, provenance={"refined": {"loss": -float(sink)}}) for sink in (4, 5, 6)]

    def validate(*arguments):
        ran.append(arguments)
        rows = zip((0.8, 0.7, 0.9), (0.0, 0.0, 0.3), strict=True)
        return [ValidationRow(plan, loss, {"text": loss}, error) for plan, (loss, error) in enumerate(rows)]

    def chosen():
        return pipeline.run_validate(run, demo_model, plans, CalibrationSet({}), "plans", {"text": 1.0})[0]

    monkeypatch.setattr(pipeline, "validate", validate)
    assert chosen().sink == 6
    assert chosen().provenance["validation"] == {
        "loss": 0.9,
        "text": 0.9,
        "candidates": 3,
        "lowest_loss": 0.7,
        "error": 0.3,
    }
    assert len(ran) == 1
    monkeypatch.setattr(pipeline, "RULE", "another")
    chosen()
    assert len(ran) == 2


def test_an_interrupted_search_goes_on_and_ends_with_the_same_plan(small, random_model, tmp_path, monkeypatch):
    measured = []
    real = profile_stage._measure

    def interrupted(loaded, item, config):
        if len(measured) == 1:
            raise KeyboardInterrupt
        measured.append(item.answer_start)
        return real(loaded, item, config)

    monkeypatch.setattr(profile_stage, "_measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        search(random_model, default_text(), tmp_path, DATA, BUDGET)

    def resumed(loaded, item, config):
        measured.append(item.answer_start)
        return real(loaded, item, config)

    monkeypatch.setattr(profile_stage, "_measure", resumed)
    plan = search(random_model, default_text(), tmp_path, DATA, BUDGET)
    assert plan == small[1]
    assert len(measured) == 3, "the first item's table was kept"


@pytest.mark.slow
def test_validation_asks_for_other_kinds_of_facts_than_the_search(finished, demo_model):
    def asked(items, kinds):
        members = [item for members in items.items.values() for item in members]
        texts = [demo_model.tokenizer.decode(item.input_ids) for item in members]
        questions = [kind.question.format(key=key) for kind in kinds for key in kind.keys]
        return [question for question in questions if any(question in text for text in texts)]

    calibration = Calibration.load(finished[0] / "calibrate")
    assert asked(calibration.profile, FACTS)
    assert asked(calibration.validation, HELD_OUT_FACTS)
    assert not asked(calibration.profile, HELD_OUT_FACTS) + asked(calibration.validation, FACTS)


def test_budgets_that_cannot_be_met_are_refused_before_any_work(demo_model, tmp_path, ran):
    for density in (0, -0.1, 1.2, float("nan")):
        with pytest.raises(InputError, match="density"):
            search(demo_model, default_text(), tmp_path, DATA, BudgetConfig(density))
    assert ran == []


@pytest.mark.slow
def test_an_infeasible_budget_names_the_nearest(finished, demo_model):
    with pytest.raises(InfeasibleBudgetError, match=r"0\.4") as caught:
        search(demo_model, default_text(), finished[0], DATA, BudgetConfig(0.2))
    assert caught.value.nearest[320] == pytest.approx(128 / 320)


def test_a_length_too_short_for_the_density_is_named(tmp_path):
    """What must hold at 512 tokens leaves nothing to choose at 25 %, and binds longer lengths."""

    class Noted(Progress):
        said = ""

        def say(self, text):
            self.said += text

    tables = Profile({(length, "retrieval"): np.ones((1, 2, 4, window_count(length))) for length in (512, 2048)})
    identity, heard = ModelIdentity("llama", 2, 2, 4, 16, ""), []
    for density in (0.25, 0.5):
        progress = Noted(quiet=True)
        run_optimize(Run(tmp_path, progress), tables, "key", identity, {"retrieval": 1.0}, BudgetConfig(density))
        heard.append(progress.said)
    assert "at 512 tokens" in heard[0]
    assert "2048" not in heard[0]
    assert "tokens" not in heard[1]


def test_lengths_beyond_the_context_or_the_text_are_refused(demo_model, tmp_path):
    with pytest.raises(InputError, match="context of 8192"):
        search(demo_model, default_text(), tmp_path, DataConfig(lengths=(9000,)))
    short = TextSource("a short text", "Only a few words, said again. " * 20)
    with pytest.raises(InputError, match="tokens"):
        search(demo_model, short, tmp_path, DataConfig(lengths=(1024,), items=1))
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize("context", [512, 2048, 8192, 32768, 131072])
def test_default_lengths_fit_the_context(context):
    data = DataConfig().resolved(context)
    assert max(*data.lengths, data.validation_length) <= context
    assert data.validation_length not in data.lengths
    assert len(data.lengths) == 3


@pytest.mark.parametrize("data", [DataConfig(lengths=()), DataConfig(items=0), DataConfig(validation_items=0)])
def test_a_search_without_data_is_refused(data):
    with pytest.raises(InputError, match="at least one"):
        data.resolved(8192)


def test_a_stage_without_the_one_before_is_refused(tmp_path):
    with pytest.raises(InputError, match="moa calibrate"):
        Run(tmp_path).finished("calibrate")


def test_a_run_with_other_weights_is_refused(finished, demo_model):
    """Of the same architecture, and under the same name."""
    assert pipeline.calibrated(Run(finished[0]), demo_model)[1]
    other = replace(demo_model)
    vars(other)["weights"] = "of another checkpoint"
    with pytest.raises(InputError, match=r"calibrated with demo in torch\.float32, and config or weights of demo"):
        pipeline.calibrated(Run(finished[0]), other)
    other = replace(demo_model, identity=replace(demo_model.identity, fingerprint="other rotary positions"))
    with pytest.raises(InputError, match="config or weights of demo"):
        pipeline.calibrated(Run(finished[0]), other)


def test_tables_are_not_taken_for_those_of_a_later_calibration(small, random_model, tmp_path):
    shutil.copytree(small[0], tmp_path / "run")
    run = Run(tmp_path / "run")
    assert pipeline.profiled(run)[2] == random_model.identity
    pipeline.run_calibrate(run, random_model, default_text(), replace(DATA, seed=1))
    with pytest.raises(InputError, match="calibrate was run again after profile"):
        pipeline.profiled(run)


def test_other_validation_items_do_not_profile_again(small, random_model, tmp_path, monkeypatch):
    shutil.copytree(small[0], tmp_path / "run")
    monkeypatch.setattr(profile_stage, "_measure", lambda *_: pytest.fail("measured"))
    run = Run(tmp_path / "run")
    again, key = pipeline.run_calibrate(run, random_model, default_text(), replace(DATA, validation_items=2))
    tables, _ = pipeline.run_profile(run, random_model, again, key, Estimator.JOINT)
    before, _, _ = pipeline.profiled(Run(small[0]))
    assert all((tables.tables[key] == table).all() for key, table in before.tables.items())


@pytest.mark.parametrize("budget", [BudgetConfig(0.0), BudgetConfig(grid="scalled"), BudgetConfig(rules_per_layer=0)])
def test_a_budget_that_makes_no_sense_is_refused_before_the_long_stages(demo_model, ran, tmp_path, budget):
    with pytest.raises(InputError):
        search(demo_model, default_text(), tmp_path / "run", DATA, budget)
    assert ran == []


def test_the_plan_file_is_the_plan(finished, tmp_path):
    finished[1].save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == finished[1]
