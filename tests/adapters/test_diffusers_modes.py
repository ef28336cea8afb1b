"""Every way of running a pipeline that its users know: offloading, casting, compiling, caching, and runs that end badly."""

import contextlib
import gc

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from torch import nn

import memhook
from memhook.testing.state import changes, snapshot
from tests.adapters.zoo import FAMILIES, images
from tests.adapters.zoo.family import STEPS

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning:diffusers", "ignore::DeprecationWarning", "ignore:In CPU autocast", "ignore:Mismatch dtype"
)

HOSTS = {"one call": ("StableDiffusionPipeline", "unet"), "two calls": ("FluxPipeline, true_cfg_scale", "transformer")}
CPU = torch.device("cpu")


@pytest.fixture(params=HOSTS)
def host(request):
    """A pipeline of either kind of layout; ``host.name`` is its denoiser's."""
    family, name = HOSTS[request.param]
    built = FAMILIES[family].build()
    built.name = name
    return built


def denoiser(host):
    return getattr(host.pipeline, host.name)


@contextlib.contextmanager
def listening(host):
    """What the denoiser returns, seen by a hook of its own; yields a function that gives the magnitudes ``(s, b)``."""
    outputs = []
    handle = denoiser(host).register_forward_hook(lambda module, args, output: outputs.append(output[0].double()))
    try:
        yield lambda: np.array([pair[0].sub(pair[1]).flatten(1).norm(dim=1).tolist() for pair in pairs(host, outputs)])
    finally:
        handle.remove()


def pairs(host, outputs):
    if host.name == "unet":
        return [output.chunk(2) for output in outputs]
    return list(zip(outputs[::2], outputs[1::2], strict=True))


def check(host, *, replay=True, settled=True):
    """Output, numbers, roles and replays of a watched run, whatever was done to the pipeline before.

    Not ``settled`` is a pipeline that puts its own hooks up anew after each run.
    """
    plain = host.run()
    before = snapshot(host.pipeline)
    with listening(host) as truth, memhook.watch(host.pipeline) as trace:
        assert torch.equal(host.run(), plain)
    np.testing.assert_allclose(trace.magnitudes, truth(), rtol=1e-4)
    assert trace.roles == "fitted"
    with memhook.watch(host.pipeline, keep="calls") as kept:
        assert torch.equal(host.run(), plain)
    np.testing.assert_array_equal(kept.magnitudes, trace.magnitudes)
    assert not settled or changes(before, snapshot(host.pipeline)) == []
    return gradient(kept.evaluations[1]) if replay else kept


def gradient(evaluation):
    embedding = evaluation.embedding.clone().requires_grad_()
    value = evaluation.objective(embedding)
    captured = memhook.magnitude(evaluation.pred_cond, evaluation.pred_uncond)
    torch.testing.assert_close(value.detach(), captured, rtol=1e-3, atol=1e-5, check_dtype=False)
    (found,) = torch.autograd.grad(value.sum(), embedding)
    assert (found.flatten(1).norm(dim=1) > 0).all()
    return found


def offload_sequentially(host):
    # enable_sequential_cpu_offload does this, for a device with a number: on "cpu:0" accelerate 1.15 loses that its copies are parameters.
    for module in host.pipeline.components.values():
        if isinstance(module, nn.Module):
            cpu_offload(module, execution_device=CPU, offload_buffers=True)
    assert {parameter.device.type for parameter in denoiser(host).parameters()} == {"meta"}


OFFLOADS = {
    "model": lambda host: host.pipeline.enable_model_cpu_offload(device="cpu"),
    "sequential": offload_sequentially,
    "groups of leaves": lambda host: denoiser(host).enable_group_offload(CPU, CPU, offload_type="leaf_level"),
    "groups of blocks": lambda host: denoiser(host).enable_group_offload(CPU, CPU, offload_type="block_level", num_blocks_per_group=1),
}


@pytest.mark.parametrize("kind", OFFLOADS)
def test_offloading(host, kind):
    """The libraries' own hooks, which move weights before and after each call, here between the CPU and itself (or nothing at all)."""
    expected = check(host)
    OFFLOADS[kind](host)
    torch.testing.assert_close(check(host, settled=kind != "model"), expected)
    assert not any(denoiser(host)._forward_hooks)
    assert all(parameter.requires_grad for parameter in denoiser(host).parameters())


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_layerwise_casting(host, storage):
    denoiser(host).enable_layerwise_casting(storage_dtype=storage, compute_dtype=torch.float32)
    assert storage in {parameter.dtype for parameter in denoiser(host).parameters()}
    check(host)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo reads it of every input, torch 2.13
