"""A `DifferenceMap` to look at: over a picture, as a figure, in a notebook. Numbers stand beside every color."""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING, Protocol

import numpy as np

from memhook.errors import MemhookError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.figure import Figure
    from PIL.Image import Image

_COLOR = (214, 40, 40)


class Mapped(Protocol):
    """What is shown of a `memhook.attribution.maps.DifferenceMap`."""

    @property
    def maps(self) -> np.ndarray:
        """``(b, h, w)``: how many times the picture's mean a place has."""

    def concentration(self, share: float = ...) -> np.ndarray:
        """``(b,)``: which part lies in the strongest share."""

    def overlay(self, picture: Image, *, sample: int = ..., strength: float = ...) -> Image:
        """The picture in gray with the map in red over it."""


def overlay(picture: Image, scaled: np.ndarray, strength: float) -> Image:
    """The picture in gray with a map of its size in red over it; the strongest place is the most opaque."""
    from PIL import Image as Images

    gray = np.asarray(picture.convert("L"), np.float64)[:, :, None].repeat(3, axis=2)
    # Gray at half the contrast, so that red is seen on dark and on light.
    gray = 64 + gray / 2
    opacity = strength * (scaled / max(float(scaled.max()), 1e-30))[:, :, None]
    mixed = (1 - opacity) * gray + opacity * np.array(_COLOR, np.float64)
    return Images.fromarray(mixed.round().astype(np.uint8))


def plot(found: Mapped, pictures: Sequence[Image] | None) -> Figure:
    """A row for each sample: picture, map, overlay."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MemhookError("figures need matplotlib; install the extra `plot`") from error
    maps, holds = found.maps, found.concentration()
    columns = 1 if pictures is None else 3
    figure = Figure(figsize=(2.6 * columns + 0.8, 2.5 * len(maps)), layout="constrained")
    axes = figure.subplots(len(maps), columns, squeeze=False)
    highest = float(maps.max())
    for sample, row in enumerate(axes):
        middle = row[0] if pictures is None else row[1]
        if pictures is not None:
            row[0].imshow(pictures[sample], interpolation="nearest")
            row[0].set_title(f"sample {sample}", fontsize="small")
            row[2].imshow(found.overlay(pictures[sample], sample=sample), interpolation="nearest")
            row[2].set_title(f"over the picture (peak {maps[sample].max():.1f})", fontsize="small")
        drawn = middle.imshow(maps[sample], cmap="magma", vmin=0, vmax=highest, interpolation="nearest")
        middle.set_title(f"strongest tenth: {holds[sample]:.0%}", fontsize="small")
        for one in row:
            one.set_axis_off()
    figure.colorbar(drawn, ax=axes, label="difference, times the picture's mean", shrink=0.8)
    return figure


def heat(values: np.ndarray) -> Image:
    """A map ``(h, w)`` by itself, white to red, each place enlarged to a square."""
    from PIL import Image as Images

    share = (values / max(float(values.max()), 1e-30))[:, :, None]
    pixels = ((1 - share) * 255 + share * np.array(_COLOR, np.float64)).round().astype(np.uint8)
    factor = max(1, 128 // max(pixels.shape[:2]))
    return Images.fromarray(pixels.repeat(factor, axis=0).repeat(factor, axis=1))


def data_url(picture: Image) -> str:
    """A picture as the ``src`` of an HTML page that needs nothing else."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def to_html(found: Mapped) -> str:
    """Every sample's map with its numbers. No script, no outside style."""
    cells = "".join(
        f'<figure style="display:inline-block;margin:4px"><img alt="map of sample {sample}" src="{data_url(heat(values))}">'
        f"<figcaption>sample {sample}: peak {values.max():.1f} times the mean, strongest tenth {holds:.0%}</figcaption></figure>"
        for sample, (values, holds) in enumerate(zip(found.maps, found.concentration(), strict=True))
    )
    return f'<div class="memhook-map">{cells}</div>'
