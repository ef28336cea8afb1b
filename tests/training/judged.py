"""What the tests of judged timesteps have in common."""

import pytest
import torch

import memhook
from tests.training.models import NULL, pairs

NOTHING = torch.zeros(5, 6)  # the tiny UNet's null embedding


def filtered(model, threshold=4.0, timesteps=(800, 999), **options):
    return memhook.training_filter(model, **{"null_embedding": NULL, "threshold": threshold, "timesteps": timesteps, **options})


def batch(*levels, t):
    sample, _, text, target = pairs(*levels)
    return sample, torch.tensor(t), text, target


def raises(*parts):
    return pytest.raises(memhook.MemhookError, match=".*".join(parts))
