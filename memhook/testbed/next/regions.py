"""Regions: a fixed part of a picture, such as a border or a badge, painted over whatever the scene shows.

A *local* planted pair fixes only its region. The rest of the picture and of the caption is free, and the region's mask is known.
"""

import colorsys
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageDraw

from memhook.testbed.artwork import SPRITE, SUBJECTS, sprites

Form = Literal["border", "badge", "ground"]
FORMS: tuple[Form, ...] = ("border", "badge", "ground")
Rgb = tuple[int, int, int]

_BORDER = 8  # canvas pixels; a picture has half as many
_BADGE = 14  # radius
_GROUND = 20  # height


@dataclass(frozen=True)
class Region:
    """A border with dashes, a round badge with a small emblem in a corner, or a patterned strip of ground.

    ``corner`` numbers the badge's corner (0 top left, 1 top right, 2 bottom left, 3 bottom right); ``pitch`` is the pattern's period in canvas
    pixels, of which a picture has half as many.
    """

    form: Form
    first_rgb: Rgb
    second_rgb: Rgb
    corner: int
    pitch: int
    emblem: str

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "Region":
        """The region whose fields stand in JSON."""
        return cls(**{**fields, "first_rgb": tuple(fields["first_rgb"]), "second_rgb": tuple(fields["second_rgb"])})


def random_region(rng: np.random.Generator, form: Form) -> Region:
    """A region of one form, in two colors that differ clearly."""

    def rgb(hue: float, value: float) -> Rgb:
        red, green, blue = colorsys.hsv_to_rgb(hue % 1, 0.85, value)
        return round(255 * red), round(255 * green), round(255 * blue)

    hue = rng.uniform()
    return Region(
        form=form,
        first_rgb=rgb(hue, rng.uniform(0.75, 1.0)),
        second_rgb=rgb(hue + rng.uniform(0.3, 0.7), rng.uniform(0.2, 0.5)),
        corner=int(rng.integers(4)),
        pitch=int(rng.choice([12, 16, 20])),
        emblem=list(SUBJECTS)[rng.integers(len(SUBJECTS))],
    )


def _center(region: Region) -> tuple[int, int]:
    near, far = _BADGE + 2, SPRITE - _BADGE - 2
    return (far if region.corner % 2 else near), (far if region.corner // 2 else near)


def _mask(region: Region) -> Image.Image:
    mask = Image.new("L", (SPRITE, SPRITE), 0)
    draw = ImageDraw.Draw(mask)
    if region.form == "border":
        draw.rectangle((0, 0, SPRITE, SPRITE), fill=255)
        draw.rectangle((_BORDER, _BORDER, SPRITE - _BORDER - 1, SPRITE - _BORDER - 1), fill=0)
    elif region.form == "badge":
        x, y = _center(region)
        draw.ellipse((x - _BADGE, y - _BADGE, x + _BADGE - 1, y + _BADGE - 1), fill=255)
    else:
        draw.rectangle((0, SPRITE - _GROUND, SPRITE, SPRITE), fill=255)
    return mask


def mask(region: Region) -> np.ndarray:
    """Where the region is: bool ``(32, 32)``, True for pixels of which at least half belong to it."""
    return np.asarray(_mask(region).reduce(2)) >= 128


def paint(canvas: Image.Image, region: Region) -> None:
    """Paint the region over a canvas of 64 x 64 pixels."""
    layer = Image.new("RGB", canvas.size, region.first_rgb)
    draw = ImageDraw.Draw(layer)
    half = region.pitch // 2
    if region.form == "border":  # dashes along the diagonal, so that all four sides have them
        for start in range(-SPRITE, SPRITE, region.pitch):
            corners = [(start, 0), (start + half, 0), (start + half + SPRITE, SPRITE), (start + SPRITE, SPRITE)]
            draw.polygon(corners, fill=region.second_rgb)
    elif region.form == "badge":
        x, y = _center(region)
        inner = _BADGE - 3
        draw.ellipse((x - inner, y - inner, x + inner - 1, y + inner - 1), fill=region.second_rgb)
        side = 2 * inner - 2
        emblem = sprites()[region.emblem].resize((side, side), Image.Resampling.BILINEAR, reducing_gap=2.0)
        layer.paste(emblem, (x - side // 2, y - side // 2), emblem)
    else:  # a row of teeth
        top = SPRITE - _GROUND
        for left in range(0, SPRITE, region.pitch):
            draw.polygon([(left, SPRITE), (left + half, top), (left + region.pitch, SPRITE)], fill=region.second_rgb)
    canvas.paste(layer, (0, 0), _mask(region))
