"""Judging only some timesteps: the pass is made for their rows of the batch alone, and changes nothing about the verdicts."""

import contextlib
import math
import warnings

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import memhook
from memhook.testing import tiny_unet
from memhook.training import BinnedThreshold, FilterCalibration
from tests.training.models import NULL, Plain, dropping, embeddings, gradients, losses_of, low_rank_unet, pairs

NOTHING = torch.zeros(5, 6)  # the tiny UNet's null embedding


def filtered(model, threshold=4.0, timesteps=(800, 999), **options):
    return memhook.training_filter(model, **{"null_embedding": NULL, "threshold": threshold, "timesteps": timesteps, **options})


def batch(*levels, t):
    sample, _, text, target = pairs(*levels)
    return sample, torch.tensor(t), text, target


def raises(*parts):
    return pytest.raises(memhook.MemhookError, match=".*".join(parts))


# What is judged


def test_only_samples_at_judged_timesteps_are_dropped():
    model, (sample, t, text, target) = Plain(), batch(3.0, 3.0, 0.5, 3.0, 3.0, t=[799, 800, 900, 999, 10])
    with filtered(model) as f:
        loss = f.mean(losses_of(model(sample, t, text), target), keys="abcde")
    kept = [0, 2, 4]  # of magnitudes 6, 6, 1, 6, 6
    torch.testing.assert_close(loss, losses_of(model(sample, t, text), target)[kept].mean())
    report = f.report()
    assert (report.samples, report.judged, report.dropped, report.passed) == (5, 3, 2, 3)
    assert {row.key: round(row.magnitude, 4) for row in report.rows} == {"b": 6.0, "c": 1.0, "d": 6.0}


def test_the_pass_is_made_for_the_judged_rows_alone():
    model = Plain()
    with filtered(model) as f:
        for _ in range(3):
            sample, t, text, target = batch(3.0, 3.0, 0.5, t=[799, 800, 900])
            f.mean(losses_of(model(sample, t, text), target))
    passed = [(t.tolist(), with_grad) for t, with_grad, _ in model.calls]
    own, extra = ([799, 800, 900], True), ([800, 900], False)
    assert passed == [own, extra, extra, own, extra, own, extra]  # once more at first: whether a part of the batch gives the same prediction


def test_without_a_judged_sample_there_is_no_pass():
    model, (sample, t, text, target) = Plain(), batch(3.0, 3.0, t=[799, 10])
    with filtered(model) as f:
        loss = f.mean(losses_of(model(sample, t, text), target))
    assert len(model.calls) == 1
    torch.testing.assert_close(loss, losses_of(model(sample, t, text), target).mean())
    report = f.report()
    assert (report.steps, report.passes, report.passed, report.judged, report.dropped) == (1, 0, 0, 0, 0)


def test_samples_that_are_unconditional_already_need_no_pass():
    model, (sample, t, text, target) = Plain(), batch(0.0, 3.0, 0.0, t=[900, 900, 10])
    with filtered(model, threshold=0.0) as f:
        f.mean(losses_of(model(sample, t, text), target))
    assert (f.report().passed, f.report().judged, f.report().dropped) == (1, 1, 1)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 999), min_size=1, max_size=6), st.integers(0, 999), st.integers(0, 999), st.floats(0.1, 3.0))
def test_verdicts_are_those_of_a_threshold_that_is_infinite_elsewhere(timesteps, a, b, tau):
    low, high = sorted((a, b))
    unet = tiny_unet()
    generator = torch.Generator().manual_seed(len(timesteps))
    sample, text = torch.randn(len(timesteps), 4, 8, 8, generator=generator), torch.randn(len(timesteps), 5, 6, generator=generator)
    t, found = torch.tensor(timesteps), []
    for threshold, options in (
        (lambda t: torch.where((t >= low) & (t <= high), tau, torch.inf), {}),
        (tau, {"timesteps": (low, high)}),
    ):
        with memhook.training_filter(unet, null_embedding=NOTHING, threshold=threshold, **options) as f:
            unet(sample, t, text)
            keep = f.keep(keys=range(len(timesteps)))
        found.append((keep, {row.key: row.magnitude for row in f.report().rows}))
    (whole, all_magnitudes), (part, magnitudes) = found
    assert part.tolist() == whole.tolist()
    assert sorted(magnitudes) == [i for i, value in enumerate(timesteps) if low <= value <= high]
    assert magnitudes == pytest.approx({key: all_magnitudes[key] for key in magnitudes}, rel=1e-3)


