"""Compiled models: the hook stays outside the graph, and watching causes no recompilation."""

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter

import memhook
from memhook import ModuleAdapter
from memhook.testing import sample, tiny_unet


@pytest.fixture(params=["uncond_first", "two_calls_cond_first"])
def layout(request):
    """One of each kind, since compiling takes its time."""
    return request.param


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def run(model, watched, layout, **options):
    with memhook.watch(watched, adapter=ModuleAdapter(watched, layout=layout), **options) as trace:
        output = sample(model, steps=6, layout=layout)
    return trace, output


@pytest.mark.parametrize("which", ["outer", "inner"])
@pytest.mark.parametrize("warm", [False, True], ids=["compiled inside", "compiled before"])
@pytest.mark.parametrize("fullgraph", [False, True], ids=["", "fullgraph"])
def test_a_compiled_model_gives_the_numbers_of_the_plain_one(layout, which, warm, fullgraph):
    unet = tiny_unet()
    expected, plain = run(unet, unet, layout)
    counter = CompileCounter()
    compiled = torch.compile(unet, backend=counter, fullgraph=fullgraph)
    if warm:
        sample(compiled, steps=2, layout=layout)
    watched = compiled if which == "outer" else unet
    for _ in range(2):
        trace, output = run(compiled, watched, layout)
        np.testing.assert_array_equal(trace.magnitudes, expected.magnitudes)
        assert torch.equal(output, plain)
    frames = counter.frame_count
    run(compiled, watched, layout)
    sample(compiled, steps=2, layout=layout)
    assert counter.frame_count == frames <= 2  # of eighteen guided evaluations and more


@pytest.mark.parametrize("fullgraph", [False, True], ids=["", "fullgraph"])
def test_a_module_compiled_in_place(fullgraph):
    unet = tiny_unet()
    expected, _ = run(unet, unet, "uncond_first")
    counter = CompileCounter()
    unet.compile(backend=counter, fullgraph=fullgraph)
    for _ in range(3):
        trace, _ = run(unet, unet, "uncond_first")
        np.testing.assert_array_equal(trace.magnitudes, expected.magnitudes)
    assert 1 <= counter.frame_count <= 2


@pytest.mark.parametrize("which", ["outer", "inner"])
def test_calls_of_a_compiled_model_can_be_replayed(layout, which):
    unet = tiny_unet()
    compiled = torch.compile(unet, backend="eager")
    trace, _ = run(compiled, compiled if which == "outer" else unet, layout, keep="calls")
    evaluation = trace.evaluations[2]
    embedding = evaluation.embedding.clone().requires_grad_()
    value = evaluation.objective(embedding)
    np.testing.assert_allclose(value.detach(), trace.magnitudes[2], rtol=1e-4)
    assert (torch.autograd.grad(value.sum(), embedding)[0].flatten(1).norm(dim=1) > 0).all()
    assert len(trace) == 6  # the replay did not record itself
