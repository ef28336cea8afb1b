"""The fewest words to leave out, or to exchange, until a prompt is no longer flagged."""

import io
import json
from functools import partial
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import memhook
from memhook import suggest_edits
from memhook.detection.prompt_words import edited, words_of
from memhook.errors import CalibrationError, MemhookError

CLEAN = memhook.calibrate(np.linspace(0.0, 1.0, 200))  # flagged at 1%: above .99


def worth(**parts):
    """Scores add up over words; ``a_b=2`` is there while either of the two words is."""

    def ask(texts):
        asked.extend(texts)
        return [sum(value for name, value in parts.items() if set(name.split("_")) & set(text.lower().replace(",", "").split())) for text in texts]

    asked: list[str] = []
    ask.asked = asked
    return ask


def test_the_smallest_set_is_found_and_said():
    found = suggest_edits(worth(snow=2.0, fox=0.3, red=0.2), "Red fox, snow", CLEAN)
    assert found.flagged
    assert found.reached
    assert [(edit.prompt, edit.changes, edit.numbers) for edit in found.suggestions] == [("Red fox", (("snow", ""),), (2,))]
    best = found.best
    assert (best.score, best.p_value) == (pytest.approx(0.5), pytest.approx(float(CLEAN.p_value(0.5))))
    assert str(best) == "leave out 'snow': score 0.50, p = 0.5: Red fox"
    assert not best.flagged


def test_words_to_keep_are_not_touched_at_any_of_their_places():
    ask = worth(snow=2.0, fox=0.9, red=0.8)
    found = suggest_edits(ask, "red Fox, snow fox", CLEAN, keep=["fox"])
    assert all(text.lower().split().count("fox") + text.lower().split().count("fox,") == 2 for text in ask.asked)
    assert found.kept == ("fox",)
    assert found.suggestions[-1].changes == (("red", ""), ("snow", ""))


def test_merely_unflagged_edits_come_first_and_the_goal_ends_the_search():
    found = suggest_edits(worth(a=0.5, b=0.4, c=0.3, d=0.2), "a b c d", CLEAN, p_value=0.5)
    assert [(len(edit.changes), edit.reached, round(edit.score, 2)) for edit in found.suggestions] == [
        (1, False, 0.9),
        (2, True, 0.5),
    ]
    assert found.best.reached
    only = suggest_edits(worth(a=0.5, b=0.4, c=0.3, d=0.2), "a b c d", CLEAN, p_value=None)
    assert [len(edit.changes) for edit in only.suggestions] == [1]
    assert only.reached


def test_several_suggestions_the_best_first():
    ask = lambda texts: [1.5 if len(text.split()) > 2 else 0.1 * len(text) for text in texts]  # noqa: E731
    found = suggest_edits(ask, "aaaa bbb c", CLEAN, count=2)
    assert [edit.prompt for edit in found.suggestions] == ["bbb c", "aaaa c"]


def test_a_phrase_whose_words_each_recall_the_picture_is_found_whatever_the_beam():
    filler = " ".join(f"w{number}" for number in range(9))
    found = suggest_edits(worth(snow_fall=2.0, **{f"w{number}": 0.01 for number in range(9)}), f"{filler} snow fall", CLEAN, beam=1)
    assert found.best.changes == (("snow", ""), ("fall", ""))


def test_words_to_exchange():
    ask = worth(snow=2.0, fox=0.2)
    found = suggest_edits(ask, "fox snow", CLEAN, exchange=["rain", "snow"], keep=["fox"], count=5)
    assert [edit.changes for edit in found.suggestions] == [(("snow", ""),), (("snow", "rain"),)]  # no word for itself
    assert found.suggestions[1].prompt == "fox rain"
    assert found.suggestions[1].said == "replace 'snow' by 'rain'"
    only = suggest_edits(ask, "fox snow", CLEAN, exchange={"fox": ["wolf"]}, count=9, p_value=None)
    assert {new for edit in only.suggestions for word, new in edit.changes if word == "snow"} == {""}
    lone = suggest_edits(ask, "snow", CLEAN, exchange=["rain"])  # the one word cannot be left out, but exchanged
    assert [edit.prompt for edit in lone.suggestions] == ["rain"]


