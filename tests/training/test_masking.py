"""Which samples stay in the loss, and the mean over them."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import memhook

losses = st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=8)


def predictions(*norms):
    """Conditional and unconditional predictions whose magnitudes are these."""
    cond = torch.zeros(len(norms), 2, 3)
    cond[:, 1, 2] = torch.tensor(norms)
    return cond, torch.zeros_like(cond)


def test_a_sample_stays_until_it_surpasses_the_threshold():
    assert memhook.keep_mask(*predictions(3.9, 4.0, 4.1), threshold=4.0).tolist() == [True, True, False]


def test_each_sample_may_have_its_own_threshold():
    assert memhook.keep_mask(*predictions(1.0, 1.0), threshold=torch.tensor([0.5, 2.0])).tolist() == [False, True]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_norm_does_not_overflow_in_half_precision(dtype):
    cond = torch.full((1, 4, 64, 64), 8.0, dtype=dtype)  # the sum of squares is beyond float16
    assert memhook.keep_mask(cond, torch.zeros_like(cond), threshold=1025.0).tolist() == [True]
    assert memhook.keep_mask(cond, torch.zeros_like(cond), threshold=1023.0).tolist() == [False]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_broken_prediction_is_neither_kept_nor_dropped(bad):
    cond, uncond = predictions(1.0, bad)
    with pytest.raises(memhook.MemhookError, match=r"1 of 2 samples are NaN or infinite \(the first is sample 1\)"):
        memhook.keep_mask(cond, uncond, threshold=2.0)


@pytest.mark.parametrize(
    ("threshold", "message"),
    [
        (torch.ones(3), r"shape \(3,\) for a batch of 2; expected one number, or \(2,\)"),
        (torch.ones(2, 1), r"shape \(2, 1\)"),
        (math.nan, "at least 0"),
        (-1.0, "at least 0"),
        ("four", "threshold is a str"),
    ],
)
def test_a_threshold_that_does_not_fit_is_an_error(threshold, message):
    with pytest.raises(memhook.MemhookError, match=message):
        memhook.keep_mask(*predictions(1.0, 2.0), threshold=threshold)


def test_the_mask_takes_no_part_in_the_graph():
    cond, uncond = (tensor.requires_grad_() for tensor in predictions(1.0))
    assert not memhook.keep_mask(cond, uncond, threshold=1.0).requires_grad


@given(losses, st.data())
def test_the_mean_is_that_of_the_kept_samples(values, data):
    keep = data.draw(st.lists(st.booleans(), min_size=len(values), max_size=len(values)))
    loss = torch.tensor(values, requires_grad=True)
    kept = [value for value, stays in zip(values, keep, strict=True) if stays]
    for normalize, divisor in (("kept", max(1, len(kept))), ("batch", len(values))):
        loss.grad = None
        mean = memhook.masked_mean(loss, torch.tensor(keep), normalize=normalize)
        assert float(mean.detach()) == pytest.approx(sum(kept) / divisor, rel=1e-4, abs=1e-4)
        mean.backward()
        assert loss.grad.tolist() == pytest.approx([stays / divisor for stays in keep])


def test_of_a_dropped_batch_remain_a_zero_and_gradients_of_zero():
    loss = torch.tensor([1.0, 2.0], requires_grad=True)
    mean = memhook.masked_mean(loss, torch.tensor([False, False]))
    mean.backward()
    assert mean == 0
    assert loss.grad.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("broken", [math.inf, math.nan])
def test_the_loss_of_a_dropped_sample_may_be_broken(broken):
    loss = torch.tensor([1.0, broken], requires_grad=True)
    mean = memhook.masked_mean(loss, torch.tensor([True, False]))
    mean.backward()
    assert mean == 1
    assert loss.grad.tolist() == [1.0, 0.0]


def test_a_broken_loss_of_a_kept_sample_shows():
    assert memhook.masked_mean(torch.tensor([1.0, math.nan]), torch.tensor([True, True])).isnan()


def test_a_loss_of_every_element_is_averaged_over_the_kept_samples():
    loss = torch.rand(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    keep = torch.tensor([True, False, True])
    torch.testing.assert_close(memhook.masked_mean(loss, keep), loss[keep].mean())


def test_half_precision_losses_are_added_in_float32():
    loss = torch.full((4,), 60_000.0, dtype=torch.float16)  # their sum is infinite in float16
    assert memhook.masked_mean(loss, torch.ones(4, dtype=torch.bool)) == 60_000


@pytest.mark.parametrize(
    ("loss", "keep", "message"),
    [
        (torch.tensor(1.0), torch.tensor([True]), 'use reduction="none"'),
        (torch.ones(3), torch.tensor([True, False]), r"loss has shape \(3,\), .* batch of 2"),
        (torch.ones(2), torch.tensor([1, 0]), "keep is torch.int64"),
        (torch.ones(2), torch.tensor([[True, False]]), r"keep is torch.bool of shape \(1, 2\)"),
        (torch.ones(2, dtype=torch.int64), torch.tensor([True, False]), "floating point"),
    ],
)
def test_a_loss_that_does_not_fit_is_an_error(loss, keep, message):
    with pytest.raises(memhook.MemhookError, match=message):
        memhook.masked_mean(loss, keep)


def test_the_divisor_must_be_one_of_two():
    with pytest.raises(memhook.MemhookError, match="normalize is 'sum'"):
        memhook.masked_mean(torch.ones(2), torch.tensor([True, False]), normalize="sum")
