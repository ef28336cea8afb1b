"""Denoisers whose magnitudes and gradients can be written down."""

import torch
from torch import nn


class Plain(nn.Module):
    """``weight * sample + level``, where ``level`` is the mean of the embedding: the magnitude is ``|level - null level| * sqrt(elements)``."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))
        self.calls = []

    def forward(self, sample, timestep, encoder_hidden_states):
        self.calls.append((timestep, torch.is_grad_enabled(), self.training))
        return self.weight * sample + encoder_hidden_states.mean(dim=(1, 2))[:, None, None, None]


SHAPE = (1, 2, 2)  # four elements: magnitudes are twice the level
NULL = torch.linspace(-1, 1, 15).reshape(3, 5)  # of level 0


def embeddings(*levels):
    """Embeddings ``(b, 3, 5)`` of these mean values; level 0 is the null embedding."""
    return torch.stack([level + NULL for level in levels])


def pairs(*levels, seed=0):
    """Noisy samples, timesteps, embeddings and targets for a batch of these levels."""
    generator = torch.Generator().manual_seed(seed)
    count = len(levels)
    sample, target = (torch.randn(count, *SHAPE, generator=generator) for _ in range(2))
    return sample, torch.randint(1000, (count,), generator=generator), embeddings(*levels), target


def losses_of(prediction, target):
    return (prediction - target).square().mean(dim=(1, 2, 3))
