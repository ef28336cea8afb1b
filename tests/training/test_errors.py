"""A loop that uses the filter wrongly is told so; it never trains on a silent zero."""

import math

import pytest
import torch
from torch import nn

import memhook
from memhook.training import BinnedThreshold
from tests.training.models import NULL, Plain, embeddings, losses_of, pairs


@pytest.fixture
def model():
    return Plain()


def step(model, f, *levels, **options):
    sample, t, text, target = pairs(*levels)
    return f.mean(losses_of(model(sample, t, text), target), **options)


def filtered(model, threshold=4.0, **options):
    return memhook.training_filter(model, **{"null_embedding": NULL, "threshold": threshold, **options})


def raises(*parts):
    return pytest.raises(memhook.MemhookError, match=".*".join(parts))


def test_the_model_was_not_called(model):
    with raises("was not called inside the block", "expected one call for each loss", "Call the module"), filtered(model) as f:
        f.mean(torch.ones(2, requires_grad=True))


def test_another_module_was_called(model):
    with raises("was not called inside the block"), filtered(model) as f:
        step(Plain(), f, 1.0, 2.0)


def test_the_model_was_only_called_without_gradient(model):
    sample, t, text, _ = pairs(3.0)
    with raises("was not called with gradient"), filtered(model) as f:
        with torch.no_grad():
            model(sample, t, text)
        f.mean(torch.ones(1, requires_grad=True))


def test_mean_was_called_twice(model):
    sample, t, text, target = pairs(0.5)
    with raises("was not called inside the block since the last mean"), filtered(model) as f:
        losses = losses_of(model(sample, t, text), target)
        f.mean(losses)
        f.mean(losses)


def test_the_model_was_called_twice(model):
    sample, t, text, target = pairs(0.5)
    with raises("called 2 times with gradient", "no_grad", "paused"), filtered(model) as f:
        model(sample, t, text)
        f.mean(losses_of(model(sample, t, text), target))


def test_mean_was_never_called(model):
    sample, t, text, _ = pairs(0.5)
    with raises("with gradient inside the block: 1, and mean was never called"), filtered(model):
        model(sample, t, text)


def test_an_error_of_the_loop_is_not_covered_by_one_of_the_filter(model):
    sample, t, text, _ = pairs(0.5)

    def loop():
        with filtered(model):
            model(sample, t, text)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        loop()


def test_mean_outside_of_the_block(model):
    f = filtered(model)
    with raises("outside the block"):
        step(model, f, 1.0)


def test_the_block_is_entered_twice(model):
    f = filtered(model)
    with f, raises("entered already"), f:
        pass
    assert not model._forward_hooks


def test_the_loss_of_another_batch(model):
    sample, t, text, _ = pairs(0.5, 3.0)
    with raises(r"shape \(3,\)", "batch of 2"), filtered(model) as f:
        model(sample, t, text)
        f.mean(torch.ones(3, requires_grad=True))


def test_a_loss_that_is_averaged_already(model):
    sample, t, text, target = pairs(0.5, 3.0)
    with raises("scalar", 'reduction="none"'), filtered(model) as f:
        f.mean(losses_of(model(sample, t, text), target).mean())


@pytest.mark.parametrize("keys", [["a"], ["a", ["b"]]])
def test_keys_that_do_not_fit(model, keys):
    with raises("key"), filtered(model) as f:
        step(model, f, 0.5, 3.0, keys=keys)


@pytest.mark.parametrize("shape", [(3, 4), (2, 5), (5,), (3, 3, 5), (2, 3, 4)])
def test_a_null_embedding_of_the_wrong_shape(model, shape):
    with raises("null embedding", r"the loop's has \(2, 3, 5\); expected \(3, 5\)"), filtered(model, null_embedding=torch.zeros(shape)) as f:
        step(model, f, 0.5, 3.0)


@pytest.mark.parametrize("shape", [(3, 5), (1, 3, 5), (2, 3, 5)])
def test_null_embeddings_of_the_right_shapes(model, shape):
    with filtered(model, null_embedding=NULL.expand(shape)) as f:
        step(model, f, 0.5, 3.0)
    assert f.report().dropped == 1


def test_no_embedding_is_found():
    class Odd(nn.Module):
        def forward(self, x, t, *, words):
            return x + words.mean((1, 2))[:, None, None, None]

    sample, t, text, target = pairs(0.5, 3.0)
    model = Odd()
    sample.requires_grad_()
    with raises("no embedding of 2 rows was found under its usual names", "keywords words", "embedding=NAME"), filtered(model) as f:
        f.mean(losses_of(model(sample, t, words=text), target))
    with filtered(model, embedding="words") as f:
        f.mean(losses_of(model(sample, t, words=text), target))
    assert f.report().dropped == 1


def test_pooled_text_that_nobody_mentioned():
    class Pooled(Plain):
        def forward(self, sample, timestep, encoder_hidden_states, added_cond_kwargs):
            pooled = added_cond_kwargs["text_embeds"].mean(1)[:, None, None, None]
            return super().forward(sample, timestep, encoder_hidden_states) + pooled

    sample, t, text, target = pairs(0.5, 0.5)
    model, added = Pooled(), {"text_embeds": torch.tensor([[0.0, 0.0], [3.0, 3.0]]), "time_ids": torch.ones(2, 6)}
    with raises("added_cond_kwargs", "text_embeds", "null_arguments="), filtered(model) as f:
        f.mean(losses_of(model(sample, t, text, added_cond_kwargs=added), target))
    for null, dropped in ((torch.zeros(2), 1), (None, 0)):
        with filtered(model, null_arguments={("added_cond_kwargs", "text_embeds"): null}) as f:
            f.mean(losses_of(model(sample, t, text, added_cond_kwargs=added), target))
        assert f.report().dropped == dropped


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["conditional", "unconditional"])
def test_predictions_that_are_not_finite(model, bad, where):
    levels, null = (bad, 1.0) if where == "conditional" else (1.0, 1.0), NULL if where == "conditional" else NULL + bad
    with raises("NaN or infinite", "first is sample 0", "on_nonfinite"), filtered(model, null_embedding=null) as f:
        step(model, f, *levels)


