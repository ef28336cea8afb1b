"""Words where they stand in a prompt, and the prompt without them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memhook.detection.prompt_words import edited, find_all, places_of, words_of
from memhook.errors import MemhookError


def texts(prompt):
    return [word.text for word in words_of(prompt)]


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("Rising Dream (fox mug), blue", ["Rising", "Dream", "fox", "mug", "blue"]),
        ("rock'n'roll, 1.5 m sea-side o’Neill", ["rock'n'roll", "1.5", "m", "sea-side", "o’Neill"]),
        ("(fox:1.2) [cat] (blue sky:0.8)", ["fox", "cat", "blue", "sky"]),  # weights are no words
        ("ratio 16:9 now", ["ratio", "16", "9", "now"]),
        ("一只狐狸 in snow", ["一", "只", "狐", "狸", "in", "snow"]),
        ("हिन्दी शब्द", ["हिन्दी", "शब्द"]),  # vowel signs are marks, not letters
        ("🦊 in the ❄️ snow 👩‍🚀", ["🦊", "in", "the", "❄️", "snow", "👩‍🚀"]),
        ("-fox- 'cat'", ["fox", "cat"]),
        ("", []),
        (" ... — ", []),
    ],
)
def test_words(prompt, words):
    assert texts(prompt) == words


@pytest.mark.parametrize(
    ("prompt", "gone", "left"),
    [
        ("Rising Dream (fox mug), blue", [0], "Dream (fox mug), blue"),
        ("Rising Dream (fox mug), blue", [2, 3], "Rising Dream, blue"),
        ("Rising Dream (fox mug), blue", [4], "Rising Dream (fox mug)"),
        ("a fox, snow, red.", [2], "a fox, red."),
        ("a fox, snow, red.", [3], "a fox, snow."),
        ("a fox, snow, red.", [0, 1], "snow, red."),
        ("red,blue,green", [1], "red,green"),
        ("A - B - C", [1], "A - C"),
        ("A - B - C", [0], "B - C"),
        ("(fox:1.2) cat", [0], "cat"),
        ("一只狐狸 in snow", [1], "一狐狸 in snow"),
        ("one  two   three", [1], "one three"),
        ("fox", [0], ""),
        ("fox, cat", [0, 1], ""),
    ],
)
def test_what_is_left_has_no_loose_separators(prompt, gone, left):
    assert edited(prompt, words_of(prompt), dict.fromkeys(gone, "")) == left


def test_an_exchanged_word_changes_nothing_around_it():
    prompt = "Gilded Song - fox, mug (fox)"
    assert edited(prompt, words_of(prompt), {1: "river", 4: "cat"}) == "Gilded river - fox, mug (cat)"


@given(st.text(max_size=60), st.data())
def test_what_is_left_are_the_other_words_in_order(prompt, data):
    words = words_of(prompt)
    assert all(prompt[word.start : word.end] == word.text for word in words)
    gone = data.draw(st.sets(st.sampled_from(range(len(words)))) if words else st.just(set()))
    left = edited(prompt, words, dict.fromkeys(gone, ""))
    kept = "".join(word.text for number, word in enumerate(words) if number not in gone)
    assert "".join(char for char in kept if char.isalnum()) == "".join(char for char in "".join(texts(left)) if char.isalnum())
    assert edited(prompt, words, {}) == prompt


def test_phrases_are_found_at_all_places_whatever_their_capitals():
    words = words_of("Snow Fox, a snow  fox and a SNOW-fox")
    assert places_of(words, "snow fox") == ((0, 1), (3, 4))
    assert list(find_all(words, ["fox"], what="keep", prompt="")) == [("fox", (1, 4))]


@pytest.mark.parametrize("phrases", [["cat"], ["fox snow"], [""], "snow"])
def test_a_phrase_that_is_not_there_is_named_with_the_words_that_are(phrases):
    prompt = "snow fox"
    with pytest.raises(MemhookError, match=r"keep (has .*expected some of its words: snow, fox|is the one string)"):
        list(find_all(words_of(prompt), phrases, what="keep", prompt=prompt))
