"""Study, evidence, card and detection benchmark: on pictures and magnitudes whose answer is known."""

import numpy as np
import pytest

from memhook import testbed
from memhook.errors import MemhookError
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
