"""Span attention in strips and groups equals the definition."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moa.attention import sdpa
from moa.attention.options import AttentionOptions
from moa.attention.reference import span_attention, visible_keys
from moa.storage import SpanStore


def tensors(rows, heads, group, tokens, dim=16, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (rows, heads * group, tokens, dim), (rows, heads, tokens, dim), (rows, heads, tokens, dim)
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


def test_a_query_sees_the_sink_and_its_window_and_nothing_else():
    valid = torch.ones(1, 10, dtype=torch.bool)
    seen = visible_keys(torch.tensor([[5]]), 2, valid, 10)[0, 0]
    assert seen[9].nonzero().flatten().tolist() == [0, 1, 7, 8, 9]
    assert seen[3].nonzero().flatten().tolist() == [0, 1, 2, 3]


def test_padding_does_not_count_as_a_token():
    valid = torch.tensor([[False] * 3 + [True] * 7])
    seen = visible_keys(torch.tensor([[5]]), 2, valid, 10)[0, 0]
    assert seen[9].nonzero().flatten().tolist() == [3, 4, 7, 8, 9]
    assert not seen[:3].any()


def test_inside_a_sliding_window_layer_all_of_the_span_is_recent():
    valid = torch.ones(1, 10, dtype=torch.bool)
    assert visible_keys(torch.tensor([[8]]), 2, valid, 10, 3)[0, 0, 9].nonzero().flatten().tolist() == [7, 8, 9]
    assert visible_keys(torch.tensor([[4]]), 2, valid, 10, 6)[0, 0, 9].nonzero().flatten().tolist() == [6, 7, 8, 9]


def test_full_spans_are_plain_causal_attention():
    q, k, v = tensors(2, 2, 3, 33)
    full = torch.full((2, 2), 33)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(span_attention(q, k, v, full, 4, AttentionOptions(16**-0.5)), expected)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 2),
    heads=st.integers(1, 3),
    group=st.integers(1, 4),
    tokens=st.sampled_from([1, 2, 63, 64, 65, 255, 256, 257, 600]),
    sink=st.sampled_from([0, 1, 64]),
    softcap=st.sampled_from([None, 2.0]),
    learned=st.booleans(),
    sliding_window=st.sampled_from([None, 1, 100]),
    data=st.data(),
)
def test_prefill_equals_the_definition(rows, heads, group, tokens, sink, softcap, learned, sliding_window, data):
    spans = data.draw(
        st.lists(st.integers(min(sink + 1, tokens), tokens), min_size=rows * heads, max_size=rows * heads)
    )
    spans = np.array(spans).reshape(rows, heads)
    q, k, v = tensors(rows, heads, group, tokens)
    logits = torch.linspace(-1, 3, heads * group, dtype=torch.float64) if learned else None
    options = AttentionOptions(0.4, softcap, logits, sliding_window)
    expected = span_attention(q, k, v, torch.from_numpy(spans), sink, options)
    torch.testing.assert_close(sdpa.prefill(q, k, v, spans, sink, options), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prefill_keeps_the_dtype_and_its_accuracy(dtype):
    q, k, v = tensors(1, 2, 2, 300)
    spans = np.array([[128, 300]])
    options = AttentionOptions(0.25)
    expected = span_attention(q, k, v, torch.from_numpy(spans), 64, options)
    got = sdpa.prefill(q.to(dtype), k.to(dtype), v.to(dtype), spans, 64, options)
    assert got.dtype == dtype
    assert (got.double() - expected).norm() / expected.norm() < (1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize(("threads", "shared", "whole"), [(1, 0, True), (64, 0, False), (64, 61, True)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_decoding_equals_the_definition_whatever_the_threads(threads, shared, whole, dtype, monkeypatch):
    """Pairs in plenty and short ones go to PyTorch's attention, a few long ones to products that share them."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(sdpa, "_SHARED", shared)
    attention, called = torch.nn.functional.scaled_dot_product_attention, []
    monkeypatch.setattr(
        sdpa.F, "scaled_dot_product_attention", lambda *args, **kwargs: called.append(1) or attention(*args, **kwargs)
    )
    tokens, prompt, sink = 60, 55, 4
    q, k, v = tensors(2, 3, 2, tokens)
    spans = np.array([[16, 60, 16], [60, 32, 16]])
    options = AttentionOptions(0.4)
    store = SpanStore(spans, sink, k.to(dtype), v.to(dtype))

    def read(start, end):
        return sdpa.attend(store, *(x[:, :, start:end].to(dtype) for x in (q, k, v)), None, options)

    read(0, prompt)
    called.clear()
    got = torch.cat([read(token, token + 1) for token in range(prompt, tokens)], dim=2)
    assert bool(called) == whole
    expected = span_attention(q, k, v, torch.from_numpy(spans), sink, options)[:, :, prompt:]
    assert (got.double() - expected).norm() / expected.norm() < (1e-12 if dtype == torch.float64 else 2e-2)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_decoding_equals_the_definition_whichever_way_keys_and_values_lie(transposed, dtype):
    tokens, prompt, sink = 60, 40, 4
    q, k, v = tensors(2, 3, 2, tokens)
    spans = np.array([[16, 60, 16], [60, 32, 16]])
    options = AttentionOptions(0.4)
    store = SpanStore(spans, sink, k.to(dtype), v.to(dtype), transposed)

    def read(start, end):
        return sdpa.attend(store, *(x[:, :, start:end].to(dtype) for x in (q, k, v)), None, options)

    got = [read(0, prompt), *(read(token, token + 1) for token in range(prompt, 50)), read(50, 55)]
    store = store.moved(np.arange(2), spans)
    got += [read(token, token + 1) for token in range(55, tokens)]
    got = torch.cat(got, dim=2)
    expected = span_attention(q, k, v, torch.from_numpy(spans), sink, options)
    assert (got.double() - expected).norm() / expected.norm() < (1e-12 if dtype == torch.float64 else 2e-2)


