"""Which tokens of a prompt make it memorized: the gradient of the magnitude with respect to each token's embedding."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from memhook.adapting.tensors import row_hash
from memhook.attribution.inputs import InputGradients, input_gradients, liftable
from memhook.attribution.tokens import Tokens, WordScore, tokens_of
from memhook.capture.objective import Objective, check_embedding, check_values, independent
from memhook.capture.prediction import Evaluation
from memhook.capture.trace import Trace
from memhook.errors import MemhookError, NoGuidanceError, ReplayError

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, eq=False)
class TokenAttribution:
    """How strongly each token of ``p`` prompts drives the magnitude of the text-conditional prediction.

    Shown as a colored table in notebooks and by ``rich.print``, as plain text by ``print``.

    Attributes:
        gradients: ``(s, b, l)``: the norm of the gradient at each evaluation, sample and position.
        groups: ``(b,)``: to which prompt each sample belongs.
        prompts: Each prompt's `Tokens`.
        at: Where the gradient was taken: at the text encoder's ``"input"`` or ``"output"``.
    """

    gradients: np.ndarray
    groups: np.ndarray
    prompts: tuple[Tokens, ...]
    at: Literal["input", "output"] = "output"

    @cached_property
    def scores(self) -> np.ndarray:
        """``(b, l)``: the significance of every position, a sample a row (Wen et al. 2024, section 4.1)."""
        mean: np.ndarray = self.gradients.mean(axis=0)
        return mean

    @cached_property
    def prompt_scores(self) -> np.ndarray:
        """``(p, l)``: `scores` averaged over each prompt's samples."""
        return np.stack([self.scores[self.groups == prompt].mean(axis=0) for prompt in range(len(self.prompts))])

    @property
    def tokens(self) -> tuple[tuple[str, ...], ...]:
        """``(p, l)``: the token at every position of each prompt, as its vocabulary writes it."""
        return tuple(tokens.pieces for tokens in self.prompts)

    @property
    def special(self) -> np.ndarray:
        """``(p, l)`` bool: start, end and padding positions."""
        return np.array([tokens.special for tokens in self.prompts], bool)

    @cached_property
    def words(self) -> tuple[tuple[WordScore, ...], ...]:
        """Each prompt's words in order, without special positions.

        A word's score is the significance of its tokens taken as one block, ``mean_s sqrt(sum_i ||d m / d e_i||^2)``, so a word of
        one token has that token's score.
        """
        return tuple(self._words_of(prompt) for prompt in range(len(self.prompts)))

    def _words_of(self, prompt: int) -> tuple[WordScore, ...]:
        mine = self.gradients[:, self.groups == prompt]  # (s, samples, l)
        words = self.prompts[prompt].words
        blocks = [np.sqrt((mine[:, :, list(word.positions)].astype(np.float64) ** 2).sum(axis=2)).mean() for word in words]
        return tuple(WordScore(word.text, float(block), word.positions) for word, block in zip(words, blocks, strict=True))

    def top(self, k: int, *, prompt: int | None = None) -> tuple[WordScore, ...]:
        """The ``k`` most significant words of a prompt, the most significant first; all of them if there are fewer.

        Args:
            k: How many; 1 or more.
            prompt: Which prompt; may be left out where there is only one.
        """
        if k < 1:
            raise MemhookError(f"k is {k}; expected 1 or more")
        return tuple(sorted(self.words[self._only(prompt)], key=lambda word: -word.score)[:k])

    def to_dict(self) -> dict[str, Any]:
        """Everything shown, as plain lists and numbers for JSON."""
        return {
            "evaluations": len(self.gradients),
            "at": self.at,
            "prompts": [
                {
                    "prompt": tokens.prompt,
                    "cut_off": tokens.cut_off,
                    "samples": int((self.groups == number).sum()),
                    "tokens": list(tokens.pieces),
                    "special": list(tokens.special),
                    "scores": [float(score) for score in self.prompt_scores[number]],
                    "words": [{"word": word.text, "score": word.score, "positions": list(word.positions)} for word in self.words[number]],
                }
                for number, tokens in enumerate(self.prompts)
            ],
        }

    def plot(self, *, prompt: int | None = None, ax: Axes | None = None) -> Axes:
        """A bar for each word, on ``ax`` or a new figure (needs the extra ``plot``).

        Args:
            prompt: Which prompt; may be left out where there is only one.
            ax: Where to draw.
        """
        from memhook.attribution.views import plot

        return plot(self, self._only(prompt), ax)

    def __str__(self) -> str:
        from memhook.attribution.views import to_text

        return to_text(self)

    def __repr__(self) -> str:
        evaluations, samples, positions = self.gradients.shape
        where = " at the encoder's input" if self.at == "input" else ""
        return f"<TokenAttribution{where}: {len(self.prompts)} prompts, {samples} samples, {positions} positions, {evaluations} evaluations>"

    def _repr_html_(self) -> str:
        from memhook.attribution.views import to_html

        return to_html(self)

    def __rich__(self) -> Any:
        from memhook.attribution.views import to_rich

        return to_rich(self)

    def _only(self, prompt: int | None) -> int:
        if prompt is None and len(self.prompts) == 1:
            return 0
        if prompt is None or not 0 <= prompt < len(self.prompts):
            raise MemhookError(f"prompt is {prompt}; there are {len(self.prompts)} prompts here, so expected 0 to {len(self.prompts) - 1}")
        return prompt


