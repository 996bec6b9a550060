"""Replayed decode steps are the model's own steps; on a machine without a GPU a stand-in records them."""

import copy
import logging
import weakref

import pytest
import torch

import moa
from moa import decode_graph
from moa.attention import kernels
from moa.errors import CacheError
from tiny_models import random_ids, random_plan, tiny_model

pytest.importorskip("triton")
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
NEW = 40 if GPU else 5


@pytest.fixture(autouse=True)
def recorder(monkeypatch):
    """How often a step was recorded and replayed. Without a GPU the kernels run in their interpreter."""
    log = {"recorded": 0, "replayed": 0}
    real = decode_graph._capture

    def capture(forward, inputs):
        log["recorded"] += 1
        result, run = real(forward, inputs) if GPU else stand_in(forward, inputs)

        def counted():
            log["replayed"] += 1
            run()

        return result, counted

    monkeypatch.setattr(decode_graph, "_capture", capture)
    if not GPU:
        monkeypatch.setattr(kernels, "recordable", lambda store: kernels._WORK in store.__dict__)
    return log


def stand_in(forward, inputs):
    """Like a CUDA graph: what a step does on the device happens at a replay, and it counts nothing on the host."""
    cache = copy.copy(inputs["past_key_values"])  # the storage alone is what a graph would hold
    cache.span_layers = cache.layers = [copy.copy(layer) for layer in cache.span_layers]
    inputs = {**inputs, "past_key_values": cache}
    counts = cache.counts()

    def run():
        written = [store.written.copy() for store in cache.stores()]
        cache.set_counts([(columns, seen, now) for (columns, seen, _), now in zip(counts, written, strict=True)])
        logits.copy_(forward(**inputs, use_cache=True).logits)
        for store, before in zip(cache.stores(), written, strict=True):
            store.written[:] = before

    device = [(store.keys.clone(), store.values.clone(), store.on_device.written.clone()) for store in cache.stores()]
    logits = forward(**inputs, use_cache=True).logits.clone()
    for store, (keys, values, written) in zip(cache.stores(), device, strict=True):
        store.keys.copy_(keys)
        store.values.copy_(values)
        store.on_device.written.copy_(written)
    return logits, run


@pytest.fixture(scope="module")
def model():
    return tiny_model().to(DEVICE)


def generate(model, ids, **options):
    options = {"do_sample": False, "max_new_tokens": NEW, "pad_token_id": 0, "eos_token_id": None, **options}
    mask = options.pop("attention_mask", torch.ones_like(ids))
    return model.generate(ids, attention_mask=mask, **options)


def without_graphs(model, plan, ids, **options):
    """The same, by PyTorch's operators, which are never recorded."""
    with moa.apply(model, plan, backend="sdpa"):
        return generate(model, ids, **options)


def test_generate_replays_all_steps_but_the_first(model, recorder):
    plan, ids = random_plan(model), random_ids(2, 150).to(DEVICE)
    with moa.apply(model, plan, backend="triton"):
        tokens = generate(model, ids)
    assert tokens.tolist() == without_graphs(model, plan, ids).tolist()
    assert recorder == {"recorded": 1, "replayed": NEW - 2}, "the prompt gives one token, the first step another"


def test_left_padded_rows(model, recorder):
    plan, ids = random_plan(model), random_ids(2, 150).to(DEVICE)
    mask = torch.ones_like(ids)
    mask[0, :90] = 0
    with moa.apply(model, plan, backend="triton"):
        tokens = generate(model, ids, attention_mask=mask)
    assert tokens.tolist() == without_graphs(model, plan, ids, attention_mask=mask).tolist()
    assert recorder["replayed"] == NEW - 2


def test_a_row_that_ends_early(model, recorder):
    plan, ids = random_plan(model), random_ids(2, 150).to(DEVICE)
    end = without_graphs(model, plan, ids)[0, 151].item()
    with moa.apply(model, plan, backend="triton"):
        tokens = generate(model, ids, eos_token_id=end)
    assert tokens.tolist() == without_graphs(model, plan, ids, eos_token_id=end).tolist()


def test_sampling(model, recorder):
    plan, ids = random_plan(model), random_ids(1, 100).to(DEVICE)
    runs = []
    for _ in range(2):
        torch.manual_seed(0)
        with moa.apply(model, plan, backend="triton"):
            runs.append(generate(model, ids, do_sample=True).tolist())
    assert runs[0] == runs[1]
    assert recorder["replayed"] == 2 * (NEW - 2)


