"""Fingerprints tell models apart, and see one model in two dtypes or half offloaded as the same."""

import copy
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from memhook import MemhookError
from memhook.adapting.fingerprint import Fingerprinted, difference, fingerprint, is_fingerprint, same_fingerprint
from memhook.testing import tiny_unet


def test_a_model_is_itself():
    assert same_fingerprint(fingerprint(tiny_unet()), fingerprint(tiny_unet()))
    assert is_fingerprint(fingerprint(tiny_unet()))


def test_it_survives_json():
    found = fingerprint(tiny_unet())
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_other_weights_are_another_model():
    assert not same_fingerprint(fingerprint(tiny_unet(seed=0)), fingerprint(tiny_unet(seed=1)))


@pytest.mark.parametrize("factor", [1.001, 1.01, -1.0])
def test_a_little_training_makes_another_model(factor):
    """In one dtype, a change of a thousandth is seen."""
    unet, tuned = tiny_unet(), tiny_unet()
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.mul_(factor)
    assert not same_fingerprint(fingerprint(unet), fingerprint(tuned))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@given(seed=st.integers(0, 50))
def test_another_dtype_is_the_same_model(dtype, seed):
    unet = tiny_unet(seed=seed)
    assert same_fingerprint(fingerprint(unet), fingerprint(copy.deepcopy(unet).to(dtype)))
    assert not same_fingerprint(fingerprint(unet), fingerprint(tiny_unet(seed=seed + 1).to(dtype)))


def test_another_structure_is_another_model():
    plain = fingerprint(nn.Linear(3, 3))
    assert not same_fingerprint(plain, fingerprint(nn.Linear(3, 4)))
    assert not same_fingerprint(plain, fingerprint(nn.Linear(3, 3, bias=False)))
    assert not same_fingerprint(plain, fingerprint(nn.Sequential(nn.Linear(3, 3))))


def test_parameters_offloaded_to_disk_are_left_out_of_the_comparison():
    """accelerate leaves them on the meta device between calls."""
    whole, other = tiny_unet(seed=0), tiny_unet(seed=1)
    offloaded = copy.deepcopy(whole)
    offloaded.down.to("meta")
    assert same_fingerprint(fingerprint(whole), fingerprint(offloaded))
    assert not same_fingerprint(fingerprint(other), fingerprint(offloaded))
    everything = copy.deepcopy(whole).to("meta")
    assert same_fingerprint(fingerprint(whole), fingerprint(everything))  # by structure alone


def test_every_tensor_of_a_large_model_is_looked_at():
    """Single elements are kept of 128 at most, as in older files; moments of all."""
    layers = nn.ModuleList(nn.Linear(2, 3) for _ in range(100))
    before = fingerprint(layers)
    assert len(before["values"]) <= 128
    assert len(before["moments"]) == 200
    for name, parameter in sorted(layers.named_parameters())[::9]:
        kept = parameter.detach().clone()
        with torch.no_grad():
            parameter.mul_(1.01)
        assert not same_fingerprint(before, fingerprint(layers)), name
        with torch.no_grad():
            parameter.copy_(kept)
    assert same_fingerprint(before, fingerprint(layers))


@pytest.mark.parametrize(
    "change",
    [
        lambda weight: weight.neg_(),
        lambda weight: weight.copy_(weight.roll(1, 0)),
        lambda weight: weight.copy_(weight.roll(3, 1)),
        lambda weight: weight[700].zero_(),
        lambda weight: weight[:, 5].neg_(),
        lambda weight: weight[3, 4].add_(weight.std()),
    ],
    ids=["negated", "rows rolled", "columns rolled", "a neuron off", "a column negated", "one element"],
)
def test_a_change_anywhere_in_a_tensor_shows(change):
    layer = nn.Linear(1000, 900)
    before = fingerprint(layer)
    with torch.no_grad():
        change(layer.weight)
    found = difference(before, fingerprint(layer))
    assert found == "1 of 2 parameter tensors have other values"


def test_buffers_that_are_saved_with_the_model_are_looked_at():
    norm = nn.BatchNorm1d(4)
    before = fingerprint(norm)
    norm.running_mean.add_(1)
    assert difference(before, fingerprint(norm)) == "the buffers have other values"
    passing = nn.Linear(2, 2)
    passing.register_buffer("table", torch.ones(3), persistent=False)
    before = fingerprint(passing)
    passing.table.mul_(2)  # caches of positions grow with the picture
    assert same_fingerprint(before, fingerprint(passing))


def test_files_of_before_are_compared_by_their_single_elements():
    unet, other = tiny_unet(seed=0), tiny_unet(seed=1)
    old = {key: value for key, value in fingerprint(unet).items() if key in ("structure", "values", "dtype")}
    assert is_fingerprint(old)
    assert same_fingerprint(old, fingerprint(unet))
    assert same_fingerprint(fingerprint(unet), old)
    assert not same_fingerprint(old, fingerprint(other))


class Reads(TorchDispatchMode):
    """Counts the operations that read whole tensors, and the waits for a number."""

    def __init__(self):
        super().__init__()
        self.norms, self.waits = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.norms += "norm" in str(function)
        self.waits += "_local_scalar_dense" in str(function)
        return function(*args, **(kwargs or {}))


