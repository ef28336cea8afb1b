"""Remembering by key: what is flagged at judged timesteps is left out at every timestep, until it is judged otherwise."""

import copy

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, binomtest

import memhook
from memhook.training import BinnedThreshold, KeyCount
from memhook.training.memory import least_flagged
from tests.training.models import NULL, Plain, losses_of, pairs

STEPS = st.lists(
    st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from([10, 900]), st.sampled_from([0.0, 0.5, 3.0])), min_size=1, max_size=4), max_size=8
)  # steps of (key, timestep, level)


def filtered(model, *, remember=1, threshold=4.0, timesteps=(800, 999), **options):
    return memhook.training_filter(model, null_embedding=NULL, threshold=threshold, timesteps=timesteps, remember=remember, **options)


def keeps(model, f, *step):
    """Which samples of a step ``(key, timestep, level), ...`` are kept, as a string of 1 and 0."""
    sample, _, text, _ = pairs(*(level for _, _, level in step))
    model(sample, torch.tensor([t for _, t, _ in step]), text)
    return "".join("01"[keep] for keep in f.keep(keys=[key for key, _, _ in step]).tolist())


def test_a_flagged_sample_is_out_at_every_timestep_until_it_is_judged_below_the_threshold():
    model = Plain()
    with filtered(model) as f:
        assert keeps(model, f, ("dog", 10, 3.0), ("cat", 10, 3.0)) == "11"  # nothing is known
        assert keeps(model, f, ("dog", 900, 3.0), ("cat", 900, 0.5)) == "01"
        assert f.remembered() == ["dog"]
        assert keeps(model, f, ("dog", 10, 0.5), ("cat", 10, 3.0)) == "01"
        assert keeps(model, f, ("cat", 10, 0.5), ("dog", 799, 0.5)) == "10"
        assert keeps(model, f, ("dog", 900, 0.5)) == "1"  # judged below
        assert keeps(model, f, ("dog", 10, 3.0)) == "1"
        assert f.remembered() == []


def test_without_a_calibration_more_than_half_of_the_latest_verdicts_decide():
    model = Plain()
    with filtered(model, remember=3) as f:
        found = ""
        for level in (0.5, 3.0, 3.0, 0.5, 0.5, 3.0):  # verdicts 0 1 1 0 0 1
            keeps(model, f, ("dog", 900, level))
            found += keeps(model, f, ("dog", 10, level))
    assert found == "110011"  # 0/1, 1/2, 2/3, 2/3, 1/3, 1/3


def test_copies_in_one_batch_are_left_out_with_the_flagged_one():
    model = Plain()
    with filtered(model) as f:
        assert keeps(model, f, ("dog", 10, 3.0), ("dog", 900, 3.0), ("cat", 10, 3.0)) == "001"


def test_samples_that_are_unconditional_are_never_left_out():
    model = Plain()
    with filtered(model) as f:
        keeps(model, f, ("dog", 900, 3.0))
        assert keeps(model, f, ("dog", 10, 0.0), ("dog", 900, 0.0), ("dog", 10, 3.0)) == "110"


@given(st.integers(1, 60), st.sampled_from([0.001, 0.01, 0.05, 0.1, 0.2, 0.5, 0.9]))
def test_a_clean_sample_is_held_as_seldom_as_a_clean_presentation_is_flagged(verdicts, rate):
    least = least_flagged(verdicts, rate)
    assert binom.sf(least - 1, verdicts, rate) <= rate + 1e-9
    assert least == 1 or binom.sf(least - 2, verdicts, rate) > rate


def test_a_calibrated_threshold_says_what_chance_explains():
    model, found = Plain(), ""
    with filtered(model, remember=9, threshold=BinnedThreshold((), (4.0,), span=(800, 999), fpr=0.05), timesteps=None) as f:
        for level in (3.0, 0.5, 0.5, 3.0, 0.5, 0.5, 0.5, 0.5, 3.0):
            keeps(model, f, ("dog", 900, level))
            found += keeps(model, f, ("dog", 10, level))
    assert found == "011000010"  # 1 of 1, 1 of 2, 1 of 3, 2 of 4 to 7; 2 of 8 is not enough, 3 of 9 is


