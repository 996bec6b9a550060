"""The profile of a model equals the definition applied to it, can be interrupted, and leaves the model as it was."""

import copy
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM
from transformers.masking_utils import AttentionMaskInterface

from moa.attention.options import AttentionOptions
from moa.attention.reference import span_attention
from moa.errors import InputError, UnsupportedModelError
from moa.models import LoadedModel
from moa.plan import ModelIdentity
from moa.progress import Progress
from moa.search.influence import Estimator
from moa.search.influence_reference import attention_influence
from moa.search.items import CalibrationItem, CalibrationSet
from moa.search.profile import Profile, ProfileConfig, answer_loss, kv_losses, profile

COMMON = {
    "vocab_size": 99,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
}
WINDOWED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 150}
EXTRA = {
    "gemma2": {**WINDOWED, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 2.0},
    "gpt_oss": {**WINDOWED, "num_local_experts": 2, "num_experts_per_tok": 1, "experts_implementation": "eager"},
    "qwen2_moe": {
        "use_sliding_window": True,
        "sliding_window": 150,
        "max_window_layers": 1,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        "experts_implementation": "eager",
    },
    "phimoe": {
        "sliding_window": 150,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "experts_implementation": "eager",
    },
    "opt": {
        "num_key_value_heads": 4,
        "dropout": 0.5,
        "attention_dropout": 0.5,
        "ffn_dim": 96,
        "word_embed_proj_dim": 64,
    },
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "first_k_dense_replace": 2,
        "head_dim": 8,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "llama4_text": {"num_local_experts": 2, "attention_chunk_size": 128, "intermediate_size_mlp": 96},
}