def test_a_prompt_that_is_not_flagged_is_not_searched():
    ask = worth(fox=0.4)
    found = suggest_edits(ask, "red fox", CLEAN)
    assert not found.flagged
    assert (found.suggestions, found.nearest, found.best, found.asked) == ((), None, None, 1)
    assert "not flagged, so there is nothing to change" in str(found)


def test_a_goal_that_is_never_reached_says_what_came_nearest():
    found = suggest_edits(worth(fox=3.0, red=0.5), "red fox snow", CLEAN, keep=["fox"])
    assert (found.reached, found.best, found.suggestions) == (False, None, ())
    assert found.nearest.score == pytest.approx(3.0)
    assert found.nearest.flagged
    assert "Every edit with 'fox' kept is still flagged" in str(found)
    assert "The nearest: leave out 'red'" in str(found)


@settings(max_examples=30)
@given(st.lists(st.floats(0, 1), min_size=3, max_size=6), st.sets(st.integers(0, 5)), st.integers(1, 3), st.booleans())
def test_it_is_what_brute_force_finds_and_within_the_bound(values, kept, most, exchange):
    names = [f"w{number}" for number in range(len(values))]
    ask = worth(**dict(zip(names, values, strict=True)))
    keep = [names[number] for number in kept if number < len(names)][: len(names) - 1]
    prompt = " ".join(names)
    found = suggest_edits(ask, prompt, CLEAN, keep=keep, max_words=most, beam=50, p_value=0.5, exchange=["new"] if exchange else ())
    assert found.asked == len(set(ask.asked)) <= found.bound
    if not found.flagged:
        return
    free = [number for number, name in enumerate(names) if name not in keep]
    words = words_of(prompt)
    sizes = []
    for size in range(1, min(most, len(free)) + 1):
        texts = [edited(prompt, words, dict.fromkeys(numbers, "")) for numbers in combinations(free, size)]
        scores = np.float32(worth(**dict(zip(names, values, strict=True)))([text for text in texts if text]))
        if len(scores) and (CLEAN.p_value(scores) >= 0.5).any():
            sizes.append((size, scores.min()))
    assert found.reached == bool(sizes)
    if sizes:
        assert len(found.best.changes) == sizes[0][0]
        assert found.best.score == pytest.approx(sizes[0][1])


@pytest.mark.parametrize(("beam", "most"), [(1, 4), (2, 3), (3, 1)])
def test_the_bound_holds_where_nothing_helps(beam, most):
    ask = worth(fox=3.0)
    found = suggest_edits(ask, "fox a b c d e f", CLEAN, keep=["fox"], beam=beam, max_words=most, exchange=["x", "y"])
    assert found.asked <= found.bound
    ways, words = 3, 6
    assert found.bound == 1 + ways * words + (words - 1 if most > 1 else 0) + sum(beam * ways * (words - size + 1) for size in range(2, most + 1))


def test_the_words_of_the_docstring():
    found = suggest_edits(worth(fox=3.0), "fox a b c d e f g h i", CLEAN, keep=["fox"])
    assert found.bound == 1 + 9 + 8 + 3 * (8 + 7 + 6)


