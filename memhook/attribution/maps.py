"""Where in the picture: a map of the text-conditional difference at chosen evaluations, reduced on the device while a run goes on."""

from __future__ import annotations

import contextlib
import math
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from memhook.capture.trace import Trace
from memhook.capture.watching import attached
from memhook.errors import MemhookError, NoGuidanceError
from memhook.plugins import find_adapter

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from matplotlib.figure import Figure
    from PIL.Image import Image

    from memhook.capture.prediction import Evaluation
    from memhook.hookspecs import Adapter


@dataclass(eq=False)
class DifferenceMap:
    """Where the text-conditional difference of a run is large, a map a sample. Complete once the run is over.

    Shown with numbers by ``print``, as pictures in notebooks.

    Attributes:
        trace: The magnitudes of the run.
        chosen: Which evaluations were asked for, from 0; negative ones are counted from the end.
    """

    trace: Trace
    chosen: tuple[int, ...]
    _grid: tuple[int, int] | None = None
    _early: dict[int, Tensor | None] = field(default_factory=dict, repr=False)
    _late: deque[tuple[int, Tensor | None]] = field(default_factory=deque, repr=False)

    @classmethod
    def of(cls, trace: Trace, *, evaluations: Sequence[int] = (-1,), grid: tuple[int, int] | None = None) -> DifferenceMap:
        """The maps of a run that was watched with ``keep="calls"``."""
        found = _empty(trace, evaluations, grid)
        for number, evaluation in enumerate(trace.evaluations):
            found._add(number, evaluation)
        return found

    @property
    def squares(self) -> np.ndarray:
        """``(s, b, h, w)`` float32: the sum over channels of the squared difference, an evaluation a row, in the order of the run.

        Raises:
            NoGuidanceError: None of the chosen evaluations had an unconditional prediction.
            MemhookError: The run was shorter than what was asked for, the block held several runs, or a prediction was not finite.
        """
        count = len(self.trace)
        self.trace.magnitudes  # noqa: B018 -- raises where nothing was recorded, or nothing with guidance
        if len(self.trace.runs) > 1:
            raise MemhookError(f"the block held {len(self.trace.runs)} runs of the sampler, and a map is of one; give each run a block of its own")
        beyond = [number for number in self.chosen if not -count <= number < count]
        if beyond:
            raise MemhookError(f"evaluation {beyond[0]} was asked for, and the run had {count}; expected {-count} to {count - 1}")
        wanted = sorted({number % count for number in self.chosen})
        known = {**self._early, **dict(self._late)}
        parts = [part for number in wanted if (part := known[number]) is not None]
        if not parts:
            raise NoGuidanceError(f"none of the evaluations {wanted} had an unconditional prediction; choose others of the {count}")
        stacked = torch.stack(parts).cpu().numpy()
        if not np.isfinite(stacked).all():
            raise MemhookError("a prediction of the chosen evaluations is NaN or infinite; run the model in a wider dtype")
        return stacked

    @property
    def maps(self) -> np.ndarray:
        """``(b, h, w)`` float32 in latent resolution: how many times the picture's mean a place has, averaged over the evaluations.

        At one evaluation this is ``sum_c D^2 / sigma^2`` up to a factor; over several, each counts the same, whatever its noise level.
        """
        squares = self.squares.astype(np.float64)
        mean = squares.mean(axis=(2, 3), keepdims=True)
        found: np.ndarray = np.where(mean > 0, squares / np.where(mean > 0, mean, 1.0), 1.0).mean(axis=0).astype(np.float32)
        return found

    def scaled(self, size: tuple[int, int], *, sample: int = 0) -> np.ndarray:
        """A sample's map in the resolution of its picture, ``(height, width)`` for ``size = (width, height)``, as PIL counts."""
        width, height = size
        whole = torch.from_numpy(self.maps[self._known(sample)])[None, None]
        found: np.ndarray = torch.nn.functional.interpolate(whole, size=(height, width), mode="bilinear", align_corners=False)[0, 0].numpy()
        return found

    def concentration(self, share: float = 0.1) -> np.ndarray:
        """``(b,)``: which part of the whole difference lies in the strongest ``share`` of the picture; ``share`` itself where it is even."""
        if not 0 < share <= 1:
            raise MemhookError(f"share is {share}; expected a number above 0, at most 1")
        flat = np.sort(self.maps.reshape(len(self.maps), -1), axis=1)[:, ::-1]
        count = max(1, round(share * flat.shape[1]))
        found: np.ndarray = flat[:, :count].sum(axis=1) / flat.sum(axis=1)
        return found

    def overlay(self, picture: Image, *, sample: int = 0, strength: float = 0.75) -> Image:
        """The picture in gray with the map in red over it.

        Args:
            picture: The sample's picture, of any size.
            sample: Which sample.
            strength: How opaque the strongest place is, 0 to 1.
        """
        from memhook.attribution.map_views import overlay

        if not 0 <= strength <= 1:
            raise MemhookError(f"strength is {strength}; expected 0 to 1")
        return overlay(picture, self.scaled(picture.size, sample=sample), strength)

    def plot(self, pictures: Sequence[Image] | None = None) -> Figure:
        """A matplotlib figure: a row for each sample with its map, and with its picture and the overlay where these are given.

        Args:
            pictures: One a sample.
        """
        from memhook.attribution.map_views import plot

        if pictures is not None and len(pictures) != len(self.maps):
            raise MemhookError(f"there are {len(pictures)} pictures for {len(self.maps)} samples; expected one a sample")
        return plot(self, pictures)

    def to_dict(self) -> dict[str, Any]:
        """Everything shown, as plain lists and numbers for JSON."""
        return {"evaluations": list(self.chosen), "maps": self.maps.tolist(), "strongest_tenth_holds": self.concentration().tolist()}

    def __str__(self) -> str:
        _, height, width = self.maps.shape
        holds = ", ".join(f"{share:.0%}" for share in self.concentration())
        return f"difference at evaluations {list(self.chosen)}, {height} x {width}: the strongest tenth of the picture holds {holds} of it"

    def __repr__(self) -> str:
        return f"<DifferenceMap: evaluations {list(self.chosen)} of {len(self.trace)}>"

    def _repr_html_(self) -> str:
        from memhook.attribution.map_views import to_html

        return to_html(self)

    def _known(self, sample: int) -> int:
        count = len(self.maps)
        if not -count <= sample < count:
            raise MemhookError(f"sample is {sample}; there are {count}, so expected 0 to {count - 1}")
        return sample

    def _add(self, number: int, evaluation: Evaluation) -> None:
        """Keep what is needed of an evaluation: ``b`` small maps, still on the device."""
        reach = self._late.maxlen or 0
        if number not in self.chosen and not reach:
            return
        reduced = None if evaluation.pred_uncond is None else _reduced(evaluation.pred_cond, evaluation.pred_uncond, self._grid)
        if number in self.chosen:
            self._early[number] = reduced
        if reach:
            self._late.append((number, reduced))


