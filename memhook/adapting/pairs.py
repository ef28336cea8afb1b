"""From a denoiser's raw calls to the two predictions of one guided evaluation; shared by adapters that hook modules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from memhook.adapting.replay import CallRecord, Path, Replay, look_up
from memhook.adapting.tensors import copy_of, row_hash, take_rows, version
from memhook.capture.prediction import Evaluation, Roles, Space, magnitude
from memhook.capture.texts import Text
from memhook.capture.trace import Row
from memhook.errors import GuidanceLayoutError

if TYPE_CHECKING:
    from collections.abc import Callable

SAMPLE_NAMES = ("sample", "hidden_states", "x", "latent_model_input", "latents")
EMBEDDING_NAMES = ("encoder_hidden_states", "context", "text_embeddings", "prompt_embeds", "cond")


def read_output(output: Any) -> Tensor:
    """The prediction in a denoiser's output: a tensor, an object with ``.sample``, a tuple or list, or a dict."""
    if isinstance(output, Tensor):
        return output
    for name in ("sample", "pred"):
        value = output.get(name) if isinstance(output, dict) else getattr(output, name, None)
        if isinstance(value, Tensor):
            return value
    if isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
        return output[0]
    raise GuidanceLayoutError(
        f"the denoiser returned a {type(output).__name__}; expected a tensor, an object with .sample, or a tuple that begins with a tensor"
    )


