"""Scores of a prompt without each of its words, phrases and pairs."""

import io
import json

import numpy as np
import pytest
import torch

import memhook
from memhook import leave_one_out
from memhook.errors import MemhookError
from memhook.testing import sample, tiny_unet

WORTH = {"gilded": 1.0, "song": 0.0, "fox": 0.5, "mug": 0.25}
LENGTH, WIDTH = 5, 6
UNET, OTHER = tiny_unet(), tiny_unet(seed=1)


def score(text):
    """Either of two words recalls the picture alone; the others add up."""
    words = text.lower().replace(",", " ").split()
    recalled = 2.0 if "snow" in words or "fall" in words else 0.0
    return 0.1 + recalled + sum(WORTH.get(word, 0.0) for word in words)


def ask(texts):
    return [score(text) for text in texts]


def encode(texts):
    """A word a position; the sum of its letters decides on its embedding."""
    out = torch.zeros(len(texts), LENGTH, WIDTH)
    for row, text in enumerate(texts):
        for place, word in enumerate(text.split()[:LENGTH]):
            out[row, place] = torch.randn(WIDTH, generator=torch.Generator().manual_seed(sum(map(ord, word))))
    return out


def probe(prompt="red fox in snow", *, samples=2, layout="uncond_first", seed=0, evaluations=1):
    unet = UNET
    cond, uncond = encode([prompt]).expand(samples, -1, -1), encode([""]).expand(samples, -1, -1)
    run = lambda: sample(unet, layout=layout, cond=cond, uncond=uncond, seed=seed, samples=samples)  # noqa: E731
    return unet, memhook.probe(unet, run, adapter=memhook.ModuleAdapter(unet, layout=layout), evaluations=evaluations)


def test_a_row_a_word_with_what_goes_with_it():
    found = leave_one_out(ask, "Gilded Song, fox mug")
    assert [(row.text, row.numbers, row.prompt) for row in found.words] == [
        ("Gilded", (0,), "Song, fox mug"),
        ("Song", (1,), "Gilded, fox mug"),
        ("fox", (2,), "Gilded Song, mug"),
        ("mug", (3,), "Gilded Song, fox"),
    ]
    assert [row.drop for row in found.words] == pytest.approx([1.0, 0.0, 0.5, 0.25])
    assert [row.text for row in found.top(2)] == ["Gilded", "fox"]
    assert (found.asked, found.samples, found.p_value) == (5, 1, None)


def test_a_phrase_whose_words_each_recall_the_picture_shows_in_its_pair_alone():
    found = leave_one_out(ask, "snow fall fox", pairs="all", phrases=["Snow Fall"])
    assert [row.drop for row in found.words] == pytest.approx([0.0, 0.0, 0.5])
    by_text = {row.text: row for row in found.pairs}
    assert by_text["snow + fall"].drop == pytest.approx(2.0)
    assert by_text["snow + fall"].excess == pytest.approx(2.0)
    assert by_text["snow + fox"].excess == pytest.approx(0.0)
    assert [(row.text, row.prompt) for row in found.phrases] == [("Snow Fall", "fox")]
    assert found.asked == 1 + 3 + 3  # the phrase is one of the pairs, and asked once
    assert [row.text for row in leave_one_out(ask, "snow fall fox", pairs="adjacent").pairs] == ["snow + fall", "fall + fox"]


def test_a_phrase_is_left_out_at_all_of_its_places():
    found = leave_one_out(ask, "fox mug, song fox mug", phrases=["fox mug"])
    assert found.phrases[0].prompt == "song"
    assert found.phrases[0].numbers == (0, 1, 3, 4)


@pytest.mark.parametrize("layout", ["uncond_first", "cond_first", "two_calls_uncond_first", "two_calls_cond_first"])
def test_a_trace_is_asked_on_its_own_noise(layout):
    prompt = "red fox in snow"
    unet, trace = probe(prompt, layout=layout)
    found = leave_one_out(trace, prompt, encode=encode)
    assert found.score == pytest.approx(float(trace.magnitudes.mean()), rel=1e-5)
    for row in found.words:
        _, other = probe(row.prompt, layout=layout)
        assert row.score == pytest.approx(float(other.magnitudes[0].mean()), rel=1e-5)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in unet.parameters())
    assert len(trace) == 1  # what is asked is not recorded


