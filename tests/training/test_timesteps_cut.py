"""Judging only some timesteps: what is cut to their rows of the batch, what is not, and when the whole batch is passed."""

import contextlib
import warnings

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

import memhook
from memhook.testing import tiny_unet
from tests.training.judged import NOTHING, batch, filtered
from tests.training.models import NULL, Plain, dropping, gradients, losses_of, low_rank_unet


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
