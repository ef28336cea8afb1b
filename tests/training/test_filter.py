"""The training filter drops what it should, counts it, and changes nothing else in the loop."""

import contextlib
import copy
import math

import pytest
import torch
from torch import nn

import memhook
from memhook.testing import tiny_unet
from memhook.training import BinnedThreshold, KeyCount
from memhook.training.counts import ranked
from tests.training.models import NULL, Plain, embeddings, losses_of, pairs


def filtered(model, threshold, **options):
    return memhook.training_filter(model, null_embedding=NULL, threshold=threshold, **options)


def test_loss_and_gradient_are_those_of_the_batch_without_the_sample():
    model, (sample, t, text, target) = Plain(), pairs(0.5, 3.0, -0.5)  # magnitudes 1, 6, 1
    with filtered(model, 4.0) as f:
        loss = f.mean(losses_of(model(sample, t, text), target))
    loss.backward()

    twin, rest = Plain(), torch.tensor([0, 2])
    expected = losses_of(twin(sample[rest], t[rest], text[rest]), target[rest]).mean()
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(model.weight.grad, twin.weight.grad)


def test_the_gradient_agrees_with_finite_differences():
    model, (sample, t, text, target) = Plain().double(), pairs(0.5, 3.0, -0.5)
    sample, target = sample.double(), target.double()

    def loss(weight):
        with torch.no_grad():
            model.weight.fill_(weight)
        with filtered(model, 4.0) as f:
            return f.mean(losses_of(model(sample, t, text), target))

    loss(2.0).backward()
    numeric = (float(loss(2.0 + 1e-3).detach()) - float(loss(2.0 - 1e-3).detach())) / 2e-3
    assert float(model.weight.grad) == pytest.approx(numeric, rel=1e-4)


def test_there_is_one_extra_pass_without_gradient_on_the_same_timesteps():
    model, (sample, t, text, target) = Plain().train(), pairs(0.5, 3.0)
    with filtered(model, 4.0) as f:
        f.mean(losses_of(model(sample, t, text), target))
    (own, own_grad, own_mode), (extra, extra_grad, extra_mode) = model.calls
    assert extra is own
    assert (own_grad, extra_grad) == (True, False)
    assert own_mode is extra_mode is True


@pytest.mark.parametrize("call", ["positions", "keywords", "mixed"])
def test_the_embedding_is_found_however_it_is_passed(call):
    model, (sample, t, text, target) = Plain(), pairs(0.5, 3.0)
    arguments = {
        "positions": ((sample, t, text), {}),
        "keywords": ((), {"sample": sample, "timestep": t, "encoder_hidden_states": text}),
        "mixed": ((sample, t), {"encoder_hidden_states": text}),
    }
    args, kwargs = arguments[call]
    with filtered(model, 4.0) as f:
        f.mean(losses_of(model(*args, **kwargs), target))
    assert f.report().dropped == 1


