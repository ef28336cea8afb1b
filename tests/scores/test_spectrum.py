"""The magnitude in units of what clean prompts have at each frequency."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import memhook
from memhook import CalibrationError, CalibrationMismatchError, CleanSpectrum, Evaluation, MemhookError, NoGuidanceError, ReplayError
from memhook.evaluation.roc import roc_auc
from memhook.testing import sample


def differing(difference, **about):
    """An evaluation with this difference between its predictions."""
    base = torch.randn(difference.shape, generator=torch.Generator().manual_seed(5))
    return Evaluation(base + difference, base, timestep=981.0, **about)


def smooth(samples, seed, size=8):
    """Differences of clean prompts: a color for each channel, and little else."""
    generator = torch.Generator().manual_seed(seed)
    colors = torch.randn(samples, 4, 1, 1, generator=generator)
    return differing(colors.expand(-1, -1, size, size) + 0.02 * torch.randn(samples, 4, size, size, generator=generator))


def transcription(difference, clean, shrinkage):
    """The same with numpy's loops over samples, channels and frequencies."""
    power = np.mean([np.abs(np.fft.fft2(one)) ** 2 for one in clean], axis=0) / clean.shape[-1] ** 2
    values = []
    for one in difference:
        amplitude = np.abs(np.fft.fft2(one)) ** 2 / clean.shape[-1] ** 2
        values.append(np.sqrt(np.mean(amplitude / (power + shrinkage * power.mean()))))
    return np.array(values)


def test_agrees_with_a_transcription_in_numpy():
    clean, other = smooth(50, 0), smooth(3, 1)
    spectrum = CleanSpectrum.fit([clean.take(torch.arange(20)), clean.take(torch.arange(20, 50))], shrinkage=0.3)
    assert spectrum.samples == 50
    found = spectrum.magnitude(other).numpy()
    expected = transcription(*((e.pred_cond - e.pred_uncond).double().numpy() for e in (other, clean)), 0.3)
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_clean_prompts_have_one_and_sharp_ones_more_whatever_their_norm():
    spectrum = CleanSpectrum.fit([smooth(400, 0)], shrinkage=1e-6)
    clean = smooth(100, 1)
    assert spectrum.magnitude(clean).square().mean() == pytest.approx(1, rel=0.05)
    sharp = differing(0.3 * torch.randn(100, 4, 8, 8, generator=torch.Generator().manual_seed(2)))
    plain = [memhook.magnitude(e.pred_cond, e.pred_uncond).numpy() for e in (sharp, clean)]
    assert roc_auc(*plain) < 0.5
    assert roc_auc(spectrum.magnitude(sharp).numpy(), spectrum.magnitude(clean).numpy()) == 1.0


def test_a_frequency_of_one_channel_counts_in_that_channel_alone():
    wave = torch.cos(2 * torch.pi * 3 * torch.arange(8) / 8).expand(8, 8)
    channel = [torch.zeros(1, 4, 8, 8) for _ in range(2)]
    channel[0][0, 0], channel[1][0, 1] = wave, wave
    spectrum = CleanSpectrum.fit([differing(channel[0])], shrinkage=0.1)
    usual, unusual = (float(spectrum.magnitude(differing(one))) for one in channel)
    assert unusual > 5 * usual


@pytest.fixture
def first(unet):
    run = memhook.probe(unet, lambda: sample(unet), adapter=memhook.ModuleAdapter(unet, layout="uncond_first"))
    return run.evaluations[0]


def test_it_is_an_objective_for_optimization_and_attribution(first):
    spectrum = CleanSpectrum.fit([first])
    objective = spectrum.objective(first)
    torch.testing.assert_close(objective(first.embedding).detach(), spectrum.magnitude(first))
    found = memhook.optimize_embedding(objective, first.embedding, target=0.0, max_steps=3)
    assert (found.after < found.before).all()
    embedding = first.embedding.clone().requires_grad_()
    [gradient] = torch.autograd.grad(objective(embedding).sum(), embedding)
    step = torch.zeros_like(embedding)
    step[0, 2, 1] = 1e-2
    sloped = (objective(embedding + step) - objective(embedding - step)).sum().detach() / 2e-2
    assert float(gradient[0, 2, 1]) == pytest.approx(float(sloped), rel=0.02)


def test_equal_predictions_have_magnitude_zero_and_a_gradient(first):
    spectrum = CleanSpectrum.fit([first])
    base = first.pred_uncond
    same = replace(first, replay=lambda embedding: base + 0 * embedding.sum())
    embedding = first.embedding.clone().requires_grad_()
    values = spectrum.objective(same)(embedding)
    assert values.tolist() == [0, 0]
    [gradient] = torch.autograd.grad(values.sum(), embedding)
    assert not gradient.any()


