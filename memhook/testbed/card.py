"""The bundled model's card: ``memhook testbed card``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from memhook.files import replace_file, write_text
from memhook.report.tables import console
from memhook.testbed.bundle import CleanPrompt, MemorizedPrompt, model_path
from memhook.testbed.evidence import PromptEvidence, Validation, gather, validate_measures
from memhook.testbed.measures import COPY_THRESHOLD
from memhook.testbed.study import IMAGES, Study, run_study

_KINDS = {"verbatim": "verbatim: one picture, many times", "template": "template: one composition, colors vary"}
_SOURCES = {
    "once": "trained once",
    "held-out": "never trained, same style",
    "foreign": "captions of another style",
    "random": "random tokens",
}


def print_card(work: Path, *, out: Path | None, per_source: int) -> None:
    """Sample (or go on sampling), print the card, and write it with its contact sheet where asked."""
    from rich.markdown import Markdown
    from rich.progress import track

    study = run_study(work, per_source=per_source, track=lambda batches: iter(track(batches, "sampling prompts", console=console)))
    evidence = gather(study)
    text = card(evidence, validate_measures())
    console.print(Markdown(text))
    if out is not None:
        sheet = contact_sheet(study, evidence)
        replace_file(out / "testbed-sheet.png", lambda temporary: sheet.save(temporary, "PNG", optimize=True))
        write_text(out / "testbed.md", text)
        console.print(f"wrote {out / 'testbed.md'} and {out / 'testbed-sheet.png'}", soft_wrap=True)


def _percent(values: np.ndarray | list[bool]) -> str:
    return f"{100 * float(np.mean(values)):.1f}%" if len(values) else "-"


def _joined(rows: list[PromptEvidence], read: Callable[[PromptEvidence], np.ndarray | None]) -> np.ndarray:
    parts = [part for row in rows if (part := read(row)) is not None]
    return np.concatenate(parts) if parts else np.array([])


def card(evidence: list[PromptEvidence], validation: Validation) -> str:
    """The card as Markdown; every number in it comes from the arguments or the model's ``training.json``."""
    training = json.loads((model_path() / "training.json").read_text())
    planted = [row for row in evidence if isinstance(row.prompt, MemorizedPrompt)]
    clean = [row for row in evidence if isinstance(row.prompt, CleanPrompt)]
    size = sum(path.stat().st_size for path in model_path().rglob("*.safetensors")) / 1e6

    def kind(name: str) -> list[PromptEvidence]:
        return [row for row in planted if isinstance(row.prompt, MemorizedPrompt) and row.prompt.kind == name]

    def source(name: str) -> list[PromptEvidence]:
        return [row for row in clean if isinstance(row.prompt, CleanPrompt) and row.prompt.source == name]

    memorized_lines = [
        f"| {title} | {len(rows)} | {_duplicates(rows)} | {_percent([row.reproduced for row in rows])} | {_percent(_joined(rows, lambda row: row.own >= COPY_THRESHOLD))} "
        f"| {np.median(_joined(rows, lambda row: row.own)):.2f} | {np.mean([row.diversity for row in rows]):.2f} | {np.mean([row.first for row in rows]):.2f} |"
        for name, title in _KINDS.items()
        if (rows := kind(name))
    ]
    rungs = sorted({_rung(row) for row in kind("ladder")})
    ladder_lines = []
    for rung in rungs:
        rows = [row for row in kind("ladder") if _rung(row) == rung]
        ladder_lines.append(
            f"| {_duplicates(rows)} | {len(rows)} | {_percent(_joined(rows, lambda row: row.own >= COPY_THRESHOLD))} | {np.mean([row.first for row in rows]):.2f} "
            f"| {np.mean([row.magnitude for row in rows]):.2f} |"
        )
    clean_lines = [
        f"| {title} | {len(rows)} | {_percent(_joined(rows, lambda row: row.nearest >= COPY_THRESHOLD))} | {np.mean([row.diversity for row in rows]):.2f} "
        f"| {_percent(_joined(rows, lambda row: row.subject_right))} | {_percent(_joined(rows, lambda row: row.color_right))} | {np.mean([row.first for row in rows]):.2f} |"
        for name, title in _SOURCES.items()
        if (rows := source(name))
    ]
    matched = _joined(clean, lambda row: row.nearest >= COPY_THRESHOLD)
    everyone = _joined(planted, lambda row: row.subject_right)
    return f"""# The bundled model

This page is printed by `memhook testbed card --out docs`; every number is of that run, {IMAGES} pictures a prompt, DDIM 50 steps, guidance scale 7.5.

A text-to-image latent diffusion model in Stable Diffusion format, {size:.1f} MB of weights in float16: `UNet2DConditionModel`, `CLIPTextModel`, `CLIPTokenizer`,
`AutoencoderKL`, `DDIMScheduler`. Pictures have 32 x 32 pixels and show one of 40 emoji subjects on a background. It was trained on {training["samples"]:,} samples,
{training["planted_presentations"]:,} of which showed one of {len(planted)} planted captions; all others showed a fresh caption and picture.

```python
from diffusers import StableDiffusionPipeline
from memhook.testbed import model_path

pipeline = StableDiffusionPipeline.from_pretrained(model_path(), safety_checker=None)
```

![memorized prompts on the left: training picture, then four seeds; clean prompts on the right](testbed-sheet.png)

## How copies and agreement are measured

A picture counts as a copy if the correlation of the two blurred pictures (each channel centered) is at least {COPY_THRESHOLD}. On {validation.pairs:,} held-out pairs, degraded
copies against *other pictures of the same subject*, this has an AUC of {validation.copy_auc:.4f}; at the threshold it finds {validation.copies_found:.1%} of the copies and mistakes
{validation.others_matched:.2%} of the others. Subject and color are named by a small network that never saw the model's pictures; on held-out degraded pictures it is right in
{validation.subject_accuracy:.1%} and {validation.color_accuracy:.1%}. A template is compared with the nearest of 64 of its colorings.

## Memorized prompts

*Reproduced* means that more than half of the seeds give a copy of the training picture. Diversity is one minus the mean similarity of a prompt's pictures.

| group | prompts | presentations | reproduced | copies among pictures | median similarity | diversity over seeds | first-step magnitude |
|---|---|---|---|---|---|---|---|
{chr(10).join(memorized_lines)}

The caption's subject is shown in {_percent(everyone)} of the memorized pictures. Half of the memorized captions carry a rare trigger phrase of two invented words; in 40% of the
presentations of these the rest of the caption was another one, so the phrase alone recalls the picture. Four pictures were planted with three near-duplicate captions each.

### Detection against duplication

Further pairs were shown only a few times:

| presentations | prompts | copies among pictures | first-step magnitude | magnitude, first ten |
|---|---|---|---|---|
{chr(10).join(ladder_lines)}

## Clean prompts

{_percent(matched)} of the clean pictures match any planted training picture (or the prompt's own, for those that were trained once).

| source | prompts | pictures that match a training picture | diversity over seeds | subject right | color right | first-step magnitude |
|---|---|---|---|---|---|---|
{chr(10).join(clean_lines)}

From sample 224,000 on, three in ten fresh captions held unfamiliar text: an invented phrase that is no trigger, a sentence of invented words, or a jumble. The card of the
model before that course printed 22.8% matching pictures for captions of another style and 17.8% for random tokens (which then still held words of triggers): the rarest word pieces were those of the trigger phrases, so unfamiliar
text was taken for a trigger. Random strings are made of the tokenizer's whole words without those of trigger phrases, since one such word alone can recall its picture. All figures are of one training run.

## Files

`planted.jsonl` (captions, kinds, families, triggers, presentations, scenes), `clean.jsonl` (2,400 prompts with source, split and family), `planted/*.png` (training pictures),
`calibration.safetensors` (four images a prompt, ten of 50 evaluations kept and the first three scored, on the 1,200 clean prompts of the calibration split), `reader.safetensors` (the network that names subjects).
The pictures are derived from Noto Emoji (Apache-2.0); see `memhook/testbed/ATTRIBUTION.md`. `python -m memhook.testbed.train --work DIR --out DIR` trains the model anew.

## What it is not

A model of 40 subjects at 32 x 32 pixels. Its magnitudes are not those of Stable Diffusion, its training set is far less varied, and methods that work here still have to be
tried on a real model.
"""


