"""Fixtures that more than one file of the core's tests uses."""

import pytest
import torch
from hypothesis import settings

import memhook
from memhook.testing import sample, tiny_unet

torch.set_num_threads(1)
# Examples are the same in every run, and no example fails for being slow on a busy machine.
settings.register_profile("memhook", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("memhook")

LAYOUTS = ("uncond_first", "cond_first", "two_calls_uncond_first", "two_calls_cond_first")


@pytest.fixture
def unet():
    return tiny_unet()


@pytest.fixture(params=LAYOUTS)
def layout(request):
    """The four ways in which a guided evaluation is laid out."""
    return request.param


@pytest.fixture
def watched():
    """``watched(unet, layout, **options of sample) -> Trace``: one run under a watch with its module adapter."""

    def run(unet, layout="uncond_first", *, keep="scalars", declared=None, **options):
        adapter = memhook.ModuleAdapter(unet, layout=declared or layout)
        with memhook.watch(unet, adapter=adapter, keep=keep) as trace:
            sample(unet, layout=layout, **options)
        return trace

    return run