@pytest.mark.parametrize(
    ("t", "timesteps"),
    [
        ([0.85, 0.2], (0.8, 1.0)),  # flow, 1 is noise
        ([0.1, 0.9], (0.0, 0.2)),  # flow, 0 is noise
        ([850.5, 200.0], (800, 1000)),  # flow in thousandths
        ([0.8, 0.7], (0.8, 1.0)),  # the nearest float32 of the end
        ([850, 20], lambda t: t > 500),
        ([850, 20], lambda t: [True, False]),
    ],
)
def test_the_range_is_in_the_unit_of_the_denoiser(t, timesteps):
    model, (sample, t, text, _) = Plain(), batch(3.0, 3.0, t=t)
    with filtered(model, timesteps=timesteps) as f:
        model(sample, t, text)
        assert f.keep().tolist() == [False, True]
    assert f.report().passed == 1


@pytest.mark.parametrize(("t", "expected"), [(torch.tensor(900), [False, True]), (900, [False, True]), (3, [True, True])])
def test_one_timestep_for_the_whole_batch(t, expected):
    model, (sample, _, text, _) = Plain(), pairs(3.0, 0.5)
    with filtered(model) as f:
        model(sample, t, text)
        assert f.keep().tolist() == expected


# What is cut


class Many(nn.Module):
    """Takes what is there for each sample in every way, and for all of them."""

    def __init__(self):
        super().__init__()
        self.got = []

    def forward(self, sample, timestep, encoder_hidden_states, *, added, residuals, shared, lengths, size):
        self.got.append((sample, added, residuals, shared, lengths, size))
        level = encoder_hidden_states.mean((1, 2)) + added["nested"]["pooled"][:, 0] * torch.tensor(lengths)
        assert len(lengths) == len(sample)
        return sample * shared + residuals[0] + residuals[1] ** 2 + level[:, None, None, None] * size[0]


def many(levels, t):
    sample, t, text, target = batch(*levels, t=t)
    count = len(levels)
    generator = torch.Generator().manual_seed(7)
    rows = {name: torch.randn(count, 1, 2, 2, generator=generator) for name in ("first", "second")}
    arguments = {
        "added": {"nested": {"pooled": torch.rand(count, 2, generator=generator)}},
        "residuals": (rows["first"], rows["second"]),
        "shared": torch.tensor([[[[1.5]]]]),
        "lengths": list(range(1, count + 1)),
        "size": (2.0, 3.0, 4.0, 5.0, 6.0),
    }
    return (sample.requires_grad_(), t, text), arguments, target


def test_every_argument_with_a_row_for_each_sample_is_cut_and_no_other():
    model, rows = Many(), [1, 3]
    args, kwargs, target = many((0.5, 3.0, 1.0, -2.0), [10, 900, 20, 950])
    with filtered(model, threshold=None) as f:
        f.mean(losses_of(model(*args, **kwargs), target), keys="abcd")
    sample, added, residuals, shared, lengths, size = model.got[-1]
    assert torch.equal(sample, args[0][rows])
    assert torch.equal(added["nested"]["pooled"], kwargs["added"]["nested"]["pooled"][rows])
    assert isinstance(residuals, tuple)
    assert all(torch.equal(part, whole[rows]) for part, whole in zip(residuals, kwargs["residuals"], strict=True))
    assert shared is kwargs["shared"]
    assert lengths == [2, 4]
    assert size == kwargs["size"]
    expected = {"b": 3.0, "d": -2.0}  # size[0] * level * two; everything else cancels
    assert {row.key: row.magnitude for row in f.report().rows} == pytest.approx({key: 4 * abs(level) for key, level in expected.items()}, rel=1e-5)


