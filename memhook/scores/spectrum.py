"""The magnitude measured against what clean prompts have at each spatial frequency: a memorized picture shows where theirs have nothing."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from memhook.capture.prediction import SPACES, Evaluation, Space
from memhook.errors import CalibrationError, CalibrationMismatchError, MemhookError, NoGuidanceError, ReplayError
from memhook.files import replace_file
from memhook.scores.stored import read_calibration_file

if TYPE_CHECKING:
    import os

_FORMAT = "memhook-spectrum-1"
SHRINKAGE = 0.1


@dataclass(frozen=True, eq=False)
class CleanSpectrum:
    """The mean power spectrum of ``pred_cond - pred_uncond`` over clean prompts, at one evaluation of one model.

    A caption without a memory says roughly what is where: its difference is smooth and differs from zero in a few colors. A memorized
    one says it sharply. `magnitude` divides each frequency by what clean prompts have there, so that the sharp part counts, which the
    plain norm drowns in the smooth one. Not in the paper; measured on two small models only (docs/benchmarks.md).

    It is a score (docs/scores.md): ``watch(target, score=spectrum)`` computes it at a run's first evaluation.

    Attributes:
        power: ``(c, h, w)`` float32 (for video ``(c, f, h, w)``): mean squared amplitude of the orthonormal Fourier transform over space.
        samples: How many differences the mean is over.
        space: What the predictions are.
        timestep: Of the evaluation; None where the host names none.
        shrinkage: How much of the mean power is added to every frequency, so that those without any do not decide alone.

    >>> import memhook
    >>> from memhook.testing import tiny_unet, sample
    >>> unet = tiny_unet()
    >>> def first(seed):
    ...     run = lambda: sample(unet, samples=4, seed=seed)
    ...     return memhook.probe(unet, run, adapter=memhook.ModuleAdapter(unet, layout="uncond_first")).evaluations[0]
    >>> spectrum = memhook.CleanSpectrum.fit(first(seed) for seed in range(8))
    >>> calibration = memhook.calibrate(torch.cat([spectrum.magnitude(first(seed)) for seed in range(8, 16)]))
    >>> calibration.p_value(spectrum.magnitude(first(99))).shape
    (4,)
    """

    name: ClassVar[str] = "whitened"
    needs: ClassVar[str] = "pair"
    symmetric: ClassVar[bool] = True
    at: ClassVar[int] = 0

    power: Tensor
    samples: int
    space: Space = "eps"
    timestep: float | None = None
    shrinkage: float = SHRINKAGE

    def __post_init__(self) -> None:
        seen = f"shape {tuple(self.power.shape)}, {self.samples} samples, shrinkage {self.shrinkage}"
        if self.power.ndim < 3 or self.samples < 1 or not 0 < self.shrinkage < float("inf"):
            raise CalibrationError(f"the spectrum has {seen}; expected (channels, ..., height, width), 1 sample or more and a shrinkage above 0")
        if not bool(torch.isfinite(self.power).all()) or bool((self.power < 0).any()) or not bool((self.power > 0).any()):
            raise CalibrationError("the spectrum is zero everywhere, negative or not finite; expected predictions that depend on the prompt")

    @staticmethod
    def fit(evaluations: Iterable[Evaluation], *, shrinkage: float = SHRINKAGE) -> CleanSpectrum:
        """Average over the evaluations of clean prompts, such as those of `memhook.probe`, all at one timestep.

        Calibrate with other clean prompts than these: their own magnitudes are a little too small. A few dozen were as good as a thousand.

        Raises:
            CalibrationError: None was given, they differ in timestep, space or shape, or a prediction is not finite.
            NoGuidanceError: One has no unconditional prediction.
        """
        total, samples, first = None, 0, None
        for evaluation in evaluations:
            # Also where hosts run under inference_mode, whose tensors autograd refuses; and without a graph where they do not.
            with torch.inference_mode(mode=False), torch.no_grad():
                power = _transform(_difference(evaluation)).abs().square().cpu().sum(0, dtype=torch.float64)  # (c, ..., h, w)
            if not bool(torch.isfinite(power).all()):
                raise CalibrationError("a prediction was NaN or infinite; leave this prompt out, or run the model in a wider dtype")
            about = (tuple(power.shape), evaluation.space, _timestep(evaluation))
            first = about if first is None else first
            if about != first:
                raise CalibrationError(f"one evaluation has {_said(*about)}, the first one {_said(*first)}; fit each timestep and size by itself")
            with torch.inference_mode(mode=False):
                total = power if total is None else total + power
            samples += len(evaluation.pred_cond)
        if total is None or first is None:
            raise CalibrationError("there are no evaluations to fit; expected those of some dozen clean prompts")
        with torch.inference_mode(mode=False):
            mean = (total / samples).float()
        return CleanSpectrum(mean, samples, first[1], first[2], shrinkage)

    def magnitude(self, evaluation: Evaluation) -> Tensor:
        """``(b,)`` float32: the root mean square over channels and frequencies, in units of what clean prompts have there.

        ``sqrt(mean_cf |F(pred_cond - pred_uncond)|^2 / (P + shrinkage * mean(P)))``: below 1 for a clean prompt on average.

        Raises:
            CalibrationMismatchError: The evaluation has another timestep, size or space than the spectrum.
            NoGuidanceError: It has no unconditional prediction.
        """
        return self._whitened(evaluation, evaluation.pred_cond)

    def __call__(self, evaluation: Evaluation) -> Tensor:
        """`magnitude`, without waiting for the device: where the timestep is on one and is another than the spectrum's, NaN."""
        timestep = evaluation.timestep
        if self.timestep is None or not isinstance(timestep, Tensor) or timestep.device.type == "cpu":
            return self.magnitude(evaluation)
        values = self.magnitude(replace(evaluation, timestep=self.timestep))
        return torch.where((timestep.float() == self.timestep).all(), values, torch.nan)

    def objective(self, evaluation: Evaluation) -> Callable[[Tensor], Tensor]:
        """The whitened magnitude as a function of the conditional embedding, for `attribute_tokens` and `optimize_embedding`.

        Raises:
            ReplayError: The call was not kept; see `Evaluation.objective`.
        """
        replay = evaluation.replay
        if replay is None:
            raise ReplayError(
                'this evaluation was captured without its call or without a text embedding; watch with keep="calls", or use memhook.probe'
            )

        def whitened(embedding: Tensor) -> Tensor:
            predicted = replay(embedding)
            with torch.inference_mode(mode=False), torch.enable_grad():
                return self._whitened(evaluation, predicted)

        return whitened

    def _whitened(self, evaluation: Evaluation, pred_cond: Tensor) -> Tensor:
        difference = _difference(evaluation, pred_cond)
        own, given = (tuple(self.power.shape), self.space, self.timestep), (tuple(difference.shape[1:]), evaluation.space, _timestep(evaluation))
        if own != given:
            raise CalibrationMismatchError(f"the evaluation has {_said(*given)}, the spectrum {_said(*own)}; fit a spectrum in this setting")
        power = self.power.to(difference.device)
        whitened = _transform(difference) / (power + self.shrinkage * power.mean()).sqrt()
        norms: Tensor = torch.linalg.vector_norm(whitened.flatten(1), dim=1)
        return norms / math.sqrt(self.power.numel())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one ``.safetensors`` file, whole or not at all."""
        from safetensors.torch import save_file

        about = {"format": _FORMAT, "samples": self.samples, "space": self.space, "timestep": self.timestep, "shrinkage": self.shrinkage}
        tensors, metadata = {"power": self.power.contiguous()}, {"memhook": json.dumps(about, sort_keys=True)}
        replace_file(Path(path), lambda temporary: save_file(tensors, temporary, metadata=metadata))

    @staticmethod
    def load(path: str | os.PathLike[str]) -> CleanSpectrum:
        """Read what `save` wrote. Nothing in the file is executed.

        Raises:
            CalibrationError: The file is missing, damaged, or not a spectrum.
        """
        about, arrays = read_calibration_file(
            path, form=_FORMAT, names=("power",), noun="spectrum", made_with="CleanSpectrum.fit and CleanSpectrum.save"
        )
        power = arrays["power"]
        found: list[Any] = [about.get(name) for name in ("samples", "space", "timestep", "shrinkage")]
        samples, space, timestep, shrinkage = found
        numbers = type(samples) is int and type(shrinkage) is float and (timestep is None or type(timestep) is float)
        if power.dtype != np.float32 or space not in SPACES or not numbers:
            raise CalibrationError(f"{path} is damaged: power is {power.dtype} and the rest {str(about)[:200]}")
        return CleanSpectrum(torch.from_numpy(power), samples, space, timestep, shrinkage)


def _difference(evaluation: Evaluation, pred_cond: Tensor | None = None) -> Tensor:
    """``pred_cond - pred_uncond`` in float32, ``(b, c, ..., h, w)``."""
    cond, uncond = evaluation.pred_cond if pred_cond is None else pred_cond, evaluation.pred_uncond
    if uncond is None:
        raise NoGuidanceError("this evaluation has no unconditional prediction, so it has no magnitude; guide with a scale above 1")
    if cond.ndim < 4:
        raise MemhookError(f"the predictions have shape {tuple(cond.shape)}; a spectrum over space needs (samples, channels, height, width)")
    return cond.float() - uncond.to(cond.device).float()


def _transform(difference: Tensor) -> Tensor:
    """The orthonormal Fourier transform over all but samples and channels, complex, of the same shape."""
    transformed: Tensor = torch.fft.fftn(difference, dim=tuple(range(2, difference.ndim)), norm="ortho")
    return transformed


def _timestep(evaluation: Evaluation) -> float | None:
    if evaluation.timestep is None:
        return None
    if not isinstance(evaluation.timestep, Tensor):
        return float(np.float32(evaluation.timestep))
    values = torch.as_tensor(evaluation.timestep).float().flatten()
    if bool((values != values[0]).any()):
        raise MemhookError("the samples of this evaluation are at different timesteps; a spectrum holds for one: part them with Evaluation.take")
    return float(values[0])


def _said(shape: tuple[int, ...], space: str, timestep: float | None) -> str:
    return f"predictions of {space} with shape {shape} at {'no timestep' if timestep is None else f'timestep {timestep:g}'}"
