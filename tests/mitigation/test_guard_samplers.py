"""The guard inside samplers that this project did not write: pipelines of diffusers, unmodified, in one call and in two."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import memhook

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.adapters.zoo import FAMILIES

BATCHED = ["StableDiffusionPipeline", "StableDiffusionPipeline, guidance_rescale", "StableDiffusionXLPipeline"]
TWO_CALLS = ["FluxPipeline, true_cfg_scale"]
CASES = [(name, "uncond_first") for name in BATCHED] + [(name, "two_calls_cond_first") for name in TWO_CALLS]


@pytest.fixture(params=CASES, ids=[name for name, _ in CASES])
def run(request):
    """A pipeline, its denoiser, and an adapter for it."""
    name, layout = request.param
    host = FAMILIES[name].build()
    denoiser = getattr(host.pipeline, host.denoisers[0])
    return host, denoiser, memhook.ModuleAdapter(denoiser, layout=layout)


def between(trace):
    """A magnitude that only the louder one of two prompts is above."""
    quiet, loud = np.sort(trace.magnitudes[0])
    assert loud > quiet
    return float(0.9 * loud + 0.1 * quiet), int(trace.magnitudes[0].argmax())


@pytest.mark.filterwarnings("ignore::FutureWarning:diffusers", "ignore::DeprecationWarning")
def test_one_prompt_of_two_is_mitigated_in_flight(run):
    host, denoiser, adapter = run
    with memhook.watch(denoiser, adapter=adapter, keep="calls") as trace:
        plain = host.run()
    target, loud = between(trace)
    with memhook.mitigate(denoiser, target_magnitude=target, adapter=adapter, fixed_tokens=0) as report:
        guarded = host.run()
    assert report.flagged.tolist() == [number == loud for number in range(2)]
    assert report.after[loud] <= target < report.before[loud]
    assert torch.equal(guarded[1 - loud], plain[1 - loud])
    assert not torch.equal(guarded[loud], plain[loud])
    assert report.substituted == len(report.trace) - 1 == len(trace) - 1

    better = trace.evaluations[0].embedding.clone()
    better[loud] = report.optimized.embedding[0]
    assert torch.allclose(guarded, host.run(prompt_embeds=better), rtol=1e-3, atol=1e-4)
    assert all(parameter.grad is None for parameter in denoiser.parameters())
    assert not denoiser._forward_hooks
    assert not denoiser._forward_pre_hooks


@pytest.mark.filterwarnings("ignore::FutureWarning:diffusers", "ignore::DeprecationWarning")
def test_a_stop_passes_through_the_pipeline(run):
    host, denoiser, adapter = run
    calibration = memhook.calibrate(np.linspace(0, 1e-6, 200), first=1)
    with pytest.raises(memhook.MemorizationDetectedError), memhook.guard(denoiser, calibration, action="stop", adapter=adapter):
        host.run()
    assert not denoiser._forward_hooks