class Nested(nn.Module):
    """Conditions on a dict, and on class labels."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(4, 1)
        self.table.weight.data = torch.tensor([[0.5], [3.0], [0.1], [0.0]])

    def forward(self, x, t, cond):
        level = self.table(cond["label"])[:, :, None, None]
        return x + level + (cond["text"].mean((1, 2))[:, None, None, None] if "text" in cond else 0)


def test_class_labels_in_a_nested_argument():
    model, (sample, t, _, target) = Nested(), pairs(0, 0, 0)
    labels = torch.tensor([0, 1, 3])
    options = {"null_embedding": torch.tensor(3), "embedding": ("cond", "label")}
    with memhook.training_filter(model, threshold=4.0, **options) as f:
        f.mean(losses_of(model(sample, t, cond={"label": labels}), target), keys=["a", "b", "null"])
    report = f.report()
    assert {row.key: round(row.magnitude, 5) for row in report.rows} == {"b": 6.0, "a": 1.0}  # the null label is not judged
    assert report.dropped == 1


def test_other_arguments_with_the_prompt_are_replaced_too():
    model, (sample, t, text, target) = Nested(), pairs(1.0, 1.0)
    cond = {"label": torch.tensor([0, 1]), "text": text}
    others = {("cond", "label"): torch.tensor(3)}
    with memhook.training_filter(model, null_embedding=NULL, threshold=9.0, embedding=("cond", "text"), null_arguments=others) as f:
        f.mean(losses_of(model(sample, t, cond=cond), target), keys=["a", "b"])
    assert {row.key: round(row.magnitude, 4) for row in f.report().rows} == {"a": 3.0, "b": 8.0}  # 2 * (text + label)
    assert cond["text"] is text  # the loop's own dict is left alone


def test_a_learned_variance_is_no_part_of_the_magnitude():
    unet = tiny_unet(learned_variance=True)
    sample, t, text = torch.randn(2, 4, 8, 8), torch.tensor([5, 900]), torch.randn(2, 5, 6)
    null = torch.zeros(5, 6)
    with memhook.training_filter(unet, null_embedding=null, threshold=None) as f:
        f.mean(unet(sample, t, text).square(), keys=[0, 1])
    with torch.no_grad():
        halves = [unet(sample, t, embedding)[:, :4] for embedding in (text, null.expand(2, 5, 6))]
    found = {row.key: row.magnitude for row in f.report().rows}
    torch.testing.assert_close(torch.tensor([found[0], found[1]]), memhook.magnitude(*halves).float())


def test_samples_that_are_unconditional_already_are_never_dropped():
    model, (sample, t, text, target) = Plain(), pairs(0.0, 3.0, 0.5)  # the first has the null embedding
    with filtered(model, 0.0) as f:
        loss = f.mean(losses_of(model(sample, t, text), target), keys=["null", "far", "near"])
    report = f.report()
    torch.testing.assert_close(loss, losses_of(model(sample, t, text), target)[0])
    assert (report.samples, report.judged, report.dropped) == (3, 2, 2)
    assert {row.key for row in report.rows} == {"far", "near"}


def test_the_null_embedding_is_recognized_through_rounding_and_casting():
    model, (sample, t, text, target) = Plain(), pairs(0.0, 3.0)
    for changed in (text + 1e-6, text.bfloat16()):
        with filtered(model, 0.0) as f:
            f.mean(losses_of(model(sample, t, changed), target))
        assert (f.report().judged, f.report().dropped) == (1, 1)


def test_the_null_embedding_may_come_from_a_text_encoder_in_training():
    model, (sample, t, text, target) = Plain(), pairs(0.5, 3.0)
    bias = nn.Parameter(torch.tensor(0.0))
    with memhook.training_filter(model, null_embedding=lambda: NULL + bias, threshold=4.0) as f:
        f.mean(losses_of(model(sample, t, text + bias), target)).backward()
        assert f.report().dropped == 1
        bias.data.fill_(1.0)  # both move, the magnitude stays
        f.mean(losses_of(model(sample, t, text + bias), target))
    assert f.report().dropped == 2


def table(t):
    values = torch.full((1000,), 9.0)
    values[t] = 4.0
    return values


@pytest.mark.parametrize("kind", ["table", "list", "function", "bins"])
def test_the_threshold_may_depend_on_the_timestep(kind):
    model, (sample, _, text, _) = Plain(), pairs(3.0, 3.0)  # magnitudes 6
    t = torch.tensor([100, 700])
    kinds = {
        "table": table(700),
        "list": table(700).tolist(),
        "function": lambda t: torch.where(t > 500, 4.0, 9.0),
        "bins": BinnedThreshold((500.0,), (9.0, 4.0), (1, 2, 2)),
    }
    with filtered(model, kinds[kind]) as f:
        model(sample, t, text)
        assert f.keep().tolist() == [True, False]


def test_one_timestep_for_the_whole_batch():
    model, (sample, _, text, _) = Plain(), pairs(3.0, 0.5)
    with filtered(model, table(700)) as f:
        for t, expected in ((torch.tensor(700), [False, True]), (700, [False, True]), (3, [True, True])):
            model(sample, t, text)
            assert f.keep().tolist() == expected


def test_the_sum_may_be_divided_by_the_batch():
    model, (sample, t, text, target) = Plain(), pairs(0.5, 3.0, -0.5)
    with filtered(model, 4.0, normalize="batch") as f:
        loss = f.mean(losses_of(model(sample, t, text), target))
    losses = losses_of(model(sample, t, text), target)
    torch.testing.assert_close(loss, (losses[0] + losses[2]) / 3)


def test_flagged_samples_may_count_less_instead():
    model, (sample, t, text, target) = Plain(), pairs(0.5, 3.0)
    with filtered(model, 4.0, normalize="batch", flagged_weight=0.25) as f:
        loss = f.mean(losses_of(model(sample, t, text), target))
    losses = losses_of(model(sample, t, text), target)
    torch.testing.assert_close(loss, (losses[0] + 0.25 * losses[1]) / 2)
    assert f.report().dropped == 1


@pytest.mark.parametrize(("fraction", "passes"), [(1.0, 12), (0.5, 6), (1 / 3, 4), (0.25, 3), (0.75, 9)])
def test_a_fraction_of_the_losses_gets_the_pass_and_in_the_others_all_is_kept(fraction, passes):
    model, (sample, t, text, target) = Plain(), pairs(3.0, 0.5)
    with filtered(model, 4.0, fraction=fraction) as f:
        for _ in range(12):
            f.mean(losses_of(model(sample, t, text), target))
    report = f.report()
    assert (report.passes, report.dropped, report.steps, report.samples) == (passes, passes, 12, 24)
    assert len(model.calls) == 12 + passes


def test_what_was_dropped_is_counted_by_key_and_ranked():
    model = Plain()
    with filtered(model, 4.0) as f:
        for levels, keys in [((3.0, 0.5, 0.0), ("dog", "cat", "dog")), ((1.0, 2.5, 0.5), ("dog", "owl", "cat"))]:
            sample, t, text, target = pairs(*levels)
            f.mean(losses_of(model(sample, t, text), target), keys=keys)
    rows = f.report().rows
    assert [(row.key, row.judged, row.dropped) for row in rows] == [("owl", 1, 1), ("dog", 2, 1), ("cat", 2, 0)]
    assert [row.magnitude for row in rows] == pytest.approx([5.0, 4.0, 1.0], abs=1e-5)
    assert [row.excess for row in rows] == pytest.approx([5 / 4, 4 / 4, 1 / 4], abs=1e-5)
    assert [row.share for row in rows] == [1.0, 0.5, 0.0]


def test_many_drops_weigh_more_than_one_and_many_presentations_alone_weigh_nothing():
    counts = [
        ("once", 1, 1, 5.0, 1.2),
        ("often", 100, 60, 4.0, 1.1),
        ("never", 100, 0, 1.0, 0.2),
        ("seldom", 100, 2, 1.0, 0.5),
        ("new", 1, 0, 1.0, 0.3),
    ]
    rows = [KeyCount(*count) for count in counts]
    assert [row.key for row in ranked(rows)] == ["often", "once", "seldom", "new", "never"]


def test_among_many_samples_one_flagged_presentation_says_little():
    rows = [KeyCount(f"once-{i}", 1, 1, 5.0, 1.9) for i in range(50)] + [KeyCount(f"clean-{i}", 1, 0, 1.0, 0.3) for i in range(950)]
    rows += [KeyCount("planted", 50, 12, 4.0, 0.9)]
    assert ranked(rows)[0].key == "planted"
    assert ranked([rows[0], rows[-1]])[0].key == "once-0"  # of two samples


def test_reports_of_two_ranks_add_up(tmp_path):
    reports = []
    for part in (((3.0, 0.5), "ab"), ((0.5, 0.5), "ac")):
        model = Plain()
        sample, t, text, target = pairs(*part[0])
        with filtered(model, 4.0) as f:
            f.mean(losses_of(model(sample, t, text), target), keys=list(part[1]))
        reports.append(f.report())
    both = reports[0].merged(reports[1])
    assert (both.steps, both.samples, both.judged, both.dropped) == (2, 4, 4, 1)
    assert [(row.key, row.judged, row.dropped) for row in both.rows] == [("a", 2, 1), ("b", 1, 0), ("c", 1, 0)]
    assert both.rows[0].magnitude == pytest.approx((6 + 1) / 2)
    both.save(tmp_path / "dropped.csv")
    assert (tmp_path / "dropped.csv").read_text().splitlines()[:2] == [
        "key,judged,dropped,share,at_least,magnitude,excess,remembered",
        "a,2,1,0.5,0.0835704,3.5,0.875,0",
    ]


def test_keys_may_be_a_tensor():
    model, (sample, t, text, target) = Plain(), pairs(3.0, 0.5)
    with filtered(model, 4.0) as f:
        f.mean(losses_of(model(sample, t, text), target), keys=torch.tensor([7, 9]))
    assert [row.key for row in f.report().rows] == [7, 9]


def test_a_tracker_is_told_what_happened_since_the_last_time():
    told, model = [], Plain()
    with filtered(model, 4.0, log=lambda values, step: told.append((step, values)), log_every=2) as f:
        for levels in ((3.0, 0.5), (0.0, 1.0), (3.0, 3.0), (3.0, 3.0), (0.5, 0.5)):
            sample, t, text, target = pairs(*levels)
            f.mean(losses_of(model(sample, t, text), target))
    assert [step for step, _ in told] == [2, 4]
    assert told[0][1] == pytest.approx({"memhook/dropped": 1 / 3, "memhook/wholly_dropped_batches": 0, "memhook/magnitude": 3}, abs=1e-5)
    assert told[1][1] == pytest.approx({"memhook/dropped": 1, "memhook/wholly_dropped_batches": 2, "memhook/magnitude": 6}, abs=1e-5)


def test_a_filter_can_be_entered_for_every_step():
    model, (sample, t, text, target) = Plain(), pairs(3.0, 0.5)
    f = filtered(model, 4.0)
    for _ in range(3):
        with f:
            f.mean(losses_of(model(sample, t, text), target))
    assert f.report().steps == 3


@pytest.mark.parametrize("ending", ["normal", "exception"])
def test_no_hook_is_left_behind(ending):
    model, (sample, t, text, target) = Plain(), pairs(3.0)
    interruption = pytest.raises(KeyboardInterrupt) if ending == "exception" else contextlib.nullcontext()
    with interruption, filtered(model, 4.0) as f:
        loss = losses_of(model(sample, t, text), target)
        if ending == "exception":
            raise KeyboardInterrupt
        f.mean(loss)
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_validation_and_paused_calls_belong_to_no_loss():
    model, (sample, t, text, target) = Plain(), pairs(3.0, 0.5)
    with filtered(model, 4.0) as f:
        for _ in range(2):
            with f.paused():
                model(sample, t, embeddings(9.0, 9.0))
            losses = losses_of(model(sample, t, text), target)
            with torch.no_grad():
                model(sample[:1], t[:1], embeddings(9.0))
            f.mean(losses).backward()
    assert f.report().dropped == 2
    assert len(model.calls) == 2 * 4


def test_a_copy_of_the_denoiser_is_not_taken_for_it():
    model, (sample, t, text, target) = Plain(), pairs(3.0, 0.5)
    with filtered(model, 4.0) as f:
        average = copy.deepcopy(model)  # a moving average, say, made inside the block
        losses = losses_of(model(sample, t, text), target)
        average(sample, t, text)
        f.mean(losses)
    assert f.report().steps == 1


def test_a_loss_without_gradient_is_judged_by_the_latest_call():
    model, (sample, t, text, target) = Plain(), pairs(3.0, 0.5)
    with filtered(model, 4.0) as f, torch.no_grad():
        model(sample, t, embeddings(9.0, 9.0))
        loss = f.mean(losses_of(model(sample, t, text), target))
    torch.testing.assert_close(loss, losses_of(model(sample, t, text), target)[1])


def test_no_watch_records_the_extra_pass():
    unet = tiny_unet()
    sample, text = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 6)
    adapter = memhook.ModuleAdapter(unet, layout="two_calls_cond_first")
    with memhook.watch(unet, adapter=adapter) as trace, memhook.training_filter(unet, null_embedding=torch.zeros(5, 6), threshold=1.0) as f:
        f.mean(unet(sample, 5, text).square())
    with pytest.raises(memhook.NoGuidanceError):
        trace.score()


def test_an_overflow_may_be_left_to_the_gradient_scaler():
    model, (sample, t, text, target) = Plain(), pairs(0.5, 3.0)
    sample[0, 0, 0, 0] = math.inf
    with filtered(model, 4.0, on_nonfinite="keep") as f:
        loss = f.mean(losses_of(model(sample, t, text), target))
    report = f.report()
    assert not loss.isfinite()  # it shows; a zero would not
    assert (report.nonfinite, report.dropped, report.judged) == (1, 1, 1)


class Consuming(Plain):
    def forward(self, sample, timestep, encoder_hidden_states, residuals):
        return super().forward(sample + residuals.pop(), timestep, encoder_hidden_states)


def test_inputs_that_the_denoiser_takes_out_of_their_list():
    """As every UNet of diffusers does with the residuals of a T2I-Adapter."""
    sample, t, text, target = pairs(0.5, 3.0)
    plain, consuming = Plain(), Consuming()
    with filtered(plain, 4.0) as expected:
        loss = expected.mean(losses_of(plain(sample + 1, t, text), target))
    with filtered(consuming, 4.0) as found:
        assert torch.equal(found.mean(losses_of(consuming(sample, t, text, [torch.ones_like(sample)]), target)), loss)
    assert found.report().dropped == expected.report().dropped == 1
