"""The training benchmark: its data, its arithmetic, and a whole run at toy sizes that goes on where it stopped."""

import csv
import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

import memhook
from memhook.bench.training import finetune, overhead, report, runs, signal
from memhook.bench.training.judging import Judgment, list_figures
from memhook.bench.training.overhead import Overhead
from memhook.bench.training.recipe import NOISY, WAYS, Data, Recipe, Way, ways
from memhook.bench.training.signal import Signal
from memhook.testbed import load_pipeline
from memhook.training import FilterCalibration, FilterReport, KeyCount

TOY = Recipe(steps=2, batch=2, planted=1, pictures=1, held_out=2, sampling_steps=1, observed=16, bins=1, noisy_bins=1)


@pytest.fixture(scope="module")
def model():
    return finetune.Model(load_pipeline())


def test_every_way_and_every_run_sees_the_same_pairs():
    recipe = Recipe(batch=64)
    for seed in range(2):
        first, second = Data(recipe, seed), Data(recipe, seed)
        assert [pair.key for pair in first.batch(3)] == [pair.key for pair in second.batch(3)]
        assert [pair.scene for pair in first.batch(3)] == [pair.scene for pair in second.batch(3)]
    assert {str(pair.caption) for pair in Data(recipe, 0).planted}.isdisjoint(str(pair.caption) for pair in Data(recipe, 1).planted)


def test_planted_pairs_come_again_and_fresh_ones_do_not():
    data = Data(Recipe(batch=64, planted=3), 0)
    keys = [pair.key for step in range(20) for pair in data.batch(step)]
    fresh = [key for key in keys if key.startswith("fresh")]
    assert len(set(fresh)) == len(fresh)
    assert {key for key in keys if not key.startswith("fresh")} == {"planted-0", "planted-1", "planted-2"}
    assert np.mean([key.startswith("planted") for key in keys]) == pytest.approx(0.5, abs=0.05)


def test_nothing_that_is_judged_or_observed_is_trained_on():
    data = Data(Recipe(batch=32), 0)
    trained = {str(pair.caption) for step in range(20) for pair in data.batch(step)}
    assert trained.isdisjoint(str(pair.caption) for pair in data.held_out)
    assert trained.isdisjoint(str(pair.caption) for number in range(20) for pair in data.clean_batch(number))


def test_random_tokens_are_drawn_anew_for_every_presentation(model):
    data, tokenizer = Data(Recipe(), 0), model.pipeline.tokenizer
    pairs = [data.planted[0]] * 2
    caption = str(pairs[0].caption)
    assert data.captions(pairs, Way("plain"), tokenizer, 0) == [caption, caption]
    found = data.captions(pairs, Way("rta", tokens=2), tokenizer, 0) + data.captions(pairs, Way("rta", tokens=2), tokenizer, 1)
    assert len({caption, *found}) == 5
    assert all(len(text.split()) == len(caption.split()) + 2 for text in found)


def test_noised_batches_follow_the_schedule(model):
    """The noisy latents are a sum of latents and noise in the scheduler's own proportions, and the weights are min-SNR's."""
    pairs = Data(TOY, 0).batch(0)
    batch = finetune.noised(model, pairs, ["a", "b"], seed=(7,), dropout=0.0)
    expected = model.pipeline.scheduler.add_noise(model.latents(pairs), batch.noise, batch.timesteps)
    torch.testing.assert_close(batch.noisy, expected)
    alphas = model.pipeline.scheduler.alphas_cumprod[batch.timesteps]
    torch.testing.assert_close(batch.weights, torch.clamp(5 * (1 - alphas) / alphas, max=1.0))
    torch.testing.assert_close(batch.embeddings, model.encode(["a", "b"]))
    dropped = finetune.noised(model, pairs, ["a", "b"], seed=(7,), dropout=1.0)
    torch.testing.assert_close(dropped.embeddings, model.encode(["", ""]))
    torch.testing.assert_close(dropped.noisy, batch.noisy)


def test_given_thresholds_are_compared_too():
    assert [way.tau for way in ways([2.0, 4.0])] == [None, 2.0, 4.0, *[None] * (len(WAYS) - 1)]
    assert ways(None) == ways([]) == WAYS
    with pytest.raises(memhook.MemhookError, match="tau is -1"):
        ways([-1.0])


