"""What a host would say of other texts: their scores at the first evaluation, on the same noise, and what a calibration makes of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from memhook.capture.prediction import Evaluation, magnitude
from memhook.capture.prompts import prompt_mean
from memhook.capture.trace import Trace
from memhook.capture.unrecorded import unrecorded
from memhook.errors import CalibrationError, MemhookError, ReplayError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from memhook.capture.prediction import Encode
    from memhook.detection.calibration import Calibration

Ask = Callable[[Sequence[str]], "Trace | ArrayLike | Tensor"]
"""``ask(texts)``: the host's answer to other texts, always on the same noise: a `Trace` whose samples stand text by text, or their
scores, ``(n,)`` or ``(n, images)``."""

Progress = Callable[[int, int], object]
"""``progress(asked, most)``: how many texts have been asked, and how many it can be in all."""

_OTHER_WAY = (
    "Pass a function that runs the host on other texts instead of a trace: ask(texts) -> trace or scores, on the same noise each time "
    "(for diffusers: memhook_diffusers.asking.asking(pipeline, ...))"
)
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}  # between two batches of one encoder


@dataclass(frozen=True)
class Answer:
    """What the host said of one text.

    Attributes:
        text: The text.
        score: Its magnitude, averaged over the samples.
        p_value: What the calibration says of it; None without one.
    """

    text: str
    score: float
    p_value: float | None


class Asker:
    """Asks one host about texts, each of them once, many at a time.

    Args:
        target: A trace of the prompt that kept its calls (``memhook.probe``), whose first guided evaluation is run again with other
            embeddings, conditional rows alone; or a function that asks the host, see `Ask`.
        prompt: The prompt that the trace was made with.
        encode: The text encoder, for traces; the adapter's own where None.
        calibration: For p-values. Checked against the trace, also one that ``target`` answers.
        batch_size: How many samples are run at once.
        progress: Told how far it is.

    Attributes:
        unchanged: The answer to the prompt itself.
        samples: How many samples a score is the mean of.
        asked: How many texts were run.
        most: How many texts it can become; set by who asks.

    Raises:
        MemhookError: The prompt is empty, the trace holds several prompts or runs, or an answer is not finite or has another form.
        CalibrationMismatchError: The run's setting is not the calibration's.
        ReplayError: The calls were not kept, or what ``encode`` makes of the prompt is not what the run was captured with.
    """

    def __init__(
        self,
        target: Trace | Ask,
        prompt: str,
        *,
        encode: Encode | None = None,
        calibration: Calibration | None = None,
        batch_size: int = 32,
        progress: Progress | None = None,
    ) -> None:
        if not isinstance(prompt, str) or not prompt.strip():
            seen = "empty" if isinstance(prompt, str) else f"a {type(prompt).__name__}"
            raise MemhookError(f"the prompt is {seen}; expected the text that was given to the host, with at least one word")
        if batch_size < 1:
            raise MemhookError(f"batch_size is {batch_size}; expected 1 or more")
        self.prompt, self._calibration, self._progress = prompt, calibration, progress
        self._known: dict[str, float] = {}
        self.asked, self.most, self.samples = 0, 1, 1
        self._batch = batch_size
        if isinstance(target, Trace):
            number, evaluation = _first(target)
            self._judge(target, number + 1)
            self.samples = len(evaluation.pred_cond)
            self._run: Callable[[Sequence[str]], np.ndarray] = _Captured(evaluation, prompt, encode)
        elif callable(target):
            if encode is not None:
                raise MemhookError("encode is for a trace; the function that was given asks the host by itself. Leave encode out")
            self._function = target
            self._run = self._answered
        else:
            raise MemhookError(f"cannot ask a {type(target).__name__}; expected a Trace that kept its calls, or a function of texts. {_OTHER_WAY}")
        self.unchanged = self([prompt])[0]

    def __call__(self, texts: Sequence[str]) -> list[Answer]:
        """The answers, in the order of the texts."""
        fresh = [text for text in dict.fromkeys(texts) if text not in self._known]
        each = max(1, self._batch // self.samples)
        for start in range(0, len(fresh), each):
            part = fresh[start : start + each]
            scores = self._run(part)
            bad = np.flatnonzero(~np.isfinite(scores))
            if len(bad):
                raise MemhookError(f"the score of {part[int(bad[0])]!r} is {scores[bad[0]]}; run the model in a wider dtype (bfloat16 or float32)")
            self._known |= dict(zip(part, scores.tolist(), strict=True))
            self.asked += len(part)
            if self._progress is not None:
                self._progress(self.asked, max(self.most, self.asked))
        return [Answer(text, self._known[text], self.p_value(self._known[text])) for text in texts]

    def p_value(self, score: float) -> float | None:
        """The calibration's p-value of a score; None without a calibration."""
        return None if self._calibration is None else float(self._calibration.p_value(score))

    def _judge(self, trace: Trace, evaluations: int) -> None:
        """Take the calibration for a score over so many evaluations, once it is known to hold for this run."""
        if self._calibration is None:
            return
        known = self._calibration
        if known.setting and known.magnitudes.shape[1] < evaluations:
            raise CalibrationError(
                f"the calibration has magnitudes of {known.magnitudes.shape[1]} evaluations, and a text's score is over {evaluations}; "
                "ask for fewer evaluations, or calibrate over more"
            )
        self._calibration = known.using(evaluations) if known.setting else known
        self._calibration.check(trace)

    def _answered(self, texts: Sequence[str]) -> np.ndarray:
        """``(n,)``: what the caller's function says."""
        with torch.no_grad():
            found = self._function(list(texts))
        if isinstance(found, Trace):
            used = found.used(None)  # (s, n * images)
            if not self._known:
                self._judge(found, len(used))
            values = prompt_mean(used, found.has_guidance)
            values = values.reshape(len(texts), -1) if len(values) % len(texts) == 0 else values
        else:
            values = found.detach().cpu().to(torch.float64).numpy() if isinstance(found, Tensor) else np.asarray(found, np.float64)
        if values.shape != (len(texts),) and (values.ndim != 2 or len(values) != len(texts) or values.shape[1] == 0):
            raise MemhookError(
                f"the function answered numbers of shape {values.shape} for {len(texts)} texts; expected one a text, ({len(texts)},), or one for "
                f"each of its images, ({len(texts)}, images), or a trace with the samples text by text"
            )
        rows = values.reshape(len(texts), -1).astype(np.float32)
        if not self._known:
            self.samples = rows.shape[1]
        elif rows.shape[1] != self.samples:
            raise MemhookError(f"the function answered {rows.shape[1]} numbers a text, and {self.samples} before; expected the same noise each time")
        mean: np.ndarray = rows.mean(axis=1, dtype=np.float64).astype(np.float32)
        return mean


