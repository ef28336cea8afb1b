"""The gradient with respect to the token embeddings that enter the text encoder, through encoder and denoiser."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from memhook.attribution.tokens import Tokens, prompt_tokens, tokens_of
from memhook.capture.lifted import EncoderInput, Liftable, Lifted
from memhook.capture.objective import check_values
from memhook.capture.prediction import magnitude
from memhook.errors import MemhookError, ReplayError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from memhook.capture.prediction import Evaluation


@dataclass(frozen=True, eq=False)
class InputGradients:
    """What `input_gradients` found.

    Attributes:
        rows: ``(b, l)`` for each evaluation: the norm of the gradient at every position of every sample.
        tokens: Each sample's tokens, ``(b,)``; None where the encoders' vocabularies are not known.
    """

    rows: list[Tensor]
    tokens: tuple[Tokens, ...] | None


def liftable(evaluations: Sequence[object]) -> Liftable | None:
    """What knows how the evaluations' embedding was made; None where nothing does."""
    encoders = [getattr(evaluation, "encode", None) for evaluation in evaluations]
    first = encoders[0] if encoders else None
    return first if isinstance(first, Liftable) and all(encoder is first for encoder in encoders) else None


def input_gradients(evaluations: Sequence[Evaluation], encoder: Liftable) -> InputGradients:
    """``|| d m_b / d x_(b, i) ||_2`` for the embedding ``x_i`` that enters the text encoder for token ``i``, by one backward pass each.

    The encoders run once, for each sample by itself, so that gradients are taken per sample. Encoders that read the same tokens (both
    of Stable Diffusion XL) count as one block for each token; others (CLIP and T5) have positions one after the other.

    Raises:
        ReplayError: No call of the encoder that was seen made the captured embedding, or the denoiser is given more of the text.
    """
    captured = evaluations[0].embedding
    if captured is None:
        raise ReplayError('the evaluation has no text embedding; watch with keep="calls", or use memhook.probe')
    lifted = encoder.lift(captured)
    order = _blocks(lifted)
    rows = []
    for number, evaluation in enumerate(evaluations):
        last = number == len(evaluations) - 1
        gradients = _through(evaluation, lifted, keep=not last)
        parts = [torch.stack([gradients[index].square() for index in block]).sum(dim=0).sqrt() for block in order]
        rows.append(torch.cat([part.to(parts[0].device) for part in parts], dim=1))
    return InputGradients(rows, _tokens(lifted, order))


def _through(evaluation: Evaluation, lifted: Lifted, *, keep: bool) -> list[Tensor]:
    """The norms ``(b, k)`` at each encoder's input."""
    replay, uncond = evaluation.replay, evaluation.pred_uncond
    if replay is None or uncond is None or not hasattr(replay, "with_text"):
        raise ReplayError(
            "this host's replay exchanges the embedding alone, so no gradient passes to the text encoder's input; leave words out "
            '(memhook.leave_one_out), or take at="output"'
        )
    with torch.inference_mode(mode=False), torch.enable_grad():
        before = [output.detach() for output in lifted.outputs]
        after = [output.clone().requires_grad_(output.is_floating_point()) for output in before]
        predicted = replay.with_text(before, after)
        values = check_values(magnitude(predicted, uncond.to(predicted.device)), len(before[0]))
        floating = [index for index, output in enumerate(lifted.outputs) if output.requires_grad]
        seen = torch.autograd.grad(values.sum(), [after[index] for index in floating], allow_unused=True)
        used = [(lifted.outputs[index], gradient) for index, gradient in zip(floating, seen, strict=True) if gradient is not None]
        leaves = [part.embeddings for part in lifted.inputs]
        outputs, given = [output for output, _ in used], [gradient.to(output) for output, gradient in used]
        found = torch.autograd.grad(outputs, leaves, given, retain_graph=keep, allow_unused=True)
    return [
        torch.linalg.vector_norm(gradient, dim=2, dtype=torch.promote_types(gradient.dtype, torch.float32))
        if gradient is not None
        else torch.zeros(leaf.shape[:2], device=leaf.device)
        for gradient, leaf in zip(found, leaves, strict=True)
    ]


def _blocks(lifted: Lifted) -> list[list[int]]:
    """Which encoders read the same tokens, in the order of their calls."""
    blocks: list[list[int]] = []
    for index, part in enumerate(lifted.inputs):
        same = next((block for block in blocks if _same_words(lifted.inputs[block[0]], part)), None)
        if same is None:
            blocks.append([index])
        else:
            same.append(index)
    return blocks


def _same_words(first: EncoderInput, second: EncoderInput) -> bool:
    """Whether two encoders have the same words at the same positions; their padding may differ (Stable Diffusion XL)."""
    if first.ids.shape != second.ids.shape:
        return False
    if torch.equal(first.ids.cpu(), second.ids.cpu()):
        return True
    if first.tokenizer is None or second.tokenizer is None:
        return False
    spelt = [[_content(part, row) for row in range(len(part.ids))] for part in (first, second)]
    return spelt[0] == spelt[1]


def _content(part: EncoderInput, row: int) -> list[str]:
    """A row's tokens up to the first end."""
    ids = part.ids[row].tolist()
    end = getattr(part.tokenizer, "eos_token_id", None)
    return [str(piece) for piece in part.tokenizer.convert_ids_to_tokens(ids[: ids.index(end) + 1] if end in ids else ids)]


def _tokens(lifted: Lifted, order: Sequence[Sequence[int]]) -> tuple[Tokens, ...] | None:
    if any(lifted.inputs[block[0]].tokenizer is None for block in order):
        return None
    found = []
    for row, text in enumerate(lifted.texts):
        parts = [_tokens_of(lifted.inputs[block[0]], row, text) for block in order]
        whole = parts[0]
        for part in parts[1:]:
            whole = whole + part
        found.append(whole)
    return tuple(found)


def _tokens_of(part: EncoderInput, row: int, text: str) -> Tokens:
    """A row's tokens: those of the prompt where the ids are the prompt's, else as the ids spell (a template around the prompt)."""
    ids = part.ids[row].tolist()
    pieces = tuple(str(piece) for piece in part.tokenizer.convert_ids_to_tokens(ids))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a prompt that was cut off: said once, where the attribution is shown
        try:
            plain = prompt_tokens(part.tokenizer, text, length=len(ids))
        except (MemhookError, TypeError, ValueError, AttributeError):
            plain = None
    if plain is not None and plain.pieces == pieces:
        return plain
    special = set(getattr(part.tokenizer, "all_special_ids", ()))
    return tokens_of(pieces, special=[number in special for number in ids], prompt=text)
