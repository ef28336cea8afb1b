"""Words are those of the ids that the text encoder received: textual inversion, long prompts, several encoders."""

import pytest

from memhook.attribution.tokens import id_tokens, prompt_tokens
from memhook.errors import MemhookError
from tests.attribution.test_tokens import make  # noqa: F401 -- a fixture


@pytest.fixture
def placeholders(make):  # noqa: F811
    def build(kind, vectors, **options):
        tokenizer = make(kind, window=24, **options)
        tokenizer.add_tokens(["<cat-toy>", *(f"<cat-toy>_{number}" for number in range(1, vectors))])
        return tokenizer

    return build


def received(tokenizer, prompt):
    """What diffusers gives the encoder, by its own rule."""
    loaders = pytest.importorskip("diffusers.loaders")
    expanded = loaders.TextualInversionLoaderMixin().maybe_convert_prompt(prompt, tokenizer)
    return tokenizer(expanded, padding="max_length", truncation=True, max_length=24)["input_ids"]


@pytest.mark.parametrize("kind", ["clip", "byte", "sentencepiece"])
@pytest.mark.parametrize("vectors", [1, 2, 4])
@pytest.mark.parametrize("prompt", ["a <cat-toy> on the old cat", "<cat-toy>", "the <cat-toy> <cat-toy>, a cat", "old<cat-toy>on the fall"])
def test_a_placeholder_is_one_word_of_all_its_vectors(placeholders, kind, vectors, prompt):
    tokenizer = placeholders(kind, vectors, start=kind != "sentencepiece")
    tokens, ids = prompt_tokens(tokenizer, prompt), received(tokenizer, prompt)
    assert list(tokens.pieces) == tokenizer.convert_ids_to_tokens(ids)
    toys = [tokenizer.convert_tokens_to_ids(name) for name in ["<cat-toy>", *(f"<cat-toy>_{number}" for number in range(1, vectors))]]
    found = [word for word in tokens.words if word.text == "<cat-toy>"]
    assert [[ids[position] for position in word.positions if ids[position] in toys] for word in found] == [toys] * prompt.count("<cat-toy>")
    rest = prompt.replace("<cat-toy>", " ").replace(",", " , ").split()
    assert [word.text for word in tokens.words if word.text != "<cat-toy>"] == rest
    assert id_tokens(tokenizer, ids).words == tokens.words


def test_a_placeholder_that_is_cut_off_by_the_window(placeholders):
    tokenizer = placeholders("clip", 4)
    with pytest.warns(UserWarning, match="cut off"):
        tokens = prompt_tokens(tokenizer, "the <cat-toy> cat", length=5)
    assert [(word.text, word.positions) for word in tokens.words] == [("the", (1,)), ("<cat-toy>", (2, 3))]


@pytest.mark.parametrize("words", [3, 8, 11, 14])
@pytest.mark.parametrize("windows", [2, 3])
def test_several_windows_of_an_encoder(make, words, windows):  # noqa: F811
    """Each window has a start and an end of its own, and what follows a short prompt is padding."""
    tokenizer = make("clip", window=10)
    prompt = " ".join(["cat", "the", "of", "a", "old"][number % 5] for number in range(words))
    plain = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    chunks = [plain[start : start + 8] for start in range(0, 8 * windows, 8)]
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    ids = [token for chunk in chunks for token in [start, *chunk, *[end] * (9 - len(chunk))]]
    tokens = prompt_tokens(tokenizer, prompt, length=10 * windows)
    assert list(tokens.pieces) == tokenizer.convert_ids_to_tokens(ids)
    assert [word.text for word in tokens.words] == prompt.split()
    inside = [position for word in tokens.words for position in word.positions]
    assert inside == [position for position, token in enumerate(ids) if token not in (start, end)]


def test_a_long_prompt_with_one_start_and_one_end(make):  # noqa: F811
    """As Stable Diffusion's long-prompt pipelines make it with ``no_boseos_middle``."""
    tokens = prompt_tokens(make("clip", window=6), "the cat of the old cat", length=10)
    assert [word.positions[0] for word in tokens.words] == [1, 2, 3, 4, *range(5, 4 + len(tokens.words) - 3)]
    assert tokens.words[0].text == "the"
    assert tokens.words[-1].text == "cat"
    assert tokens.special[0]
    assert tokens.special[-1]


def test_positions_that_this_encoder_cannot_have_made_are_numbered(make):  # noqa: F811
    """Stable Diffusion 3: 77 positions of CLIP and 256 of T5."""
    with pytest.warns(UserWarning, match="333 positions, which no windows of 77 .* make, so its positions are numbered"):
        tokens = prompt_tokens(make("clip", window=77), "the cat", length=333)
    assert tokens.pieces[:2] == ("#0", "#1")
    assert len(tokens) == 333


def test_an_encoder_without_windows_takes_any_length(make):  # noqa: F811
    tokens = prompt_tokens(make("sentencepiece", window=8, start=False), "the cat", length=24)
    assert [word.text for word in tokens.words] == ["the", "cat"]
    assert tokens.special.count(False) == 2


def test_ids(make):  # noqa: F811
    tokenizer = make("clip", window=8, pad="!</w>")
    ids = tokenizer("the cat !", padding="max_length")["input_ids"]
    tokens = id_tokens(tokenizer, ids, attended=tokenizer("the cat !", padding="max_length")["attention_mask"])
    assert tokens.words == prompt_tokens(tokenizer, "the cat !").words
    assert [word.text for word in id_tokens(tokenizer, ids[1:4]).words] == ["the", "cat"]
    with pytest.raises(MemhookError, match="3 ids and 1 flags"):
        id_tokens(tokenizer, ids[:3], attended=[1])
