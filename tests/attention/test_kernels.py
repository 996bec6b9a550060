"""The Triton kernels equal the definition: in Triton's interpreter on a CPU, and on a GPU with ``pytest -m gpu``."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moa.attention import backends, sdpa
from moa.attention.options import AttentionOptions, effective_span
from moa.attention.reference import span_attention
from moa.errors import CacheError, InputError, UnsupportedModelError
from moa.storage import SpanStore

kernels = pytest.importorskip("moa.attention.kernels", reason="triton is not installed")

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
# The interpreter does its arithmetic in numpy, which has no bfloat16: that one runs on a GPU only.
DTYPES = {torch.float32: 2e-5, torch.float16: 2e-3, **({torch.bfloat16: 1.5e-2} if GPU else {})}  # relative error

pytestmark = [pytest.mark.usefixtures("poisoned_memory"), *([pytest.mark.gpu] if GPU else [])]


def assert_near(got, expected, dtype):
    assert got.dtype == dtype
    assert not got.isnan().any()
    error = (got.double().cpu() - expected).norm() / expected.norm().clamp_min(1e-30)
    assert error < DTYPES[dtype], f"relative error {error:.2e}"


def tensors(rows, heads, group, tokens, dim, dtype, seed=0):
    """Queries, keys and values of whole sequences, in the layout models have: [rows, heads, tokens, dim] views."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(rows, tokens, count, dim, generator=generator).to(DEVICE, dtype).transpose(1, 2)
        for count in (heads * group, heads, heads)
    ]


def exact(q, k, v, spans, sink, options, valid=None):
    """The definition in float64."""
    logits = options.sink_logits
    options = AttentionOptions(
        options.scaling,
        options.softcap,
        None if logits is None else logits.double().cpu(),
        options.sliding_window,
    )
    doubles = (tensor.double().cpu() for tensor in (q, k, v))
    valid = None if valid is None else torch.from_numpy(valid)
    return span_attention(*doubles, torch.from_numpy(spans), sink, options, valid)


options_drawn = st.builds(
    lambda softcap, learned, window: (softcap, learned, window),
    st.sampled_from([None, None, 3.0]),
    st.booleans(),
    st.sampled_from([None, None, 1, 70]),
)


def make_options(drawn, query_heads):
    softcap, learned, window = drawn
    logits = torch.linspace(-1, 2, query_heads, device=DEVICE) if learned else None
    return AttentionOptions(0.3, softcap, logits, window)


@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=12 if GPU else 3, deadline=None)
@given(
    rows=st.integers(1, 2),
    heads=st.integers(1, 2),
    group=st.sampled_from([1, 3, 8]) if GPU else st.integers(1, 8),  # each is a kernel to compile
    tokens=st.sampled_from([1, 2, 63, 65, 129, 200, *([1000, 2049] if GPU else [])]),
    sink=st.sampled_from([0, 64]),
    drawn=options_drawn,
    data=st.data(),
)
def test_prefill_equals_the_definition(rows, heads, group, tokens, dim, sink, drawn, dtype, data):
    shortest = min(sink + 1, tokens)
    spans = data.draw(st.lists(st.integers(shortest, tokens), min_size=rows * heads, max_size=rows * heads))
    spans = np.array(spans).reshape(rows, heads)
    q, k, v = tensors(rows, heads, group, tokens, dim, dtype)
    options = make_options(drawn, heads * group)
    got = kernels.prefill(q, k, v, spans, sink, options)
    assert_near(got, exact(q, k, v, spans, sink, options), dtype)


@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256] if GPU else [64, 80, 128])
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=6 if GPU else 4, deadline=None)
@given(
    chunks=st.lists(st.integers(1, 90), min_size=1, max_size=3),
    single=st.integers(0, 4),
    pads=st.tuples(st.integers(0, 100), st.integers(0, 100)),
    group=st.sampled_from([1, 3, 8]) if GPU else st.integers(1, 8),  # each is a kernel to compile
    drawn=options_drawn,
    data=st.data(),
)
def test_chunks_and_steps_over_a_store_equal_the_definition(chunks, single, pads, group, dim, drawn, dtype, data):
    """Left-padded rows, chunks of a prompt, then single tokens, over buffers poisoned with NaN."""
    sink, heads, rows = 16, 2, 2
    chunks = [*chunks, *[1] * single]
    columns = sum(chunks)
    first = np.array([min(pad, columns - 1) for pad in pads])
    if max(first) > chunks[0]:  # a row without any token in the first chunk is fine; see the next test
        first = np.minimum(first, chunks[0])
    valid = np.arange(columns) >= first[:, None]
    lengths = columns - first
    spans = np.array([[data.draw(st.integers(min(sink + 1, n), n)) for _ in range(heads)] for n in lengths.tolist()])
    q, k, v = tensors(rows, heads, group, columns, dim, dtype)
    options = make_options(drawn, heads * group)
    window = options.sliding_window
    capacity = spans if window is None else np.minimum(spans, window)
    store = SpanStore(capacity, effective_span(0, sink, window)[1], k, v)
    store.keys.fill_(torch.nan)
    store.values.fill_(torch.nan)
    outputs, start = [], 0
    for size in chunks:
        piece = slice(start, start + size)
        mask = valid[:, piece]
        mask = None if mask.all() else mask
        outputs.append(kernels.attend(store, q[:, :, piece], k[:, :, piece], v[:, :, piece], mask, options))
        start += size
    assert_near(torch.cat(outputs, dim=2), exact(q, k, v, spans, sink, options, valid), dtype)
    assert (store.on_device.written.cpu().numpy() == store.written).all()


