"""Scores: small functions that turn an evaluation into one number a sample, computed while the run goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, get_args

import numpy as np
import torch
from torch import Tensor

from memhook.capture.needs import GIVEN_BY_ALL, Need
from memhook.capture.prediction import Evaluation, magnitude
from memhook.errors import MemhookError, NoGuidanceError
from memhook.plugins import find_score

if TYPE_CHECKING:
    from memhook.hookspecs import Adapter, Score

MAGNITUDE = "magnitude"
_Compute = TypeVar("_Compute", bound=Callable[..., Any])
_HANDED = ("previous", "first", "history")  # needs that are arguments


def score(
    *, needs: str | tuple[str, ...] = "pair", name: str | None = None, at: int | None = None, paper: str = "", symmetric: bool = False
) -> Callable[[_Compute], _Compute]:
    """Make a function a score: say what `memhook.hookspecs.Score` asks for, where it is not the default.

    Args:
        needs: What it is made of.
        name: Its name; the function's own where None.
        at: The number of the one evaluation of a run that it is about, from 0; None for all.
        paper: Where it was published.
        symmetric: The same whichever of the two predictions is the conditional one.

    >>> import memhook
    >>> @memhook.score(needs=("pair", "previous"))
    ... def turn(evaluation, previous):
    ...     return memhook.magnitude(evaluation.pred_cond, previous.pred_cond)
    >>> turn.name, turn.needs
    ('turn', ('pair', 'previous'))
    """

    def named(compute: _Compute) -> _Compute:
        about = {"name": name or compute.__name__, "needs": needs, "at": at, "paper": paper, "symmetric": symmetric}
        for key, value in about.items():
            setattr(compute, key, value)
        return compute

    return named


@dataclass(frozen=True)
class Magnitude:
    """``‖c - u‖``, the score of Wen et al. 2024 (section 3.3); see `memhook.magnitude`. Every trace has it."""

    name: ClassVar[str] = MAGNITUDE
    needs: ClassVar[str] = "pair"
    symmetric: ClassVar[bool] = True
    paper: ClassVar[str] = "Wen et al., ICLR 2024"

    def __call__(self, evaluation: Evaluation) -> Tensor:
        if evaluation.pred_uncond is None:
            raise NoGuidanceError("this evaluation has no unconditional prediction, so it has no magnitude; guide with a scale above 1")
        return magnitude(evaluation.pred_cond, evaluation.pred_uncond)


@dataclass(frozen=True, eq=False)
class Scored:
    """A score, read and checked.

    Attributes:
        name: Its name.
        needs: What it is made of, in its order.
        compute: The score itself.
        at: The one evaluation that it is about, from 0; None for all.
        paper: Where it was published.
        symmetric: Whether roles do not matter.
        parameters: Its fields as JSON values; a tensor or array by a digest of its values.
        plugin: Whose it is, for messages.
    """

    name: str
    needs: tuple[str, ...]
    compute: Any = field(repr=False)
    at: int | None = None
    paper: str = ""
    symmetric: bool = False
    parameters: Mapping[str, Any] = field(default_factory=dict)
    plugin: str | None = None

    def describe(self) -> dict[str, Any]:
        """What tells it from others, as a calibration's setting holds it."""
        return {"name": self.name, "parameters": dict(self.parameters)}

    @property
    def replays(self) -> bool:
        """Whether calls must be kept while it is computed."""
        return not GIVEN_BY_ALL.issuperset(self.needs)

    def __str__(self) -> str:
        return f"the score {self.name!r}" + (f" of {self.plugin}" if self.plugin is not None else "")


