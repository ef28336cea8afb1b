"""A model of ComfyUI's shape around a tiny UNet, and its patcher."""

import copy

import torch
from torch import nn

from memhook.testing import tiny_unet


class EPS:
    def calculate_input(self, sigma, x):
        return x / (sigma**2 + 1) ** 0.5

    def calculate_denoised(self, sigma, output, x):
        return x - output * sigma


class V_PREDICTION(EPS):  # noqa: N801 -- ComfyUI's name
    def calculate_denoised(self, sigma, output, x):
        return x / (sigma**2 + 1) - output * sigma / (sigma**2 + 1) ** 0.5


class CONST:
    def calculate_input(self, sigma, x):
        return x

    def calculate_denoised(self, sigma, output, x):
        return x - output * sigma


class Discrete(nn.Module):
    """Sigmas are no parameters, and made with the model: under inference_mode they are inference tensors too."""

    def __init__(self):
        super().__init__()
        self.register_buffer("sigmas", torch.logspace(-1.5, 1.15, 1000))

    def timestep(self, sigma):
        return (sigma[:, None] - self.sigmas).abs().argmin(dim=1)


def sampling(kind):
    class ModelSampling(Discrete, kind):
        pass

    return ModelSampling()


class TextUNet(nn.Module):
    """The network: its text comes as ``context``."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.unet = tiny_unet(dtype=dtype)
        self.offset = torch.zeros(1, dtype=dtype)  # a tensor that is no parameter and no buffer

    def forward(self, x, timesteps, context=None, control=None, transformer_options=None, **others):
        options = transformer_options or {}
        for patch in options.get("patches_replace", {}).get("attn1", {}).values():
            context = patch(context)
        if "concat" in others:
            x = x + others["concat"]
        return self.unet(x, timesteps, context * (1 + self.offset))


class BaseModel(nn.Module):
    def __init__(self, kind=EPS, dtype=torch.float32):
        super().__init__()
        self.diffusion_model = TextUNet(dtype).eval()
        self.model_sampling = sampling(kind)
        self.current_patcher = None
        self.free = 1 << 30  # "memory": how many rows fit in one call
        self.calls = []  # rows of each call

    def apply_model(self, x, t, c_crossattn=None, transformer_options=None, **others):
        self.calls.append(len(x))
        sigma = t.reshape(-1, 1, 1, 1)
        dtype = self.diffusion_model.unet.enter.weight.dtype
        given = self.model_sampling.calculate_input(sigma, x).to(dtype)
        extra = {name: value.to(dtype) for name, value in others.items()}
        output = self.diffusion_model(
            given, self.model_sampling.timestep(t), context=c_crossattn.to(dtype), transformer_options=transformer_options, **extra
        )
        return self.model_sampling.calculate_denoised(sigma, output.float(), x)

    def process_latent_in(self, latent):
        return latent * 0.5

    def process_latent_out(self, latent):
        return latent / 0.5


class ModelPatcher:
    def __init__(self, model):
        self.model = model
        self.model_options = {"transformer_options": {}}
        self.wrappers, self.callbacks, self.attachments, self.patches, self.backup = {}, {}, {}, {}, {}
        self.load_device = torch.device("cpu")

    def clone(self):
        other = type(self)(self.model)
        other.model_options = copy.deepcopy(self.model_options)
        other.patches, other.backup = dict(self.patches), self.backup
        other.attachments = dict(self.attachments)
        other.wrappers, other.callbacks = merged_tables(self.wrappers), merged_tables(self.callbacks)
        for callbacks in self.callbacks.get("on_clone", {}).values():
            for callback in callbacks:
                callback(self, other)
        return other

    def add_wrapper_with_key(self, kind, key, wrapper):
        self.wrappers.setdefault(kind, {}).setdefault(key, []).append(wrapper)

    def remove_wrappers_with_key(self, kind, key):
        self.wrappers.get(kind, {}).pop(key, None)

    def add_callback_with_key(self, kind, key, callback):
        self.callbacks.setdefault(kind, {}).setdefault(key, []).append(callback)

    def set_model_sampler_post_cfg_function(self, function):
        self.model_options["sampler_post_cfg_function"] = [*self.model_options.get("sampler_post_cfg_function", []), function]

    def set_model_sampler_pre_cfg_function(self, function):
        self.model_options["sampler_pre_cfg_function"] = [*self.model_options.get("sampler_pre_cfg_function", []), function]

    def get_model_object(self, name):
        return getattr(self.model, name)

    def pre_run(self):
        self.model.current_patcher = self

    def cleanup(self):
        self.model.current_patcher = None

    def prepare_state(self, timestep):
        pass


class OldModelPatcher:
    """As in Forge and in ComfyUI of 2024: no wrappers."""

    __init__ = ModelPatcher.__init__
    set_model_sampler_post_cfg_function = ModelPatcher.set_model_sampler_post_cfg_function
    set_model_sampler_pre_cfg_function = ModelPatcher.set_model_sampler_pre_cfg_function
    pre_run, cleanup, prepare_state = ModelPatcher.pre_run, ModelPatcher.cleanup, ModelPatcher.prepare_state


OldModelPatcher.__name__ = "ModelPatcher"


def merged_tables(tables):
    return {kind: {key: list(items) for key, items in table.items()} for kind, table in tables.items()}


def make_patcher(kind=EPS, *, dtype=torch.float32, old=False):
    return (OldModelPatcher if old else ModelPatcher)(BaseModel(kind, dtype))
