"""Thresholds from clean data: quantiles of the magnitude in bins of timesteps."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from memhook.detection.calibration import calibrate
from memhook.errors import CalibrationError, CalibrationMismatchError
from memhook.files import replace_file
from memhook.scores.stored import read_calibration_file
from memhook.training.timesteps import Span, as_span, inside

if TYPE_CHECKING:
    import os

    from numpy.typing import ArrayLike

_FORMAT = "memhook-training-calibration-1"


@dataclass(frozen=True, eq=False)
class BinnedThreshold:
    """A threshold that is constant within bins of timesteps: ``threshold(timesteps (b,)) -> (b,)``.

    Attributes:
        edges: ``(k - 1,)`` increasing: where one bin ends and the next begins; timesteps beyond the calibrated ones fall in the
            first or the last bin.
        values: ``(k,)``: the thresholds.
        shape: Of the sample that they hold for, without the batch; None where unknown.
        span: Lowest and highest timestep that were judged, where that was a part of them; beyond it the threshold is infinite.
        fpr: The share of clean presentations that is flagged; None where unknown.
    """

    edges: tuple[float, ...]
    values: tuple[float, ...]
    shape: tuple[int, ...] | None = None
    span: Span | None = None
    fpr: float | None = None

    def __call__(self, timesteps: Tensor) -> Tensor:
        edges = torch.tensor(self.edges, dtype=torch.float32, device=timesteps.device)
        values = torch.tensor(self.values, dtype=torch.float32, device=timesteps.device)
        found = values[torch.bucketize(timesteps.float(), edges, right=True)]
        return found if self.span is None else torch.where(inside(timesteps, self.span), found, torch.inf)

    def check(self, shape: Sequence[int]) -> None:
        """Raise where the samples have another shape: the magnitude is a norm, and grows with their size."""
        if self.shape is not None and tuple(shape) != self.shape:
            raise CalibrationMismatchError(
                f"the threshold was calibrated on samples of shape {self.shape}, and this loop trains on {tuple(shape)}; calibrate on these"
            )


@dataclass(frozen=True, eq=False)
class FilterCalibration:
    """Magnitudes of clean training pairs, in bins of timesteps that hold equally many of them.

    A run that judged only some timesteps (``timesteps=``) has its bins inside of these.

    One entry is one *presentation*: a sample with one noise and one timestep. A rate read off these is a rate of presentations.

    Attributes:
        timesteps: ``(n,)`` float32, as the loop gives them to the denoiser.
        magnitudes: ``(n,)`` float32, finite.
        edges: ``(k - 1,)`` increasing: the inner edges of the ``k`` bins.
        shape: Of a sample, without the batch; None where unknown.
        span: Lowest and highest timestep that were judged; None for all of them.

    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> t = rng.integers(1000, size=4000)
    >>> calibration = FilterCalibration.fit(t, (1 + t / 1000) * rng.random(4000), bins=4)
    >>> [round(value, 1) for value in calibration.threshold(fpr=0.05).values]
    [1.1, 1.3, 1.6, 1.8]
    """

    timesteps: np.ndarray
    magnitudes: np.ndarray
    edges: tuple[float, ...]
    shape: tuple[int, ...] | None = None
    span: Span | None = None

    @staticmethod
    def fit(
        timesteps: ArrayLike, magnitudes: ArrayLike, *, bins: int = 10, shape: Sequence[int] | None = None, span: Span | None = None
    ) -> FilterCalibration:  # fmt: skip
        """Divide clean presentations into bins of timesteps.

        Args:
            timesteps: ``(n,)``.
            magnitudes: ``(n,)``, one for each timestep.
            bins: How many; fewer where many presentations share a timestep.
            shape: Of a sample, without the batch.
            span: Lowest and highest timestep that are judged; None for all.

        Raises:
            CalibrationError: The two do not fit together, hold NaN, or there are fewer than bins.
        """
        t, m = np.asarray(timesteps, np.float32), np.asarray(magnitudes, np.float32)
        if t.ndim != 1 or t.shape != m.shape:
            raise CalibrationError(f"the timesteps have shape {t.shape} and the magnitudes {m.shape}; expected one timestep a magnitude, (n,) both")
        if not (np.isfinite(t).all() and np.isfinite(m).all()):
            raise CalibrationError("a timestep or magnitude is NaN or infinite; leave broken presentations out, or run the model in a wider dtype")
        if bins < 1 or len(t) < bins:
            raise CalibrationError(f"{len(t)} presentations cannot be divided into {bins} bins; calibrate on more, or use fewer bins (at least 1)")
        edges = np.unique(np.quantile(t, np.arange(1, bins) / bins, method="higher"))
        edges = edges[edges > t.min()]  # nothing is below the first edge otherwise
        sizes = None if shape is None else tuple(int(size) for size in shape)
        return FilterCalibration(t, m, tuple(float(edge) for edge in edges), sizes, None if span is None else as_span(span))

    def within(self, low: float, high: float, *, bins: int = 5) -> FilterCalibration:
        """The presentations with timesteps from ``low`` to ``high``, both included, in bins of their own.

        Raises:
            CalibrationError: There are fewer than bins.
        """
        chosen = (self.timesteps >= low) & (self.timesteps <= high)
        return FilterCalibration.fit(self.timesteps[chosen], self.magnitudes[chosen], bins=bins, shape=self.shape, span=(low, high))

    def bins(self) -> list[np.ndarray]:
        """The magnitudes of each bin, in the order of timesteps."""
        numbers = np.searchsorted(np.asarray(self.edges, np.float32), self.timesteps, side="right")
        return [self.magnitudes[numbers == number] for number in range(len(self.edges) + 1)]

    def threshold(self, *, fpr: float) -> BinnedThreshold:
        """The threshold that a clean presentation surpasses with probability ``fpr`` at most, in each bin.

        The rule of `Calibration.threshold`, bin by bin: valid at every size if the presentation is exchangeable with the calibrated
        ones. That ends as training moves the model; calibrate again on the way.

        Raises:
            CalibrationError: A bin has too few presentations for this rate; says how many are needed.
        """
        bins = self.bins()
        try:
            values = tuple(calibrate(magnitudes).threshold(fpr) for magnitudes in bins)
        except CalibrationError as error:
            sizes = f"{len(bins)} bins hold {min(map(len, bins))} to {max(map(len, bins))} presentations each"
            raise CalibrationError(f"{sizes}: {error}. Fewer bins hold more presentations each") from error
        return BinnedThreshold(self.edges, values, self.shape, self.span, fpr)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one ``.safetensors`` file, whole or not at all."""
        from safetensors.numpy import save

        about = {
            "format": _FORMAT,
            "shape": None if self.shape is None else list(self.shape),
            "span": None if self.span is None else list(self.span),
        }
        tensors = {
            "timesteps": np.ascontiguousarray(self.timesteps, np.float32),
            "magnitudes": np.ascontiguousarray(self.magnitudes, np.float32),
            "edges": np.asarray(self.edges, np.float32),
        }
        data = save(tensors, metadata={"memhook": json.dumps(about, sort_keys=True)})
        replace_file(Path(path), lambda temporary: temporary.write_bytes(data))

    @staticmethod
    def load(path: str | os.PathLike[str]) -> FilterCalibration:
        """Read what `save` wrote. Nothing in the file is executed.

        Raises:
            CalibrationError: The file is missing, damaged, or not a calibration of the training filter.
        """
        about, found = read_calibration_file(
            path, form=_FORMAT, names=("timesteps", "magnitudes", "edges"), noun="calibration", made_with="FilterCalibration.save"
        )
        return _checked(Path(path), found, about.get("shape"), about.get("span"))


def _checked(source: Path, found: dict[str, np.ndarray], shape: Any, span: Any) -> FilterCalibration:
    """The calibration in a file that may hold anything."""
    t, m, edges = found["timesteps"], found["magnitudes"], found["edges"]
    whole = shape is None or (isinstance(shape, list) and all(type(size) is int for size in shape))
    whole = whole and (
        span is None or (isinstance(span, list) and len(span) == 2 and all(type(end) in (int, float) for end in span) and span[0] <= span[1])
    )
    vectors = all(values.dtype == np.float32 and values.ndim == 1 and np.isfinite(values).all() for values in found.values())
    if not (whole and vectors and len(t) == len(m) > 0 and bool((np.diff(edges) > 0).all())):
        seen = ", ".join(f"{name} {values.dtype} {values.shape}" for name, values in found.items())
        raise CalibrationError(f"{source} is damaged: it holds {seen}, the shape {shape!r} and the range {span!r}; make the calibration again")
    sizes = None if shape is None else tuple(shape)
    return FilterCalibration(t, m, tuple(float(edge) for edge in edges), sizes, None if span is None else as_span(span))
