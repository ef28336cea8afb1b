"""Moving a prompt's embedding until the magnitude of its prediction is no longer that of a memorized prompt."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from memhook.adapting.checkpointing import checkpointing
from memhook.capture.objective import Objective, check_embedding, check_values, independent
from memhook.errors import MemhookError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import ArrayLike

Optimizer = Literal["adam", "adamw", "nadam", "radam", "rmsprop", "sgd"]
"""Element-wise optimizers only: one that mixes elements would let a sample move another."""


@dataclass(frozen=True, eq=False)
class OptimizedEmbedding:
    """The embedding that `optimize_embedding` found.

    Attributes:
        embedding: ``(b, l, d)``, in the dtype and on the device of the one given.
        losses: ``(1 + n, b)``: each sample's magnitude before the first of ``n`` updates and after every one.
        converged: ``(b,)`` bool: the target was reached.
        updates: ``(b,)`` int: how many updates a sample took; a converged sample takes no more.
        target: The target that was asked for.
    """

    embedding: Tensor
    losses: np.ndarray
    converged: np.ndarray
    updates: np.ndarray
    target: float

    @property
    def before(self) -> np.ndarray:
        """``(b,)``: the magnitude at the embedding given."""
        first: np.ndarray = self.losses[0]
        return first

    @property
    def after(self) -> np.ndarray:
        """``(b,)``: the magnitude at `embedding`."""
        last: np.ndarray = self.losses[-1]
        return last

    def __str__(self) -> str:
        reached = f"{int(self.converged.sum())} of {len(self.converged)} samples reached the magnitude {self.target:g}"
        return f"{reached} in at most {self.updates.max()} updates: from {self.before.max():.3g} to {self.after.max():.3g} at most"


def optimize_embedding(
    objective: Objective,
    embedding: Tensor,
    *,
    target: float,
    lr: float = 0.05,
    max_steps: int = 10,
    optimizer: Optimizer = "adam",
    weight_decay: float | None = None,
    fixed_tokens: int = 1,
    groups: ArrayLike | None = None,
    checkpoint: bool = False,
) -> OptimizedEmbedding:
    """Lower the magnitude by moving the conditional embedding (Wen et al. 2024, section 4.2): minimize Eq. 5 over ``e``.

    Every sample has its own loss and stops at the update that takes its magnitude to the target, also at the last one. Costs a
    forward and a backward pass of the conditional rows for each update, and one forward pass for the last check. Models keep no
    ``.grad``, and half-precision embeddings are updated in float32.

    Args:
        objective: The magnitude as a function of the embedding, such as ``trace.evaluations[0].objective``.
        embedding: Where to start, ``(b, l, d)``, such as ``trace.evaluations[0].embedding``.
        target: The magnitude to reach, **per sample** and in the unit of the prediction; 0 or more. See `per_sample_target` for
            published ones.
        lr: Learning rate.
        max_steps: Updates at most.
        optimizer: Its name.
        weight_decay: The optimizer's weight decay; its own default where None.
        fixed_tokens: How many positions at the front stay as they are. 1 for encoders with a start token, whose embedding is the
            same for all prompts; 0 for those without one, such as T5.
        groups: ``(b,)``: samples with the same number share one embedding, moved by the root of their mean squared magnitude, and
            stop together when that reaches the target: the paper's form, for several images of a prompt (`Trace.groups`). Every
            sample by itself where None.
        checkpoint: Recompute the activations of a model's blocks instead of keeping them: about a third of the memory, more time
            (1.8 times as much was seen on a CPU). Needs an objective that replays a captured call.

    Raises:
        MemhookError: The target is negative, a shape does not fit, the objective does not depend on the embedding, or a loss is
            not finite.

    >>> import memhook
    >>> from memhook.testing import tiny_unet, sample
    >>> unet = tiny_unet()
    >>> first = memhook.probe(unet, lambda: sample(unet), adapter=memhook.ModuleAdapter(unet, layout="uncond_first")).evaluations[0]
    >>> found = memhook.optimize_embedding(first.objective, first.embedding, target=0.0, max_steps=3)
    >>> found.embedding.shape, found.losses.shape, bool((found.after < found.before).all())
    (torch.Size([2, 5, 6]), (4, 2), True)
    """
    check_embedding(embedding)
    _check_settings(target, lr, max_steps, optimizer, fixed_tokens, embedding)
    settings = {"lr": lr} if weight_decay is None else {"lr": lr, "weight_decay": weight_decay}
    # Samplers run under no_grad or inference_mode; what autograd sees has to be made outside of both.
    with torch.inference_mode(mode=False), torch.enable_grad(), checkpointing() if checkpoint else nullcontext():
        return _descend(objective, embedding, _members(groups, embedding), target, max_steps, fixed_tokens, optimizer, settings)


def per_sample_target(batch_target: float, n: int) -> float:
    """Convert a published target for a batch of ``n`` images into one for `optimize_embedding`: ``batch_target / sqrt(n)``.

    The paper's code takes one norm over all ``n`` images of a prompt, ``sqrt(sum_b m_b^2)``, which is ``sqrt(n)`` times their root
    mean square: its ``l_target = 3`` with 4 images is 1.5 a sample. Targets of later work with one image are per sample already.

    >>> per_sample_target(3.0, 4)
    1.5
    """
    if n < 1 or not (batch_target >= 0 and math.isfinite(batch_target)):
        raise MemhookError(f"the batch target is {batch_target} for n = {n} images; expected a target of 0 or more and at least one image")
    return batch_target / math.sqrt(n)


def _descend(
    objective: Objective, embedding: Tensor, members: Tensor, target: float, max_steps: int, fixed: int, name: Optimizer, settings: dict[str, float]
) -> OptimizedEmbedding:
    count = int(members.max()) + 1
    first = torch.stack([torch.nonzero(members == group)[0, 0] for group in range(count)])  # a sample of each group
    master = embedding.detach().to(torch.promote_types(embedding.dtype, torch.float32)).clone()
    start = master[:, :fixed]
    # The start token is no part of what the optimizer sees: a zero gradient would not keep weight decay from moving it.
    leaf = master[first, fixed:].clone().requires_grad_()  # (groups, l - fixed, d)
    stepper = _make(name, leaf, settings)
    active = torch.ones(count, dtype=torch.bool, device=leaf.device)
    losses: list[Tensor] = []
    updates = torch.zeros(count, dtype=torch.int64)
    for step in range(max_steps + 1):
        last = step == max_steps
        moved = torch.cat([start, (leaf.detach() if last else leaf)[members]], dim=1).to(embedding.dtype)  # (b, l, d)
        values = check_values(objective(moved), len(embedding))
        losses.append(_finite(values, step))
        shared = _shared(values, members, count)
        active &= shared.detach() > target  # a converged group moves no more, whatever its loss does
        if last or not bool(active.any()):
            break
        if not values.requires_grad:
            raise independent()
        gradient = torch.autograd.grad(shared[active].sum(), leaf, allow_unused=True)[0]
        if gradient is None:
            raise independent()
        with torch.no_grad():
            leaf.grad, before = gradient, leaf.clone()
            stepper.step()
            leaf.copy_(torch.where(active[:, None, None], leaf, before))  # momentum and decay would go on moving it
        updates += active.cpu()
    which = members.cpu().numpy()
    # Rows that never moved come back bit-identical, not rounded through another dtype.
    result = torch.cat([embedding.detach()[:, :fixed], leaf.detach()[members].to(embedding.dtype)], dim=1)
    return OptimizedEmbedding(result, torch.stack(losses).numpy(), ~active.cpu().numpy()[which], updates.numpy()[which], float(target))


def _shared(values: Tensor, members: Tensor, count: int) -> Tensor:
    """``(groups,)``: the root mean square of each group's magnitudes; for a lone sample its magnitude."""
    if count == len(values):
        return values[members.argsort()]
    # Through the norm, whose gradient at zero is zero; a square root's is not.
    sizes = torch.bincount(members, minlength=count).to(values.dtype)
    return torch.stack([torch.linalg.vector_norm(values[members == group]) for group in range(count)]) / sizes.sqrt()


