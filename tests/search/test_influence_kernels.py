"""Influence by Triton kernels equals the strips: in Triton's interpreter on a CPU, on a GPU with ``pytest -m gpu``.

The strips in float64 are compared with the definition in test_influence; unlike it they stay exact where one key takes
all attention.
"""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moa.attention.options import AttentionOptions
from moa.search.influence import Estimator, InfluenceCollector, influence_attention

kernels = pytest.importorskip("moa.search.triton_influence", reason="triton is not installed")

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
# The interpreter does its arithmetic in numpy, which has no bfloat16: that one runs on a GPU only.
TOLERANCES = {
    torch.float32: (2e-5, 2e-6),  # of outputs and gradients, of tables; relative to the largest
    torch.float16: (4e-3, 2e-4),
    **({torch.bfloat16: (3e-2, 2e-3)} if GPU else {}),
}

pytestmark = [pytest.mark.usefixtures("poisoned_memory"), *([pytest.mark.gpu] if GPU else [])]


def tensors(length, kv_heads, group, dim, peaked, dtype):
    """Query, key, value and the gradient of the output, in the layout models have: [heads, length, dim] views."""
    generator = torch.Generator().manual_seed(length)
    scales = (peaked, 1, 1, 1)
    heads = (kv_heads * group, kv_heads, kv_heads, kv_heads * group)
    return [
        (torch.randn(length, count, dim, generator=generator) * scale).to(DEVICE, dtype).transpose(0, 1)
        for count, scale in zip(heads, scales, strict=True)
    ]


def measured(inputs, options, estimator, backend):
    query, key, value, d_out = inputs
    leaves = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
    collector = InfluenceCollector(estimator, backend=backend)
    out = influence_attention(*leaves, options, collector, 0)
    out.backward(d_out)
    return out.detach(), *(leaf.grad for leaf in leaves), collector.tables[0]


def flow_scale(inputs):
    """The largest dA. The forward pass rounds attention to the dtype, so a row's mean of dA, which all its effects are
    taken from, is off by as small a share of this: much of a table that has but a row or two, little of a long one.
    """
    _, key, value, d_out = (tensor.double() for tensor in inputs)
    return float((d_out @ value.repeat_interleave(len(d_out) // len(key), 0).mT).abs().max())


def assert_equal(inputs, options, estimator, peaked):
    dtype = inputs[0].dtype
    # Single precision rounds a logit to a share of itself, and exp makes that a share of the attention.
    logits = max(1.0, peaked / 3) if dtype == torch.float32 else 1.0
    exact = measured([tensor.double() for tensor in inputs], options, estimator, "sdpa")
    *found, table = measured(inputs, options, estimator, "triton")
    names = ("out", "d_query", "d_key", "d_value", "table")
    limits = [logits * limit for limit in (*[TOLERANCES[dtype][0]] * 4, TOLERANCES[dtype][1])]
    assert {tensor.dtype for tensor in found} == {dtype}
    assert table.dtype == torch.float64
    for name, got, expected, limit in zip(names, [*found, table], exact, limits, strict=True):
        assert got.shape == expected.shape
        assert not got.isnan().any(), name
        error = (got.double() - expected).abs().max()
        largest = max(1.0, float(expected.abs().max()))
        if name == "table" and dtype != torch.float32:
            largest = max(largest, flow_scale(inputs) * (largest**0.5 if estimator is Estimator.JOINT else 1))
        if expected.abs().max() < 1e-9:  # nothing but what is rounded off, at the scale of the inputs
            largest = max(float(tensor.abs().max()) for tensor in inputs)
        assert error <= limit * largest, (name, float(error), largest)


@pytest.mark.parametrize(
    ("dtype", "dim"),
    [
        (dtype, dim)
        for dtype in TOLERANCES
        for dim in ([64, 80, 128, 256] if GPU else [16, 80])
        if dtype != torch.float32 or dim <= 128
    ],
)
@settings(max_examples=3 if GPU else 6, deadline=None)  # each is a set of kernels to compile
@given(
    estimator=st.sampled_from(Estimator),
    length=st.sampled_from([1, 2, 63, 64, 65, 128, 129, 200, 330, *([1000, 4500] if GPU else [])]),
    kv_heads=st.integers(1, 2),
    group=st.sampled_from([1, 4]) if GPU else st.integers(1, 3),
    softcap=st.sampled_from([None, None, 3.0]),
    learned_sink=st.booleans(),
    sliding_window=st.sampled_from([None, None, 1, 64, 150, 400]),
    peaked=st.sampled_from([0.5, 3.0, 20.0]),
)
@example(
    estimator=Estimator.JOINT,
    length=330,
    kv_heads=2,
    group=1,
    softcap=None,
    learned_sink=False,
    sliding_window=None,
    peaked=3.0,
)
@example(
    estimator=Estimator.JOINT,
    length=330,
    kv_heads=1,
    group=1,
    softcap=None,
    learned_sink=True,
    sliding_window=150,
    peaked=0.5,
)
@example(
    estimator=Estimator.PAPER,
    length=330,
    kv_heads=1,
    group=1,
    softcap=None,
    learned_sink=False,
    sliding_window=1,
    peaked=20.0,
)
@example(
    estimator=Estimator.JOINT,
    length=129,
    kv_heads=1,
    group=2,
    softcap=None,
    learned_sink=False,
    sliding_window=150,
    peaked=3.0,
)
def test_kernels_equal_the_strips(
    estimator, length, kv_heads, group, softcap, learned_sink, sliding_window, peaked, dim, dtype
):
    heads = kv_heads * group
    logits = torch.linspace(-2, 4, heads, device=DEVICE) if learned_sink else None
    options = AttentionOptions(dim**-0.5, softcap, logits, sliding_window)
    assert_equal(tensors(length, kv_heads, group, dim, peaked, dtype), options, estimator, peaked)


@pytest.mark.parametrize("estimator", Estimator)
def test_repeated_runs_are_bit_identical(estimator):
    inputs = tensors(300, 2, 2, 64, 2.0, torch.float16)
    options = AttentionOptions(0.125)
    first, *others = (measured(inputs, options, estimator, "triton") for _ in range(3))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_the_operators_are_known_to_torch_compile():
    """Fake tensors pass through the registered operators with the right shapes."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        q, k, v = (torch.empty(heads, 100, 64, dtype=torch.bfloat16) for heads in (4, 2, 2))
        out, lse = torch.ops.moa.influence_forward(q, k, v, 0.1, 0.0, None, None)
        assert (out.shape, out.dtype, lse.shape) == (q.shape, torch.float32, (4, 100))
        *gradients, table = torch.ops.moa.influence_backward(q, k, v, out, lse, q, True, 3, 0.1, 0.0, None, None)
        assert [tensor.shape for tensor in gradients] == [q.shape, k.shape, v.shape]
        assert (table.shape, table.dtype) == ((4, 3), torch.float64)
