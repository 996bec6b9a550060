"""Influence measured in strips equals the definition, and the definition is what masking keys does."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from moa.attention.options import AttentionOptions
from moa.attention.reference import span_attention
from moa.search.influence import Estimator, InfluenceCollector, influence_attention
from moa.search.influence_reference import attention_influence, masked_keys


def tensors(length, kv_heads=2, group=2, dim=8, peaked=2.0, dtype=torch.float64, seed=0):
    """Query, key, value and the gradient of the output."""
    generator = torch.Generator().manual_seed(seed)
    query, key, value, d_out = (
        torch.randn(heads, length, dim, generator=generator, dtype=torch.float64)
        for heads in (kv_heads * group, kv_heads, kv_heads, kv_heads * group)
    )
    return [tensor.to(dtype) for tensor in (query * peaked, key, value, d_out)]


def options(dim=8, heads=4, softcap=None, learned_sink=False, sliding_window=None):
    sink_logits = torch.linspace(-2, 4, heads, dtype=torch.float64) if learned_sink else None
    return AttentionOptions(dim**-0.5, softcap, sink_logits, sliding_window)


def measured(inputs, settings, estimator, strip=128, backend="sdpa"):
    """Output, gradients of query, key and value, and the loss table."""
    query, key, value, d_out = inputs
    leaves = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
    collector = InfluenceCollector(estimator, strip, backend)
    out = influence_attention(*leaves, settings, collector, 5)
    out.backward(d_out)
    return out.detach(), *(leaf.grad for leaf in leaves), collector.tables[5]


def assert_close(found, expected, tolerance):
    """Equal to ``tolerance`` of the largest entry."""
    assert found.shape == expected.shape
    assert (found.double() - expected.double()).abs().max() <= tolerance * expected.abs().max() + 1e-14


@settings(max_examples=60, deadline=None)
@given(
    estimator=st.sampled_from(Estimator),
    length=st.integers(1, 330),
    strip=st.integers(1, 200),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 3),
    softcap=st.sampled_from([None, 3.0]),
    learned_sink=st.booleans(),
    sliding_window=st.none() | st.integers(1, 400),
)
@example(Estimator.JOINT, 320, 128, 2, 2, None, False, None)
@example(Estimator.PAPER, 320, 128, 2, 2, None, False, None)
@example(Estimator.JOINT, 330, 64, 1, 3, 3.0, True, 150)
@example(Estimator.PAPER, 330, 64, 1, 3, 3.0, True, 150)
@example(Estimator.JOINT, 40, 128, 1, 1, None, False, None)
def test_strips_equal_the_definition(estimator, length, strip, kv_heads, group, softcap, learned_sink, sliding_window):
    inputs = tensors(length, kv_heads, group)
    settings = options(8, kv_heads * group, softcap, learned_sink, sliding_window)
    expected = attention_influence(*inputs, settings)
    *found, table = measured(inputs, settings, estimator, strip)
    names = ("out", "d_query", "d_key", "d_value")
    for tensor, name in zip(found, names, strict=True):
        assert_close(tensor, getattr(expected, name), 1e-12)
    assert table.dtype == torch.float64
    assert_close(table, getattr(expected, estimator), 1e-12)
    assert (table[:, -1] == 0).all()


@pytest.mark.parametrize("estimator", Estimator)
@pytest.mark.parametrize("peaked", [1, 5, 30])
def test_float32_keeps_its_digits_where_one_key_takes_all_attention(estimator, peaked):
    inputs = tensors(500, dim=32, peaked=peaked, dtype=torch.float32)
    exact = measured([tensor.double() for tensor in inputs], options(32), estimator)
    for found, expected in zip(measured(inputs, options(32), estimator), exact, strict=True):
        assert_close(found, expected, 2e-5)


@pytest.mark.parametrize("estimator", Estimator)
def test_half_precision_is_lost_in_the_gradients_only(estimator):
    inputs = tensors(300, dtype=torch.bfloat16)
    expected = attention_influence(*(tensor.double() for tensor in inputs), options())
    out, d_query, d_key, d_value, table = measured(inputs, options(), estimator)
    assert {tensor.dtype for tensor in (out, d_query, d_key, d_value)} == {torch.bfloat16}
    assert_close(d_query, expected.d_query, 1e-2)
    assert_close(table, getattr(expected, estimator), 1e-5)


def test_tables_of_a_layer_that_is_used_twice_add_up():
    inputs = tensors(200)
    collector = InfluenceCollector(Estimator.JOINT)
    query = inputs[0].requires_grad_()
    for _ in range(2):
        influence_attention(query, *inputs[1:3], options(), collector, 0).backward(inputs[3])
    assert_close(collector.tables[0], 2 * attention_influence(*inputs, options()).joint, 1e-12)


def test_no_square_matrix_is_made():
    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            result = function(*arguments, **(keywords or {}))
            for tensor in result if isinstance(result, tuple | list) else [result]:
                if isinstance(tensor, torch.Tensor):
                    self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
            return result

    inputs = tensors(2048, 1, 1, dtype=torch.float32)
    for estimator in Estimator:
        with Largest() as largest:
            measured(inputs, options(heads=1), estimator, strip=32)
        assert 0 < largest.elements <= 32 * 2048


LAYERS = [
    options(),
    options(softcap=3.0),
    options(learned_sink=True),
    options(sliding_window=170),
    options(softcap=3.0, learned_sink=True, sliding_window=170),
]


@pytest.mark.parametrize("settings", LAYERS)
def test_the_joint_table_is_what_running_with_that_span_changes_to_first_order(settings):
    query, key, value, d_out = inputs = tensors(260)
    influence = attention_influence(*inputs, settings)
    for entry in range(4):
        spans = torch.full((1, 2), 64 + 64 * (entry + 1))
        masked = span_attention(query[None], key[None], value[None], spans, 64, settings)[0]
        change = (d_out * (masked - influence.out)).sum(-1)
        assert_close(influence.joint[:, entry], change.square().sum(-1), 1e-10)


@pytest.mark.parametrize("settings", LAYERS)
def test_the_papers_table_adds_up_what_masking_each_key_alone_changes_to_first_order(settings):
    length, group = 200, 2
    query, key, value, d_out = inputs = tensors(length)
    influence = attention_influence(*inputs, settings)
    key, value = key.repeat_interleave(group, 0), value.repeat_interleave(group, 0)
    logits = query @ key.mT * settings.scaling
    if settings.softcap:
        logits = settings.softcap * torch.tanh(logits / settings.softcap)
    distance = torch.arange(length)[:, None] - torch.arange(length)
    hidden = (distance < 0) | (distance >= (settings.sliding_window or length))
    logits = logits.masked_fill(hidden, -torch.inf)
    if settings.sink_logits is not None:
        logits = torch.cat([logits, settings.sink_logits.view(-1, 1, 1).expand(-1, length, 1)], -1)
    change = torch.zeros(4, length, length, dtype=torch.float64)
    for j in range(length):
        others = logits.clone()
        others[..., j] = -torch.inf
        masked = torch.nan_to_num(others.softmax(-1))[..., :length] @ value  # nan: no key left
        change[..., j] = (d_out * (masked - influence.out)).sum(-1)
    for entry in range(3):
        expected = (change.abs() * masked_keys(length, entry, settings.sliding_window)).sum((1, 2))
        assert_close(influence.paper[:, entry], expected, 1e-10)