def test_progress_and_batches():
    told = []
    suggest_edits(worth(fox=3.0), "fox a b c", CLEAN, keep=["fox"], batch_size=2, progress=lambda asked, most: told.append((asked, most)))
    assert [asked for asked, _ in told] == sorted(asked for asked, _ in told)
    assert all(asked <= most for asked, most in told)


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("", {}, "the prompt is empty"),
        ("fox", {}, "has one word, 'fox', so nothing can be left out of it"),
        ("?!", {}, "has no word"),
        ("red fox", {"keep": ["cat"]}, r"keep has 'cat', which the prompt 'red fox' does not hold; expected some of its words: red, fox"),
        ("red fox", {"keep": "fox"}, "keep is the one string"),
        ("red fox", {"keep": ["fox", "red"]}, "every word .* is to be kept"),
        ("red fox", {"exchange": "cat"}, "exchange is the one string"),
        ("red fox", {"exchange": [""]}, "exchange has ''"),
        ("red fox", {"exchange": {"cat": ["dog"]}}, "exchange has 'cat', which the prompt"),
        ("red fox", {"beam": 0}, "beam is 0"),
        ("red fox", {"max_words": 0}, "max_words is 0"),
        ("red fox", {"count": 0}, "count is 0"),
        ("red fox", {"p_value": 0.005}, "p_value is 0.005; expected a number above the false-positive rate 0.01"),
    ],
)
def test_bad_input(prompt, options, message):
    with pytest.raises(MemhookError, match=message):
        suggest_edits(worth(fox=3.0), prompt, CLEAN, **options)


def test_too_few_calibration_prompts_are_told_before_anything_runs():
    ask = worth(fox=3.0)
    with pytest.raises(CalibrationError, match="10 calibration prompts cannot give"):
        suggest_edits(ask, "red fox", memhook.calibrate(np.arange(10.0)))
    assert not ask.asked


def test_views_show_numbers_and_escape_prompts():
    found = suggest_edits(worth(snow=2.0, rain=1.0), "<b>fox</b> snow in rain", CLEAN, count=2)
    text = str(found)
    assert f"{found.suggestions[0].score:.3g}" in text
    assert found.suggestions[0].said in text
    page = found._repr_html_()
    assert "<del>snow</del>" in page
    assert "&lt;b&gt;" in page
    assert json.loads(json.dumps(found.to_dict()))["suggestions"][0]["changes"] == [list(change) for change in found.suggestions[0].changes]
    exchanged = suggest_edits(worth(snow=2.0), "snow", CLEAN, exchange=["<i>sun"])
    assert "<del>snow</del> <ins>&lt;i&gt;sun</ins>" in exchanged._repr_html_()
    rich = pytest.importorskip("rich.console")
    console = rich.Console(record=True, width=100, file=io.StringIO())
    console.print(found)
    shown = console.export_text()
    assert f"{found.suggestions[0].p_value:.2g}" in shown
    assert "write instead" in shown


def test_on_the_bundled_model_edits_undo_copies_and_keep_what_is_named():
    """Prompts with a phrase of invented words, whatever they are: the fewest words out, with the subject kept."""
    import torch

    from memhook import testbed
    from memhook.bench.samples import Sample, judge, open_studio

    calibration = memhook.Calibration.load(testbed.calibration_path())
    studio = open_studio(steps=20)
    prompts = [row for row in testbed.memorized(kind="verbatim") if row.trigger and row.subject in row.prompt][:4]
    texts, found = [], []
    for row in prompts:
        seeds = [torch.Generator().manual_seed(image) for image in range(4)]
        trace = memhook.probe(studio.pipeline, partial(studio.pipeline, row.prompt, num_images_per_prompt=4, generator=seeds))
        edits = suggest_edits(trace, row.prompt, calibration, keep=[row.subject])
        found.append(edits)
        texts.append((edits.best or edits.nearest).prompt)
        assert row.subject in texts[-1]
    assert all(edits.flagged and edits.asked <= edits.bound for edits in found)
    assert sum(edits.best is not None for edits in found) >= 3
    samples = [Sample(row, 5) for row in prompts]
    before = judge(studio.make(studio.encode([row.prompt for row in prompts]), studio.noise([5] * 4)), samples)
    after = judge(studio.make(studio.encode(texts), studio.noise([5] * 4)), samples)
    assert after.similarity.mean() < before.similarity.mean() - 0.3