def tiny(model_type="llama", dtype=torch.float64):
    """A random model with peaked attention."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**COMMON, **EXTRA.get(model_type, {})})
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "q_proj" in name or "k_proj" in name:
            parameter.mul_(8)
        if name.endswith("sinks"):
            parameter.normal_()
    return LoadedModel(model, None, "tiny", ModelIdentity.of(model.config), 512)


def item(length, answer, seed=0):
    ids = np.random.default_rng(seed).integers(1, 99, length)
    return CalibrationItem(ids, np.arange(length - answer, length), np.arange(length - answer, length))


CALIBRATION = CalibrationSet(
    {
        (200, "retrieval"): (item(200, 5, 1), item(200, 9, 2)),
        (330, "retrieval"): (item(330, 1, 3),),
        (330, "summary"): (item(330, 40, 4),),
    }
)


def one(length=300, answer=10):
    return CalibrationSet({(length, "retrieval"): (item(length, answer),)})


_CALLS = []


def _recording_attention(module, query, key, value, mask, scaling, softcap=None, s_aux=None, sliding_window=None, **_):
    options = AttentionOptions(scaling, softcap, s_aux, sliding_window if mask is None else int(mask))
    out = span_attention(query, key, value, torch.full(key.shape[:2], key.shape[2]), 64, options)
    out.retain_grad()
    _CALLS.append((query, key, value, out, options))
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register("recording", _recording_attention)
# in place of a mask the window that it would apply, which not all models hand to their attention as well
AttentionMaskInterface.register(
    "recording", lambda local_size=None, **_: None if local_size is None else torch.tensor(local_size)
)


def tables_by_definition(loaded, given, estimator):
    """[layers, query_heads, W], from autograd through the whole model and N x N matrices."""
    _CALLS.clear()
    loaded.model.set_attn_implementation("recording")
    loaded.model.requires_grad_(True)
    ids = torch.from_numpy(given.input_ids)
    p = loaded.model(input_ids=ids[None], use_cache=False).logits[0].softmax(-1)
    p = p[torch.arange(given.answer_start - 1, len(ids) - 1), ids[given.answer_start :]]
    loss = -(p.log() - (1 - p).log() if estimator is Estimator.JOINT else p.log())
    loss.mean().backward()
    tables = []
    for query, key, value, out, options in _CALLS:
        q, k, v, d_out = (tensor.detach()[0] for tensor in (query, key, value, out.grad))
        tables.append(getattr(attention_influence(q, k, v, d_out, options), estimator).detach())
    return torch.stack(tables).numpy()


@pytest.mark.parametrize("estimator", Estimator)
@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt_oss", "qwen2_moe", "phimoe", "opt"])
def test_the_profile_is_the_definition_applied_to_the_model(model_type, estimator):
    loaded, calibration = tiny(model_type), one()
    table = profile(loaded, calibration, ProfileConfig(estimator)).tables[300, "retrieval"][0]
    expected = tables_by_definition(loaded, calibration.items[300, "retrieval"][0], estimator)
    assert table.shape == expected.shape == (2, 4, 4)
    np.testing.assert_allclose(table, expected, rtol=1e-6, atol=1e-9 * expected.max())
    assert (expected[1, :, 0] > 0).all()


def test_tables_are_those_of_the_items_of_a_length_and_source():
    loaded = tiny()
    whole = profile(loaded, CALIBRATION, ProfileConfig()).tables
    assert whole.keys() == CALIBRATION.items.keys()
    for key, items in CALIBRATION.items.items():
        alone = [profile(loaded, CalibrationSet({key: (i,)}), ProfileConfig()).tables[key] for i in items]
        np.testing.assert_allclose(whole[key], np.concatenate(alone))


def test_layers_are_computed_again_instead_of_being_stored():
    loaded, passes = tiny(), []
    handles = [
        layer.input_layernorm.register_forward_hook(lambda *_: passes.append(1)) for layer in loaded.model.model.layers
    ]
    profile(loaded, one(), ProfileConfig())
    for handle in handles:
        handle.remove()
    assert len(passes) == 2 * 2


class Interrupted(Progress):
    """Ctrl-C before the third item."""

    def track(self, items, what, total=None):
        for number, entry in enumerate(items):
            if number == 2:
                raise KeyboardInterrupt
            yield entry


def test_an_interrupted_profile_continues_where_it_stopped(tmp_path):
    loaded, runs = tiny(), []
    loaded.model.lm_head.register_forward_hook(lambda *_: runs.append(1))
    expected = profile(loaded, CALIBRATION, ProfileConfig()).tables
    with pytest.raises(KeyboardInterrupt):
        profile(loaded, CALIBRATION, ProfileConfig(), Interrupted(quiet=True), tmp_path)
    runs.clear()
    resumed = profile(loaded, CALIBRATION, ProfileConfig(), partial=tmp_path).tables
    assert len(runs) == 2
    for key, table in expected.items():
        np.testing.assert_array_equal(resumed[key], table)
    profile(loaded, CALIBRATION, ProfileConfig(), partial=tmp_path)
    assert len(runs) == 2


def test_results_of_another_measurement_are_not_reused(tmp_path):
    loaded, runs = tiny(), []
    loaded.model.lm_head.register_forward_hook(lambda *_: runs.append(1))
    profile(loaded, one(answer=10), ProfileConfig(), partial=tmp_path)
    profile(loaded, one(answer=11), ProfileConfig(), partial=tmp_path)
    profile(loaded, one(answer=10), ProfileConfig(Estimator.PAPER), partial=tmp_path)
    assert len(runs) == 3


@dataclass
class State:
    attributes: list
    gradients: list
    attention: str
    hooks: int

    @classmethod
    def of(cls, model):
        plain = [
            {name: value for name, value in vars(module).items() if name in ("training", "gradient_checkpointing")}
            | {"own function": "_gradient_checkpointing_func" in vars(module)}
            for module in model.modules()
        ]
        gradients = [(parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
        hooks = sum(len(module._forward_hooks) for module in model.modules())
        return cls(plain, gradients, model.config._attn_implementation, hooks)


@pytest.mark.parametrize("interrupted", [False, True])
def test_the_model_is_left_as_it_was(interrupted):
    loaded = tiny()
    loaded.model.model.layers[1].train()
    loaded.model.lm_head.requires_grad_(True)
    loaded.model.set_attn_implementation("eager")
    before = State.of(loaded.model)
    if interrupted:
        with pytest.raises(KeyboardInterrupt):
            profile(loaded, CALIBRATION, ProfileConfig(), Interrupted(quiet=True))
    else:
        profile(loaded, CALIBRATION, ProfileConfig())
    assert State.of(loaded.model) == before


def test_it_works_where_gradients_are_off():
    loaded = tiny()
    expected = profile(loaded, one(), ProfileConfig()).tables[300, "retrieval"]
    with torch.no_grad():
        np.testing.assert_array_equal(profile(loaded, one(), ProfileConfig()).tables[300, "retrieval"], expected)


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("bloom", "exchanged"),
        ("deepseek_v3", "MLA"),
        ("lfm2", "conv"),
        ("llama4_text", "chunked"),
    ],
)
def test_models_that_cannot_carry_a_plan_are_refused_by_type(model_type, reason):
    loaded = tiny(model_type, torch.float32)
    before = State.of(loaded.model)
    with pytest.raises(UnsupportedModelError, match=reason) as caught:
        profile(loaded, one(), ProfileConfig())
    assert model_type in str(caught.value)
    assert State.of(loaded.model) == before


def test_a_layer_that_keeps_an_attention_of_its_own_is_found_out():
    loaded = tiny()
    own = copy.deepcopy(loaded.model.config)
    own._attn_implementation = "eager"
    loaded.model.model.layers[1].self_attn.config = own
    with pytest.raises(UnsupportedModelError, match=r"layers \[1\]"):
        profile(loaded, one(), ProfileConfig())


def test_a_model_that_overflows_is_refused():
    loaded = tiny()
    loaded.model.model.layers[0].self_attn.q_proj.weight.fill_(torch.nan)
    with pytest.raises(UnsupportedModelError, match="float32"):
        profile(loaded, one(), ProfileConfig())


def test_nothing_to_measure_is_an_error():
    with pytest.raises(InputError, match="empty"):
        profile(tiny(), CalibrationSet({}), ProfileConfig())
    with pytest.raises(InputError, match="answer"):
        profile(tiny(), one(answer=300), ProfileConfig())


def test_log_odds_do_not_saturate_where_the_model_is_sure():
    logits = torch.zeros(1, 50, requires_grad=True)
    sure = logits + torch.nn.functional.one_hot(torch.tensor([7]), 50) * 60
    loss = answer_loss(sure, torch.tensor([7]), Estimator.JOINT)
    assert loss.item() == pytest.approx(np.log(49) - 60)
    assert torch.autograd.grad(loss, logits)[0][0, 7].item() == pytest.approx(-1)
    assert answer_loss(sure, torch.tensor([7]), Estimator.PAPER).item() == pytest.approx(0, abs=1e-6)


def test_a_profile_survives_the_disk(tmp_path):
    tables = {
        (length, source): np.random.rand(5, 2, 4, 3) for length in (4096, 256) for source in ("retrieval", "summary")
    }
    Profile(tables).save(tmp_path / "profile.safetensors")
    loaded = Profile.load(tmp_path / "profile.safetensors").tables
    assert loaded.keys() == tables.keys()
    for key, table in tables.items():
        np.testing.assert_array_equal(loaded[key], table)


def test_a_file_that_is_no_profile_is_refused(tmp_path):
    CALIBRATION.save(tmp_path / "calibration.safetensors")
    with pytest.raises(InputError, match="not a profile"):
        Profile.load(tmp_path / "calibration.safetensors")


def test_sources_count_by_weight_whatever_their_scale():
    rng = np.random.default_rng(0)
    tables = {
        (n, s): rng.random((5, 3, 4, n // 64 - 1)) * scale for n in (256, 512) for s, scale in (("a", 1), ("b", 1e6))
    }
    losses = kv_losses(Profile(tables), 2, {"a": 1.0, "b": 0.3})
    assert {length: table.shape for length, table in losses.items()} == {256: (3, 2, 3), 512: (3, 2, 7)}
    for length, table in losses.items():
        assert table[:, :, 0].sum() == pytest.approx(1.3)
        by_hand = sum(
            weight * tables[length, source][:, 1, 2:].sum((0, 1)) / tables[length, source][..., 0].sum()
            for source, weight in (("a", 1.0), ("b", 0.3))
        )
        np.testing.assert_allclose(table[1, 1], by_hand)


def test_a_length_that_one_window_covers_costs_nothing():
    assert (kv_losses(Profile({(128, "a"): np.zeros((3, 2, 2, 1))}), 2, {"a": 1.0})[128] == 0).all()


def test_weights_and_heads_must_fit_the_profile():
    tables = {(128, "a"): np.zeros((3, 2, 4, 1))}
    with pytest.raises(InputError, match="weights"):
        kv_losses(Profile(tables), 2, {"a": 1.0, "b": 1.0})
    with pytest.raises(InputError, match="KV heads"):
        kv_losses(Profile(tables), 3, {"a": 1.0})