def as_scored(value: Score | str | Callable[..., Any] | Scored, *, plugin: str | None = None) -> Scored:
    """Read a score: its name, an object or function as `memhook.hookspecs.Score` describes it, or a bare function of a pair.

    Raises:
        MemhookError: It is none, or no plugin has one of this name.
    """
    if isinstance(value, Scored):
        return value
    if value is magnitude or (isinstance(value, str) and value == MAGNITUDE):  # known without loading a plugin
        value, plugin = Magnitude(), "memhook"
    if isinstance(value, str):
        value, plugin = find_score(value)
    origin = f" (from {plugin})" if plugin is not None else ""
    if isinstance(value, type) or not callable(value):
        kind = f"the class {value.__qualname__}; give an instance of it" if isinstance(value, type) else f"a {type(value).__name__}"
        raise MemhookError(f"a score{origin} is {kind}; expected a function or frozen dataclass from an evaluation to one number a sample, or a name")
    name = getattr(value, "name", None) or getattr(value, "__name__", None)
    needs: Any = getattr(value, "needs", "pair")
    needs = (needs,) if isinstance(needs, str) else tuple(needs)
    at = getattr(value, "at", None)
    if not isinstance(name, str) or not name.isprintable() or any(letter.isspace() for letter in name) or name == "<lambda>":
        raise MemhookError(f"a score{origin} has the name {name!r}; expected one word. Name a function with @memhook.score(name=...)")
    if name == MAGNITUDE and not isinstance(value, Magnitude):
        raise MemhookError(f"a score{origin} is named {name!r}, which is memhook's own and in every trace; give it another name")
    unknown = [need for need in needs if need not in get_args(Need)]
    if unknown or not needs:
        raise MemhookError(f"the score {name!r}{origin} needs {unknown or 'nothing'}; expected some of {', '.join(get_args(Need))}")
    if at is not None and (type(at) is not int or at < 0):
        raise MemhookError(f"the score {name!r}{origin} is about evaluation {at!r}; expected its number, 0 or more, or None for all of them")
    symmetric = bool(getattr(value, "symmetric", False))
    return Scored(name, needs, value, at, str(getattr(value, "paper", "")), symmetric, _parameters(name, value), plugin)


def read_scores(scores: object) -> tuple[Scored, ...]:
    """One score, or several: by name, or as they are. None is the magnitude.

    Raises:
        MemhookError: One is no score, or two have one name.
    """
    several = isinstance(scores, Iterable) and not isinstance(scores, (str, Scored)) and not callable(scores)
    given: Any = [MAGNITUDE] if scores is None else scores if several else [scores]
    found = tuple(as_scored(item) for item in given)
    names = [scored.name for scored in found]
    double = sorted({name for name in names if names.count(name) > 1})
    if double or not found:
        seen = f"{', '.join(double)} twice" if double else "none"
        raise MemhookError(f"of the scores to compute there is {seen}; expected one or more, each with a name of its own")
    return found


def with_parameters(scored: Scored, described: Mapping[str, Any]) -> Scored:
    """The score of this name with the parameters that a calibration's setting holds.

    Raises:
        MemhookError: It has others, or one that is not a plain value, so that it cannot be made of a setting.
    """
    wanted = dict(described.get("parameters") or {})
    if dict(scored.parameters) == wanted:
        return scored
    try:
        made = as_scored(replace(scored.compute, **wanted), plugin=scored.plugin)
    except (TypeError, ValueError) as error:
        raise MemhookError(f"{scored} cannot be made with the parameters {wanted}: {error}. Give the score itself as score=") from error
    if dict(made.parameters) != wanted:
        raise MemhookError(f"{scored} has the parameters {dict(made.parameters)}, where {wanted} was expected. Give the score itself as score=")
    return made


def check_needs(scores: Sequence[Scored], adapter: Adapter) -> None:
    """Raise where the adapter cannot give what a score needs."""
    gives = GIVEN_BY_ALL | frozenset(getattr(adapter, "gives", frozenset()))
    for scored in scores:
        lacking = [need for need in scored.needs if need not in gives]
        if lacking:
            raise MemhookError(
                f"{scored} needs {' and '.join(lacking)}, which the adapter for {adapter.host} cannot give (it gives {', '.join(sorted(gives))}); "
                "take a score that needs less (`memhook methods` lists them), or watch the denoiser with memhook.ModuleAdapter"
            )