def find_sample(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The noisy sample among a denoiser's arguments: the first position, or a usual keyword."""
    if args and isinstance(args[0], Tensor):
        return args[0]
    return next((kwargs[name] for name in SAMPLE_NAMES if isinstance(kwargs.get(name), Tensor)), None)


def find_timestep(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | float | None:
    """The timestep among a denoiser's arguments: a usual keyword, or the second position."""
    for name in ("timestep", "timesteps", "t", "sigma"):
        if isinstance(kwargs.get(name), (Tensor, float, int)):
            value: Tensor | float = kwargs[name]
            return value
    if len(args) > 1 and isinstance(args[1], (Tensor, float, int)):
        second: Tensor | float = args[1]
        return second
    return None


def find_embedding(args: tuple[Any, ...], kwargs: dict[str, Any], batch: int) -> Path | None:
    """Where the text embedding ``(batch, l, d)`` stands: a usual keyword, or the third position."""
    paths: list[Path] = [(name,) for name in EMBEDDING_NAMES]
    for path in [*paths, (2,)]:
        value = look_up(args, kwargs, path)
        if isinstance(value, Tensor) and value.ndim == 3 and value.shape[0] == batch and value.is_floating_point():
            return path
    return None


@dataclass(frozen=True, eq=False)
class Prediction:
    """The rows of one call that share a role."""

    values: Tensor  # (b, ...)
    sample: Tensor | None  # (b, ...), the noisy input
    embedding: Tensor | None  # (b, l, d)
    path: Path | None
    rows: slice
    call: CallRecord | None  # kept only where replay was asked for
    read: Callable[[Any], Tensor]


def split_call(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output: Any,
    *,
    chunks: int,
    keep: bool,
    path: Path | None = None,
    channels: int | None = None,
) -> list[Prediction]:
    """Split one call along the batch axis into predictions of equal size, in order.

    Args:
        module: The denoiser that was called.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        output: What it returned.
        chunks: Into how many predictions; must divide the batch.
        keep: Keep what replay needs.
        path: Where the text embedding stands; found by name where None.
        channels: How many channels are the prediction (learned-variance models return twice as many); None for all.

    Raises:
        GuidanceLayoutError: There is no embedding at ``path``.
    """

    def read(output: Any) -> Tensor:
        values = read_output(output)
        return values if channels is None else values[:, :channels]

    values = read(output).detach()
    batch = values.shape[0]
    size = batch // chunks
    call = CallRecord(module, args, kwargs, batch=batch, device=values.device) if keep else None
    if call is not None:
        args, kwargs = call.args, call.kwargs
    sample = find_sample(args, kwargs)
    sample = _detached(sample) if sample is not None and sample.shape[0] == batch else None
    declared = path is not None
    path = path if path is not None else find_embedding(args, kwargs, batch)
    embedding = look_up(args, kwargs, path) if path is not None else None
    if not isinstance(embedding, Tensor) or embedding.ndim == 0 or embedding.shape[0] != batch:
        if declared:
            raise _no_embedding(path, embedding, args, kwargs, batch)
        embedding = None
    embedding = _detached(embedding) if embedding is not None else None
    found = []
    for start in range(0, size * chunks, size):
        rows = slice(start, start + size)
        # A whole tensor stays the host's own object, by which it is recognized in the next call.
        part = take_rows((sample, embedding), rows, of=batch) if chunks > 1 else (sample, embedding)
        found.append(Prediction(values[rows], part[0], part[1], path, rows, call, read))
    return found


def _detached(tensor: Tensor) -> Tensor:
    return tensor.detach() if tensor.requires_grad else tensor


def _no_embedding(path: Path | None, found: Any, args: tuple[Any, ...], kwargs: dict[str, Any], batch: int) -> GuidanceLayoutError:
    where = "".join(f"[{key!r}]" for key in path or ())
    seen = f"a tensor of shape {tuple(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
    return GuidanceLayoutError(
        f"the text embedding was declared to stand at {where}, where this call has {seen}; expected a tensor of {batch} rows. The call had "
        f"{len(args)} positional arguments and the keywords {', '.join(kwargs) or '(none)'}; say where the embedding stands among them"
    )


@torch.no_grad()
def same_samples(first: Prediction, second: Prediction) -> Tensor | None:
    """``(b,)`` bool on the device: both predictions were made from the same noisy sample; None where it was not seen."""
    if first.sample is None or second.sample is None:
        return None
    a, b = first.sample, second.sample
    if a.ndim > 1 and a.shape[1] > first.values.shape[1]:  # extra channels hold an image or mask, which may differ
        a, b = a[:, : first.values.shape[1]], b[:, : first.values.shape[1]]
    if a.shape != b.shape:
        return torch.zeros(first.values.shape[0], dtype=torch.bool, device=a.device)
    return (a.eq(b) | a.ne(a)).flatten(1).all(1)  # a NaN is reported as what it is, not as a difference


class PairRecorder:
    """Makes trace rows and evaluations of pairs of predictions, for one watch."""

    def __init__(self) -> None:
        self._last: tuple[tuple[Tensor, Tensor], list[Any], tuple[Tensor, Text]] | None = None

    def row(
        self,
        cond: Prediction,
        uncond: Prediction,
        *,
        timestep: Tensor | float | None,
        sigma: Tensor | float | None = None,
    ) -> Row:
        """The numbers of a pair; nothing here waits for the device."""
        conditioning, unconditional = self._conditioning(cond, uncond)
        return Row(
            magnitude(cond.values, uncond.values),
            timestep=timestep.detach() if isinstance(timestep, Tensor) else timestep,
            sigma=sigma.detach() if isinstance(sigma, Tensor) else sigma,
            same_inputs=same_samples(cond, uncond),
            conditioning=conditioning,
            unconditional=unconditional,
            shape=tuple(cond.values.shape[1:]),
        )

    def _conditioning(self, first: Prediction, second: Prediction) -> tuple[Tensor, Text] | tuple[None, None]:
        if first.embedding is None or second.embedding is None:
            return None, None
        pair = first.embedding, second.embedding
        state = [(tensor.data_ptr(), tensor.shape, tensor.stride(), version(tensor)) for tensor in pair]
        countable = not any(tensor.is_inference() for tensor in pair)
        if countable and self._last is not None and self._last[1] == state:  # hosts pass one tensor through a whole run
            return self._last[2]
        found = torch.stack([row_hash(tensor) for tensor in pair]), Text.of(second.embedding)  # (2, b)
        self._last = pair, state, found  # the tensors too: memory that is held is not given to another
        return found

    def evaluation(
        self,
        cond: Prediction,
        uncond: Prediction,
        *,
        space: Space,
        roles: Roles,
        timestep: Tensor | float | None,
        sigma: Tensor | float | None = None,
    ) -> Evaluation:
        """The pair as an `Evaluation` that can be replayed where calls are kept and the embedding was found.

        Where calls are kept it holds copies of the predictions: hosts go on to change theirs in place.
        """
        pred_cond, pred_uncond = cond.values, uncond.values
        if cond.call is not None:
            pred_cond, pred_uncond = copy_of(pred_cond), copy_of(pred_uncond)
        replay = None
        if cond.call is not None and cond.embedding is not None and cond.path is not None:
            against = (uncond.call, uncond.rows) if uncond.call is not None and uncond is not cond else None
            replay = Replay(cond.call, rows=cond.rows, path=cond.path, embedding=cond.embedding, expected=pred_cond, read=cond.read, against=against)
        return Evaluation(pred_cond, pred_uncond, space=space, roles=roles, timestep=timestep, sigma=sigma, embedding=cond.embedding, replay=replay)
