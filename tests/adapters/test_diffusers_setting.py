"""What changes the magnitudes of a pipeline's run changes its setting, and the message names it."""

import gc
import pickle
import types

import pytest
import torch
from torch import nn

import memhook
from memhook import CalibrationMismatchError, calibrate, detect
from tests.adapters.zoo import FAMILIES

diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning:diffusers", "ignore::DeprecationWarning", "ignore::UserWarning:peft"),
]


@pytest.fixture
def host():
    return FAMILIES["StableDiffusionPipeline"].build()


def watched(host, **call):
    with memhook.watch(host.pipeline) as trace:
        host.run(**call)
    return trace


def accepted(trace, calibration):
    return detect(trace, calibration, fpr=0.4).scores.shape == (2,)


def refused(trace, calibration, message):
    with pytest.raises(CalibrationMismatchError, match=message) as caught:
        detect(trace, calibration, fpr=0.4)
    return str(caught.value)


class Encoder(nn.Module):
    """Which diffusers 0.42 scales with the denoiser, and misses where there is none."""

    dtype, device = torch.float32, torch.device("cpu")


def lora(host, seed=0, name="style"):
    host.pipeline.text_encoder = Encoder()
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=2, lora_alpha=4, init_lora_weights=False, target_modules=["to_q", "to_v"])
    host.pipeline.unet.add_adapter(config, adapter_name=name)


# ---- adapters


def test_an_adapter_at_another_scale_is_another_setting(host):
    lora(host)
    calibration = calibrate([watched(host)])
    assert accepted(watched(host), calibration)
    host.pipeline.set_adapters(["style"], [0.1])
    message = refused(watched(host), calibration, r"differs in adapters: LoRA 'style' at 0\.1, calibrated at 1\.0\.")
    assert "fingerprint" not in message
    host.pipeline.set_adapters(["style"], [1.0])
    assert accepted(watched(host), calibration)
    refused(watched(host, cross_attention_kwargs={"scale": 0.5}), calibration, r"LoRA 'style' at 0\.5, calibrated at 1\.0")
    refused(watched(host, cross_attention_kwargs={"scale": 0.0}), calibration, r"LoRA 'style' does not act .*calibrated at 1\.0")
    host.pipeline.unet.disable_lora()
    refused(watched(host), calibration, r"LoRA 'style' does not act \(unloaded, disabled or at 0\), calibrated at 1\.0")


def test_an_adapter_that_does_not_act_changes_nothing(host):
    """Enabled later, it does."""
    calibration = calibrate([watched(host)])
    lora(host)
    refused(watched(host), calibration, r"differs in adapters: LoRA 'style' at 1\.0, calibrated without it")
    assert accepted(watched(host, cross_attention_kwargs={"scale": 0}), calibration)
    host.pipeline.unet.disable_lora()
    disabled = calibrate([watched(host)])
    assert accepted(watched(host), calibration)
    host.pipeline.unet.enable_lora()
    refused(watched(host), disabled, r"LoRA 'style' at 1\.0, calibrated without it")
    assert accepted(watched(host), disabled.accepting("adapters"))


def test_adapters_are_told_apart_by_their_weights(host):
    lora(host, seed=1)
    calibration = calibrate([watched(host)])
    host.pipeline.delete_adapters("style")
    lora(host, seed=2)
    refused(watched(host), calibration, "LoRA 'style' has other weights than the one of that name")
    host.pipeline.delete_adapters("style")
    lora(host, seed=1, name="renamed")
    assert accepted(watched(host), calibration)


def test_two_adapters_and_one_of_them(host):
    lora(host, seed=1, name="first")
    lora(host, seed=2, name="second")
    host.pipeline.set_adapters(["first", "second"], [0.5, 2.0])
    calibration = calibrate([watched(host)])
    assert accepted(watched(host), calibration)
    host.pipeline.set_adapters(["first"], [0.5])
    refused(watched(host), calibration, r"adapters: LoRA 'second' does not act .*, calibrated at 2\.0\.")
    host.pipeline.set_adapters(["first", "second"], [2.0, 0.5])
    refused(watched(host), calibration, r"LoRA 'first' at 2\.0, calibrated at 0\.5; LoRA 'second' at 0\.5, calibrated at 2\.0")


