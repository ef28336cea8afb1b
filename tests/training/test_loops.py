"""The filter in loops as people write them: precision, accumulation, checkpointing, weights, adapters, averages, compilation."""

import contextlib
import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import memhook
from memhook.testing import tiny_unet
from tests.training.models import NULL, Plain, dropping, embeddings, gradients, losses_of, low_rank_unet, pairs

NOTHING = torch.zeros(5, 6)  # the tiny UNet's null embedding


def backward(model, f=None, *, steps=2, around=lambda model: model):
    """Two accumulated steps of a loop with dropout; with a filter or without."""
    torch.manual_seed(0)
    for number in range(steps):
        sample, t, text, target = pairs(0.5, 3.0, -1.0, seed=number)
        losses = losses_of(around(model)(sample, t, text), target)
        (losses.mean() if f is None else f.mean(losses)).div(steps).backward()
    return gradients(model), torch.rand(3)  # and what the loop would draw next


@pytest.mark.parametrize("checkpointed", [None, False, True], ids=["plain", "checkpointed", "reentrant"])
def test_a_filter_that_keeps_all_changes_nothing(checkpointed):
    """Gradients, random numbers and running statistics are those of the loop without it, to the last bit."""
    plain, watched = dropping(checkpointed=checkpointed), dropping(checkpointed=checkpointed)
    expected, drawn = backward(plain)
    with memhook.training_filter(watched, null_embedding=NULL, threshold=torch.inf) as f:
        found, after = backward(watched, f)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(after, drawn)
    for (name, a), (_, b) in zip(watched.named_buffers(), plain.named_buffers(), strict=True):
        assert torch.equal(a, b), name
    assert f.report().passes == f.report().steps == 2


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_denoiser_that_is_checkpointed_as_a_whole_is_recorded_once(reentrant):
    def around(model):
        return lambda sample, t, text: checkpoint(model, sample.requires_grad_(), t, text, use_reentrant=reentrant)

    plain, watched = dropping(), dropping()
    expected, _ = backward(plain, around=around)
    with memhook.training_filter(watched, null_embedding=NULL, threshold=torch.inf) as f:
        found, _ = backward(watched, f, around=around)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    report = f.report()
    assert (report.steps, report.samples) == (2, 6)


def test_dropout_falls_alike_in_both_passes():
    """An embedding that stands for nothing gives a magnitude of zero, whatever dropout does; another pass would not."""
    model, (sample, t, text, target) = dropping(norm=False), pairs(0.0, 2.0)
    almost = text.clone()
    almost[0] += 1e-3  # not recognized as the null embedding, so it is judged
    with memhook.training_filter(model, null_embedding=NULL, threshold=None) as f:
        f.mean(losses_of(model(sample, t, almost), target), keys=["nothing", "something"])
    magnitudes = {row.key: row.magnitude for row in f.report().rows}
    assert magnitudes["nothing"] < 1e-2 < magnitudes["something"]
    with torch.no_grad():
        masks_apart = memhook.magnitude(model(sample, t, text), model(sample, t, text))
    assert float(masks_apart[0]) > 0.05


def test_the_pass_runs_in_the_mode_of_the_loop():
    model, (sample, t, text, target) = Plain(), pairs(0.5)
    for training in (True, False):
        model.train(training)
        model.calls.clear()
        with memhook.training_filter(model, null_embedding=NULL, threshold=9.0) as f:
            f.mean(losses_of(model(sample, t, text), target))
        assert [mode for _, _, mode in model.calls] == [training, training]
        assert model.training is training


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inside", [True, False], ids=["mean inside autocast", "mean outside"])
def test_autocast_gives_the_gradients_of_the_loop_without_the_filter(dtype, inside):
    """Weights that the extra pass casts must not be handed to the next pass, which would have no gradient for them."""

    def run(model, f):
        with torch.autocast("cpu", dtype=dtype):
            total = 0.0
            for seed in range(2):
                generator = torch.Generator().manual_seed(seed)
                sample, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, 6, generator=generator)
                losses = (model(sample, torch.tensor([9, 800]), text).float() - sample).square().mean((1, 2, 3))
                if f is None:
                    total = total + losses.mean()
                elif inside:
                    total = total + f.mean(losses)
                else:
                    with torch.autocast("cpu", enabled=False):
                        total = total + f.mean(losses)
        total.backward()
        return gradients(model)

    expected = run(tiny_unet(), None)
    unet = tiny_unet()
    with memhook.training_filter(unet, null_embedding=NOTHING, threshold=1e9) as f:
        found = run(unet, f)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert all(gradient.abs().sum() > 0 for gradient in found)