def test_a_host_whose_replay_knows_its_own_batch_alone():
    """Such as ComfyUI's, which cannot be asked for more rows than it was captured with."""
    from dataclasses import replace

    prompt = "red fox in snow"
    _unet, trace = probe(prompt)
    whole = leave_one_out(trace, prompt, encode=encode)
    evaluation = trace.evaluations[0]
    trace._evaluations[0] = replace(evaluation, replay=lambda embedding: evaluation.replay(embedding))  # noqa: PLW0108 -- hides `reword`
    assert [row.score for row in leave_one_out(trace, prompt, encode=encode).words] == pytest.approx([row.score for row in whole.words], rel=1e-5)


def test_batches_change_nothing_and_are_told():
    prompt = "red fox in snow at night"
    _, trace = probe(prompt, samples=3)
    told = []
    whole = leave_one_out(trace, prompt, encode=encode)
    parts = leave_one_out(trace, prompt, encode=encode, batch_size=4, progress=lambda asked, most: told.append((asked, most)))
    assert [row.score for row in parts.words] == pytest.approx([row.score for row in whole.words], rel=1e-5)
    assert told == [(1, 1), (2, 7), (3, 7), (4, 7), (5, 7), (6, 7), (7, 7)]


def test_no_gradient_is_taken():
    _, trace = probe()
    modes = []
    hook = trace.evaluations[0].replay._call._module().register_forward_hook(lambda *_: modes.append(_[2].requires_grad))
    leave_one_out(trace, "red fox in snow", encode=encode)
    hook.remove()
    assert modes
    assert not any(modes)


def calibration(unet=UNET, **options):
    traces = []
    for number in range(40):
        cond, uncond = encode([f"word{number} fox"]).expand(2, -1, -1), encode([""]).expand(2, -1, -1)
        with memhook.watch(unet, adapter=memhook.ModuleAdapter(unet, layout="uncond_first")) as trace:
            sample(unet, cond=cond, uncond=uncond, seed=number, samples=2, **options)
        traces.append(trace)
    return memhook.calibrate(traces)


def test_every_row_carries_its_p_value():
    known = calibration()
    _, trace = probe()
    found = leave_one_out(trace, "red fox in snow", encode=encode, calibration=known)
    first = known.using(1)
    assert found.p_value == pytest.approx(float(first.p_value(found.score)))
    assert [row.p_value for row in found.words] == [float(first.p_value(row.score)) for row in found.words]
    assert f"p = {found.words[0].p_value:.2g}" in str(found.words[0])


def test_a_calibration_of_another_setting():
    known = calibration(OTHER)
    _, trace = probe()
    with pytest.raises(memhook.CalibrationMismatchError, match="model"):
        leave_one_out(trace, "red fox in snow", encode=encode, calibration=known)
    _, two = probe(samples=3)
    with pytest.raises(memhook.CalibrationMismatchError, match="images_per_prompt"):
        leave_one_out(two, "red fox in snow", encode=encode, calibration=calibration())
    with pytest.raises(memhook.CalibrationMismatchError, match="model"):  # also one that a function answers
        leave_one_out(lambda texts: probe(texts[0])[1], "red fox in snow", calibration=known)


