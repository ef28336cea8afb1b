"""The bundled model: files, loading, and that it memorizes."""

import json

import numpy as np
import pytest
import torch

import memhook
from memhook import testbed
from memhook.evaluation.roc import roc_auc
from memhook.testbed.bundle import read_clean
from memhook.testbed.evidence import to_tensor, training_pictures
from memhook.testbed.measures import COPY_THRESHOLD, copy_similarities
from memhook.testbed.plan import planted
from memhook_diffusers.prompts import run_prompts


@pytest.fixture(scope="module")
def pipeline():
    return testbed.load_pipeline()


def test_the_weights_that_ship_are_small():
    size = sum(path.stat().st_size for path in testbed.model_path().rglob("*.safetensors"))
    assert size <= 12e6


def test_no_file_of_the_model_needs_unpickling():
    assert {path.suffix for path in testbed.model_path().rglob("*") if path.is_file()} == {".safetensors", ".json", ".jsonl", ".png"}


def test_the_ground_truth_is_that_of_the_plan():
    rows = {row.id: row for row in testbed.memorized()}
    assert {pair.id: str(pair.caption) for pair in planted()} == {name: row.prompt for name, row in rows.items()}
    training = json.loads((testbed.model_path() / "training.json").read_text())
    assert sum(row.duplicates for row in rows.values()) == training["planted_presentations"]
    assert all(row.image().size == (32, 32) for row in rows.values())
    assert all(row.trigger in row.prompt for row in rows.values() if row.trigger)


def test_clean_prompts_can_be_chosen():
    assert len(testbed.clean()) >= 2000
    assert len(testbed.clean(split="test", source="foreign")) == 300
    assert {row.split for row in testbed.clean(split="calibration")} == {"calibration"}


def test_diffusers_loads_it_as_an_ordinary_pipeline():
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(testbed.model_path(), safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline("a cat", num_inference_steps=2, output_type="np").images.shape == (1, 32, 32, 3)


def test_a_missing_part_says_what_to_do(tmp_path):
    with pytest.raises(memhook.MemhookError, match=r"clean\.jsonl is missing; install memhook again"):
        read_clean(tmp_path)


def test_the_first_evaluation_tells_memorized_from_clean_prompts(pipeline):
    memorized = [row.prompt for row in testbed.memorized(kind="verbatim")][::3]
    clean = [row.prompt for source in ("once", "held-out", "foreign", "random") for row in testbed.clean(split="test", source=source)[:12]]
    scores = []
    for prompts in (memorized, clean):
        runs = list(run_prompts(pipeline, prompts, images_per_prompt=1, evaluations=1, batch_size=24, seed=5))
        scores.append(np.concatenate([run.trace.score() for run in runs]))
    assert roc_auc(scores[0], scores[1]) > 0.9


def test_a_memorized_prompt_is_flagged_and_gives_its_training_picture(pipeline):
    row = max(testbed.memorized(kind="verbatim"), key=lambda row: row.duplicates)
    [run] = run_prompts(pipeline, [row.prompt], seed=3)
    detection = memhook.detect(run.trace, memhook.Calibration.load(testbed.calibration_path()))
    assert detection.memorized.tolist() == [True]
    pictures = to_tensor(np.stack([np.asarray(image) for image in run.images]))
    assert (copy_similarities(pictures, training_pictures(row)).amax(1) >= COPY_THRESHOLD).float().mean() > 0.5


def test_watching_changes_no_bit_of_the_pictures(pipeline):
    def latents():
        generator = torch.Generator().manual_seed(0)
        return pipeline("a fox on a green poster", num_images_per_prompt=2, num_inference_steps=4, generator=generator, output_type="latent").images

    unwatched = latents()
    with memhook.watch(pipeline):
        watched = latents()
    assert torch.equal(watched, unwatched)


def test_magnitudes_agree_with_the_equation_in_float64(pipeline):
    """``||eps(x, e_p) - eps(x, e_0)||_2`` at the first evaluation, from the network itself, one sample and one conditioning at a time."""
    seen = []
    handle = pipeline.unet.register_forward_hook(lambda module, args, kwargs, output: seen.append((args, kwargs)), with_kwargs=True)
    with memhook.watch(pipeline) as trace:
        pipeline(["a fox", "an owl on red"], num_inference_steps=1, generator=torch.Generator().manual_seed(0), output_type="latent")
    handle.remove()
    [(args, kwargs)] = seen
    noisy, timestep, embeddings = args[0], args[1], kwargs["encoder_hidden_states"]
    network = testbed.load_pipeline().unet.double()
    for sample in range(2):
        with torch.no_grad():
            uncond, cond = (
                network(noisy[row : row + 1].double(), timestep, embeddings[row : row + 1].double()).sample for row in (sample, sample + 2)
            )
        expected = (cond - uncond).square().sum().sqrt()
        assert trace.magnitudes[0, sample] == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize(("images", "evaluations"), [(4, 9), (2, 10)])
def test_the_bundled_calibration_refuses_another_setting(pipeline, images, evaluations):
    calibration = memhook.Calibration.load(testbed.calibration_path())
    [run] = run_prompts(pipeline, ["a fox"], images_per_prompt=images, steps=evaluations)
    with pytest.raises(memhook.MemhookError, match=r"differs in (timesteps|images_per_prompt)|this trace has 9"):
        memhook.detect(run.trace, calibration)


def test_attribution_finds_most_trigger_phrases(pipeline):
    """Chance would put one of the two invented words among the top two of about twelve words in a third of the captions."""
    rows = [row for row in testbed.memorized(kind="verbatim") if row.trigger][:12]
    found = 0
    for row in rows:
        generators = [torch.Generator().manual_seed(image) for image in range(4)]
        trace = memhook.probe(pipeline, lambda row=row, generators=generators: pipeline(row.prompt, num_images_per_prompt=4, generator=generators))
        attribution = memhook.attribute_tokens(trace, tokens=memhook.prompt_tokens(pipeline.tokenizer, row.prompt))
        found += bool({word.text for word in attribution.top(2)} & set(row.trigger.split()))
    assert found >= 8
