"""Corners of diffusers: what a guard, a replay and the trace make of them."""

import numpy as np
import pytest
import torch

import memhook
from memhook.testing.state import changes, snapshot
from tests.adapters.zoo import FAMILIES
from tests.adapters.zoo.family import STEPS

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning:diffusers", "ignore::DeprecationWarning", "ignore:In CPU autocast", "ignore:Mismatch dtype"
)


def latents(result):
    found = result[0] if isinstance(result, (list, tuple)) else result
    return found if isinstance(found, torch.Tensor) else torch.as_tensor(np.asarray(found))


def guarded(host, *, toward=0.1):
    """A run of which only the loudest sample was mitigated, against the unguarded one."""
    before = snapshot(host.pipeline)
    with memhook.watch(host.pipeline) as trace:
        plain = latents(host.run())
    first = trace.magnitudes[0]
    target = float(first.max() - toward * (first.max() - first.min() if len(first) > 1 else first.max()))
    with memhook.mitigate(host.pipeline, target_magnitude=target, fixed_tokens=0) as report:
        changed = latents(host.run())
    assert changes(before, snapshot(host.pipeline)) == []
    assert report.flagged.sum() == 1
    assert report.optimized.converged.all()
    return plain, changed, report


@pytest.mark.parametrize("name", [name for name in FAMILIES if "a time for every" in name])
def test_the_time_of_a_run_is_that_of_what_is_denoised(name):
    """The picture that a video starts from has a time of its own, which stands still."""
    host = FAMILIES[name].build()
    with memhook.watch(host.pipeline) as trace:
        host.run()
    assert (np.diff(trace.timesteps) < 0).all()
    assert len(trace.runs) == 1
    assert (trace.score() > 0).all()
    if trace.roles == "fitted":
        _, _, report = guarded(host)
        assert report.substituted == STEPS - 1
    else:
        with pytest.warns(UserWarning, match="cannot be repaired"):
            guarded(host)


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "FluxPipeline, true_cfg_scale", "StableDiffusionPipeline, guidance_rescale"])
def test_a_guard_under_autocast(name):
    """What was combined is taken apart in full precision, whatever mode the host runs in: no warning, and the flagged sample changes."""
    host = FAMILIES[name].build()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain, changed, report = guarded(host)
    loud = int(report.flagged.argmax())
    assert torch.equal(changed[1 - loud], plain[1 - loud])
    assert not torch.equal(changed[loud], plain[loud])


@pytest.mark.parametrize("prompts", [1, 2, 3])
def test_a_list_with_a_tensor_for_each_row(prompts):
    """As many rows as the list is long, and not as many as its tensors have channels (4, as with two prompts)."""
    host = FAMILIES["ZImagePipeline, negated, a list of embeddings"].build()
    texts = {
        name: [torch.randn(5, 8, generator=torch.Generator().manual_seed(seed + number)) for number in range(prompts)]
        for name, seed in (("prompt_embeds", 0), ("negative_prompt_embeds", 10))
    }
    run = host.run
    host.run = lambda: run(**texts)
    plain, changed, report = guarded(host)
    assert report.substituted == STEPS - 1
    loud = int(report.flagged.argmax())
    assert [torch.equal(changed[number], plain[number]) for number in range(prompts)] == [number != loud for number in range(prompts)]
    with memhook.watch(host.pipeline, keep="calls") as trace:
        host.run()
    evaluation = trace.evaluations[1]
    torch.testing.assert_close(evaluation.objective(evaluation.embedding).detach(), torch.from_numpy(trace.magnitudes[1]))