@pytest.mark.parametrize("transposed", [False, True])
def test_keys_and_values_lie_where_the_storage_says(transposed):
    _, k, v = tensors(1, 3, 1, 20)
    v = v[..., 1:]  # of another width than keys
    store = SpanStore(np.array([[8, 20, 8]]), 2, k, v, transposed)
    for token in range(20):
        store.append(k[0, :, token], v[0, :, token])
    for pair, seen in ((0, [0, 1, 14, 15, 16, 17, 18, 19]), (1, list(range(20)))):
        for got, expected in zip(store.held(pair), (k, v), strict=True):
            assert torch.equal(got, expected[0, pair, seen])
    (pairs_of_8, pair_of_20) = store.groups
    assert torch.equal(pairs_of_8.keys[1], store.keys_of(2))
    assert torch.equal(pair_of_20.keys[0], store.keys_of(1))
    assert torch.equal(pairs_of_8.values[1], store.values_of(2))
    for rows, buffer in ((pairs_of_8.keys, store.keys), (pairs_of_8.values, store.values)):
        assert (rows.stride(-1) == 1) != transposed
        assert rows.data_ptr() == buffer.data_ptr()  # in place
    moved = store.moved(np.array([0]), np.array([[20, 20, 20]]))
    for pair in range(3):
        for got, expected in zip(moved.held(pair), store.held(pair), strict=True):
            assert torch.equal(got, expected)


@pytest.mark.parametrize("transposed", [False, True])
def test_pairs_of_a_group_may_hold_different_numbers_of_tokens(transposed):
    """A row that was padded holds fewer; its spans are the same."""
    q, k, v = tensors(2, 2, 2, 30)
    spans, sink, options = np.full((2, 2), 24), 4, AttentionOptions(0.4)
    store = SpanStore(spans, sink, k, v, transposed)
    valid = np.ones((2, 16), bool)
    valid[1, :7] = False
    sdpa.attend(store, q[:, :, :16], k[:, :, :16], v[:, :, :16], valid, options)
    for token in range(16, 30):
        step = [x[:, :, token : token + 1] for x in (q, k, v)]
        got = sdpa.attend(store, *step, None, options)
        for row, first in enumerate((0, 7)):
            seen = [x[row : row + 1, :, first : token + 1] for x in (q, k, v)]
            expected = span_attention(*seen, torch.from_numpy(spans[:1]), sink, options)[:, :, -1:]
            torch.testing.assert_close(got[row : row + 1], expected)