class Expected:
    """The rule, written down once more: a list of verdicts for each key."""

    def __init__(self, remember, rate):
        self.remember, self.rate, self.verdicts = remember, rate, {}
        self.judged = self.flagged = self.by_memory = 0

    def step(self, step):
        over = [t == 900 and level == 3.0 for _, t, level in step]
        for (key, t, level), flagged in zip(step, over, strict=True):
            if t == 900 and level:
                self.verdicts.setdefault(key, []).append(flagged)
                self.judged += 1
                self.flagged += flagged
        keep = []
        for (key, _, level), flagged in zip(step, over, strict=True):
            latest = self.verdicts.get(key, [])[-self.remember :] if self.remember else []
            if not latest:
                held = False
            elif self.rate is None:
                held = sum(latest) / len(latest) > 0.5
            else:
                held = any(latest) and binom.sf(sum(latest) - 1, len(latest), self.rate) <= self.rate + 1e-9
            left_out = bool(level) and held and not flagged
            self.by_memory += left_out
            keep.append(not (flagged or left_out))
        return keep


@settings(deadline=None, max_examples=60)
@given(STEPS, st.integers(0, 4), st.sampled_from([None, 0.05, 0.3]), st.integers(0, 8))
def test_every_run_follows_the_rule_also_when_it_is_resumed(steps, remember, rate, stop):
    model, expected = Plain(), Expected(remember, rate)
    threshold = 4.0 if rate is None else BinnedThreshold((), (4.0,), fpr=rate)
    f = filtered(model, remember=remember, threshold=threshold)
    for number, step in enumerate(steps):
        if number == stop:
            state = f.state_dict()
            f = filtered(model, remember=remember, threshold=threshold)
            f.load_state_dict(copy.deepcopy(state))
            assert f.state_dict() == state
        with f:
            assert keeps(model, f, *step) == "".join("01"[keep] for keep in expected.step(step))
    report = f.report()
    assert (report.steps, report.judged, report.dropped, report.remembered) == (len(steps), expected.judged, expected.flagged, expected.by_memory)
    assert (sum(row.dropped for row in report.rows), sum(row.remembered for row in report.rows)) == (expected.flagged, expected.by_memory)


def test_the_loss_and_its_gradient_are_those_of_the_samples_that_are_left():
    model, twin = Plain(), Plain()
    sample, _, text, target = pairs(3.0, 0.5, 1.0)
    t = torch.tensor([10, 20, 30])
    with filtered(model) as f:
        keeps(model, f, ("dog", 900, 3.0))
        loss = f.mean(losses_of(model(sample, t, text), target), keys=["dog", "cat", "owl"])
    loss.backward()
    expected = losses_of(twin(sample, t, text), target)[1:].mean()
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(model.weight.grad, twin.weight.grad)


def test_remembered_samples_may_count_less_instead():
    model = Plain()
    sample, _, text, target = pairs(3.0, 0.5)
    t = torch.tensor([10, 20])
    with filtered(model, normalize="batch", flagged_weight=0.25) as f:
        keeps(model, f, ("dog", 900, 3.0))
        loss = f.mean(losses_of(model(sample, t, text), target), keys=["dog", "cat"])
    losses = losses_of(model(sample, t, text), target)
    torch.testing.assert_close(loss, (0.25 * losses[0] + losses[1]) / 2)


def test_steps_without_a_pass_remember_too():
    model = Plain()
    with filtered(model, fraction=0.5, timesteps=None) as f:
        assert keeps(model, f, ("dog", 900, 3.0), ("cat", 900, 0.5)) == "01"
        assert keeps(model, f, ("dog", 900, 0.5), ("cat", 900, 3.0)) == "01"  # not judged
        assert keeps(model, f, ("dog", 900, 0.5), ("cat", 900, 3.0)) == "10"
    assert (f.report().passes, f.report().remembered) == (2, 1)


