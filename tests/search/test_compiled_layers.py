"""Compiled layers give what layers give, share one compilation, and give way where a compiler fails."""

import logging
from collections import Counter

import pytest
import torch

from moa.plan import Plan
from moa.runtime import apply
from moa.search.compiled_layers import CompiledLayers
from moa.search.layer_outputs import LayerOutputs
from tiny_models import EXTRA, random_ids, random_plan, tiny_model

LAYERS = 4


@pytest.fixture(autouse=True)
def forget_compilations():
    yield
    torch._dynamo.reset()


def compiler(graphs):
    """A backend that counts the graphs that it is given and runs them as they are."""

    def compile(graph, inputs):
        def run(*args):
            graphs["run"] += 1
            return graph.forward(*args)

        graphs["compiled"] += 1
        return run

    return compile


@pytest.mark.parametrize("model_type", [*EXTRA])
def test_compiled_layers_give_what_layers_give(model_type):
    model = tiny_model(model_type, num_hidden_layers=LAYERS)
    plan = random_plan(model, sink=4, block=16)
    compiled = CompiledLayers(model, "aot_eager")
    for ids in (random_ids(2, 100), random_ids(1, 300)):
        for other in (plan, Plan.dense(plan.model)):
            with torch.no_grad(), apply(model, other):
                expected = model(ids, use_cache=False).logits
                found = compiled.run(lambda ids=ids: model(ids, use_cache=False).logits)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert all("forward" not in layer.__dict__ for layer in model.model.layers)


def test_all_layers_and_shapes_share_few_compilations():
    model = tiny_model(num_hidden_layers=LAYERS)
    graphs = Counter()
    compiled = CompiledLayers(model, compiler(graphs))
    with torch.no_grad(), apply(model, random_plan(model)):
        for length in (100, 200, 300, 400):
            ids = random_ids(2, length)
            compiled.run(lambda ids=ids: model(ids, use_cache=False).logits)
    in_a_layer, rest = divmod(graphs["run"], LAYERS * 4)
    assert in_a_layer >= 2, "before attention and after it"
    assert rest == 0
    assert graphs["compiled"] <= 2 * in_a_layer, "for the first shape, and for all others"


def test_passes_that_begin_in_the_middle_begin_there():
    model = tiny_model(num_hidden_layers=LAYERS)
    graphs = Counter()
    compiled = CompiledLayers(model, compiler(graphs))
    ids = random_ids(1, 100)
    outputs = LayerOutputs(model, 100)

    def forward():
        return model(ids, use_cache=False).logits

    with torch.no_grad(), apply(model, random_plan(model)):
        whole = compiled.run(lambda: outputs.keep("a", forward))
        before = graphs["run"]
        found = compiled.run(lambda: outputs.resume("a", 3, forward))
    torch.testing.assert_close(found, whole)
    assert before > 0
    assert graphs["run"] - before == before / (LAYERS + LAYERS / 2), "a layer; before, all, and half of them to try it"


def test_a_compiler_that_fails_is_left_out(caplog):
    def broken(graph, inputs):
        raise RuntimeError("no such compiler")

    model = tiny_model(num_hidden_layers=LAYERS)
    ids = random_ids(1, 100)
    compiled = CompiledLayers(model, broken)
    with torch.no_grad(), apply(model, random_plan(model)), caplog.at_level(logging.WARNING, "moa"):
        expected = model(ids, use_cache=False).logits
        for _ in range(2):
            assert torch.equal(compiled.run(lambda: model(ids, use_cache=False).logits), expected)
    assert len(caplog.records) == 1
    assert "no such compiler" in caplog.text


def test_errors_of_the_model_itself_stay_errors(caplog):
    model = tiny_model(num_hidden_layers=LAYERS)
    compiled = CompiledLayers(model, "eager")

    def fail():
        raise ValueError("not a compiler's")

    for _ in range(2):
        with pytest.raises(ValueError, match="not a compiler's"):
            compiled.run(fail)
    assert not [record for record in caplog.records if record.name == "moa"], "no compiler is blamed for it"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu_measured_is_as_without():
    model = tiny_model(num_hidden_layers=LAYERS).cuda()
    ids = random_ids(2, 300).cuda()
    compiled = CompiledLayers(model)
    with torch.no_grad(), apply(model, random_plan(model, sink=4, block=16)):
        expected = model(ids, use_cache=False).logits
        found = compiled.run(lambda: model(ids, use_cache=False).logits)
    assert compiled._layers, "it did compile"
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
