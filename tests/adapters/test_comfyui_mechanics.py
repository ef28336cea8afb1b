"""What a watch leaves in ComfyUI (nothing), and what it does to its pictures (nothing)."""

import gc
import sys
import threading
import types
import weakref
from typing import ClassVar

import pytest
import torch

import memhook
from memhook.testing.state import changes, snapshot
from memhook_comfyui.adapter import RunAdapter, sampler_of
from tests.adapters.comfy import CFGGuider, encode, make_patcher, make_sampler
from tests.adapters.test_comfyui import run, with_area


def guider_of(patcher, cfg=7.5):
    guider = CFGGuider(patcher)
    guider.set_conds(encode("a lighthouse at dusk"), encode("two red apples"))
    guider.set_cfg(cfg)
    return guider


def traces_on(patcher):
    """Everything on a patcher that a wrapper could be left in."""
    options = {key: value for key, value in patcher.model_options.items() if key != "transformer_options"}
    return dict(patcher.wrappers), dict(patcher.callbacks), options, dict(patcher.model_options["transformer_options"]), dict(patcher.attachments)


class Interrupted(Exception):  # noqa: N818 -- like ComfyUI's InterruptProcessingException, a plain Exception
    pass


@pytest.mark.parametrize("keep", ["scalars", "calls"])
@pytest.mark.parametrize("cfg", [7.5, 1.0])
def test_pictures_are_the_same_bits(keep, cfg):
    patcher = make_patcher()
    plain = run_of(patcher, cfg)
    with memhook.watch(patcher, keep=keep):
        watched = run_of(patcher, cfg)
    assert torch.equal(plain, watched)


