"""Plans: their arithmetic, their files, and what they refuse."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import Gemma3Config, LlamaConfig

from moa.errors import InputError, PlanError, UnsupportedModelError
from moa.plan import ElasticRule, ModelIdentity, Plan, elastic_spans

MODEL = ModelIdentity("llama", 2, 3, 9, 64, "0123456789abcdef")
PUBLISHED = json.loads((Path(__file__).parent / "data" / "published_plan.json").read_text())


def some_plan(provenance=None):
    alpha = np.array([[128.0, 0.0, -64.0], [0.1, 1e-3, 640.0]])
    return Plan.from_arrays(MODEL, alpha, np.array([[0, 1 / 3, 0.5], [1, 0.25, 0]]), provenance=provenance)


@given(
    st.floats(-8192, 8192),
    st.floats(0, 1),
    st.integers(1, 100_000),
    st.sampled_from([0, 4, 64]),
    st.sampled_from([1, 16, 64]),
)
def test_spans_are_blocks_between_the_smallest_and_the_whole_sequence(alpha, beta, length, sink, block):
    span = ElasticRule(alpha, beta).span(length, sink, block)
    assert min(sink + block, length) <= span <= length
    assert span % block == 0 or span == length
    if sink + 2 * block <= span < length:
        assert alpha + beta * length <= span + 1e-3
        assert span < alpha + beta * length + block


@given(st.integers(1, 100_000))
def test_the_dense_rule_keeps_every_token(length):
    assert elastic_spans(0.0, 1.0, length) == length


def test_density_and_bytes_count_stored_tokens():
    plan = Plan.from_arrays(MODEL, np.full((2, 3), 256.0), np.zeros((2, 3)))
    assert plan.spans(1024).tolist() == [[256] * 3] * 2
    assert plan.density(1024) == 0.25
    assert plan.density(100) == 1
    assert plan.kv_bytes(1024, torch.bfloat16) == 2 * 3 * 256 * 64 * 2 * 2
    assert Plan.dense(MODEL).kv_bytes(1000, torch.float32) == 2 * 3 * 1000 * 64 * 2 * 4


def test_baselines():
    assert (Plan.dense(MODEL).spans(777) == 777).all()
    assert Plan.uniform(MODEL, 0.25).density(4096) == 0.25
    assert Plan.per_layer(MODEL, [0.25, 0.75]).spans(4096).tolist() == [[1024] * 3, [3072] * 3]
    full = np.array([[True, False, False], [False, True, False]])
    spans = Plan.binary_heads(MODEL, full).spans(4096)
    assert (spans[full] == 4096).all()
    assert (spans[~full] == 272).all(), "4 of the sink and 256, in whole blocks"


@pytest.mark.parametrize("density", [0, -0.5, 1.01, float("nan")])
def test_impossible_densities_are_refused(density):
    with pytest.raises(InputError, match="density"):
        Plan.uniform(MODEL, density)


def test_a_plan_file_gives_the_same_plan(tmp_path):
    plan = some_plan({"lengths": [1024], "loss": 0.1})
    plan.save(tmp_path / "deep" / "plan.json")
    loaded = Plan.load(tmp_path / "deep" / "plan.json")
    assert loaded == plan
    assert loaded.provenance == plan.provenance
    assert hash(loaded) == hash(plan)


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=6, max_size=6))
def test_numbers_survive_the_file_exactly(values):
    alpha = np.array(values).reshape(2, 3)
    plan = Plan.from_arrays(MODEL, alpha, np.zeros((2, 3)))
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


def damaged(change):
    data = some_plan().to_dict()
    change(data)
    return json.dumps(data)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "not a JSON file"),
        ("\x00\x01", "not a JSON file"),
        ("[1, 2]", "JSON object"),
        (json.dumps(some_plan().to_dict())[:-40], "not a JSON file"),
        (damaged(lambda data: data.update(schema=2)), "schema 2"),
        (damaged(lambda data: data.pop("schema")), "schema None"),
        (damaged(lambda data: data.pop("beta")), "damaged"),
        (damaged(lambda data: data["model"].pop("layers")), "damaged"),
        (damaged(lambda data: data["model"].update(extra=1)), "damaged"),
        (damaged(lambda data: data["alpha"].pop()), "2 layers x 3 KV heads"),
        (damaged(lambda data: data["beta"][0].append(1.0)), "2 layers x 3 KV heads"),
        (damaged(lambda data: data["beta"][0].__setitem__(0, "wide")), "damaged"),
        (damaged(lambda data: data["beta"][0].__setitem__(0, float("nan"))), "finite"),
        (damaged(lambda data: data.update(block=0)), "block 0"),
        (json.dumps(PUBLISHED), "moa convert"),
    ],
)
def test_damaged_and_future_files_are_refused(tmp_path, text, reason):
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(PlanError, match=reason):
        Plan.load(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(PlanError, match=r"nowhere\.json"):
        Plan.load(tmp_path / "nowhere.json")


def test_an_unwritable_output_leaves_nothing(tmp_path):
    folder = tmp_path / "taken"
    folder.write_text("a file, not a folder")
    with pytest.raises(InputError, match="cannot write"):
        some_plan().save(folder / "plan.json")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_a_full_disk_leaves_the_old_plan(tmp_path, monkeypatch):
    path = tmp_path / "plan.json"
    some_plan().save(path)
    before = path.read_text()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="No space left"):
        some_plan({"new": True}).save(path)
    assert path.read_text() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["plan.json"]


def test_the_published_format_is_imported_with_its_sink():
    """The published plan of Vicuna-7B has density .4844/.4922/.4961 before the sink is counted, .5 after."""
    model = ModelIdentity("llama", 32, 32, 32, 128)
    plan = Plan.from_published(PUBLISHED, model)
    for length, published in ((4096, 0.4844), (8192, 0.4922), (16384, 0.4961)):
        windows = np.clip(np.array(PUBLISHED["alphas"]) + np.array(PUBLISHED["betas"]) * length, 0, length)
        assert windows.mean() / length == pytest.approx(published, abs=5e-5)
        assert plan.density(length) == pytest.approx(0.5, abs=2e-4)


def test_a_group_of_published_query_heads_gets_its_largest_span():
    model = ModelIdentity("llama", 1, 2, 4, 64)
    plan = Plan.from_published({"alphas": [[0, 1024, 0, 0]], "betas": [[0.5, 0.125, 0, 0.25]]}, model)
    assert plan.spans(8192).tolist() == [[4096 + 64, 2048 + 64]]


@pytest.mark.parametrize(
    "data", [{"alphas": [[0]], "betas": [[0]]}, {"alphas": []}, {"alphas": [["a"]], "betas": [[0]]}]
)
def test_published_files_that_do_not_fit_are_refused(data):
    with pytest.raises(PlanError, match="published plan"):
        Plan.from_published(data, ModelIdentity("llama", 2, 2, 4, 64))


def test_identity_of_a_config():
    config = LlamaConfig(hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2)
    identity = ModelIdentity.of(config)
    assert (identity.layers, identity.kv_heads, identity.query_heads, identity.head_dim) == (3, 2, 4, 16)
    config.torch_dtype = "bfloat16"
    assert ModelIdentity.of(config) == identity
    config.intermediate_size += 1
    assert ModelIdentity.of(config) != identity
    composite = Gemma3Config()
    assert ModelIdentity.of(composite).layers == composite.text_config.num_hidden_layers


def test_layers_with_different_heads_have_no_identity():
    class Uneven:
        """As transformers has it for models such as Gemma 4."""

        model_type, num_hidden_layers, num_attention_heads, num_key_value_heads = "uneven", 2, 4, 2

        def get_text_config(self, decoder):
            return self

        @property
        def head_dim(self):
            raise RuntimeError("head_dim differs from layer to layer")

    with pytest.raises(UnsupportedModelError, match=r"uneven: .*same KV heads \(head_dim differs"):
        ModelIdentity.of(Uneven())


def test_a_plan_says_what_it_does_not_fit():
    plan = some_plan()
    plan.check_fits(MODEL)
    other = ModelIdentity("qwen2", 2, 3, 9, 64, "0123456789abcdef")
    with pytest.raises(PlanError, match=r"made for \(llama.*applied to \(qwen2.*model_type"):
        plan.check_fits(other)


def test_hub_folders(tmp_path):
    plan = some_plan()
    plan.save(tmp_path / "plan.json")
    assert Plan.from_pretrained(tmp_path) == plan
    with pytest.raises(PlanError, match="no plan at"):
        Plan.from_pretrained(str(tmp_path / "no" / "such" / "folder"))


def test_push_to_hub_uploads_what_from_pretrained_reads(tmp_path, monkeypatch):
    """The hub stands for a local folder here: no network in tests."""

    class LocalHub:
        def create_repo(self, repo_id, private, exist_ok):
            (tmp_path / repo_id).mkdir(parents=True)

        def upload_file(self, path_or_fileobj, path_in_repo, repo_id):
            (tmp_path / repo_id / path_in_repo).write_bytes(Path(path_or_fileobj).read_bytes())
            return f"local/{repo_id}"

    monkeypatch.setattr("huggingface_hub.HfApi", LocalHub)
    assert some_plan().push_to_hub("me/plan") == "local/me/plan"
    assert Plan.from_pretrained(tmp_path / "me" / "plan") == some_plan()