class Scoring:
    """Computes the scores of one watch, evaluation by evaluation. Keeps the evaluations before only for scores that need them."""

    def __init__(self, scores: Sequence[Scored]) -> None:
        self.scores = tuple(scores)
        self._others = [scored for scored in self.scores if scored.name != MAGNITUDE]
        self._needs = {need for scored in self._others for need in scored.needs}
        self.place = -1  # of the latest evaluation in its run, as far as known without waiting for the device
        self._samples: int | None = None
        self._later = False  # in a run after the first, whose beginning was not known beforehand
        self._previous: Evaluation | None = None
        self._first: Evaluation | None = None
        self._history: list[Tensor] = []

    def forget(self) -> None:
        """The block has ended: let go of the evaluations that scores looked back to."""
        self._previous = self._first = None

    def __getstate__(self) -> dict[str, Any]:
        """What a trace needs to be read: not the scores themselves, which may be functions of anybody's."""
        return {"scores": tuple(replace(scored, compute=None) for scored in self.scores)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["scores"])  # type: ignore[misc]

    def wants_roles(self) -> bool:
        """Whether the roles of the coming evaluation must be known."""
        return any(self._comes(scored) for scored in self._others)

    def wants_calls(self) -> bool:
        """Whether the coming evaluation's call must be kept."""
        return any(self._comes(scored) and scored.replays for scored in self._others)

    def _comes(self, scored: Scored) -> bool:
        coming = self.place + 1
        if scored.at is None or scored.at == coming:
            return True
        return ("previous" in scored.needs and coming == scored.at - 1) or ("first" in scored.needs and coming == 0)

    def __call__(self, evaluation: Evaluation, measured: Tensor | None) -> dict[str, Tensor]:
        """The values ``(b,)`` of this evaluation, by name; a score without one is left out. ``measured`` is its magnitude."""
        samples = evaluation.pred_cond.shape[0]
        if samples != self._samples:  # certainly another run
            self._later = self._samples is not None
            self._samples, self.place, self._previous, self._first, self._history = samples, -1, None, None, []
        self.place += 1
        if not self._others:
            return {}
        if "history" in self._needs and measured is not None:
            self._history.append(measured)
        if self._first is None and "first" in self._needs:
            self._first = _copied(evaluation)
        found = {}
        for scored in self._others:
            values = self._value(scored, evaluation)
            if values is not None:
                found[scored.name] = values
        self._previous = _copied(evaluation) if "previous" in self._needs else None
        return found

    def _value(self, scored: Scored, evaluation: Evaluation) -> Tensor | None:
        elsewhere = scored.at is not None and (scored.at != self.place or self._later)
        if elsewhere or (evaluation.pred_uncond is None and "pair" in scored.needs):
            return None
        history = torch.stack(self._history) if "history" in scored.needs and self._history else None
        known = {"previous": self._previous, "first": self._first, "history": history}
        others = [known[need] for need in scored.needs if need in _HANDED]
        if any(other is None for other in others):
            return None
        if "pair" in scored.needs and any(isinstance(other, Evaluation) and other.pred_uncond is None for other in others):
            return None
        try:
            values = scored.compute(evaluation, *others)
        except MemhookError:
            raise
        except Exception as error:
            raise MemhookError(f"{scored} failed at evaluation {self.place}: {type(error).__name__}: {error}") from error
        return None if values is None else checked_values(values, scored, evaluation)


def checked_values(values: object, scored: Scored, evaluation: Evaluation) -> Tensor:
    """What a score gave, as float32 without a graph.

    Raises:
        MemhookError: It is not one number a sample.
    """
    samples = evaluation.pred_cond.shape[0]
    if not isinstance(values, Tensor) or values.shape != (samples,) or values.dtype is torch.bool or values.is_complex():
        seen = f"a {values.dtype} of shape {tuple(values.shape)}" if isinstance(values, Tensor) else f"a {type(values).__name__}"
        raise MemhookError(f"{scored} gave {seen} for {samples} samples; expected a tensor with one number a sample, ({samples},)")
    return values.detach().to(torch.float32, copy=True)


def _copied(evaluation: Evaluation) -> Evaluation:
    """The evaluation, out of reach of the host's changes in place."""
    if evaluation.replay is not None:  # made of copies already
        return evaluation
    uncond = None if evaluation.pred_uncond is None else evaluation.pred_uncond.clone()
    return replace(evaluation, pred_cond=evaluation.pred_cond.clone(), pred_uncond=uncond)


def _parameters(name: str, value: Any) -> dict[str, Any]:
    """The fields of a dataclass, as a calibration's setting holds them."""
    if not is_dataclass(value):
        return {}
    found = {item.name: _plain(getattr(value, item.name)) for item in fields(value) if item.name not in ("name", "needs", "paper", "symmetric")}
    try:
        plain: dict[str, Any] = json.loads(json.dumps(found))
    except (TypeError, ValueError) as error:
        raise MemhookError(
            f"the score {name!r} has a parameter that a calibration's setting cannot hold ({error}); expected numbers, texts, tensors, and lists "
            "and dicts of these"
        ) from error
    return plain


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        value = (value.float() if value.dtype is torch.bfloat16 else value).numpy()
    if isinstance(value, np.ndarray):
        digest = hashlib.sha256(f"{value.dtype}{value.shape}".encode() + value.tobytes()).hexdigest()[:16]
        return f"{value.dtype} of shape {tuple(value.shape)}, sha256 {digest}"
    return value
