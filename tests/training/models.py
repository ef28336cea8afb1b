"""Denoisers whose magnitudes and gradients can be written down."""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from memhook.testing import tiny_unet


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


class Dropping(nn.Module):
    """A denoiser with dropout, normalization by batch, and layers enough to be checkpointed."""

    def __init__(self, *, checkpointed=None, norm=True):
        super().__init__()
        self.enter, self.middle, self.leave = nn.Linear(4, 16), nn.Linear(16, 16), nn.Linear(16, 4)
        self.text, self.dropout, self.norm = nn.Linear(5, 16), nn.Dropout(0.3), nn.BatchNorm1d(16) if norm else nn.Identity()
        self.checkpointed = checkpointed

    def forward(self, sample, timestep, encoder_hidden_states):
        hidden = self.enter(sample.flatten(1)) + self.text(encoder_hidden_states.mean(1)) + timestep[:, None] / 1000

        def block(hidden):
            return self.dropout(torch.tanh(self.middle(self.norm(hidden))))

        if self.checkpointed is not None and torch.is_grad_enabled():
            hidden = checkpoint(block, hidden, use_reentrant=self.checkpointed)
        else:
            hidden = block(hidden)
        return self.leave(hidden).reshape(sample.shape)


def dropping(**options):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return Dropping(**options).train()


def gradients(model):
    return [parameter.grad.clone() for parameter in model.parameters()]


class LowRank(nn.Module):
    """A frozen linear layer with a trained low-rank detour, as peft's LoRA adds it."""

    def __init__(self, base, rank=2):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.lora_down, self.lora_up = nn.Linear(base.in_features, rank, bias=False), nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.lora_up(self.lora_down(x))


def low_rank_unet():
    with torch.random.fork_rng():
        torch.manual_seed(1)
        unet = tiny_unet().requires_grad_(False)
        for name in ("query", "key", "value"):
            setattr(unet, name, LowRank(getattr(unet, name)))
    return unet
