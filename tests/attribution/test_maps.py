"""Where in the picture the difference is: against the formula, in flight, and as pictures."""

import base64
import io
import re

import numpy as np
import pytest
import torch

import memhook
from memhook import DifferenceMap, difference_map
from memhook.errors import MemhookError, NoGuidanceError
from memhook.testing import sample, tiny_unet

LAYOUTS = ["uncond_first", "cond_first", "two_calls_uncond_first", "two_calls_cond_first"]


def recorded(preds, *, evaluations=(-1,), grid=None):
    """A map of predictions made by hand, ``[(pred_cond, pred_uncond), ...]``."""
    trace = memhook.Trace(keep_evaluations=True)
    for number, (cond, uncond) in enumerate(preds):
        trace.record(cond, uncond, timestep=900 - number)
    return DifferenceMap.of(trace, evaluations=evaluations, grid=grid)


def planted(region, *, size=8, seed=0, strength=5.0):
    """Predictions that differ by noise everywhere and by much more in a region."""
    maker = torch.Generator().manual_seed(seed)
    uncond = torch.randn(2, 4, size, size, generator=maker)
    cond = uncond + 0.2 * torch.randn(2, 4, size, size, generator=maker)
    cond[(slice(None), slice(None), *region)] += strength
    return cond, uncond


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_map_of_one_evaluation_is_the_published_one_up_to_a_factor(layout):
    unet = tiny_unet()
    adapter = memhook.ModuleAdapter(unet, layout=layout)
    with memhook.watch(unet, adapter=adapter, keep="calls") as trace:
        sample(unet, layout=layout, steps=5)
    with difference_map(unet, adapter=adapter, evaluations=[1, -1]) as found:
        sample(unet, layout=layout, steps=5)
    for row, number in enumerate([1, 4]):
        evaluation = trace.evaluations[number]
        sigma = 0.1
        published = ((evaluation.pred_cond - evaluation.pred_uncond) ** 2 / sigma**2).sum(dim=1).numpy()
        assert np.allclose(found.squares[row] / sigma**2, published, rtol=1e-4)
        assert np.allclose(np.sqrt(found.squares[row].sum(axis=(1, 2))), found.trace.magnitudes[number], rtol=1e-5)
    single = DifferenceMap.of(trace, evaluations=[-1]).maps
    assert np.allclose(single, published / published.mean(axis=(1, 2), keepdims=True), rtol=1e-4)
    assert np.allclose(DifferenceMap.of(trace, evaluations=[1, -1]).maps, found.maps, rtol=1e-4)


def test_every_evaluation_counts_the_same():
    first, second = planted(np.s_[:2, :], strength=1.0), planted(np.s_[6:, :], strength=100.0)
    whole = recorded([first, second], evaluations=[0, 1]).maps
    parts = [recorded([one], evaluations=[0]).maps for one in (first, second)]
    assert np.allclose(whole, (parts[0] + parts[1]) / 2, rtol=1e-5)
    assert np.allclose(whole.mean(axis=(1, 2)), 1)


def test_watching_changes_nothing_and_keeps_no_prediction():
    unet = tiny_unet()
    plain = sample(unet, steps=6)
    with difference_map(unet, evaluations=[0, -2, -1], adapter=memhook.ModuleAdapter(unet, layout="uncond_first")) as found:
        assert torch.equal(sample(unet, steps=6), plain)
    assert sorted(found._early) == [0]
    assert [number for number, _ in found._late] == [4, 5]
    kept = [*found._early.values(), *(part for _, part in found._late)]
    assert all(part.shape == (2, 8, 8) and part.untyped_storage().nbytes() == 4 * part.numel() for part in kept)
    with pytest.raises(MemhookError, match="kept only numbers"):
        found.trace.evaluations  # noqa: B018


def test_a_region_stands_out_and_is_counted():
    found = recorded([planted(np.s_[1:3, 4:6])])
    assert all(np.unravel_index(one.argmax(), one.shape)[0] in (1, 2) for one in found.maps)
    assert (found.concentration(4 / 64) > 0.9).all()
    assert recorded([(torch.ones(1, 4, 8, 8), torch.zeros(1, 4, 8, 8))]).concentration(0.25) == pytest.approx([0.25])
    assert "strongest tenth of the picture holds" in str(found)
    assert np.isclose(found.scaled((32, 16)).shape, (16, 32)).all()
    with pytest.raises(MemhookError, match="share is 0"):
        found.concentration(0)


def test_no_difference_at_all_is_an_even_map():
    same = torch.ones(1, 4, 8, 8)
    assert (recorded([(same, same)]).maps == 1).all()


