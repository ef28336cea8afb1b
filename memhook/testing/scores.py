"""The conformance suite for scores: as a pytest class to subclass, and as a function."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from memhook.capture.prediction import Evaluation, magnitude
from memhook.capture.scoring import Scored, as_scored, checked_values

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from memhook.hookspecs import Score

_SAMPLES = 3
_WAITING = ("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal")  # operators whose result the host has to wait for


def check_score(score: Score | Callable[..., Any], *, shape: Sequence[int] = (4, 8, 8), timestep: float | None = 999.0) -> list[str]:
    """Try a score on random predictions; raises at the first check that fails.

    Scores that evaluate elsewhere or look at attention need a host, and are tried by watching one.

    Args:
        score: The score.
        shape: Of one sample's prediction, where the score fits only one.
        timestep: Of the evaluation.

    Returns:
        The names of the checks that passed.

    Raises:
        AssertionError: A check failed; says what was seen, what was expected, and the usual cause.
        MemhookError: It is no score.

    >>> from memhook.scores.dsm import Dsm
    >>> check_score(Dsm())
    ['one_number_a_sample', 'samples_are_independent', 'dtype_safe', 'waits_for_nothing', 'evaluation_unchanged', 'symmetric_if_it_says_so']
    """
    scored, case = as_scored(score), (tuple(shape), timestep)
    for check in CHECKS:
        check(scored, *case)
    return [check.__name__ for check in CHECKS]


def one_number_a_sample(scored: Scored, shape: tuple[int, ...], timestep: float | None) -> None:
    """The score is one finite number a sample, and the same when asked again."""
    given = _given(scored, shape, timestep)
    values = _values(scored, given)
    _require(bool(torch.isfinite(values).all()), f"{scored} gave {values.tolist()} for ordinary predictions; expected finite numbers")
    _require(torch.equal(values, _values(scored, given)), f"{scored} gave other numbers when asked again; draw no random ones")


def samples_are_independent(scored: Scored, shape: tuple[int, ...], timestep: float | None) -> None:
    """A sample has the same number in a batch and alone."""
    given = _given(scored, shape, timestep)
    together = _values(scored, given)
    alone = torch.cat([_values(scored, [_take(item, number) for item in given]) for number in range(_SAMPLES)])
    _require(
        torch.allclose(together, alone, rtol=1e-4, atol=1e-6),
        f"{scored} gave {together.tolist()} in one batch and {alone.tolist()} one by one; reduce over everything but the first axis: .flatten(1)",
    )


def dtype_safe(scored: Scored, shape: tuple[int, ...], timestep: float | None) -> None:
    """Half-precision predictions give nearly what the same numbers give in float32, and do not overflow."""
    for dtype, tolerance in ((torch.float16, 0.01), (torch.bfloat16, 0.05)):
        half = [_cast(item, dtype) for item in _given(scored, shape, timestep, scale=20.0)]
        values, expected = _values(scored, half), _values(scored, [_cast(item, torch.float32) for item in half])
        _require(
            torch.allclose(values, expected, rtol=tolerance),
            f"{scored} gave {values.tolist()} for {dtype} predictions, where the same numbers in float32 give {expected.tolist()}; "
            "call .float() before you square or sum",
        )


def waits_for_nothing(scored: Scored, shape: tuple[int, ...], timestep: float | None) -> None:
    """No number is read while the run goes on: on an accelerator that would wait for it at every evaluation."""
    given = _given(scored, shape, timestep)
    with _Waits() as waits:
        _values(scored, given)
    _require(
        not waits.seen,
        f"{scored} reads a tensor's numbers ({', '.join(waits.seen)}), for which the run would wait; leave out .item(), float(), if and "
        "indexing with a mask, such as by torch.where",
    )


def evaluation_unchanged(scored: Scored, shape: tuple[int, ...], timestep: float | None) -> None:
    """The predictions, which the sampler goes on with, are left as they are."""
    given = _given(scored, shape, timestep)
    before = [tensor.clone() for tensor in _tensors(given)]
    _values(scored, given)
    same = all(torch.equal(tensor, copy) for tensor, copy in zip(_tensors(given), before, strict=True))
    _require(same, f"{scored} changes the predictions, with which the run goes on; use no operation in place on them")


def symmetric_if_it_says_so(scored: Scored, shape: tuple[int, ...], timestep: float | None) -> None:
    """With ``symmetric = True`` the two predictions may be exchanged."""
    if not scored.symmetric:
        return
    given = _given(scored, shape, timestep)
    values, exchanged = _values(scored, given), _values(scored, [_exchanged(item) for item in given])
    _require(
        torch.allclose(values, exchanged, rtol=1e-4),
        f"{scored} says that it is symmetric, and gave {values.tolist()}, and {exchanged.tolist()} with the predictions exchanged",
    )


CHECKS = (one_number_a_sample, samples_are_independent, dtype_safe, waits_for_nothing, evaluation_unchanged, symmetric_if_it_says_so)


class ScoreConformance:
    """The suite as a pytest class: subclass it, and give the fixture ``score``.

    ``docs/scores.md`` shows one. The class attributes say what `check_score` takes as arguments.
    """

    shape: ClassVar[tuple[int, ...]] = (4, 8, 8)
    timestep: ClassVar[float | None] = 999.0

    def test_one_number_a_sample(self, score: Score) -> None:
        one_number_a_sample(as_scored(score), self.shape, self.timestep)

    def test_samples_are_independent(self, score: Score) -> None:
        samples_are_independent(as_scored(score), self.shape, self.timestep)

    def test_dtype_safe(self, score: Score) -> None:
        dtype_safe(as_scored(score), self.shape, self.timestep)

    def test_waits_for_nothing(self, score: Score) -> None:
        waits_for_nothing(as_scored(score), self.shape, self.timestep)

    def test_evaluation_unchanged(self, score: Score) -> None:
        evaluation_unchanged(as_scored(score), self.shape, self.timestep)

    def test_symmetric_if_it_says_so(self, score: Score) -> None:
        symmetric_if_it_says_so(as_scored(score), self.shape, self.timestep)


class _Waits(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the operators whose result the host has to wait for."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in _WAITING:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


def _given(scored: Scored, shape: tuple[int, ...], timestep: float | None, *, scale: float = 1.0) -> list[Any]:
    """The arguments of a score: random evaluations of three samples, and a history."""
    generator = torch.Generator().manual_seed(0)

    def evaluation() -> Evaluation:
        cond, uncond = (scale * torch.randn(_SAMPLES, *shape, generator=generator) for _ in range(2))
        return Evaluation(cond, uncond, timestep=timestep)

    now, previous, first = evaluation(), evaluation(), evaluation()
    pairs = [(each.pred_cond, each.pred_uncond) for each in (first, previous, now)]
    history = torch.stack([magnitude(cond, uncond) for cond, uncond in pairs if uncond is not None])
    known: dict[str, Any] = {"previous": previous, "first": first, "history": history}
    return [now, *(known[need] for need in scored.needs if need in known)]


def _values(scored: Scored, given: Sequence[Any]) -> Tensor:
    return checked_values(scored.compute(*given), scored, given[0])


def _take(item: Any, number: int) -> Any:
    return item.take(torch.tensor([number])) if isinstance(item, Evaluation) else item[:, number : number + 1]


def _cast(item: Any, dtype: torch.dtype) -> Any:
    if not isinstance(item, Evaluation):
        return item.to(torch.float32)
    uncond = None if item.pred_uncond is None else item.pred_uncond.to(dtype)
    return replace(item, pred_cond=item.pred_cond.to(dtype), pred_uncond=uncond)


def _exchanged(item: Any) -> Any:
    if not isinstance(item, Evaluation) or item.pred_uncond is None:
        return item
    return replace(item, pred_cond=item.pred_uncond, pred_uncond=item.pred_cond)


def _tensors(given: Sequence[Any]) -> list[Tensor]:
    found = []
    for item in given:
        found += [item.pred_cond, item.pred_uncond] if isinstance(item, Evaluation) else [item]
    return [tensor for tensor in found if tensor is not None]


def _require(holds: bool, message: str) -> None:  # noqa: FBT001 -- an assertion
    if not holds:
        raise AssertionError(message)
