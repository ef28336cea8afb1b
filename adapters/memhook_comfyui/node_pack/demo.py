"""The small model that comes with memhook, for trying the other nodes out: it really memorizes, and it is known what."""

from __future__ import annotations

import json
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from memhook import testbed
from memhook.errors import MemhookError

from .host import CATEGORY, comfy

_HARMLESS = 240  # prompts at most: enough for one false alarm in a hundred
_BETAS = {"beta_schedule": "linear", "linear_start": 0.00085, "linear_end": 0.012, "timesteps": 1000}  # "scaled_linear" in diffusers


class DemoModel:
    """MODEL, CLIP, VAE, a memorized prompt and harmless ones."""

    CATEGORY = CATEGORY
    DESCRIPTION = "A tiny model of 32 x 32 pixel pictures that has memorized some of them. Use empty latents of 128 x 128. Needs diffusers."
    RETURN_TYPES: ClassVar = ("MODEL", "CLIP", "VAE", "STRING", "STRING")
    RETURN_NAMES: ClassVar = ("model", "clip", "vae", "prompt", "harmless_prompts")
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 -- ComfyUI's name
        """ComfyUI's description of the inputs."""
        count = len(testbed.memorized(kind="verbatim"))
        tooltip = "A memorized prompt by its number; -1 for one that is not memorized."
        return {"required": {"memorized": ("INT", {"default": 1, "min": -1, "max": count - 1, "tooltip": tooltip})}}

    def load(self, memorized: int) -> tuple[Any, Any, Any, str, str]:
        """Load and wrap the three parts."""
        try:
            from diffusers import AutoencoderKL, UNet2DConditionModel
        except ImportError as error:
            raise MemhookError(
                f"the demo model is in diffusers' format, and diffusers cannot be imported ({error}); install or update it (the extra `diffusers`)"
            ) from error
        folder = testbed.model_path()
        unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet", torch_dtype=torch.float32).eval()
        vae = AutoencoderKL.from_pretrained(folder, subfolder="vae", torch_dtype=torch.float32).eval()
        known = testbed.memorized(kind="verbatim")[memorized].prompt if memorized >= 0 else testbed.clean(split="test")[0].prompt
        clean = testbed.clean(split="calibration")
        harmless = "\n".join(row.prompt for row in clean[:: -(-len(clean) // _HARMLESS)])  # of every source
        return _model(unet, float(vae.config.scaling_factor)), _clip(), DemoVAE(vae), known, harmless


class _Denoiser(nn.Module):
    """A diffusers UNet, called as ComfyUI calls its networks."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet
        self.dtype = torch.float32

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor, **_: Any) -> Tensor:
        sample: Tensor = self.unet(x, timesteps, context).sample
        return sample


def _model(unet: nn.Module, scale: float) -> Any:
    """A MODEL: ComfyUI's own eps model and patcher around the network."""
    management = comfy("comfy.model_management")
    config = comfy("comfy.supported_models_base").BASE({"disable_unet_model_creation": True})
    config.latent_format = comfy("comfy.latent_formats").SD15(scale)
    config.sampling_settings = _BETAS
    base = comfy("comfy.model_base")
    model = base.BaseModel(config, model_type=base.ModelType.EPS)
    model.diffusion_model = _Denoiser(unet)
    device = management.get_torch_device()
    return comfy("comfy.model_patcher").ModelPatcher(model, load_device=device, offload_device=management.unet_offload_device())


def _clip() -> Any:
    """A CLIP: ComfyUI's own text encoder and tokenizer, of another size."""
    from safetensors.torch import load_file
    from transformers import PreTrainedTokenizerFast

    folder = testbed.model_path()
    clips = comfy("comfy.sd1_clip")
    config = json.loads((folder / "text_encoder" / "config.json").read_text(encoding="utf-8"))
    length = int(config["max_position_embeddings"])
    special = {"start": config["bos_token_id"], "end": config["eos_token_id"], "pad": config["pad_token_id"]}

    class Tokenizer(clips.SDTokenizer):  # type: ignore[name-defined, misc]
        def __init__(self, **_: Any) -> None:
            path = str(folder / "tokenizer")
            super().__init__(tokenizer_path=path, max_length=length, tokenizer_class=PreTrainedTokenizerFast, embedding_size=config["hidden_size"])

    class TokenizerOfOne(clips.SD1Tokenizer):  # type: ignore[name-defined, misc]
        def __init__(self, **_: Any) -> None:
            super().__init__(tokenizer=Tokenizer)

    class Encoder(clips.SDClipModel):  # type: ignore[name-defined, misc]
        def __init__(self, device: Any = "cpu", dtype: Any = None, model_options: Any = None) -> None:
            super().__init__(
                device=device, dtype=dtype, max_length=length, textmodel_json_config=dict(config), special_tokens=special,
                return_projected_pooled=False, model_options=model_options or {},
            )  # fmt: skip

    class EncoderOfOne(clips.SD1ClipModel):  # type: ignore[name-defined, misc]
        def __init__(self, device: Any = "cpu", dtype: Any = None, model_options: Any = None) -> None:
            super().__init__(device=device, dtype=dtype, model_options=model_options or {}, clip_model=Encoder)

    class Target:
        params: ClassVar[dict[str, Any]] = {}
        clip = EncoderOfOne
        tokenizer = TokenizerOfOne

    clip = comfy("comfy.sd").CLIP(Target(), model_options={"dtype": torch.float32})
    weights = load_file(folder / "text_encoder" / "model.safetensors")
    # transformers 5 saves without the prefix that ComfyUI's encoder has.
    named = {name if name.startswith("text_model.") else f"text_model.{name}": value for name, value in weights.items()}
    # ComfyUI's table has CLIP's own length, whatever the vocabulary's (0.3.64); rows beyond it are never looked up.
    table = named["text_model.embeddings.token_embedding.weight"]
    whole = clip.cond_stage_model.clip_l.transformer.get_input_embeddings().weight.shape[0]
    named["text_model.embeddings.token_embedding.weight"] = nn.functional.pad(table, (0, 0, 0, whole - table.shape[0]))
    named["text_projection.weight"] = torch.eye(table.shape[1])  # it has none, and the pooled output is not used
    missing, _ = clip.load_sd(named)
    lost = [name for name in missing if "position_ids" not in name]
    if lost:
        raise MemhookError(f"the demo's text encoder lacks {', '.join(lost[:3])}; install memhook again")
    return clip


class DemoVAE:
    """A VAE, as far as VAEDecode and VAEEncode ask."""

    def __init__(self, vae: Any) -> None:
        self._vae = vae

    def decode(self, latent: Tensor) -> Tensor:
        """Pictures ``(b, h, w, 3)`` in 0 to 1."""
        decoded: Tensor = self._vae.decode(latent.to(torch.float32)).sample
        return decoded.add(1).div(2).clamp(0, 1).movedim(1, -1)

    def encode(self, pixels: Tensor) -> Tensor:
        """The inverse."""
        encoded: Tensor = self._vae.encode(pixels[..., :3].movedim(-1, 1).mul(2).sub(1)).latent_dist.mode()
        return encoded
