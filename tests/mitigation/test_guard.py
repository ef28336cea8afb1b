"""The guard: judge a run at its first evaluations, and repair it while somebody else's sampler is running it."""

import collections
import contextlib
import dataclasses
import functools
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import memhook
from memhook import Intervention, ModuleAdapter, guard, mitigate
from memhook.adapting.pairs import read_output
from memhook.adapting.substitution import replace_prediction
from memhook.errors import CalibrationError, MemhookError, MemorizationDetectedError, NoGuidanceError
from memhook.testing import sample, tiny_unet

LAYOUTS = ["uncond_first", "cond_first", "two_calls_uncond_first", "two_calls_cond_first"]
STRONG = 8.0  # how much louder a "memorized" prompt's embedding is here


def prompts(count=3, *, strong=(), seed=0):
    generator = torch.Generator().manual_seed(seed)
    cond = torch.randn(count, 5, 6, generator=generator).double()
    cond[list(strong)] *= STRONG
    return cond


UNCOND = torch.randn(1, 5, 6, generator=torch.Generator().manual_seed(99)).double()


class Bench:
    """A model, how it is called, and a calibration on quiet prompts."""

    def __init__(self, layout="uncond_first", *, images=1, evaluations=1, learned_variance=False, **options):
        self.unet = tiny_unet(dtype=torch.float64, learned_variance=learned_variance)
        self.layout, self.images, self.options = layout, images, options
        self.adapter = ModuleAdapter(self.unet, layout=layout)
        traces = [
            memhook.probe(self.unet, lambda seed=seed: self.run(prompts(20, seed=seed)), adapter=self.adapter, evaluations=evaluations)
            for seed in (1, 2)
        ]
        self.calibration = memhook.calibrate(traces, first=evaluations)

    def run(self, cond, **options):
        cond = cond.repeat_interleave(self.images, 0)
        noise = torch.randn(len(cond), 4, 8, 8, generator=torch.Generator().manual_seed(0)).double()
        return sample(self.unet, layout=self.layout, cond=cond, uncond=UNCOND.expand_as(cond), noise=noise, **self.options, **options)

    def guard(self, **options):
        return guard(self.unet, self.calibration, adapter=self.adapter, **{"fpr": 0.05, "max_steps": 60, "lr": 0.2, "fixed_tokens": 0, **options})

    def hooks(self):
        return len(self.unet._forward_hooks) + len(self.unet._forward_pre_hooks)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_flagged_prompt_is_mitigated_as_if_it_had_had_the_new_embedding_all_along(layout):
    bench = Bench(layout)
    cond = prompts(strong=[1])
    with bench.guard() as report:
        repaired = bench.run(cond)
    assert report.flagged.tolist() == [False, True, False]
    assert report.detection.memorized.tolist() == [False, True, False]
    target = float(np.median(bench.calibration.magnitudes))
    assert report.after[1] <= target < report.before[1]
    assert report.optimized.target == target

    better = cond.clone()
    better[1] = report.optimized.embedding[0]
    assert torch.allclose(repaired, bench.run(better), rtol=1e-9, atol=1e-12)
    assert not torch.allclose(repaired[1], bench.run(cond)[1], rtol=0.1)
    with memhook.watch(bench.unet, adapter=bench.adapter) as whole:
        bench.run(better)
    assert np.allclose(report.trace.magnitudes[1:], whole.magnitudes[1:])
    assert report.trace.magnitudes[0, 1] == report.before[1]
    assert report.substituted == 3
    assert "new embeddings in 3 calls of 3 later evaluations" in str(report)
    assert bench.hooks() == 0


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("inference", [False, True], ids=["no_grad", "inference_mode"])
def test_samples_that_are_not_flagged_come_out_bit_identical(layout, inference):
    bench = Bench(layout, images=2)
    cond = prompts(4, strong=[2])
    plain = bench.run(cond)
    with torch.inference_mode(inference), bench.guard() as report:
        guarded = bench.run(cond)
    assert report.flagged.tolist() == [False] * 4 + [True] * 2 + [False] * 2
    assert torch.equal(guarded[:4], plain[:4])
    assert torch.equal(guarded[6:], plain[6:])
    assert not torch.equal(guarded[4:6], plain[4:6])
    assert all(parameter.grad is None and parameter.requires_grad for parameter in bench.unet.parameters())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_clean_run_costs_no_call_and_no_bit(layout):
    bench = Bench(layout)
    cond = prompts()
    calls = []
    handle = bench.unet.enter.register_forward_hook(lambda *_: calls.append(1))
    plain = bench.run(cond)
    expected = len(calls)
    with bench.guard() as report:
        guarded = bench.run(cond)
    handle.remove()
    assert not report.flagged.any()
    assert torch.equal(guarded, plain)
    assert len(calls) == 2 * expected
    assert report.optimized is None
    assert str(report) == str(report.detection)


