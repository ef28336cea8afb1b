"""The demo's page: one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from memhook.cli.figures import magnitude_lines, score_histogram
from memhook.files import write_text

if TYPE_CHECKING:
    from PIL.Image import Image

    from memhook.cli.demo_prompts import DemoPrompt
    from memhook.detection.calibration import Calibration

_STYLE = """
:root { color-scheme: light; --ink: #1d2327; --quiet: #5d6970; --line: #d9dfe3; --alarm: #c1440e; --calm: #2b6c8f; --paper: #fbfcfc; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 2.5rem 1.25rem 4rem; font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--paper); }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .5rem; } h2 { margin: 2.75rem 0 .75rem; font-size: 1.25rem; }
.lead { font-size: 1.1rem; max-width: 46rem; } .quiet { color: var(--quiet); font-size: .9rem; }
article { border-top: 1px solid var(--line); padding: 1rem 0; }
.prompt { font-weight: 600; overflow-wrap: anywhere; } .facts { color: var(--quiet); font-size: .9rem; font-variant-numeric: tabular-nums; }
.badge { display: inline-block; padding: .05rem .5rem; border-radius: 1rem; font-size: .8rem; font-weight: 700; color: white; background: var(--calm); }
.badge.alarm { background: var(--alarm); }
.pictures { display: flex; flex-wrap: wrap; gap: .5rem; margin-top: .6rem; align-items: flex-end; }
figure { margin: 0; } figcaption { font-size: .75rem; color: var(--quiet); }
img { width: 6.5rem; height: 6.5rem; display: block; border-radius: .3rem; image-rendering: pixelated; }
.training { padding-right: .75rem; margin-right: .25rem; border-right: 2px solid var(--line); }
svg { width: 100%; height: auto; max-width: 46rem; display: block; }
"""


def _image(image: Image, alt: str) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def _article(row: DemoPrompt) -> str:
    means = row.magnitudes.mean(axis=1)
    word, kind = ("undecided", "") if row.undecided else (("looks memorized", " alarm") if row.memorized else ("not flagged", ""))
    training = ""
    if row.training_image is not None:
        training = f'<figure class="training">{_image(row.training_image, "training picture")}<figcaption>training picture</figcaption></figure>'
    made = "".join(
        f"<figure>{_image(image, f'generation {number}')}<figcaption>seed {number}</figcaption></figure>"
        for number, image in enumerate(row.images, 1)
    )
    return f"""<article>
<div class="prompt">{html.escape(row.prompt)} <span class="badge{kind}">{word}</span></div>
<div class="facts">{html.escape(row.about)} &middot; magnitude {means[0]:.2f} at the first evaluation, {means.mean():.2f} over all {len(means)}
&middot; p = {row.p_value:.2g}</div>
<div class="pictures">{training}{made}</div>
</article>"""


def page(prompts: Sequence[DemoPrompt], calibration: Calibration, *, fpr: float = 0.01) -> str:
    """The page as HTML text."""
    threshold = calibration.threshold(fpr)
    groups = {group: [row for row in prompts if row.group == group] for group in ("memorized", "fresh")}
    flagged = {group: sum(row.memorized for row in rows) for group, rows in groups.items()}
    images = len(prompts[0].images)
    smallest = 1 / (len(calibration) + 1)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>memhook demo: what did this model memorize?</title><style>{_STYLE}</style></head><body>
<h1>What did this model memorize?</h1>
<p class="lead">memhook watched a small text-to-image model while it made {images} pictures for each of {len(prompts)} prompts. It flagged
<strong>{flagged["memorized"]} of {len(groups["memorized"])} memorized prompts</strong> and <strong>{flagged["fresh"]} of {len(groups["fresh"])} fresh ones</strong>,
at a false-positive rate of {fpr:.0%}, from the first {calibration.first} of {len(prompts[0].magnitudes)} evaluations of the denoiser.</p>
<p class="quiet">The magnitude is the norm of the difference between the conditional and the unconditional prediction (in epsilon units, per picture, before it is
multiplied by the guidance scale). The p-value is the chance of a score this high <em>if the prompt is not memorized</em>; with {len(calibration)} calibration prompts it
cannot be smaller than {smallest:.2g}. It is not the chance that the prompt is memorized.</p>
<h2>Memorized prompts: every seed gives the training picture</h2>
{"".join(_article(row) for row in groups["memorized"])}
<h2>Fresh prompts: every seed gives another picture</h2>
{"".join(_article(row) for row in groups["fresh"])}
<h2>Magnitude over the run</h2>
<p class="quiet">A thin line is one prompt, the mean of its {images} pictures; thick lines are group means (Figures 1 and 2a of Wen et al. 2024).</p>
{magnitude_lines(prompts)}
<h2>How unusual is that?</h2>
<p class="quiet">The threshold ({threshold:.2f}) comes from the clean prompts alone (Figure 2b of Wen et al. 2024).</p>
{score_histogram(prompts, np.asarray(calibration.scores), threshold)}
<p class="quiet">Artwork: Noto Emoji, Google LLC, Apache License 2.0. Made by <code>memhook demo</code>.</p>
</body></html>
"""


def write_page(out: Path, prompts: Sequence[DemoPrompt], calibration: Calibration) -> Path:
    """Write ``index.html`` into the folder ``out``, making the folder if need be."""
    target = out / "index.html"
    write_text(target, page(prompts, calibration))
    return target
