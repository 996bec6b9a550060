"""Models whose layers do more than attend over a span are refused before a server or a calculation starts."""

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    BertConfig,
    Gemma2Config,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
)

from moa.cli import main
from moa.errors import InputError, UnsupportedModelError
from moa.serving import launch
from moa.serving.launch import server_command
from moa.serving.support import check_modules, check_servable


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(),
        MistralConfig(sliding_window=None),
        Phi3Config(sliding_window=131072, max_position_embeddings=131072),
        Qwen2Config(use_sliding_window=False, sliding_window=4096),
    ],
    ids=lambda config: config.model_type,
)
def test_plain_attention_is_served(config):
    check_servable(config)


def test_what_only_the_model_shows_is_named():
    def model(config):
        with torch.device("meta"):
            return AutoModel.from_config(config)

    check_modules(model(LlamaConfig(num_hidden_layers=1)))
    full = GptOssConfig(num_hidden_layers=1, layer_types=["full_attention"])
    with pytest.raises(UnsupportedModelError, match=r"layers\.0\.self_attn has learned sinks"):
        check_modules(model(full))
    with pytest.raises(UnsupportedModelError, match="is not causal"):
        check_modules(model(BertConfig(num_hidden_layers=1)))


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (MistralConfig(sliding_window=4096, max_position_embeddings=32768), "mistral has .*windows .*4096 tokens"),
        (Phi3Config(sliding_window=2047, max_position_embeddings=4096), "phi3 has .*windows .*2047 tokens"),
        (Qwen2Config(use_sliding_window=True, sliding_window=4096, max_window_layers=2), "qwen2 has .*windows"),
        (Gemma2Config(), "gemma2 has .*windows.* and a soft cap .*50"),
        (GptOssConfig(), "gpt_oss has .*windows"),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_what_else_a_layer_does_is_named(config, reason):
    with pytest.raises(UnsupportedModelError, match=reason):
        check_servable(config)


@pytest.fixture
def folder(tmp_path):
    config = MistralConfig(sliding_window=4096, max_position_embeddings=32768, architectures=["MistralForCausalLM"])
    config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).sliding_window == 4096
    return str(tmp_path)


def test_a_server_is_not_started_for_it(folder):
    with pytest.raises(UnsupportedModelError, match="4096 tokens"):
        server_command(folder, "plan.json", None, [])


@pytest.mark.parametrize("option", ["--hf-overrides={}", "--hf_overrides", "--hf-overrides.rope_theta=1e6"])
def test_what_moa_serve_sets_itself_cannot_be_given(option):
    with pytest.raises(InputError, match="sets --hf-overrides itself"):
        server_command("demo", "plan.json", None, [option])


@pytest.mark.parametrize("options", [["--tensor_parallel_size", "4"], ["--tensor-parallel-size=4"], ["-tp", "4"]])
def test_ranks_are_read_however_they_are_written(options):
    assert launch._ranks(options) == 4


def test_the_command_that_sizes_says_so(folder, capsys):
    with pytest.raises(SystemExit) as end:
        main(["size", folder])
    assert end.value.code == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "mistral" in line
    assert "moa.apply" in line