@pytest.mark.parametrize(("kind", "how"), [("one call", "outer"), ("two calls", "in place")])  # compiling takes seconds
def test_compiling(kind, how):
    torch._dynamo.reset()
    family, name = HOSTS[kind]
    host = FAMILIES[family].build()
    host.name = name
    with memhook.watch(host.pipeline) as expected:
        plain = host.run()
    if how == "outer":
        setattr(host.pipeline, name, torch.compile(denoiser(host), backend="eager", fullgraph=True))
    else:
        denoiser(host).compile(backend="eager", fullgraph=True)
    host.run()  # compiled before the block, as docs/index.md says
    with listening(host) as truth, memhook.watch(host.pipeline) as trace:
        assert torch.equal(host.run(), plain)
    np.testing.assert_array_equal(trace.magnitudes, expected.magnitudes)
    np.testing.assert_allclose(trace.magnitudes, truth(), rtol=1e-4)
    assert trace.roles == "fitted"
    repaired = mitigated(host)
    torch._dynamo.reset()
    assert torch.equal(repaired, mitigated(FAMILIES[family].build()))


def mitigated(host):
    """A run whose louder prompt is brought halfway down to the other."""
    with memhook.watch(host.pipeline) as trace:
        host.run()
    with memhook.mitigate(host.pipeline, target_magnitude=float(trace.magnitudes[0].mean()), fixed_tokens=0) as report:
        latents = host.run()[0]
    assert report.substituted == STEPS - 1
    return torch.as_tensor(np.asarray(latents))


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.enable_grad, lambda: torch.autocast("cpu", dtype=torch.bfloat16)])
def test_modes_around_the_run(host, mode):
    with mode():
        plain = host.run()
    with mode(), listening(host) as truth, memhook.watch(host.pipeline, keep="calls") as trace:
        watched = host.run()
    assert torch.equal(plain, watched)
    np.testing.assert_allclose(trace.magnitudes, truth(), rtol=1e-4)
    assert trace.roles == "fitted"
    gradient(trace.evaluations[0])
    with mode(), torch.inference_mode(mode=False), torch.enable_grad():
        gradient(trace.evaluations[1])


def test_first_block_cache_that_skips_nothing():
    """The whole network ran for every prediction, so each can be computed again."""
    kept = check(_with_first_block_cache(1e-9), replay=False)
    for evaluation in kept.evaluations:
        gradient(evaluation)


def test_first_block_cache_that_skips_nearly_all():
    """Predictions are measured as they are. Those that were not computed cannot be computed again, and asking says so."""
    first, *skipped = check(_with_first_block_cache(10.0), replay=False).evaluations
    gradient(first)
    for evaluation in skipped:
        with pytest.raises(memhook.ReplayError, match=r"\w+ \w+ \w+"):
            evaluation.objective(evaluation.embedding)


def _with_first_block_cache(threshold):
    host = FAMILIES["FluxPipeline, true_cfg_scale"].build()
    host.name = "transformer"
    denoiser(host).enable_cache(diffusers.FirstBlockCacheConfig(threshold=threshold))
    return host


def test_several_prompts_and_images():
    host = FAMILIES["StableDiffusionPipeline"].build()
    host.name = "unet"
    with listening(host) as truth, memhook.watch(host.pipeline, keep="calls") as trace:
        host.run(num_images_per_prompt=3)
    assert trace.magnitudes.shape == (STEPS, 6)
    np.testing.assert_allclose(trace.magnitudes, truth(), rtol=1e-4)
    assert trace.groups.tolist() == [0, 0, 0, 1, 1, 1]
    gradient(trace.evaluations[0])


def test_data_parallel_is_refused(host):
    setattr(host.pipeline, host.name, nn.DataParallel(denoiser(host)))
    with pytest.raises(memhook.MemhookError, match=rf"DataParallel.*other threads.*{host.name} = .*\.module"), memhook.watch(host.pipeline):
        pass


# ---- replays while the run goes on


def test_a_replay_inside_the_run_does_not_disturb_it(host):
    plain, values = host.run(), []
    with memhook.watch(host.pipeline, on_evaluation=lambda evaluation: values.append(evaluation.objective(evaluation.embedding).detach())) as trace:
        watched = host.run()
    assert torch.equal(plain, watched)
    assert len(trace) == STEPS
    np.testing.assert_allclose(torch.stack(values), trace.magnitudes, rtol=1e-3)


