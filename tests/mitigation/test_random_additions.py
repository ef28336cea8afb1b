"""Prompts and embeddings disturbed on purpose."""

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memhook import testbed
from memhook.baselines import add_embedding_noise, add_random_numbers, add_random_tokens, repeat_words
from memhook.errors import MemhookError

PROMPT = "Forgotten Lantern - fox greeting card by Selma Nakamura"


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(testbed.model_path() / "tokenizer")


@pytest.fixture(params=["tokens", "numbers", "repeats"])
def add(request, tokenizer):
    return {
        "tokens": lambda prompt, **options: add_random_tokens(prompt, tokenizer, **options),
        "numbers": add_random_numbers,
        "repeats": repeat_words,
    }[request.param]


def is_subsequence(words, of):
    rest = iter(of)
    return all(word in rest for word in words)


@pytest.mark.parametrize("count", [0, 1, 2, 8])
def test_so_many_words_come_in_and_the_prompts_own_stay_in_order(add, count):
    for seed in range(20):
        words = add(PROMPT, count=count, seed=seed).split()
        assert len(words) == len(PROMPT.split()) + count
        assert is_subsequence(PROMPT.split(), words)


def test_a_seed_gives_one_prompt_and_other_seeds_give_others(add):
    assert add(PROMPT, count=4, seed=3) == add(PROMPT, count=4, seed=3)
    assert len({add(PROMPT, count=4, seed=seed) for seed in range(30)}) > 25


def test_every_place_is_taken_also_both_ends(add):
    places = set()
    for seed in range(300):
        words = add("one two three", count=1, seed=seed).split()
        places |= {place for place in range(4) if words[:place] + words[place + 1 :] == ["one", "two", "three"]}
    assert places == {0, 1, 2, 3}


def test_tokens_come_from_the_whole_vocabulary_without_special_ones(tokenizer):
    added = [add_random_tokens("", tokenizer, count=1, seed=seed) for seed in range(600)]
    assert len(set(added)) > 400  # 600 draws from about 1,400 entries repeat some
    assert not any("<|" in text for text in added)
    written = {tokenizer.decode([token]).strip() for token in range(len(tokenizer))}
    assert set(added) <= written


def test_a_vocabulary_without_a_word_says_so():
    class Silent:
        all_special_ids = (0,)

        def __len__(self):
            return 3

        def decode(self, ids):
            return "\ufffd"

    with pytest.raises(MemhookError, match="none of 1000 random tokens of the Silent"):
        add_random_tokens("a fox", Silent(), count=1, seed=0)


def test_numbers_are_numbers_and_repeats_are_words_of_the_prompt():
    numbers = Counter(add_random_numbers(PROMPT, count=3, seed=1).split()) - Counter(PROMPT.split())
    assert all(word.isdigit() and int(word) < 100_000 for word in numbers)
    assert set(repeat_words(PROMPT, count=8, seed=1).split()) == set(PROMPT.split())


def test_bad_input(add):
    with pytest.raises(MemhookError, match="count is -1"):
        add(PROMPT, count=-1, seed=0)
    with pytest.raises(MemhookError, match="no word to repeat"):
        repeat_words(" ", count=1, seed=0)


@given(scale=st.floats(0.01, 4), size=st.floats(0.1, 30))
def test_noise_is_measured_in_units_of_the_embedding(scale, size):
    embedding = size * torch.randn(2, 9, 200, generator=torch.Generator().manual_seed(0))
    moved = add_embedding_noise(embedding, scale=scale, seeds=[1, 2])
    noise = (moved - embedding)[:, 1:]
    root = embedding[:, 1:].square().mean(dim=(1, 2)).sqrt()
    torch.testing.assert_close(noise.std(dim=(1, 2)) / root, torch.full((2,), scale), rtol=0.1, atol=1e-3)
    assert torch.equal(moved[:, 0], embedding[:, 0])


def test_a_samples_noise_depends_on_its_seed_only():
    embedding = torch.ones(3, 4, 5)
    moved = add_embedding_noise(embedding, scale=0.5, seeds=[7, 8, 7], fixed_tokens=0)
    assert torch.equal(moved[0], moved[2])
    assert not torch.equal(moved[0], moved[1])
    assert torch.equal(moved[1:2], add_embedding_noise(embedding[1:2], scale=0.5, seeds=[8], fixed_tokens=0))
    assert torch.equal(embedding, add_embedding_noise(embedding, scale=0.0, seeds=[1, 2, 3]))


def test_noise_keeps_dtype():
    assert add_embedding_noise(torch.ones(1, 2, 3, dtype=torch.float16), scale=1.0, seeds=[0]).dtype == torch.float16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": -1.0, "seeds": [0]}, "scale is -1.0"),
        ({"scale": 1.0, "seeds": [0, 1]}, "2 seeds for 1 samples"),
        ({"scale": 1.0, "seeds": [0], "fixed_tokens": 2}, "fixed_tokens is 2"),
    ],
)
def test_bad_noise(options, message):
    with pytest.raises(MemhookError, match=message):
        add_embedding_noise(torch.ones(1, 2, 3), **options)
