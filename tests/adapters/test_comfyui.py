"""Every way in which ComfyUI guides: magnitudes agree with the raw network, or are reported missing."""

import numpy as np
import pytest
import torch

import memhook
from tests.adapters.comfy import (
    BasicGuider,
    CFGGuider,
    DualGuider,
    PerpNegGuider,
    encode,
    make_patcher,
    make_sampler,
    with_area,
    with_mask,
    with_range,
)
from tests.adapters.comfy.calc import calc_cond_batch
from tests.adapters.comfy.model import CONST, EPS, V_PREDICTION
from tests.adapters.comfy.truth import magnitudes, visited

CLOSE = 1e-3
SIGMAS = torch.tensor([12.0, 5.0, 1.5, 0.4, 0.0])
POSITIVE, NEGATIVE, EMPTY = encode("a lighthouse at dusk"), encode("two red apples"), encode("")
MASK = torch.zeros(1, 8, 8)
MASK[:, :, :5] = 1.0


def run(guider, *, samples=2, sampler="euler", sigmas=SIGMAS):
    noise = torch.randn(samples, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    return guider.sample(noise, torch.zeros_like(noise), make_sampler(sampler), sigmas, seed=1)


def watched(guider, **options):
    """A run under inference_mode, as ComfyUI makes it, and the places that it came by."""
    with visited(guider) as seen, memhook.watch(guider.model_patcher) as trace, torch.inference_mode():
        run(guider, **options)
    return trace, seen


def cfg_guider(patcher, positive=POSITIVE, negative=NEGATIVE, cfg=7.5):
    guider = CFGGuider(patcher)
    guider.set_conds(positive, negative)
    guider.set_cfg(cfg)
    return guider


def agree(trace, guider, seen, positive=POSITIVE, negative=NEGATIVE):
    expected = magnitudes(guider.model_patcher.model, seen, positive, negative)
    assert (expected > 0).all()
    np.testing.assert_allclose(trace.magnitudes, expected, rtol=CLOSE)
    assert trace.roles == "matched"
    assert trace.host == "comfyui"


COMBINED = {
    "several prompts": [*POSITIVE, *encode("a very long prompt")],
    "areas that overlap": [*with_area(POSITIVE, 8, 4, 0, 0), *with_area(NEGATIVE, 8, 6, 0, 2, strength=0.5)],
    "a mask": [*with_mask(POSITIVE, MASK), *with_mask(EMPTY, 1 - MASK)],
    "half masks": with_mask(POSITIVE, torch.full((1, 8, 8), 0.3)),
    "an area that leaves the rest empty": with_area(POSITIVE, 8, 4, 0, 0),
    "a mask that leaves the rest empty": with_mask(POSITIVE, MASK),
    "lengths that combine": encode("a lighthouse at dusk", tokens=10),
    "lengths that do not": encode("a lighthouse at dusk", tokens=7),
    "a range of the run": [*with_range(POSITIVE, 20.0, 2.0), *with_range(EMPTY, 2.0, 0.0)],
}


@pytest.mark.parametrize("positive", COMBINED.values(), ids=COMBINED)
@pytest.mark.parametrize("free", [1, 1000], ids=["one row at a time", "all at once"])
def test_prompts(positive, free):
    guider = cfg_guider(make_patcher(), positive)
    guider.model_patcher.model.free = free
    trace, seen = watched(guider)
    # ComfyUI evaluates the negative prompt in the areas of the positive one too, and mixes that in.
    negative = [*NEGATIVE, *([NEGATIVE[0][0], options] for _, options in positive if "area" in options)]
    agree(trace, guider, seen, positive, negative)


@pytest.mark.parametrize(("kind", "space"), [(EPS, "eps"), (V_PREDICTION, "eps"), (CONST, "flow")])
@pytest.mark.parametrize("sampler", ["euler", "heun", "euler_cfg_pp"])
def test_models_and_samplers(kind, space, sampler):
    """The magnitude is in units of the noise, also of a model that predicts v; of a flow model, in units of its velocity."""
    guider = cfg_guider(make_patcher(kind))
    sigmas = SIGMAS / 13 if kind is CONST else SIGMAS
    trace, seen = watched(guider, sampler=sampler, sigmas=sigmas)
    agree(trace, guider, seen)
    assert trace.space == space
    assert len(trace) == (7 if sampler == "heun" else 4)
    np.testing.assert_allclose(trace.sigmas, [float(sigma[0]) for _, sigma in seen])
    assert len(trace.runs) == 1


def test_half_precision():
    guider = cfg_guider(make_patcher(dtype=torch.bfloat16))
    trace, seen = watched(guider)
    expected = magnitudes(make_patcher().model, seen, POSITIVE, NEGATIVE)
    np.testing.assert_allclose(trace.magnitudes, expected, rtol=0.1)
    assert trace.magnitudes.dtype == np.float32


def test_two_prompts_in_a_batch():
    """Conditioning with a row a sample; where there are more samples than rows, ComfyUI starts again."""
    positive = encode(["a lighthouse at dusk", "two red apples"])
    guider = cfg_guider(make_patcher(), positive, EMPTY)
    trace, seen = watched(guider, samples=4)
    agree(trace, guider, seen, positive, EMPTY)
    assert trace.groups.tolist() == [0, 1, 0, 1]


def test_one_prompt_is_one_group():
    trace, _ = watched(cfg_guider(make_patcher()), samples=3)
    assert trace.groups.tolist() == [0, 0, 0]
    assert trace.guidance_scale.tolist() == [7.5] * 3


# ---- patches and guiders that call more than once --------------------------------------------------------------------


def perturbed(patcher):
    """Perturbed attention: the prompt once more, with other patches."""

    def post_cfg(args):
        options = dict(args["model_options"])
        options["transformer_options"] = {**options["transformer_options"], "patches_replace": {"attn1": {0: lambda context: context * 0}}}
        (again,) = calc_cond_batch(args["model"], [args["cond"]], args["input"], args["sigma"], options)
        return args["denoised"] + (args["cond_denoised"] - again) * 3.0

    patcher.set_model_sampler_post_cfg_function(post_cfg)


def perturbed_negative(patcher):
    """The same with the negative prompt, which ComfyUI itself skips at cfg 1."""

    def post_cfg(args):
        options = dict(args["model_options"])
        options["transformer_options"] = {**options["transformer_options"], "patches_replace": {"attn1": {0: lambda context: context * 0}}}
        (again,) = calc_cond_batch(args["model"], [negative_of["guider"].conds["negative"]], args["input"], args["sigma"], options)
        return args["denoised"] + (args["cond_denoised"] - again)

    negative_of = {}
    patcher.set_model_sampler_post_cfg_function(post_cfg)
    return negative_of


def self_attention(patcher):
    """SAG: the negative prompt once more, on a blurred latent."""

    def post_cfg(args):
        blurred = args["input"].roll(1, dims=-1)
        (again,) = calc_cond_batch(args["model"], [args["uncond"]], blurred, args["sigma"], args["model_options"])
        return args["denoised"] + (args["uncond_denoised"] - again) * 0.5

    patcher.set_model_sampler_post_cfg_function(post_cfg)


def rewriting(patcher):
    """TCFG, APG: the predictions are changed before they are combined."""
    patcher.set_model_sampler_pre_cfg_function(lambda args: [args["conds_out"][0], args["conds_out"][1] * 0.5])


@pytest.mark.parametrize("patch", [perturbed, self_attention, rewriting])
def test_patched_guidance(patch):
    patcher = make_patcher()
    patch(patcher)
    guider = cfg_guider(patcher)
    trace, seen = watched(guider)
    agree(trace, guider, seen)


def test_perp_neg():
    """What it is guided away from is the empty prompt; its negative one is a second prompt."""
    guider = PerpNegGuider(make_patcher())
    guider.set_conds(POSITIVE, NEGATIVE, EMPTY)
    guider.set_cfg(7.5)
    trace, seen = watched(guider)
    agree(trace, guider, seen, POSITIVE, EMPTY)
    assert trace.setting["unconditional"] == "empty_negative_prompt"


def test_dual_of_two_prompts():
    guider = DualGuider(make_patcher())
    guider.set_conds(POSITIVE, encode("a very long prompt"), NEGATIVE)
    guider.set_cfg(7.5, 3.0)
    trace, seen = watched(guider)
    agree(trace, guider, seen, POSITIVE, NEGATIVE)


def test_dual_with_an_image():
    """InstructPix2Pix: the unconditional prediction is the one with the image and without the text."""
    image = {"concat_latent_image": torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))}
    positive, middle = ([[tensor, {**options, **image}] for tensor, options in conds] for conds in (POSITIVE, EMPTY))
    guider = DualGuider(make_patcher())
    guider.set_conds(positive, middle, EMPTY)
    guider.set_cfg(7.5, 1.5)
    trace, seen = watched(guider)
    agree(trace, guider, seen, positive, middle)


