"""Blended attention is the weighted sum of span attention by its definition, and so are its gradients; the kernels in
Triton's interpreter on a CPU, on a GPU with ``pytest -m gpu``.
"""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moa.attention.options import AttentionOptions
from moa.attention.reference import span_attention
from moa.search.blended_attention import blended_attention

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
TOLERANCES = {torch.float32: 2e-5, torch.float16: 4e-3, **({torch.bfloat16: 3e-2} if GPU else {})}
pytestmark = [pytest.mark.gpu] if GPU else []
OPTIONS = {
    "plain": {},
    "softcap and learned sinks": {"softcap": 3.0, "sink_logits": True},
    "sliding window": {"sliding_window": 90},
    "one window": {"sliding_window": 15},  # shorter than all spans
}


def inputs(length, kv_heads=2, group=2, dim=16, spans=4, seed=0):
    """Query, key, value, weights and the gradient of the output, float64."""
    generator = torch.Generator().manual_seed(seed)
    heads = (kv_heads * group, kv_heads, kv_heads, kv_heads * group)
    query, key, value, d_out = (
        torch.randn(length, count, dim, generator=generator).double().transpose(0, 1).to(DEVICE) for count in heads
    )
    weights = torch.rand(kv_heads, spans, generator=generator).double().to(DEVICE)
    return (2 * query, key, value, weights), d_out


def options(name, heads=4):
    settings = dict(OPTIONS[name])
    if settings.pop("sink_logits", False):
        settings["sink_logits"] = torch.linspace(-1, 1, heads, dtype=torch.float64, device=DEVICE)
    return AttentionOptions(0.3, **settings)


def with_gradients(attend, tensors, d_out):
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    out = attend(*leaves)
    out.backward(d_out.to(out.dtype))
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def definition(spans, sink, options):
    def attend(query, key, value, weights):
        total = 0
        for number, span in enumerate(spans):
            same = torch.full((1, key.shape[0]), span)
            out = span_attention(query[None], key[None], value[None], same, sink, options)[0]
            total = total + weights[:, number].repeat_interleave(query.shape[0] // key.shape[0])[:, None, None] * out
        return total

    return attend


@pytest.mark.parametrize("name", OPTIONS)
@settings(max_examples=15, deadline=None)
@given(
    length=st.integers(1, 300),
    sink=st.sampled_from([1, 4, 64]),
    windows=st.lists(st.integers(1, 400), min_size=4, max_size=4, unique=True),
)
@example(length=257, sink=64, windows=[1, 64, 128, 300])
def test_it_is_the_weighted_sum_by_definition(name, length, sink, windows):
    tensors, d_out = inputs(length)
    spans = [sink + window for window in sorted(windows)]
    settings = options(name)
    found = with_gradients(
        lambda *tensors: blended_attention(*tensors, spans, sink, settings, backend="sdpa"), tensors, d_out
    )
    expected = with_gradients(definition(spans, sink, settings), tensors, d_out)
    for got, right in zip(found, expected, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-9, atol=1e-10)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize(("length", "group", "dim"), [(1, 1, 16), (65, 3, 24), (200, 2, 16)])
def test_the_kernels_give_the_same(name, dtype, length, group, dim):
    pytest.importorskip("triton")
    tensors, d_out = inputs(length, group=group, dim=dim)
    settings, spans = options(name, 2 * group), [20, 64, 150, 400]
    exact = with_gradients(
        lambda *tensors: blended_attention(*tensors, spans, 4, settings, backend="sdpa"), tensors, d_out
    )
    rounded = [*(tensor.to(dtype) for tensor in tensors[:3]), tensors[3].float()]
    found = with_gradients(
        lambda *tensors: blended_attention(*tensors, spans, 4, settings, backend="triton"), rounded, d_out.to(dtype)
    )
    assert {tensor.dtype for tensor in found[:4]} == {dtype}
    for got, right in zip(found, exact, strict=True):
        assert got.shape == right.shape
        assert (got - right).abs().max() <= TOLERANCES[dtype] * max(1.0, float(right.abs().max()))


def test_a_single_span_is_span_attention():
    """All weight on one span: the others do not show."""
    tensors, _ = inputs(150)
    weights = torch.tensor([[0.0, 1, 0, 0], [0, 0, 0, 1]], dtype=torch.float64, device=DEVICE)
    spans = [20, 64, 100, 150]
    out = blended_attention(*tensors[:3], weights, spans, 4, AttentionOptions(0.3), backend="sdpa")
    alone = span_attention(*(t[None] for t in tensors[:3]), torch.tensor([[64, 150]]), 4, AttentionOptions(0.3))[0]
    torch.testing.assert_close(out, alone)
