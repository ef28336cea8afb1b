"""The training filter: what a training loop attaches to its denoiser."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor, nn

from memhook.errors import MemhookError
from memhook.prediction import magnitude
from memhook.training.calibration import BinnedThreshold, FilterCalibration
from memhook.training.calls import LoopCall, LoopCalls
from memhook.training.counts import Counter, FilterReport, check_keys
from memhook.training.masking import Normalize, check_finite, sample_losses, weighted_mean
from memhook.training.thresholds import Threshold, as_schedule, thresholds_at
from memhook.training.unconditional import NullTensor, UnconditionalPass, prediction_part, timesteps_of

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self

    from memhook.replay import Path

Log = Callable[[dict[str, float], int], object]


def training_filter(
    denoiser: nn.Module,
    *,
    null_embedding: NullTensor,
    threshold: Threshold | None,
    embedding: str | int | Path | None = None,
    null_arguments: Mapping[str | Path, NullTensor | None] | None = None,
    normalize: Normalize = "kept",
    flagged_weight: float = 0.0,
    fraction: float = 1.0,
    on_nonfinite: Literal["raise", "keep"] = "raise",
    log: Log | None = None,
    log_every: int = 50,
) -> TrainingFilter:
    """Leave samples out of the training loss whose text-conditional prediction is unusually large (Wen et al. 2024, section 4.3).

    Inside the block the filter notes the forward pass that the loop makes anyway. `TrainingFilter.mean` then makes one more pass, under
    ``no_grad``, on the same noisy samples and timesteps with the null embedding, and averages the loss over the samples whose magnitude
    does not surpass the threshold. Calls under ``no_grad`` (validation) cost nothing, unless a loss is averaged for them.

    The pass draws the random numbers of the loop's pass again, so that dropout falls alike and the two predictions differ by the prompt alone;
    then the generators go on as if there had been no pass. It runs in the mode that the denoiser is in, and buffers that a pass changes are put back.

    Args:
        denoiser: The module that the loop calls, or the module inside of a DDP or compiled wrapper.
        null_embedding: What the loop passes for no prompt: ``(l, d)`` or ``(1, l, d)``, or a function that gives it, called once a pass
            (for a text encoder that is trained too).
        threshold: The paper's tau, in the unit of the prediction: a number; a table ``(T,)`` over integer timesteps; a function of the
            timesteps ``(b,)``, on the CPU, such as `FilterCalibration.threshold` gives; None observes and drops nothing.
        embedding: Where the embedding stands among the denoiser's arguments: a keyword, a position, or a tuple of keys into nested
            arguments; found by its usual names where None.
        null_arguments: For other arguments that carry the prompt, what stands there without one, by keyword or tuple of keys, such as
            ``{("added_cond_kwargs", "text_embeds"): pooled}``; None leaves an argument as it is.
        normalize: Divide by the number of kept samples (``"kept"``, as the paper does) or by the batch size (``"batch"``).
        flagged_weight: The weight of flagged samples, 0 to 1: 0 drops them. Above 0 only with ``normalize="batch"``.
        fraction: The share of losses for which the pass is made, in (0, 1]; in the others every sample is kept. A memorized sample is then
            dropped this often at most, so the filter works that much more weakly.
        on_nonfinite: At a NaN or infinite magnitude raise, or keep the sample, whose loss will show it to a gradient scaler.
        log: Called as ``log({"memhook/dropped": ..., ...}, step)``; ``accelerator.log`` fits.
        log_every: Losses between two calls of ``log``.

    Raises:
        MemhookError: An option is out of its range, or the threshold is none of these.

    >>> import torch, memhook
    >>> from memhook.testing import tiny_unet
    >>> unet = tiny_unet().train()
    >>> noisy, t, text = torch.randn(2, 4, 8, 8), torch.tensor([10, 900]), torch.randn(2, 5, 6)
    >>> with memhook.training_filter(unet, null_embedding=torch.zeros(5, 6), threshold=0.0) as f:
    ...     loss = f.mean((unet(noisy, t, text) - noisy).square())
    >>> loss.backward()  # both samples were dropped: a zero with a graph
    >>> float(loss.detach()), f.report().dropped
    (0.0, 2)
    """
    return TrainingFilter(
        denoiser, null_embedding=null_embedding, schedule=threshold, embedding=embedding, null_arguments=null_arguments or {},
        options=_Options(normalize, flagged_weight, fraction, on_nonfinite, log_every), log=log,
    )  # fmt: skip


@dataclass(frozen=True)
class _Options:
    normalize: Normalize
    flagged_weight: float
    fraction: float
    on_nonfinite: Literal["raise", "keep"]
    log_every: int

    def __post_init__(self) -> None:
        if self.normalize not in ("kept", "batch"):
            raise MemhookError(f"normalize is {self.normalize!r}; expected 'kept' or 'batch'")
        if not 0 <= self.flagged_weight <= 1:
            raise MemhookError(f"flagged_weight is {self.flagged_weight}; expected a weight from 0 (drop) to 1 (no effect)")
        if self.flagged_weight > 0 and self.normalize == "kept":
            raise MemhookError(
                f'flagged_weight is {self.flagged_weight} with normalize="kept", which divides by the kept samples alone; down-weighted samples '
                'stand in the sum but not in the count. Use normalize="batch"'
            )
        if not 0 < self.fraction <= 1:
            raise MemhookError(f"fraction is {self.fraction}; expected a share of the losses above 0, up to 1 (every loss)")
        if self.on_nonfinite not in ("raise", "keep"):
            raise MemhookError(f"on_nonfinite is {self.on_nonfinite!r}; expected 'raise' or 'keep'")
        if self.log_every < 1:
            raise MemhookError(f"log_every is {self.log_every}; expected at least 1")


@dataclass(frozen=True, eq=False)
class _Verdict:
    """What a pass found, on the CPU: ``(b,)`` each."""

    keep: Tensor
    conditional: Tensor
    norms: Tensor
    limits: Tensor
    timesteps: Tensor


class TrainingFilter:
    """What `training_filter` gives: enter it around the loop, or around each step; counts go on from one entry to the next."""

    def __init__(
        self, denoiser: nn.Module, *, null_embedding: NullTensor, schedule: Threshold | None, embedding: str | int | Path | None,
        null_arguments: Mapping[str | Path, NullTensor | None], options: _Options, log: Log | None,
    ) -> None:  # fmt: skip
        self._module = _inner(denoiser)
        self._schedule, self._observing = as_schedule(schedule), schedule is None
        self._shaped = schedule if isinstance(schedule, BinnedThreshold) else None
        path: Path | None = embedding if isinstance(embedding, tuple) or embedding is None else (embedding,)
        others: dict[Path, NullTensor | None] = {key if isinstance(key, tuple) else (key,): value for key, value in null_arguments.items()}
        self._pass = UnconditionalPass(null_embedding, path=path, null_arguments=others)
        self._options, self._log = options, log
        self._calls = LoopCalls(self._module)
        self._counter = Counter()
        self._logged = self._counter.totals
        self._window: list[float] = []  # magnitudes since the last log
        self._observed: list[tuple[Tensor, Tensor]] = []
        self._shape: tuple[int, ...] | None = None
        self._entered: contextlib.ExitStack | None = None

    def __enter__(self) -> Self:
        if self._entered is not None:
            raise MemhookError("this filter is entered already; expected one block at a time. Leave the inner `with` out")
        stack = contextlib.ExitStack()
        stack.enter_context(self._calls.noted())
        self._entered = stack
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        stack, self._entered = self._entered, None
        if stack is not None:
            stack.close()
        pending = self._calls.forget()
        if kind is None and pending and not self._counter.totals.steps:
            raise MemhookError(
                f"calls of the denoiser with gradient inside the block: {pending}, and mean was never called; so nothing was filtered. Put "
                "`loss = f.mean(losses)`, with one loss a sample, in the place of `loss = losses.mean()`"
            )

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Calls inside the block belong to no loss: a second forward pass with gradient, a probe."""
        before, self._calls.paused = self._calls.paused, True
        try:
            yield
        finally:
            self._calls.paused = before

    def mean(self, loss: Tensor, *, keys: Sequence[Hashable] | None = None) -> Tensor:
        """The mean of the loss over the samples that the filter keeps; call it once for every forward pass.

        Args:
            loss: One loss a sample, ``(b,)``, or an element, ``(b, ...)``, of the latest call of the denoiser, in its order; weights of
                samples, such as min-SNR's, belong in it.
            keys: What to count the samples by, one a sample, such as their numbers in the data set.

        Returns:
            A scalar with a graph; zero, with gradients of zero, where no sample is kept.

        Raises:
            MemhookError: The denoiser was not called since the last mean, or more than once; the loss is not that of its batch; the null
                embedding or the threshold does not fit; or a magnitude is not finite.
        """
        keep = self._judge(loss, keys)
        return weighted_mean(loss, keep.to(loss.device), normalize=self._options.normalize, flagged_weight=self._options.flagged_weight)

    def keep(self, *, keys: Sequence[Hashable] | None = None) -> Tensor:
        """``(b,)`` bool on the device of the prediction, for loops that average in a way of their own; in the place of `mean`."""
        return self._judge(None, keys)

    def report(self) -> FilterReport:
        """What was dropped so far; every rank of a distributed run has its own (`FilterReport.merged` adds them up)."""
        return self._counter.report()

    def calibration(self, *, bins: int = 10) -> FilterCalibration:
        """The magnitudes of an observed run (``threshold=None``) on clean pairs, in bins of timesteps.

        Raises:
            MemhookError: The filter did not observe, or saw no conditional sample.
        """
        if not self._observing or not self._observed:
            reason = "had a threshold" if not self._observing else "has seen no conditional sample"
            raise MemhookError(f"this filter {reason}; expected a run with threshold=None over clean pairs. Observe one, then take its calibration")
        timesteps, norms = (torch.cat(parts) for parts in zip(*self._observed, strict=True))
        return FilterCalibration.fit(timesteps.numpy(), norms.numpy(), bins=bins, shape=self._shape)

    @torch.no_grad()
    def _judge(self, loss: Tensor | None, keys: Sequence[Hashable] | None) -> Tensor:
        if self._entered is None:
            raise MemhookError("mean was called outside the block of the filter; expected it inside. Call it where the denoiser is called")
        call = self._calls.take(loss)
        batch, device = call.values.shape[0], call.values.device
        if loss is not None:
            sample_losses(loss, batch=batch)
        names = check_keys(keys, batch=batch)
        if not self._due():
            self._counter.skip(batch)
            self._tell()
            return torch.ones(batch, dtype=torch.bool, device=device)
        verdict = self._verdict(call)
        self._count(verdict, names)
        self._tell()
        return verdict.keep.to(device, non_blocking=True)

    def _due(self) -> bool:
        """Whether this loss gets a pass; the same on every rank, so that collectives inside the denoiser meet."""
        step, share = self._counter.totals.steps, self._options.fraction
        return math.ceil((step + 1) * share - 1e-9) > math.ceil(step * share - 1e-9)

    def _verdict(self, call: LoopCall) -> _Verdict:
        pred_cond = prediction_part(call.values.detach(), call)
        if self._shaped is not None:
            self._shaped.check(pred_cond.shape[1:])
        timesteps = timesteps_of(call)
        limits = thresholds_at(self._schedule, timesteps)
        conditional = self._pass.conditional_rows(call)
        pred_uncond = prediction_part(self._pass(self._module, call), call)
        norms = magnitude(pred_cond, pred_uncond)
        norms, conditional = norms.cpu(), conditional.cpu()  # the one wait for the device
        if self._options.on_nonfinite == "raise":
            check_finite(norms)
        # "not surpasses" and not "at most": a magnitude that is not finite is kept, and so is what is unconditional already.
        keep = ~(norms > limits.to(norms.dtype)) | ~torch.isfinite(norms) | ~conditional
        self._shape = tuple(pred_cond.shape[1:])
        return _Verdict(keep, conditional, norms, limits, timesteps)

    def _count(self, verdict: _Verdict, names: list[Hashable] | None) -> None:
        judged = verdict.conditional & torch.isfinite(verdict.norms)
        if self._log is not None:
            self._window += verdict.norms[judged].tolist()
        if self._observing:
            self._observed.append((verdict.timesteps[judged].float(), verdict.norms[judged].float()))
        self._counter.add(verdict.keep.tolist(), judged.tolist(), verdict.norms.tolist(), verdict.limits.tolist(), names)

    def _tell(self) -> None:
        now, before = self._counter.totals, self._logged
        if self._log is None or now.steps % self._options.log_every:
            return
        judged = now.judged - before.judged
        values = {
            "memhook/dropped": (now.dropped - before.dropped) / judged if judged else 0.0,
            "memhook/wholly_dropped_batches": float(now.wholly_dropped - before.wholly_dropped),
            **({"memhook/magnitude": float(np.mean(self._window))} if self._window else {}),
        }
        self._logged, self._window = now, []
        self._log(values, now.steps)


def _inner(denoiser: nn.Module) -> nn.Module:
    """The module to hook: what DDP wraps, since a pass through DDP itself would take part in its bookkeeping."""
    if not isinstance(denoiser, nn.Module):
        raise MemhookError(f"the denoiser is a {type(denoiser).__name__}; expected the torch.nn.Module that the loop calls, such as pipeline.unet")
    if isinstance(denoiser, nn.DataParallel):
        raise MemhookError("a DataParallel module runs its replicas in other threads; train one process a device (DistributedDataParallel)")
    return denoiser.module if isinstance(denoiser, nn.parallel.DistributedDataParallel) else denoiser