# ---- missing ---------------------------------------------------------------------------------------------------------


def test_cfg_1_is_missing_not_zero():
    trace, _ = watched(cfg_guider(make_patcher(), cfg=1.0))
    assert len(trace) == 4
    with pytest.raises(memhook.NoGuidanceError, match="cfg is 1, so ComfyUI skips the negative prompt; use a cfg above 1"):
        trace.magnitudes  # noqa: B018


def test_cfg_1_that_was_forced_is_there():
    patcher = make_patcher()
    patcher.model_options["disable_cfg1_optimization"] = True
    guider = cfg_guider(patcher, cfg=1.0)
    trace, seen = watched(guider)
    agree(trace, guider, seen)


def test_perturbed_negative_at_cfg_1_is_no_unconditional_prediction():
    patcher = make_patcher()
    link = perturbed_negative(patcher)
    link["guider"] = guider = cfg_guider(patcher, cfg=1.0)
    trace, _ = watched(guider)
    with pytest.raises(memhook.NoGuidanceError, match="cfg is 1"):
        trace.magnitudes  # noqa: B018


def test_basic_guider_has_no_guidance():
    guider = BasicGuider(make_patcher())
    guider.set_conds(POSITIVE)
    trace, _ = watched(guider)
    with pytest.raises(memhook.NoGuidanceError, match="BasicGuider has no negative prompt, so nothing is guided"):
        trace.magnitudes  # noqa: B018


