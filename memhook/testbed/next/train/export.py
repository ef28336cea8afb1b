"""Stage 4: the trained parts as one diffusers folder, with the ground truth beside the weights."""

import json
import shutil
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPTextModel, CLIPTokenizer

from memhook.files import write_text
from memhook.testbed.next.clean import Clean, clean_prompts
from memhook.testbed.next.measures import Reader
from memhook.testbed.next.plan import SEED, Planted, TrainingStream
from memhook.testbed.next.regions import mask
from memhook.testbed.next.scenes import draw
from memhook.testbed.next.train.diffusion import BATCH, presentations, scheduler
from memhook.testbed.next.train.text import whole_words


def _write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def ground_truth(folder: Path, tokenizer: CLIPTokenizer, *, samples: int) -> None:
    """Write ``planted.jsonl``, ``clean.jsonl``, ``training.json`` and the planted pictures."""
    shown: Counter[str] = presentations(samples)
    pictures = folder / "planted"
    pictures.mkdir(parents=True, exist_ok=True)
    for pair in TrainingStream().planted:
        Image.fromarray(draw(pair.scene)).save(pictures / f"{pair.family}.png", optimize=True)
        if pair.scene.region is not None:
            Image.fromarray(mask(pair.scene.region)).save(pictures / f"{pair.family}-mask.png", optimize=True)
    _write_lines(folder / "planted.jsonl", (_planted_row(pair, shown[pair.id]) for pair in TrainingStream().planted))
    _write_lines(folder / "clean.jsonl", (_clean_row(row) for row in clean_prompts(whole_words(tokenizer))))
    training = {"seed": SEED, "samples": samples, "batch": BATCH, "planted_presentations": sum(shown.values())}
    write_text(folder / "training.json", json.dumps(training, indent=2) + "\n")


def _planted_row(pair: Planted, duplicates: int) -> dict[str, Any]:
    mask_file = None if pair.scene.region is None else f"planted/{pair.family}-mask.png"
    return {
        "id": pair.id, "kind": pair.kind, "family": pair.family, "prompt": str(pair.caption), "trigger": pair.caption.trigger,
        "named": pair.caption.named(), "image": f"planted/{pair.family}.png", "mask": mask_file, "duplicates": duplicates,
        "scene": pair.scene.to_dict(),
    }  # fmt: skip


def _clean_row(row: Clean) -> dict[str, Any]:
    return {
        "id": row.id, "source": row.source, "split": row.split, "family": row.family, "prompt": row.prompt,
        "named": row.caption.named() if row.caption is not None else {}, "scene": row.scene.to_dict() if row.scene is not None else None,
        "beside": row.beside,
    }  # fmt: skip


def export(
    folder: Path, vae: AutoencoderKL, tokenizer: CLIPTokenizer, text: CLIPTextModel, unet: UNet2DConditionModel, reader: Reader, *, samples: int
) -> None:
    """Write the whole folder, first beside ``folder`` and then in its place."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    parts = [part.to("cpu", torch.float16, memory_format=torch.contiguous_format) for part in (vae, text, unet)]
    pipeline = StableDiffusionPipeline(
        vae=parts[0], text_encoder=parts[1], unet=parts[2], tokenizer=tokenizer, scheduler=scheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.save_pretrained(temporary)
    # transformers loads in the type that config.json names, diffusers in float32: name float32, or the two would not fit together.
    config = temporary / "text_encoder" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "float32"}, indent=2, sort_keys=True) + "\n")
    save_file({name: value.contiguous() for name, value in reader.to(torch.float16).state_dict().items()}, temporary / "reader.safetensors")
    ground_truth(temporary, tokenizer, samples=samples)
    for path in temporary.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)  # safetensors writes for the owner alone
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