def test_weights_cast_by_the_pass_are_not_handed_to_the_next_call():
    """The mean stands in an autocast block of its own, before the next call: the pass is the first to cast the weights there."""
    generator = torch.Generator().manual_seed(0)
    sample, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, 6, generator=generator)
    found = []
    for threshold in (None, 1e9):
        unet = tiny_unet()
        filtered = memhook.training_filter(unet, null_embedding=NOTHING, threshold=1e9)
        with filtered as f:
            mean = torch.mean if threshold is None else f.mean
            with f.paused() if threshold is None else contextlib.nullcontext():
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    losses = unet(sample, 5, text).float().square().mean((1, 2, 3))
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    total = mean(losses)
                    total = total + mean(unet(sample, 700, text).float().square().mean((1, 2, 3)))
            total.backward()
        found.append(gradients(unet))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


def test_the_pass_has_the_precision_of_the_loop():
    unet, dtypes = tiny_unet(), []
    unet.leave.register_forward_hook(lambda module, args, output: dtypes.append(output.dtype))
    with memhook.training_filter(unet, null_embedding=NOTHING, threshold=1e9) as f:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            losses = unet(torch.randn(2, 4, 8, 8), 5, torch.randn(2, 5, 6)).square()
        f.mean(losses)  # outside of autocast, as accelerate's loops do it
    assert dtypes == [torch.bfloat16, torch.bfloat16]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_model_in_another_dtype(dtype):
    model, (sample, t, text, target) = Plain().to(dtype), pairs(0.5, 3.0, 0.0)
    sample, text, target = sample.to(dtype), text.to(dtype), target.to(dtype)
    with memhook.training_filter(model, null_embedding=NULL, threshold=4.0) as f:  # the null embedding stays in float32
        loss = f.mean(losses_of(model(sample, t, text), target))
    loss.backward()
    assert (f.report().judged, f.report().dropped) == (2, 1)
    assert model.weight.grad.dtype is dtype
    assert model.weight.grad.isfinite()


def test_a_scaled_loss_of_a_dropped_batch_leaves_zeros():
    model, (sample, t, text, target) = Plain(), pairs(3.0, 3.0)
    with memhook.training_filter(model, null_embedding=NULL, threshold=4.0) as f:
        loss = f.mean(losses_of(model(sample, t, text), target))
    (loss * 65536.0).backward()  # what a gradient scaler does
    assert model.weight.grad == 0


def test_accumulated_losses_are_judged_one_by_one():
    model = Plain()
    batches = [pairs(0.5, 3.0), pairs(3.0, 3.0), pairs(-0.5, 1.0)]
    with memhook.training_filter(model, null_embedding=NULL, threshold=4.0) as f:
        for sample, t, text, target in batches:
            (f.mean(losses_of(model(sample, t, text), target)) / len(batches)).backward()
    twin, total = Plain(), 0.0
    for (sample, t, text, target), kept in zip(batches, [[0], [], [0, 1]], strict=True):
        if kept:
            total = total + losses_of(twin(sample, t, text), target)[kept].mean() / len(batches)
    total.backward()
    torch.testing.assert_close(model.weight.grad, twin.weight.grad)
    assert f.report().wholly_dropped == 1


def test_weights_of_samples_are_filtered_with_them():
    """Min-SNR (Hang et al. 2023): each kept sample keeps its own weight."""
    alphas = torch.linspace(0.999, 0.01, 1000)
    snr = alphas / (1 - alphas)
    weights = snr.clamp(max=5.0) / snr
    model, (sample, _, text, target) = Plain(), pairs(0.5, 3.0, -0.5)
    t = torch.tensor([20, 100, 900])
    with memhook.training_filter(model, null_embedding=NULL, threshold=4.0) as f:
        loss = f.mean(losses_of(model(sample, t, text), target) * weights[t])
    losses = losses_of(model(sample, t, text), target)
    torch.testing.assert_close(loss, (losses[0] * weights[t[0]] + losses[2] * weights[t[2]]) / 2)
    assert len(set(weights[t].tolist())) == 3


@pytest.mark.parametrize("space", ["eps", "v", "flow"])
def test_the_magnitude_is_in_the_unit_of_what_the_model_predicts(space):
    """The target is the loop's affair; sigma in 0..1 instead of a timestep is passed on, and a schedule gets it."""
    unet = tiny_unet()
    generator = torch.Generator().manual_seed(0)
    clean, noise, text = (torch.randn(*shape, generator=generator) for shape in ((2, 4, 8, 8), (2, 4, 8, 8), (2, 5, 6)))
    sigma = torch.tensor([0.25, 0.75])
    s = sigma[:, None, None, None]
    alpha = (1 - s.square()).sqrt()
    noisy = (1 - s) * clean + s * noise if space == "flow" else alpha * clean + s * noise
    target = {"eps": noise, "v": alpha * noise - s * clean, "flow": noise - clean}[space]
    t, seen = (sigma if space == "flow" else (1000 * sigma).long()), []

    def schedule(timesteps):
        seen.append(timesteps)
        return torch.where(timesteps > timesteps.mean(dtype=torch.float32), 0.0, torch.inf)

    with memhook.training_filter(unet, null_embedding=NOTHING, threshold=schedule) as f:
        loss = f.mean((unet(noisy, t, text) - target).square())
    torch.testing.assert_close(loss, (unet(noisy, t, text) - target).square()[0].mean())
    assert seen[0].tolist() == t.tolist()


