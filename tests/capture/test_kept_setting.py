"""The setting of a trace is that of its run, whatever becomes of the model afterwards."""

import copy
import gc
import pickle

import numpy as np
import pytest
import torch

import memhook
from memhook import CalibrationMismatchError, MemhookError, MemorizationDetectedError, ModuleAdapter, calibrate, detect
from memhook.testing import sample, tiny_unet


def watched(unet, *, seed=0, **options):
    with memhook.watch(unet, adapter=ModuleAdapter(unet, layout="uncond_first"), **options) as trace:
        sample(unet, samples=1, seed=seed)
    return trace


def test_weights_that_change_afterwards_are_another_model():
    unet = tiny_unet()
    traces = [watched(unet, seed=seed) for seed in range(9)]
    with torch.no_grad():
        unet.down.weight.mul_(1.5)
    calibration = calibrate(traces)  # that of the old weights
    assert detect(traces[0], calibration, fpr=0.1).scores.shape == (1,)
    with pytest.raises(CalibrationMismatchError, match=r"differs in model: .*1 of \d+ parameter tensors have other values"):
        detect(watched(unet), calibration, fpr=0.1)


def test_a_trace_can_be_judged_when_its_model_is_gone():
    unet = tiny_unet()
    traces = [watched(unet, seed=seed) for seed in range(9)]
    last = watched(unet, seed=9)
    del unet
    gc.collect()
    assert detect(last, calibrate(traces), fpr=0.1).memorized.shape == (1,)
    assert [run.setting for run in last.runs] == [last.setting]
    assert last.samples(slice(0, 1)).setting == last.setting


@pytest.mark.parametrize("keep", ["scalars", "calls"])
def test_a_trace_can_be_pickled(keep):
    unet = tiny_unet()
    trace = watched(unet, keep=keep)
    del unet
    read = pickle.loads(pickle.dumps(trace))  # noqa: S301 -- our own
    np.testing.assert_array_equal(read.magnitudes, trace.magnitudes)
    assert read.setting == trace.setting
    assert read.to_dict() == trace.to_dict()
    assert read.groups.tolist() == trace.groups.tolist()
    with pytest.raises(MemhookError, match="kept only numbers"):
        _ = read.evaluations
    assert detect(read, calibrate([trace] * 3), fpr=0.5).scores == trace.score()


def test_a_stopped_run_carries_its_setting():
    unet = tiny_unet()
    traces = [watched(unet, seed=seed) for seed in range(20)]
    verdict, rule = detect(traces[0], calibrate(traces), fpr=0.5), memhook.stop_rule(calibrate(traces), fpr=0.5)
    with pytest.raises(MemorizationDetectedError) as caught:
        watched(unet, stop_when=lambda trace: verdict if len(trace) == 2 else None)
    stopped = pickle.loads(pickle.dumps(caught.value.trace))  # noqa: S301
    assert stopped.setting == traces[0].setting
    with pytest.raises(CalibrationMismatchError):
        watched(tiny_unet(seed=1), stop_when=rule)  # asked inside of the block


def test_inside_of_the_block_the_setting_is_that_of_now():
    unet = tiny_unet()
    with memhook.watch(unet, adapter=ModuleAdapter(unet, layout="uncond_first")) as trace:
        sample(unet)
        before = trace.setting["model"]
        assert before == watched(unet).setting["model"]
        unet.down.weight.data.mul_(2)  # which torch does not count
        assert trace.setting["model"] != before


def test_an_error_of_the_host_keeps_the_setting_and_is_passed_on():
    unet = tiny_unet()
    with pytest.raises(ZeroDivisionError), memhook.watch(unet, adapter=ModuleAdapter(unet, layout="uncond_first")) as trace:  # noqa: PT012
        sample(unet)
        raise ZeroDivisionError
    expected = watched(unet).setting
    del unet
    gc.collect()
    assert trace.setting == expected


def test_an_adapter_that_cannot_say_does_not_disturb_the_run():
    class Silent(ModuleAdapter):
        snapshot = None

        def describe(self):
            raise LookupError("no idea")

    unet = tiny_unet()
    with memhook.watch(unet, adapter=Silent(unet, layout="uncond_first")) as trace:
        sample(unet)
    assert trace.magnitudes.shape == (4, 2)
    with pytest.raises(MemhookError, match=r"could not be taken when the block ended.*no idea"):
        _ = trace.setting


def test_an_adapter_that_only_describes_is_asked_when_the_block_ends():
    class Plain(ModuleAdapter):
        snapshot = None
        asked = 0

        def describe(self):
            self.asked += 1
            return {"weather": "fair"}

    unet = tiny_unet()
    adapter = Plain(unet, layout="uncond_first")
    with memhook.watch(unet, adapter=adapter) as trace:
        sample(unet)
    del unet
    assert [trace.setting["weather"] for _ in range(3)] == ["fair"] * 3
    assert adapter.asked == 1


def test_a_copy_of_a_trace_is_independent_of_it():
    trace = watched(tiny_unet())
    copied = copy.deepcopy(trace)
    trace.record(torch.ones(1, 4, 8, 8), torch.zeros(1, 4, 8, 8))
    assert len(copied) == 4


# ---- prompts of a trace that was recorded by hand


def recorded(groups, *, samples=4, evaluations=2):
    trace = memhook.Trace()
    for level in range(evaluations):
        trace.record(torch.ones(samples, 4), torch.zeros(samples, 4), timestep=9 - level, groups=groups)
    return trace


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor], ids=["list", "tuple", "array", "tensor"])
def test_samples_of_one_prompt_are_one_prompt(kind):
    assert recorded(kind([7, 7, 2, 7])).groups.tolist() == [0, 0, 1, 0]
    calibration = calibrate([recorded(kind([0] * 4)) for _ in range(25)])
    assert len(calibration) == 25
    assert calibration.setting["images_per_prompt"] == 4
    with pytest.raises(CalibrationMismatchError, match="images_per_prompt"):
        detect(recorded(None), calibration, fpr=0.5)


@pytest.mark.parametrize("groups", [[0, 0], [0.0] * 4, [[0] * 4], [True] * 4, 3])
def test_groups_are_a_number_a_sample(groups):
    with pytest.raises(MemhookError, match=r"groups is .*expected a whole number for each of the 4 samples"):
        recorded(groups)


def test_groups_do_not_change_within_a_run():
    trace = recorded([0, 0, 1, 1])
    trace.record(torch.ones(4, 4), torch.zeros(4, 4), timestep=3, groups=[5, 5, 4, 4])  # the same
    trace.record(torch.ones(4, 4), torch.zeros(4, 4), timestep=2)
    with pytest.raises(MemhookError, match=r"groups is \[0, 1, 0, 1\], and for the first evaluation of this trace it was \[0, 0, 1, 1\]"):
        trace.record(torch.ones(4, 4), torch.zeros(4, 4), timestep=1, groups=[0, 1, 0, 1])
    assert trace.groups.tolist() == [0, 0, 1, 1]
