"""The emoji subjects of the testbed, as one sheet of RGBA sprites.

The sheet that ships with the package (``artwork.png``) was rasterized from Noto Emoji (Apache-2.0; see
``ATTRIBUTION.md``). To rebuild it from the npm package ``@iconify-json/noto``, unpack that package and run::

    python -m memhook.testbed.artwork icons.json artwork.png      # needs `pip install resvg_py`
"""

import argparse
import io
import json
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

SPRITE = 64  # pixels; pictures are composed at this size and then halved

# The word used in captions -> the icon's name in Noto Emoji.
SUBJECTS: dict[str, str] = {
    "cat": "cat-face",
    "fox": "fox",
    "panda": "panda",
    "frog": "frog",
    "lion": "lion",
    "owl": "owl",
    "penguin": "penguin",
    "rabbit": "rabbit-face",
    "pig": "pig-face",
    "octopus": "octopus",
    "fish": "tropical-fish",
    "butterfly": "butterfly",
    "turtle": "turtle",
    "ladybug": "lady-beetle",
    "whale": "whale",
    "apple": "red-apple",
    "strawberry": "strawberry",
    "pineapple": "pineapple",
    "watermelon": "watermelon",
    "lemon": "lemon",
    "grapes": "grapes",
    "burger": "hamburger",
    "doughnut": "doughnut",
    "avocado": "avocado",
    "sunflower": "sunflower",
    "rose": "rose",
    "cactus": "cactus",
    "mushroom": "mushroom",
    "tree": "deciduous-tree",
    "rocket": "rocket",
    "car": "automobile",
    "sailboat": "sailboat",
    "guitar": "guitar",
    "football": "soccer-ball",
    "crown": "crown",
    "umbrella": "umbrella",
    "alarm clock": "alarm-clock",
    "robot": "robot",
    "snowman": "snowman",
    "heart": "red-heart",
}


@cache
def sprites() -> dict[str, Image.Image]:
    """The subjects as RGBA pictures of 64 x 64 pixels, by the word that captions use."""
    sheet = Image.open(Path(__file__).with_name("artwork.png")).convert("RGBA")
    columns = sheet.width // SPRITE
    found = {}
    for index, subject in enumerate(SUBJECTS):
        left, top = index % columns * SPRITE, index // columns * SPRITE
        found[subject] = sheet.crop((left, top, left + SPRITE, top + SPRITE))
    return found


def build_sheet(icons: Path, target: Path, *, columns: int = 8) -> None:
    """Rasterize the subjects from an Iconify ``icons.json`` into one PNG sheet."""
    import resvg_py

    data = json.loads(icons.read_text())
    rows = -(-len(SUBJECTS) // columns)
    sheet = Image.new("RGBA", (columns * SPRITE, rows * SPRITE))
    for index, name in enumerate(SUBJECTS.values()):
        icon = data["icons"][name]
        width, height = icon.get("width", data.get("width", 16)), icon.get("height", data.get("height", 16))
        svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{SPRITE}" height="{SPRITE}">{icon["body"]}</svg>'
        drawn = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg)))).convert("RGBA")
        # Trim the transparent margin so that `scale` means the same for every subject.
        alpha = np.asarray(drawn)[..., 3] > 8
        ys, xs = np.flatnonzero(alpha.any(1)), np.flatnonzero(alpha.any(0))
        trimmed = drawn.crop((int(xs[0]), int(ys[0]), int(xs[-1]) + 1, int(ys[-1]) + 1))
        factor = SPRITE / max(trimmed.size)
        trimmed = trimmed.resize((round(trimmed.width * factor), round(trimmed.height * factor)), Image.Resampling.LANCZOS)
        left = index % columns * SPRITE + (SPRITE - trimmed.width) // 2
        top = index // columns * SPRITE + (SPRITE - trimmed.height) // 2
        sheet.paste(trimmed, (left, top))
    sheet.save(target, optimize=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Rasterize the testbed's emoji subjects into one sheet.")
    parser.add_argument("icons", type=Path, help="icons.json of the npm package @iconify-json/noto")
    parser.add_argument("target", type=Path, help="PNG file to write")
    arguments = parser.parse_args()
    build_sheet(arguments.icons, arguments.target)