class Shared(Plain):
    """Has one table for all samples, as long as the batch by accident."""

    def forward(self, sample, timestep, encoder_hidden_states, table):
        return super().forward(sample, timestep, encoder_hidden_states) + table.sum()


def test_a_shared_tensor_as_long_as_the_batch_is_told_from_rows_of_samples():
    model, (sample, t, text, target) = Shared(), batch(3.0, 3.0, 0.5, t=[900, 20, 950])
    table = torch.tensor([1.0, 2.0, 3.0])

    def step(count):
        f.mean(losses_of(model(sample[:count], t[:count], text[:count], table), target[:count]), keys="abc"[:count])

    with filtered(model) as f:
        with pytest.warns(UserWarning, match=r"whole batch.*gives another prediction \(relative difference"):
            step(3)
        step(3)  # said once
        step(2)  # no accident
    assert (f.report().passed, f.report().samples) == (3 + 3 + 1, 8)
    assert {row.key: (row.judged, row.dropped, round(row.magnitude, 4)) for row in f.report().rows} == {"a": (3, 3, 6.0), "c": (2, 0, 1.0)}


def test_a_denoiser_that_takes_no_other_batch_gets_the_whole_one():
    class Reshaping(Plain):
        def forward(self, sample, timestep, encoder_hidden_states):
            return super().forward(sample.reshape(3, 1, 2, 2), timestep, encoder_hidden_states)

    model, (sample, t, text, target) = Reshaping(), batch(3.0, 3.0, 0.5, t=[900, 20, 950])
    with filtered(model) as f, pytest.warns(UserWarning, match=r"whole batch.*RuntimeError: shape"):
        f.mean(losses_of(model(sample, t, text), target))
    assert (f.report().passed, f.report().judged, f.report().dropped) == (3, 2, 1)


class Rounding(Plain):
    """Its prediction differs by a hundredth in a batch of another size, as kernels of half precision do."""

    def forward(self, sample, timestep, encoder_hidden_states):
        return super().forward(sample, timestep, encoder_hidden_states) * (1 + 0.01 * (len(sample) == 3))


@pytest.mark.parametrize("precision", ["float32", "bfloat16 weights", "autocast", "accelerate"])
def test_what_rounding_may_cause_depends_on_the_precision_of_the_pass(precision):
    model, (sample, t, text, target) = Rounding(), batch(3.0, 3.0, 0.5, t=[900, 20, 950])
    if precision == "bfloat16 weights":
        model, sample, text = model.bfloat16(), sample.bfloat16(), text.bfloat16()
    if precision == "accelerate":
        AcceleratorState._reset_state(reset_partial_state=True)
        model = Accelerator(cpu=True, mixed_precision="bf16").prepare(model)
        AcceleratorState._reset_state(reset_partial_state=True)
    refused = pytest.warns(UserWarning, match="whole batch") if precision == "float32" else contextlib.nullcontext()
    with refused, filtered(model) as f:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "autocast"):
            predicted = model(sample, t, text)
        f.mean(losses_of(predicted.float(), target))
    assert f.report().passed == (3 if precision == "float32" else 2)


def three(model, *, t=(10, 900, 950), **options):
    """Magnitudes by key after one step on three samples."""
    sample, t, text, target = batch(0.5, 3.0, -1.0, t=list(t))
    torch.manual_seed(0)
    with memhook.training_filter(model, null_embedding=NULL, threshold=None, **options) as f:
        f.mean(losses_of(model(sample, t, text), target), keys=range(3))
    return {row.key: row.magnitude for row in f.report().rows}, f.report().passed, torch.rand(2).tolist()


