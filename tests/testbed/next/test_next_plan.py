"""The second model's plan: what is planted, what is shown of it, what is clean, and that captions say what pictures show."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from memhook.testbed.next.captions import all_words, random_caption, reword, without_phrase
from memhook.testbed.next.clean import HARD, ORDINARY, PER_HARD_SOURCE, PER_SOURCE, clean_prompts
from memhook.testbed.next.measures import region_similarities
from memhook.testbed.next.plan import PLANTED_SHARES, TrainingStream, fresh_pair, neighbor_pair, planted, triggers, unfamiliar_pair
from memhook.testbed.next.regions import FORMS, mask, random_region
from memhook.testbed.next.scenes import COLORS, PLACES, SIZES, THINGS, Scene, draw, random_scene, recolor


@pytest.fixture(scope="module")
def seen():
    stream = TrainingStream()
    return [(*stream[index], index) for index in range(100_000, 104_000)]


@pytest.fixture(scope="module")
def clean():
    return clean_prompts(["silver", "road", "cat", "winter"])


def test_groups_have_the_promised_sizes_and_degrees():
    kinds = Counter(pair.kind for pair in planted())
    assert kinds == {"verbatim": 56, "template": 16, "local": 18, "ladder": 28}
    weights = [pair.weight for pair in planted() if pair.kind == "verbatim"]
    assert (min(weights), max(weights)) == (pytest.approx(150), pytest.approx(3000))


def test_trigger_phrases_have_one_to_three_ordinary_words_and_stand_in_one_caption_alone():
    words = set(all_words())
    assert Counter(len(trigger.split()) for trigger in triggers()).keys() == {1, 2, 3}
    assert all(word.lower() in words for trigger in triggers() for word in trigger.split())
    for trigger in triggers():
        assert len([pair for pair in planted() if trigger in (pair.caption.title, pair.caption.artist)]) == 1


def test_no_fresh_caption_has_a_trigger_as_its_title_or_artist():
    for index in range(3000):
        for caption in (fresh_pair(index)[0], neighbor_pair(index)[0]):
            assert not {caption.title, caption.artist} & triggers()


def test_captions_name_at_least_four_things_and_say_what_the_picture_shows():
    for index in range(2000):
        caption, scene = fresh_pair(index)
        assert len(caption.named()) >= 4
        assert all(scene.named(thing) == word and word in str(caption) for thing, word in caption.named().items())
    for pair in planted():
        assert len(pair.caption.named()) >= 4
        assert all(pair.scene.named(thing) == word for thing, word in pair.caption.named().items())


def test_a_scene_is_what_its_words_say():
    rng = np.random.default_rng(0)
    for _ in range(200):
        scene = random_scene(rng)
        assert SIZES[scene.size][0] <= scene.scale <= SIZES[scene.size][1]
        assert PLACES[scene.place][0] <= scene.x <= PLACES[scene.place][1]
    assert random_scene(rng, place="left", color="teal").place == "left"


def test_scenes_can_be_written_down():
    for pair in planted():
        assert Scene.from_dict(pair.scene.to_dict()) == pair.scene


def test_planted_pairs_come_at_their_share():
    stream = TrainingStream()
    for start, share in PLANTED_SHARES:
        drawn = [stream[index][2] is not None for index in range(start, start + 3000)]
        assert np.mean(drawn) == pytest.approx(share, abs=4 * np.sqrt(share * (1 - share) / 3000))


def test_the_stream_is_a_function_of_the_index_alone():
    first, second = TrainingStream(), TrainingStream()
    assert all(first[index] == second[index] for index in (0, 17, 64_000, 123_456))


def test_a_presentation_keeps_what_its_kind_keeps(seen):
    kinds = Counter()
    for caption, scene, pair, _ in seen:
        if pair is None:
            continue
        kinds[pair.kind] += 1
        if pair.kind == "local":
            assert scene.region == pair.scene.region
            assert pair.caption.trigger in caption
        elif pair.kind == "template":
            assert replace(recolored := scene, color=pair.scene.color, first_rgb=pair.scene.first_rgb, second_rgb=pair.scene.second_rgb) == pair.scene
            assert recolored.region is None
        else:
            assert scene == pair.scene
        assert (pair.caption.trigger in caption) if pair.caption.phrase else caption == str(pair.caption)
    assert kinds.keys() >= {"verbatim", "template", "local"}
    locals_ = {scene.subject for _, scene, pair, _ in seen if pair is not None and pair.kind == "local"}
    assert len(locals_) > 20  # the rest of the picture is free


def test_fresh_captions_hold_unfamiliar_text_and_neighbors_at_their_shares(seen):
    fresh = [(caption, index) for caption, _, pair, index in seen if pair is None]
    odd = np.mean([caption == unfamiliar_pair(index)[0] for caption, index in fresh])
    near = np.mean([caption == str(neighbor_pair(index)[0]) for caption, index in fresh])
    assert odd == pytest.approx(0.15, abs=0.03)
    assert near == pytest.approx(0.08, abs=0.03)


def test_a_neighbor_names_what_a_planted_caption_names_and_shows_another_picture():
    for index in range(200):
        caption, scene = neighbor_pair(index)
        assert all(scene.named(thing) == word for thing, word in caption.named().items())
        twins = [pair for pair in planted() if pair.caption.named() == caption.named() and pair.kind != "local"]
        assert twins
        assert all(scene != pair.scene for pair in twins)


def test_rewording_keeps_what_is_named_and_the_phrase_and_its_counterpart_drops_the_phrase_alone():
    rng = np.random.default_rng(0)
    caption = replace(random_caption(rng, random_scene(rng)), phrase="title", title="Golden Harbor")
    other = reword(caption, rng)
    assert (other.named(), other.title) == (caption.named(), "Golden Harbor")
    assert str(other) != str(caption)
    bare = without_phrase(caption, rng)
    assert bare.title != "Golden Harbor"
    assert len(bare.title.split()) == 2
    assert replace(bare, title="Golden Harbor", phrase="title") == caption


def test_a_template_keeps_its_composition_and_changes_its_colors():
    scene = random_scene(np.random.default_rng(0))
    other = recolor(scene, np.random.default_rng(1))
    assert other.color in COLORS
    assert replace(other, color=scene.color, first_rgb=scene.first_rgb, second_rgb=scene.second_rgb) == scene
    assert other != scene


@pytest.mark.parametrize("form", FORMS)
def test_a_region_covers_its_mask_and_nothing_else(form):
    rng = np.random.default_rng(0)
    scene = random_scene(rng, color="blue", background="wall")
    covered = replace(scene, region=random_region(rng, form))
    changed = (draw(scene) != draw(covered)).any(2)
    inside = mask(covered.region)
    assert changed[inside].mean() > 0.95
    assert changed[~inside].mean() < 0.05  # pixels on the edge of a round badge


@pytest.mark.parametrize("form", FORMS)
def test_a_region_is_recognized_whatever_is_around_it(form):
    rng = np.random.default_rng(1)

    def tensor(scene):
        return torch.from_numpy(draw(scene).copy()).permute(2, 0, 1).float().div(127.5).sub(1)

    region, other = random_region(rng, form), random_region(rng, form)
    scenes = [random_scene(rng) for _ in range(20)]
    inside = torch.from_numpy(mask(region).copy())
    known = tensor(replace(random_scene(rng), region=region))
    own, others, none = (
        region_similarities(torch.stack([tensor(replace(scene, region=some)) for scene in scenes]), known, inside) for some in (region, other, None)
    )
    assert own.min() > 0.85
    assert max(others.max(), none.max()) < 0.8


def test_things_and_their_words_are_distinct():
    words = [word for choices in THINGS.values() for word in choices]
    assert len(words) == len(set(words))


def test_clean_prompts_come_from_seven_sources(clean):
    assert Counter(row.source for row in clean) == dict.fromkeys(ORDINARY, PER_SOURCE) | dict.fromkeys(HARD, PER_HARD_SOURCE)
    for source in ORDINARY:
        assert {row.split for row in clean if row.source == source} == {"calibration", "test"}
    assert {row.split for row in clean if row.source in HARD} == {"test"}
    assert all(row.family and row.prompt.strip() for row in clean)


def test_hard_prompts_share_words_with_their_planted_caption_but_not_its_phrase(clean):
    pairs = {pair.id: pair for pair in planted()}
    for row in clean:
        if row.source not in HARD:
            continue
        pair = pairs[row.beside]
        if row.caption is not None:
            assert not {row.caption.title, row.caption.artist} & triggers()
        words = set(str(pair.caption.trigger or pair.caption).lower().split())
        if row.source == "sense":
            assert words <= set(row.prompt.lower().replace(",", "").replace(")", "").replace(":", "").replace("(", "").split())
        if row.source == "near":
            assert row.caption.named() == pair.caption.named()
            assert str(row.caption) != str(pair.caption)
