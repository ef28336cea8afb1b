"""How the diffusers adapter holds on to a host: stand-ins that follow copies, no waiting for the device, refusals that say why."""

import copy
import gc
import inspect
import threading
import types
import weakref

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import memhook
from memhook_diffusers.run import Run
from memhook_diffusers.taps import listen_to
from memhook_diffusers.ways import MOST
from tests.adapters.zoo import FAMILIES, images
from tests.adapters.zoo.family import STEPS, generator

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture
def host():
    return FAMILIES["StableDiffusionPipeline"].build()


@pytest.fixture
def scheduler():
    found = diffusers.DDIMScheduler(clip_sample=False)
    found.set_timesteps(3)
    return found


def step(scheduler, value=1.0):
    return scheduler.step(torch.full((1, 1, 2, 2), value), scheduler.timesteps[0], torch.ones(1, 1, 2, 2)).prev_sample


class TestStandIn:
    def test_keeps_signature_and_result(self, scheduler):
        signature, plain = inspect.signature(scheduler.step), step(scheduler)
        seen = []
        with listen_to(scheduler, "step", lambda owner, named: seen.append((owner, sorted(named)))):
            assert inspect.signature(scheduler.step) == signature
            assert torch.equal(step(scheduler), plain)
        assert seen == [(scheduler, ["model_output", "sample", "timestep"])]
        assert "step" not in vars(scheduler)

    def test_copy_steps_itself(self):
        scheduler = diffusers.EulerDiscreteScheduler()
        scheduler.set_timesteps(3)
        owners = []
        with listen_to(scheduler, "step", lambda owner, _: owners.append(owner)):
            other = copy.deepcopy(scheduler)
            other.step(torch.ones(1, 1, 2, 2), other.timesteps[0], torch.ones(1, 1, 2, 2))
        assert (other.step_index, scheduler.step_index) == (1, None)
        assert owners == [other]

    def test_copied_state_put_back(self):
        scheduler = diffusers.EulerDiscreteScheduler()
        scheduler.set_timesteps(3)
        with listen_to(scheduler, "step", lambda *_: None):
            scheduler.__dict__.update(copy.deepcopy(scheduler.__dict__))
            scheduler.step(torch.ones(1, 1, 2, 2), scheduler.timesteps[0], torch.ones(1, 1, 2, 2))
            assert scheduler.step_index == 1
        assert "step" not in vars(scheduler)

    def test_nests_and_leaves_others_replacements(self, scheduler):
        calls = []
        scheduler.step = mine = lambda *args, **kwargs: calls.append("mine")
        with listen_to(scheduler, "step", lambda *_: calls.append("outer")), listen_to(scheduler, "step", lambda *_: calls.append("inner")):
            scheduler.step(1, 2, 3)
        assert calls == ["outer", "inner", "mine"]
        assert scheduler.step is mine


