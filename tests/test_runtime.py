"""moa.apply: generation under a plan equals the model's own eager attention under the explicit mask."""

import copy

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, TextStreamer

import moa
from masked_model import eager_logits, masked_logits
from moa import runtime
from moa.attention import backends
from moa.errors import CacheError, InputError, PlanError, UnsupportedModelError
from tiny_models import COMMON, EXTRA, random_ids, random_plan, tiny_model

NEW = 12


def generate(model, ids, **options):
    return model.generate(ids, do_sample=False, eos_token_id=None, pad_token_id=0, **{"max_new_tokens": NEW, **options})


def assert_greedy(tokens, logits, prompt):
    """Every generated token is the most likely one after what precedes it."""
    assert tokens[:, prompt:].tolist() == logits[:, prompt - 1 : -1].argmax(-1).tolist()


@pytest.mark.parametrize("model_type", EXTRA)
@pytest.mark.parametrize("full", [True, False], ids=["full", "short"])
def test_generation_equals_the_masked_model(model_type, full):
    model = tiny_model(model_type)
    plan = random_plan(model, full=full)
    ids = random_ids(2, 300)
    with moa.apply(model, plan):
        tokens = generate(model, ids)
        logits = model(tokens, use_cache=False).logits
    expected = masked_logits(model, plan, tokens, tokens.shape[1])
    assert_greedy(tokens, expected, 300)
    torch.testing.assert_close(logits, expected, atol=2e-4, rtol=1e-3)
    dense = eager_logits(model, tokens)
    if full:
        torch.testing.assert_close(expected, dense, atol=2e-4, rtol=1e-3)
    else:
        assert (expected - dense).abs().max() > 1e-2, "these spans must make a difference"


def test_the_backend_can_be_named(monkeypatch):
    """The Triton kernels (here in their interpreter) and PyTorch's operators write the same tokens."""
    pytest.importorskip("triton")
    model, ids, used = tiny_model(), random_ids(1, 80), []
    plan, pick = random_plan(model), backends.pick
    monkeypatch.setattr(backends, "pick", lambda *given: used.append(given[-1]) or pick(*given))
    tokens = []
    for name in ("sdpa", "triton"):
        with moa.apply(model, plan, backend=name):
            tokens.append(generate(model, ids, max_new_tokens=3).tolist())
            model(ids, use_cache=False)
        assert set(used) == {name}
        used.clear()
    assert tokens[0] == tokens[1]
    with pytest.raises(InputError, match="magic"):
        moa.apply(model, plan, backend="magic")


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def plan(model):
    return random_plan(model)


def test_each_row_of_a_padded_batch_equals_its_solo_run(model, plan):
    lengths = [300, 211, 30]
    ids, mask = torch.zeros(3, 300, dtype=torch.long), torch.zeros(3, 300, dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, 300 - length :] = random_ids(1, length, seed=row)
        mask[row, 300 - length :] = 1
    with moa.apply(model, plan):
        batch = generate(model, ids, attention_mask=mask)
        chunked = generate(model, ids, attention_mask=mask, prefill_chunk_size=77)
        for row, length in enumerate(lengths):
            solo = generate(model, ids[row : row + 1, 300 - length :])
            assert batch[row, 300:].tolist() == solo[0, length:].tolist()
    assert chunked.tolist() == batch.tolist()


@pytest.mark.parametrize("chunks", [[300], [1, 299], [64, 65, 171], [100, 1, 1, 198]])
def test_prefill_in_uneven_chunks(model, plan, chunks):
    ids = random_ids(1, 300)
    expected = masked_logits(model, plan, ids, 320)
    cache, start, pieces = moa.SpanCache(plan, 320), 0, []
    with moa.apply(model, plan), torch.no_grad():
        for size in chunks:
            pieces.append(model(ids[:, start : start + size], past_key_values=cache).logits)
            start += size
    torch.testing.assert_close(torch.cat(pieces, dim=1), expected, atol=2e-4, rtol=1e-3)