def test_half_precision_and_video(first):
    halves = replace(first, pred_cond=first.pred_cond.half(), pred_uncond=first.pred_uncond.half())
    spectrum = CleanSpectrum.fit([first])
    torch.testing.assert_close(spectrum.magnitude(halves), spectrum.magnitude(first), rtol=0.02, atol=0)
    video = differing(torch.randn(2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert CleanSpectrum.fit([video]).magnitude(video).shape == (2,)


def test_a_saved_spectrum_is_the_same(tmp_path):
    spectrum = CleanSpectrum.fit([smooth(9, 0)], shrinkage=0.2)
    spectrum.save(tmp_path / "new" / "a.safetensors")
    again = CleanSpectrum.load(tmp_path / "new" / "a.safetensors")
    assert torch.equal(again.power, spectrum.power)
    assert (again.samples, again.space, again.timestep, again.shrinkage) == (9, "eps", 981.0, 0.2)


def test_files_that_are_no_spectrum(tmp_path):
    path = tmp_path / "a.safetensors"
    with pytest.raises(CalibrationError, match="there is no spectrum"):
        CleanSpectrum.load(path)
    path.write_bytes(b"\x00" * 50)
    with pytest.raises(CalibrationError, match="cannot be read"):
        CleanSpectrum.load(path)
    memhook.calibrate([1.0, 2.0]).save(path)
    with pytest.raises(CalibrationError, match="not a spectrum"):
        CleanSpectrum.load(path)
    about = {"format": "memhook-spectrum-1", "samples": 3, "space": "eps", "timestep": None, "shrinkage": 0.1}
    for key, value in (("samples", "3"), ("space", "noise"), ("timestep", "x"), ("shrinkage", None), ("samples", 0), ("shrinkage", -1.0)):
        save_file({"power": torch.ones(4, 8, 8)}, path, metadata={"memhook": json.dumps(about | {key: value})})
        with pytest.raises(CalibrationError, match=r"damaged|expected"):
            CleanSpectrum.load(path)
    for power in (torch.ones(8, 8), -torch.ones(4, 8, 8), torch.full((4, 8, 8), torch.nan), torch.zeros(4, 8, 8), torch.ones(4, 8, 8).double()):
        save_file({"power": power}, path, metadata={"memhook": json.dumps(about)})
        with pytest.raises(CalibrationError, match=r"damaged|expected"):
            CleanSpectrum.load(path)


def test_what_does_not_fit_is_refused(first):
    spectrum = CleanSpectrum.fit([smooth(9, 0)])
    with pytest.raises(CalibrationMismatchError, match=r"shape \(4, 16, 16\).*shape \(4, 8, 8\)"):
        spectrum.magnitude(smooth(2, 1, size=16))
    with pytest.raises(CalibrationMismatchError, match="timestep 500"):
        spectrum.magnitude(replace(smooth(2, 1), timestep=torch.tensor([500, 500])))
    with pytest.raises(CalibrationMismatchError, match="predictions of v"):
        spectrum.magnitude(replace(smooth(2, 1), space="v"))
    with pytest.raises(MemhookError, match="different timesteps"):
        spectrum.magnitude(replace(smooth(2, 1), timestep=torch.tensor([981, 500])))
    with pytest.raises(NoGuidanceError, match="no unconditional"):
        spectrum.magnitude(replace(smooth(2, 1), pred_uncond=None))
    with pytest.raises(ReplayError, match="without its call"):
        spectrum.objective(smooth(2, 1))
    with pytest.raises(MemhookError, match="over space needs"):
        CleanSpectrum.fit([differing(torch.ones(2, 5, 6))])
    with pytest.raises(CalibrationError, match="no evaluations"):
        CleanSpectrum.fit([])
    with pytest.raises(CalibrationError, match="shape"):
        CleanSpectrum.fit([smooth(2, 0), smooth(2, 0, size=16)])
    with pytest.raises(CalibrationError, match="NaN"):
        CleanSpectrum.fit([differing(torch.full((2, 4, 8, 8), torch.nan))])
    with pytest.raises(CalibrationError, match="zero everywhere"):
        CleanSpectrum.fit([Evaluation(torch.ones(2, 4, 8, 8), torch.ones(2, 4, 8, 8))])
    with pytest.raises(CalibrationError, match="shrinkage"):
        CleanSpectrum.fit([smooth(2, 0)], shrinkage=0.0)


def test_a_spectrum_that_was_fitted_under_inference_mode_can_be_differentiated(first):
    with torch.inference_mode():
        predicted = Evaluation(first.pred_cond.clone(), first.pred_uncond.clone(), timestep=first.timestep)
        spectrum = CleanSpectrum.fit([predicted, predicted])
        found = memhook.optimize_embedding(spectrum.objective(first), first.embedding, target=0.0, max_steps=2)
    assert (found.after < found.before).all()
    assert not CleanSpectrum.fit([replace(first, pred_cond=first.pred_cond.clone().requires_grad_())]).power.requires_grad