def test_calls_of_a_deleted_pipeline_cannot_be_replayed(host):
    with memhook.watch(host.pipeline, keep="calls") as trace:
        host.run()
    evaluation, host.pipeline, host.run = trace.evaluations[0], None, None
    gc.collect()
    with pytest.raises(memhook.ReplayError, match="deleted"):
        evaluation.objective(evaluation.embedding)


# ---- runs that end badly


class Interruption(BaseException):
    pass


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, Interruption])
def test_a_run_that_is_interrupted(host, error):
    """The numbers so far are there, nothing stays behind, and the next run is as if nothing had been."""
    before, plain = snapshot(host.pipeline), host.run()

    def end(pipeline, step, timestep, values):
        if step == 1:
            raise error
        return values

    with listening(host) as truth, pytest.raises(error), memhook.watch(host.pipeline) as trace:
        host.run(callback_on_step_end=end)
    np.testing.assert_allclose(trace.magnitudes, truth(), rtol=1e-4)
    assert len(trace) == 2
    assert changes(before, snapshot(host.pipeline)) == []
    with memhook.watch(host.pipeline) as again:
        assert torch.equal(host.run(), plain)
    assert len(again) == STEPS


@pytest.mark.parametrize("keep", ["scalars", "calls"])
@pytest.mark.parametrize("calls", [1, 2, 3])
def test_a_run_that_breaks_off_before_its_step_does_not_reach_into_the_next(host, keep, calls):
    """The predictions of a step that never came are not those of the retry's first."""
    with memhook.watch(host.pipeline) as alone:
        host.run()
    left = [calls]

    def fail(*_):
        left[0] -= 1
        if left[0] == 0:
            raise ValueError("out of memory")

    handle = denoiser(host).register_forward_hook(fail)
    with memhook.watch(host.pipeline, keep=keep) as trace:
        handle.remove()
        handle = denoiser(host).register_forward_hook(fail)  # behind the watch's own
        with pytest.raises(ValueError, match="out of memory"):
            host.run()
        handle.remove()
        host.run()
    stepped = (calls - 1) if host.name == "unet" else (calls - 1) // 2
    assert len(trace) == stepped + STEPS
    np.testing.assert_array_equal(trace.magnitudes[stepped:], alone.magnitudes)
    assert trace.roles == "fitted"


def test_nor_where_only_the_convention_tells():
    """Equal prompts leave nothing to fit, and the leftover would make three predictions or more of two."""
    host = FAMILIES["StableDiffusionPipeline"].build()
    same = {"negative_prompt_embeds": images.text()["prompt_embeds"]}

    def fail(*_):
        raise ValueError("out of memory")

    with memhook.watch(host.pipeline) as trace:
        handle = host.pipeline.unet.register_forward_hook(fail)
        with pytest.raises(ValueError, match="out of memory"):
            host.run(**same)
        handle.remove()
        host.run(**same)
    assert trace.has_guidance.all()
    assert np.abs(trace.magnitudes).max() < 1e-4


def test_two_runs_in_one_block(host):
    singles = []
    for scale in (3.0, 9.0):
        with memhook.watch(host.pipeline) as trace:
            host.run(**guided(host, scale))
        singles.append(trace)
    with memhook.watch(host.pipeline, keep="calls") as both:
        for scale in (3.0, 9.0):
            host.run(**guided(host, scale))
    assert [len(run) for run in both.runs] == [STEPS, STEPS]
    for run, single in zip(both.runs, singles, strict=True):
        np.testing.assert_array_equal(run.magnitudes, single.magnitudes)
    with pytest.raises(memhook.MemhookError, match="2 runs"):
        both.score()
    gradient(both.evaluations[-1])


def guided(host, scale):
    return {"guidance_scale" if host.name == "unet" else "true_cfg_scale": scale}


def test_runs_of_other_sizes_in_one_block():
    host = FAMILIES["StableDiffusionPipeline"].build()
    one = {name: value[:1] for name, value in images.text().items()}
    with memhook.watch(host.pipeline) as trace:
        host.run()
        host.run(**one, num_inference_steps=2)
        host.run(num_images_per_prompt=2)
    assert [run.magnitudes.shape for run in trace.runs] == [(STEPS, 2), (2, 1), (STEPS, 4)]


def test_hooks_after_many_watches(host):
    before = snapshot(host.pipeline)
    for number in range(500):
        with contextlib.suppress(Interruption), memhook.watch(host.pipeline), memhook.watch(host.pipeline, keep="calls"):
            if number % 3 == 0:
                raise Interruption
    assert changes(before, snapshot(host.pipeline)) == []
