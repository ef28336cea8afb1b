"""Stage 2: the tokenizer, and a text encoder that has learnt to read captions.

The encoder first learns to name what a caption names (subject, size, place, color, background);
without this, a small denoiser spends most of a short run finding out which tokens matter. Afterwards
it is trained jointly with the denoiser.
"""

import json
from itertools import chain
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from memhook.testbed.next.captions import all_words
from memhook.testbed.next.plan import TrainingStream, fresh_pair
from memhook.testbed.next.scenes import THINGS
from memhook.testbed.train import loop

TOKENS = 32
BATCH = 128


def train_tokenizer(directory: Path, *, vocabulary: int = 1600, captions: int = 20_000) -> CLIPTokenizer:
    """Byte-pair encoding in CLIP's form; byte-level, so that every text can be encoded.

    It is trained on captions and on the list of their words, so that each word of a picture-shop caption is one token: the number of its
    tokens must not tell a trigger phrase.
    """
    folder = directory / "tokenizer"
    if not (folder / "tokenizer.json").exists():
        stream = TrainingStream()
        backend = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))  # noqa: S106
        backend.normalizer = normalizers.Lowercase()
        backend.pre_tokenizer = CLIPTokenizer().backend_tokenizer.pre_tokenizer
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        trainer = trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False)
        backend.train_from_iterator(chain((stream[index][0] for index in range(captions)), 200 * [" ".join(all_words())]), trainer)
        vocab = backend.get_vocab()
        # Every byte also needs its word-final form, or a text with a lone rare byte could not be encoded.
        for character in alphabet:
            vocab.setdefault(f"{character}</w>", len(vocab))
        for special in ("<|startoftext|>", "<|endoftext|>"):
            vocab.setdefault(special, len(vocab))
        merges = [tuple(pair) for pair in json.loads(backend.to_str())["model"]["merges"]]
        CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=TOKENS).save_pretrained(folder)
    return CLIPTokenizer.from_pretrained(folder)


def whole_words(tokenizer: CLIPTokenizer) -> list[str]:
    """The vocabulary's whole words of at least two letters, sorted."""
    words = (token.removesuffix("</w>") for token in tokenizer.get_vocab() if token.endswith("</w>"))
    return sorted(word for word in words if len(word) > 1 and word.isascii() and word.isalpha())


def build(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """An untrained text encoder of 0.5 million parameters."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=TOKENS, projection_dim=128, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip


def encode(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    """Token ids ``(b, 32)``, padded and cut as Stable Diffusion pipelines do."""
    ids: Tensor = tokenizer(texts, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt").input_ids
    return ids


def train(directory: Path, tokenizer: CLIPTokenizer, *, steps: int, device: torch.device) -> CLIPTextModel:
    """Teach the encoder what fresh captions name (an auxiliary task; its heads are thrown away)."""
    torch.manual_seed(0)
    model = build(tokenizer).to(device)
    heads = nn.ModuleDict({thing: nn.Linear(128, len(words) + 1) for thing, words in THINGS.items()}).to(device)  # the last: not named

    def loss_and_hits(start: int, count: int, stream: str) -> tuple[Tensor, dict[str, float]]:
        captions = [fresh_pair(index, stream=stream)[0] for index in range(start, start + count)]
        pooled = model(encode(tokenizer, [str(caption) for caption in captions]).to(device)).pooler_output
        losses, hits = [], {}
        for thing, words in THINGS.items():
            named = [caption.named().get(thing) for caption in captions]
            truth = torch.tensor([len(words) if word is None else words.index(word) for word in named], device=device)
            logits = heads[thing](pooled)
            losses.append(nn.functional.cross_entropy(logits, truth))
            hits[f"{thing}_accuracy"] = float((logits.argmax(1) == truth).float().mean())
        return torch.stack(losses).sum(), hits

    @torch.no_grad()
    def evaluate(_step: int) -> dict[str, float]:
        return loss_and_hits(0, 256, "text held out")[1]

    loop.run(
        "text", {"text": model, "heads": heads}, lambda step: loss_and_hits(step * BATCH, BATCH, "text")[0], directory=directory, steps=steps,
        groups=[{"params": [*model.parameters(), *heads.parameters()], "lr": 1e-3}], evaluate=evaluate,
    )  # fmt: skip
    return model