def test_the_target_finds_its_adapter():
    bench = Bench()
    cond = prompts(strong=[1])
    with guard(bench.adapter, bench.calibration, fpr=0.05, max_steps=60, lr=0.2, fixed_tokens=0) as report:
        bench.run(cond)
    assert report.flagged.tolist() == [False, True, False]
    with mitigate(bench.adapter, target_magnitude=1e9) as report:
        bench.run(cond)
    assert not report.flagged.any()
    with pytest.raises(memhook.NoAdapterError, match="TinyUNet"), guard(bench.unet, bench.calibration, fpr=0.05):
        pytest.fail("ran")


def test_only_the_call_that_is_judged_is_kept():
    bench = Bench(evaluations=2)
    kept = []

    class Spy(ModuleAdapter):
        @contextlib.contextmanager
        def attach(self, watcher):
            self.watcher = watcher
            with super().attach(watcher):
                yield

    adapter = Spy(bench.unet, layout="uncond_first")
    handle = bench.unet.register_forward_hook(lambda *_: kept.append(adapter.watcher.wants_evaluations))
    with guard(bench.unet, bench.calibration, fpr=0.05, action="warn", adapter=adapter):
        bench.run(prompts())
    handle.remove()
    assert kept == [False, True, False, False]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_decision_after_several_evaluations_repairs_from_there_on(layout):
    bench = Bench(layout, evaluations=2)
    cond = prompts(strong=[0])
    with bench.guard() as report:
        repaired = bench.run(cond)
    plain = bench.run(cond)
    with memhook.watch(bench.unet, adapter=bench.adapter) as unguarded:
        bench.run(cond)
    assert np.allclose(report.trace.magnitudes[:2], unguarded.magnitudes[:2])
    assert (report.trace.magnitudes[2:, 0] < unguarded.magnitudes[2:, 0]).all()
    assert torch.equal(repaired[1:], plain[1:])
    assert report.substituted == 2


def test_learned_variance_stays():
    bench = Bench(learned_variance=True)
    seen = []
    handle = bench.unet.register_forward_hook(lambda module, args, output: seen.append(output.clone()))
    outputs = []
    with bench.guard() as report:
        last = bench.unet.register_forward_hook(lambda module, args, output: outputs.append(output))
        bench.run(prompts(strong=[1]))
    handle.remove()
    last.remove()
    assert report.flagged.tolist() == [False, True, False]
    first, changed = seen[0], outputs[-4]
    assert torch.equal(first[:, 4:], changed[:, 4:])
    assert not torch.equal(first[4, :4], changed[4, :4])


def test_stop_carries_the_evidence_and_leaves_nothing_behind():
    bench = Bench()
    finished = []
    with pytest.raises(MemorizationDetectedError, match="stopped after 1 evaluations: 1 of 3") as stopped, bench.guard(action="stop"):
        finished.append(bench.run(prompts(strong=[2])))
    assert not finished
    assert stopped.value.detection.memorized.tolist() == [False, False, True]
    assert len(stopped.value.trace) == 1
    assert bench.hooks() == 0


def test_warn_only_warns():
    bench = Bench()
    cond = prompts(strong=[2])
    plain = bench.run(cond)
    with pytest.warns(UserWarning, match="1 of 3 prompts"), bench.guard(action="warn") as report:
        guarded = bench.run(cond)
    assert torch.equal(guarded, plain)
    assert report.flagged.tolist() == [False, False, True]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_mitigate_needs_no_calibration_and_leaves_quiet_samples_alone(layout):
    bench = Bench(layout)
    cond = prompts(strong=[0])
    plain = bench.run(cond)
    with memhook.watch(bench.unet, adapter=bench.adapter) as trace:
        bench.run(cond)
    target = float(np.sort(trace.magnitudes[0])[1])  # the two quiet prompts are at or below it
    with mitigate(bench.unet, target_magnitude=target, adapter=bench.adapter, lr=0.2, max_steps=60, fixed_tokens=0) as report:
        repaired = bench.run(cond)
    assert report.flagged.tolist() == [True, False, False]
    assert report.after[0] <= target
    assert torch.equal(repaired[1:], plain[1:])
    assert "1 of 3 samples above the target" in str(report)
    with mitigate(bench.unet, target_magnitude=1e9, adapter=bench.adapter) as report:
        assert torch.equal(bench.run(cond), plain)
    assert not report.flagged.any()