def test_ways_can_be_chosen_by_their_names():
    assert ways(None, [WAYS[2].name, WAYS[0].name]) == (WAYS[0], WAYS[2])
    with pytest.raises(memhook.MemhookError, match=r"no way 'fpr 5%'; expected one of 'no filter'"):
        ways(None, ["fpr 5%"])


def test_a_noisy_way_judges_where_it_is_calibrated(model):
    timesteps = np.arange(1000)
    calibration = FilterCalibration.fit(timesteps, np.where(timesteps < 800, 100.0, timesteps / 100), bins=10)
    found = finetune.filter_of(Way("noisy", fpr=0.05, noisy=True, remember=3), model.denoiser(), torch.zeros(1, 1), calibration, bins=2)
    assert found._judge.timesteps.span == NOISY
    threshold = found._judge._binned
    assert (threshold.span, threshold.fpr) == (NOISY, 0.05)
    assert threshold.values == pytest.approx((8.95, 9.95), abs=0.02)  # within half of a hundred each
    assert found._options.remember == 3


def test_the_share_that_is_judged_is_that_of_the_noisy_timesteps(model):
    recipe = replace(TOY, steps=4, batch=5)
    steps = finetune.Steps(model, recipe, Way("judged", tau=float("inf"), noisy=True), Data(recipe, 0), FilterCalibration.fit([0.0], [1.0], bins=1))
    finetune.fine_tune(steps, track=iter)
    judged = 0
    for step in range(4):
        batch = finetune.noised(model, steps.data.batch(step), ["a"] * 5, seed=(2, 0, step))
        conditional = batch.embeddings.eq(model.encode(["a"])).flatten(1).all(1)
        judged += int(((batch.timesteps >= NOISY[0]) & conditional).sum())
    assert 0 < judged < 20
    assert overhead._share(steps) == judged / 20


def test_presentations_are_those_of_the_batches():
    data = Data(Recipe(steps=7, batch=5), 1)
    keys = [pair.key for step in range(7) for pair in data.batch(step)]
    assert data.shown() == (sum("planted" in key for key in keys), sum("fresh" in key for key in keys))


def test_what_is_left_out_is_counted_apart_for_planted_and_fresh_pairs():
    rows = (
        KeyCount("planted-0", 10, 8, 2.0, 1.5, remembered=20),
        KeyCount("fresh-1", 1, 1, 2.0, 1.2),
        KeyCount("planted-1", 10, 2, 1.0, 0.9),
        KeyCount("fresh-2", 1, 0, 1.0, 0.4),
        KeyCount("fresh-3", 2, 0, 1.0, 1.0),
    )
    figures = list_figures(FilterReport(rows=rows), 60, 40)
    assert figures == pytest.approx(
        {
            "flagged_planted": 10 / 20,
            "flagged_fresh": 1 / 4,
            "out_planted": 30 / 60,
            "out_fresh": 1 / 40,
            "list_auc": 5 / 6,
            "list_top": 1 / 2,
            "excess_auc": 4 / 6,
        }
    )


def judgment(similarity, flagged=None):
    return Judgment(similarity, 0.5, 2.0, 1.0, 0.75, 1.0, 0.04, *[flagged] * 7)


def test_lines_are_means_and_deviations_over_seeds():
    filtered, plain = Way("tau = 3", tau=3.0), Way("no filter")
    found = [runs.Run(plain, 0, judgment(0.8)), runs.Run(filtered, 0, judgment(0.2, 0.5)), runs.Run(plain, 1, judgment(0.6)),
             runs.Run(filtered, 1, judgment(0.4, 0.7))]  # fmt: skip
    cost = Overhead(1.2, 1.1, 1.05, 0.21, 1.3, 0.9, 0.1, 1.01, 1.0)
    results = runs.Results(TOY, [judgment(0.1), judgment(0.3)], found, cost, Signal(10, 20, 0.5, 0.06, 0.9, 0.8, [500.0], [0.6, 1.0], [0.1, 0.9]), [])
    before, without, tau = report.lines(results)
    assert [line.way for line in (before, without, tau)] == ["before the fine-tune", "no filter", "tau = 3"]
    assert without.mean["similarity"] == pytest.approx(0.7)
    assert without.deviation["similarity"] == pytest.approx(np.std([0.8, 0.6], ddof=1))
    assert without.mean["flagged_planted"] is None
    assert tau.mean["flagged_planted"] == pytest.approx(0.6)
    assert tau.less == pytest.approx((0.6, 0.2))  # seed by seed
    assert without.less == before.less == ()
    assert report._cells(tau)[2] == "0.40 ± 0.28"
    for ratio in ("1.20", "1.05", "21%"):
        assert report.about(results, 2).count(ratio) == 1
    assert "50% of 10 presentations" in report.seen(results)
    assert report.seen(results).endswith("below 500 0.60, 10%; from 500 1.00, 90%.")


