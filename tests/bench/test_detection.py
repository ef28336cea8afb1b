"""The detection benchmark: densities and figures against direct computation, and the command from end to end."""

import csv
import json

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from memhook import testbed
from memhook.bench.detection.report import Options, markdown, run_detection_bench
from memhook.bench.detection.rows import detection_rows
from memhook.bench.detection.sampled import Labeled, Sampled, densities, early_steps, group_sizes
from memhook.bench.detection.timing import Seconds
from memhook.bench.sampling import Sampling
from memhook.bench.written import read_page
from memhook.cli.app import app
from memhook.errors import MemhookError
from memhook.evaluation.roc import roc_auc, tpr_at_fpr
from memhook.scores.density import descriptor_density, pixel_density
from memhook_diffusers.previews import clean_estimate, clean_estimates
from memhook_diffusers.prompts import run_prompts


@pytest.fixture(scope="module")
def sampled():
    """40 prompts with 8 images each; the memorized ones come in families of 4, louder and more alike."""
    rng = np.random.default_rng(0)
    prompts = tuple(Labeled(f"p{i}", f"family {i // 4}" if i < 20 else f"p{i}", i < 20) for i in range(40))
    magnitudes = rng.gamma(4, 0.25, (40, 12, 8)).astype(np.float32)
    magnitudes[:20] += 0.4
    pictures = rng.integers(0, 256, (40, 8, 8, 8, 3), dtype=np.uint8)
    pictures[:20, 1:] = pictures[:20, :1] // 2 + pictures[:20, 1:] // 2
    return Sampled(prompts, magnitudes, densities({1: pictures, 12: pictures}, lambda rows: torch.from_numpy(rows).float().flatten(1)))


def test_densities_are_those_of_disjoint_groups_of_images():
    pictures = np.random.default_rng(0).integers(0, 256, (3, 9, 8, 8, 3), dtype=np.uint8)
    found = densities({50: pictures}, lambda rows: torch.from_numpy(rows).float().flatten(1))
    assert {name: array.shape for name, array in found.items()} == {
        "pixels/50/4": (3, 2), "descriptors/50/4": (3, 2), "pixels/50/9": (3, 1), "descriptors/50/9": (3, 1),
    }  # fmt: skip
    group = torch.from_numpy(pictures[2, 4:8])
    assert found["pixels/50/4"][2, 1] == pytest.approx(float(pixel_density(group.permute(0, 3, 1, 2))))
    assert found["descriptors/50/4"][2, 1] == pytest.approx(float(descriptor_density(group.float().flatten(1))), rel=1e-5)
    assert "descriptors/50/4" not in densities({50: pictures}, None)


@pytest.mark.parametrize(("images", "sizes"), [(1, []), (2, [2]), (4, [4]), (16, [4, 16]), (20, [4, 16, 20]), (64, [4, 16, 32, 64])])
def test_numbers_of_images_are_those_of_the_paper(images, sizes):
    assert group_sizes(images) == sizes


def test_figures_agree_with_those_taken_one_by_one(sampled):
    rows = {(row.detector, row.images, row.step): row for row in detection_rows(sampled, resamples=20)}
    assert set(rows) == {
        *(("magnitude", n, s) for n in (1, 4, 8) for s in (1, 10, 12)),
        *((detector, n, s) for detector in ("pixels", "descriptors") for n in (4, 8) for s in (1, 12)),
    }
    mean = sampled.magnitudes[:, :10].mean(axis=1)
    whole = mean.mean(axis=1)
    assert rows["magnitude", 8, 10].auc.value == pytest.approx(roc_auc(whole[:20], whole[20:]))
    halves = [mean[:, :4].mean(axis=1), mean[:, 4:].mean(axis=1)]
    assert rows["magnitude", 4, 10].tpr_at_1_percent_fpr.value == pytest.approx(np.mean([tpr_at_fpr(row[:20], row[20:]) for row in halves]))
    assert rows["magnitude", 1, 1].auc.value == pytest.approx(
        np.mean([roc_auc(sampled.magnitudes[:20, 0, i], sampled.magnitudes[20:, 0, i]) for i in range(8)])
    )
    close = sampled.densities["pixels/12/8"][:, 0]
    assert rows["pixels", 8, 12].auc.value == pytest.approx(roc_auc(close[:20], close[20:]))


def test_without_duplicates_one_prompt_of_each_family_counts(sampled):
    [row] = [row for row in detection_rows(sampled, deduplicated=True, resamples=20) if (row.detector, row.images, row.step) == ("magnitude", 8, 12)]
    scores = sampled.magnitudes.mean(axis=(1, 2))
    assert row.auc.value == pytest.approx(roc_auc(scores[:20:4], scores[20:]))


def test_evaluations_without_guidance_are_left_out_of_the_mean(sampled):
    partly = sampled.magnitudes.copy()
    partly[:, :2] = np.nan
    rows = {(row.images, row.step): row for row in detection_rows(Sampled(sampled.prompts, partly, {}), resamples=20)}
    assert set(rows) == {(n, s) for n in (1, 4, 8) for s in (10, 12)}
    scores = sampled.magnitudes[:, 2:10].mean(axis=(1, 2))
    assert rows[8, 10].auc.value == pytest.approx(roc_auc(scores[:20], scores[20:]))


def test_one_class_alone_is_refused(sampled):
    with pytest.raises(MemhookError, match="20 memorized and 0 clean"):
        detection_rows(Sampled(sampled.prompts[:20], sampled.magnitudes[:20], {}))


