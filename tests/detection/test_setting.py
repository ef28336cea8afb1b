"""The setting of a run, and the errors that name the field and both values."""

import pytest
import torch

import memhook
from memhook import CalibrationError, CalibrationMismatchError, ModuleAdapter, calibrate, detect
from memhook.detection.setting import brief, differences, run_setting
from memhook.testing import sample, tiny_unet

UNETS = {seed: tiny_unet(seed=seed) for seed in (0, 1)}


def run(*, model=0, space="eps", layout="uncond_first", **options):
    unet = UNETS[model]
    with memhook.watch(unet, adapter=ModuleAdapter(unet, layout=layout, space=space)) as trace:
        sample(unet, layout=layout, **options)
    return trace


def words(*prompts):
    table = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(0))
    return table[list(prompts)]


def test_what_a_run_says_about_itself():
    setting = run_setting(run(steps=3, cond=words(0, 1, 0, 1)))
    assert setting.pop("model")["structure"]
    assert [text["tokens"] for text in setting.pop("unconditional_text")] == [5]
    assert setting == {
        "host": "module",
        "space": "eps",
        "shape": [4, 8, 8],
        "timesteps": [999.0, 500.0, 1.0],
        "guided_evaluations": [True, True, True],
        "images_per_prompt": 2,
    }


def test_the_same_setting_is_accepted_whatever_the_layout_prompts_or_seeds():
    calibration = calibrate([run(seed=seed) for seed in range(20)])
    for trace in (run(seed=99), run(layout="two_calls_cond_first"), run(samples=1), run(cond=words(0, 1, 2))):
        assert detect(trace, calibration, fpr=0.1).scores.shape == (len(trace.groups),)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": 1}, r"model: the calibration was made with fingerprint '\w+' / \w+, this run used fingerprint '\w+' / \w+\."),
        ({"space": "v"}, r"space: the calibration was made with 'eps', this run used 'v'\."),
        (
            {"steps": 5},
            r"guided_evaluations: .*\[True, True, True, True\], this run used \[True, True, True, \.\.\. True\] \(5\)\.",
        ),
        ({"cond": words(0, 0, 1, 1)}, r"images_per_prompt: the calibration was made with 1, this run used 2\."),
    ],
)
def test_a_mismatch_names_the_field_and_both_values(options, message):
    calibration = calibrate([run(seed=seed) for seed in range(5)])
    with pytest.raises(CalibrationMismatchError, match=rf"the setting differs in {message} ?.*calibrate again"):
        detect(run(**options), calibration, fpr=0.5)


def test_another_shape_is_a_mismatch():
    def record(*shape):
        trace = memhook.Trace()
        trace.record(torch.ones(2, *shape), torch.zeros(2, *shape), timestep=1)
        return trace

    with pytest.raises(CalibrationMismatchError, match=r"shape: .*\[4, 8, 8\].*\[4, 16, 16\]"):
        detect(record(4, 16, 16), calibrate([record(4, 8, 8)]), fpr=0.5)


def test_another_host_is_a_mismatch():
    trace = memhook.Trace()
    trace.record(torch.ones(2, 4, 8, 8), torch.zeros(2, 4, 8, 8), timestep=999)
    with pytest.raises(CalibrationMismatchError, match=r"host: .*'module'.*'record'"):
        detect(trace, calibrate([run(steps=1)]), fpr=0.5)


def test_guidance_for_another_part_of_the_run_is_a_mismatch():
    """A score over other noise levels is another score."""

    def record(missing):
        trace = memhook.Trace()
        for level in range(4):
            trace.record(torch.ones(2, 4), None if level in missing else torch.zeros(2, 4), timestep=900 - level)
        return trace

    calibration = calibrate([record({0})])
    assert detect(record({0}), calibration, fpr=0.5).scores.tolist() == [2, 2]
    with pytest.raises(CalibrationMismatchError, match=r"guided_evaluations: .*\[False, True, True, True\].*\[False, False, True, True\]"):
        detect(record({0, 1}), calibration, fpr=0.5)
    assert detect(record({0, 3}), calibration.using(3), fpr=0.5).scores.tolist() == [2, 2]  # what comes later does not matter


