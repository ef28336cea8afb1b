"""What a watched run leaves behind: one row of magnitudes per guided evaluation."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from memhook.capture.described import Described
from memhook.capture.prediction import SPACES, Evaluation, Roles, Space, magnitude
from memhook.capture.prompts import numbered, prompt_mean
from memhook.capture.rows import Row, grouped, number, own, read, settle, stored
from memhook.capture.runs import run_starts
from memhook.capture.score_values import Scores, has_score, no_value, score_rows
from memhook.capture.scoring import MAGNITUDE, Scored, Scoring, read_scores
from memhook.capture.texts import same_text
from memhook.errors import MemhookError, NoGuidanceError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from memhook.capture.texts import Text
    from memhook.hookspecs import Score

__all__ = ["Row", "Trace"]


class Trace:
    """The magnitudes of the text-conditional prediction over a watched run of ``b`` samples and ``s`` evaluations.

    A row is one guided *evaluation* of the denoiser, not a step: a Heun sampler makes two in a step. Reading a number
    waits for the device; recording does not.

    Attributes:
        host: The host that was watched, such as ``"diffusers"``.
        space: What the predictions are (``"eps"``, ``"v"``, ``"x0"`` or ``"flow"``), the unit of the magnitudes.
        setting: What a calibration must agree with, by field name; see `memhook.detection.calibration`.
        scoring: Computes the scores that the trace was made with (``score=``, as in `memhook.watch`).

    >>> import torch, memhook
    >>> trace = memhook.Trace()
    >>> trace.record(torch.ones(2, 4, 8, 8), torch.zeros(2, 4, 8, 8), timestep=999)
    >>> trace.magnitudes
    array([[16., 16.]], dtype=float32)
    """

    def __init__(
        self,
        *,
        host: str = "record",
        space: Space | None = None,
        keep_evaluations: bool = False,
        describe: Callable[[], Mapping[str, Any]] | None = None,
        score: Score | str | Scored | Iterable[Score | str | Scored] | None = None,
    ) -> None:
        self.host = host
        self.space: Space | None = space
        self._keep = keep_evaluations
        self._described = Described(describe)
        self.scoring = Scoring(read_scores(score))
        self._rows: list[Row] = []
        self._evaluations: list[Evaluation] = []
        self._declared: Roles | None = None
        self._why_missing: str | None = None
        self._step: tuple[int, int] | None = None  # of the latest row, while its step goes on

    # ---- recording ------------------------------------------------------------------------------------------------

    def record(
        self,
        pred_cond: Tensor,
        pred_uncond: Tensor | None,
        *,
        space: Space = "eps",
        timestep: Tensor | float | None = None,
        sigma: Tensor | float | None = None,
        groups: Sequence[int] | np.ndarray | Tensor | None = None,
    ) -> None:
        """Record one evaluation by hand, for frameworks that have no module to hook.

        Args:
            pred_cond: Conditional prediction ``(b, ...)``.
            pred_uncond: Unconditional prediction of the same shape, or None where there was none.
            space: What the predictions are.
            timestep: Timestep of the evaluation.
            sigma: Noise level of the evaluation.
            groups: ``(b,)``: which samples share a prompt, a number for each; ``[0] * 4`` for four images of one. Each sample
                is a prompt of its own where None. Said once it holds for the whole trace.

        Raises:
            MemhookError: Shapes differ, ``space`` is unknown or differs from the space recorded before, or ``groups`` are not one
                whole number a sample or differ from those recorded before.
        """
        evaluation = Evaluation(pred_cond, pred_uncond, space=space, timestep=timestep, sigma=sigma)
        self.add(evaluation, None if groups is None else self._grouped(evaluation, groups))

    def _grouped(self, evaluation: Evaluation, groups: Sequence[int] | np.ndarray | Tensor) -> Row:
        numbers = grouped(groups, samples=evaluation.pred_cond.shape[0])
        before = next((row.conditioning for row in self._rows if row.conditioning is not None), numbers)
        earlier, now = (numbered(keys[0].cpu().numpy()).tolist() for keys in (before, numbers))
        if earlier != now:
            raise MemhookError(
                f"groups is {numbers[0].tolist()}, and for the first evaluation of this trace it was {before[0].tolist()}; "
                "the samples of a run keep their order, so record another run in a trace of its own"
            )
        measured = None if evaluation.pred_uncond is None else magnitude(evaluation.pred_cond, evaluation.pred_uncond)
        return Row(measured, evaluation.timestep, evaluation.sigma, shape=tuple(evaluation.pred_cond.shape[1:]), conditioning=numbers)

    @torch.no_grad()
    def add(self, evaluation: Evaluation, row: Row | None = None) -> None:
        """Record an `Evaluation`; adapters that know more than it says pass a prepared ``row``."""
        if evaluation.space not in SPACES:
            raise MemhookError(f"space is {evaluation.space!r}; expected one of {', '.join(SPACES)}")
        if self.space is None:
            self.space = evaluation.space
        elif self.space != evaluation.space and (row is None or row.space is None):
            raise MemhookError(
                f"this trace holds magnitudes in the space {self.space!r}; an evaluation in {evaluation.space!r} cannot be added to it"
            )
        if row is None:
            measured = None if evaluation.pred_uncond is None else magnitude(evaluation.pred_cond, evaluation.pred_uncond)
            row = Row(measured, evaluation.timestep, evaluation.sigma, shape=tuple(evaluation.pred_cond.shape[1:]))
        if evaluation.roles == "declared":
            self._declared = "declared"
        row.samples = evaluation.pred_cond.shape[0]
        row.timestep, row.sigma = own(row.timestep), own(row.sigma)
        row.scores, row.place = self.scoring(evaluation, row.magnitude), self.scoring.place
        self._step = row.step = (self._step[0], self._step[1] + 1) if self._step is not None else None
        self._rows.append(row)
        if self._keep:
            self._evaluations.append(evaluation)

    def missing(self, reason: str) -> None:
        """Say why evaluations have no unconditional prediction; shown by `NoGuidanceError`."""
        self._why_missing = reason

    def number_step(self, step: int, *, evaluations: int | None = None) -> None:
        """Say to which step of the sampler evaluations belong; for the callback that a sampler calls once a step.

        Args:
            step: The number of the step, from 0.
            evaluations: The latest so many are all of the step's. Where None, the latest is its first one, and those that come
                before the next step is numbered are its others.
        """
        if evaluations is None and self._rows:
            self._step = self._rows[-1].step = (step, 0)
        elif evaluations:
            self._step = None
            for index, row in enumerate(self._rows[-evaluations:]):
                row.step = (step, index)

    # ---- reading --------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def evaluations(self) -> list[Evaluation]:
        """The evaluations with their predictions and replays.

        Raises:
            MemhookError: The run was watched without keeping its calls.
        """
        if not self._keep:
            raise MemhookError('this trace kept only numbers; watch with keep="calls", or use memhook.probe, to keep evaluations')
        return list(self._evaluations)

    @property
    def magnitudes(self) -> np.ndarray:
        """``(s, b)`` float32: a row per evaluation, NaN where an evaluation had no unconditional prediction.

        Raises:
            NoGuidanceError: Nothing was recorded, or no evaluation had an unconditional prediction.
            GuidanceLayoutError: The two predictions of an evaluation were made from different noisy samples.
            MemhookError: The evaluations differ in their number of samples (several runs in one trace; see `runs`).
        """
        if not self._rows:
            raise NoGuidanceError(
                self._why_missing
                or "nothing was recorded: the denoiser did not run inside the `with` block, or it ran in another thread "
                "than the one that entered the block. Run the sampler inside the block"
            )
        self._settle()
        read(self._rows)
        if all(row.magnitude is None for row in self._rows):
            remedy = "call the sampler with classifier-free guidance (a guidance scale above 1)"
            raise NoGuidanceError(self._why_missing or f"no evaluation had an unconditional prediction; {remedy}")
        sizes = sorted({row.samples for row in self._rows})
        if len(sizes) > 1:
            raise MemhookError(
                f"the evaluations in this trace have {sizes} samples, so they are several runs; read trace.runs, or watch each run by itself"
            )
        return np.stack([row.values if row.values is not None else np.full(sizes[0], np.nan, np.float32) for row in self._rows])

    @property
    def has_guidance(self) -> np.ndarray:
        """``(s,)`` bool: the evaluations that had an unconditional prediction."""
        self._settle()
        return np.array([row.magnitude is not None for row in self._rows], bool)

    @property
    def scores(self) -> Scores:
        """The scores that were computed while the run went on, by name: each ``(s, b)`` float32, NaN where an evaluation has none.

        The magnitude is always among them.
        """
        names = [scored.name for scored in self.scoring.scores]
        return Scores([*names, *([] if MAGNITUDE in names else [MAGNITUDE])], self._values)

    def has_score(self, name: str) -> np.ndarray:
        """``(s,)`` bool: the evaluations that have a value of the score of this name."""
        self._settle()
        if name not in self.scores:
            self.scores[name]  # raises
        return self.has_guidance if name == MAGNITUDE else has_score(self._rows, self.scored(name), self._starts())

    def scored(self, name: str | None = None) -> Scored:
        """The score of this name, as the trace computes it; the first of them where None."""
        found = self.scoring.scores[0] if name is None else next((scored for scored in self.scoring.scores if scored.name == name), None)
        return found if found is not None else read_scores(MAGNITUDE if name == MAGNITUDE else [])[0]

    def _values(self, name: str) -> np.ndarray:
        if name == MAGNITUDE or not self._rows:
            return self.magnitudes  # which says why there are none
        self._settle()
        read(self._rows)
        return score_rows(self._rows, self.scored(name), self.has_score(name))

    def score(self, first: int | None = None, *, name: str | None = None) -> np.ndarray:
        """The detection score: the mean over evaluations, of the magnitude (Wen et al. 2024, section 3.3) or another score.

        Larger is more memorized.

        Args:
            first: Use only the first so many evaluations; None for all. Evaluations without a value (for the magnitude: without
                an unconditional prediction) are left out of the mean.
            name: Of which score; the first that the run was watched with where None.

        Returns:
            ``(b,)`` float32, one score a sample; NaN or infinite where a prediction was.

        Raises:
            NoGuidanceError: None of these evaluations has an unconditional prediction.
            MemhookError: ``first`` is not positive or more than there are, or the trace holds several runs.
        """
        name = self.scored(name).name
        return prompt_mean(self.used(first, name=name), self.has_score(name)[: len(self._rows) if first is None else first])

    def used(self, first: int | None, *, name: str = MAGNITUDE) -> np.ndarray:
        """The rows of a score that its mean over the ``first`` evaluations uses, after checking that it can."""
        magnitudes = self.scores[name]
        count = len(magnitudes)
        if first is not None and not 1 <= first <= count:
            raise MemhookError(f"first is {first}; this trace has {count} evaluations, so expected 1 to {count}, or None for all")
        if len(self._starts()) > 1:
            raise MemhookError(f"this trace holds {len(self._starts())} runs of the sampler; score each of trace.runs, or watch each run by itself")
        chosen: np.ndarray = magnitudes[:first]
        if name != MAGNITUDE and not self.has_score(name)[: len(chosen)].any():
            raise NoGuidanceError(no_value(self.scored(name), len(chosen)))
        if name == MAGNITUDE and not self.has_guidance[: len(chosen)].any():
            raise NoGuidanceError(
                f"none of the first {len(chosen)} evaluations has an unconditional prediction; use more of them (first=None uses all)"
            )
        return chosen

    @property
    def timesteps(self) -> np.ndarray:
        """``(s,)`` float64: the timestep of every evaluation (of its first sample), NaN where the host has none."""
        return np.array([number(row.timestep) for row in self._rows])

    @property
    def sigmas(self) -> np.ndarray:
        """``(s,)`` float64: the noise level of every evaluation, NaN where the host counts in timesteps."""
        return np.array([number(row.sigma) for row in self._rows])

    @property
    def steps(self) -> np.ndarray:
        """``(s, 2)`` int64: the sampler's step of every evaluation and its place in that step, both from 0; -1 where not known.

        Samplers of higher order make several evaluations a step. See `number_step`.
        """
        found = np.full((len(self._rows), 2), -1)
        for start, stop in pairwise([*self._starts(), len(self._rows)]):
            known = False  # what a run before this one left open is none of its steps
            for index in range(start, stop):
                step = self._rows[index].step
                known = step is not None and (known or step[1] == 0)
                if known and step is not None:
                    found[index] = step
        return found

    @property
    def shape(self) -> tuple[int, ...] | None:
        """The shape of one sample's prediction, such as ``(4, 64, 64)``; None before any evaluation was recorded."""
        return self._rows[0].shape if self._rows else None

    @property
    def roles(self) -> Roles | None:
        """How it was found which prediction is the conditional one, the weakest where evaluations differ; None before any was recorded."""
        self._settle()
        found = {row.roles for row in self._rows if row.magnitude is not None and row.roles is not None}
        return next((roles for roles in ("assumed", "fitted", "matched") if roles in found), self._declared)

    @property
    def guidance_scale(self) -> np.ndarray | None:
        """``(b,)``: the guidance scale as it acted at the first evaluation where it shows, in the convention ``u + w (c - u)``; None if unknown."""
        self._settle()
        return next((row.scale for row in self._rows if row.scale is not None), None)

    @property
    def groups(self) -> np.ndarray:
        """``(b,)`` int64: samples with the same number share one conditioning (several images of one prompt).

        Numbers follow the order of first appearance. Where no text embedding was seen, every sample is its own group.
        """
        self._settle()
        for row in self._rows:
            if row.conditioning is not None:
                return numbered(row.conditioning[0].cpu().numpy())
        return np.arange(self._rows[0].samples if self._rows else 0)

    @property
    def unconditional_texts(self) -> list[dict[str, Any]]:
        """The different unconditional texts of the run (the negative prompt's encoding, or the empty one's), as a few numbers of each.

        Empty where none was seen. For comparison with another run's, by `memhook.capture.texts.same_texts`.
        """
        self._settle()
        seen: list[Text] = []
        for row in self._rows:
            if row.unconditional is not None and all(row.unconditional is not text for text in seen):
                seen.append(row.unconditional)
        found: list[dict[str, Any]] = []
        for value in (value for text in seen for value in text.distinct()):
            if not any(same_text(value, known) for known in found):
                found.append(value)
        return found

    @property
    def runs(self) -> list[Trace]:
        """One trace per run of the sampler: a run ends where the next evaluation starts again from a high noise level."""
        bounds = [*self._starts(), len(self._rows)]
        found = []
        for start, stop in pairwise(bounds):
            space = self._rows[start].space or self.space
            part = Trace(host=self.host, space=space, keep_evaluations=self._keep, score=self.scoring.scores)
            part._described = self._described
            part._rows = self._rows[start:stop]
            part._evaluations = self._evaluations[start:stop]
            part._declared, part._why_missing = self._declared, self._why_missing
            found.append(part)
        return found

    def samples(self, rows: slice) -> Trace:
        """The trace of some of the samples, such as those of one prompt: ``trace.samples(slice(0, 4))``. Numbers only, no evaluations."""
        self._settle()
        read(self._rows)
        part = Trace(host=self.host, space=self.space, score=self.scoring.scores)
        part._described = self._described
        part._declared, part._why_missing = self._declared, self._why_missing
        for row in self._rows:
            taken = replace(
                row,
                magnitude=None if row.magnitude is None else row.magnitude[rows],
                same_inputs=None if row.same_inputs is None else row.same_inputs[rows],
                conditioning=None if row.conditioning is None else row.conditioning[:, rows],
                unconditional=None if row.unconditional is None else row.unconditional.rows(rows),
                scale=None if row.scale is None else row.scale[rows],
                values=None if row.values is None else row.values[rows],
                scores={name: values[rows] for name, values in row.scores.items()},
                settle=None,
                refuted=None,
                samples=len(range(row.samples)[rows]),
            )
            part._rows.append(taken)
        return part

    @property
    def setting(self) -> dict[str, Any]:
        """What a calibration must agree with: host, model fingerprints, space, shape and the like, as far as known.

        It is that of the run: kept when the block ends, so the model may change or be deleted afterwards.

        Raises:
            MemhookError: The model was deleted before the block ended.
        """
        about = next((row.about for row in self._rows if row.about is not None), dict)
        return {"host": self.host, "space": self.space, **self._described.read(), **about()}

    def keep_setting(self, snapshot: Callable[[], Callable[[], Mapping[str, Any]]] | None = None) -> None:
        """Ask the adapter for the setting for the last time; `watch` does so when its block ends."""
        self._described.take(snapshot)

    def __getstate__(self) -> dict[str, Any]:
        """Numbers and the setting, wherever they are; what needs the model (`evaluations`) is left out."""
        self._settle()
        read(self._rows)
        return {**self.__dict__, "_rows": [stored(row) for row in self._rows], "_evaluations": [], "_keep": False}

    def to_dict(self) -> dict[str, Any]:
        """Everything that was recorded, as plain lists and numbers for JSON (missing values are None)."""

        def plain(values: np.ndarray) -> list[Any]:
            return [plain(row) if isinstance(row, np.ndarray) else (float(row) if math.isfinite(row) else None) for row in values]

        scale = self.guidance_scale
        return {
            "host": self.host,
            "space": self.space,
            "roles": self.roles,
            "magnitudes": plain(self.magnitudes),
            "timesteps": plain(self.timesteps),
            "sigmas": plain(self.sigmas),
            "groups": self.groups.tolist(),
            "guidance_scale": None if scale is None else plain(scale),
            "scores": {name: plain(self.scores[name]) for name in self.scores if name != MAGNITUDE},
        }

    def __repr__(self) -> str:
        samples = f"{self._rows[0].samples} samples" if self._rows else "empty"
        return f"<Trace of {self.host}: {len(self._rows)} evaluations, {samples}, space {self.space}>"

    # ---- private --------------------------------------------------------------------------------------------------

    def _settle(self) -> None:
        settle(self._rows)

    def _starts(self) -> list[int]:
        self._settle()
        return run_starts([row.samples for row in self._rows], self.timesteps, self.sigmas, continues=[row.continues for row in self._rows])
