"""The calls of one scheduler step, read as predictions in every way in which they can be read."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from memhook.adapting.replay import look_up
from memhook.adapting.tensors import row_hash
from memhook.capture.texts import Text
from memhook_diffusers.calls import Call, Conditioning, cut, input_hashes, sample_hashes
from memhook_diffusers.evidence import Observation, observe
from memhook_diffusers.layout import Reading
from memhook_diffusers.outputs import Reader, readers
from memhook_diffusers.roles import Decision

if TYPE_CHECKING:
    from collections.abc import Sequence

    from memhook.adapting.pairs import Prediction

MOST = 8  # predictions of a step that are looked at, the last ones (Attend-and-Excite makes dozens of calls before)

Cut = list[tuple[Call, Reader, Tensor, list["Prediction"]]]
"""One way to read the calls of a step: for each call how it was read, what was read, and the predictions in it."""


def read_way(way: Cut, conditioning: Conditioning) -> Reading:
    """The predictions of a step, with fingerprints of their texts."""
    predictions = [prediction for *_, found in way for prediction in found]
    text, texts = None, []
    if all(prediction.embedding is not None for prediction in predictions):
        hashes = []
        for number, (call, _, values, found) in enumerate(way):
            path = found[0].path or ()
            whole = embedding_of(call, path)
            if not isinstance(whole, Tensor) or whole.shape[0] != values.shape[0]:
                hashes += [row_hash(prediction.embedding) for prediction in found if prediction.embedding is not None]
                texts += [Text.of(prediction.embedding) for prediction in found if prediction.embedding is not None]
            else:
                whole_hashes, whole_text = conditioning.of(whole, (number, *path))
                hashes += [whole_hashes[prediction.rows] for prediction in found]
                texts += [whole_text.rows(prediction.rows) for prediction in found]
        text = torch.stack(hashes)
    return Reading(predictions, text, tuple(texts))


def embedding_of(call: Call, path: tuple[int | str, ...]) -> Any:
    """The text in a call's arguments, as the host gave it."""
    return look_up(call.args, call.kwargs, path) if path else None


def without_variance(model_output: Tensor, sample: Any) -> Tensor:
    """What the scheduler is given, without the half that is a variance (DeepFloyd IF, Kandinsky 2)."""
    if isinstance(sample, Tensor) and sample.ndim == model_output.ndim and sample.ndim > 2:
        doubled = (sample.shape[0], 2 * sample.shape[1], *sample.shape[2:])
        if tuple(model_output.shape) == doubled:
            return model_output[:, : sample.shape[1]]
    return model_output


def readings_of(calls: Sequence[Call], shape: tuple[int, ...]) -> list[Cut]:
    """The calls that predicted, cut into predictions, in every way in which they can be read.

    A call that can be read in one way only is read in that in all of them: Ideogram 4 gives its conditional model tokens of text too.
    """
    found = [(call, options) for call in calls if (options := readers(call.output, shape))]
    best = min((options[0].doubt for _, options in found), default=0)
    predicting = {_kind(call.module) for call, options in found if options[0].doubt == best}  # not a text encoder of a like shape
    found = [(call, options) for call, options in found if _kind(call.module) in predicting]
    ways = []
    for index in range(max((len(options) for _, options in found), default=0)):
        way: Cut = []
        for call, options in found:
            reader = options[min(index, len(options) - 1)]
            values = reader(call.output).detach()
            way.append((call, reader, values, cut(call, reader, values)))
        while len(way) > 1 and sum(len(predictions) for *_, predictions in way) > MOST:
            way.pop(0)
        ways.append(way)
    return ways


def _kind(module: nn.Module) -> type:
    return type(getattr(module, "_orig_mod", module))  # torch.compile


def halves_of(way: Cut) -> Cut | None:
    """A lone prediction of an even batch as two of half the samples: DiT steps a doubled batch."""
    call, reader, values, _ = way[0]
    if values.shape[0] % 2:
        return None
    half = replace(reader, samples=values.shape[0] // 2)
    return [(call, half, values, cut(call, half, values))]


def equal_halves(model_output: Tensor, halves: Sequence[Prediction]) -> Tensor:
    """``()`` bool on the device: the two halves of what the scheduler is given are one, and so are the noisy samples."""
    equal = torch.stack([part.eq(other).all() for part, other in [model_output.chunk(2)]]).all()
    first, second = (half.sample for half in halves)
    if first is not None and second is not None and first.is_floating_point():
        equal = equal & first.eq(second).all()
    return equal


def prior_of(way: Cut) -> tuple[int, int] | None:
    """``(cond, uncond)`` by diffusers' habit: batched calls put the unconditional half first, separate calls make it second."""
    if sum(len(predictions) for *_, predictions in way) != 2 or way[0][1].form == "unknown":
        return None
    return (1, 0) if len(way) == 1 else (0, 1)


def matched(way: Cut, named: Sequence[dict[str, Any]]) -> Decision | None:
    """The pair that a guider was given by name, if its tensors are the predictions themselves."""
    sources = [_in_source(call, reader, prediction.rows) for call, reader, _, found in way for prediction in found]

    def find(given: Any) -> int | None:
        if not isinstance(given, Tensor):
            return None
        return next((i for i, source in enumerate(sources) if source.data_ptr() == given.data_ptr() and source.shape == given.shape), None)

    for arguments in named:
        cond, uncond = find(arguments.get("pred_cond")), find(arguments.get("pred_uncond"))
        if cond is not None and uncond is not None:
            return Decision(0, cond, uncond, "matched")
        if cond is not None and arguments.get("pred_uncond") is None:
            return Decision(reason="has a guider that was given no unconditional prediction")
    return None


def _in_source(call: Call, reader: Reader, rows: slice) -> Tensor:
    """Where a prediction lies in the output that the host has."""
    same = reader.axis and call.source.ndim > reader.axis and call.source.shape[reader.axis] >= reader.stop
    return (call.source.narrow(reader.axis, reader.start, reader.stop - reader.start) if same else call.source)[rows]


def claimed(named: Sequence[dict[str, Any]], target: Tensor) -> list[tuple[Tensor, Tensor]]:
    """What guiders were given by name as the two predictions, if it has the size of what the scheduler is given: copies, or converted."""
    pairs = [(arguments.get("pred_cond"), arguments.get("pred_uncond")) for arguments in named]
    return [
        (cond.detach(), uncond.detach())
        for cond, uncond in pairs
        if isinstance(cond, Tensor) and isinstance(uncond, Tensor) and cond.numel() == uncond.numel() == target.numel()
    ]


def observe_way(way: Cut, reading: Reading, target: Tensor, claims: Sequence[tuple[Tensor, Tensor]] = ()) -> Observation:
    """What a step shows about its predictions, if they are read this way."""
    inputs, modules = [], []
    for call, _, values, found in way:
        hashes = input_hashes(call, values.shape[0], alone=len(found) == 1)
        inputs += [hashes[prediction.rows] for prediction in found]
        modules += [id(call.module)] * len(found)
    stacked = torch.stack(inputs)
    samples = sample_hashes(reading.predictions, whole=False)
    extra = any(found.sample is not None and found.sample.shape[1:] != found.values.shape[1:] for found in reading.predictions)
    whole = sample_hashes(reading.predictions, whole=True) if extra else samples
    text = stacked if reading.text is None else reading.text
    return observe(
        reading.predictions,
        target,
        reader=way[0][1],
        inputs=stacked,
        text=text,
        samples=samples,
        whole_samples=whole,
        modules=tuple(modules),
        claims=claims,
    )