def test_an_adapter_that_was_fused_into_the_weights(host):
    lora(host)
    calibration = calibrate([watched(host)])
    host.pipeline.fuse_lora()
    refused(watched(host), calibration, r"LoRA 'style' fused into the weights, calibrated at 1\.0")
    host.pipeline.unfuse_lora()
    assert accepted(watched(host), calibration)


def test_an_adapter_of_some_layers_only(host):
    lora(host)
    calibration = calibrate([watched(host)])
    layers = [layer for layer in host.pipeline.unet.modules() if hasattr(layer, "base_layer")]
    for place, layer in enumerate(layers):
        layer.set_scale("style", 2.0 if place < len(layers) // 2 else 0.0)
    refused(watched(host), calibration, r"LoRA 'style' at 1\.0 on average, not the same in all layers, calibrated at 1\.0")


def test_a_run_has_the_adapters_that_it_had(host):
    """Two runs in one block, and a trace that is asked when all is over."""
    lora(host)
    calibration = calibrate([watched(host)])
    with memhook.watch(host.pipeline) as trace:
        host.run()
        host.pipeline.set_adapters(["style"], [0.25])
        host.run()
    host.pipeline.delete_adapters("style")
    first, second = trace.runs
    assert accepted(first, calibration)
    refused(second, calibration, r"at 0\.25, calibrated at 1\.0")


# ---- what is put in


def test_freeu(host):
    calibration = calibrate([watched(host)])
    host.pipeline.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    freeu = watched(host)
    refused(freeu, calibration, r"patched: model: FreeU \(s1=0\.9, s2=0\.2, b1=1\.2, b2=1\.4\) on CrossAttnUpBlock2D")
    with_it = calibrate([freeu])
    host.pipeline.enable_freeu(s1=0.9, s2=0.2, b1=1.1, b2=1.4)
    refused(watched(host), with_it, r"b1=1\.1.*b1=1\.2")
    host.pipeline.disable_freeu()
    refused(watched(host), with_it, "FreeU.*was there when calibrating, and is not in this run")
    assert accepted(watched(host), calibration)


def patched_forward(module):
    before = module.forward

    def slower(self, *args, **kwargs):
        return before(*args, **kwargs)

    module.forward = types.MethodType(slower, module)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda unet: patched_forward(unet.mid_block.resnets[0]), r"ResnetBlock2D\.forward is \S+slower"),
    ],
    ids=["forward"],
)
def test_what_others_patch_in(host, change, message):
    calibration = calibrate([watched(host)])
    change(host.pipeline.unet)
    refused(watched(host), calibration, rf"patched: model: {message}.*calibrated without it")


def test_a_method_that_was_exchanged_for_the_class(host, monkeypatch):
    calibration = calibrate([watched(host)])
    kind = type(host.pipeline.unet.mid_block.resnets[0])
    before = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, *args, **kwargs: 0.5 * before(self, *args, **kwargs))
    refused(watched(host), calibration, r"ResnetBlock2D\.forward is \S+<lambda>, for the class")


def test_layers_of_a_foreign_class(host):
    """Token merging exchanges the class of the blocks."""
    calibration = calibrate([watched(host)])
    block = host.pipeline.unet.mid_block.attentions[0].transformer_blocks[0]
    block.__class__ = type("MergingBlock", (type(block),), {"__module__": "tomesd.patch"})
    refused(watched(host), calibration, r"MergingBlock is a class of tomesd\.patch")


