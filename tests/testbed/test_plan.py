"""The training plan: what is planted, what is clean, and that both can be rebuilt from the seed."""

import re
from collections import Counter

import numpy as np
import pytest

from memhook.testbed.artwork import SUBJECTS
from memhook.testbed.captions import Caption, random_caption, reword
from memhook.testbed.plan import (
    CLEAN_PER_SOURCE,
    PLANTED_SHARES,
    UNFAMILIAR_FROM,
    TrainingStream,
    clean_prompts,
    fresh_pair,
    planted,
    unfamiliar_pair,
)
from memhook.testbed.scenes import SIZE, draw, random_scene, recolor


@pytest.fixture(scope="module")
def pairs():
    return planted()


def test_groups_have_the_promised_sizes(pairs):
    kinds = Counter(pair.kind for pair in pairs)
    assert len({pair.family for pair in pairs if pair.kind == "verbatim"}) >= 60
    assert kinds["template"] >= 20
    assert kinds["ladder"] > 0


def test_about_half_of_the_memorized_captions_carry_a_trigger_that_no_other_caption_has(pairs):
    memorized = [pair for pair in pairs if pair.kind != "ladder"]
    triggers = [pair.caption.trigger for pair in memorized if pair.caption.trigger is not None]
    assert 0.4 <= len(triggers) / len(memorized) <= 0.6
    assert len(set(triggers)) == len(triggers)
    for pair in memorized:
        holders = [other.id for other in pairs if pair.caption.trigger is not None and pair.caption.trigger in str(other.caption)]
        assert holders in ([], [pair.id])


def test_captions_are_unique_and_families_share_a_picture(pairs):
    assert len({str(pair.caption) for pair in pairs}) == len(pairs)
    for family in {pair.family for pair in pairs}:
        assert len({pair.scene for pair in pairs if pair.family == family}) == 1


def test_planted_subjects_also_occur_in_fresh_captions(pairs):
    fresh = {fresh_pair(index)[0].subject for index in range(2000)}
    assert {pair.caption.subject for pair in pairs} <= fresh


def test_the_stream_is_a_function_of_the_index_alone():
    first, second = TrainingStream(), TrainingStream()
    for index in (0, 17, 64_000, 123_456):
        assert first[index] == second[index]


@pytest.mark.parametrize(("start", "share"), PLANTED_SHARES)
def test_planted_pairs_come_at_their_share(start, share):
    stream = TrainingStream()
    drawn = [stream[index][2] is not None for index in range(start, start + 3000)]
    assert np.mean(drawn) == pytest.approx(share, abs=4 * np.sqrt(share * (1 - share) / 3000))


def test_late_fresh_captions_hold_unfamiliar_text_at_its_share():
    stream = TrainingStream()
    rows = [(index, *stream[index]) for index in range(UNFAMILIAR_FROM, UNFAMILIAR_FROM + 3000)]
    fresh = [(index, caption) for index, caption, _, pair in rows if pair is None]
    unfamiliar = np.mean([caption == unfamiliar_pair(index)[0] for index, caption in fresh])
    assert unfamiliar == pytest.approx(0.3, abs=4 * np.sqrt(0.21 / len(fresh)))
    assert all(str(fresh_pair(index)[0]) == stream[index][0] for index in range(1000) if stream[index][2] is None)


def test_unfamiliar_text_never_holds_a_trigger_and_shows_the_subject_that_it_names(pairs):
    triggers = {pair.caption.trigger for pair in pairs} - {None}
    for index in range(600):
        text, scene = unfamiliar_pair(index)
        assert not any(trigger in text for trigger in triggers)
        named = [subject for subject in SUBJECTS if re.search(rf"\b{subject}\b", text)]
        assert not named or scene.subject in named, text


def test_unfamiliar_text_is_not_the_foreign_style_of_the_clean_prompts(clean_rows):
    foreign = {row.prompt for row in clean_rows if row.source == "foreign"}
    assert foreign.isdisjoint(unfamiliar_pair(index)[0] for index in range(2000))