def _finite(values: Tensor, step: int) -> Tensor:
    known = values.detach().cpu()
    bad = torch.nonzero(~torch.isfinite(known)).flatten().tolist()
    if bad:
        when = "at the embedding given" if step == 0 else f"after {step} updates"
        raise MemhookError(
            f"the magnitude of the samples {bad} is not finite {when}; "
            + ("the model's dtype may be too narrow: use bfloat16 or float32" if step == 0 else "lower the learning rate, or use a wider dtype")
        )
    return known


def _make(name: Optimizer, leaf: Tensor, settings: dict[str, float]) -> torch.optim.Optimizer:
    classes: dict[str, Any] = {
        "adam": torch.optim.Adam,
        "adamw": torch.optim.AdamW,
        "nadam": torch.optim.NAdam,
        "radam": torch.optim.RAdam,
        "rmsprop": torch.optim.RMSprop,
        "sgd": torch.optim.SGD,
    }
    made: torch.optim.Optimizer = classes[name]([leaf], **settings)
    return made


def _check_settings(target: float, lr: float, max_steps: int, optimizer: str, fixed: int, embedding: Tensor) -> None:
    if not (target >= 0 and math.isfinite(target)):
        raise MemhookError(f"the target is {target}; a magnitude is never negative, so expected 0 or more")
    if not (lr > 0 and math.isfinite(lr)):
        raise MemhookError(f"lr is {lr}; expected a number above 0, such as 0.05")
    if max_steps < 0:
        raise MemhookError(f"max_steps is {max_steps}; expected 0 or more")
    if optimizer not in get_args(Optimizer):
        raise MemhookError(f"the optimizer is {optimizer!r}; expected one of {', '.join(get_args(Optimizer))}")
    if not 0 <= fixed < embedding.shape[1]:
        raise MemhookError(f"fixed_tokens is {fixed}; the embedding has {embedding.shape[1]} positions, so expected 0 to {embedding.shape[1] - 1}")


def _members(groups: ArrayLike | None, embedding: Tensor) -> Tensor:
    """``(b,)``: groups numbered from 0 without gaps, on the embedding's device."""
    samples = len(embedding)
    given: Sequence[int] | np.ndarray = np.arange(samples) if groups is None else np.asarray(groups)
    if np.shape(given) != (samples,):
        raise MemhookError(f"groups has shape {np.shape(given)} for {samples} samples; expected one number a sample, ({samples},)")
    members = torch.from_numpy(np.unique(given, return_inverse=True)[1]).to(embedding.device)
    for group in range(int(members.max()) + 1 if groups is not None else 0):
        rows = embedding[members == group]
        if not torch.equal(rows, rows[:1].expand_as(rows)):
            raise MemhookError("samples of one group have different embeddings; only samples of the same prompt can share one (Trace.groups)")
    return members