def test_dual_without_its_negative():
    guider = DualGuider(make_patcher())
    guider.set_conds(POSITIVE, encode("a very long prompt"), NEGATIVE)
    guider.set_cfg(7.5, 1.0)
    trace, _ = watched(guider)
    with pytest.raises(memhook.NoGuidanceError, match=r"^cfg1 is 7\.5 and cfg2 is 1, so ComfyUI skips the negative prompt"):
        trace.magnitudes  # noqa: B018


@pytest.mark.parametrize("keep", ["scalars", "calls"])
@pytest.mark.parametrize("which", ["positive", "negative"])
def test_a_range_that_has_ended_is_missing(keep, which):
    """ComfyUI leaves zeros where a prompt's time range is over, which are no prediction."""
    conds = {"positive": POSITIVE, "negative": NEGATIVE}
    conds[which] = with_range(conds[which], 20.0, 2.0)
    guider = cfg_guider(make_patcher(), **conds)
    with memhook.watch(guider.model_patcher, keep=keep) as trace, torch.inference_mode():
        run(guider)
    assert trace.has_guidance.tolist() == [True, True, False, False]
    assert np.isnan(trace.magnitudes[2:]).all()
    assert np.isfinite(trace.magnitudes[:2]).all()


def test_broken_predictions_are_not_missing():
    patcher = make_patcher()
    patcher.model.diffusion_model.unet.leave.bias.data[:] = float("nan")
    trace, _ = watched(cfg_guider(patcher))
    assert trace.has_guidance.all()
    assert np.isnan(trace.magnitudes).all()


def test_another_model_is_not_seen():
    guider, other = cfg_guider(make_patcher()), make_patcher()
    with memhook.watch(other) as trace:
        run(guider)
    with pytest.raises(memhook.NoGuidanceError, match="nothing was recorded"):
        trace.magnitudes  # noqa: B018


# ---- the fallback ------------------------------------------------------------------------------------------------------


def test_old_versions_and_forge():
    guider = cfg_guider(make_patcher(old=True))
    trace, seen = watched(guider)
    agree(trace, guider, seen)
    assert "sampler_post_cfg_function" not in guider.model_patcher.model_options


@pytest.mark.parametrize("sampler", ["heun", "euler_cfg_pp"])
def test_old_versions_with_other_samplers(sampler):
    guider = cfg_guider(make_patcher(old=True))
    trace, seen = watched(guider, sampler=sampler)
    agree(trace, guider, seen)


def test_old_versions_with_patches():
    patcher = make_patcher(old=True)
    perturbed(patcher)
    guider = cfg_guider(patcher)
    trace, seen = watched(guider)
    agree(trace, guider, seen)
    assert len(patcher.model_options["sampler_post_cfg_function"]) == 1


def test_old_perp_neg():
    guider = PerpNegGuider(make_patcher(old=True))
    guider.set_conds(POSITIVE, NEGATIVE, EMPTY)
    guider.set_cfg(7.5)
    trace, seen = watched(guider)
    agree(trace, guider, seen, POSITIVE, EMPTY)


def test_old_versions_report_what_they_cannot_see():
    patcher = make_patcher(old=True)
    rewriting(patcher)
    dual = DualGuider(make_patcher(old=True))
    dual.set_conds(POSITIVE, encode("a very long prompt"), NEGATIVE)
    dual.set_cfg(7.5, 3.0)
    cases = {"rewrites the predictions": cfg_guider(patcher), "DualCFG": dual, "cfg is 1": cfg_guider(make_patcher(old=True), cfg=1.0)}
    for reason, guider in cases.items():
        trace, _ = watched(guider)
        with pytest.raises(memhook.NoGuidanceError, match=reason):
            trace.magnitudes  # noqa: B018


def test_forge_passes_the_negative_list_and_zeros_at_cfg_1():
    """Forge names the list that it did not run, and gives zeros for its prediction."""
    guider = cfg_guider(make_patcher(old=True), cfg=1.0)
    own = guider.predict_noise

    def predict_noise(x, timestep, model_options, seed=None):
        functions = [lambda args, f=f: f({**args, "uncond": guider.conds["negative"]}) for f in model_options["sampler_post_cfg_function"]]
        return own(x, timestep, {**model_options, "sampler_post_cfg_function": functions}, seed)

    guider.predict_noise = predict_noise
    with memhook.watch(guider.model_patcher) as trace:
        run(guider)
    with pytest.raises(memhook.NoGuidanceError, match="cfg is 1"):
        trace.magnitudes  # noqa: B018
