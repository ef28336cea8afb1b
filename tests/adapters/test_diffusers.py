"""Every family of diffusers pipelines: magnitudes and roles agree with a recorder that knows the layout."""

import numpy as np
import pytest
import torch

import memhook
from memhook.testing.state import changes, snapshot
from tests.adapters.zoo import FAMILIES
from tests.adapters.zoo.inputs import same_but, text_of
from tests.adapters.zoo.truth import recording

CLOSE = 1e-4
TEXT_ALONE = {  # families whose two predictions differ in the text alone, among others: all forms of text, and all layouts
    "StableDiffusionPipeline",
    "StableDiffusionInstructPix2PixPipeline",
    "StableDiffusionPAGPipeline",
    "StableDiffusionSAGPipeline",
    "WanPipeline 2.2, two denoisers",
    "CogVideoXPipeline",
    "AnimateDiffPAGPipeline, text repeated for every frame",
    "AudioLDMPipeline, pooled text",
    "AllegroPipeline, an axis before the tokens",
    "Krea2Pipeline, an axis of encoder layers",
    "ShapEPipeline, pooled text, learned variance",
    "DreamLitePipeline, an edit beside its picture",
    "Modular Z-Image, guider given negated predictions",
    "Modular QwenImage 2.1, tokens of an image first",
}


def tensors(result):
    items = result if isinstance(result, (list, tuple)) else [result]
    return [item if isinstance(item, torch.Tensor) else torch.as_tensor(np.asarray(item)) for item in items]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.filterwarnings(
    "ignore::FutureWarning:diffusers",
    "ignore::DeprecationWarning",
    "ignore:In CPU autocast",
    "ignore:torch.meshgrid",
    "ignore:`torch.nn.utils.weight_norm`:FutureWarning",
)
def test_family(name):
    family = FAMILIES[name]
    host = family.build()
    with recording(family, host) as truth:
        plain = host.run()
    before = snapshot(host.pipeline)
    expected = truth.magnitudes.numpy()

    with memhook.watch(host.pipeline) as trace:
        watched = host.run()
    assert all(torch.equal(a, b) for a, b in zip(tensors(plain), tensors(watched), strict=True))
    assert changes(before, snapshot(host.pipeline)) == []
    assert len(trace) == len(expected)
    if family.missing is not None:
        assert np.isnan(expected).all()
        with pytest.raises(memhook.NoGuidanceError, match=family.missing):
            _ = trace.magnitudes
        return
    np.testing.assert_allclose(trace.magnitudes, expected, rtol=CLOSE)
    assert trace.roles in family.roles

    with memhook.watch(host.pipeline, keep="calls") as kept:
        host.run()
    np.testing.assert_allclose(kept.magnitudes, expected, rtol=CLOSE)
    for evaluation, step in zip(kept.evaluations, truth.steps, strict=True):
        assert (evaluation.pred_uncond is None) == (step.uncond is None)
        assert close(evaluation.pred_cond, step.cond), "the conditional prediction is another one"
        if step.uncond is not None:
            assert close(evaluation.pred_uncond, step.uncond), "the unconditional prediction is another one"
            assert evaluation.roles in family.roles
    replays(family, *next(pair for pair in zip(kept.evaluations, truth.steps, strict=True) if pair[1].uncond is not None))


def close(found, expected):
    found = found.reshape(expected.shape)
    return float((found.double() - expected.double()).norm()) <= CLOSE * float(expected.double().norm())


def replays(family, evaluation, step):
    if isinstance(family.replay, str):
        with pytest.raises(memhook.ReplayError, match=family.replay):
            evaluation.objective(torch.zeros(1, 1, 1) if evaluation.embedding is None else evaluation.embedding)
        return
    embedding = evaluation.embedding.clone().requires_grad_()
    value = evaluation.objective(embedding)
    captured = memhook.magnitude(evaluation.pred_cond, evaluation.pred_uncond)
    torch.testing.assert_close(value.detach(), captured, rtol=1e-3, atol=1e-5)
    (gradient,) = torch.autograd.grad(value.sum(), embedding)
    assert (gradient.flatten(1).norm(dim=1) > 0).all()

    text = text_of(evaluation.embedding, step.cond_part)
    assert text is not None, "the embedding is none of what the denoiser was given for the conditional prediction"
    negative = step.uncond_part.leaves().get(text[0])
    if negative is None or not same_but(text[0], step.cond_part, step.uncond_part):
        assert family.name not in TEXT_ALONE
        return  # a pooled embedding, or a ControlNet's answer to the text, differs as well
    negative = negative[:: len(negative) // len(embedding)].reshape(embedding.shape)
    left = evaluation.objective(negative)
    assert (left <= 1e-3 * captured).all(), "with the unconditional embedding there is no unconditional prediction"
