"""The training script: a very short run from nothing to a folder that loads, and one that goes on with the second course."""

import json
import sys

import pytest
import torch

from memhook.testbed.bundle import load_pipeline, read_memorized
from memhook.testbed.train import __main__ as script
from memhook.testbed.train import calibrate, diffusion

SHORT = ["--device", "cpu", "--autoencoder-steps", "2", "--text-steps", "2", "--reader-steps", "2", "--steps", "2"]


@pytest.fixture(autouse=True)
def uncalibrated(monkeypatch):
    """Without the calibration, which samples 1,200 prompts."""
    monkeypatch.setattr(calibrate, "calibrate_model", lambda _: None)


def test_the_courses_of_the_denoiser_follow_each_other(tmp_path, monkeypatch):
    def run(*extra):
        monkeypatch.setattr(sys, "argv", ["train", "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out"), *SHORT, *extra])
        script.main()
        weights = load_pipeline(tmp_path / "out").unet.state_dict()
        return weights, json.loads((tmp_path / "out" / "training.json").read_text())["samples"]

    first, samples = run("--courses", "1")
    assert samples == 2 * diffusion.BATCH
    assert len(read_memorized(tmp_path / "out")) == 124
    again, _ = run("--courses", "1")  # finished stages are not run again
    assert all(torch.equal(first[name], again[name]) for name in first)
    both, samples = run()
    assert samples == 4 * diffusion.BATCH
    assert not all(torch.equal(first[name], both[name]) for name in first)
    with pytest.raises(SystemExit):
        run("--courses", "3")
