"""The magnitude, against the equation as it is written."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import memhook
from memhook import Evaluation, MemhookError, NoGuidanceError, ReplayError, magnitude


def transcription(pred_cond, pred_uncond):
    """``m_i = || eps_c_i - eps_u_i ||_2`` (Wen et al. 2024, section 3.3), one Python float at a time."""
    norms = []
    for cond, uncond in zip(pred_cond.double(), pred_uncond.double(), strict=True):
        total = 0.0
        for c, u in zip(cond.flatten().tolist(), uncond.flatten().tolist(), strict=True):
            total += (c - u) ** 2
        norms.append(math.sqrt(total))
    return torch.tensor(norms, dtype=torch.float64)


@st.composite
def predictions(draw, dtype=torch.float32):
    """A pair of predictions of one to five samples, of several shapes and orders of magnitude."""
    samples = draw(st.integers(1, 5))
    shape = draw(st.sampled_from([(7,), (3, 4), (4, 5, 5), (2, 3, 4, 4)]))
    scale = draw(st.sampled_from([1e-3, 1.0, 50.0]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    cond, uncond = (scale * torch.randn(samples, *shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return cond.to(dtype), uncond.to(dtype)


@given(predictions())
def test_agrees_with_the_equation(pair):
    torch.testing.assert_close(magnitude(*pair).double(), transcription(*pair), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@given(data=st.data())
def test_agrees_with_the_equation_in_every_dtype(dtype, data):
    pair = data.draw(predictions(dtype))
    found = magnitude(*pair)
    assert found.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
    torch.testing.assert_close(found.double(), transcription(*pair), rtol=1e-5, atol=0)


@given(predictions())
def test_symmetric_to_the_last_bit(pair):
    cond, uncond = pair
    assert torch.equal(magnitude(cond, uncond), magnitude(uncond, cond))


@given(predictions(), st.sampled_from([-2.0, 0.0, 0.25, 3.0]))
def test_scales_with_the_predictions(pair, factor):
    cond, uncond = pair
    torch.testing.assert_close(magnitude(factor * cond, factor * uncond), abs(factor) * magnitude(cond, uncond), rtol=1e-5, atol=1e-12)


@given(predictions(), predictions())
def test_ignores_what_both_predictions_share(pair, other):
    cond, uncond = (tensor.double() for tensor in pair)
    shift = other[0].double().mean()
    torch.testing.assert_close(magnitude(cond + shift, uncond + shift), magnitude(cond, uncond), rtol=1e-9, atol=1e-12)


@given(predictions(), st.data())
def test_is_per_sample_whatever_the_batch(pair, data):
    """A batch gives each sample the number that it has alone; the authors' code takes one norm over the whole batch."""
    cond, uncond = pair
    split = data.draw(st.integers(0, len(cond)))
    parts = [magnitude(cond[rows], uncond[rows]) for rows in (slice(0, split), slice(split, None)) if len(cond[rows])]
    torch.testing.assert_close(torch.cat(parts), magnitude(cond, uncond), rtol=1e-6, atol=0)


@given(predictions(), st.randoms(use_true_random=False))
def test_follows_the_order_of_the_samples(pair, random):
    cond, uncond = pair
    order = list(range(len(cond)))
    random.shuffle(order)
    torch.testing.assert_close(magnitude(cond[order], uncond[order]), magnitude(cond, uncond)[order], rtol=1e-6, atol=0)


@given(predictions())
def test_zero_for_equal_predictions_only(pair):
    cond, uncond = pair
    assert torch.equal(magnitude(cond, cond), torch.zeros(len(cond)))
    assert (magnitude(cond, uncond) > 0).all()


def test_half_precision_squares_do_not_overflow():
    cond = torch.full((2, 4, 8, 8), 300.0, dtype=torch.float16)  # 300 squared is beyond 65504
    assert torch.isinf(cond.square()).all()
    assert magnitude(cond, torch.zeros_like(cond)).tolist() == [4800.0, 4800.0]


def test_half_precision_differences_do_not_overflow():
    cond = torch.full((1, 4), 60000.0, dtype=torch.float16)
    assert magnitude(cond, -cond).tolist() == [240000.0]


def test_accumulates_in_float32_under_autocast():
    cond, uncond = torch.randn(3, 4, 16, 16), torch.randn(3, 4, 16, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = magnitude(cond, uncond)
    assert found.dtype is torch.float32
    assert torch.equal(found, magnitude(cond, uncond))


def test_dtypes_may_differ():
    cond = torch.randn(2, 8)
    torch.testing.assert_close(magnitude(cond.half(), cond.double()), transcription(cond.half(), cond), rtol=1e-6, atol=0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_broken_value_is_not_hidden(value):
    cond = torch.zeros(2, 4, 4)
    cond[1, 2, 3] = value
    found = magnitude(cond, torch.zeros_like(cond))
    assert found[0] == 0
    assert not torch.isfinite(found[1])


def test_is_differentiable():
    cond = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    uncond = torch.randn(2, 3, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda c: magnitude(c, uncond), cond)


@pytest.mark.parametrize(
    ("cond", "uncond", "message"),
    [
        (torch.ones(2, 4), torch.ones(1, 4), r"\(2, 4\).*\(1, 4\)"),  # would broadcast
        (torch.ones(4, 4, 8), torch.ones(2, 4, 8), r"\(4, 4, 8\).*\(2, 4, 8\).*halves"),
        (torch.ones(2, 4), torch.ones(2, 4, 1), r"\(2, 4\).*\(2, 4, 1\)"),
        (torch.ones(4), torch.ones(4), r"\(4,\).*batch axis"),
        (torch.tensor(1.0), torch.tensor(1.0), r"\(\).*batch axis"),
        (torch.ones(2, 4, dtype=torch.int64), torch.ones(2, 4), "int64.*float32.*floating point"),
        (torch.ones(2, 4), torch.ones(2, 4, dtype=torch.complex64), "float32.*complex64"),
    ],
)
def test_wrong_predictions_are_named(cond, uncond, message):
    with pytest.raises(MemhookError, match=message):
        magnitude(cond, uncond)


def test_objective_without_unconditional_prediction():
    with pytest.raises(NoGuidanceError, match=r"no unconditional prediction.*scale above 1"):
        Evaluation(torch.ones(2, 4), None).objective(torch.ones(2, 5, 6))


def test_objective_without_a_kept_call():
    with pytest.raises(ReplayError, match='keep="calls"'):
        Evaluation(torch.ones(2, 4), torch.zeros(2, 4), embedding=torch.ones(2, 5, 6)).objective(torch.ones(2, 5, 6))


def test_objective_without_a_known_embedding():
    with pytest.raises(ReplayError, match=r"no text embedding.*embedding=\.\.\."):
        Evaluation(torch.ones(2, 4), torch.zeros(2, 4)).objective(torch.ones(2, 5, 6))


def test_objective_is_the_magnitude_of_the_replay():
    replayed, uncond = torch.randn(2, 4), torch.randn(2, 4)
    evaluation = Evaluation(torch.zeros(2, 4), uncond, replay=lambda embedding: replayed + embedding.mean())
    assert torch.equal(evaluation.objective(torch.zeros(2, 5, 6)), memhook.magnitude(replayed, uncond))
