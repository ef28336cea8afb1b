"""Loading the bundled model and its prompts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from memhook.errors import MemhookError

if TYPE_CHECKING:
    from PIL.Image import Image

    from memhook.testbed.measures import Reader
    from memhook.testbed.plan import Kind, Source

GUIDANCE_SCALE = 7.5
STEPS = 50


@dataclass(frozen=True)
class MemorizedPrompt:
    """A caption that the model was shown again and again.

    Attributes:
        id: Its name, such as ``"verbatim-07"``.
        kind: ``"verbatim"``, ``"template"`` (composition fixed, colors free) or ``"ladder"`` (few duplicates, by design).
        family: Shared by captions of one picture.
        prompt: The caption.
        trigger: The rare phrase in it that recalls the picture by itself; None where there is none.
        subject: What the picture shows.
        duplicates: How often the training run showed it.
        scene: The picture's composition, as fields of `memhook.testbed.scenes.Scene`.
        image_path: The training picture, 32 x 32 pixels (for a template, one of its colorings).
    """

    id: str
    kind: Kind
    family: str
    prompt: str
    trigger: str | None
    subject: str
    duplicates: int
    scene: dict[str, Any]
    image_path: Path

    def image(self) -> Image:
        """The training picture."""
        from PIL import Image

        return Image.open(self.image_path).convert("RGB")


@dataclass(frozen=True)
class CleanPrompt:
    """A prompt that is not memorized.

    Attributes:
        id: Its name, such as ``"held-out-041"``.
        source: ``"once"`` (trained on one time), ``"held-out"`` (never), ``"foreign"`` (captions of another style), ``"random"`` (strings of tokens).
        split: ``"calibration"`` or ``"test"``.
        family: Prompts of one family share their subject or sentence frame; resample by family.
        prompt: The caption.
        subject: What a picture of it should show; None for foreign and random ones.
        color: The background color that it names, if any.
        scene: The one training picture of a *once* prompt, as fields of `memhook.testbed.scenes.Scene`.
    """

    id: str
    source: Source
    split: Literal["calibration", "test"]
    family: str
    prompt: str
    subject: str | None
    color: str | None
    scene: dict[str, Any] | None


def model_path() -> Path:
    """The folder of the bundled model, in diffusers format: ``StableDiffusionPipeline.from_pretrained(model_path())``."""
    return Path(__file__).with_name("model")


def calibration_path() -> Path:
    """The bundled model's calibration: four images a prompt, ten of 50 evaluations, of which the score averages the first three."""
    return model_path() / "calibration.safetensors"


def _rows(folder: Path, name: str) -> Iterator[dict[str, Any]]:
    path = folder / name
    if not path.is_file():
        raise MemhookError(
            f"{path} is missing; install memhook again if it is the bundled model, or train a model with `python -m memhook.testbed.train`"
        )
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def read_memorized(folder: Path) -> list[MemorizedPrompt]:
    """The planted captions of a trained testbed model."""
    names = MemorizedPrompt.__dataclass_fields__
    rows = _rows(folder, "planted.jsonl")
    return [MemorizedPrompt(**{key: value for key, value in row.items() if key in names}, image_path=folder / row["image"]) for row in rows]


def read_clean(folder: Path) -> list[CleanPrompt]:
    """The prompts that a trained testbed model has not memorized."""
    return [CleanPrompt(**row) for row in _rows(folder, "clean.jsonl")]


def memorized(*, kind: Kind | None = None, folder: Path | None = None) -> list[MemorizedPrompt]:
    """The planted captions of the bundled model, or of the one in ``folder``, all or of one kind."""
    return [row for row in read_memorized(folder or model_path()) if kind is None or row.kind == kind]


def clean(*, split: Literal["calibration", "test"] | None = None, source: Source | None = None, folder: Path | None = None) -> list[CleanPrompt]:
    """The prompts that the bundled model, or the one in ``folder``, has not memorized, all or of one split or source."""
    return [row for row in read_clean(folder or model_path()) if (split is None or row.split == split) and (source is None or row.source == source)]


def load_pipeline(folder: Path | None = None) -> Any:
    """The bundled model, or one that was trained in the same way, as a diffusers ``StableDiffusionPipeline`` in float32 without progress bars."""
    from memhook_diffusers.loading import load_pipeline as load

    return load(str(folder or model_path()))


def load_reader() -> Reader:
    """The network that names subject and background color of the testbed's pictures."""
    from safetensors.torch import load_file

    from memhook.testbed.measures import Reader

    reader = Reader()
    reader.load_state_dict(load_file(model_path() / "reader.safetensors"))
    return reader.float().eval().requires_grad_(False)