def test_tokens_and_frames():
    cond, uncond = torch.zeros(1, 6, 3), torch.zeros(1, 6, 3)
    cond[0, 4] = 2.0
    assert recorded([(cond, uncond)], grid=(2, 3)).squares[0, 0].tolist() == [[0, 0, 0], [0, 12, 0]]
    with pytest.raises(MemhookError, match=r"6 tokens, which make no grid of 2 x 2; pass grid"):
        recorded([(cond, uncond)])
    video = torch.zeros(1, 2, 4, 3, 3)
    video[:, :, 1, 2, 2] = 1.0
    assert recorded([(video, torch.zeros_like(video))]).squares[0, 0, 2, 2] == pytest.approx(2 / 4)
    with pytest.raises(MemhookError, match="no two axes of a picture"):
        recorded([(torch.ones(1, 3), torch.zeros(1, 3))])


def test_evaluations_without_guidance():
    cond, uncond = planted(np.s_[:1, :])
    assert len(recorded([(cond, uncond), (cond, None)], evaluations=[0, 1]).squares) == 1
    with pytest.raises(NoGuidanceError, match=r"none of the evaluations \[1\]"):
        _ = recorded([(cond, uncond), (cond, None)], evaluations=[1]).maps
    with pytest.raises(NoGuidanceError):
        _ = recorded([(cond, None)]).maps


def test_bad_input():
    cond, uncond = planted(np.s_[:1, :])
    with pytest.raises(MemhookError, match="evaluation 3 was asked for, and the run had 1"):
        _ = recorded([(cond, uncond)], evaluations=[3]).maps
    with pytest.raises(MemhookError, match="evaluation -2 was asked for"):
        _ = recorded([(cond, uncond)], evaluations=[-2]).maps
    for wrong in ([], ["last"], [0.5]):
        with pytest.raises(MemhookError, match="expected numbers of evaluations"):
            recorded([(cond, uncond)], evaluations=wrong)
    with pytest.raises(MemhookError, match="NaN or infinite"):
        _ = recorded([(cond * float("nan"), uncond)]).maps
    unet = tiny_unet()
    adapter = memhook.ModuleAdapter(unet, layout="uncond_first")
    with difference_map(unet, adapter=adapter) as found:
        sample(unet)
        sample(unet)
    with pytest.raises(MemhookError, match="2 runs of the sampler"):
        _ = found.maps
    with difference_map(unet, adapter=adapter) as found:
        pass
    with pytest.raises(NoGuidanceError, match="nothing was recorded"):
        _ = found.maps


def test_half_precision_does_not_overflow():
    cond = torch.full((1, 4, 8, 8), 300.0, dtype=torch.float16)
    assert recorded([(cond, torch.zeros_like(cond))]).squares[0, 0, 0, 0] == 4 * 300.0**2


def test_the_overlay_is_red_where_the_map_is_high_and_gray_elsewhere():
    from PIL import Image

    found = recorded([planted(np.s_[:4, :], strength=50.0)])
    picture = Image.new("RGB", (64, 64), (90, 160, 220))
    pixels = np.asarray(found.overlay(picture, sample=1), int)
    assert pixels.shape == (64, 64, 3)
    assert (pixels[:20, :, 0] - pixels[:20, :, 2] > 80).all()
    assert (abs(pixels[50:, :, 0] - pixels[50:, :, 2]) < 10).all()
    assert np.asarray(found.overlay(picture, strength=0)).std(axis=2).max() == 0
    with pytest.raises(MemhookError, match="strength is 2"):
        found.overlay(picture, strength=2)
    with pytest.raises(MemhookError, match="sample is 2; there are 2"):
        found.overlay(picture, sample=2)


def test_figure_and_page_hold_every_sample_with_numbers():
    from PIL import Image

    found = recorded([planted(np.s_[:1, :])])
    figure = found.plot([Image.new("RGB", (16, 16))] * 2)
    shown = [axes for axes in figure.axes if axes.get_images()]
    assert len(shown) >= 6
    assert any("strongest tenth" in axes.get_title() for axes in figure.axes)
    assert len([axes for axes in found.plot().axes if axes.get_images()]) >= 2
    with pytest.raises(MemhookError, match="1 pictures for 2 samples"):
        found.plot([Image.new("RGB", (16, 16))])
    page = found._repr_html_()
    pictures = [Image.open(io.BytesIO(base64.b64decode(data))) for data in re.findall(r"base64,([^\"]+)", page)]
    assert [picture.size for picture in pictures] == [(128, 128)] * 2
    assert page.count("times the mean") == 2