def _empty(trace: Trace, evaluations: Sequence[int], grid: tuple[int, int] | None) -> DifferenceMap:
    chosen = tuple(evaluations)
    if not chosen or not all(isinstance(number, int) for number in chosen):
        raise MemhookError(f"evaluations is {evaluations!r}; expected numbers of evaluations, from 0, negative ones from the end")
    return DifferenceMap(trace, chosen, grid, {}, deque(maxlen=max(0, *(-number for number in chosen))))


@contextlib.contextmanager
def difference_map(
    target: object, *, evaluations: Sequence[int] = (-1,), grid: tuple[int, int] | None = None, adapter: Adapter | None = None
) -> Iterator[DifferenceMap]:
    """Map where the text-conditional difference of the run inside the block is large, sample by sample.

    A picture that is memorized in a part alone shows it there: ``sum over channels D^2 / sigma^2`` at the last evaluation. No
    prediction is kept: each is reduced on the device to ``(b, h, w)`` when it is made, and only the chosen ones are kept. The host's
    results do not change.

    Args:
        target: What runs the guided sampler, as in `memhook.watch`.
        evaluations: Which evaluations, from 0; negative ones from the end, such as ``(-3, -2, -1)`` for the last three.
        grid: ``(rows, columns)`` of the tokens, for hosts whose predictions are sequences of them (Flux) and whose pictures are not square.
        adapter: As in `memhook.watch`.

    Yields:
        A `DifferenceMap`, to be read after the run.

    >>> import memhook
    >>> from memhook.testing import tiny_unet, sample
    >>> unet = tiny_unet()
    >>> with memhook.difference_map(unet, evaluations=[0, -1], adapter=memhook.ModuleAdapter(unet, layout="uncond_first")) as found:
    ...     latents = sample(unet, steps=4, samples=2)
    >>> found.maps.shape, found.squares.shape
    ((2, 8, 8), (2, 2, 8, 8))
    """
    adapter = adapter if adapter is not None else find_adapter(target)
    del target  # the block must not keep it alive
    trace = Trace(host=adapter.host, describe=adapter.describe)
    found = _empty(trace, evaluations, grid)
    early = {number for number in found.chosen if number >= 0}

    def wanted() -> bool:
        return bool(found._late.maxlen) or len(trace) in early

    def on_evaluation(evaluation: Evaluation) -> None:
        found._add(len(trace) - 1, evaluation)

    with attached(adapter, trace, wants_evaluations=wanted, on_evaluation=on_evaluation):
        yield found


@torch.no_grad()
def _reduced(pred_cond: Tensor, pred_uncond: Tensor, grid: tuple[int, int] | None) -> Tensor:
    """``(b, h, w)`` float32: the squared difference summed over channels, and averaged over the frames of a video."""
    wide = torch.promote_types(pred_cond.dtype, torch.float32)
    square = (pred_cond.detach().to(wide) - pred_uncond.detach().to(wide)).square()
    if square.ndim == 3:  # a sequence of tokens (b, n, channels)
        rows, columns = grid if grid is not None else (math.isqrt(square.shape[1]),) * 2
        if rows * columns != square.shape[1]:
            raise MemhookError(
                f"the predictions are sequences of {square.shape[1]} tokens, which make no grid of {rows} x {columns}; pass grid=(rows, columns), "
                "the picture's height and width over the pixels of a token"
            )
        return square.sum(dim=2).reshape(-1, rows, columns).float()
    if square.ndim == 5:  # a video (b, channels, frames, h, w)
        square = square.mean(dim=2)
    if square.ndim != 4:
        raise MemhookError(f"a prediction has shape {tuple(pred_cond.shape)}, which has no two axes of a picture")
    summed: Tensor = square.sum(dim=1).float()
    return summed