class Waits(TorchDispatchMode):
    """Counts what would wait for a device: reading a number, and shapes that depend on values."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name in ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero", "aten::masked_select"):
            self.seen.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "family", ["StableDiffusionPipeline", "StableDiffusionPAGPipeline", "DiTPipeline, doubled batch", "DiTPipeline, guidance off", "WanPipeline"]
)
def test_default_watch_waits_for_nothing(family):
    host = FAMILIES[family].build()
    host.run()  # what happens once
    with Waits() as plain:
        host.run()
    with memhook.watch(host.pipeline), Waits() as watched:
        host.run()
    assert watched.seen == plain.seen


def test_a_few_numbers_are_kept(host):
    with memhook.watch(host.pipeline) as trace:
        host.run(num_inference_steps=40)
    _ = trace.magnitudes
    gc.collect()
    kept = sum(value.numel() for row in trace._rows for value in vars(row).values() if isinstance(value, torch.Tensor))
    assert kept <= len(trace) * 16


def test_roles_are_decided_again_for_another_run():
    host = FAMILIES["StableDiffusionPAGPipeline"].build()
    with memhook.watch(host.pipeline) as trace:
        host.run(pag_scale=0.0)  # [uncond, cond]
        host.run(guidance_scale=0.0)  # [cond, perturbed]: as many predictions, another meaning
        host.run()
    guided, alone, both = (trace.has_guidance[start : start + STEPS] for start in (0, STEPS, 2 * STEPS))
    assert guided.all()
    assert not alone.any()
    assert both.all()


def test_equal_prompts_have_magnitude_zero_not_none(host):
    embeds = images.text()["prompt_embeds"]
    with memhook.watch(host.pipeline) as trace:
        host.run(negative_prompt_embeds=embeds)
    assert np.abs(trace.magnitudes).max() < 1e-4
    assert trace.roles == "assumed"


def test_some_prompts_equal_to_the_negative_one(host):
    text = images.text()
    negative = text["negative_prompt_embeds"].clone()
    negative[0] = text["prompt_embeds"][0]
    with memhook.watch(host.pipeline) as trace:
        host.run(negative_prompt_embeds=negative)
    assert trace.magnitudes[0, 0] < 1e-4 < trace.magnitudes[0, 1]
    assert trace.roles == "fitted"


def test_groups_and_scale(host):
    with memhook.watch(host.pipeline) as trace:
        host.run(num_images_per_prompt=2, guidance_scale=5.0)
    assert trace.groups.tolist() == [0, 0, 1, 1]
    np.testing.assert_allclose(trace.guidance_scale, 5.0, rtol=1e-3)


@pytest.mark.parametrize(("family", "scale"), [("StableDiffusionPAGPipeline", 7.5), ("StableDiffusion3Pipeline, skip-layer guidance", 7.0)])
def test_scale_with_more_predictions(family, scale):
    host = FAMILIES[family].build()
    with memhook.watch(host.pipeline) as trace:
        host.run()
    np.testing.assert_allclose(trace.guidance_scale, scale, rtol=1e-3)


def test_nan_is_reported_as_nan(host):
    with torch.no_grad():
        host.pipeline.unet.conv_out.bias.fill_(torch.nan)
    with memhook.watch(host.pipeline) as trace:
        host.run()
    assert trace.has_guidance.all()
    assert np.isnan(trace.magnitudes).all()


def test_half_precision():
    host = FAMILIES["StableDiffusionPipeline"].build()
    host.pipeline.to(torch.bfloat16)
    embeds = {name: value.bfloat16() for name, value in images.text().items()}
    with memhook.watch(host.pipeline) as trace:
        host.run(**embeds)
    assert trace.roles == "fitted"
    assert trace.magnitudes.dtype == np.float32


def test_pipeline_deleted_inside_the_block():
    host = FAMILIES["StableDiffusionPipeline"].build()
    with memhook.watch(host.pipeline) as trace:
        host.run()
        gone = weakref.ref(host.pipeline)
        del host
        gc.collect()
        assert gone() is None
    assert len(trace) == STEPS


def test_two_threads_see_their_own_runs(host):
    found = {}

    def work(scale):
        own = FAMILIES["StableDiffusionPipeline"].build().pipeline
        pipeline = diffusers.StableDiffusionPipeline(**{**own.components, "unet": host.pipeline.unet}, requires_safety_checker=False)
        pipeline.set_progress_bar_config(disable=True)
        with memhook.watch(pipeline) as trace:
            pipeline(**images.text(), num_inference_steps=STEPS, guidance_scale=scale, output_type="latent", generator=generator())
        found[scale] = trace

    threads = [threading.Thread(target=work, args=(scale,)) for scale in (3.0, 9.0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for scale, trace in found.items():
        assert trace.magnitudes.shape == (STEPS, 2)
        np.testing.assert_allclose(trace.guidance_scale, scale, rtol=1e-3)


def test_guiders_without_calls_that_are_seen_are_not_collected():
    """A guider's predictions are let go, also where no step ever asks for them."""
    watcher = types.SimpleNamespace(listening=True)
    run = Run(watcher, name="P", denoisers=[], schedulers=[], why_missing=lambda _: "", remedy="")
    given = []
    for _ in range(50):
        prediction = torch.ones(1)
        given.append(weakref.ref(prediction))
        run.on_guider(None, {"pred_cond": prediction})
    del prediction
    assert sum(reference() is not None for reference in given) <= MOST


def test_denoiser_without_steps_says_so(host):
    with memhook.watch(host.pipeline) as trace:
        host.pipeline.unet(torch.ones(1, 4, 8, 8), 1, torch.ones(1, 5, 8))
    with pytest.raises(memhook.NoGuidanceError, match=r"never stepped.*ModuleAdapter"):
        _ = trace.magnitudes


def test_predictions_changed_in_place_are_missing(host):
    def double(module, args, output):
        output[0].mul_(2)

    with memhook.watch(host.pipeline) as trace:
        host.pipeline.unet.register_forward_hook(double)  # after the watch's own hook
        host.run()
    with pytest.raises(memhook.NoGuidanceError, match="in place"):
        _ = trace.magnitudes
    with memhook.watch(host.pipeline, keep="calls") as kept:  # copies in time
        host.run()
    assert kept.has_guidance.all()


def test_pipelines_without_parts_are_refused():
    class Empty(diffusers.DiffusionPipeline):
        def __init__(self):
            super().__init__()

    with pytest.raises(memhook.NoAdapterError, match="no component that looks like a denoiser"), memhook.watch(Empty()):
        pass