def attribute_tokens(
    trace_or_objectives: Trace | Evaluation | Objective | Sequence[Evaluation | Objective],
    embedding: Tensor | None = None,
    *,
    tokens: Tokens | Sequence[str] | Sequence[Tokens | Sequence[str]] | None = None,
    at: Literal["input", "output"] | None = None,
) -> TokenAttribution:
    """Score every token by the gradient of the magnitude (Wen et al. 2024, section 4.1): ``SS_i = mean_s || d m[s] / d e_i ||_2``.

    One replay and one backward pass for each evaluation, all tokens and samples at once. Gradients are taken per sample, on the
    trajectory that was sampled, and with respect to the conditional embedding only. Models keep no ``.grad``.

    The paper takes ``e`` at the text encoder's output, where the encoder has carried a word's part to all later positions. Taken at its
    input, through encoder and denoiser in one backward pass, the score is the word's own; it costs one forward and backward pass of the
    encoder more. `TokenAttribution.at` says where it was taken.

    Args:
        trace_or_objectives: A trace that kept its calls (``memhook.probe``, or ``watch(..., keep="calls")``); or the evaluations to
            average over, such as ``trace.evaluations[:1]`` for the first; or your own objectives ``(b, l, d) -> (b,)``.
        embedding: Where to take the gradient, ``(b, l, d)``. The embedding that an evaluation was captured with where None.
        tokens: The prompt's tokens: from `prompt_tokens`, or a string for each position; for several prompts a list of these, one a
            prompt in order. Where None, those that the encoder was seen to read, else numbers of positions.
        at: ``"input"``: with respect to the token embeddings that enter the text encoder, for hosts whose encoder was seen at work in the
            watched block. ``"output"``: the paper's. Where None, the input where that is possible, and the output otherwise and where an
            embedding or objectives of your own are given.

    Returns:
        Scores for each sample and position, averaged over a prompt's samples for words; a NaN is an error, never a score.

    Raises:
        MemhookError: Shapes do not fit, an objective does not depend on the embedding, or a gradient is not finite.
        NoGuidanceError: No evaluation had an unconditional prediction.
        ReplayError: Calls were not kept, or cannot be replayed; with ``at="input"``, no call of the encoder that was seen made the
            captured embedding.

    >>> import memhook
    >>> from memhook.testing import tiny_unet, sample
    >>> unet = tiny_unet()
    >>> trace = memhook.probe(unet, lambda: sample(unet, samples=1), adapter=memhook.ModuleAdapter(unet, layout="uncond_first"))
    >>> memhook.attribute_tokens(trace, tokens=["a", "b", "c", "d", "e"]).scores.shape
    (1, 5)
    """
    if at not in (None, "input", "output"):
        raise MemhookError(f'at is {at!r}; expected "input", "output" or None')
    pairs = _pairs(trace_or_objectives, embedding)
    lifted = _at_input(trace_or_objectives, embedding, required=at == "input") if at != "output" else None
    if lifted is not None:
        rows = lifted.rows
    else:
        rows = [token_gradient(objective, start, name=f"evaluation {number}") for number, (objective, start) in enumerate(pairs)]
    if len({row.shape for row in rows}) > 1:
        sizes = sorted({tuple(row.shape) for row in rows})
        raise MemhookError(
            f"the evaluations have embeddings of {sizes} samples and positions, so they are several runs; use those of one (Trace.runs)"
        )
    gradients = torch.stack([row.cpu() for row in rows]).numpy()  # (s, b, l)
    bad = np.argwhere(~np.isfinite(gradients))
    if len(bad):
        raise MemhookError(
            f"the gradient of sample {bad[0][1]} at evaluation {bad[0][0]} is not finite ({len({(s, b) for s, b, _ in bad.tolist()})} in all); "
            "the model's dtype may be too narrow for it: attribute in bfloat16 or float32"
        )
    groups = trace_or_objectives.groups if isinstance(trace_or_objectives, Trace) else _same_rows(pairs[0][1])
    if lifted is None:
        return TokenAttribution(gradients, groups, _prompts(tokens, groups, gradients.shape[2]))
    own = lifted.tokens
    if tokens is None and own is not None:
        tokens = [own[int(np.flatnonzero(groups == prompt)[0])] for prompt in range(int(groups.max()) + 1)]
    return TokenAttribution(gradients, groups, _prompts(tokens, groups, gradients.shape[2]), "input")