def test_the_next_call_of_these_lengths_takes_over_storage_and_recording(model, recorder):
    plan = random_plan(model)
    first, second = (random_ids(2, 150, seed=seed).to(DEVICE) for seed in (1, 2))
    expected = [without_graphs(model, plan, ids).tolist() for ids in (first, second)]
    with moa.apply(model, plan, backend="triton"):
        tokens = [generate(model, ids).tolist() for ids in (first, second)]
        assert recorder == {"recorded": 1, "replayed": NEW - 2 + NEW - 1}
        held = generate(model, first, return_dict_in_generate=True).past_key_values
        kept = [store.keys.clone() for store in held.stores()]
        tokens.append(generate(model, second).tolist())  # must not write into what is still held
        assert all(torch.equal(store.keys, keys) for store, keys in zip(held.stores(), kept, strict=True))
        generate(model, random_ids(1, 150).to(DEVICE))
    assert tokens == [*expected, expected[1]]
    assert recorder["recorded"] == 3


def test_a_cache_that_took_storage_over_keeps_it_before_it_replays(model, recorder):
    plan, ids = random_plan(model), random_ids(2, 150).to(DEVICE)
    with moa.apply(model, plan, backend="triton") as applied:
        generate(model, ids)
        short = {"max_new_tokens": 1, "return_dict_in_generate": True}
        longer = random_ids(2, 149 + NEW).to(DEVICE)  # as long in the end
        first, second = (generate(model, longer, **short).past_key_values for _ in range(2))
        assert first.row_lengths().tolist() == [150 + NEW] * 2
        assert not {id(store) for store in first.stores()} & {id(store) for store in second.stores()}
        assert recorder["recorded"] == 1
    assert applied._graphs._recording is None


def test_a_loop_by_hand(model, recorder):
    """Logits of replayed steps are a call's own: they stay what they are."""
    plan, ids = random_plan(model), random_ids(2, 120 + NEW).to(DEVICE)
    logits = {}
    for backend in ("triton", "sdpa"):
        cache = moa.SpanCache(plan, ids.shape[1])
        with moa.apply(model, plan, backend=backend), torch.no_grad():
            model(ids[:, :120], past_key_values=cache)
            steps = [model(ids[:, at : at + 1], past_key_values=cache).logits for at in range(120, 120 + NEW)]
            logits[backend] = torch.cat(steps, dim=1)
            assert cache.get_seq_length() == 120 + NEW
            with pytest.raises(CacheError, match="planned for"):
                model(ids[:, -1:], past_key_values=cache)
    torch.testing.assert_close(logits["triton"], logits["sdpa"], atol=2e-3, rtol=1e-2)
    assert recorder["replayed"] == NEW - 1


def test_longer_sequences_are_recorded_anew(model, recorder):
    plan, ids = random_plan(model), random_ids(1, 100 + 2 * NEW).to(DEVICE)
    logits = {}
    for backend in ("triton", "sdpa"):
        cache = moa.SpanCache(plan, 100 + NEW)
        with moa.apply(model, plan, backend=backend), torch.no_grad():
            model(ids[:, :100], past_key_values=cache)
            steps = []
            for at in range(100, 100 + 2 * NEW):
                if at == 100 + NEW:
                    cache.grow(100 + 2 * NEW)
                steps.append(model(ids[:, at : at + 1], past_key_values=cache).logits)
            logits[backend] = torch.cat(steps, dim=1)
    torch.testing.assert_close(logits["triton"], logits["sdpa"], atol=2e-3, rtol=1e-2)
    assert recorder == {"recorded": 2, "replayed": 2 * NEW - 2}


def test_steps_that_are_not_plain_run_as_always(model, recorder):
    plan, ids = random_plan(model), random_ids(2, 60).to(DEVICE)
    cache = moa.SpanCache(plan, 80)
    with moa.apply(model, plan, backend="triton"), torch.no_grad():
        model(ids[:, :50], past_key_values=cache)
        model(ids[:, 50:51], past_key_values=cache)
        assert len(model(ids[:, 51:52], past_key_values=cache, output_hidden_states=True).hidden_states) > 1
        assert isinstance(model(ids[:, 52:53], past_key_values=cache, return_dict=False), tuple)
        mask = torch.ones(2, 54, dtype=torch.long, device=DEVICE)
        mask[0, -1] = 0  # padding for one row
        model(ids[:, 53:54], past_key_values=cache, attention_mask=mask)
        model(ids[:, 54:56], past_key_values=cache)
    assert recorder["replayed"] == 0


def test_hooks_are_not_passed_by(model, recorder, caplog):
    plan, ids, called = random_plan(model), random_ids(1, 60).to(DEVICE), []
    hook = model.get_input_embeddings().register_forward_hook(lambda *_: called.append(1))
    try:
        with moa.apply(model, plan, backend="triton"), caplog.at_level(logging.WARNING):
            generate(model, ids)
    finally:
        hook.remove()
    assert len(called) == NEW
    assert "hooks" in caplog.text
    assert recorder["recorded"] == 0