def test_only_the_evaluations_of_the_score_are_compared():
    calibration = calibrate([run(seed=seed, steps=4) for seed in range(5)])
    longer = run(steps=4)
    longer.record(torch.ones(2, 4, 8, 8), torch.zeros(2, 4, 8, 8), timestep=0)
    assert detect(longer, calibration.using(4), fpr=0.5).scores.shape == (2,)
    with pytest.raises(CalibrationMismatchError, match="guided_evaluations"):
        detect(longer, calibration, fpr=0.5)


def test_sampler_and_guidance_scale_matter_after_the_first_evaluation_only():
    calibrated = {"sampler": "DDIM", "guidance_scale": 7.5}
    for seen in ({"sampler": "Euler", "guidance_scale": 7.5}, {"sampler": "DDIM", "guidance_scale": 3.0}):
        assert differences(calibrated, seen, first=1) == {}
        assert len(differences(calibrated, seen, first=2)) == 1
        assert len(differences(calibrated, seen, first=None)) == 1


def test_a_guidance_scale_that_was_read_off_is_compared_with_tolerance():
    assert differences({"guidance_scale": 7.5}, {"guidance_scale": 7.51}, first=None) == {}
    assert "7.5, this run used 8.0" in differences({"guidance_scale": 7.5}, {"guidance_scale": 8.0}, first=None)["guidance_scale"]


def test_what_only_one_side_knows_is_not_compared():
    assert differences({"sampler": "DDIM"}, {"host": "module"}, first=None) == {}


def test_values_in_messages_are_short():
    assert len(brief("x" * 10_000)) < 120
    assert len(brief(["x" * 10_000] * 100)) < 120
    assert len(brief([["x" * 10_000]])) < 120
    assert brief("\x1b[2J") == r"'\x1b[2J'"  # control codes stay out of the terminal


def test_a_bare_calibration_holds_for_every_setting():
    calibration = calibrate([1.0, 2.0])
    for trace in (run(), run(space="v"), run(steps=7)):
        detect(trace, calibration, fpr=0.5)


def test_unequal_numbers_of_images_cannot_be_compared():
    with pytest.raises(CalibrationError, match=r"\[1, 2\] samples; a score needs the same number for each"):
        detect(run(cond=words(0, 0, 1)), calibrate([run(seed=seed) for seed in range(5)]), fpr=0.5)


def test_a_difference_can_be_accepted_by_name_and_the_verdict_says_so():
    calibration = calibrate([run(seed=seed) for seed in range(9)])
    other = run(space="v")
    with pytest.raises(CalibrationMismatchError, match=r"space.*accept it: calibration.accepting\('space'\)"):
        detect(other, calibration, fpr=0.1)
    found = detect(other, calibration.accepting("space"), fpr=0.1)
    assert found.p_values.tolist() == calibration.p_value(found.scores).tolist()
    [message] = found.accepted_mismatches
    assert "space: the calibration was made with 'eps', this run used 'v'" in message
    assert message in str(found)
    assert detect(run(), calibration.accepting("space"), fpr=0.1).accepted_mismatches == ()


def test_accepting_one_difference_accepts_no_other():
    calibration = calibrate([run(seed=seed) for seed in range(9)]).accepting("space")
    with pytest.raises(CalibrationMismatchError, match="differs in model"):
        detect(run(model=1, space="v"), calibration, fpr=0.1)


def test_only_what_is_in_the_setting_can_be_accepted(tmp_path):
    calibration = calibrate([run(seed=seed) for seed in range(9)])
    with pytest.raises(CalibrationError, match=r"no setting colour to accept.*knows guided_evaluations, host"):
        calibration.accepting("colour")
    with pytest.raises(CalibrationError, match="bare scores"):
        calibrate([1.0]).accepting("model")
    calibration.accepting("model").save(tmp_path / "c.safetensors")
    assert memhook.Calibration.load(tmp_path / "c.safetensors").accepted == ()