def run_of(patcher, cfg=7.5, callback=None, samples=2):
    guider = guider_of(patcher, cfg)
    noise = torch.randn(samples, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        return guider.sample(noise, torch.zeros_like(noise), make_sampler(), torch.tensor([9.0, 3.0, 1.0, 0.0]), callback=callback, seed=1)


def interrupt(step, *_):
    if step == 1:
        raise Interrupted


@pytest.mark.parametrize("keep", ["scalars", "calls"])
def test_nothing_is_left_after_an_interruption(keep):
    patcher = make_patcher()
    before, state = traces_on(patcher), snapshot(patcher)
    with pytest.raises(Interrupted), memhook.watch(patcher, keep=keep) as trace:
        run_of(patcher, callback=interrupt)
    assert traces_on(patcher) == before
    assert not changes(state, snapshot(patcher))
    assert len(trace) == 2
    assert torch.equal(run_of(patcher), run_of(make_patcher()))


def test_clones_made_inside_are_watched_and_left_clean():
    """A LoRA node clones the model that it is given."""
    patcher = make_patcher()
    with memhook.watch(patcher) as trace:
        clone = patcher.clone()
        clone_of_clone = clone.clone()
        run_of(clone_of_clone)
    assert len(trace) == 3
    for one in (patcher, clone, clone_of_clone):
        assert traces_on(one) == ({}, {}, {}, {}, {})


def test_wrappers_of_others_stay():
    patcher = make_patcher()
    called = []

    def other(executor, *args, **kwargs):
        called.append(len(args))
        return executor(*args, **kwargs)

    patcher.add_wrapper_with_key("outer_sample", "other", other)
    patcher.add_wrapper_with_key("calc_cond_batch", "other", other)
    with memhook.watch(patcher) as trace:
        run_of(patcher)
    assert len(trace) == 3
    assert len(called) == 4
    assert patcher.wrappers == {"outer_sample": {"other": [other]}, "calc_cond_batch": {"other": [other]}}


@pytest.mark.parametrize("keep", ["scalars", "calls"])
def test_a_trace_keeps_no_model_alive(keep):
    patcher = make_patcher()
    with memhook.watch(patcher, keep=keep) as trace:
        run_of(patcher)
    model, reference = weakref.ref(patcher.model), weakref.ref(patcher)
    del patcher
    gc.collect()
    assert reference() is None
    assert model() is None
    assert trace.magnitudes.shape == (3, 2)
    if keep == "calls":
        first = trace.evaluations[0]
        with pytest.raises(memhook.ReplayError, match="the model of this captured call was deleted"):
            first.replay(first.embedding)


def test_runs_in_other_threads_are_not_seen():
    patcher = make_patcher()
    with memhook.watch(patcher) as trace:
        thread = threading.Thread(target=run_of, args=(patcher,))
        thread.start()
        thread.join()
        run_of(patcher)
    assert len(trace) == 3


def test_two_runs_in_a_block():
    patcher = make_patcher()
    with memhook.watch(patcher) as trace:
        run_of(patcher)
        run_of(patcher, samples=1)
        run_of(patcher, samples=1)
    assert [len(part) for part in trace.runs] == [3, 3, 3]


def test_a_guider_can_be_watched_by_itself():
    guider = guider_of(make_patcher())
    with memhook.watch(guider) as trace:
        run(guider)
    assert len(trace) == 4


def test_a_run_can_be_watched_from_inside():
    """What the nodes do: a wrapper around a run makes a trace for this run alone."""
    patcher, traces = make_patcher(), []

    def outer_sample(executor, *args, **kwargs):
        with memhook.watch(executor.class_obj, adapter=RunAdapter(executor.class_obj, sampler_of(args, kwargs))) as trace:
            output = executor(*args, **kwargs)
        traces.append(trace)
        return output

    patcher.add_wrapper_with_key("outer_sample", "node", outer_sample)
    plain = run_of(make_patcher())
    assert torch.equal(run_of(patcher), plain)
    run_of(patcher, samples=1)
    assert [trace.magnitudes.shape for trace in traces] == [(3, 2), (3, 1)]
    assert traces[0].setting["sampler"] == "sample_euler"
    assert set(patcher.wrappers) == {"outer_sample"}


def test_setting_tells_models_apart_by_their_weights_and_patches():
    def setting(change):
        patcher = make_patcher()
        change(patcher)
        with memhook.watch(patcher) as trace:
            run_of(patcher)
        return trace.setting

    def other_weights(patcher):
        patcher.model.diffusion_model.unet.enter.weight.data += 0.1

    def patched(patcher):
        """LoRA in the weights: the patcher keeps what they were."""
        weight = patcher.model.diffusion_model.unet.enter.weight
        patcher.backup = {"diffusion_model.unet.enter.weight": weight.data.clone()}
        patcher.patches = {"diffusion_model.unet.enter.weight": [(0.8, ("diff", (torch.ones_like(weight.data),)), 1.0, None, None)]}
        weight.data += 0.8

    plain, again = setting(lambda _: None), setting(lambda _: None)
    assert plain == again
    assert plain["parameterization"].endswith("EPS")
    assert setting(other_weights)["model"] != plain["model"]
    lora = setting(patched)
    assert lora["model"] == plain["model"]
    assert lora["patches"]
    assert "patches" not in plain


def test_what_is_no_model_is_not_claimed():
    import memhook_comfyui

    class ModelPatcher:
        model_options: ClassVar = {}
        model = torch.nn.Linear(1, 1)  # a text encoder's or a VAE's patcher

    assert memhook_comfyui.memhook_adapt(ModelPatcher()) is None
    assert memhook_comfyui.memhook_adapt(object()) is None
    assert memhook_comfyui.memhook_adapt(make_patcher()) is not None


def test_adapters_of_deleted_models_say_so():
    from memhook_comfyui.adapter import adapter_for

    for old in (False, True):
        adapter = adapter_for(make_patcher(old=old))
        gc.collect()
        with pytest.raises(memhook.MemhookError, match="was deleted before it was watched"), memhook.watch(None, adapter=adapter):
            pass


def test_areas_are_replayed_too():
    guider = guider_of(make_patcher())
    guider.set_conds([*with_area(encode("a lighthouse at dusk"), 8, 4, 0, 0), *encode("two red apples", tokens=7)], encode(""))
    with memhook.watch(guider.model_patcher, keep="calls") as trace:
        run(guider)
    first = trace.evaluations[0]
    assert first.embedding.shape == (2, 12, 6)
    torch.testing.assert_close(first.replay(first.embedding), first.pred_cond)


def test_a_trace_of_numbers_keeps_no_prompt_alive():
    patcher = make_patcher()
    guider = guider_of(patcher)
    with memhook.watch(patcher) as trace:
        run(guider)
    prompt = weakref.ref(guider.original_conds["positive"][0]["cross_attn"])
    del guider
    gc.collect()
    assert prompt() is None
    assert len(trace) == 4


def test_versions_without_a_wrapper_around_predictions(monkeypatch):
    """December 2024 to August 2025: every other wrapper is there."""

    class WrappersMP:
        OUTER_SAMPLE, CALC_COND_BATCH = "outer_sample", "calc_cond_batch"

    monkeypatch.setitem(sys.modules, "comfy.patcher_extension", types.SimpleNamespace(WrappersMP=WrappersMP))
    monkeypatch.setattr(CFGGuider, "__call__", lambda self, *args, **kwargs: self.predict_noise(*args, **kwargs))
    patcher = make_patcher()
    plain, guider = run_of(patcher), guider_of(patcher)
    with memhook.watch(patcher, keep="calls") as trace:
        assert torch.equal(run_of(patcher), plain)
        run(guider)
    assert [len(part) for part in trace.runs] == [3, 4]
    assert "predict_noise" not in vars(guider)
