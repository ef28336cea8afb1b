"""A run that memhook ends leaves the pipeline as a run that came to its end."""

import numpy as np
import pytest
import torch

import memhook
from tests.adapters.zoo import FAMILIES

pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:diffusers", "ignore::DeprecationWarning", "ignore:torch.meshgrid")

EXCHANGING = [name for name in FAMILIES if any(word in name for word in ("PAG", "SAG", "AttendAndExcite")) and "alone" not in name]


def processors(pipeline):
    return {
        (name, part): module.processor
        for name, whole in pipeline.components.items()
        if isinstance(whole, torch.nn.Module)
        for part, module in whole.named_modules()
        if hasattr(module, "processor")
    }


@pytest.fixture(params=EXCHANGING)
def host(request):
    return FAMILIES[request.param].build()


def test_some_pipelines_exchange_their_processors():
    assert len(EXCHANGING) >= 4


def test_a_probe_leaves_the_processors(host):
    before = processors(host.pipeline)
    trace = memhook.probe(host.pipeline, host.run)
    assert len(trace) == 1
    assert processors(host.pipeline) == before


def test_a_stopped_run_leaves_the_processors_and_the_next_run_is_what_it_would_have_been(host):
    plain, before = host.run(), processors(host.pipeline)
    everything = memhook.calibrate(np.zeros(100)).using(first=1)
    with pytest.raises(memhook.MemorizationDetectedError), memhook.guard(host.pipeline, everything, fpr=0.05, action="stop"):
        host.run()
    assert processors(host.pipeline).keys() == before.keys()
    assert torch.equal(host.run(), plain)


def test_an_error_of_the_host_does_what_it_does_without_memhook():
    host = FAMILIES["StableDiffusionPAGPipeline"].build()
    handle = host.pipeline.unet.register_forward_hook(lambda *_: (_ for _ in ()).throw(ZeroDivisionError))
    with pytest.raises(ZeroDivisionError), memhook.watch(host.pipeline):
        host.run()
    handle.remove()
    assert any("PAG" in type(processor).__name__ for processor in processors(host.pipeline).values())
