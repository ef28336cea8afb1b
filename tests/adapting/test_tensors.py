"""Nested arguments, copies of tensors, and fingerprints of rows."""

from collections import OrderedDict, UserDict, defaultdict
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memhook.adapting.tensors import copy_of, map_tensors, row_hash, take_rows, tensors_in

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64]


class Pair(NamedTuple):
    left: Any
    right: Any


trees = st.recursive(
    st.one_of(st.integers(0, 9).map(lambda n: torch.full((2, 3), n)), st.none(), st.text(max_size=3), st.floats(allow_nan=False)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.tuples(inner, inner).map(lambda items: Pair(*items)),
        st.dictionaries(st.text(max_size=2), inner, max_size=3),
        st.dictionaries(st.text(max_size=2), inner, max_size=3).map(OrderedDict),
        st.dictionaries(st.text(max_size=2), inner, max_size=3).map(UserDict),
    ),
)


def same(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if type(a) is not type(b):
        return False
    if isinstance(a, (dict, UserDict)):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


@given(trees)
def test_map_keeps_the_form(tree):
    assert same(map_tensors(tree, lambda tensor: tensor), tree)
    assert same(map_tensors(map_tensors(tree, lambda tensor: tensor + 1), lambda tensor: tensor - 1), tree)


@given(trees)
def test_map_reaches_every_tensor(tree):
    seen = []
    map_tensors(tree, lambda tensor: seen.append(tensor) or tensor)
    walked = tensors_in(tree)
    assert [id(tensor) for tensor in seen] == [id(tensor) for tensor in walked]


@pytest.mark.parametrize("tree", [torch.Size([2, 3]), torch.ones(2, 2).max(dim=0), defaultdict(int, a=torch.ones(1)), range(3), object()], ids=type)
def test_map_manages_odd_containers(tree):
    map_tensors(tree, lambda tensor: tensor + 1)  # does not raise


def test_rows_are_taken_of_batched_tensors_only():
    tree = {"x": torch.arange(4), "scale": torch.tensor(3.0), "table": torch.arange(10), "deep": (torch.arange(8).reshape(4, 2), "text")}
    part = take_rows(tree, slice(2, 4), of=4)
    assert part["x"].tolist() == [2, 3]
    assert part["deep"][0].tolist() == [[4, 5], [6, 7]]
    assert part["scale"] is tree["scale"]
    assert part["table"] is tree["table"]


def test_a_copy_is_out_of_reach_of_changes_in_place():
    tensor = torch.zeros(3)
    copy = copy_of(tensor)
    tensor.add_(1)
    assert copy.tolist() == [0, 0, 0]
    assert copy_of(tensor).tolist() == [1, 1, 1]


def test_an_unchanged_tensor_is_copied_once():
    tensor = torch.zeros(3)
    copy = copy_of(tensor)
    assert copy_of(tensor) is copy
    assert copy is not tensor


def test_a_change_through_a_view_is_a_change():
    tensor = torch.zeros(4)
    view = tensor[1:3]
    before = copy_of(tensor)
    view.fill_(7)
    assert copy_of(tensor).tolist() == [0, 7, 7, 0]
    assert before.tolist() == [0, 0, 0, 0]


def test_copies_may_take_part_in_autograd():
    with torch.inference_mode():
        copy = copy_of(torch.ones(3))
    weight = torch.ones(3, requires_grad=True)
    (weight * copy).sum().backward()  # saves the copy
    assert weight.grad.tolist() == [1, 1, 1]


def test_inference_tensors_do_not_count_their_changes_so_each_copy_is_new():
    with torch.inference_mode():
        tensor = torch.zeros(3)
        before = copy_of(tensor)
        tensor.add_(1)
        assert copy_of(tensor).tolist() == [1, 1, 1]
    assert before.tolist() == [0, 0, 0]


def rows(dtype, seed, shape=(6, 5, 3)):
    generator = torch.Generator().manual_seed(seed)
    return (100 * torch.randn(*shape, generator=generator)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(st.integers(0, 10**6))
def test_equal_rows_have_equal_fingerprints_wherever_they_stand(dtype, seed):
    tensor = rows(dtype, seed)
    shuffled = tensor[torch.tensor([3, 0, 0, 5, 1, 2])]
    assert torch.equal(row_hash(shuffled), row_hash(tensor)[torch.tensor([3, 0, 0, 5, 1, 2])])
    assert torch.equal(row_hash(tensor[2:4].clone()), row_hash(tensor)[2:4])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(st.integers(0, 10**6), st.integers(0, 14))
def test_one_changed_value_changes_the_fingerprint(dtype, seed, place):
    tensor = rows(dtype, seed)
    changed = tensor.clone()
    changed.flatten(1)[:, place] = ~changed.flatten(1)[:, place] if dtype is torch.bool else changed.flatten(1)[:, place] + 64
    assert not row_hash(tensor).eq(row_hash(changed)).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@given(st.integers(0, 10**6), st.sampled_from([-1.0, 2.0, -0.5, 1024.0]))
def test_structured_changes_change_the_fingerprint(dtype, seed, factor):
    """Signs and powers of two change few bits, the same ones in every value."""
    tensor = rows(dtype, seed, shape=(6, 8))
    assert not row_hash(tensor).eq(row_hash(tensor * factor)).any()
    assert not row_hash(tensor).eq(row_hash(tensor.flip(1))).any()


def test_many_near_rows_have_many_fingerprints():
    bits = torch.arange(4096)[:, None] >> torch.arange(12) & 1  # every row of twelve zeros and ones
    for dtype in (torch.float16, torch.float32, torch.float64, torch.int64, torch.bool):
        assert len(set(row_hash(bits.to(dtype)).tolist())) == 4096


def test_layout_in_memory_does_not_matter():
    tensor = torch.randn(4, 6, 5)
    transposed = tensor.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(row_hash(transposed), row_hash(tensor))
    assert torch.equal(row_hash(tensor[:1].expand(3, -1, -1)), row_hash(tensor)[:1].expand(3))


def test_no_rows_have_no_fingerprints():
    assert row_hash(torch.ones(0, 5, 6)).shape == (0,)
