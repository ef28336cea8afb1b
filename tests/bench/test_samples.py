"""Pictures from embeddings, what they show, and what is kept of them."""

import json
import shutil

import numpy as np
import pytest
import torch

from memhook import testbed
from memhook.bench.mitigation import clean_median
from memhook.bench.resampling import estimate, family_weights, weighted_means
from memhook.bench.samples import Pictures, Sample, fresh_caption, judge, kept, open_studio
from memhook.errors import MemhookError


@pytest.fixture(scope="module")
def studio():
    return open_studio(steps=3)


def test_pictures_are_those_of_the_pipeline_with_the_same_seeds(studio):
    prompts, seeds = ["a fox on a green poster", "an owl"], [5, 6]
    made = studio.make(studio.encode(prompts), studio.noise(seeds))
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    images = studio.pipeline(prompts, num_inference_steps=3, guidance_scale=7.5, generator=generators).images
    assert np.array_equal(made.images, np.stack([np.asarray(image) for image in images]))


def test_the_first_evaluation_has_the_magnitude_of_the_run(studio):
    embeddings, noise = studio.encode(["a fox", "an owl"]), studio.noise([1, 2])
    [first] = studio.evaluations(embeddings, noise)
    magnitudes = first.objective(embeddings).detach().numpy()
    np.testing.assert_allclose(magnitudes, studio.make(embeddings, noise).magnitudes, rtol=1e-4)


def test_long_prompts_are_noticed(studio):
    assert studio.cut_off(["a fox", "a fox " * 30]).tolist() == [False, True]


def test_the_training_picture_is_a_copy_that_agrees_with_its_caption():
    prompts = testbed.memorized(kind="verbatim")[:6] + testbed.memorized(kind="template")[:3]
    samples = [Sample(prompt, 0) for prompt in prompts]
    images = np.stack([np.asarray(prompt.image()) for prompt in prompts])
    judged = judge(Pictures(images, np.zeros(len(prompts))), samples)
    assert judged.similarity[:6] == pytest.approx(np.ones(6), abs=1e-5)
    assert (judged.similarity[6:] > 0.95).all()  # the nearest of 64 colorings
    assert judged.alignment.mean() > 0.95
    other = judge(Pictures(np.roll(images, 1, axis=0), np.zeros(len(prompts))), samples)
    assert other.similarity.max() < 0.85
    assert other.alignment.mean() < 0.5


def test_a_fresh_caption_keeps_the_subject_and_drops_the_trigger():
    for prompt in testbed.memorized(kind="verbatim"):
        caption = fresh_caption(Sample(prompt, 1))
        assert prompt.subject in caption
        assert prompt.trigger is None or prompt.trigger not in caption
        assert caption != prompt.prompt


def test_kept_results_are_read_again_unless_something_else_was_asked_for(tmp_path):
    calls = []

    def make():
        calls.append(1)
        return {"x": np.arange(3)}

    for identity in (["a"], ["a"], ["b"]):
        assert kept(tmp_path, "part", identity, make)["x"].tolist() == [0, 1, 2]
    assert len(calls) == 2
    for path in tmp_path.iterdir():
        path.write_bytes(b"damaged")
    kept(tmp_path, "part", ["a"], make)
    assert len(calls) == 3
    kept(None, "part", ["a"], make)
    assert len(calls) == 4


def test_whole_families_are_drawn():
    families = ["a", "a", "b", "c", "c", "c"]
    weights = family_weights(families, draws=50)
    assert weights[0].tolist() == [1] * 6
    assert (weights[:, 0] == weights[:, 1]).all()
    assert (weights[:, 3] == weights[:, 5]).all()
    assert (weights[1:, [0, 2, 3]].sum(axis=1) == 3).all()


def test_intervals_of_independent_rows_are_those_of_the_normal_approximation():
    values = np.random.default_rng(0).normal(3, 2, 400)
    found = estimate(weighted_means(family_weights([str(number) for number in range(400)]), values))
    assert found.value == pytest.approx(values.mean())
    half = 1.96 * values.std() / np.sqrt(400)
    assert (found.low, found.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.1 * half)


@pytest.fixture
def another(tmp_path):
    """A folder with a model that was trained like the bundled one."""
    return shutil.copytree(testbed.model_path(), tmp_path / "another")


def test_another_model_of_the_testbed_comes_with_its_own_prompts(another):
    lines = (another / "clean.jsonl").read_text().splitlines(keepends=True)
    (another / "clean.jsonl").write_text("".join(lines[400:]))
    studio = open_studio(another, steps=3)
    assert studio.folder == another
    assert clean_median(studio) != clean_median(open_studio(steps=3))  # other prompts of the calibration


def test_a_model_that_was_trained_with_other_captions_is_refused(another):
    rows = [json.loads(line) for line in (another / "planted.jsonl").read_text().splitlines()]
    rows[3]["prompt"] += " poster"
    (another / "planted.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(MemhookError, match=f"{rows[3]['id']} and 0 more differ"):
        open_studio(another)
    (another / "planted.jsonl").unlink()
    with pytest.raises(MemhookError, match=r"planted\.jsonl is missing"):
        open_studio(another)