def test_three_turns_on_one_cache(model):
    """While nothing was evicted, turns on one cache equal one run over everything (full spans)."""
    plan = random_plan(model, full=True)
    cache, ids = moa.SpanCache(plan, 50), random_ids(1, 40)
    with moa.apply(model, plan):
        for turn in range(3):
            ids = generate(model, ids, past_key_values=cache)
            assert cache.nbytes() == plan.kv_bytes(ids.shape[1], torch.float32)
            ids = torch.cat([ids, random_ids(1, 30, seed=turn)], dim=1)
    assert_greedy(ids[:, :-30], eager_logits(model, ids[:, :-30]), ids.shape[1] - 30 - NEW)


def test_later_turns_see_what_the_smaller_spans_kept(model):
    """Constant spans do not grow, so every turn equals one run under the mask."""
    identity = moa.ModelIdentity.of(model.config)
    alpha = np.full((identity.layers, identity.kv_heads), 128.0)
    plan = moa.Plan.from_arrays(identity, alpha, np.zeros_like(alpha))
    cache, ids, prompts = moa.SpanCache(plan, 1), random_ids(1, 200), []
    with moa.apply(model, plan):
        for turn in range(3):
            prompts.append(ids.shape[1])
            # without a mask generate takes token 0, which may be generated, for padding
            ids = generate(model, ids, past_key_values=cache, attention_mask=torch.ones_like(ids))
            ids = torch.cat([ids, random_ids(1, 55, seed=turn)], dim=1)
    expected = masked_logits(model, plan, ids, ids.shape[1]).argmax(-1)
    for prompt in prompts:
        assert ids[0, prompt : prompt + NEW].tolist() == expected[0, prompt - 1 : prompt + NEW - 1].tolist()


def test_a_turn_may_be_given_as_its_new_tokens_alone(model):
    plan = random_plan(model, full=True)
    prompt, turn = random_ids(1, 40), random_ids(1, 20, seed=9)

    def second_answer(cache):
        said = generate(model, prompt, past_key_values=cache, attention_mask=torch.ones_like(prompt))
        mask = torch.ones(1, said.shape[1] + 20, dtype=torch.long)
        new = torch.cat([said[:, -1:], turn], dim=1)  # the last token was said, but not read
        return generate(model, new, past_key_values=cache, attention_mask=mask)[:, -NEW:]

    expected = second_answer(DynamicCache(config=model.config))
    with moa.apply(model, plan):
        assert second_answer(moa.SpanCache(plan, 1)).tolist() == expected.tolist()


@pytest.mark.parametrize("padding", [3, 0])
def test_what_is_cached_cannot_be_hidden_or_shown_by_a_later_mask(model, padding):
    """Padding behind an answer that ended early; and what was padding, called real."""
    plan = random_plan(model, full=True)
    ids = random_ids(2, 40)
    mask = torch.ones_like(ids)
    mask[0, : 3 - padding] = 0
    cache = moa.SpanCache(plan, 1)
    with moa.apply(model, plan):
        said = generate(model, ids, past_key_values=cache, attention_mask=mask)
        going_on = torch.cat([said, random_ids(2, 10)], dim=1)
        mask = torch.ones_like(going_on)
        mask[0, 50 - padding : 50] = 0
        with pytest.raises(CacheError, match="neither hidden nor shown"):
            generate(model, going_on, past_key_values=cache, attention_mask=mask)