def test_the_report_shows_what_was_judged_and_what_was_left_out_by_memory():
    model, told = Plain(), []
    with filtered(model, log=lambda values, step: told.append(values), log_every=2) as f:
        keeps(model, f, ("dog", 900, 3.0), ("cat", 900, 0.5))
        keeps(model, f, ("dog", 10, 3.0), ("dog", 20, 3.0))
    report = f.report()
    assert (report.judged, report.dropped, report.remembered, report.wholly_dropped, report.passed) == (2, 1, 2, 1, 2)
    dog, cat = report.rows
    assert (dog.key, dog.judged, dog.dropped, dog.remembered, round(dog.magnitude, 4)) == ("dog", 1, 1, 2, 6.0)
    assert (cat.key, cat.judged, cat.dropped, cat.remembered) == ("cat", 1, 0, 0)
    assert told[0] == pytest.approx(
        {"memhook/dropped": 0.5, "memhook/remembered": 0.5, "memhook/wholly_dropped_batches": 1, "memhook/magnitude": 3.5}
    )
    assert report.merged(report).rows[0].remembered == 4


@given(st.integers(1, 200), st.sampled_from([1, 2, 50, 10_000]), st.data())
def test_the_order_is_that_of_a_confidence_bound_of_the_share(judged, among, data):
    dropped = data.draw(st.integers(0, judged))
    low = binomtest(dropped, judged).proportion_ci(confidence_level=1 - 2 * 0.05 / among, method="wilson").low
    assert KeyCount("a", judged, dropped, 1.0, 1.0).at_least(among=among) == pytest.approx(max(low, 0.0), abs=1e-6)


# Going on from a saved state


def test_a_state_survives_a_file_that_holds_data_only(tmp_path):
    model = Plain()
    with filtered(model, remember=2) as f:
        keeps(model, f, (("dog", 3), 900, 3.0), (7, 900, 3.0), ("cat", 900, 0.5))
    torch.save(f.state_dict(), tmp_path / "filter.pt")
    resumed = filtered(model, remember=2)
    resumed.load_state_dict(torch.load(tmp_path / "filter.pt", weights_only=True))
    with resumed:
        assert keeps(model, resumed, (("dog", 3), 10, 3.0), (7, 10, 3.0), ("cat", 10, 3.0)) == "001"
    assert resumed.report().dropped == 2
    assert resumed.report().remembered == 2


def test_accelerate_saves_and_loads_it(tmp_path):
    accelerator, model = Accelerator(cpu=True), Plain()
    f, other = filtered(model), filtered(model)
    accelerator.register_for_checkpointing(f)
    with f:
        keeps(model, f, ("dog", 900, 3.0))
    accelerator.save_state(str(tmp_path))
    with f:
        keeps(model, f, ("dog", 900, 0.5))
    accelerator.load_state(str(tmp_path))
    assert f.remembered() == ["dog"]
    assert f.report().judged == 1
    assert other.remembered() == []


def test_a_filter_without_memory_takes_the_counts_alone():
    model = Plain()
    with filtered(model) as f:
        keeps(model, f, ("dog", 900, 3.0))
    plain = filtered(model, remember=0)
    plain.load_state_dict(f.state_dict())
    assert plain.report() == f.report()
    f.load_state_dict(plain.state_dict())
    assert f.remembered() == []


# Ranks


def ranks(*learned, remember=2):
    """Filters as several ranks have them, after steps of their own; and what each would give the others."""
    filters, given = [], []
    for steps in learned:
        model = Plain()
        f = filtered(model, remember=remember)
        with f:
            for step in steps:
                keeps(model, f, *step)
        filters.append((model, f))
    for _, f in filters:
        with pytest.raises(ZeroDivisionError):
            f.exchange(lambda news: given.append(copy.deepcopy(news)) or 1 / 0)
    return filters, given


