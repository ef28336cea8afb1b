"""The conformance suite passes on correct adapters, and each of its checks fails on an adapter with the fault that it is for."""

import importlib.util
from pathlib import Path

import pytest
import torch

import memhook
from memhook.testing import CHECKS, AdapterConformance, Case, check_adapter, checks, sample, tiny_unet

spec = importlib.util.spec_from_file_location("broken", Path(__file__).with_name("broken.py"))
broken = importlib.util.module_from_spec(spec)
spec.loader.exec_module(broken)

STEPS = 3
WORDS = {"": 0, "a lighthouse at dusk": 1, "two red apples": 2}
EMBEDDINGS = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(0))
NOISE = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))


def make_run(unet, **options):
    def run(prompts, *, guided=True):
        unet.samples = len(prompts)
        cond = EMBEDDINGS[[WORDS[prompt] for prompt in prompts]]
        uncond = EMBEDDINGS[:1].expand_as(cond)
        noise = NOISE.expand(len(prompts), -1, -1, -1)
        return sample(unet, steps=STEPS, cond=cond, uncond=uncond, noise=noise, guidance_scale=7.5 if guided else 1.0, **options)

    return run


def case_for(adapter, **options):
    unet = tiny_unet(seed=5)
    return Case(unet, make_run(unet), STEPS, adapter=adapter, **options)


@pytest.fixture
def target():
    return tiny_unet(seed=5)


class TestGoodAdapter(AdapterConformance):
    evaluations = STEPS
    make_adapter = staticmethod(broken.GoodAdapter)

    @pytest.fixture
    def run(self, target):
        return make_run(target)


class TestNotReplayable(AdapterConformance):
    evaluations = STEPS
    replayable = False
    make_adapter = staticmethod(broken.Replayless)

    @pytest.fixture
    def run(self, target):
        return make_run(target)


@pytest.mark.parametrize("layout", ["uncond_first", "cond_first", "two_calls_uncond_first", "two_calls_cond_first"])
@pytest.mark.parametrize("space", ["eps", "v"])
def test_module_adapter_conforms(layout, space):
    unet = tiny_unet(seed=5)
    adapter = lambda unet: memhook.ModuleAdapter(unet, layout=layout, space=space)  # noqa: E731
    passed = check_adapter(unet, make_run(unet, layout=layout, space=space), evaluations=STEPS, adapter=adapter)
    assert set(passed) == {check.__name__ for check in CHECKS} - {"replay_refused"}


def test_learned_variance_is_not_part_of_the_prediction():
    plain, doubled = tiny_unet(seed=5), tiny_unet(seed=5, learned_variance=True)
    assert doubled(NOISE, 1.0, EMBEDDINGS[:1]).shape[1] == 2 * plain(NOISE, 1.0, EMBEDDINGS[:1]).shape[1]
    assert make_run(doubled)(["two red apples"]).shape == NOISE.shape


FAULTS = [
    (broken.Swapped, "uncond_replay_is_zero", "swapped"),
    (broken.Leaking, "nothing_left_behind", "after a normal run"),
    (broken.LeakingOnError, "nothing_left_behind", "after an exception"),
    (broken.Swallowing, "nothing_left_behind", "did not come out"),
    (broken.ZeroFilling, "no_guidance_is_missing", "never|stand in"),
    (broken.LosingTheFirst, "evaluations_counted", "lost"),
    (broken.OffByOneCall, "uncond_replay_is_zero", "different calls"),
    (broken.OffByOneRow, "batch_is_its_samples", "different noisy samples"),
    (broken.OneNormPerBatch, "batch_is_its_samples", "across samples"),
    (broken.Detaching, "gradient_reaches_embedding", "zero"),
    (broken.StaleReplay, "replay_reproduces", "other arguments|another prediction"),
    (broken.Replayless, "replay_reproduces", "replayable=False"),
    (broken.GoodAdapter, "replay_refused", "replayable=True"),
    (broken.Touching, "outputs_identical", "touch no output"),
    (broken.HearingEverybody, "other_threads_ignored", "listening"),
    (broken.Remembering, "watches_agree", "nothing was recorded"),
]


@pytest.mark.parametrize(("adapter", "check", "message"), FAULTS, ids=lambda value: getattr(value, "__name__", None))
def test_fault_is_caught(adapter, check, message):
    with pytest.raises((AssertionError, memhook.MemhookError), match=message):
        getattr(checks, check)(case_for(adapter))


def test_heavy_import_is_caught(tmp_path, monkeypatch):
    (tmp_path / "heavy_adapter.py").write_text("import heavy_host\n")
    (tmp_path / "heavy_host.py").write_text("")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(AssertionError, match="imports heavy_host"):
        checks.import_is_light(case_for(broken.GoodAdapter, imports=("heavy_adapter", "heavy_host")))


def test_random_run_is_named():
    unet = tiny_unet()
    case = Case(unet, lambda prompts, guided=True: torch.randn(2), STEPS, adapter=broken.GoodAdapter)
    with pytest.raises(AssertionError, match="fix the noise"):
        checks.outputs_identical(case)


def test_every_check_can_fail():
    tried = {check for _, check, _ in FAULTS} | {"import_is_light"}
    assert tried == {check.__name__ for check in CHECKS}


def test_every_check_is_in_the_class():
    assert {f"test_{check.__name__}" for check in CHECKS} == {name for name in vars(AdapterConformance) if name.startswith("test_")}