class _Captured:
    """Runs a captured evaluation again with the conditioning of other texts."""

    def __init__(self, evaluation: Evaluation, prompt: str, encode: Encode | None) -> None:
        chosen = encode if encode is not None else evaluation.encode
        if chosen is None:
            raise ReplayError(
                "the adapter knows no text encoder of this host, so other texts cannot be tried on the captured call; pass encode=, a function "
                f"from texts to embeddings (n, l, d). {_OTHER_WAY}"
            )
        self._evaluation, self._encode = evaluation, chosen
        self._before = self._encoded([prompt])
        captured = evaluation.embedding
        if captured is None or evaluation.replay is None or evaluation.pred_uncond is None:
            raise ReplayError(f'the evaluation has no text embedding or was captured without its call; watch with keep="calls". {_OTHER_WAY}')
        self._shape = tuple(captured.shape[1:])
        _same_embedding(self._before[0], captured)
        self._checked = False

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """``(n,)``: the magnitude of each text, averaged over the samples."""
        after = self._encoded(texts)
        if tuple(after[0].shape[1:]) != self._shape:
            raise ReplayError(
                f"the embedding of {texts[0]!r} has shape {tuple(after[0].shape[1:])}, and the captured call took {self._shape}: this host's "
                f"embedding is as long as its prompt. {_OTHER_WAY}"
            )
        evaluation, count = self._evaluation, len(texts)
        replay, uncond = evaluation.replay, evaluation.pred_uncond
        if replay is None or uncond is None:
            raise ReplayError("the evaluation was captured without its call")
        with torch.no_grad():
            if hasattr(replay, "reword"):
                predicted = replay.reword(self._before, after)
                repeated = uncond.to(predicted.device).repeat(count, *[1] * (uncond.ndim - 1))
                values = magnitude(predicted.detach(), repeated).reshape(count, -1)
            else:  # a host's own, which knows its own batch alone
                rows = [replay(one.to(evaluation.embedding).expand(len(uncond), -1, -1)) for one in after[0].unsqueeze(1)]
                values = torch.stack([magnitude(row.detach(), uncond.to(row.device)) for row in rows])
        found: np.ndarray = values.mean(dim=1, dtype=torch.float64).float().cpu().numpy()
        return found

    def _encoded(self, texts: Sequence[str]) -> list[Tensor]:
        """Tensors ``(n, ...)``, the embedding first."""
        with unrecorded(), torch.no_grad():
            found: Any = self._encode(list(texts))
        parts = [found] if isinstance(found, Tensor) else list(found)
        if not parts or not all(isinstance(part, Tensor) and part.ndim >= 2 and len(part) == len(texts) for part in parts) or parts[0].ndim != 3:
            seen = ", ".join(str(tuple(part.shape)) if isinstance(part, Tensor) else type(part).__name__ for part in parts)
            raise MemhookError(
                f"encode gave {seen or 'nothing'} for {len(texts)} texts; expected the embeddings ({len(texts)}, l, d), or these and what else the "
                "denoiser is given of a text"
            )
        return [part.detach() for part in parts]


