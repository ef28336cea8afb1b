"""Token strings and words from the kinds of tokenizers that text encoders use."""

import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memhook.attribution.tokens import printable, prompt_tokens, shown, tokens_of
from memhook.errors import MemhookError

TEXT = ["a snowfall in the café", "a cat, an old cat", "the snowy fall of a cat !"] * 4


@pytest.fixture(scope="module")
def make():
    """Small tokenizers of each kind, trained on a few words."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    def make(kind, *, window=None, pad="<end>", start=True):
        suffix = "</w>" if kind == "clip" else None
        options = {"end_of_word_suffix": suffix} if suffix else {}
        model = Tokenizer(models.BPE(byte_fallback=kind == "sentencepiece", **options))
        bytes_ = pre_tokenizers.ByteLevel.alphabet() if kind != "sentencepiece" else [f"<0x{byte:02X}>" for byte in range(256)]
        model.pre_tokenizer = {
            "clip": pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]),
            "byte": pre_tokenizers.ByteLevel(add_prefix_space=False),
            "sentencepiece": pre_tokenizers.Metaspace(),
        }[kind]
        model.decoder = decoders.Metaspace() if kind == "sentencepiece" else decoders.ByteLevel()
        special = ["<start>", "<end>", "<pad>"]
        whole = {"clip": [f"{byte}</w>" for byte in bytes_], "byte": [], "sentencepiece": bytes_}[kind]
        alphabet = [] if kind == "sentencepiece" else bytes_
        trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=[*special, *whole], initial_alphabet=alphabet, show_progress=False, **options)
        model.train_from_iterator(TEXT, trainer)
        ends = "<start> $A <end>" if start else "$A <end>"
        settings = {"eos_token": "<end>", "pad_token": pad} | ({"bos_token": "<start>"} if start else {})
        settings |= {"model_max_length": window} if window else {}
        model.post_processor = processors.TemplateProcessing(single=ends, special_tokens=[(name, model.token_to_id(name)) for name in special])
        return transformers.PreTrainedTokenizerFast(tokenizer_object=model, **settings)

    return make


@pytest.mark.parametrize("kind", ["clip", "byte", "sentencepiece"])
def test_words_are_merged_and_special_positions_kept_apart(make, kind):
    tokens = prompt_tokens(make(kind, window=24, start=kind != "sentencepiece"), "a snowfall in the café")
    assert [word.text for word in tokens.words] == ["a", "snowfall", "in", "the", "café"]
    assert len(tokens) == 24
    inside = [position for word in tokens.words for position in word.positions]
    assert inside == [position for position, special in enumerate(tokens.special) if not special]
    assert tokens.special[0] == (kind != "sentencepiece")
    assert tokens.special[-1]


@pytest.mark.parametrize("kind", ["clip", "byte", "sentencepiece"])
def test_one_word_and_characters_outside_the_vocabulary(make, kind):
    tokenizer = make(kind, window=32)
    assert [word.text for word in prompt_tokens(tokenizer, "snowfall").words] == ["snowfall"]
    assert [word.text for word in prompt_tokens(tokenizer, "the 日本 cat").words] == ["the", "日本", "cat"]
    assert prompt_tokens(tokenizer, "").words == ()


def test_a_prompt_longer_than_the_window_says_what_was_cut_off(make):
    tokenizer = make("clip", window=6)
    with pytest.warns(UserWarning, match="4 fit the encoder's window of 6 positions; cut off.* Shorten"):
        tokens = prompt_tokens(tokenizer, "the cat of the old cat")
    assert [word.text for word in tokens.words] == ["the", "cat", "of", "the"]
    assert "old" in tokens.cut_off
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert prompt_tokens(tokenizer, "the cat of the").cut_off == ""


def test_a_padding_token_that_a_prompt_may_contain(make):
    # Stable Diffusion XL's second tokenizer pads with "!".
    tokenizer = make("clip", window=8, pad="!</w>")
    tokens = prompt_tokens(tokenizer, "the cat !")
    assert [word.text for word in tokens.words] == ["the", "cat", "!"]
    assert tokens.special.count(True) == 5


def test_tokenizers_without_window_or_padding(make):
    tokenizer = make("byte", pad=None)
    assert prompt_tokens(tokenizer, "the cat").special == (True, False, False, True)
    longer = prompt_tokens(tokenizer, "the cat", length=6)
    assert len(longer) == 6
    assert longer.special == (True, False, False, True, True, True)


def test_two_encoders_joined_along_the_positions(make):
    first = prompt_tokens(make("clip", window=8), "the cat")
    second = prompt_tokens(make("sentencepiece", window=6, start=False), "the cat")
    both = first + second
    assert len(both) == 14
    assert [word.text for word in both.words] == ["the", "cat", "the", "cat"]
    assert all(not both.special[position] for word in both.words for position in word.positions)
    assert both.prompt == "the cat"


pieces = st.lists(st.text("abcxyz", min_size=1, max_size=4), min_size=1, max_size=4)


@given(st.lists(pieces, min_size=1, max_size=6), st.sampled_from(["</w>", "Ġ", "▁"]))
def test_words_come_back_whatever_their_pieces(words, marks):
    if marks == "</w>":
        written = [piece for word in words for piece in [*word[:-1], word[-1] + "</w>"]]
    else:
        written = [piece for word in words for piece in [marks + word[0], *word[1:]]]
    tokens = tokens_of(["<s>", *written, "</s>"], special=[True, *[False] * len(written), True])
    assert [word.text for word in tokens.words] == ["".join(word) for word in words]
    assert [position for word in tokens.words for position in word.positions] == list(range(1, len(written) + 1))


def test_plain_strings_are_words_but_for_continuations():
    assert [word.text for word in tokens_of(["snow", "##fall", "in"]).words] == ["snowfall", "in"]
    assert [word.text for word in tokens_of(["a", "b"]).words] == ["a", "b"]


@given(st.text())
def test_printable_text_has_no_control_characters(text):
    assert printable(text).isprintable()


def test_shown_pieces():
    assert [shown(piece) for piece in ("cat</w>", "Ġcat", "▁cat", "cat", "<|endoftext|>", "cafÃ©</w>")] == [
        "cat",
        "cat",
        "cat",
        "cat",
        "<|endoftext|>",
        "café",
    ]


def test_bad_input(make):
    with pytest.raises(MemhookError, match="expected a string"):
        prompt_tokens(make("clip"), ["a", "b"])
    with pytest.raises(MemhookError, match="2 tokens and 1 special"):
        tokens_of(["a", "b"], special=[True])
    with pytest.raises(MemhookError, match="list of strings"):
        tokens_of("ab")