def test_only_the_adapters_of_a_frozen_model_are_trained():
    generator = torch.Generator().manual_seed(0)
    sample, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, 6, generator=generator)
    text[1] *= 20
    t = torch.tensor([9, 800])

    def losses(unet):
        return (unet(sample, t, text) - sample).square().mean((1, 2, 3))

    watched, twin = low_rank_unet(), low_rank_unet()
    with memhook.training_filter(watched, null_embedding=NOTHING, threshold=None) as f:
        magnitudes = f.mean(losses(watched), keys=[0, 1]) and sorted(row.magnitude for row in f.report().rows)
    with memhook.training_filter(watched, null_embedding=NOTHING, threshold=sum(magnitudes) / 2) as f:
        f.mean(losses(watched)).backward()
    assert f.report().dropped == 1
    losses(twin)[0].backward()
    for (name, a), (_, b) in zip(watched.named_parameters(), twin.named_parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None) == ("lora" not in name), name
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad)
        assert a.requires_grad == b.requires_grad


def test_a_moving_average_sees_what_the_optimizer_does_and_no_more():
    """The average of a filtered run is that of a run on the kept samples alone; its own evaluation is no call of the loop."""
    model, twin = Plain(), Plain()
    average, expected = (torch.optim.swa_utils.AveragedModel(m, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)) for m in (model, twin))
    optimizer, other = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, twin))
    with memhook.training_filter(model, null_embedding=NULL, threshold=4.0) as f:
        for seed in range(3):
            sample, t, text, target = pairs(0.5, 3.0, seed=seed)
            optimizer.zero_grad()
            f.mean(losses_of(model(sample, t, text), target)).backward()
            optimizer.step()
            average.update_parameters(model)
            average(sample, t, text)
            other.zero_grad()
            losses_of(twin(sample, t, text), target)[0].backward()
            other.step()
            expected.update_parameters(twin)
    torch.testing.assert_close(average.module.weight, expected.module.weight)
    assert f.report().steps == 3


def test_a_frozen_denoiser_under_a_trained_embedding():
    """Textual inversion: what is trained is the embedding."""
    model, (sample, t, text, target) = Plain().requires_grad_(False), pairs(0.5, 3.0)
    text.requires_grad_()
    with memhook.training_filter(model, null_embedding=NULL, threshold=4.0) as f:
        f.mean(losses_of(model(sample, t, text), target)).backward()
    assert text.grad[0].abs().sum() > 0
    assert text.grad[1].abs().sum() == 0


def test_a_module_around_the_denoiser_is_seen_through():
    model, (sample, t, text, target) = Plain(), pairs(0.5, 3.0)
    wrapped = nn.Sequential()
    wrapped.forward = model.__call__
    with memhook.training_filter(model, null_embedding=NULL, threshold=4.0) as f:
        f.mean(losses_of(wrapped(sample, t, text), target))
    assert f.report().dropped == 1


@pytest.mark.parametrize("which", ["outer", "inner"])
def test_a_compiled_denoiser(which):
    torch._dynamo.reset()
    model = tiny_unet()
    compiled = torch.compile(model, backend="aot_eager")
    generator = torch.Generator().manual_seed(0)
    sample, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, 6, generator=generator)
    target = compiled if which == "outer" else model
    twin = copy.deepcopy(model)
    (twin(sample, 5, text) - sample).square().mean((1, 2, 3)).mean().backward()
    with memhook.training_filter(target, null_embedding=NOTHING, threshold=1e9) as f:
        for _ in range(3):
            model.zero_grad()
            f.mean((compiled(sample, 5, text) - sample).square().mean((1, 2, 3))).backward()
    torch._dynamo.reset()
    torch.testing.assert_close(gradients(model), gradients(twin))
    assert f.report().passes == 3


def test_what_the_pass_saves_is_nothing():
    """After the mean no activation is held beyond those of the loop's own pass."""
    saved = []

    def pack(tensor):
        saved.append(tensor.numel())
        return tensor

    unet, sample, text = tiny_unet(), torch.randn(2, 4, 8, 8), torch.randn(2, 5, 6)
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        memhook.training_filter(unet, null_embedding=NOTHING, threshold=1e9) as f,
    ):
        losses = unet(sample, 5, text).square().mean((1, 2, 3))
        own = sum(saved)
        f.mean(losses)
    assert sum(saved) - own <= 4 * len(losses)  # the choice between loss and zero


def test_embeddings_dropped_by_the_loop_train_the_unconditional_model():
    model = Plain()
    sample, t, text, target = pairs(3.0, 3.0, 3.0)
    text[1] = NULL  # conditioning dropout
    with memhook.training_filter(model, null_embedding=NULL[None], threshold=4.0) as f:
        loss = f.mean(losses_of(model(sample, t, text), target))
    torch.testing.assert_close(loss, losses_of(model(sample, t, embeddings(0.0, 0.0, 0.0)), target)[1])
