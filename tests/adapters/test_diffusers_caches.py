"""diffusers' caches: watching disturbs nothing, and a replay computes everything anew and leaves them as they were, or says that it cannot."""

import re

import numpy as np
import pytest
import torch

import memhook
from memhook.testing.state import changes, snapshot
from tests.adapters.zoo import FAMILIES
from tests.adapters.zoo.family import STEPS

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:diffusers", "ignore::DeprecationWarning", "ignore:torch.meshgrid")


def attention_broadcast(_):
    everywhere = {
        f"{kind}_attention_{name}": value
        for kind in ("spatial", "temporal", "cross")
        for name, value in (("block_skip_range", 2), ("timestep_skip_range", (-1, 2000)), ("block_identifiers", ("blocks",)))
    }
    return diffusers.PyramidAttentionBroadcastConfig(current_timestep_callback=lambda: 500, **everywhere)


def faster_cache(host):
    everywhere = {f"{name}_timestep_skip_range": (-1, 2000) for name in ("spatial_attention", "temporal_attention", "unconditional_batch")}
    return diffusers.FasterCacheConfig(
        spatial_attention_block_skip_range=2, temporal_attention_block_skip_range=2, unconditional_batch_skip_range=3,
        current_timestep_callback=lambda: 500, attention_weight_callback=lambda _: 0.3, **everywhere,
        tensor_format="BFCHW" if "CogVideoX" in host else "BCFHW",
    )  # fmt: skip


CACHES = {
    "pyramid attention broadcast": attention_broadcast,
    "FasterCache": faster_cache,
    "first block": lambda _: diffusers.FirstBlockCacheConfig(threshold=10.0),
    "TaylorSeer": lambda _: diffusers.TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=1, taylor_factors_dtype=torch.float32),
    "MagCache": lambda _: diffusers.MagCacheConfig(threshold=10.0, retention_ratio=0.0, num_inference_steps=STEPS, mag_ratios=[1.0] * (2 * STEPS)),
}
FAMILY = {"Flux": "FluxPipeline, true_cfg_scale", "Wan": "WanPipeline", "CogVideoX": "CogVideoXPipeline"}  # two calls, two calls, one call
# Each host with the caches that diffusers itself can run on it (0.42.1, with the zoo's two blocks).
PAIRS = [
    ("Flux", "pyramid attention broadcast"), ("Flux", "first block"), ("Flux", "TaylorSeer"), ("Flux", "MagCache"),
    ("Wan", "pyramid attention broadcast"), ("Wan", "FasterCache"), ("Wan", "TaylorSeer"), ("Wan", "MagCache"),
    ("CogVideoX", "pyramid attention broadcast"), ("CogVideoX", "FasterCache"), ("CogVideoX", "TaylorSeer"), ("CogVideoX", "MagCache"),
]  # fmt: skip


@pytest.fixture(params=PAIRS, ids=" with ".join)
def host(request):
    name, cache = request.param
    built = FAMILIES[FAMILY[name]].build()
    built.pipeline.transformer.enable_cache(CACHES[cache](name))
    built.plain = built.run()
    return built


def test_watching_disturbs_nothing(host):
    before = snapshot(host.pipeline.transformer)
    with memhook.watch(host.pipeline) as trace:
        assert torch.equal(host.run(), host.plain)
    assert len(trace) >= 1
    assert torch.equal(host.run(), host.plain)
    assert not changes(before, snapshot(host.pipeline.transformer))


def test_a_replay_in_flight_disturbs_nothing_and_gives_the_captured_number_or_says_why_not(host):
    seen = []

    def look(evaluation):
        if evaluation.pred_uncond is None:
            return
        captured = memhook.magnitude(evaluation.pred_cond, evaluation.pred_uncond)
        try:
            seen.append(float((evaluation.objective(evaluation.embedding).detach() - captured).abs().max()))
        except memhook.ReplayError as error:
            assert len(str(error).split()) > 8  # noqa: PT017 -- a sentence, where one is owed
            seen.append(None)

    with memhook.watch(host.pipeline, on_evaluation=look):
        assert torch.equal(host.run(), host.plain)
    assert seen
    assert seen[0] is not None  # a cache is empty before the first call, so the first evaluation was computed
    np.testing.assert_allclose([value for value in seen if value is not None], 0, atol=2e-3)
    assert torch.equal(host.run(), host.plain)