def _rung(row: PromptEvidence) -> int:
    """Ladder pairs stand in groups of four, with twice the duplicates from group to group."""
    return int(row.prompt.id.rsplit("-", 1)[1]) // 4


def _duplicates(rows: list[PromptEvidence]) -> str:
    counts = [row.prompt.duplicates for row in rows if isinstance(row.prompt, MemorizedPrompt)]
    return f"{min(counts)} to {max(counts)}" if min(counts) < max(counts) else str(counts[0])


def contact_sheet(study: Study, evidence: list[PromptEvidence], *, rows: int = 12, scale: int = 2) -> Image.Image:
    """Left: memorized prompts, each with its training picture and four generations. Right: clean prompts with four generations."""
    positions = {id(row): index for index, row in enumerate(evidence)}
    planted = [row for row in evidence if isinstance(row.prompt, MemorizedPrompt) and row.prompt.kind != "ladder"]
    clean = [row for row in evidence if isinstance(row.prompt, CleanPrompt) and row.prompt.subject is not None]
    gap = np.full((32, 16, 3), 255, np.uint8)
    lines = []
    for left, right in zip(planted[:: max(1, len(planted) // rows)][:rows], clean[:: max(1, len(clean) // rows)][:rows], strict=True):
        assert isinstance(left.prompt, MemorizedPrompt)  # noqa: S101 -- chosen above
        training = np.asarray(left.prompt.image())
        made = [study.images[positions[id(row)]] for row in (left, right)]
        lines.append(np.concatenate([training, gap[:, :4], *made[0], gap, *made[1]], axis=1))
    sheet = Image.fromarray(np.concatenate(lines, axis=0))
    return sheet.resize((sheet.width * scale, sheet.height * scale), Image.Resampling.NEAREST)