def test_a_function_may_answer_traces_of_several_evaluations():
    known = calibration()
    found = leave_one_out(lambda texts: probe(texts[0], evaluations=3)[1], "red fox in snow", calibration=known, batch_size=1)
    _, whole = probe(evaluations=3)
    assert found.score == pytest.approx(float(whole.score().mean()), rel=1e-6)
    assert found.p_value == pytest.approx(float(known.using(3).p_value(found.score)))
    assert found.samples == 2


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "the prompt is empty"),
        ("  ", "the prompt is empty"),
        ("fox", "has one word, 'fox'; without it nothing is left"),
        ("...", "has no word"),
        (None, "the prompt is a NoneType"),
    ],
)
def test_prompts_with_nothing_to_leave_out(prompt, message):
    with pytest.raises(MemhookError, match=message):
        leave_one_out(ask, prompt)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"phrases": ["cat"]}, r"phrases has 'cat', which the prompt .* does not hold; expected some of its words: red, fox"),
        ({"phrases": "fox"}, r"the one string 'fox'; expected a list"),
        ({"pairs": "some"}, "pairs is 'some'; expected one of none, adjacent, all"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"encode": encode}, "encode is for a trace"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(MemhookError, match=message):
        leave_one_out(ask, "red fox", **options)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda texts: [1.0] * (len(texts) + 1), r"numbers of shape \(2,\) for 1 texts"),
        (lambda texts: np.zeros((len(texts), 0)), "expected one a text"),
        (lambda texts: [float("nan")] * len(texts), "score of 'red fox' is nan"),
        (lambda texts: np.ones((len(texts), len(texts))), "answered 2 numbers a text, and 1 before"),
        ("fox", "cannot ask a str"),
    ],
)
def test_bad_answers(answer, message):
    with pytest.raises(MemhookError, match=message):
        leave_one_out(answer, "red fox")


def test_bad_traces():
    unet, trace = probe()
    with pytest.raises(memhook.ReplayError, match=r"knows no text encoder of this host.*pass encode="):
        leave_one_out(trace, "red fox in snow")
    with pytest.raises(memhook.ReplayError, match="not what the run was captured with"):
        leave_one_out(trace, "blue cat in rain", encode=encode)
    with pytest.raises(memhook.ReplayError, match=r"shape \(5, 7\) of the prompt"):
        leave_one_out(trace, "red fox in snow", encode=lambda texts: torch.zeros(len(texts), 5, 7))
    with pytest.raises(MemhookError, match="encode gave"):
        leave_one_out(trace, "red fox in snow", encode=lambda texts: torch.zeros(len(texts) + 1, 5, 6))
    with memhook.watch(unet, adapter=memhook.ModuleAdapter(unet, layout="uncond_first")) as numbers:
        sample(unet)
    with pytest.raises(MemhookError, match="keep"):
        leave_one_out(numbers, "red fox", encode=encode)
    two = encode(["red fox", "blue cat"])
    both = memhook.probe(unet, lambda: sample(unet, cond=two, uncond=encode(["", ""])), adapter=memhook.ModuleAdapter(unet, layout="uncond_first"))
    with pytest.raises(MemhookError, match="holds 2 prompts"):
        leave_one_out(both, "red fox", encode=encode)


def test_a_length_that_follows_the_prompt():
    _, trace = probe("red fox in snow now")

    def short(texts):
        return encode(texts)[:, : max(len(text.split()) for text in texts)]

    with pytest.raises(memhook.ReplayError, match="as long as its prompt"):
        leave_one_out(trace, "red fox in snow now", encode=short)


def test_views_show_numbers_and_escape_prompts():
    known = memhook.calibrate(np.linspace(0.1, 2, 50))
    found = leave_one_out(ask, "Gilded <b>Song</b>, fox mug", calibration=known, pairs="adjacent", phrases=["fox mug"])
    text = str(found)
    assert "p = " in text.splitlines()[0]
    assert "beyond each alone" in text
    assert f"{found.words[0].score:.3g}" in text
    page = found._repr_html_()
    assert "<b>Song" not in page
    assert "&lt;b&gt;Song" in page
    assert f"{found.words[0].score:.3g}" in page
    assert json.loads(json.dumps(found.to_dict()))["words"][0]["text"] == "Gilded"
    rich = pytest.importorskip("rich.console")
    console = rich.Console(record=True, width=100, file=io.StringIO())
    console.print(found)
    assert f"{found.words[0].p_value:.2g}" in console.export_text()
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    axes = found.plot(ax=Figure().subplots())
    assert [bar.get_height() for bar in axes.patches] == pytest.approx([row.score for row in found.words])
    with pytest.raises(MemhookError, match="k is 0"):
        found.top(0)