def test_after_an_exchange_all_ranks_remember_the_same():
    flagged, below = (("dog", 900, 3.0),), (("dog", 900, 0.5),)
    filters, given = ranks([flagged, (("cat", 900, 3.0),)], [below, (("owl", 900, 3.0),)], [])
    for _, f in filters:
        f.exchange(lambda news: given)
    assert [sorted(f.remembered()) for _, f in filters] == [["cat", "owl"]] * 3  # of dog's two verdicts one is flagged
    states = [f.state_dict()["memory"] for _, f in filters]
    assert all(sorted(state["verdicts"]) == sorted(states[0]["verdicts"]) for state in states)
    assert all(state["news"] == state["before"] == [] for state in states)


def test_an_exchange_without_news_changes_nothing_and_no_verdict_counts_twice():
    filters, given = ranks([(("dog", 900, 3.0),)], [], remember=3)
    for _ in range(3):
        for _, f in filters:
            f.exchange(lambda news, given=given: given)
        given = [{}, {}]
    assert [f.state_dict()["memory"]["verdicts"] for _, f in filters] == [[["dog", [True]]]] * 2


def test_of_a_sample_that_two_ranks_judged_the_newest_verdicts_of_both_count():
    first = [(("dog", 900, level),) for level in (0.5, 3.0, 3.0)]
    second = [(("dog", 900, level),) for level in (0.5, 0.5, 3.0)]
    filters, given = ranks(first, second, remember=4)
    for _, f in filters:
        f.exchange(lambda news: given)
    assert [f.state_dict()["memory"]["verdicts"] for _, f in filters] == [[["dog", [False, True, True, True]]]] * 2


def test_without_a_process_group_an_exchange_is_with_oneself():
    model = Plain()
    with filtered(model) as f:
        keeps(model, f, ("dog", 900, 3.0))
        f.exchange()
    assert f.remembered() == ["dog"]


# Errors


def raises(*parts):
    return pytest.raises(memhook.MemhookError, match=".*".join(parts))


def test_without_keys_nothing_can_be_remembered():
    model, (sample, t, text, target) = Plain(), pairs(0.5, 3.0)
    with raises("remember is 1, and mean was called without keys", "expected one key a sample", "Pass keys="), filtered(model) as f:
        f.mean(losses_of(model(sample, t, text), target))


@pytest.mark.parametrize("remember", [-1, 1.5, "yes"])
def test_numbers_of_verdicts_out_of_range(remember):
    with raises("remember is", "expected a number of verdicts"):
        filtered(Plain(), remember=remember)


def test_a_run_that_only_observes_has_nothing_to_remember():
    with raises("threshold=None", "expected a threshold", "leave remember= out"):
        filtered(Plain(), threshold=None)


def test_an_exchange_of_a_filter_that_does_not_remember():
    with raises("remembers nothing", "expected remember= of at least 1"):
        filtered(Plain(), remember=0).exchange()


@pytest.mark.parametrize("gathered", [[], [{"owl": [True]}]])
def test_a_gather_that_loses_this_ranks_part(gathered):
    model = Plain()
    with filtered(model) as f:
        keeps(model, f, ("dog", 900, 3.0))
        with raises(f"what was gathered holds {len(gathered)} objects", "all_gather_object"):
            f.exchange(lambda news: gathered)


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state | {"format": "memhook-training-filter-0"},
        lambda state: {},
        lambda state: state | {"totals": {}},
        lambda state: state | {"keys": [["dog", 1]]},
        lambda state: state | {"keys": 3},
        lambda state: state | {"memory": {"verdicts": []}},
        lambda state: state | {"memory": {"verdicts": [["dog"]], "before": [], "news": []}},
        lambda state: [state],
    ],
)
def test_states_that_are_none(change):
    model = Plain()
    with filtered(model) as f:
        keeps(model, f, ("dog", 900, 3.0))
    before = f.state_dict()
    with raises("not the state of a training filter", "expected what state_dict gave"):
        f.load_state_dict(change(dict(before)))
    assert f.state_dict() == before