def test_two_samples_of_one_prompt_get_embeddings_of_their_own():
    bench = Bench(images=2)
    with bench.guard() as report:
        bench.run(prompts(2, strong=[0]))
    first, second = report.optimized.embedding
    assert not torch.equal(first, second)
    assert report.substituted == 3


def test_a_target_that_is_not_reached_is_said():
    bench = Bench()
    with (
        pytest.warns(UserWarning, match=r"samples \[1\] did not come down to the magnitude 0.001 in 2 updates"),
        bench.guard(target_magnitude=0.001, max_steps=2) as report,
    ):
        bench.run(prompts(strong=[1]))
    assert not report.optimized.converged.any()
    assert report.after[1] < report.before[1]


def test_without_a_target_of_its_own_the_guard_warns_only_above_the_threshold():
    bench = Bench()
    cond = prompts(strong=[1])
    with bench.guard() as plenty:
        bench.run(cond)
    last = int(np.flatnonzero(plenty.optimized.losses[:, 0] < bench.calibration.threshold(0.05))[0])
    with bench.guard(max_steps=last) as enough:
        bench.run(cond)
    assert not enough.optimized.converged.any()
    with pytest.warns(UserWarning, match="did not come down"), bench.guard(max_steps=1):
        bench.run(cond)


def test_a_host_that_changes_its_embeddings_on_the_way_is_told():
    bench = Bench()

    def changing():
        cond, x = prompts(2, strong=[1]), torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)).double()
        with torch.no_grad():
            for step, t in enumerate(torch.linspace(999, 1, 4).round()):
                e = cond if step < 2 else cond + 1
                u, c = bench.unet(torch.cat([x, x]), t, torch.cat([UNCOND.expand_as(e), e])).chunk(2)
                x = x - (u + 7.5 * (c - u)) / 4

    with pytest.warns(UserWarning, match="in only 1 of 3 later evaluations"), bench.guard():
        changing()


def test_one_run_a_block():
    bench = Bench()
    with pytest.raises(MemhookError, match="second run"), bench.guard(action="warn"):
        assert [bench.run(prompts()), bench.run(prompts())]
    with pytest.raises(MemhookError, match="nothing was judged: the run had 0"), bench.guard():
        pass
    with pytest.raises(ZeroDivisionError), bench.guard():  # no other error in its place
        1 / 0  # noqa: B018
    assert bench.hooks() == 0


def test_a_run_without_guidance_is_an_error():
    bench = Bench("two_calls_cond_first")
    with pytest.raises(NoGuidanceError), bench.guard():
        bench.run(prompts(), guidance_scale=1.0)


def test_what_is_not_finite_is_not_taken_for_clean():
    bench = Bench()
    cond = prompts()
    cond[0, 0, 0] = float("nan")
    for action in ("mitigate", "stop"):
        with pytest.raises(MemhookError, match=r"predictions of the prompts \[0\] are NaN"), bench.guard(action=action):
            bench.run(cond)
    with pytest.warns(UserWarning, match=r"prompts \[0\] are NaN"), bench.guard(action="warn"):
        bench.run(cond)
    with pytest.raises(MemhookError, match=r"samples \[0\] is not finite"), mitigate(bench.unet, target_magnitude=1.0, adapter=bench.adapter):
        bench.run(cond)


def test_bad_settings_are_errors_before_the_run():
    bench = Bench()
    with pytest.raises(MemhookError, match="action is 'fix'"), bench.guard(action="fix"):
        pytest.fail("ran")
    with pytest.raises(CalibrationError, match="cannot give a false-positive rate of"), bench.guard(fpr=0.001):
        pytest.fail("ran")
    bare = memhook.calibrate(np.linspace(1, 2, 50))
    with pytest.raises(CalibrationError, match=r"calibration.using\(first=1\)"), guard(bench.unet, bare, adapter=bench.adapter):
        pytest.fail("ran")
    with pytest.raises(MemhookError, match="never negative"), bench.guard(target_magnitude=-1.0):
        pytest.fail("ran")
    with pytest.raises(MemhookError, match="never negative"), mitigate(bench.unet, target_magnitude=-1.0, adapter=bench.adapter):
        pytest.fail("ran")


class Watching:
    """An adapter that does not change runs."""

    host = "elsewhere"

    def __init__(self, adapter):
        self._adapter = adapter
        self.attach, self.describe = adapter.attach, adapter.describe