def test_a_row_that_is_all_padding_for_a_while():
    q, k, v = tensors(2, 1, 2, 40, 64, torch.float32)
    valid = np.stack([np.ones(40, bool), np.arange(40) >= 30])
    spans = np.array([[24], [10]])
    store = SpanStore(spans, 8, k, v)
    options = AttentionOptions(0.3)
    pieces = [slice(0, 20), slice(20, 25), slice(25, 40)]
    outputs = [kernels.attend(store, *(t[:, :, p] for t in (q, k, v)), valid[:, p], options) for p in pieces]
    assert_near(torch.cat(outputs, dim=2), exact(q, k, v, spans, 8, options, valid), torch.float32)


def test_padding_after_real_tokens_is_refused():
    q, k, v = tensors(1, 1, 1, 4, 64, torch.float32)
    with pytest.raises(CacheError, match="left"):
        kernels.attend(
            SpanStore(np.array([[4]]), 0, k, v), q, k, v, np.array([[True, False, True, True]]), AttentionOptions(1.0)
        )


def test_repeated_runs_are_bit_identical():
    q, k, v = tensors(2, 2, 4, 300, 64, torch.float32)
    spans = np.array([[80, 300], [200, 170]])
    options = AttentionOptions(0.3)
    runs = []
    for _ in range(3):
        store = SpanStore(spans, 16, k, v)
        prompt = kernels.attend(store, q[:, :, :299], k[:, :, :299], v[:, :, :299], None, options)
        step = kernels.attend(store, q[:, :, 299:], k[:, :, 299:], v[:, :, 299:], None, options)
        runs.append((prompt, step))
    for prompt, step in runs[1:]:
        assert torch.equal(prompt, runs[0][0])
        assert torch.equal(step, runs[0][1])


def test_the_operators_are_known_to_torch_compile():
    """Fake tensors pass through the registered operators with the right shapes."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        q, k, v = (torch.empty(2, heads, 5, 64, dtype=torch.bfloat16) for heads in (4, 2, 2))
        flat = torch.empty(100, 64, dtype=torch.bfloat16)
        counts = torch.empty(4, dtype=torch.int32)
        out = torch.ops.moa.prefill(
            q, k, v, flat, flat, counts, counts, counts, counts[:2], 64, True, True, 0.1, 0.0, None
        )
        assert out.shape == (2, 4, 5, 64)
        step = torch.ops.moa.decode(
            q[:, :, 0], k[:, :, 0], v[:, :, 0], flat, flat, *[counts] * 6, 64, 64, 0.1, 0.0, None
        )
        assert step.shape == (2, 4, 64)
        assert torch.ops.moa.store(k, v, flat, flat, counts, counts, counts, counts[:2], 64) is None


def test_the_backend_can_be_chosen(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setenv("MOA_BACKEND", "sdpa")
    assert backends.pick(cuda, torch.bfloat16, 128) is sdpa
    monkeypatch.setenv("MOA_BACKEND", "triton")
    assert backends.pick(cuda, torch.bfloat16, 128) is kernels
    with pytest.raises(UnsupportedModelError, match="float64"):
        backends.pick(cuda, torch.float64, 128)
    with pytest.raises(UnsupportedModelError, match="512"):
        backends.pick(cuda, torch.bfloat16, 512)
    monkeypatch.setenv("MOA_BACKEND", "magic")
    with pytest.raises(InputError, match="magic"):
        backends.pick(cpu, torch.float32, 64)
    monkeypatch.delenv("MOA_BACKEND")
    assert backends.pick(cpu, torch.float32, 64) is sdpa
    assert backends.pick(cuda, torch.float32, 64) is kernels
    assert backends.pick(cuda, torch.float64, 64) is sdpa