def test_a_model_that_cannot_be_recorded_runs_all_the_same(model, recorder, monkeypatch, caplog):
    plan, ids = random_plan(model), random_ids(1, 60).to(DEVICE)

    real = decode_graph._capture

    def breaks(forward, inputs):
        real(forward, inputs)
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(decode_graph, "_capture", breaks)
    with moa.apply(model, plan, backend="triton"), caplog.at_level(logging.WARNING):
        tokens = generate(model, ids)
    assert tokens.tolist() == without_graphs(model, plan, ids).tolist()
    assert "not permitted" in caplog.text
    assert recorder == {"recorded": 1, "replayed": 0}


def test_a_driver_without_memory_for_the_graph_is_out_of_memory(model, monkeypatch):
    def breaks(forward, inputs):
        raise torch.AcceleratorError("CUDA error: out of memory")

    monkeypatch.setattr(decode_graph, "_capture", breaks)
    with moa.apply(model, random_plan(model), backend="triton"), pytest.raises(torch.OutOfMemoryError):
        generate(model, random_ids(1, 60).to(DEVICE))


def test_the_model_gets_its_forward_back(model):
    own = type(model).forward
    with moa.apply(model, random_plan(model), backend="triton"):
        assert isinstance(model.forward, decode_graph.DecodeGraphs)
    assert model.forward.__func__ is own
    model.forward = marked = model.forward  # as other libraries do
    with moa.apply(model, random_plan(model), backend="triton"):
        assert model.forward is not marked
    assert model.forward is marked
    del model.forward


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="no GPU")
def test_a_recording_that_breaks_leaves_the_gpu_as_it_was(model, recorder, monkeypatch):
    """A step that asks the host something cannot be recorded; the stream and the random numbers go on."""
    plan, ids = random_plan(model), random_ids(1, 60).to(DEVICE)
    kind, stream = type(model.model.norm), torch.cuda.current_stream()
    real = kind.forward
    monkeypatch.setattr(kind, "forward", lambda norm, hidden: real(norm, hidden) * (1 + 0 * hidden.sum().item()))
    with moa.apply(model, plan, backend="triton"):
        tokens = generate(model, ids)
        assert torch.cuda.current_stream() == stream
        generate(model, ids, do_sample=True)
    assert tokens.tolist() == without_graphs(model, plan, ids).tolist()
    assert recorder["replayed"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_compiled_steps_are_the_models_own(model, recorder, guard):
    plan, ids = random_plan(model), random_ids(2, 150).to(DEVICE)
    with guard(), moa.apply(model, plan, backend="triton", compile=True) as applied:
        tokens = generate(model, ids)
        storage = [weakref.ref(store) for store in applied._graphs._recording.stores]
        again = generate(model, random_ids(2, 150, seed=1).to(DEVICE))
    assert tokens.tolist() == without_graphs(model, plan, ids).tolist()
    assert again.tolist() == without_graphs(model, plan, random_ids(2, 150, seed=1).to(DEVICE)).tolist()
    assert recorder == {"recorded": 1, "replayed": 2 * NEW - 3}, "compiled once"
    assert not any(reference() for reference in storage), "what was compiled holds no storage"


@pytest.mark.slow
def test_a_loop_by_hand_compiles_once(model, recorder):
    """Slices of the tokens of several rows have other strides than what is recorded."""
    plan, ids = random_plan(model), random_ids(2, 120 + NEW).to(DEVICE)
    logits = []
    for compiles in (False, True):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        cache = moa.SpanCache(plan, ids.shape[1])
        with moa.apply(model, plan, backend="triton", compile=compiles), torch.no_grad():
            model(ids[:, :120], past_key_values=cache)
            steps = [model(ids[:, at : at + 1], past_key_values=cache).logits for at in range(120, 120 + NEW)]
            logits.append(torch.cat(steps, dim=1))
    torch.testing.assert_close(logits[0], logits[1], atol=2e-3, rtol=1e-2)
    assert recorder["replayed"] == 2 * (NEW - 1)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_a_step_that_does_not_compile_is_recorded_as_it_is(model, recorder, monkeypatch, caplog):
    def breaks(forward, step):
        raise TypeError("no compiler here")

    monkeypatch.setattr(decode_graph, "_compiled", breaks)
    plan, ids = random_plan(model), random_ids(2, 60).to(DEVICE)
    with moa.apply(model, plan, backend="triton", compile=True), caplog.at_level(logging.WARNING):
        tokens = generate(model, ids)
    assert tokens.tolist() == without_graphs(model, plan, ids).tolist()
    assert "not compiled: TypeError: no compiler here" in caplog.text
    assert recorder == {"recorded": 1, "replayed": NEW - 2}
