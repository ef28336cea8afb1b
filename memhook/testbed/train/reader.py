"""The reader of `memhook.testbed.measures`, trained to name subject and background color of degraded pictures."""

from pathlib import Path

import torch
from torch import Tensor, nn

from memhook.testbed.artwork import SUBJECTS
from memhook.testbed.measures import Reader
from memhook.testbed.plan import scene_with_color
from memhook.testbed.scenes import COLORS, draw
from memhook.testbed.train import loop
from memhook.testbed.train.autoencoder import to_pixels

BATCH = 64


def degrade(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Copies as a small diffusion model makes them: shifted by up to a pixel, blurred, paler or stronger, noisy."""

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(len(pictures), 1, 1, 1, generator=generator)

    shifts = torch.randint(-1, 2, (len(pictures), 2), generator=generator)
    padded = nn.functional.pad(pictures, (1, 1, 1, 1), mode="replicate")
    moved = torch.stack([row[:, 1 + dy : 33 + dy, 1 + dx : 33 + dx] for row, (dy, dx) in zip(padded, shifts.tolist(), strict=True)])
    soft = nn.functional.avg_pool2d(nn.functional.pad(moved, (1, 1, 1, 1), mode="replicate"), 3, 1)
    mixed = torch.lerp(moved, soft, uniform(0, 1))
    mean = mixed.mean(dim=(1, 2, 3), keepdim=True)
    mixed = mean + (mixed - mean) * uniform(0.7, 1.35) + uniform(-0.15, 0.15)
    mixed = mixed + torch.randn(mixed.shape, generator=generator) * uniform(0, 0.1)
    return mixed.clamp(-1, 1)


def labeled(start: int, count: int, *, stream: str) -> tuple[Tensor, Tensor]:
    """Pictures ``(count, 3, 32, 32)`` and their subject and color numbers ``(count, 2)``."""
    scenes, labels = [], []
    for index in range(start, start + count):
        scene, color = scene_with_color(index, stream=stream)
        scenes.append(scene)
        labels.append((list(SUBJECTS).index(scene.subject), list(COLORS).index(color)))
    return to_pixels([draw(scene) for scene in scenes]).contiguous(), torch.tensor(labels)


def train(directory: Path, *, steps: int, device: torch.device) -> Reader:
    """Train (or finish training) the reader."""
    torch.manual_seed(2)
    reader = Reader().to(device)

    def step_loss(step: int) -> Tensor:
        pictures, labels = labeled(step * BATCH, BATCH, stream="reader")
        reading = reader(degrade(pictures, torch.Generator().manual_seed(step)).to(device))
        labels = labels.to(device)
        return nn.functional.cross_entropy(reading.subject, labels[:, 0]) + 0.5 * nn.functional.cross_entropy(reading.color, labels[:, 1])

    @torch.no_grad()
    def evaluate(_: int) -> dict[str, float]:
        pictures, labels = labeled(0, 512, stream="reader held out")
        reader.eval()
        reading = reader(degrade(pictures, torch.Generator().manual_seed(0)).to(device))
        reader.train()
        hits = torch.stack([reading.subject.argmax(1).cpu() == labels[:, 0], reading.color.argmax(1).cpu() == labels[:, 1]]).float().mean(1)
        return {"subject_accuracy": float(hits[0]), "color_accuracy": float(hits[1])}

    loop.run(
        "reader", {"reader": reader}, step_loss, directory=directory, steps=steps, groups=[{"params": list(reader.parameters()), "lr": 2e-3}],
        decay_from=0.3, save_every=100, evaluate=evaluate,
    )  # fmt: skip
    return reader.eval().requires_grad_(False)
