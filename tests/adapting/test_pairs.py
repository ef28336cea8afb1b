"""Reading a denoiser's calls: its output, its sample, its timestep, its embedding."""

from collections import OrderedDict

import pytest
import torch
from torch import nn

from memhook import GuidanceLayoutError
from memhook.adapting.pairs import PairRecorder, find_embedding, find_sample, find_timestep, read_output, same_samples, split_call

X = torch.zeros(4, 3, 8, 8)
E = torch.zeros(4, 5, 6)


class Output:
    def __init__(self, **fields):
        self.__dict__.update(fields)


@pytest.mark.parametrize(
    "output",
    [X, (X,), (X, None), [X, 1], {"sample": X}, {"pred": X}, OrderedDict(sample=X), Output(sample=X), Output(pred=X)],
    ids=lambda output: type(output).__name__,
)
def test_output(output):
    assert read_output(output) is X


@pytest.mark.parametrize(
    "output",
    [None, "text", (), (None, X), {"other": X}, Output(sample="none"), 1.0],
    ids=["nothing", "text", "empty tuple", "tuple without", "dict without", "object without", "number"],
)
def test_output_without_a_prediction(output):
    with pytest.raises(GuidanceLayoutError, match=f"returned a {type(output).__name__}; expected a tensor"):
        read_output(output)


@pytest.mark.parametrize(
    ("args", "kwargs", "found"),
    [
        ((X, 1), {}, True),
        ((), {"sample": X}, True),
        ((), {"hidden_states": X}, True),
        ((), {"latents": X}, True),
        (("no tensor",), {"x": X}, True),
        ((), {"noise": X}, False),
        ((), {"sample": None}, False),
    ],
)
def test_sample(args, kwargs, found):
    assert find_sample(args, kwargs) is (X if found else None)


@pytest.mark.parametrize(
    ("args", "kwargs", "expected"),
    [
        ((X, 7), {}, 7),
        ((X,), {"timestep": 7.5}, 7.5),
        ((X,), {"t": 3}, 3),
        ((X,), {"sigma": 0.5}, 0.5),
        ((X, 7), {"timestep": 8}, 8),
        ((X, "seven"), {}, None),
        ((X,), {}, None),
    ],
)
def test_timestep(args, kwargs, expected):
    assert find_timestep(args, kwargs) == expected


@pytest.mark.parametrize(
    ("args", "kwargs", "expected"),
    [
        ((X, 1, E), {}, (2,)),
        ((X, 1), {"encoder_hidden_states": E}, ("encoder_hidden_states",)),
        ((X, 1), {"context": E}, ("context",)),
        ((X, 1, E), {"context": E}, ("context",)),
        ((X, 1, E[:2]), {}, None),  # another batch
        ((X, 1, E[:, 0]), {}, None),  # pooled
        ((X, 1, E.long()), {}, None),  # token ids
        ((X, 1), {"mask": E}, None),
    ],
)
def test_embedding(args, kwargs, expected):
    assert find_embedding(args, kwargs, 4) == expected


class Model(nn.Module):
    def forward(self, x, timestep, context=None):
        return x


def split(x, *, chunks=2, keep=False, embedding=E, **options):
    return split_call(Model(), (x, 1), {"context": embedding}, x, chunks=chunks, keep=keep, **options)


@pytest.mark.parametrize("chunks", [1, 2, 4])
def test_chunks_are_the_rows_in_order(chunks):
    x, embedding = torch.randn(4, 3, 8, 8), torch.randn(4, 5, 6)
    found = split(x, chunks=chunks, embedding=embedding)
    assert len(found) == chunks
    assert torch.equal(torch.cat([part.values for part in found]), x)
    assert torch.equal(torch.cat([part.sample for part in found]), x)
    assert torch.equal(torch.cat([part.embedding for part in found]), embedding)


def test_predictions_are_cut_off_from_the_hosts_graph():
    x, embedding = torch.randn(4, 3, requires_grad=True), torch.randn(4, 5, 6, requires_grad=True)
    for keep in (False, True):
        for part in split(x, embedding=embedding, keep=keep):
            assert not any(tensor.requires_grad for tensor in (part.values, part.sample, part.embedding))


def test_channels_beyond_the_prediction_are_left_out():
    x = torch.randn(4, 6, 8, 8)
    assert torch.equal(torch.cat([part.values for part in split(x, channels=3)]), x[:, :3])


def same(first, second):
    return same_samples(*[split(x, chunks=1)[0] for x in (first, second)]).tolist()


def test_equal_samples_are_equal():
    x = torch.randn(4, 3, 8, 8)
    assert same(x, x.clone()) == [True] * 4


def test_one_changed_value_is_seen_in_its_sample():
    x = torch.randn(4, 3, 8, 8)
    y = x.clone()
    y[2, 1, 0, 0] += 1e-3
    assert same(x, y) == [True, True, False, True]


def test_a_nan_in_both_is_no_difference():
    """It is reported as what it is by the magnitude."""
    x = torch.randn(4, 3, 8, 8)
    x[0, 0, 0, 0] = torch.nan
    assert same(x, x.clone()) == [True] * 4


def test_other_shapes_are_other_samples():
    assert same(torch.zeros(4, 3, 8, 8), torch.zeros(4, 3, 8, 7)) == [False] * 4


def test_channels_that_hold_a_mask_may_differ():
    """Inpainting and image-to-image models get more channels than they predict."""
    x = torch.randn(4, 9, 8, 8)
    y = x.clone()
    y[:, 4:] = 0
    first, second = (split_call(Model(), (tensor, 1), {"context": E}, tensor[:, :4], chunks=1, keep=False)[0] for tensor in (x, y))
    assert same_samples(first, second).tolist() == [True] * 4
    y[1, 3] += 1
    assert same_samples(first, split_call(Model(), (y, 1), {}, y[:, :4], chunks=1, keep=False)[0]).tolist() == [True, False, True, True]


def test_where_no_sample_was_seen_nothing_is_said():
    (first,) = split_call(Model(), (), {"timestep": 1}, X, chunks=1, keep=False)
    assert same_samples(first, first) is None


def test_fingerprints_are_taken_once_while_the_host_passes_the_same_tensors():
    recorder, embedding = PairRecorder(), torch.randn(2, 5, 6)
    rows = [recorder.row(*[split(torch.zeros(2, 3), chunks=1, embedding=embedding)[0]] * 2, timestep=1) for _ in range(3)]
    assert rows[0].conditioning is rows[1].conditioning is rows[2].conditioning


def test_fingerprints_follow_what_the_host_does_to_its_tensors():
    recorder, words = PairRecorder(), torch.randn(6, 5, 6)

    def fingerprints(embedding):
        return recorder.row(*[split(torch.zeros(2, 3), chunks=1, embedding=embedding)[0]] * 2, timestep=1).conditioning[0].tolist()

    first = fingerprints(words[:2])
    assert fingerprints(words[2:4]) != first  # another part of the same memory
    assert fingerprints(words[:2]) == first
    words[:2] += 1
    assert fingerprints(words[:2]) != first  # changed in place
    with torch.inference_mode():
        frozen = words[:2].clone()
        before = fingerprints(frozen)
        frozen += 1
        assert fingerprints(frozen) != before
