"""Fingerprints tell models apart, and see one model in two dtypes or half offloaded as the same."""

import copy
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from memhook import MemhookError
from memhook.adapting.fingerprint import Fingerprinted, fingerprint, is_fingerprint, same_fingerprint
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


def test_a_large_model_is_sampled():
    layers = nn.ModuleList(nn.Linear(1, 1) for _ in range(500))
    assert len(fingerprint(layers)["values"]) <= 128


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
    with pytest.raises(MemhookError, match=r"the model of this trace was deleted.*while it is alive"):
        taken.describe()