def test_adapters_that_only_watch_are_asked_only_for_that():
    bench = Bench()
    adapter = Watching(bench.adapter)
    with pytest.raises(MemhookError, match="adapter for elsewhere only watches"), mitigate(bench.unet, target_magnitude=1.0, adapter=adapter):
        pytest.fail("ran")
    calibration = dataclasses.replace(bench.calibration, setting={**bench.calibration.setting, "host": "elsewhere"})
    with pytest.raises(MemorizationDetectedError), guard(bench.unet, calibration, fpr=0.05, action="stop", adapter=adapter):
        bench.run(prompts(strong=[0]))
    answer = lambda evaluation: Intervention(evaluation.pred_cond)  # noqa: E731
    with pytest.raises(MemhookError, match="only watches"), memhook.watch(bench.unet, adapter=adapter, on_evaluation=answer):
        bench.run(prompts())


def test_any_observer_may_intervene_with_the_right_shapes():
    bench = Bench()
    cond = prompts()
    with memhook.watch(bench.unet, adapter=bench.adapter, on_evaluation=lambda evaluation: Intervention(evaluation.pred_uncond)):
        unconditional = bench.run(cond)
    assert torch.allclose(unconditional, bench.run(UNCOND.expand_as(cond)))
    with pytest.raises(MemhookError, match=r"pred_cond has shape \(1, 4, 8, 8\); expected \(3, 4, 8, 8\)"):  # noqa: SIM117
        with memhook.watch(bench.unet, adapter=bench.adapter, on_evaluation=lambda evaluation: Intervention(evaluation.pred_cond[:1])):
            bench.run(cond)
    with memhook.watch(bench.unet, adapter=bench.adapter, on_evaluation=lambda evaluation: 5):  # not meant as an answer
        assert torch.equal(bench.run(cond), bench.run(cond))


def test_watches_around_and_inside_a_guard():
    bench = Bench()
    cond = prompts(strong=[1])
    inner_adapter = ModuleAdapter(bench.unet, layout="uncond_first")
    with (
        memhook.watch(bench.unet, adapter=bench.adapter) as outer,
        bench.guard() as report,
        memhook.watch(bench.unet, adapter=inner_adapter) as inner,
    ):
        bench.run(cond)
    assert len(outer) == len(inner) == len(report.trace) == 4
    assert outer.magnitudes[0, 1] == pytest.approx(report.before[1])
    assert inner.magnitudes[0, 1] == pytest.approx(report.after[1])
    assert np.allclose(outer.magnitudes[1:], inner.magnitudes[1:])


def test_a_part_of_an_evaluation_is_replayed_alone():
    bench = Bench()
    (whole,) = memhook.probe(bench.unet, lambda: bench.run(prompts()), adapter=bench.adapter).evaluations
    sizes = []
    handle = bench.unet.register_forward_hook(lambda module, args, output: sizes.append(len(output)))
    part = whole.take(torch.tensor([2, 0]))
    values = part.objective(part.embedding)
    handle.remove()
    assert sizes == [2]
    assert torch.allclose(values, whole.objective(whole.embedding)[[2, 0]])
    foreign = dataclasses.replace(whole, replay=functools.partial(whole.replay)).take(torch.tensor([2, 0]))
    assert torch.allclose(foreign.objective(part.embedding), values)
    with pytest.raises(memhook.ReplayError):
        dataclasses.replace(whole, replay=None).take(torch.tensor([0])).objective(part.embedding[:1])


@dataclasses.dataclass
class Output:
    sample: torch.Tensor
    extra: int = 3


Pair = collections.namedtuple("Pair", ["sample", "extra"])  # noqa: PYI024


class Plain:
    def __init__(self, sample):
        self.sample = sample


@pytest.mark.parametrize(
    "wrap", [lambda x: x, lambda x: (x, 3), lambda x: [x, 3], lambda x: {"sample": x, "extra": 3}, lambda x: Pair(x, 3), Output, Plain]
)
def test_outputs_of_every_form_are_replaced_in_a_copy(wrap):
    old, new = torch.zeros(2, 3), torch.ones(2, 3)
    output = wrap(old)
    changed = replace_prediction(output, old, new)
    assert type(changed) is type(output)
    assert read_output(changed) is new
    assert read_output(output) is old


def test_an_output_without_the_prediction():
    with pytest.raises(memhook.GuidanceLayoutError, match="cannot be replaced"):
        replace_prediction(nn.Identity(), torch.zeros(1), torch.ones(1))


def test_no_warning_without_cause():
    bench = Bench()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with bench.guard() as report:
            bench.run(prompts(strong=[1]))
    assert report.optimized.converged.all()
