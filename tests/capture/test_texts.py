"""A few numbers of a text tell it from others, and know it again in another dtype or padded to another length."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import memhook
from memhook import CalibrationMismatchError, ModuleAdapter, calibrate, detect
from memhook.capture.texts import Text, are_texts, same_text, same_texts
from memhook.testing import sample, tiny_unet


def text(seed=0, *, tokens=20, width=48, samples=1):
    """Tokens as an encoder's last normalization leaves them: the first one the same for all texts, all of one length."""
    values = torch.randn(samples, tokens, width, generator=torch.Generator().manual_seed(seed))
    values[:, 0] = torch.linspace(-1, 1, width)
    return torch.nn.functional.normalize(values, dim=2) * width**0.5


def numbers(embedding):
    [found] = Text.of(embedding).distinct()
    return found


@given(seed=st.integers(0, 1000), other=st.integers(0, 1000), dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
@settings(max_examples=50)
def test_a_text_is_known_again_and_told_from_others(seed, other, dtype):
    known = numbers(text(seed))
    assert same_text(known, numbers(text(seed).to(dtype)))
    assert same_text(known, numbers(text(other).to(dtype))) == (seed == other)


@pytest.mark.parametrize("token", [1, 7, 8, 30, 31, 76])
def test_another_word_anywhere_is_another_text(token):
    changed = text(tokens=77)
    changed[:, token] = text(9, tokens=77)[:, token]
    assert not same_text(numbers(text(tokens=77)), numbers(changed))


@pytest.mark.parametrize("factor", [1.05, 1.5, -1.0, 0.0])
def test_a_scaled_text_is_another_text(factor):
    assert not same_text(numbers(text()), numbers(factor * text()))


def test_texts_of_two_lengths_are_compared_as_far_as_both_go():
    """Hosts pad the negative prompt to the length of the prompt."""
    assert same_text(numbers(text(tokens=77)[:, :50]), numbers(text(tokens=77)))
    assert not same_text(numbers(text(1, tokens=77)[:, :50]), numbers(text(tokens=77)))
    assert not same_text(numbers(text(tokens=5)), numbers(text(tokens=77)[:, :7]))  # nothing to compare


def test_texts_of_many_samples_are_few():
    both = torch.cat([text(0), text(1), text(0), text(1)])
    found = Text.of(both).distinct()
    assert len(found) == 2
    assert are_texts(found)
    assert same_texts(found, found[::-1])
    assert not same_texts(found, found[:1])
    assert not same_texts(found[:1], found)


def test_a_text_of_zeros():
    """SDXL's for an empty negative prompt."""
    assert same_text(numbers(torch.zeros(1, 9, 4)), numbers(torch.zeros(1, 9, 4)))
    assert not same_text(numbers(torch.zeros(1, 9, 4)), numbers(torch.ones(1, 9, 4)))


@pytest.mark.parametrize("value", [3, [3], [{}], [{"tokens": 3, "dtype": "a", "parts": [[1.0]]}], [{"tokens": 0, "dtype": "a", "parts": []}]])
def test_what_is_no_text(value):
    assert not are_texts(value)


# ---- in the setting


def watched(layout="uncond_first", *, seed=0, uncond=None, dtype=torch.float32):
    unet = tiny_unet().to(dtype)
    cond = torch.randn(1, 5, 6, generator=torch.Generator().manual_seed(seed))
    uncond = torch.zeros(1, 5, 6) if uncond is None else uncond
    with memhook.watch(unet, adapter=ModuleAdapter(unet, layout=layout)) as trace:
        sample(unet, layout=layout, cond=cond.to(dtype), uncond=uncond.to(dtype), seed=seed)
    return trace


@pytest.mark.parametrize("layout", ["uncond_first", "cond_first", "two_calls_uncond_first", "two_calls_cond_first"])
def test_another_unconditional_text_is_another_setting(layout):
    calibration = calibrate([watched(seed=seed) for seed in range(9)])
    assert detect(watched(layout, seed=99), calibration, fpr=0.1).scores.shape == (1,)
    with pytest.raises(CalibrationMismatchError, match=r"differs in unconditional_text: .*negative prompt.*use that of the calibration"):
        detect(watched(layout, uncond=torch.ones(1, 5, 6)), calibration, fpr=0.1)


def test_another_dtype_of_the_unconditional_text_is_none():
    calibration = calibrate([watched(seed=seed, uncond=text(tokens=5, width=6)) for seed in range(9)])
    assert detect(watched(uncond=text(tokens=5, width=6), dtype=torch.bfloat16), calibration, fpr=0.1).scores.shape == (1,)


def test_one_sample_with_another_negative_prompt_is_enough(tmp_path):
    plain = torch.zeros(2, 5, 6)
    one_other = torch.stack([torch.zeros(5, 6), torch.ones(5, 6)])
    unet = tiny_unet()

    def run(uncond):
        with memhook.watch(unet, adapter=ModuleAdapter(unet, layout="uncond_first")) as trace:
            sample(unet, cond=torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0)), uncond=uncond)
        return trace

    calibrate([run(plain)] * 5).save(tmp_path / "c.safetensors")
    calibration = memhook.Calibration.load(tmp_path / "c.safetensors")
    assert detect(run(plain), calibration, fpr=0.1).scores.shape == (2,)
    mixed = run(one_other)
    with pytest.raises(CalibrationMismatchError, match="unconditional_text"):
        detect(mixed, calibration, fpr=0.1)
    assert detect(mixed.samples(slice(0, 1)), calibration, fpr=0.1).scores.shape == (1,)