def test_a_replay_after_the_run_is_checked_at_every_evaluation(host):
    with memhook.watch(host.pipeline, keep="calls") as trace:
        host.run()
    moved = 0
    for evaluation in trace.evaluations:
        if evaluation.pred_uncond is None:
            continue
        try:
            evaluation.objective(evaluation.embedding * 1.01)  # not the captured one: the check comes first, by itself
        except memhook.ReplayError as error:
            assert re.search("another prediction|could not be run again", str(error))  # noqa: PT017 -- some evaluations can be replayed
        else:
            moved += 1
    assert moved >= 1


@pytest.mark.filterwarnings("ignore:the samples .* did not come down", "ignore:.*cannot be repaired after the fact")
def test_a_guard_leaves_unflagged_samples_bit_identical_and_changes_the_flagged_one(host):
    with memhook.watch(host.pipeline) as trace:
        host.run()
    scores = trace.score(first=1)
    if scores.min() == scores.max():  # attention broadcast from Flux's conditional call to its unconditional one: no threshold lies between
        assert scores.max() == 0
        return
    flagged = int(scores.argmax())
    calibration = memhook.calibrate(np.full(100, scores.mean())).using(first=1)
    with memhook.guard(host.pipeline, calibration, fpr=0.05, action="mitigate", target_magnitude=float(scores.min())) as guard:
        guarded = host.run()
    assert guard.detection.memorized.tolist() == [index == flagged for index in range(2)]
    assert torch.equal(guarded[1 - flagged], host.plain[1 - flagged])
    assert not torch.equal(guarded[flagged], host.plain[flagged])
    assert torch.equal(host.run(), host.plain)


# ---- helpers that replace `forward`, as DeepCache does


class BlockCache:
    """Computes the middle block of a UNet at every other step, and gives its kept output at the steps between."""

    def __init__(self, pipeline):
        self.pipeline, self.kept, self.step = pipeline, {}, 0
        unet = pipeline.unet
        own, middle = unet.forward, unet.mid_block.forward

        def forward(*args, **kwargs):
            self.step = list(pipeline.scheduler.timesteps).index(args[1])
            return own(*args, **kwargs)

        def block(*args, **kwargs):
            if self.step % 2 == 0:
                self.kept["middle"] = middle(*args, **kwargs)
            return self.kept["middle"]

        unet.forward, unet.mid_block.forward = forward, block


@pytest.fixture
def deep():
    built = FAMILIES["StableDiffusionPipeline"].build()
    built.helper = BlockCache(built.pipeline)
    built.plain = built.run()
    return built


def test_a_helper_of_replaced_forwards_keeps_what_it_kept(deep):
    errors = []

    def look(evaluation):
        kept = dict(deep.helper.kept)
        try:
            evaluation.objective(evaluation.embedding * 1.01)
        except memhook.ReplayError as error:
            errors.append(str(error))
        assert deep.helper.kept.keys() == kept.keys()
        assert all(deep.helper.kept[name] is value for name, value in kept.items())

    with memhook.watch(deep.pipeline, on_evaluation=look) as trace:
        assert torch.equal(deep.run(), deep.plain)
    assert len(trace) == STEPS
    assert len(errors) in (0, STEPS // 2)  # what was not computed cannot be computed again, unless the whole batch is: it fits what was kept
    assert all("could not be run again" in error or "another prediction" in error for error in errors)


@pytest.mark.filterwarnings("ignore:the samples .* did not come down")
def test_a_guard_works_beside_such_a_helper(deep):
    with memhook.watch(deep.pipeline) as trace:
        deep.run()
    scores = trace.score(first=1)
    calibration = memhook.calibrate(np.full(100, scores.mean())).using(first=1)
    with memhook.guard(deep.pipeline, calibration, fpr=0.05, target_magnitude=float(scores.min())):
        guarded = deep.run()
    assert torch.equal(guarded[scores.argmin()], deep.plain[scores.argmin()])
    assert not torch.equal(guarded[scores.argmax()], deep.plain[scores.argmax()])
    assert torch.equal(deep.run(), deep.plain)
