"""SpanCache: what it stores is what the definition says, through any sequence of calls, and it stores no more."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moa.attention.options import AttentionOptions
from moa.attention.reference import span_attention
from moa.cache import SpanCache
from moa.errors import CacheError, UnsupportedModelError
from moa.plan import ModelIdentity, Plan

DIM, SINK = 8, 4


def one_layer_plan(alpha, beta, sink=SINK, block=1):
    model = ModelIdentity("test", 1, len(alpha), 2 * len(alpha), DIM)
    return Plan.from_arrays(model, np.array([alpha]), np.array([beta]), sink=sink, block=block)


def random_tokens(rows, heads, tokens, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(rows, count, tokens, DIM, generator=generator, dtype=torch.float64)
        for count in (2 * heads, heads, heads)
    ]


def attend(cache, q, k, v, valid=None, options=None):
    key, value = cache.update(k, v, 0)
    return cache.attend(0, q, key, value, valid, options or AttentionOptions(0.5))


def feed(cache, q, k, v, chunks, valid=None, options=None):
    """Attend in chunks and join the outputs."""
    outputs, start = [], 0
    for size in chunks:
        piece = slice(start, start + size)
        mask = None if valid is None else valid[:, piece]
        outputs.append(attend(cache, q[:, :, piece], k[:, :, piece], v[:, :, piece], mask, options))
        start += size
    return torch.cat(outputs, dim=2)


chunkings = st.lists(st.integers(1, 20), min_size=1, max_size=6)


@settings(max_examples=80, deadline=None)
@given(
    chunks=chunkings,
    single=st.integers(0, 12),
    rows=st.integers(1, 2),
    sliding_window=st.sampled_from([None, 3, 9]),
    learned=st.booleans(),
)
def test_any_chunking_equals_the_definition(chunks, single, rows, sliding_window, learned):
    chunks = [*chunks, *[1] * single]
    tokens = sum(chunks)
    plan = one_layer_plan([6.0, 0.0, -2.0], [0.0, 1.0, 0.5])
    q, k, v = random_tokens(rows, 3, tokens)
    logits = torch.linspace(-1, 1, 6, dtype=torch.float64) if learned else None
    options = AttentionOptions(0.5, None, logits, sliding_window)
    spans = torch.from_numpy(np.repeat(plan.spans(tokens), rows, axis=0))
    expected = span_attention(q, k, v, spans, SINK, options)
    torch.testing.assert_close(feed(SpanCache(plan, tokens), q, k, v, chunks, options=options), expected)


@settings(max_examples=40, deadline=None)
@given(chunks=chunkings, pads=st.tuples(st.integers(0, 30), st.integers(0, 30)), single=st.integers(0, 6))
def test_padded_rows_equal_their_solo_runs(chunks, pads, single):
    chunks = [*chunks, *[1] * single]
    columns = sum(chunks)
    pads = [min(pad, columns - 1) for pad in pads]
    plan = one_layer_plan([6.0, 0.0], [0.0, 0.5])
    q, k, v = random_tokens(2, 2, columns)
    valid = np.stack([np.arange(columns) >= pad for pad in pads])
    cache = SpanCache(plan, [columns - pad for pad in pads])
    output = feed(cache, q, k, v, chunks, valid)
    for row, pad in enumerate(pads):
        solo = [tensor[row : row + 1, :, pad:] for tensor in (q, k, v)]
        spans = torch.from_numpy(plan.spans(columns - pad))
        expected = span_attention(*solo, spans, SINK, AttentionOptions(0.5))
        torch.testing.assert_close(output[row : row + 1, :, pad:], expected)
        assert (output[row, :, :pad] == 0).all()


def test_a_layer_holds_exactly_its_spans():
    plan = one_layer_plan([8.0, 0.0], [0.0, 0.5])
    cache = SpanCache(plan, 100)
    q, k, v = random_tokens(3, 2, 100)
    assert cache.nbytes() == 0
    attend(cache, q, k, v)
    assert cache.nbytes() == 3 * (8 + 50) * DIM * 8 * 2
    assert cache.nbytes() == 3 * plan.kv_bytes(100, torch.float64)
    assert cache.get_seq_length() == 100


def test_growing_keeps_what_is_stored_and_uses_the_new_room():
    """After growing, a head sees its sink, what its smaller window still held, and everything since."""
    plan = one_layer_plan([0.0], [0.5])
    q, k, v = random_tokens(1, 1, 60)
    cache = SpanCache(plan, 20)
    feed(cache, *(tensor[:, :, :20] for tensor in (q, k, v)), [15, 5])
    cache.grow(60)
    output = feed(cache, *(tensor[:, :, 20:] for tensor in (q, k, v)), [7, *[1] * 33])
    still_there = [*range(4), *range(14, 60)]  # span 10 of 20 tokens: sink 0-3 and window 14-19
    kept = [tensor[:, :, still_there] for tensor in (q, k, v)]
    expected = span_attention(*kept, torch.tensor([[30]]), SINK, AttentionOptions(0.5))
    torch.testing.assert_close(output, expected[:, :, -40:])
    assert cache.nbytes() == 30 * DIM * 8 * 2


def test_spans_never_shrink():
    cache = SpanCache(one_layer_plan([0.0], [0.5]), 40)
    q, k, v = random_tokens(1, 1, 40)
    attend(cache, *(tensor[:, :, :30] for tensor in (q, k, v)))
    cache.grow(10)
    assert cache.nbytes() == 20 * DIM * 8 * 2


def test_growing_by_as_many_lengths_as_there_are_not_rows_is_refused():
    cache = SpanCache(one_layer_plan([6.0], [0.0]), [40, 50])
    with pytest.raises(CacheError, match="lengths for 2 rows, and was given 6"):
        cache.grow([60] * 6)


def test_rows_that_hold_nothing_are_repeated():
    cache = SpanCache(one_layer_plan([0.0], [0.5]), [40, 80])
    cache.batch_repeat_interleave(2)
    attend(cache, *random_tokens(4, 1, 10))
    assert cache.row_lengths().tolist() == [40, 40, 80, 80]


def test_keys_are_attended_once():
    cache = SpanCache(one_layer_plan([6.0], [0.0]), 40)
    q, k, v = random_tokens(1, 1, 10)
    attend(cache, q, k, v)
    with pytest.raises(UnsupportedModelError, match="attended again"):
        cache.attend(0, q, k, v, None, AttentionOptions(0.5))


def test_reordering_rows_moves_their_history():
    plan = one_layer_plan([6.0, 0.0], [0.0, 0.5])
    q, k, v = random_tokens(3, 2, 31)
    start = [tensor[:, :, :30] for tensor in (q, k, v)]
    cache, moved = SpanCache(plan, 40), SpanCache(plan, 40)
    attend(cache, *start)
    attend(moved, *start)
    order = torch.tensor([2, 0, 0])
    moved.reorder_cache(order)
    last = [tensor[:, :, 30:] for tensor in (q, k, v)]
    expected = attend(cache, *last)[order]
    torch.testing.assert_close(attend(moved, *(tensor[order] for tensor in last)), expected)


def test_rows_of_several_lengths_keep_their_history_when_selected():
    """Heads differ in span, rows in length; some have evicted, some have not."""
    plan = one_layer_plan([6.0, 0.0], [0.0, 0.5])
    lengths = np.array([40, 60, 80])
    q, k, v = random_tokens(3, 2, 33)
    cache, selected = SpanCache(plan, lengths), SpanCache(plan, lengths)
    for each in (cache, selected):
        attend(each, *(tensor[:, :, :30] for tensor in (q, k, v)))
    rows = torch.tensor([2, 0, 2, 1])
    selected.batch_select_indices(rows)
    assert selected.row_lengths().tolist() == [80, 40, 80, 60]
    for columns in (slice(30, 32), slice(32, 33)):  # several tokens, then one
        new = [tensor[:, :, columns] for tensor in (q, k, v)]
        torch.testing.assert_close(attend(selected, *(tensor[rows] for tensor in new)), attend(cache, *new)[rows])


def test_repeating_rows_repeats_their_history():
    plan = one_layer_plan([6.0], [0.0])
    q, k, v = random_tokens(2, 1, 31)
    cache = SpanCache(plan, [40, 50])
    attend(cache, *(tensor[:, :, :30] for tensor in (q, k, v)))
    cache.batch_repeat_interleave(2)
    twice = [tensor[:, :, 30:].repeat_interleave(2, 0) for tensor in (q, k, v)]
    spans = torch.tensor([[6]] * 4)
    history = (tensor.repeat_interleave(2, 0) for tensor in (q, k, v))
    expected = span_attention(*history, spans, 4, AttentionOptions(0.5))
    torch.testing.assert_close(attend(cache, *twice), expected[:, :, -1:])


def test_cropping_takes_tokens_back_until_something_was_evicted():
    plan = one_layer_plan([12.0], [0.0])
    q, k, v = random_tokens(1, 1, 20)
    cache = SpanCache(plan, 20)
    attend(cache, *(tensor[:, :, :9] for tensor in (q, k, v)))
    cache.crop(-4)
    assert cache.get_seq_length() == 5
    output = attend(cache, *(tensor[:, :, 5:20] for tensor in (q, k, v)))
    expected = span_attention(q, k, v, torch.tensor([[12]]), SINK, AttentionOptions(0.5))
    torch.testing.assert_close(output, expected[:, :, 5:])
    with pytest.raises(CacheError, match="evicted"):
        cache.crop(-1)


@pytest.mark.parametrize(
    "move", [lambda cache: cache.reorder_cache(torch.tensor([0, 1])), lambda cache: cache.grow(30)]
)
def test_what_was_evicted_does_not_come_back_by_moving(move):
    """Neither reordered nor grown storage can tell by itself that there were more tokens."""
    cache = SpanCache(one_layer_plan([12.0], [0.0]), 20)
    attend(cache, *random_tokens(2, 1, 20))
    move(cache)
    with pytest.raises(CacheError, match="evicted"):
        cache.crop(-4)
    cache.reset()
    attend(cache, *random_tokens(2, 1, 9))
    move(cache)
    cache.crop(-4)
    assert cache.get_seq_length() == 5


def test_cropping_takes_tokens_back_in_all_layers_or_in_none():
    model = ModelIdentity("test", 2, 1, 2, DIM)
    plan = Plan.from_arrays(model, np.array([[25.0], [12.0]]), np.zeros((2, 1)), sink=SINK, block=1)
    cache = SpanCache(plan, 30)
    q, k, v = random_tokens(1, 1, 20)
    for layer in range(2):
        key, value = cache.update(k, v, layer)
        cache.attend(layer, q, key, value, None, AttentionOptions(0.5))
    with pytest.raises(CacheError, match="evicted"):
        cache.crop(-4)
    assert [layer.columns for layer in cache.span_layers] == [20, 20]


def test_a_reset_cache_starts_over():
    plan = one_layer_plan([6.0], [0.0])
    q, k, v = random_tokens(1, 1, 20)
    cache = SpanCache(plan, 20)
    first = attend(cache, q, k, v)
    cache.reset()
    assert cache.nbytes() == 0
    assert cache.get_seq_length() == 0
    torch.testing.assert_close(attend(cache, q, k, v), first)


def test_more_tokens_than_planned_are_refused():
    cache = SpanCache(one_layer_plan([6.0], [0.0]), 10)
    q, k, v = random_tokens(1, 1, 11)
    with pytest.raises(CacheError, match="planned for"):
        attend(cache, q, k, v)


def test_keys_that_were_never_attended_are_noticed():
    cache = SpanCache(one_layer_plan([6.0], [0.0]), 10)
    _, k, v = random_tokens(1, 1, 2)
    cache.update(k, v, 0)
    with pytest.raises(CacheError, match="never attended"):
        cache.update(k, v, 0)


@pytest.mark.parametrize("lengths", [0, -3, [], [[1]], [4, 0]])
def test_impossible_lengths_are_refused(lengths):
    with pytest.raises(CacheError, match="lengths"):
        SpanCache(one_layer_plan([6.0], [0.0]), lengths)


def test_a_batch_of_another_size_is_refused():
    plan = one_layer_plan([6.0], [0.0])
    q, k, v = random_tokens(2, 1, 5)
    with pytest.raises(CacheError, match="3 rows"):
        attend(SpanCache(plan, [9, 9, 9]), q, k, v)
    cache = SpanCache(plan, 9)
    attend(cache, q, k, v)
    with pytest.raises(CacheError, match="holds 2 rows"):
        attend(cache, q[:1], k[:1], v[:1])
