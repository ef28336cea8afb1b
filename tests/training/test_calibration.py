"""Thresholds from clean data: quantiles in bins of timesteps, saved and loaded."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

import memhook
from memhook import Calibration
from memhook.training import FilterCalibration
from tests.training.models import NULL, Plain, embeddings, losses_of, pairs


def made(n=400, bins=4, seed=0):
    rng = np.random.default_rng(seed)
    t = rng.integers(1000, size=n)
    return FilterCalibration.fit(t, (1 + t / 100) * rng.random(n), bins=bins, shape=(4, 8, 8))


def test_each_bin_holds_as_many_presentations():
    calibration = FilterCalibration.fit(np.arange(100), np.ones(100), bins=4)
    assert [len(part) for part in calibration.bins()] == [25, 25, 25, 25]
    assert calibration.edges == (25, 50, 75)


def test_the_threshold_of_a_bin_is_that_of_the_detection_score_on_its_magnitudes():
    calibration = made()
    threshold = calibration.threshold(fpr=0.05)
    for value, magnitudes in zip(threshold.values, calibration.bins(), strict=True):
        assert value == Calibration(magnitudes[:, None]).threshold(0.05)
    assert list(threshold.values) == sorted(threshold.values)  # these magnitudes grow with the timestep


@given(st.integers(40, 300), st.integers(1, 5), st.sampled_from([0.05, 0.1, 0.3]), st.integers(0, 50))
def test_no_more_than_the_rate_of_the_calibrated_presentations_lies_above(n, bins, fpr, seed):
    rng = np.random.default_rng(seed)
    t, m = rng.random(n), rng.random(n)
    calibration = FilterCalibration.fit(t, m, bins=bins)
    if min(len(part) for part in calibration.bins()) < 1 / fpr:
        return
    limits = calibration.threshold(fpr=fpr)(torch.from_numpy(calibration.timesteps)).numpy()
    numbers = np.searchsorted(calibration.edges, calibration.timesteps, side="right")
    for number in range(len(calibration.edges) + 1):
        mine = numbers == number
        assert (calibration.magnitudes[mine] > limits[mine]).sum() <= fpr * (mine.sum() + 1)


def test_timesteps_fall_in_the_bins_in_which_they_were_calibrated():
    calibration = made()
    threshold = calibration.threshold(fpr=0.05)
    at = dict(zip(threshold.values, calibration.bins(), strict=True))
    limits = threshold(torch.from_numpy(calibration.timesteps))
    for value, magnitudes in at.items():
        assert np.array_equal(calibration.magnitudes[limits.numpy() == np.float32(value)], magnitudes)
    assert threshold(torch.tensor([-5, 5000])).tolist() == pytest.approx([threshold.values[0], threshold.values[-1]])


def test_many_presentations_of_one_timestep_share_a_bin():
    calibration = FilterCalibration.fit([1.0] * 50 + [2.0] * 50, np.ones(100), bins=10)
    assert [len(part) for part in calibration.bins()] == [50, 50]


def test_a_loop_over_clean_pairs_makes_a_calibration_and_the_next_loop_uses_it(tmp_path):
    model = Plain()
    with memhook.training_filter(model, null_embedding=NULL, threshold=None) as f:
        for seed in range(40):
            sample, t, text, target = pairs(0.5, 0.0, -0.6, 0.7, seed=seed)  # magnitudes 1, (unconditional), 1.2, 1.4
            loss = f.mean(losses_of(model(sample, t, text), target))
            torch.testing.assert_close(loss, losses_of(model(sample, t, text), target).mean())  # nothing is dropped
            f._calls.forget()
    calibration = f.calibration(bins=2)
    assert len(calibration.magnitudes) == 120  # not the unconditional ones
    assert calibration.shape == (1, 2, 2)
    calibration.save(tmp_path / "tau.safetensors")
    threshold = FilterCalibration.load(tmp_path / "tau.safetensors").threshold(fpr=0.05)
    assert threshold.values == pytest.approx((1.4, 1.4), abs=1e-5)
    with memhook.training_filter(model, null_embedding=NULL, threshold=threshold) as f:
        model(torch.zeros(2, 1, 2, 2), torch.tensor([5, 900]), embeddings(0.69, 0.71))
        assert f.keep().tolist() == [True, False]


def test_clean_pairs_can_be_observed_without_gradients():
    model, (sample, t, text, _) = Plain(), pairs(0.5, 0.6)
    with memhook.training_filter(model, null_embedding=NULL, threshold=None) as f, torch.no_grad():
        for _ in range(3):
            model(sample, t, text)
            assert f.keep().tolist() == [True, True]
    assert sorted(set(np.round(f.calibration(bins=1).magnitudes, 5))) == pytest.approx([1.0, 1.2])


@pytest.mark.parametrize(("threshold", "message"), [(4.0, "had a threshold"), (None, "has seen no conditional sample")])
def test_only_an_observed_run_can_be_calibrated(threshold, message):
    f = memhook.training_filter(Plain(), null_embedding=NULL, threshold=threshold)
    with pytest.raises(memhook.MemhookError, match=message):
        f.calibration()


def test_a_saved_calibration_is_loaded_as_it_was(tmp_path):
    calibration = made()
    calibration.save(tmp_path / "a.safetensors")
    loaded = FilterCalibration.load(tmp_path / "a.safetensors")
    assert np.array_equal(loaded.timesteps, calibration.timesteps)
    assert np.array_equal(loaded.magnitudes, calibration.magnitudes)
    assert (loaded.edges, loaded.shape) == (calibration.edges, calibration.shape)
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize(
    ("t", "m", "bins", "message"),
    [
        ([1.0, 2.0], [1.0], 1, r"shape \(2,\) and the magnitudes \(1,\)"),
        ([[1.0]], [[1.0]], 1, "expected one timestep a magnitude"),
        ([1.0, np.nan], [1.0, 1.0], 1, "NaN or infinite"),
        ([1.0, 2.0], [1.0, np.inf], 1, "NaN or infinite"),
        ([1.0, 2.0], [1.0, 1.0], 3, "2 presentations cannot be divided into 3 bins"),
        ([1.0, 2.0], [1.0, 1.0], 0, "into 0 bins"),
    ],
)
def test_what_cannot_be_calibrated(t, m, bins, message):
    with pytest.raises(memhook.CalibrationError, match=message):
        FilterCalibration.fit(t, m, bins=bins)


def test_too_few_presentations_for_the_rate():
    with pytest.raises(memhook.CalibrationError, match=r"4 bins hold 25 to 25 presentations each.*at least 99.*Fewer bins"):
        FilterCalibration.fit(np.arange(100), np.ones(100), bins=4).threshold(fpr=0.01)


def good():
    return {name: np.arange(1, 5, dtype=np.float32) for name in ("timesteps", "magnitudes")} | {"edges": np.array([2.5], np.float32)}


@pytest.mark.parametrize(
    "change",
    [
        {"timesteps": np.arange(3, dtype=np.float32)},
        {"magnitudes": np.arange(4, dtype=np.float64)},
        {"magnitudes": np.full(4, np.nan, np.float32)},
        {"edges": np.array([3.0, 2.0], np.float32)},
        {"edges": np.ones((1, 1), np.float32)},
        {"shape": "4x8x8"},
        {"format": "memhook-calibration-1"},
    ],
)
def test_damaged_files_are_refused(tmp_path, change):
    about = {"format": "memhook-training-calibration-1", "shape": [4, 8, 8]}
    about |= {key: value for key, value in change.items() if key in about}
    tensors = good() | {key: value for key, value in change.items() if key not in about}
    path = tmp_path / "a.safetensors"
    save_file(good(), path, metadata={"memhook": json.dumps({"format": "memhook-training-calibration-1", "shape": [4, 8, 8]})})
    assert len(FilterCalibration.load(path).magnitudes) == 4
    save_file(tensors, path, metadata={"memhook": json.dumps(about)})
    with pytest.raises(memhook.CalibrationError, match=r"a\.safetensors"):
        FilterCalibration.load(path)


def test_files_that_are_none(tmp_path):
    with pytest.raises(memhook.CalibrationError, match="there is no calibration file"):
        FilterCalibration.load(tmp_path / "none.safetensors")
    (tmp_path / "text.safetensors").write_text("no")
    with pytest.raises(memhook.CalibrationError, match="cannot be read"):
        FilterCalibration.load(tmp_path / "text.safetensors")
    memhook.calibrate([1.0, 2.0]).save(tmp_path / "detection.safetensors")
    with pytest.raises(memhook.CalibrationError, match="not a calibration of the format"):
        FilterCalibration.load(tmp_path / "detection.safetensors")
