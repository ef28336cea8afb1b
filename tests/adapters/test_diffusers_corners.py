"""Corners of diffusers: what a guard, a replay and the trace make of them."""

import numpy as np
import pytest
import torch

import memhook
from memhook.testing.state import changes, snapshot
from tests.adapters.zoo import FAMILIES
from tests.adapters.zoo.family import STEPS

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:diffusers", "ignore::DeprecationWarning", "ignore:In CPU autocast")


def latents(result):
    return torch.as_tensor(np.asarray(result[0] if isinstance(result, (list, tuple)) else result))


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