def test_an_unchanged_model_is_read_once():
    unet = tiny_unet()
    first = fingerprint(unet)
    with Reads() as reads:
        assert fingerprint(unet) == first
    assert reads.norms == 0
    assert reads.waits <= 2  # not one a parameter


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.weight.mul_(2),
        lambda layer: layer.weight.data.mul_(2),  # which torch does not count
        lambda layer: setattr(layer.weight, "data", layer.weight.data * 2),
        lambda layer: setattr(layer, "weight", nn.Parameter(layer.weight * 2)),
        lambda layer: layer.load_state_dict({"weight": layer.weight * 2, "bias": layer.bias}),
        lambda layer: layer.to(torch.float16),
    ],
    ids=["in place", "through data", "new data", "new parameter", "loaded", "converted"],
)
def test_a_changed_model_is_read_again(change):
    layer = nn.Linear(30, 40)
    before = fingerprint(layer)
    with torch.no_grad():
        change(layer)
    after = fingerprint(layer)
    assert after != before
    assert after == fingerprint(copy.deepcopy(layer))


def test_a_compiled_model_is_the_same_model():
    compiled = nn.Module()
    compiled._orig_mod = unet = tiny_unet()  # where torch.compile keeps it
    assert fingerprint(compiled) == fingerprint(unet)


class Odd(Tensor):
    """A weight whose class allows next to nothing, as quantized ones do."""

    @staticmethod
    def __new__(cls, packed, scale):
        return Tensor._make_wrapper_subclass(cls, packed.shape, dtype=torch.float32)

    def __init__(self, packed, scale):
        self.packed, self.scale = packed, scale

    def __tensor_flatten__(self):
        return ["packed", "scale"], None

    @staticmethod
    def __tensor_unflatten__(inner, context, size, stride):
        return Odd(inner["packed"], inner["scale"])

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].packed, args[0].scale)
        raise NotImplementedError(f"Odd has no {function}")


class Closed(Odd):
    """One that does not even say what it is made of."""

    def __tensor_flatten__(self):
        raise NotImplementedError


def quantized(kind, packed, scale):
    layer = nn.Linear(4, 3)
    layer.weight = nn.Parameter(kind(packed, scale), requires_grad=False)
    return layer


def test_quantized_weights_are_looked_at_by_their_parts():
    packed, scale = torch.arange(12, dtype=torch.int8).reshape(3, 4), torch.full((3,), 0.1)
    layer = quantized(Odd, packed, scale)
    with torch.no_grad():
        bias = layer.bias.clone()
        found = fingerprint(layer)
        others = [quantized(Odd, packed + 1, scale), quantized(Odd, packed, scale * 2), quantized(Odd, packed, scale)]
        for other in others:
            other.bias.copy_(bias)
    assert [same_fingerprint(found, fingerprint(other)) for other in others] == [False, False, True]


def test_weights_that_cannot_be_read_are_left_out():
    layer = quantized(Closed, torch.zeros(3, 4, dtype=torch.int8), torch.ones(3))
    found = fingerprint(layer)
    assert found["moments"].count(None) == 1
    assert same_fingerprint(found, fingerprint(layer))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.uint8, torch.bool, torch.complex64], ids=str)
def test_other_kinds_of_numbers(dtype):
    module = nn.Module()
    module.weight = nn.Parameter(torch.arange(3000).remainder(7).to(dtype), requires_grad=False)
    found = fingerprint(module)
    assert found["moments"][0][0] > 0
    module.weight = nn.Parameter(torch.arange(3000).remainder(5).remainder(2).to(dtype), requires_grad=False)
    assert not same_fingerprint(found, fingerprint(module))


def test_a_model_without_parameters():
    assert same_fingerprint(fingerprint(nn.Identity()), fingerprint(nn.Identity()))


def test_taking_it_changes_nothing():
    unet = tiny_unet()
    before = copy.deepcopy(unet.state_dict())
    fingerprint(unet)
    assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())
    assert all(parameter.grad is None for parameter in unet.parameters())


@pytest.mark.parametrize(
    "value",
    [
        {"structure": "a", "values": [], "moments": 3},
        {"structure": "a", "values": [], "moments": [[1.0]]},
        {"structure": "a", "values": [], "moments": [[1.0, "2"]]},
        {"structure": "a", "values": [], "buffers": [1]},
        {"structure": "a", "values": [], "buffers": {"a": None}},
        {"structure": "a", "values": [], "dtype": 3},
        None,
        "sd14",
        [],
        {},
        {"structure": 1, "values": []},
        {"structure": "a"},
        {"structure": "a", "values": ["1"]},
        {"structure": "a", "values": [True]},
    ],
)
def test_what_is_no_fingerprint(value):
    assert not is_fingerprint(value)


def test_a_deleted_model_has_none():
    unet = tiny_unet()
    taken = Fingerprinted({"model": unet})
    assert same_fingerprint(taken.describe()["model"], fingerprint(unet))
    del unet
    with pytest.raises(MemhookError, match=r"the model of this trace was deleted.*keep it until the `with` block ends"):
        taken.describe()
