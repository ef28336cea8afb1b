"""Is a picture a copy, and does it show what its prompt says? Measures for models of users' own, by networks that they name.

SSCD (Pizzi et al. 2022) describes pictures so that copies are close; CLIP (Radford et al. 2021) puts pictures and texts in one space.
Wen et al. 2024 (section 4.4) measure mitigation with both. At 32 x 32 pixels neither says much: the bundled model has measures of its own
(`memhook.testbed.measures`).
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from memhook.errors import MemhookError

if TYPE_CHECKING:
    from PIL.Image import Image

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as SSCD's authors use them


@dataclass(frozen=True, eq=False)
class Descriptor:
    """``descriptor(images) -> (n, d)`` float32 unit vectors on the CPU; copies have a high dot product.

    Attributes:
        network: From normalized pixels ``(n, 3, size, size)`` to vectors ``(n, d)``.
        size: Side of the square that pictures are resized to, in pixels.
        batch_size: Pictures that run together.
    """

    network: Callable[[Tensor], Tensor]
    size: int = 320
    batch_size: int = 16

    @torch.inference_mode()
    def __call__(self, images: Sequence[Image]) -> Tensor:
        found = []
        for start in range(0, len(images), self.batch_size):
            vectors = self.network(_pixels(images[start : start + self.batch_size], self.size))
            if vectors.ndim != 2:
                raise MemhookError(f"the descriptor network gave shape {tuple(vectors.shape)}; expected a vector a picture, (n, d)")
            found.append(torch.nn.functional.normalize(vectors.float().cpu(), dim=1))
        if not found:
            raise MemhookError("there are no images to describe; pass at least one")
        return torch.cat(found)


def load_descriptor(path: Path | str, *, device: str = "cpu", size: int = 320, batch_size: int = 16) -> Descriptor:
    """Load SSCD, or another copy-detection network, from a TorchScript or an ONNX file.

    **A TorchScript file is a program, and loading it may run code: take it from a source that you trust**, such as SSCD's authors
    (``sscd_disc_mixup.torchscript.pt`` of github.com/facebookresearch/sscd-copy-detection). An ONNX file only describes a computation.

    Args:
        path: The file; ``.onnx`` needs ``onnxruntime``, every other ending is read as TorchScript.
        device: For TorchScript, such as ``"cuda"``.
        size: Side of the square that pictures are resized to; SSCD's authors give 320 x 320 for batches.
        batch_size: Pictures that run together.

    Raises:
        MemhookError: There is no such file, it cannot be read, or ``onnxruntime`` is missing.
    """
    path = Path(path)
    if not path.is_file():
        raise MemhookError(f"there is no file {path}; name a TorchScript (.pt) or ONNX (.onnx) file of a copy-detection network such as SSCD")
    network = _onnx(path) if path.suffix == ".onnx" else _torchscript(path, device)
    return Descriptor(network, size, batch_size)


def _torchscript(path: Path, device: str) -> Callable[[Tensor], Tensor]:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*torch.jit.load.*", category=DeprecationWarning)  # the format that SSCD ships in
            module = torch.jit.load(str(path), map_location=device).eval()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        raise MemhookError(
            f"{path} is no TorchScript file ({str(error).splitlines()[0]}); expected one that torch.jit.save wrote, or .onnx"
        ) from error
    return lambda pixels: module(pixels.to(device))


def _onnx(path: Path) -> Callable[[Tensor], Tensor]:
    try:
        onnxruntime = importlib.import_module("onnxruntime")  # optional, and no dependency of any extra
    except ImportError as error:
        raise MemhookError(
            f"reading {path} needs onnxruntime, which is not installed; run `pip install onnxruntime`, or name a TorchScript file"
        ) from error
    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises whatever its C++ core raises
        raise MemhookError(f"{path} is no ONNX file that onnxruntime can run: {str(error).splitlines()[0]}") from error
    [name] = [given.name for given in session.get_inputs()]
    return lambda pixels: torch.from_numpy(np.asarray(session.run(None, {name: pixels.numpy()})[0]))


def image_similarity(images: Sequence[Image], others: Sequence[Image], descriptor: Descriptor) -> Tensor:
    """The similarity of each image to the one beside it, ``(n,)`` in -1..1; for SSCD 0.5 and more are taken for copies (Somepalli et al. 2022).

    Args:
        images: ``n`` generated pictures.
        others: ``n`` pictures to compare with, such as their training pictures.
        descriptor: From `load_descriptor`.
    """
    if len(images) != len(others):
        raise MemhookError(f"there are {len(images)} images and {len(others)} to compare them with; expected as many of both")
    return (descriptor(images) * descriptor(others)).sum(dim=1)


@dataclass(frozen=True, eq=False)
class ClipScore:
    """``clip_score(images, prompts) -> (n,)``: the cosine between each image and its prompt, in -1..1; not scaled by 100.

    Attributes:
        model: A ``transformers.CLIPModel``.
        processor: Its image processor.
        tokenizer: Its tokenizer.
        batch_size: Pairs that run together.
    """

    model: Any
    processor: Any
    tokenizer: Any
    batch_size: int = 16

    @torch.inference_mode()
    def __call__(self, images: Sequence[Image], prompts: Sequence[str]) -> Tensor:
        if len(images) != len(prompts) or not images:
            raise MemhookError(f"there are {len(images)} images and {len(prompts)} prompts; expected a prompt for each image, and at least one")
        found = []
        for start in range(0, len(images), self.batch_size):
            rows = slice(start, start + self.batch_size)
            pixels = self.processor(images=[image.convert("RGB") for image in images[rows]], return_tensors="pt")["pixel_values"]
            window = self.model.config.text_config.max_position_embeddings
            texts = self.tokenizer(list(prompts[rows]), padding=True, truncation=True, max_length=window, return_tensors="pt")
            device = next(self.model.parameters()).device
            output = self.model(
                input_ids=texts["input_ids"].to(device),
                attention_mask=texts["attention_mask"].to(device),
                pixel_values=pixels.to(device, self.model.dtype),
            )
            found.append((output.image_embeds * output.text_embeds).sum(dim=1).float().cpu())  # both are unit vectors
        return torch.cat(found)


def load_clip(model: str, *, device: str = "cpu", batch_size: int = 16) -> ClipScore:
    """Load a CLIP model for `ClipScore`, safetensors only.

    Args:
        model: A local folder, or a hub id such as ``"openai/clip-vit-large-patch14"``.
        device: Where to put it.
        batch_size: Pairs that run together.

    Raises:
        MemhookError: It cannot be loaded.
    """
    from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizerFast
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()  # it tells that torchvision is missing, which changes nothing here
    try:
        loaded = CLIPModel.from_pretrained(model, use_safetensors=True).eval().requires_grad_(False).to(device)
        return ClipScore(loaded, CLIPImageProcessor.from_pretrained(model), CLIPTokenizerFast.from_pretrained(model), batch_size)
    except Exception as error:  # loaders raise whatever their file formats raise
        raise MemhookError(
            f"cannot load CLIP from {model}: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}. "
            "Give a folder that CLIPModel.save_pretrained and its processor wrote, or a hub id"
        ) from error
    finally:
        logging.set_verbosity(before)


def _pixels(images: Sequence[Image], size: int) -> Tensor:
    """Normalized pixels ``(n, 3, size, size)``; the picture is squeezed to a square, nothing is cut off."""
    squares = np.stack([np.asarray(image.convert("RGB").resize((size, size), resample=2), np.float32) for image in images])  # 2: bilinear
    pixels = torch.from_numpy(squares).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(values)[:, None, None] for values in (_MEAN, _STD))
    return (pixels - mean) / std
