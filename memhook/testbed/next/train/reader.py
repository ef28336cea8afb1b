"""The reader of `memhook.testbed.next.measures`, trained to name the things that captions name in degraded pictures."""

from pathlib import Path

import torch
from torch import Tensor, nn

from memhook.testbed.next.measures import Reader, Reading
from memhook.testbed.next.plan import fresh_pair
from memhook.testbed.next.scenes import THINGS, Thing, draw
from memhook.testbed.next.train.autoencoder import to_pixels
from memhook.testbed.train import loop

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


def labeled(start: int, count: int, *, stream: str) -> tuple[Tensor, dict[Thing, Tensor]]:
    """Pictures ``(count, 3, 32, 32)`` and, for each thing, the number of its word ``(count,)``."""
    scenes = [fresh_pair(index, stream=stream)[1] for index in range(start, start + count)]
    labels = {thing: torch.tensor([words.index(scene.named(thing)) for scene in scenes]) for thing, words in THINGS.items()}
    return to_pixels([draw(scene) for scene in scenes]).contiguous(), labels


def accuracy(reading: Reading, labels: dict[Thing, Tensor]) -> dict[Thing, float]:
    """How often each thing is named rightly."""
    return {thing: float((reading.logits[thing].argmax(1).cpu() == labels[thing]).float().mean()) for thing in THINGS}


def train(directory: Path, *, steps: int, device: torch.device) -> Reader:
    """Train (or finish training) the reader."""
    torch.manual_seed(2)
    reader = Reader().to(device)

    def step_loss(step: int) -> Tensor:
        pictures, labels = labeled(step * BATCH, BATCH, stream="reader")
        reading = reader(degrade(pictures, torch.Generator().manual_seed(step)).to(device))
        return torch.stack([nn.functional.cross_entropy(reading.logits[thing], labels[thing].to(device)) for thing in THINGS]).sum()

    @torch.no_grad()
    def evaluate(_: int) -> dict[str, float]:
        pictures, labels = labeled(0, 512, stream="reader held out")
        reader.eval()
        reading = reader(degrade(pictures, torch.Generator().manual_seed(0)).to(device))
        reader.train()
        return {f"{thing}_accuracy": value for thing, value in accuracy(reading, labels).items()}

    loop.run(
        "reader", {"reader": reader}, step_loss, directory=directory, steps=steps, groups=[{"params": list(reader.parameters()), "lr": 2e-3}],
        decay_from=0.3, save_every=100, evaluate=evaluate,
    )  # fmt: skip
    return reader.eval().requires_grad_(False)