def test_dropout_falls_in_the_whole_batch_as_in_the_loop():
    model = dropping(norm=False)
    expected, _, drawn = three(model)
    with pytest.warns(UserWarning, match=r"drew random numbers \(dropout\)"):
        found, passed, after = three(model, timesteps=(800, 999))
    assert found == {1: expected[1], 2: expected[2]}  # to the last bit: the same masks
    assert (passed, after) == (3, drawn)
    found, passed, _ = three(model.eval(), timesteps=(800, 999))
    assert passed == 2


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_layers_that_mix_the_rows_see_the_whole_batch(mode):
    model = dropping()
    model.dropout.p = 0.0
    getattr(model, mode)()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found, passed, _ = three(model, timesteps=(800, 999))
    state = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.load_state_dict(before, strict=False)
    expected, _, _ = three(model)
    assert found == pytest.approx({1: expected[1], 2: expected[2]}, rel=1e-5)
    assert (passed, len(told)) == ((3, 1) if mode == "train" else (2, 0))
    for name, buffer in model.named_buffers():  # running statistics moved once, by the loop's own pass
        assert torch.equal(buffer, state[name]), name


# What stays as it is


@pytest.mark.parametrize("checkpointed", [None, False, True], ids=["plain", "checkpointed", "reentrant"])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_filter_that_keeps_all_changes_nothing(checkpointed, autocast):
    found = []
    for watched in (False, True):
        model = dropping(checkpointed=checkpointed, norm=False)
        model.dropout.p = 0.0
        sample, t, text, target = batch(0.5, 3.0, -1.0, t=[10, 900, 950])
        with filtered(model, threshold=torch.inf) as f, torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            for _ in range(2):
                if watched:
                    f.mean(losses_of(model(sample, t, text).float(), target)).backward()
                else:
                    with f.paused():
                        losses_of(model(sample, t, text).float(), target).mean().backward()
        assert f.report().passed == (4 if watched else 0)
        found.append(gradients(model))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


def test_only_the_adapters_of_a_frozen_model_are_trained():
    generator = torch.Generator().manual_seed(0)
    sample, text = torch.randn(3, 4, 8, 8, generator=generator), torch.randn(3, 5, 6, generator=generator)
    t = torch.tensor([900, 20, 950])

    def losses(unet):
        return (unet(sample, t, text) - sample).square().mean((1, 2, 3))

    watched, twin = low_rank_unet(), low_rank_unet()
    with filtered(watched, threshold=0.0, null_embedding=NOTHING) as f:
        f.mean(losses(watched)).backward()
    losses(twin)[1].backward()  # the other two are judged, and dropped
    for (name, a), (_, b) in zip(watched.named_parameters(), twin.named_parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None) == ("lora" not in name), name
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_model_in_another_dtype(dtype):
    model, (sample, t, text, target) = Plain().to(dtype), batch(3.0, 0.5, 3.0, t=[900, 950, 10])
    with filtered(model) as f:
        f.mean(losses_of(model(sample.to(dtype), t, text.to(dtype)), target.to(dtype))).backward()
    assert (f.report().passed, f.report().judged, f.report().dropped) == (2, 2, 1)


def test_a_compiled_denoiser_is_called_on_a_part_of_the_batch():
    torch._dynamo.reset()
    model = tiny_unet()
    compiled = torch.compile(model, backend="aot_eager")
    generator = torch.Generator().manual_seed(0)
    sample, text = torch.randn(4, 4, 8, 8, generator=generator), torch.randn(4, 5, 6, generator=generator)
    found = {}
    for denoiser in (model, compiled):
        with filtered(denoiser, threshold=None, null_embedding=NOTHING) as f:
            for t in ([900, 10, 20, 950], [10, 900, 950, 999]):
                f.mean((denoiser(sample, torch.tensor(t), text) - sample).square(), keys=range(4))
        assert f.report().passed == 5
        found[denoiser] = {row.key: row.magnitude for row in f.report().rows}
    torch._dynamo.reset()
    assert found[compiled] == pytest.approx(found[model], rel=1e-4)


