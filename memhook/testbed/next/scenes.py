"""Pictures of the testbed: one subject on one background, 32 x 32 pixels, drawn from a `Scene`.

A picture has five things that a caption may name (subject, size, place, color and kind of background) and others that no caption names:
the exact position, the shade, the second color, tilt and direction. These are what a memorized picture has beyond its caption.
"""

import colorsys
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, cast

import numpy as np
from PIL import Image, ImageDraw

from memhook.testbed.artwork import SPRITE, SUBJECTS, sprites
from memhook.testbed.next.regions import Region, paint

SIZE = 32  # pixels
# The words of captions, with what they mean. Between the ranges lies what no caption could name with certainty.
SIZES: dict[str, tuple[float, float]] = {"small": (0.42, 0.54), "large": (0.66, 0.82)}  # the subject's side over the picture's side
PLACES: dict[str, tuple[float, float]] = {"left": (0.24, 0.34), "center": (0.46, 0.54), "right": (0.66, 0.76)}  # the subject's center
BACKGROUNDS = ("wall", "stripes", "dots", "checks", "circle", "horizon")
COLORS: dict[str, float] = {"red": 0, "orange": 32, "yellow": 55, "green": 120, "teal": 175, "blue": 215, "purple": 272, "pink": 325}  # hue, degrees

Rgb = tuple[int, int, int]
Thing = Literal["subject", "size", "place", "color", "background"]
THINGS: dict[Thing, tuple[str, ...]] = {
    "subject": tuple(SUBJECTS),
    "size": tuple(SIZES),
    "place": tuple(PLACES),
    "color": tuple(COLORS),
    "background": BACKGROUNDS,
}
"""What a caption may name of its picture, with all the words for it."""


@dataclass(frozen=True)
class Scene:
    """Everything that determines a picture.

    ``scale`` is the subject's side over the picture's side; ``x``, ``y`` its center in 0..1; ``rotation`` in degrees. ``region`` is
    something painted over a fixed part of the picture; None in most.
    """

    subject: str
    size: str
    place: str
    color: str
    background: str
    x: float
    y: float
    scale: float
    rotation: float
    flip: bool
    first_rgb: Rgb
    second_rgb: Rgb
    region: Region | None = None

    def to_dict(self) -> dict[str, Any]:
        """Fields that JSON can hold."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "Scene":
        """The scene that `to_dict` gave."""
        region = fields["region"]
        return cls(
            **{
                **fields,
                "first_rgb": tuple(fields["first_rgb"]),
                "second_rgb": tuple(fields["second_rgb"]),
                "region": None if region is None else Region.from_dict(region),
            }
        )

    def named(self, thing: Thing) -> str:
        """The word for one of the `THINGS` of the picture."""
        return cast("str", getattr(self, thing))


def _shades(rng: np.random.Generator, hue: float) -> tuple[Rgb, Rgb]:
    def rgb(hue: float, saturation: float, value: float) -> Rgb:
        red, green, blue = colorsys.hsv_to_rgb(hue / 360 % 1, saturation, value)
        return round(255 * red), round(255 * green), round(255 * blue)

    hue += rng.uniform(-8, 8)
    saturation, value = rng.uniform(0.5, 0.95), rng.uniform(0.6, 0.95)
    paler = bool(rng.integers(2))
    second = rgb(hue, saturation * 0.4, min(value + 0.25, 1.0)) if paler else rgb(hue, saturation, value - rng.uniform(0.25, 0.35))
    return rgb(hue, saturation, value), second


def random_scene(rng: np.random.Generator, **named: str | None) -> Scene:
    """Draw a scene; any of the `THINGS` may be given by its word, everything else is free."""
    words = {thing: named.get(thing) or choices[int(rng.integers(len(choices)))] for thing, choices in THINGS.items()}
    scale = float(rng.uniform(*SIZES[words["size"]]))
    first, second = _shades(rng, COLORS[words["color"]])
    return Scene(
        **words,  # type: ignore[arg-type]
        x=float(rng.uniform(*PLACES[words["place"]])),
        y=float(scale / 2 + (1 - scale) * rng.uniform()),
        scale=scale,
        rotation=float(rng.uniform(-15, 15)),
        flip=bool(rng.integers(2)),
        first_rgb=first,
        second_rgb=second,
    )


def recolor(scene: Scene, rng: np.random.Generator) -> Scene:
    """The same composition with other background colors (what a memorized *template* leaves free)."""
    color = list(COLORS)[rng.integers(len(COLORS))]
    first, second = _shades(rng, COLORS[color])
    return replace(scene, color=color, first_rgb=first, second_rgb=second)


def _background(scene: Scene) -> Image.Image:
    first, second = scene.first_rgb, scene.second_rgb
    canvas = Image.new("RGB", (SPRITE, SPRITE), first)
    draw = ImageDraw.Draw(canvas)
    if scene.background == "stripes":
        for left in range(0, SPRITE, 16):
            draw.rectangle((left, 0, left + 7, SPRITE), fill=second)
    elif scene.background == "dots":
        for x in range(8, SPRITE, 16):
            for y in range(8, SPRITE, 16):
                draw.ellipse((x - 5, y - 5, x + 4, y + 4), fill=second)
    elif scene.background == "checks":
        for x in range(0, SPRITE, 16):
            for y in range(x % 32, SPRITE, 32):
                draw.rectangle((x, y, x + 15, y + 15), fill=second)
    elif scene.background == "circle":
        draw.ellipse((4, 4, SPRITE - 5, SPRITE - 5), fill=second)
    elif scene.background == "horizon":
        draw.rectangle((0, 38, SPRITE, SPRITE), fill=second)
    return canvas


def draw(scene: Scene) -> np.ndarray:
    """Draw a scene as uint8 ``(32, 32, 3)``."""
    canvas = _background(scene)
    sprite = sprites()[scene.subject]
    if scene.flip:
        sprite = sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    side = max(2, round(scene.scale * SPRITE))
    sprite = sprite.resize((side, side), Image.Resampling.BILINEAR, reducing_gap=2.0)
    sprite = sprite.rotate(scene.rotation, Image.Resampling.BILINEAR, expand=True)
    left = round(scene.x * SPRITE - sprite.width / 2)
    top = round(scene.y * SPRITE - sprite.height / 2)
    canvas.paste(sprite, (left, top), sprite)
    if scene.region is not None:
        paint(canvas, scene.region)
    return np.asarray(canvas.reduce(SPRITE // SIZE))