def test_attention_processors(host):
    from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

    class Half(AttnProcessor2_0):
        def __init__(self, strength):
            super().__init__()
            self.strength = strength

    unet = host.pipeline.unet
    calibration = calibrate([watched(host)])
    unet.set_attn_processor(AttnProcessor())  # computes the same
    assert accepted(watched(host), calibration)
    unet.set_attn_processor(Half(0.5))
    refused(
        watched(host),
        calibration,
        r"processors: model: AttnProcessor \(\d+\) was there .*model: Half\(strength=0\.5\) \(\d+\), calibrated without it",
    )
    half = calibrate([watched(host)])
    unet.set_attn_processor(Half(0.25))
    refused(watched(host), half, r"Half\(strength=0\.25\)")


def test_a_run_that_brings_its_own_processors_is_judged_with_them():
    """Perturbed attention exchanges them for the time of the run; a guard asks in the middle of it."""
    host = FAMILIES["StableDiffusionPAGPipeline"].build()
    calibration = calibrate([watched(host)]).using(1)
    with memhook.guard(host.pipeline, calibration, fpr=0.4, action="warn") as guard:
        host.run()
    assert guard.detection is not None
    host.pipeline.unet.set_attn_processor(host.pipeline.unet.attn_processors)
    assert accepted(watched(host), calibration)


@pytest.mark.parametrize("kind", ["cache", "training"])
def test_what_hooks_of_diffusers_and_modes_change(host, kind):
    calibration = calibrate([watched(host)])
    if kind == "training":
        host.pipeline.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_out[1] = nn.Dropout(0.5).train()
        message = "patched: model: Dropout in training mode"
    else:
        from diffusers.hooks import HookRegistry, ModelHook

        HookRegistry.check_if_exists_or_initialize(host.pipeline.unet.mid_block).register_hook(ModelHook(), "skipping")
        message = "patched: model: skipping on UNetMidBlock2DCrossAttn"
    refused(watched(host), calibration, message)


def test_offloading_is_no_change(host):
    from accelerate import cpu_offload

    calibration = calibrate([watched(host)])
    cpu_offload(host.pipeline.unet, execution_device=torch.device("cpu"), offload_buffers=True)
    cpu_offload(host.pipeline.vae, execution_device=torch.device("cpu"), offload_buffers=True)
    found = watched(host)
    assert found.setting["patched"] == {}
    assert accepted(found, calibration)


# ---- quantization


class QuantizedLinear(nn.Linear):
    """As quanto's before it is frozen: the weights are those of before, and rounded when they are used."""

    def forward(self, x):
        return nn.functional.linear(x, (self.weight * 4).round() / 4, self.bias)


def test_layers_that_round_their_weights_when_they_use_them(host):
    calibration = calibrate([watched(host)])
    attention = host.pipeline.unet.mid_block.attentions[0].transformer_blocks[0].attn2
    old, attention.to_v = attention.to_v, QuantizedLinear(attention.to_v.in_features, attention.to_v.out_features, bias=False)
    attention.to_v.weight = old.weight
    refused(watched(host), calibration, r"quantization: model: QuantizedLinear \(1\), calibrated without it")


def test_weights_in_a_small_dtype_name_it(host):
    calibration = calibrate([watched(host)])
    host.pipeline.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    refused(watched(host), calibration, r"quantization: model: float8_e4m3fn \(\d+\), calibrated without it")


# ---- scheduler, arguments, inputs


def exchanged(**changes):
    def change(pipeline):
        pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, **changes)

    return change