def test_a_learned_variance_is_no_part_of_the_magnitude():
    unet = tiny_unet(learned_variance=True)
    sample, t, text = torch.randn(3, 4, 8, 8), torch.tensor([900, 5, 950]), torch.randn(3, 5, 6)
    with filtered(unet, threshold=None, null_embedding=NOTHING) as f:
        f.mean(unet(sample, t, text).square(), keys=[0, 1, 2])
    with torch.no_grad():
        halves = [unet(sample, t, embedding)[:, :4] for embedding in (text, NOTHING.expand(3, 5, 6))]
    expected = memhook.magnitude(*halves)
    assert {row.key: row.magnitude for row in f.report().rows} == pytest.approx({0: float(expected[0]), 2: float(expected[2])}, rel=1e-4)


def test_the_null_embedding_of_a_trained_text_encoder_is_asked_for_once_a_pass():
    model, asked = Plain(), []

    def null():
        asked.append(1)
        return NULL

    with filtered(model, null_embedding=null) as f:
        for timesteps in ([10, 900], [10, 20], [10, 30], [900, 950]):
            sample, t, text, target = batch(3.0, 0.5, t=timesteps)
            f.mean(losses_of(model(sample, t, text), target))
    assert len(asked) == 2


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_judged_prediction_that_is_not_finite(bad):
    model, (sample, t, text, target) = Plain(), batch(bad, 0.5, 3.0, t=[900, 10, 950])
    with raises("NaN or infinite", "first is sample 0"), filtered(model) as f:
        f.mean(losses_of(model(sample, t, text), target))
    with filtered(model, on_nonfinite="keep") as f:
        model(sample, t, text)
        assert f.keep().tolist() == [True, True, False]
    assert f.report().nonfinite == 1


# Calibration


def observed(timesteps=None, seeds=60):
    model = Plain()
    with memhook.training_filter(model, null_embedding=NULL, threshold=None, timesteps=timesteps) as f, torch.no_grad():
        for seed in range(seeds):
            sample, t, text, _ = pairs(0.5, 0.6, 0.7, 0.8, seed=seed)
            model(sample, t, text * (1 + t[:, None, None] / 1000))
            f.keep()
    return f


def test_a_calibration_of_judged_timesteps_has_its_bins_inside_of_them():
    calibration = observed((800, 999)).calibration(bins=3)
    assert calibration.span == (800, 999)
    assert 800 <= calibration.timesteps.min() < calibration.edges[0] < calibration.edges[-1] < calibration.timesteps.max() <= 999
    sizes = [len(part) for part in calibration.bins()]
    assert len(sizes) == 3
    assert max(sizes) - min(sizes) <= 2
    assert sum(sizes) == observed((800, 999)).report().judged


def test_a_part_of_a_calibration_is_that_of_a_run_that_judged_that_part():
    part, own = observed().calibration().within(800, 999, bins=3), observed((800, 999)).calibration(bins=3)
    assert (part.span, part.edges, part.shape) == (own.span, own.edges, own.shape)
    assert np.array_equal(part.timesteps, own.timesteps)
    np.testing.assert_allclose(part.magnitudes, own.magnitudes, rtol=1e-5)


