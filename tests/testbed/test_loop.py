"""The training loop goes on where it was interrupted, with the same result."""

import json

import pytest
import torch
from torch import nn

from memhook.testbed.train import loop


def train(directory, *, steps, stop_at=None, ema=None):
    torch.manual_seed(0)
    model = nn.Linear(3, 1)

    def step_loss(step):
        if step == stop_at:
            raise KeyboardInterrupt
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
        return (model(x).squeeze() - x.sum(1)).square().mean()

    groups = [{"params": list(model.parameters()), "lr": 1e-2}]
    loop.run("toy", {"model": model}, step_loss, directory=directory, steps=steps, groups=groups, ema=ema, save_every=10)
    return model.weight.detach().clone()


def test_an_interrupted_run_ends_like_an_uninterrupted_one(tmp_path):
    for ema in (None, 0.9):
        whole, parts = tmp_path / f"whole-{ema}", tmp_path / f"parts-{ema}"
        whole.mkdir()
        parts.mkdir()
        expected = train(whole, steps=40, ema=ema)
        with pytest.raises(KeyboardInterrupt):
            train(parts, steps=40, stop_at=25, ema=ema)
        torch.testing.assert_close(train(parts, steps=40, ema=ema), expected)


def test_a_finished_run_is_not_repeated(tmp_path):
    first = train(tmp_path, steps=20)
    assert torch.equal(train(tmp_path, steps=20, stop_at=0), first)


def test_the_log_says_what_happened(tmp_path):
    train(tmp_path, steps=20)
    [row] = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert row["stage"] == "toy"
    assert row["step"] == 20
    assert row["loss"] > 0


def test_the_rate_warms_up_stays_and_ends_at_zero():
    rates = [loop.warmup_then_decay(step, steps=1000, warmup=100, decay_from=0.7) for step in range(1000)]
    assert rates[0] == 0.01
    assert rates[100:700] == [1.0] * 600
    assert rates[700:] == sorted(rates[700:], reverse=True)
    assert rates[-1] < 1e-4