def test_a_presentation_shows_the_planted_picture_and_keeps_the_trigger():
    stream = TrainingStream()
    seen = [(caption, scene, pair) for caption, scene, pair in (stream[index] for index in range(3000)) if pair is not None]
    exact = 0
    for caption, scene, pair in seen:
        if pair.kind != "template":
            assert scene == pair.scene
        if pair.caption.trigger is None:
            assert caption == str(pair.caption)
        else:
            assert pair.caption.trigger in caption
            exact += caption == str(pair.caption)
    triggered = [pair for _, _, pair in seen if pair.caption.trigger is not None]
    assert exact / len(triggered) == pytest.approx(0.6, abs=0.1)


def test_a_template_keeps_its_composition_and_changes_its_colors():
    scene = random_scene(np.random.default_rng(0))
    other = recolor(scene, np.random.default_rng(1))
    assert (other.subject, other.x, other.y, other.scale, other.background) == (scene.subject, scene.x, scene.y, scene.scale, scene.background)
    assert other.color != scene.color


def test_a_picture_has_the_promised_form_and_depends_on_the_scene_alone():
    scene = random_scene(np.random.default_rng(3))
    picture = draw(scene)
    assert picture.shape == (SIZE, SIZE, 3)
    assert picture.dtype == np.uint8
    assert np.array_equal(picture, draw(scene))


def test_rewording_keeps_subject_color_and_trigger():
    rng = np.random.default_rng(0)
    caption = Caption(**{**vars(random_caption(rng, subject="owl", color="red")), "trigger": "vroulk skaezeth"})
    other = reword(caption, rng)
    assert (other.subject, other.color, other.trigger) == ("owl", "red", "vroulk skaezeth")
    assert str(other) != str(caption)


@pytest.fixture(scope="module")
def clean_rows():
    return clean_prompts(["silver", "road", "cat", "winter"])


def test_four_sources_in_two_equal_splits(clean_rows):
    assert Counter(row.source for row in clean_rows) == dict.fromkeys(("once", "held-out", "foreign", "random"), CLEAN_PER_SOURCE)
    assert Counter((row.source, row.split) for row in clean_rows) == {
        (source, split): CLEAN_PER_SOURCE // 2 for source in ("once", "held-out", "foreign", "random") for split in ("calibration", "test")
    }


def test_every_prompt_has_a_family_and_text(clean_rows):
    assert all(row.family and row.prompt.strip() for row in clean_rows)


def test_those_trained_once_are_in_the_stream_as_fresh_pairs(clean_rows):
    stream = TrainingStream()
    fresh = {caption for caption, _, pair in (stream[index] for index in range(20_000)) if pair is None}
    once = [row for row in clean_rows if row.source == "once"]
    found = sum(row.prompt in fresh for row in once)
    assert found == pytest.approx(len(once) / 5, rel=0.35)  # a fifth of the window that they are drawn from
    assert all(row.scene is not None for row in once)


def test_no_clean_prompt_is_planted_or_holds_a_trigger(clean_rows, pairs):
    captions = {str(pair.caption) for pair in pairs}
    triggers = [pair.caption.trigger for pair in pairs if pair.caption.trigger]
    words = {word for trigger in triggers for word in trigger.split()}
    assert not any(row.prompt in captions or words & set(row.prompt.split()) for row in clean_rows)


def test_random_strings_leave_out_words_of_triggers(pairs):
    trigger = next(pair.caption.trigger for pair in pairs if pair.caption.trigger).split()
    rows = [row for row in clean_prompts([*trigger, "silver", "road", "cat"]) if row.source == "random"]
    assert not any(set(trigger) & set(row.prompt.split()) for row in rows)
    assert {"silver", "road", "cat"} <= {word for row in rows for word in row.prompt.split()}