@pytest.mark.parametrize(
    ("change", "message", "first"),
    [
        (exchanged(clip_sample=True), "clip_sample is True, calibrated with False", False),
        (exchanged(rescale_betas_zero_snr=True), "rescale_betas_zero_snr is True, calibrated with False", False),
        (exchanged(beta_schedule="squaredcos_cap_v2"), "beta_schedule is 'squaredcos_cap_v2', calibrated with 'linear'", False),
        (exchanged(prediction_type="sample"), "prediction_type is 'sample', calibrated with 'epsilon'", True),
    ],
)
def test_the_schedulers_configuration_is_a_setting(host, change, message, first):
    """Of which a score over the first evaluation sees only what its prediction is."""
    calibration = calibrate([watched(host)])
    change(host.pipeline)
    other = watched(host)
    refused(other, calibration, f"differs in scheduler: .*{message}")
    if first:
        refused(other, calibration.using(1), message)
    else:
        assert accepted(other, calibration.using(1))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"eta": 0.5}, r"scheduler_arguments: eta is 0\.5, calibrated with 0\.0"),
        ({"guidance_rescale": 0.7}, r"pipeline_arguments: guidance_rescale is 0\.7, calibrated with 0\.0"),
        ({"guidance_scale": 7.6}, r"guidance_scale: the calibration was made with 7\.5, this run used 7\.6"),
        ({"guidance_scale": 3.0}, r"guidance_scale: the calibration was made with 7\.5, this run used 3\.0"),
    ],
)
def test_what_a_call_asks_for_is_a_setting(host, call, message):
    calibration = calibrate([watched(host)])
    other = watched(host, **call)
    refused(other, calibration, message)
    assert accepted(other, calibration.using(1))


@pytest.mark.parametrize("scale", [1.05, 1.2, 1.5, 3.0, 12.0])
def test_a_guidance_scale_is_known_again_in_bfloat16(host, scale):
    calibration = calibrate([watched(host, guidance_scale=scale)])
    host.pipeline.to(torch.bfloat16)
    first = watched(host, guidance_scale=scale, **text_of(torch.bfloat16))
    assert accepted(first, calibration)
    assert accepted(first, calibrate([watched(host, guidance_scale=scale, **text_of(torch.bfloat16))]))


def text_of(dtype):
    from tests.adapters.zoo.images import text

    return {name: value.to(dtype) for name, value in text().items()}


def test_what_else_the_denoiser_is_given(host):
    """A ControlNet's residuals beside the text."""
    calibration = calibrate([watched(host)])
    controlled = FAMILIES["StableDiffusionControlNetPipeline"].build()
    trace = watched(controlled)
    message = refused(trace, calibration, "inputs: .*down_block_additional_residuals, calibrated without it")
    assert "mid_block_additional_residual" in message
    weaker = watched(controlled, controlnet_conditioning_scale=0.5)
    refused(weaker, calibrate([trace]), r"inputs: ControlNetModel: conditioning_scale is 0\.5, calibrated with 1\.0")
    with torch.no_grad():
        controlled.pipeline.controlnet.conv_in.weight.mul_(2)
    refused(watched(controlled), calibrate([trace]), "differs in controlnet: .*1 of .* parameter tensors have other values")


def test_the_unconditional_text(host):
    calibration = calibrate([watched(host)])
    from tests.adapters.zoo.images import text

    other = {**text(), "negative_prompt_embeds": text()["prompt_embeds"].flip(1)}
    refused(watched(host, **other), calibration, "unconditional_text.*negative prompt")


# ---- when it is taken


def test_a_trace_is_judged_and_pickled_when_its_pipeline_is_gone(host):
    lora(host)
    calibration, trace = calibrate([watched(host)]), watched(host)
    stored = pickle.dumps(trace)
    del host
    gc.collect()
    assert accepted(trace, calibration)
    assert accepted(pickle.loads(stored), calibration)  # noqa: S301 -- our own


def test_a_setting_survives_its_file(host, tmp_path):
    lora(host)
    host.pipeline.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    calibrate([watched(host)]).save(tmp_path / "c.safetensors")
    calibration = memhook.Calibration.load(tmp_path / "c.safetensors")
    assert accepted(watched(host), calibration)
    host.pipeline.set_adapters(["style"], [0.1])
    refused(watched(host), calibration, r"LoRA 'style' at 0\.1, calibrated at 1\.0")