@pytest.mark.parametrize(
    ("threshold", "message"),
    [
        (torch.ones(2, 3), r"threshold has shape \(2, 3\)"),
        ([], r"shape \(0,\)"),
        ("tau", "threshold is a str"),
        (math.nan, "at least 0"),
        ([1.0, -1.0], "holds -1"),
    ],
)
def test_thresholds_of_the_wrong_kind_are_refused_at_once(model, threshold, message):
    with raises(message):
        filtered(model, threshold)


@pytest.mark.parametrize(
    ("threshold", "message"),
    [
        (torch.ones(3), "timesteps are .* table of 3"),
        (lambda t: torch.ones(5), r"gave the shape \(5,\) for 2 timesteps"),
        (lambda t: t * math.nan, "threshold function gave"),
        (BinnedThreshold((500.0,), (1.0, 2.0), (4, 8, 8)), r"calibrated on samples of shape \(4, 8, 8\)"),
    ],
)
def test_thresholds_that_do_not_fit_the_loop(model, threshold, message):
    with raises(message), filtered(model, threshold) as f:
        step(model, f, 0.5, 3.0)


def test_fractional_timesteps_are_in_no_table(model):
    sample, _, text, _ = pairs(0.5)
    with raises("expected integers from 0 to 999"), filtered(model, torch.ones(1000)) as f:
        model(sample, torch.tensor([0.5]), text)
        f.keep()


def test_an_argument_is_changed_in_place_before_the_mean(model):
    sample, t, text, target = pairs(0.5, 3.0)
    with raises("changed in place"), filtered(model) as f:
        losses = losses_of(model(sample, t, text), target)
        text.add_(1.0)
        f.mean(losses)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"normalize": "sum"}, "normalize is 'sum'"),
        ({"flagged_weight": 0.5}, 'normalize="batch"'),
        ({"flagged_weight": 1.5, "normalize": "batch"}, "flagged_weight is 1.5"),
        ({"fraction": 0.0}, "fraction is 0.0"),
        ({"fraction": 1.5}, "fraction is 1.5"),
        ({"on_nonfinite": "drop"}, "on_nonfinite is 'drop'"),
        ({"log_every": 0}, "log_every is 0"),
        ({"null_embedding": lambda: None}, "is a NoneType; expected a tensor"),
        ({"null_arguments": {"mask": torch.ones(3)}}, "null_arguments names argument 'mask', where this call has a NoneType"),
    ],
)
def test_options_out_of_range(model, options, message):
    with raises(message), filtered(model, **options) as f:
        step(model, f, 0.5, 3.0)


@pytest.mark.parametrize("denoiser", [lambda x: x, "unet"])
def test_what_is_no_module(denoiser):
    with raises("expected the torch.nn.Module that the loop calls"):
        filtered(denoiser)


def test_data_parallel():
    with raises("one process a device"):
        filtered(nn.DataParallel(Plain()))


def test_timesteps_of_another_batch(model):
    sample, _, text, _ = pairs(0.5, 3.0)
    with raises("3 timesteps for a batch of 2"), filtered(model) as f:
        model(sample, torch.tensor([1, 2, 3]), text)
        f.keep()


def test_a_wrong_batch_in_keep_is_seen_by_the_mean(model):
    sample, t, text, _ = pairs(0.5, 3.0)
    with filtered(model) as f:
        model(sample, t, text)
        keep = f.keep()
    with raises("batch of 2"):
        memhook.masked_mean(torch.ones(3), keep)


def test_embeddings_without_rows_of_the_batch(model):
    sample, t, _, _ = pairs(0.5, 3.0)
    with raises("no embedding of 2 rows"), filtered(model, embedding="encoder_hidden_states") as f:
        model(sample, t, encoder_hidden_states=embeddings(1.0))
        f.keep()


class Overwriting(Plain):
    def forward(self, sample, timestep, encoder_hidden_states):
        return super().forward(sample.mul_(0.5), timestep, encoder_hidden_states)


def test_the_denoiser_writes_into_what_it_is_given():
    overwriting = Overwriting()
    with raises("changed in place, by the denoiser itself"), filtered(overwriting) as f:
        step(overwriting, f, 0.5, 3.0)


@pytest.mark.parametrize(
    "name",
    ["encoder_hidden_states_t5", "text_embedding_mask", "encoder_hidden_states_mask", "encoder_hidden_states_2", "down_block_additional_residuals"],
)
def test_every_other_text_input_is_named(name):
    """HunyuanDiT has two texts, QwenImage a mask beside its own, and a ControlNet's residuals were computed with the prompt."""

    class Several(Plain):
        def forward(self, sample, timestep, encoder_hidden_states, **_):
            return super().forward(sample, timestep, encoder_hidden_states)

    several, (sample, t, text, target) = Several(), pairs(0.5, 3.0)
    other = (torch.ones(2, 3),) if "residuals" in name else torch.ones(2, 3)
    with raises("also given argument", name, "null_arguments"), filtered(several) as f:
        f.mean(losses_of(several(sample, t, text, **{name: other}), target))
    named = {(name, 0) if "residuals" in name else name: None}
    with filtered(several, null_arguments=named) as f:
        f.mean(losses_of(several(sample, t, text, **{name: other}), target))
    assert f.report().dropped == 1