def test_the_table_of_the_readme_names_its_columns(sampled):
    rows = detection_rows(sampled, seconds=[Seconds("magnitude", 8, 1, 0.25)], resamples=20)
    text = markdown(rows, {"memorized": 20, "clean": 20, "steps": 12, "guidance_scale": 7.5})
    assert "| 20 memorized, 20 clean prompts, guidance scale 7.5 | first step | first 10 | all 12 |" in text
    [line] = [line for line in text.splitlines() if line.startswith("| magnitude (ours), 8 images")]
    assert "/ 0.25 s |" in line
    [line] = [line for line in text.splitlines() if line.startswith("| density, pixels (l2), 4 images")]
    assert line.split("|")[3].strip() == "-"


def test_a_file_without_markers_is_refused_before_anything_runs(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("nothing here")
    with pytest.raises(MemhookError, match="does not hold the two lines"):
        run_detection_bench(Sampling(None, 4, 50, 7.5, "cpu", "float32", 0, 8), Options(tmp_path, page=readme))
    before, after = read_page(testbed.model_path().parents[2] / "README.md", "detection")  # both markers, once each
    assert "memhook bench detection --page README.md" in before
    assert after.strip()


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_clean_estimates_are_those_of_the_scheduler(kind):
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, prediction_type=kind)
    scheduler.set_timesteps(10)
    prediction, sample = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for timestep in (scheduler.timesteps[0], scheduler.timesteps[7]):
        expected = scheduler.step(prediction, timestep, sample).pred_original_sample
        torch.testing.assert_close(clean_estimate(prediction, sample, scheduler.alphas_cumprod[timestep], kind), expected, rtol=1e-4, atol=1e-4)


def test_previews_come_from_the_guided_prediction_and_leave_the_run_as_it_was():
    pipeline = testbed.load_pipeline()
    plain = next(run_prompts(pipeline, ["a fox"], images_per_prompt=2, steps=5))
    [run] = run_prompts(pipeline, ["a fox"], images_per_prompt=2, steps=5, previews=(1, 5))
    assert [len(run.previews[step]) for step in (1, 5)] == [2, 2]
    for image, expected in zip(run.images, plain.images, strict=True):
        assert np.array_equal(np.asarray(image), np.asarray(expected))
    last = np.stack([np.asarray(image, np.float32) for image in run.previews[5]])
    final = np.stack([np.asarray(image, np.float32) for image in run.images])
    first = np.stack([np.asarray(image, np.float32) for image in run.previews[1]])
    assert np.abs(last - final).mean() < 0.3 * np.abs(first - final).mean()
    assert "step" not in pipeline.scheduler.__dict__


def test_a_scheduler_that_does_not_say_has_no_previews():
    from diffusers import FlowMatchEulerDiscreteScheduler

    pipeline = testbed.load_pipeline()
    assert early_steps(pipeline, 50) == (1, 10)
    assert early_steps(pipeline, 5) == (1,)
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler()
    assert early_steps(pipeline, 50) == ()
    with pytest.raises(MemhookError, match="FlowMatchEulerDiscreteScheduler"), clean_estimates(pipeline, (1,)):
        pass


def test_the_command_compares_on_prompts_of_your_own_and_goes_on_where_it_was(tmp_path, monkeypatch):
    memorized = [{"prompt": row.prompt, "family": row.family} for row in testbed.memorized(kind="verbatim")[:3]]
    (tmp_path / "memorized.jsonl").write_text("".join(json.dumps(row) + "\n" for row in memorized))
    (tmp_path / "clean.txt").write_text("a fox on a hill\nsilver river poster\nquiet rocket print\n")
    arguments = [
        "bench", "detection", "--model", str(testbed.model_path()), "--memorized", str(tmp_path / "memorized.jsonl"), "--clean",
        str(tmp_path / "clean.txt"), "--images", "2", "--steps", "3", "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out"),
        "--batch-size", "4", "--timed", "1",
    ]  # fmt: skip
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "3 memorized and 3 clean prompts, 3 steps" in " ".join(result.output.split())
    assert len(list((tmp_path / "work").iterdir())) == 2
    rows = list(csv.DictReader((tmp_path / "out" / "detection.csv").read_text().splitlines()))
    assert {(row["detector"], row["images"], row["step"]) for row in rows} == {
        *(("magnitude", images, step) for images in "12" for step in "13"),
        *(("pixels", "2", step) for step in "13"),
    }
    assert all(float(row["seconds_per_prompt"]) > 0 for row in rows if row["deduplicated"] == "False")
    about = json.loads((tmp_path / "out" / "detection.json").read_text())
    assert (about["memorized"], about["clean"], about["steps"]) == (3, 3, 3)
    for name in ("magnitudes.png", "histogram.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")

    monkeypatch.setattr("memhook.bench.detection.sampled._batch", lambda *_args, **_options: pytest.fail("sampled again"))
    assert CliRunner().invoke(app, [*arguments, "--timed", "0"]).exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--memorized", "a.txt"], "needs both --memorized and --clean"),
        (["--model", "somewhere"], "give --memorized and --clean for another model"),
    ],
)
def test_half_of_the_prompts_is_refused(arguments, message):
    result = CliRunner().invoke(app, ["bench", "detection", *arguments])
    assert isinstance(result.exception, MemhookError)
    assert message in str(result.exception)
