"""Study, evidence, card and detection benchmark: on pictures and magnitudes whose answer is known."""

import numpy as np
import pytest

from memhook import testbed
from memhook.bench.detection import MARKERS, DetectionRow, detection_rows, markdown, run_detection_bench
from memhook.errors import MemhookError
from memhook.evaluation import roc_auc, tpr_at_fpr
from memhook.testbed import card, evidence, study
from memhook.testbed.scenes import draw, random_scene


@pytest.fixture(scope="module")
def known():
    """Memorized prompts whose pictures are their training picture, but for one; clean prompts with a right subject in every picture."""
    rng = np.random.default_rng(0)
    memorized = [*testbed.memorized(kind="verbatim")[:6], *testbed.memorized(kind="template")[:2], *testbed.memorized(kind="ladder")[:4]]
    clean = [row for source in ("once", "held-out", "foreign", "random") for row in testbed.clean(split="test", source=source)[:12]]
    images = [np.stack([np.asarray(row.image())] * 4) for row in memorized]
    images[0] = np.stack([draw(random_scene(rng, subject=row)) for row in ("cat", "rocket", "lemon", "tree")])
    images += [np.stack([draw(random_scene(rng, subject=row.subject, color=row.color)) for _ in range(4)]) for row in clean]
    magnitudes = rng.uniform(0.5, 1.5, (len(images), 12, 4)).astype(np.float32)
    magnitudes[: len(memorized)] += 0.8
    return study.Study((*memorized, *clean), magnitudes, np.stack(images))


@pytest.fixture(scope="module")
def found(known):
    return evidence.gather(known)


def test_copies_are_counted_where_they_are(found):
    assert [row.reproduced for row in found[:8]] == [False] + [True] * 7
    assert np.nanmean([row.diversity for row in found[1:8]]) == pytest.approx(0, abs=1e-5)
    clean = found[12:]
    assert np.mean([row.nearest >= evidence.COPY_THRESHOLD for row in clean]) < 0.05
    assert np.mean([row.diversity for row in clean]) > 0.4


def test_subjects_and_colors_are_read_off_the_pictures(found):
    rows = [row for row in found[12:] if row.subject_right is not None]
    assert np.mean([row.subject_right for row in rows]) > 0.95
    assert np.mean([row.color_right for row in rows if row.color_right is not None]) > 0.9
    assert all(row.subject_right is None for row in found[12:] if row.prompt.source in ("foreign", "random"))


def test_the_card_states_what_was_found(found):
    text = card.card(found, evidence.validate_measures(pairs=200))
    assert "| verbatim: one picture, many times | 6 |" in text
    assert "83.3%" in text  # five of six reproduced
    assert "nan" not in text.lower()


def test_the_contact_sheet_shows_training_pictures_beside_generations(known, found):
    sheet = card.contact_sheet(known, found, rows=4, scale=1)
    assert sheet.size == (32 + 4 + 4 * 32 + 16 + 4 * 32, 4 * 32)
    left = np.asarray(sheet)[:32, :32]
    assert np.array_equal(left, np.asarray(known.prompts[0].image()))


def test_the_benchmark_agrees_with_the_figures_taken_one_by_one(known):
    rows = {(row.images, row.evaluations): row for row in detection_rows(known)}
    scores = known.magnitudes[:, :10].mean(axis=1)
    planted, clean = np.arange(8), np.arange(12, len(scores))  # the ladder, 8 to 11, is left out
    assert rows[4, 10].auc == roc_auc(scores.mean(axis=1)[planted], scores.mean(axis=1)[clean])
    assert rows[1, 10].tpr_at_1_percent_fpr == np.mean([tpr_at_fpr(scores[planted, n], scores[clean, n]) for n in range(4)])
    assert set(rows) == {(1, 1), (1, 10), (1, 12), (4, 1), (4, 10), (4, 12)}


def test_the_table_of_the_readme_names_its_columns():
    text = markdown([DetectionRow(n, s, 0.9, 0.5) for n in (1, 4) for s in (1, 10, 50)], planted=96, clean=400)
    assert "| 96 memorized, 400 clean prompts | first evaluation | first 10 | all 50 |" in text
    assert "| 4 images a prompt | 0.900 / 0.500 |" in text


def test_a_readme_without_markers_is_refused_before_anything_runs(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("nothing here")
    with pytest.raises(MemhookError, match="does not hold the two lines"):
        run_detection_bench(tmp_path, out=None, per_source=1, readme=readme)
    assert MARKERS[0] in (testbed.model_path().parents[2] / "README.md").read_text()


def test_a_study_goes_on_from_what_is_on_disk(tmp_path, monkeypatch):
    prompts = [testbed.memorized()[0], testbed.clean(split="test")[0]]
    monkeypatch.setattr(study, "study_prompts", lambda _: prompts)
    monkeypatch.setattr(study, "STEPS", 3)
    first = study.run_study(tmp_path, per_source=1)
    assert first.magnitudes.shape == (2, 3, 4)
    [file] = tmp_path.iterdir()
    monkeypatch.setattr(study, "run_prompts", lambda *_args, **_options: pytest.fail("sampled again"))
    again = study.run_study(tmp_path, per_source=1)
    assert np.array_equal(again.magnitudes, first.magnitudes)
    assert np.array_equal(again.images, first.images)
    monkeypatch.undo()
    file.write_bytes(b"damaged")
    monkeypatch.setattr(study, "study_prompts", lambda _: prompts)
    monkeypatch.setattr(study, "STEPS", 3)
    np.testing.assert_allclose(study.run_study(tmp_path, per_source=1).magnitudes, first.magnitudes, rtol=1e-4)


@pytest.mark.parametrize("per_source", [0, 301])
def test_a_study_cannot_use_prompts_that_there_are_not(per_source):
    with pytest.raises(MemhookError, match="expected 1 to 300"):
        study.study_prompts(per_source)
