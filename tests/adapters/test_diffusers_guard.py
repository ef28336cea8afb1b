"""The guard on pipelines as users have them: by the pipeline alone, whatever the layout."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import memhook
from memhook.testing.state import changes, snapshot
from memhook_diffusers.repairs import repaired

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.adapters.zoo import FAMILIES

EXACT = [
    "StableDiffusionPipeline",
    "StableDiffusionPipeline, guidance_rescale",
    "StableDiffusionPipeline, Heun",
    "StableDiffusionXLPipeline",
    "StableDiffusion3Pipeline",
    "PixArtSigmaPipeline, learned variance",
    "FluxPipeline, true_cfg_scale",
    "WanPipeline 2.2, two denoisers",
    "AnimateDiffPipeline",
    "StableDiffusionPAGPipeline",
    "StableDiffusionXLPAGPipeline",
    "PixArtSigmaPAGPipeline, learned variance",
    "SanaPAGPipeline",
    "AnimateDiffPAGPipeline, text repeated for every frame",
    "StableDiffusion3Pipeline, skip-layer guidance",
    "IFPipeline, learned variance",
    "Cosmos2TextToImagePipeline, c + w (c - u), converted",
    "WanPipeline, a time for every token",
    "StableDiffusionAdapterPipeline, residuals that the denoiser pops",
]
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:diffusers", "ignore::DeprecationWarning", "ignore:In CPU autocast")


def run(host, **more):
    result = host.run(**more)
    return torch.as_tensor(np.asarray(result[0] if isinstance(result, (list, tuple)) else result))


def guarded(name):
    """An unguarded run of two prompts, and one in which only the louder of them was mitigated."""
    host = FAMILIES[name].build()
    before = snapshot(host.pipeline)
    with memhook.watch(host.pipeline, keep="calls") as trace:
        plain = run(host)
    (quiet, high), loud = np.sort(trace.magnitudes[0]), int(trace.magnitudes[0].argmax())
    with memhook.mitigate(host.pipeline, target_magnitude=float(0.9 * high + 0.1 * quiet), fixed_tokens=0) as report:
        repaired_run = run(host)
    assert changes(before, snapshot(host.pipeline)) == []
    assert report.flagged.tolist() == [number == loud for number in range(2)]
    assert report.optimized.converged.all()
    assert torch.equal(repaired_run[1 - loud], plain[1 - loud])
    assert not torch.equal(repaired_run[loud], plain[loud])
    assert report.substituted >= len(report.trace) - 1
    return host, trace, loud, report, plain, repaired_run


@pytest.mark.parametrize("name", EXACT)
def test_one_prompt_of_two_is_mitigated_as_if_it_had_had_the_new_embedding_all_along(name):
    host, trace, loud, report, plain, repaired_run = guarded(name)
    better = trace.evaluations[0].embedding.clone()
    better[loud] = report.optimized.embedding[0]
    expected = run(host, prompt_embeds=better)
    error, moved = (repaired_run[loud] - expected[loud]).norm(), (plain[loud] - expected[loud]).norm()
    assert error <= 2e-3 * moved


def test_arithmetic_that_cannot_be_repaired_is_said():
    with pytest.warns(UserWarning, match="QwenImagePipeline: it combines its predictions in a way that cannot be repaired after the fact"):
        guarded("QwenImagePipeline, renormalized")


@pytest.mark.parametrize(
    "name",
    [
        "ZImagePipeline, negated, a list of embeddings",
        "Krea2Pipeline, an axis of encoder layers",
        "AllegroPipeline, an axis before the tokens",
        "ShapEPipeline, pooled text, learned variance",
    ],
)
def test_text_in_another_form(name):
    guarded(name)


def test_a_flagged_prompt_stops_the_pipeline():
    host = FAMILIES["StableDiffusionPipeline"].build()
    calibration = memhook.calibrate(np.linspace(0, 1e-6, 200), first=1)
    with pytest.raises(memhook.MemorizationDetectedError), memhook.guard(host.pipeline, calibration, action="stop"):
        host.run()
    assert "step" not in vars(host.pipeline.scheduler)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("strength", [0.0, 0.7, 1.0])
def test_repair_of_known_formulas(sign, strength):
    from memhook.adapting.pairs import Prediction
    from memhook_diffusers.outputs import Reader

    generator = torch.Generator().manual_seed(0)
    u, c, new = (torch.randn(3, 4, 8, 8, generator=generator).double() for _ in range(3))
    new[2] = c[2]

    def combine(cond):
        """`rescale_noise_cfg` of diffusers."""
        guided = u + 7.5 * (cond - u)
        over = (1, 2, 3)
        scaled = guided * cond.std(over, keepdim=True) / guided.std(over, keepdim=True)
        return sign * (strength * scaled + (1 - strength) * guided)

    predictions = [Prediction(values, None, None, None, slice(0, 3), None, Reader(3)) for values in (u, c)]
    result = repaired(combine(c), predictions, 1, new, Reader(3), uncond=0)
    if sign < 0 < strength:  # no pipeline rescales and negates; kept at the old scale
        assert torch.allclose(
            result / result.flatten(1).norm(dim=1)[:, None, None, None], combine(new) / combine(new).flatten(1).norm(dim=1)[:, None, None, None]
        )
    else:
        assert torch.allclose(result, combine(new))
    assert torch.equal(result[2], combine(c)[2])
    assert repaired(combine(c) + torch.randn(3, 4, 8, 8, generator=generator) * 100, predictions, 1, new, Reader(3), uncond=0) is None


@pytest.mark.parametrize("distance", [1.0, 1e-2, 1e-4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_left_is_measured_against_the_guidance_term(distance, dtype):
    """A renormalization for each token is no combination, however near the two predictions are; rounding is no other formula."""
    from memhook.adapting.pairs import Prediction
    from memhook_diffusers.outputs import Reader

    generator = torch.Generator().manual_seed(0)
    u, d, e = (torch.randn(2, 4, 8, 8, generator=generator) for _ in range(3))
    u, c, new = (values.to(dtype) for values in (u, u + distance * d, u + distance * e))
    predictions = [Prediction(values, None, None, None, slice(0, 2), None, Reader(2)) for values in (u, c)]
    guided = u + 4 * (c - u)
    renormalized = guided * (c.norm(dim=1, keepdim=True) / guided.norm(dim=1, keepdim=True))
    assert repaired(guided, predictions, 1, new, Reader(2), uncond=0) is not None
    if distance > 10 * torch.finfo(dtype).eps:
        assert repaired(renormalized, predictions, 1, new, Reader(2), uncond=0) is None
