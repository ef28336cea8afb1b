"""Gradients and interventions inside ComfyUI's inference_mode, with everything made in it: weights, prompts and latents."""

import numpy as np
import pytest
import torch

import memhook
from tests.adapters.comfy import CFGGuider, encode, make_patcher, make_sampler, with_area
from tests.adapters.comfy.model import EPS, V_PREDICTION
from tests.adapters.comfy.truth import magnitudes, network, visited

SIGMAS = torch.tensor([9.0, 4.0, 1.0, 0.0])
pytestmark = pytest.mark.filterwarnings("ignore:the samples .* did not come down to the magnitude:UserWarning")  # few steps are enough here


def made_by_nodes(positive="a lighthouse at dusk", *, kind=EPS, negative="", samples=2):
    """A guider and a starting latent as nodes make them."""
    with torch.inference_mode():
        guider = CFGGuider(make_patcher(kind))
        guider.set_conds(encode(positive) if isinstance(positive, (str, list)) else positive, encode(negative))
        guider.set_cfg(7.5)
        noise = torch.randn(samples, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    return guider, noise


def sample(guider, noise):
    return guider.sample(noise, torch.zeros_like(noise), make_sampler(), SIGMAS, seed=1)


def tensors_of(model):
    found = {**dict(model.named_parameters()), **dict(model.named_buffers()), "offset": model.diffusion_model.offset}
    return {name: (id(tensor), tensor.is_inference()) for name, tensor in found.items()}


@pytest.mark.parametrize("kind", [EPS, V_PREDICTION])
@pytest.mark.parametrize("inside", [True, False], ids=["in inference_mode", "outside"])
def test_gradients_are_those_of_the_raw_network(kind, inside):
    guider, noise = made_by_nodes(kind=kind)
    model, before = guider.model_patcher.model, tensors_of(guider.model_patcher.model)
    with visited(guider) as seen, torch.inference_mode():
        trace = memhook.probe(guider.model_patcher, lambda: sample(guider, noise))
    with torch.inference_mode(mode=inside):
        found = memhook.attribute_tokens(trace)
    assert tensors_of(model) == before
    assert before["diffusion_model.unet.enter.weight"][1], "the weights were to be inference tensors"

    x, sigma = (tensor.clone() for tensor in seen[0])
    raw = make_patcher(kind).model  # the same weights, made outside
    text = encode("a lighthouse at dusk")[0][0].clone()
    expected = []
    for row in range(2):
        leaf = text.clone().requires_grad_()
        away = network(raw, x[row : row + 1], sigma[row], encode("")[0][0], None)
        (network(raw, x[row : row + 1], sigma[row], leaf, None) - away).norm().backward()
        expected.append(leaf.grad[0].norm(dim=1))
    np.testing.assert_allclose(found.scores, torch.stack(expected).detach().numpy(), rtol=1e-3)
    assert model.current_patcher is None


def test_checkpointed_gradients_are_the_same():
    guider, noise = made_by_nodes()
    guider.model_patcher.model.diffusion_model.unet.blocks = torch.nn.ModuleList()  # no block to recompute: say so
    with torch.inference_mode():
        first = memhook.probe(guider.model_patcher, lambda: sample(guider, noise)).evaluations[0]
        with pytest.raises(memhook.MemhookError, match="has no list of repeated blocks"):
            memhook.optimize_embedding(first.objective, first.embedding, target=0.0, checkpoint=True)


def test_optimized_prompts_do_what_they_promise():
    guider, noise = made_by_nodes()
    with torch.inference_mode():
        trace = memhook.probe(guider.model_patcher, lambda: sample(guider, noise))
        first = trace.evaluations[0]
        found = memhook.optimize_embedding(first.objective, first.embedding, target=0.0, lr=0.05, max_steps=5, groups=trace.groups)
        assert (found.after < 0.9 * found.before).all()
        guider.set_conds([[found.embedding[:1], {}]], encode(""))
        again = memhook.probe(guider.model_patcher, lambda: sample(guider, noise))
    np.testing.assert_allclose(again.magnitudes[0], found.after, rtol=1e-3)


def guarded(positive, target, **options):
    guider, noise = made_by_nodes(positive)
    with visited(guider) as seen, torch.inference_mode(), memhook.mitigate(guider.model_patcher, target_magnitude=target, **options) as guard:
        output = sample(guider, noise)
    return guider, guard, seen, output


def test_mitigation_in_flight():
    """The first step goes on from the new prediction, and every later call is given the new prompt."""
    plain_guider, noise = made_by_nodes()
    with torch.inference_mode():
        plain = sample(plain_guider, noise)
    guider, guard, seen, output = guarded("a lighthouse at dusk", 0.01, max_steps=4)
    assert guard.flagged.all()
    assert guard.substituted == 2
    assert not torch.equal(output, plain)
    new = [[guard.optimized.embedding, {}]]
    raw = make_patcher().model
    np.testing.assert_allclose(guard.trace.magnitudes[1:], magnitudes(raw, seen[1:], new, encode("")), rtol=1e-3)
    np.testing.assert_allclose(guard.after, magnitudes(raw, seen[:1], new, encode(""))[0], rtol=1e-3)
    x, sigma = seen[0]
    toward, away = (
        torch.cat([network(raw, x[row : row + 1], sigma[row], text[row % len(text)][None], None) for row in range(2)]).detach()
        for text in (guard.optimized.embedding, encode("")[0][0])
    )
    torch.testing.assert_close(seen[1][0], x + (away + 7.5 * (toward - away)) * (SIGMAS[1] - SIGMAS[0]), rtol=1e-4, atol=1e-4)
    assert torch.equal(guider.original_conds["positive"][0]["cross_attn"], encode("a lighthouse at dusk")[0][0])
    assert not hasattr(guider, "conds")


def test_the_next_run_is_unguarded():
    guider, _, _, _ = guarded("a lighthouse at dusk", 0.01, max_steps=2)
    plain_guider, noise = made_by_nodes()
    with torch.inference_mode():
        assert torch.equal(sample(guider, noise), sample(plain_guider, noise))


def test_other_samples_keep_their_bits():
    prompts = ["", "a lighthouse at dusk"]  # the first is conditioned like the unconditional branch: its magnitude is 0
    guider, noise = made_by_nodes(prompts)
    with torch.inference_mode():
        plain = sample(guider, noise)
    _, guard, _, output = guarded(prompts, 0.05, max_steps=3)
    assert guard.flagged.tolist() == [False, True]
    assert torch.equal(output[0], plain[0])
    assert not torch.equal(output[1], plain[1])


def test_several_prompts_and_areas_are_mitigated():
    positive = [*with_area(encode("a lighthouse at dusk"), 8, 4, 0, 0), *encode("two red apples", tokens=7)]
    with torch.inference_mode():
        positive = [[tensor.clone(), options] for tensor, options in positive]
    guider, noise = CFGGuider(make_patcher()), made_by_nodes()[1]
    guider.set_conds(positive, encode(""))
    guider.set_cfg(7.5)
    with torch.inference_mode(), memhook.mitigate(guider.model_patcher, target_magnitude=0.01, max_steps=4) as guard:
        sample(guider, noise)
    assert (guard.after < guard.before).all()
    assert guard.optimized.embedding.shape == (2, 12, 6)


def test_guard_stops_a_run():
    patcher = make_patcher()

    def probed(seed, positive="a very long prompt"):
        guider = CFGGuider(patcher)
        guider.set_conds(encode(positive), encode(""))
        guider.set_cfg(7.5)
        noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
        return lambda: sample(guider, noise)

    calibration = memhook.calibrate([memhook.probe(patcher, probed(seed)) for seed in range(20)], first=1)
    loud = encode("a lighthouse at dusk")
    loud[0][0] *= 20
    guider = CFGGuider(patcher)
    guider.set_conds(loud, encode(""))
    guider.set_cfg(7.5)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(50))
    with pytest.raises(memhook.MemorizationDetectedError), memhook.guard(patcher, calibration, fpr=0.05, action="stop"), torch.inference_mode():
        sample(guider, noise)
    assert patcher.wrappers == {}
    assert patcher.model.current_patcher is None
    with memhook.guard(patcher, calibration, fpr=0.05, action="stop") as guard, torch.inference_mode():
        probed(51)()
    assert not guard.flagged.any()


def test_fallback_cannot_mitigate_and_says_so():
    patcher = make_patcher(old=True)
    with pytest.raises(memhook.MemhookError, match="only watches and cannot change a run"), memhook.mitigate(patcher, target_magnitude=1.0):
        pass
