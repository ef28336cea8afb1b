"""The training filter: what a training loop attaches to its denoiser."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from memhook.errors import MemhookError
from memhook.training.calibration import BinnedThreshold, FilterCalibration
from memhook.training.calls import LoopCalls
from memhook.training.counts import TOTALS, Counter, FilterReport, Presented, check_keys
from memhook.training.masking import Normalize, sample_losses, weighted_mean
from memhook.training.memory import Memory, News, all_ranks
from memhook.training.options import Options
from memhook.training.verdicts import Judge, Verdict

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self

    from memhook.adapting.replay import Path
    from memhook.training.calls import LoopCall
    from memhook.training.thresholds import Threshold
    from memhook.training.timesteps import Timesteps
    from memhook.training.unconditional import NullTensor

_STATE = "memhook-training-filter-1"

Log = Callable[[dict[str, float], int], object]


def training_filter(
    denoiser: nn.Module,
    *,
    null_embedding: NullTensor,
    threshold: Threshold | None,
    timesteps: Timesteps | None = None,
    remember: int = 0,
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
        timesteps: Judge only presentations at these timesteps: ``(lowest, highest)``, both included, in the unit of the denoiser's timestep
            argument (``(800, 999)``; ``(0.8, 1.0)`` for many flow models), or a function ``f(timesteps (b,)) -> (b,)`` bool. The pass is
            then made for these rows of the batch alone, where the denoiser allows it, and not at all where there are none. None: all, or
            those of the threshold, where it was calibrated on a part.
        remember: Leave a sample out at *every* timestep while it is flagged more often than chance explains, by its latest so many verdicts:
            1 goes by the latest alone, so the sample is out until it is judged below the threshold; 0 remembers nothing. What chance
            explains is known for a calibrated threshold (`memory.least_flagged`); for others more than half must be flagged. Needs ``keys``.
        embedding: Where the embedding stands among the denoiser's arguments: a keyword, a position, or a tuple of keys into nested
            arguments; found by its usual names where None.
        null_arguments: For other arguments that carry the prompt, what stands there without one, by keyword or tuple of keys, such as
            ``{("added_cond_kwargs", "text_embeds"): pooled}``; None leaves an argument as it is.
        normalize: Divide by the number of kept samples (``"kept"``, as the paper does) or by the batch size (``"batch"``).
        flagged_weight: The weight of flagged and remembered samples, 0 to 1: 0 drops them. Above 0 only with ``normalize="batch"``.
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
        denoiser, null_embedding=null_embedding, schedule=threshold, timesteps=timesteps, embedding=embedding,
        null_arguments=null_arguments or {}, options=Options(normalize, flagged_weight, fraction, remember, on_nonfinite, log_every), log=log,
    )  # fmt: skip


class TrainingFilter:
    """What `training_filter` gives: enter it around the loop, or around each step; counts go on from one entry to the next."""

    def __init__(
        self, denoiser: nn.Module, *, null_embedding: NullTensor, schedule: Threshold | None, timesteps: Timesteps | None,
        embedding: str | int | Path | None, null_arguments: Mapping[str | Path, NullTensor | None], options: Options, log: Log | None,
    ) -> None:  # fmt: skip
        self._module = _inner(denoiser)
        self._observing = schedule is None
        path: Path | None = embedding if isinstance(embedding, tuple) or embedding is None else (embedding,)
        others: dict[Path, NullTensor | None] = {key if isinstance(key, tuple) else (key,): value for key, value in null_arguments.items()}
        self._judge = Judge(null_embedding, threshold=schedule, timesteps=timesteps, path=path, null_arguments=others)
        self._options, self._log = options, log
        if self._observing and options.remember:
            raise MemhookError(
                f"remember is {options.remember} with threshold=None, which flags nothing that could be remembered; expected a threshold. "
                "Give one, or leave remember= out"
            )
        self._rate = schedule.fpr if isinstance(schedule, BinnedThreshold) else None
        self._memory = self._new_memory()
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
            keys: What to count (and remember) the samples by, one a sample, such as their numbers in the data set. Where copies of a
                sample shall count as one, a key that they share, such as a hash of the picture or the caption.

        Returns:
            A scalar with a graph; zero, with gradients of zero, where no sample is kept.

        Raises:
            MemhookError: The denoiser was not called since the last mean, or more than once; the loss is not that of its batch; the null
                embedding or the threshold does not fit; or a magnitude is not finite.
        """
        keep = self._decide(loss, keys)
        return weighted_mean(loss, keep.to(loss.device), normalize=self._options.normalize, flagged_weight=self._options.flagged_weight)

    def keep(self, *, keys: Sequence[Hashable] | None = None) -> Tensor:
        """``(b,)`` bool on the device of the prediction, for loops that average in a way of their own; in the place of `mean`."""
        return self._decide(None, keys)

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
        return FilterCalibration.fit(
            timesteps.numpy(), norms.numpy(), bins=bins, shape=self._shape, span=self._judge.timesteps.span
        )  # fmt: skip

    def remembered(self) -> list[Hashable]:
        """The keys of the samples that are left out at every timestep now."""
        return [] if self._memory is None else self._memory.keys()

    def exchange(self, gather: Callable[[News], Sequence[News]] = all_ranks) -> None:
        """Let all ranks of a distributed run remember the same; every rank has to call it, at the same point, such as the end of an epoch.

        Without it each rank remembers what it has judged itself, and a sampler that deals a sample to another rank in the next epoch
        deals it to one that does not know.

        Args:
            gather: ``gather(object) -> objects``, one of each rank, in order; by default over the process group of ``torch.distributed``.

        Raises:
            MemhookError: The filter does not remember, or what was gathered does not hold this rank's object.
        """
        if self._memory is None:
            raise MemhookError("exchange was called on a filter that remembers nothing; expected remember= of at least 1. Give it to training_filter")
        self._memory.exchange(gather)

    def state_dict(self) -> dict[str, Any]:
        """Counts and memory as plain lists and numbers, for ``torch.save`` and ``accelerator.register_for_checkpointing``.

        Magnitudes of an observed run (`calibration`) are not in it.
        """
        return {"format": _STATE, **self._counter.state(), "memory": None if self._memory is None else self._memory.state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on counting and remembering from what `state_dict` gave.

        Raises:
            MemhookError: It is not such a state.
        """
        try:
            if state["format"] != _STATE:
                raise KeyError("format")  # noqa: TRY301 -- one message for all that may be wrong
            counter = Counter()
            counter.restore({name: state["totals"][name] for name in TOTALS}, state["keys"])
            counter.report()
            memory = self._new_memory()
            if memory is not None and state["memory"] is not None:
                memory.restore(state["memory"])
        except (KeyError, TypeError, ValueError) as error:
            found = sorted(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
            raise MemhookError(
                f"this is not the state of a training filter: {found}; expected what state_dict gave, of the format {_STATE}. "
                "Load the filter's own state, or start without"
            ) from error
        self._counter, self._memory = counter, memory
        self._logged, self._window = counter.totals, []

    def _new_memory(self) -> Memory | None:
        return Memory(self._options.remember, rate=self._rate) if self._options.remember else None

    @torch.no_grad()
    def _decide(self, loss: Tensor | None, keys: Sequence[Hashable] | None) -> Tensor:
        if self._entered is None:
            raise MemhookError("mean was called outside the block of the filter; expected it inside. Call it where the denoiser is called")
        call = self._calls.take(loss)
        batch, device = call.values.shape[0], call.values.device
        if loss is not None:
            sample_losses(loss, batch=batch)
        names = check_keys(keys, batch=batch)
        if names is None and self._memory is not None:
            raise MemhookError(
                f"remember is {self._options.remember}, and mean was called without keys; expected one key a sample, by which it is known when it "
                "comes again. Pass keys= (numbers in the data set, file names), or leave remember= out"
            )
        verdict = self._judge(self._module, call, allow_nonfinite=self._options.on_nonfinite == "keep") if self._due() else None
        remembered = self._recall(call, verdict, names)
        keep = self._count(verdict, remembered, names)
        self._tell()
        return keep.to(device, non_blocking=True)

    def _due(self) -> bool:
        """Whether this loss gets a pass; the same on every rank, so that collectives inside the denoiser meet."""
        step, share = self._counter.totals.steps, self._options.fraction
        return math.ceil((step + 1) * share - 1e-9) > math.ceil(step * share - 1e-9)

    def _recall(self, call: LoopCall, verdict: Verdict | None, names: list[Hashable] | None) -> Tensor:
        """``(b,)`` bool: left out because of earlier verdicts; those of this batch come first."""
        batch = call.values.shape[0]
        if self._memory is None or names is None:
            return torch.zeros(batch, dtype=torch.bool)
        if verdict is not None:
            for name, judged, flagged in zip(names, verdict.judged.tolist(), verdict.flagged.tolist(), strict=True):
                if judged:
                    self._memory.learn(name, flagged=flagged)
        held = torch.tensor([self._memory.holds(name) for name in names])
        if verdict is not None:
            held &= ~verdict.flagged
        return held & self._judge.conditional(call) if bool(held.any()) else held  # what is unconditional is never left out

    def _count(self, verdict: Verdict | None, remembered: Tensor, names: list[Hashable] | None) -> Tensor:
        """Count the step, and give ``(b,)`` bool, on the CPU: the samples that are kept."""
        nothing = torch.zeros_like(remembered)
        judged, flagged = (verdict.judged, verdict.flagged) if verdict is not None else (nothing, nothing)
        norms, limits = (verdict.norms, verdict.limits) if verdict is not None else (nothing.float(), nothing.float())
        if verdict is not None:
            self._shape = verdict.shape
            if self._log is not None:
                self._window += norms[judged].tolist()
            if self._observing and bool(judged.any()):
                self._observed.append((verdict.timesteps[judged].float(), norms[judged].float()))
        columns = (judged, flagged, remembered, norms, limits)
        step = [Presented(*values) for values in zip(*(column.tolist() for column in columns), strict=True)]
        self._counter.add(step, names, passed=verdict.passed if verdict is not None else 0)
        return ~(flagged | remembered)

    def _tell(self) -> None:
        now, before = self._counter.totals, self._logged
        if self._log is None or now.steps % self._options.log_every:
            return
        judged = now.judged - before.judged
        values = {
            "memhook/dropped": (now.dropped - before.dropped) / judged if judged else 0.0,
            "memhook/wholly_dropped_batches": float(now.wholly_dropped - before.wholly_dropped),
            **({"memhook/remembered": (now.remembered - before.remembered) / (now.samples - before.samples)} if self._memory is not None else {}),
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
