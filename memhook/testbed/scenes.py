"""Pictures of the testbed: one subject on one background, 32 x 32 pixels, drawn from a `Scene`."""

import colorsys
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from memhook.testbed.artwork import SPRITE, SUBJECTS, sprites

SIZE = 32  # pixels
BACKGROUNDS = ("plain", "gradient", "stripes", "horizon", "disc")
# Color words of captions -> hue in degrees. A caption may name the color of the background.
COLORS: dict[str, float] = {"red": 0, "orange": 32, "yellow": 55, "green": 120, "teal": 175, "blue": 215, "purple": 272, "pink": 325}

Rgb = tuple[int, int, int]


@dataclass(frozen=True)
class Scene:
    """Everything that determines a picture.

    ``scale`` is the subject's side over the picture's side; ``x``, ``y`` its center in 0..1; ``rotation`` in degrees.
    """

    subject: str
    x: float
    y: float
    scale: float
    rotation: float
    flip: bool
    background: str
    color: Rgb
    second_color: Rgb

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def _color(rng: np.random.Generator, hue: float) -> tuple[Rgb, Rgb]:
    def rgb(hue: float, saturation: float, value: float) -> Rgb:
        red, green, blue = colorsys.hsv_to_rgb(hue / 360 % 1, saturation, value)
        return round(255 * red), round(255 * green), round(255 * blue)

    hue += rng.uniform(-9, 9)
    saturation, value = rng.uniform(0.35, 0.9), rng.uniform(0.55, 1.0)
    contrast = rng.choice([-1, 1]) * rng.uniform(0.18, 0.35)
    second = rgb(hue + rng.uniform(-12, 12), saturation, float(np.clip(value + contrast, 0.25, 1.0)))
    if contrast > 0:  # brighter: also paler, so that the two always differ
        second = rgb(hue, max(saturation - 0.35, 0.08), min(value + contrast, 1.0))
    return rgb(hue, saturation, value), second


def random_scene(rng: np.random.Generator, *, subject: str | None = None, color: str | None = None) -> Scene:
    """Draw a scene; the subject and the background's color word may be given, everything else is free."""
    if subject is None:
        subject = list(SUBJECTS)[rng.integers(len(SUBJECTS))]
    name = color if color is not None else list(COLORS)[rng.integers(len(COLORS))]
    scale = rng.uniform(0.5, 0.85)
    slack = 1 - scale
    first, second = _color(rng, COLORS[name])
    return Scene(
        subject=subject,
        x=float(scale / 2 + slack * rng.uniform()),
        y=float(scale / 2 + slack * rng.uniform()),
        scale=float(scale),
        rotation=float(rng.uniform(-15, 15)),
        flip=bool(rng.integers(2)),
        background=BACKGROUNDS[rng.integers(len(BACKGROUNDS))],
        color=first,
        second_color=second,
    )


def recolor(scene: Scene, rng: np.random.Generator) -> Scene:
    """The same composition with other background colors (what a memorized *template* leaves free)."""
    name = list(COLORS)[rng.integers(len(COLORS))]
    first, second = _color(rng, COLORS[name])
    return replace(scene, color=first, second_color=second)


def _background(scene: Scene) -> Image.Image:
    first, second = scene.color, scene.second_color
    canvas = Image.new("RGB", (SPRITE, SPRITE), first)
    draw = ImageDraw.Draw(canvas)
    if scene.background == "gradient":
        ramp = np.linspace(0, 1, SPRITE)[:, None, None]
        blend = (1 - ramp) * np.array(first) + ramp * np.array(second)
        canvas = Image.fromarray(np.broadcast_to(blend, (SPRITE, SPRITE, 3)).round().astype(np.uint8))
    elif scene.background == "stripes":
        for left in range(0, SPRITE, 32):
            draw.rectangle((left, 0, left + 15, SPRITE), fill=second)
    elif scene.background == "horizon":
        draw.rectangle((0, 42, SPRITE, SPRITE), fill=second)
    elif scene.background == "disc":
        draw.ellipse((6, 6, SPRITE - 7, SPRITE - 7), fill=second)
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
    return np.asarray(canvas.reduce(SPRITE // SIZE))