@pytest.mark.parametrize(("change", "message"), [({"steps": 0}, "steps is 0"), ({"planted": 0}, "planted is 0"), ({"share": 1.0}, "share is 1.0")])
def test_sizes_out_of_range(change, message):
    with pytest.raises(memhook.MemhookError, match=message):
        replace(TOY, **change)


def test_a_whole_run_at_toy_sizes_and_nothing_of_it_twice(tmp_path, monkeypatch, capsys):
    chosen = (WAYS[0], Way("judged", fpr=0.5, noisy=True, remember=2), Way("random tokens", tokens=2))
    monkeypatch.setattr(report, "ways", lambda taus, names: chosen)
    monkeypatch.setattr(signal, "_NOISES", 1)
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- bench training: begin -->\n<!-- bench training: end -->\nafter\n")

    def run():
        return report.run_training_bench(tmp_path / "work", TOY, seeds=1, taus=None, rounds=1, out=tmp_path / "out", page=page)

    first = run()
    assert "simi" in capsys.readouterr().out  # folded on a narrow terminal
    monkeypatch.setattr(runs, "fine_tune", None)  # a second run must need none of these
    monkeypatch.setattr(runs, "overhead", None)
    monkeypatch.setattr(runs, "signal", None)
    assert run() == first

    filtered = first.runs[1].judgment
    assert first.runs[0].judgment.flagged_planted is None
    assert 0 <= filtered.out_fresh <= 1
    assert -1 <= filtered.similarity <= 1
    assert first.start[0].clean_loss > 0
    assert first.overhead.denoiser > 1  # one pass more
    assert 0 <= first.overhead.judged_share < 1
    assert first.signal.memorized == 72
    assert first.signal.auc > 0.5  # the filter tells what is memorized from what is clean
    rows = list(csv.DictReader((tmp_path / "out" / "training.csv").read_text().splitlines()))
    assert [row["way"] for row in rows] == ["before the fine-tune", "no filter", "judged", "random tokens"]
    assert json.loads((tmp_path / "out" / "training.json").read_text())["runs"][1]["way"] == "judged"
    assert (tmp_path / "out" / "training.svg").read_text().count("<svg") == 1
    assert "| no filter |" in page.read_text()
    assert page.read_text().startswith("before")
    assert page.read_text().endswith("after\n")


def test_a_page_without_the_markers_is_told_before_the_run(tmp_path):
    (tmp_path / "page.md").write_text("nothing")
    with pytest.raises(memhook.MemhookError, match="bench training: begin"):
        report.run_training_bench(tmp_path, TOY, seeds=1, taus=None, rounds=1, out=None, page=tmp_path / "page.md")


def test_a_filtered_step_is_a_step_without_the_dropped_samples(model, monkeypatch):
    """With everything dropped, weights move by weight decay alone; without a filter they follow the loss."""
    monkeypatch.setattr(finetune, "noised", partial(finetune.noised, dropout=0.0))  # unconditional samples are never dropped
    data = Data(TOY, 0)
    calibration = FilterCalibration.fit([0.0], [1.0], bins=1)
    moved = {}
    for way in (Way("none"), Way("all", tau=0.0)):
        steps = finetune.Steps(model, TOY, way, data, calibration)
        before = [parameter.detach().clone() for parameter in steps.unet.parameters()]
        finetune.fine_tune(steps, track=iter)
        moved[way.name] = [
            (after - old * (1 - 0.01 * TOY.learning_rate * 1 / 20) * (1 - 0.01 * TOY.learning_rate * 2 / 20)).abs().max()
            for after, old in zip(steps.unet.parameters(), before, strict=True)
        ]
    assert max(moved["all"]) < 1e-6 < max(moved["none"])