def _at_input(given: Any, embedding: Tensor | None, *, required: bool) -> InputGradients | None:
    """The gradients at the encoder's input; None where they are not to be had, and not required."""
    evaluations = _guided(given)
    encoder = liftable(evaluations) if embedding is None else None
    if encoder is None:
        if not required:
            return None
        seen = "an embedding or objectives of your own were given" if embedding is not None else "no text encoder of this host was seen at work"
        raise ReplayError(
            f'{seen}, so it is not known what entered the encoder; leave words out (memhook.leave_one_out with encode=), or take at="output"'
        )
    try:
        return input_gradients(evaluations, encoder)
    except ReplayError:
        if required:
            raise
        return None  # `TokenAttribution.at` says so


def _guided(given: Any) -> list[Evaluation]:
    """The evaluations among what was given, those with an unconditional prediction of a trace."""
    items = given.evaluations if isinstance(given, Trace) else list(given) if isinstance(given, Sequence) else [given]
    kept = [item for item in items if not isinstance(given, Trace) or item.pred_uncond is not None]
    return kept if all(isinstance(item, Evaluation) for item in kept) else []


def token_gradient(objective: Objective, embedding: Tensor, *, name: str = "the objective") -> Tensor:
    """``|| d m_b / d e_(b, i) ||_2`` for every sample and position, ``(b, l)``, at least float32, by one backward pass.

    The samples' objectives are summed: each depends on its own embedding only, so the sum's gradient holds all of theirs.
    """
    check_embedding(embedding)
    with torch.inference_mode(mode=False), torch.enable_grad():
        leaf = embedding.detach().clone().requires_grad_()
        values = check_values(objective(leaf), len(leaf), name=name)
        gradient = torch.autograd.grad(values.sum(), leaf, allow_unused=True)[0] if values.requires_grad else None
    if gradient is None:
        raise independent(name)
    norms: Tensor = torch.linalg.vector_norm(gradient, dim=2, dtype=torch.promote_types(gradient.dtype, torch.float32))
    return norms


def _pairs(given: Any, embedding: Tensor | None) -> list[tuple[Objective, Tensor]]:
    """Objectives, each with the embedding to differentiate at."""
    if isinstance(given, Trace):
        chosen = [evaluation for evaluation in given.evaluations if evaluation.pred_uncond is not None]
        if not chosen:
            given.magnitudes  # noqa: B018 -- raises, with the host's reason
            raise NoGuidanceError("no evaluation of this trace has an unconditional prediction")
        if len(given.runs) > 1:
            raise MemhookError(f"this trace holds {len(given.runs)} runs of the sampler; attribute each of trace.runs, or watch each run by itself")
        given = chosen
    items = list(given) if isinstance(given, Sequence) else [given]
    if not items:
        raise MemhookError("there is no evaluation to attribute; pass at least one")
    pairs: list[tuple[Objective, Tensor]] = []
    for item in items:
        if isinstance(item, Evaluation):
            at = embedding if embedding is not None else item.embedding
            if at is None:
                raise ReplayError(
                    'an evaluation has no text embedding. Watch with keep="calls", or use memhook.probe; if it was, none was found among the '
                    "denoiser's arguments: say where it stands (memhook.ModuleAdapter(embedding=...))"
                )
            pairs.append((item.objective, at))
        elif callable(item):
            if embedding is None:
                raise MemhookError("objectives need the embedding to differentiate at; pass it as the second argument, (b, l, d)")
            pairs.append((item, embedding))
        else:
            raise MemhookError(f"cannot attribute a {type(item).__name__}; expected a Trace, evaluations of one, or functions of the embedding")
    return pairs


def _same_rows(embedding: Tensor) -> np.ndarray:
    """Samples with equal embeddings are one prompt's, ``(b,)``."""
    seen: dict[int, int] = {}
    return np.array([seen.setdefault(key, len(seen)) for key in row_hash(embedding).tolist()])


def _prompts(tokens: Any, groups: np.ndarray, length: int) -> tuple[Tokens, ...]:
    """One `Tokens` a prompt, from whatever the caller gave."""
    count = int(groups.max()) + 1
    if tokens is None:
        return (tokens_of([f"#{position}" for position in range(length)], marks="none"),) * count
    one = isinstance(tokens, Tokens) or all(isinstance(item, str) for item in tokens)
    given = [item if isinstance(item, Tokens) else tokens_of(item) for item in ([tokens] if one else tokens)]
    if len(given) == len(groups) != count:  # a list for each sample
        given = [given[int(np.flatnonzero(groups == prompt)[0])] for prompt in range(count)]
    elif len(given) != count:
        given = list(dict.fromkeys(given))  # the same prompt twice in a batch is one prompt
    if len(given) != count:
        raise MemhookError(f"there are tokens for {len(given)} prompts; the run has {count} different prompts. Pass one list a prompt, in order")
    for number, item in enumerate(given):
        if len(item) != length:
            raise MemhookError(
                f"prompt {number} has {len(item)} tokens; its embedding has {length} positions. Use prompt_tokens(..., length={length}), "
                "or give start, end and padding too"
            )
        if not item.words:
            warnings.warn(f"prompt {number} has only special tokens, so there is no word to show; see .prompt_scores for all positions", stacklevel=3)
    return tuple(given)