def test_sampling_beams_and_streaming_run_unchanged(model, plan, capsys):
    ids = random_ids(2, 150)
    with moa.apply(model, plan):
        torch.manual_seed(1)
        first = model.generate(ids, do_sample=True, max_new_tokens=NEW, pad_token_id=0)
        torch.manual_seed(1)
        assert first.tolist() == model.generate(ids, do_sample=True, max_new_tokens=NEW, pad_token_id=0).tolist()
        several = model.generate(ids, do_sample=True, num_return_sequences=3, max_new_tokens=4, pad_token_id=0)
        assert len(several) == 6
        beams = generate(model, ids, num_beams=3, return_dict_in_generate=True, output_scores=True)

        class Names:
            def decode(self, tokens, **options):
                return " ".join(str(int(token)) for token in tokens)

        streamed = generate(model, ids[:1], streamer=TextStreamer(Names(), skip_prompt=True))
    assert str(int(streamed[0, -1])) in capsys.readouterr().out
    expected = masked_logits(model, plan, beams.sequences, beams.sequences.shape[1])
    scores = expected[:, 149:-1].log_softmax(-1).gather(2, beams.sequences[:, 150:, None])[..., 0].sum(1) / NEW
    torch.testing.assert_close(beams.sequences_scores, scores, atol=1e-4, rtol=1e-3)


def test_removing_a_plan_gives_the_model_back(model, plan):
    ids = random_ids(1, 200)
    before = model.config._attn_implementation
    expected = generate(model, ids)
    applied = moa.apply(model, plan)
    applied.remove()
    applied.remove()
    with pytest.raises(RuntimeError, match="stop"), moa.apply(model, plan):
        raise RuntimeError("stop")
    assert model.config._attn_implementation == before
    assert "_prepare_cache_for_generation" not in vars(model)
    assert generate(model, ids).tolist() == expected.tolist()


def test_bfloat16_stays_close(plan):
    model = tiny_model().to(torch.bfloat16)
    ids = random_ids(1, 300)
    with moa.apply(model, plan), torch.no_grad():
        logits = model(ids, use_cache=False).logits.float()
    expected = masked_logits(tiny_model(), plan, ids, 300)
    assert (logits - expected).norm() / expected.norm() < 0.05


# What cannot carry a plan is refused, never run densely -------------------------------------------------------------


def test_a_plan_for_another_model_is_refused(plan):
    other = tiny_model(num_hidden_layers=3)
    with pytest.raises(PlanError, match=r"2 layers.*3 layers.*differ in layers"):
        moa.apply(other, plan)
    same_shape = tiny_model(intermediate_size=128)
    with pytest.raises(PlanError, match="fingerprint"):
        moa.apply(same_shape, plan)


def test_a_second_plan_is_refused(model, plan):
    with moa.apply(model, plan), pytest.raises(UnsupportedModelError, match="already"):
        moa.apply(model, plan)


@pytest.mark.parametrize(
    ("model_type", "changes", "reason"),
    [
        ("deepseek_v3", {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}, "MLA"),
        ("bloom", {"n_layer": 2, "n_head": 4}, "exchanged"),
        ("llama4_text", {"num_local_experts": 2, "intermediate_size_mlp": 64}, "chunked_attention"),
        (
            "gemma3n_text",
            {
                "num_hidden_layers": 4,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
                "num_kv_shared_layers": 2,
                "vocab_size_per_layer_input": 199,
                "hidden_size_per_layer_input": 8,
                "laurel_rank": 8,
                "activation_sparsity_pattern": [0.0] * 4,
            },
            "attend keys of earlier ones",
        ),
    ],
)
def test_unsupported_architectures_are_refused(model_type, changes, reason):
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**COMMON, **changes}))
    plan = moa.Plan.dense(moa.ModelIdentity.of(model.config))
    before = model.config._attn_implementation
    with pytest.raises(UnsupportedModelError, match=reason):
        moa.apply(model, plan)
    assert model.config._attn_implementation == before


def test_attention_that_is_called_twice_a_layer_is_refused():
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("diffllama", **COMMON)).eval()
    plan = moa.Plan.dense(moa.ModelIdentity.of(model.config))
    with moa.apply(model, plan), pytest.raises(UnsupportedModelError, match="attended again"):
        generate(model, random_ids(1, 20))


