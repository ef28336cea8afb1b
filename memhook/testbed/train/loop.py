"""A small resumable training loop: schedule, moving average, checkpoints, log."""

import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from memhook.files import replace_file


def warmup_then_decay(step: int, *, steps: int, warmup: int = 200, decay_from: float = 0.7) -> float:
    """Learning-rate factor: linear warm-up, constant, then a cosine to zero over the last part of the run."""
    if step < warmup:
        return (step + 1) / warmup
    start = decay_from * steps
    if step < start:
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - start) / max(1.0, steps - start))))


class Average:
    """Exponential moving average of parameters, with the usual warm-up of the decay."""

    def __init__(self, parameters: list[nn.Parameter], decay: float) -> None:
        self.values = [p.detach().clone() for p in parameters]
        self.parameters, self.decay, self.updates = parameters, decay, 0

    @torch.no_grad()
    def update(self) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.values, [p.detach() for p in self.parameters], 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the parameters and their averages (call twice to restore)."""
        for parameter, value in zip(self.parameters, self.values, strict=True):
            kept = parameter.detach().clone()
            parameter.copy_(value)
            value.copy_(kept)


def run(
    name: str,
    modules: Mapping[str, nn.Module],
    step_loss: Callable[[int], Tensor],
    *,
    directory: Path,
    steps: int,
    groups: list[dict[str, Any]],
    weight_decay: float = 0.01,
    ema: float | None = None,
    decay_from: float = 0.7,
    save_every: int = 500,
    evaluate: Callable[[int], dict[str, float]] | None = None,
) -> None:
    """Minimize ``step_loss(step)`` with AdamW, going on from ``directory/NAME.pt`` when there is one.

    ``groups`` are AdamW parameter groups, each with its own ``lr``. The modules hold the averaged weights on return when
    ``ema`` is given.
    """
    path, log = directory / f"{name}.pt", directory / "log.jsonl"
    parameters = [p for group in groups for p in group["params"]]
    optimizer = torch.optim.AdamW(groups, weight_decay=weight_decay)
    base = [group["lr"] for group in groups]
    average = Average(parameters, ema) if ema is not None else None
    first = 0
    if path.exists():
        state = torch.load(path, weights_only=True, map_location=parameters[0].device)
        first = state["step"]
        for key, module in modules.items():
            module.load_state_dict(state["modules"][key])
        optimizer.load_state_dict(state["optimizer"])
        if average is not None:
            average.values, average.updates = state["average"], first

    def save(step: int) -> None:
        state = {
            "step": step,
            "modules": {key: module.state_dict() for key, module in modules.items()},
            "optimizer": optimizer.state_dict(),
            "average": average.values if average is not None else [],
        }
        replace_file(path, lambda temporary: torch.save(state, temporary))

    started, seen = time.monotonic(), first
    total: Tensor | float = 0.0
    for step in range(first, steps):
        factor = warmup_then_decay(step, steps=steps, decay_from=decay_from)
        for group, lr in zip(optimizer.param_groups, base, strict=True):
            group["lr"] = lr * factor
        loss = step_loss(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if average is not None:
            average.update()
        total = total + loss.detach()
        done = step + 1
        if done % 100 == 0 or done == steps:
            count = done - seen
            row: dict[str, Any] = {
                "stage": name,
                "step": done,
                "loss": float(total) / count,
                "seconds_per_step": (time.monotonic() - started) / count,
            }
            if evaluate is not None and (done % save_every == 0 or done == steps):
                row |= evaluate(done)
            with log.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(" ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()), flush=True)
            started, seen, total = time.monotonic(), done, 0.0
        if done % save_every == 0 or done == steps:
            save(done)
    if average is not None:
        average.swap()
