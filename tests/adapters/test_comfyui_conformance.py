"""The conformance suite on ComfyUI's shape of a host, under inference_mode as ComfyUI runs it."""

import pytest
import torch

from memhook.testing import AdapterConformance
from tests.adapters.comfy import CFGGuider, encode, make_patcher, make_sampler
from tests.adapters.comfy.model import CONST, V_PREDICTION


class Conformance(AdapterConformance):
    __test__ = False  # the suite itself; see below

    evaluations = 4

    @pytest.fixture
    def run(self, target):
        def run(prompts, *, guided=True):
            guider = CFGGuider(target)
            guider.set_conds(encode(prompts), encode(""))
            guider.set_cfg(7.5 if guided else 1.0)
            noise = torch.ones(len(prompts), 4, 8, 8)
            with torch.inference_mode():
                return guider.sample(noise, torch.zeros_like(noise), make_sampler(), torch.tensor([0.9, 0.5, 0.2, 0.1, 0.0]), seed=1)

        return run


class TestModelPatcher(Conformance):
    __test__ = True
    imports = ("memhook_comfyui", "comfy")

    @pytest.fixture
    def target(self):
        return make_patcher()


class TestMadeByANode(Conformance):
    __test__ = True
    """Loaded by a node: all its weights are inference tensors for good."""

    @pytest.fixture
    def target(self):
        with torch.inference_mode():
            return make_patcher(V_PREDICTION)


class TestFlow(Conformance):
    __test__ = True

    @pytest.fixture
    def target(self):
        return make_patcher(CONST)


class TestLowMemory(Conformance):
    __test__ = True
    """One row in a call."""

    @pytest.fixture
    def target(self):
        patcher = make_patcher()
        patcher.model.free = 1
        return patcher


class TestOldVersion(Conformance):
    __test__ = True
    replayable = False

    @pytest.fixture
    def target(self):
        return make_patcher(old=True)