def test_a_plain_cache_is_refused(model, plan):
    ids = random_ids(1, 20)
    with moa.apply(model, plan), torch.no_grad():
        with pytest.raises(CacheError, match="SpanCache"):
            generate(model, ids, past_key_values=DynamicCache())
        with pytest.raises(CacheError, match="use_cache=False"):
            generate(model, ids, use_cache=False)
        with pytest.raises(CacheError, match="static"):
            generate(model, ids, cache_implementation="static")
        cache = DynamicCache()
        model(ids, past_key_values=cache)
        with pytest.raises(CacheError, match="SpanCache"):
            model(ids, past_key_values=cache)


def test_prompt_lookup_is_refused(model, plan):
    with moa.apply(model, plan), pytest.raises(UnsupportedModelError, match="takes tokens back"):
        generate(model, random_ids(1, 60), prompt_lookup_num_tokens=3)


def test_a_cache_of_another_plan_or_without_a_plan_is_refused(model, plan):
    ids = random_ids(1, 20)
    with moa.apply(model, plan), torch.no_grad(), pytest.raises(CacheError, match="another plan"):
        model(ids, past_key_values=moa.SpanCache(random_plan(model, full=True), 20))
    with pytest.raises(CacheError, match=r"moa\.apply is not in force"), torch.no_grad():
        model(ids, past_key_values=moa.SpanCache(plan, 20))


def test_masks_that_are_more_than_padding_are_refused(model, plan):
    ids = random_ids(1, 20)
    with moa.apply(model, plan), torch.no_grad():
        with pytest.raises(UnsupportedModelError, match="2-D"):
            model(ids, attention_mask=torch.ones(1, 1, 20, 20), use_cache=False)
        packed = torch.tensor([[*range(10), *range(10)]])
        with pytest.raises(UnsupportedModelError, match="packed"):
            model(ids, position_ids=packed, use_cache=False)


def test_a_prompt_beyond_the_planned_length_is_refused(model, plan):
    with moa.apply(model, plan), torch.no_grad(), pytest.raises(CacheError, match="planned for"):
        model(random_ids(1, 30), past_key_values=moa.SpanCache(plan, 20))


def test_a_copy_of_a_model_under_a_plan_does_not_run_densely(model, plan):
    with moa.apply(model, plan):
        clone = copy.deepcopy(model)
    with pytest.raises(UnsupportedModelError, match=r"moa\.apply"), torch.no_grad():
        clone(random_ids(1, 5), use_cache=False)


@pytest.mark.parametrize("padded", [False, True])
def test_long_prompts_are_read_in_chunks(model, plan, monkeypatch, padded):
    """Without being asked to, and with the same result; a chunk may be nothing but padding for one of the rows."""
    ids, sizes = random_ids(2, 300), []
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :200] = 0
    with moa.apply(model, plan):
        whole = generate(model, ids, attention_mask=mask)
        monkeypatch.setattr(runtime, "_TOKENS_AT_ONCE", 160)
        monkeypatch.setattr(runtime, "_LEAST_CHUNK", 64)
        hook = model.get_input_embeddings().register_forward_pre_hook(lambda _, given: sizes.append(given[0].shape[1]))
        pieces = generate(model, ids, attention_mask=mask)
        hook.remove()
    assert sizes[:4] == [80, 80, 80, 60]
    assert pieces.tolist() == whole.tolist()


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"num_beams": 2, "num_return_sequences": 2}])
def test_padded_rows_in_several_versions(model, plan, options):
    ids, mask = random_ids(2, 200), torch.ones(2, 200, dtype=torch.long)
    mask[0, :70] = 0
    with moa.apply(model, plan):
        tokens = generate(model, ids, attention_mask=mask, **options)
        alone = generate(model, ids[1:], **options)
    assert tokens[-len(alone) :].tolist() == alone.tolist()