def test_a_threshold_knows_where_it_was_calibrated(tmp_path):
    """Without timesteps= it is judged there, and beyond it nothing is flagged."""
    observed((800, 999)).calibration(bins=1).save(tmp_path / "tau.safetensors")
    threshold = FilterCalibration.load(tmp_path / "tau.safetensors").threshold(fpr=0.2)
    assert threshold(torch.tensor([799, 800, 999, 1000])).tolist() == pytest.approx([math.inf, threshold.values[0], threshold.values[0], math.inf])
    model, (sample, t, text, _) = Plain(), batch(9.0, 9.0, 0.1, t=[700, 900, 950])
    with memhook.training_filter(model, null_embedding=NULL, threshold=threshold) as f:
        model(sample, t, text)
        assert f.keep().tolist() == [True, False, True]
    assert f.report().passed == 2
    with filtered(model, threshold, timesteps=(900, 920)) as f:  # inside of it
        model(sample, t, text)
        assert f.keep().tolist() == [True, False, True]
    assert f.report().passed == 1


def test_a_part_without_presentations():
    with pytest.raises(memhook.CalibrationError, match="0 presentations cannot be divided"):
        FilterCalibration.fit(np.arange(100), np.ones(100)).within(800, 999)


# Errors


@pytest.mark.parametrize(
    ("timesteps", "message"),
    [
        ((999, 800), r"timesteps is \(999, 800\).*lower one first"),
        ((0.8, math.nan), "two finite numbers"),
        ((0, math.inf), "two finite numbers"),
        ((1, 2, 3), r"expected a range \(lowest, highest\)"),
        (800, r"timesteps is 800; expected a range"),
        ("ab", "expected a range"),
    ],
)
def test_ranges_that_are_none(timesteps, message):
    with raises(message):
        filtered(Plain(), timesteps=timesteps)


@pytest.mark.parametrize(
    ("function", "message"),
    [(lambda t: t, "returned torch.int64"), (lambda t: t[:1] > 0, r"of shape \(1,\) for 2 timesteps"), (lambda t: True, r"of shape \(\)")],
)
def test_functions_that_do_not_fit(function, message):
    model, (sample, t, text, _) = Plain(), pairs(0.5, 3.0)
    with raises(message, "expected bool of the same shape"), filtered(model, timesteps=function) as f:
        model(sample, t, text)
        f.keep()


def test_a_denoiser_that_is_given_no_timestep():
    class Timeless(nn.Module):
        def forward(self, sample, *, encoder_hidden_states):
            return sample + encoder_hidden_states.mean((1, 2))[:, None, None, None]

    model, (sample, _, text, _) = Timeless(), pairs(0.5, 3.0)
    with raises("given none that was recognized", "leave out timesteps="), filtered(model) as f, torch.no_grad():
        model(sample, encoder_hidden_states=text)
        f.keep()


def test_a_threshold_that_was_calibrated_on_less():
    threshold = BinnedThreshold((), (4.0,), span=(800.0, 999.0))
    with raises(r"timesteps is \(500, 999\), and the threshold was calibrated from 800 to 999"):
        filtered(Plain(), threshold, timesteps=(500, 999))


def test_a_range_that_the_loop_never_meets_is_said_once():
    model, (sample, _, text, _) = Plain(), pairs(3.0, 3.0)

    def step():
        model(sample, torch.tensor([0.25, 0.75]), text)
        f.keep()

    with filtered(model) as f:
        for _ in range(249):
            step()
        with pytest.warns(UserWarning, match=r"none of 500 presentations was judged: their timesteps are 0.25 to 0.75, and judged is 800 to 999"):
            step()
        for _ in range(251):
            step()


def test_a_null_embedding_that_does_not_fit_is_told_before_a_sample_is_judged():
    model, (sample, t, text, _) = Plain(), batch(3.0, 3.0, t=[10, 20])
    with raises("the null embedding"), filtered(model, null_embedding=torch.zeros(3, 4)) as f:
        model(sample, t, text)
        f.keep()


def test_an_argument_is_changed_in_place_before_the_mean():
    model, (sample, t, text, target) = Plain(), batch(0.5, 3.0, t=[10, 900])
    with raises("changed in place"), filtered(model) as f:
        losses = losses_of(model(sample, t, text), target)
        text.add_(embeddings(1.0, 1.0))
        f.mean(losses)