def _first(trace: Trace) -> tuple[int, Evaluation]:
    """The first guided evaluation of a trace of one prompt."""
    evaluations = trace.evaluations  # raises where calls were not kept
    magnitudes = trace.magnitudes  # raises where there was no guidance
    if len(trace.runs) > 1:
        raise MemhookError(f"this trace holds {len(trace.runs)} runs of the sampler; pass one of trace.runs, or probe one run")
    prompts = int(trace.groups.max()) + 1
    if prompts > 1:
        raise MemhookError(
            f"this trace holds {prompts} prompts; words are asked of one prompt, so probe one (with several images of it, if you like)"
        )
    number = int(np.flatnonzero(trace.has_guidance)[0])
    if not np.isfinite(magnitudes[number]).all():
        raise MemhookError("the predictions of this trace are not finite; run the model in a wider dtype")
    return number, evaluations[number]


def _same_embedding(encoded: Tensor, captured: Tensor) -> None:
    """Raise where the text encoder's answer to the prompt is not what the run was captured with."""
    if encoded.shape[1:] != captured.shape[1:]:
        raise ReplayError(
            f"encode makes an embedding of shape {tuple(encoded.shape[1:])} of the prompt, and the run was captured with one of shape "
            f"{tuple(captured.shape[1:])}: the host encodes in another way. {_OTHER_WAY}"
        )
    wide = captured.to(torch.promote_types(captured.dtype, torch.float32))
    error = float((encoded.to(wide) - wide).norm() / wide.norm().clamp_min(1e-30))
    if not error <= _TOLERANCE.get(captured.dtype, 1e-2):
        raise ReplayError(
            f"what encode makes of the prompt is not what the run was captured with (relative difference {error:.2g}): the prompt may be another "
            f"one, or the host encodes it in another way (weights of words, skipped layers, an adapter on the encoder). {_OTHER_WAY}"
        )
