"""Charts drawn with Pillow, which every ComfyUI has."""

from __future__ import annotations

import math
import textwrap
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from memhook.attribution.tokens import printable

if TYPE_CHECKING:
    from collections.abc import Sequence

_SCALE = 2  # drawn larger than shown, for smooth lines
_WIDTH = 640
_INK, _PALE, _GRID, _RED, _BLUE = "#222222", "#9db8c6", "#e4e4e4", "#c1440e", "#2b6c8f"


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size * _SCALE)


def _canvas(height: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    picture = Image.new("RGB", (_WIDTH * _SCALE, height * _SCALE), "white")
    return picture, ImageDraw.Draw(picture)


def _done(picture: Image.Image) -> Image.Image:
    return picture.resize((picture.width // _SCALE, picture.height // _SCALE), Image.Resampling.LANCZOS)


def nice_ticks(highest: float, most: int = 5) -> list[float]:
    """Round numbers from 0 to at least ``highest``, which is above 0.

    >>> nice_ticks(2.3)
    [0.0, 0.5, 1.0, 1.5, 2.0, 2.5]
    """
    rough = highest / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    return [round(step * index, 12) for index in range(math.ceil(highest / step * 0.999) + 1)]


def lines(
    means: np.ndarray, samples: np.ndarray, *, first: int | None = None, threshold: float | None = None, captions: Sequence[str] = ()
) -> Image.Image:
    """Magnitude over evaluations.

    Args:
        means: ``(prompts, s)``, a thick line each; NaN is a gap.
        samples: ``(b, s)``, a thin line each.
        first: How many of the first evaluations the score is taken over; shaded.
        threshold: Drawn as a dashed line over these.
        captions: Lines of text below.
    """
    text = [part for caption in captions for part in textwrap.wrap(printable(caption), 96)]
    picture, draw = _canvas(300 + 17 * len(text) + 8)
    left, right, top, bottom = (value * _SCALE for value in (58, _WIDTH - 16, 34, 258))
    known = samples[np.isfinite(samples)]
    ticks = nice_ticks(max([float(known.max()) if known.size else 0.0, threshold or 0.0, 1e-9]) * 1.05)
    count = samples.shape[1]

    def x(index: float) -> float:
        return float(left + (right - left) * ((index + 0.5) / count))

    def y(value: float) -> float:
        return float(bottom - (bottom - top) * value / ticks[-1])

    if first is not None and first < count:
        draw.rectangle([left, top, x(first - 0.5), bottom], fill="#f3f6f8")
    for tick in ticks:
        draw.line([left, y(tick), right, y(tick)], fill=_GRID, width=_SCALE)
        draw.text((left - 8 * _SCALE, y(tick)), f"{tick:g}", fill=_INK, font=_font(11), anchor="rm")
    for index in sorted({*range(0, count, max(1, math.ceil(count / 10))), count - 1}):
        draw.text((x(index), bottom + 5 * _SCALE), str(index + 1), fill=_INK, font=_font(11), anchor="ma")
    for row in samples:
        _curve(draw, [(x(i), y(v)) for i, v in enumerate(row) if math.isfinite(v)], _PALE, 1)
    for row in means:
        _curve(draw, [(x(i), y(v)) for i, v in enumerate(row) if math.isfinite(v)], _BLUE, 3)
    if threshold is not None:
        end = x((first or count) - 0.5)
        for start in np.arange(left, end, 10 * _SCALE):
            draw.line([start, y(threshold), min(start + 6 * _SCALE, end), y(threshold)], fill=_RED, width=2 * _SCALE)
        draw.text((right, top), f"threshold {threshold:.3g} (dashed)", fill=_RED, font=_font(11), anchor="rb")
    draw.text((left, 8 * _SCALE), "How strongly the prompt pulls", fill=_INK, font=_font(14))
    draw.text(((left + right) / 2, bottom + 22 * _SCALE), "evaluation", fill=_INK, font=_font(11), anchor="ma")
    _text(draw, text, 300)
    return _done(picture)


def bars(words: Sequence[tuple[str, float]], *, title: str) -> Image.Image:
    """A bar for each word, in the prompt's order."""
    picture, draw = _canvas(48 + 22 * max(1, len(words)))
    draw.text((12 * _SCALE, 10 * _SCALE), title, fill=_INK, font=_font(14))
    highest = max((score for _, score in words), default=0.0) or 1.0
    for number, (word, score) in enumerate(words):
        middle = (48 + 22 * number + 9) * _SCALE
        text = printable(word)
        draw.text((190 * _SCALE, middle), text if len(text) <= 26 else f"{text[:25]}…", fill=_INK, font=_font(13), anchor="rm")
        share = score / highest
        end = (200 + 360 * share) * _SCALE
        draw.rectangle([200 * _SCALE, middle - 7 * _SCALE, max(end, 200 * _SCALE + 1), middle + 7 * _SCALE], fill=_RED if share > 2 / 3 else _PALE)
        draw.text((end + 6 * _SCALE, middle), f"{score:.3g}", fill=_INK, font=_font(11), anchor="lm")
    if not words:
        draw.text((12 * _SCALE, 48 * _SCALE), "the prompt has no words", fill=_INK, font=_font(12))
    return _done(picture)


def _curve(draw: ImageDraw.ImageDraw, points: list[tuple[float, float]], color: str, width: int) -> None:
    if len(points) > 1:
        draw.line(points, fill=color, width=width * _SCALE, joint="curve")
    if len(points) < 12:
        radius = (width + 1) * _SCALE
        for px, py in points:
            draw.ellipse([px - radius, py - radius, px + radius, py + radius], fill=color)


def _text(draw: ImageDraw.ImageDraw, text: Sequence[str], top: int) -> None:
    for number, line in enumerate(text):
        draw.text((12 * _SCALE, (top + 17 * number) * _SCALE), line, fill=_INK, font=_font(12))
