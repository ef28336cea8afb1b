"""The benchmark of attribution: counting hits, exchanging words, and the command."""

import csv
import itertools
import json

import numpy as np
import pytest
from typer.testing import CliRunner

from memhook import testbed
from memhook.attribution.tokens import WordScore, prompt_tokens
from memhook.bench import attribution
from memhook.bench.attribution import Ranking, chosen_words, exchange_words, hit_rows, ordinary_words, seeds_of, spread
from memhook.bench.samples import open_studio
from memhook.cli.app import app
from memhook.errors import MemhookError

TRIGGERED = [prompt for prompt in testbed.memorized() if prompt.trigger]


def ranking(prompt, scores):
    """A prompt whose words have these scores, in order, at every count of evaluations."""
    texts = [*prompt.trigger.split(), *(f"word{number}" for number in range(len(scores) - 2))]
    words = tuple(WordScore(text, float(score), (position + 1,)) for position, (text, score) in enumerate(zip(texts, scores, strict=True)))
    return Ranking(prompt, words, np.array([scores] * len(attribution.EVALUATIONS), float))


def test_hits_are_counted_among_the_highest():
    first, third, last = ([9, 8, 1, 1.5, 2], [5, 1, 9, 8, 2], [1, 2, 9, 8, 7])
    rows = {
        (row.ranking, row.k): row
        for row in hit_rows([ranking(prompt, scores) for prompt, scores in zip(TRIGGERED, (first, third, last), strict=False)])
    }
    name = "attribution, first evaluation"
    assert rows[name, 1].any.value == pytest.approx(1 / 3)
    assert rows[name, 3].any.value == pytest.approx(2 / 3)
    assert rows[name, 2].both.value == pytest.approx(1 / 3)
    assert rows[name, 1].both is None
    assert rows[name, 2].any.low <= rows[name, 2].any.value <= rows[name, 2].any.high


@pytest.mark.parametrize(("words", "k"), [(2, 1), (2, 3), (3, 2), (7, 1), (7, 3)])
def test_the_random_order_agrees_with_counting_all_of_them(words, k):
    counts = [sum(word < 2 for word in order[:k]) for order in itertools.permutations(range(words))]
    assert attribution._chance(words, k) == pytest.approx((np.mean([count >= 1 for count in counts]), np.mean([count == 2 for count in counts])))


def test_ties_are_broken_at_random():
    planted = np.array([True, True, False, False, False, False])
    assert attribution._hits(planted, np.zeros(6), 2) == pytest.approx(attribution._chance(6, 2), abs=0.1)


def test_without_a_trigger_there_is_nothing_to_count():
    prompt = next(prompt for prompt in testbed.memorized() if not prompt.trigger)
    with pytest.raises(MemhookError, match="no prompt holds a trigger phrase"):
        hit_rows([Ranking(prompt, (), np.zeros((2, 0)))])


def test_arms_take_the_words_that_they_name():
    row = ranking(TRIGGERED[0], [5, 1, 9, 8, 2, 7, 3])
    assert chosen_words(row, "unchanged") == []
    assert chosen_words(row, "top 2") == [2, 3]
    assert chosen_words(row, "bottom 2") == [1, 4]
    assert chosen_words(row, "bottom half") == [1, 4, 6]
    assert len(chosen_words(row, "random 2")) == 2


def test_words_are_exchanged_in_place():
    words = ["a", "fox", "on", "a", "t", "-", "shirt"]
    assert exchange_words("A Fox on (a T-shirt)", words, [1, 6], ["lamp", "river"]) == "A lamp on (a T-river)"
    assert exchange_words("A Fox on (a T-shirt)", words, [3], ["song"]) == "A Fox on (song T-shirt)"
    with pytest.raises(MemhookError, match="the word 'owl' is not found"):
        exchange_words("a fox", ["owl"], [0], ["lamp"])


@pytest.fixture(scope="module")
def studio():
    return open_studio(steps=10)


def test_every_planted_prompt_can_be_rewritten_word_by_word(studio):
    for prompt in testbed.memorized():
        words = [word.text for word in prompt_tokens(studio.pipeline.tokenizer, prompt.prompt).words]
        everything = exchange_words(prompt.prompt, words, range(len(words)), ["#"] * len(words))
        assert set(everything) <= {"#", " "}


def test_new_words_are_known_to_the_model_and_to_no_planted_caption(studio):
    found = ordinary_words(studio, testbed.memorized())
    assert len(found) > 50
    captions = " ".join(prompt.prompt.lower() for prompt in testbed.memorized())
    assert not any(word in captions for word in found)
    assert all(len(prompt_tokens(studio.pipeline.tokenizer, word).words[0].positions) == 1 for word in found)


def test_no_seed_is_used_twice():
    seeds = [seed for prompt in testbed.memorized() for seed in seeds_of(prompt, 4)]
    assert len(set(seeds)) == len(seeds)


def test_prompts_are_taken_evenly():
    assert spread(list(range(10)), 4) == [0, 3, 6, 9]
    assert spread([1, 2], 5) == spread([1, 2], None) == [1, 2]
    with pytest.raises(MemhookError, match="prompts is 0"):
        spread([1, 2], 0)


def test_the_command_prints_writes_and_goes_on(tmp_path, monkeypatch):
    arguments = [
        "bench",
        "attribution",
        "--prompts",
        "6",
        "--scored",
        "1",
        "--steps",
        "10",
        "--work",
        str(tmp_path / "w"),
        "--out",
        str(tmp_path / "o"),
    ]
    first = CliRunner().invoke(app, arguments)
    assert first.exit_code == 0, first.output
    assert "random order" in first.output
    with (tmp_path / "o" / "attribution-hits.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    assert len(rows) == 4 * 3
    assert all(0 <= float(row["any"]) <= 1 for row in rows)
    changes = json.loads((tmp_path / "o" / "attribution-changes.json").read_text())["rows"]
    assert [row["changed"] for row in changes] == list(attribution.ARMS)
    assert changes[0]["drop"]["value"] == 0
    assert all(row["similarity"]["value"] < 1 for row in changes)
    assert (tmp_path / "o" / "attribution.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr("memhook.bench.samples.Studio.make", lambda *_: pytest.fail("pictures were made again"))
    monkeypatch.setattr("memhook.bench.samples.Studio.evaluations", lambda *_, **__: pytest.fail("words were scored again"))
    second = CliRunner().invoke(app, arguments)
    assert second.exit_code == 0, second.output
    assert second.output == first.output


@pytest.mark.parametrize(("option", "message"), [(["--images", "0"], "images is 0"), (["--steps", "5"], "steps is 5")])
def test_bad_options(option, message, tmp_path):
    result = CliRunner().invoke(app, ["bench", "attribution", "--work", str(tmp_path), *option])
    assert result.exit_code != 0
    assert message in str(result.exception)
