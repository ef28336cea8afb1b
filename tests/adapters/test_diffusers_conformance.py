"""The diffusers adapter passes the public conformance suite, in both kinds of layout and where nothing can be replayed."""

import pytest
import torch

from memhook.testing import AdapterConformance
from tests.adapters.zoo import FAMILIES
from tests.adapters.zoo.family import STEPS, randn

WORDS = {"": 0, "a lighthouse at dusk": 1, "two red apples": 2}
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:diffusers")


class Conformance(AdapterConformance):  # not collected: its name does not start with Test
    evaluations = STEPS
    embedding = randn(3, 5, 8, seed=4)
    noise = randn(1, 4, 8, 8, seed=5)

    @pytest.fixture
    def target(self):
        return FAMILIES[self.family].build().pipeline

    @pytest.fixture
    def run(self, target):
        def run(prompts, *, guided=True):
            cond = self.embedding[[WORDS[prompt] for prompt in prompts]]
            return self.call(target, cond, self.embedding[:1].expand_as(cond), guided=guided)

        return run

    def arguments(self, cond):
        latents = self.noise.expand(len(cond), -1, -1, -1).clone()
        return {"latents": latents, "num_inference_steps": STEPS, "output_type": "latent"}

    def call(self, pipeline, cond, uncond, *, guided):
        scale = 7.5 if guided else 1.0
        return pipeline(prompt_embeds=cond, negative_prompt_embeds=uncond, guidance_scale=scale, **self.arguments(cond))[0]


class TestBatched(Conformance):
    family = "StableDiffusionPipeline"
    imports = ("memhook_diffusers", "diffusers")


class TestThreePredictions(Conformance):
    family = "StableDiffusionPAGPipeline"


class TestSkippedLayers(Conformance):
    family = "StableDiffusion3Pipeline"

    def call(self, pipeline, cond, uncond, *, guided):
        pooled = {"pooled_prompt_embeds": torch.zeros(len(cond), 6), "negative_pooled_prompt_embeds": torch.zeros(len(cond), 6)}
        skip = {"skip_guidance_layers": [0], "skip_layer_guidance_start": 0.1, "skip_layer_guidance_stop": 0.9} if guided else {}
        arguments = {**self.arguments(cond), **pooled, **skip}
        return pipeline(prompt_embeds=cond, negative_prompt_embeds=uncond, guidance_scale=7.5 if guided else 1.0, **arguments)[0]


class TestTwoCalls(Conformance):
    family = "FluxPipeline, true_cfg_scale"
    noise = randn(1, 4, 16, seed=5)

    def call(self, pipeline, cond, uncond, *, guided):
        arguments = {**self.arguments(cond), "latents": self.noise.expand(len(cond), -1, -1).clone(), "height": 32, "width": 32}
        pooled = {"pooled_prompt_embeds": torch.zeros(len(cond), 6), "negative_pooled_prompt_embeds": torch.zeros(len(cond), 6)}
        scale = 4.0 if guided else 1.0
        return pipeline(prompt_embeds=cond, negative_prompt_embeds=uncond, true_cfg_scale=scale, **pooled, **arguments)[0]


class TestPooledText(Conformance):
    family = "DiTPipeline, doubled batch"
    replayable = False

    def call(self, pipeline, cond, uncond, *, guided):
        classes = [int(self.embedding.eq(row).flatten(1).all(1).nonzero()[0, 0]) for row in cond]
        # The pipeline draws its own noise: the same for every sample, from a generator per sample.
        generators = [torch.Generator().manual_seed(0) for _ in classes]
        return torch.as_tensor(
            pipeline(classes, num_inference_steps=STEPS, guidance_scale=4.0 if guided else 1.0, generator=generators, output_type="np")[0]
        )
