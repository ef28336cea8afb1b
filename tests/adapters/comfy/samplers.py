"""Samplers, as k-diffusion writes them."""

import torch


def sample_euler(model, x, sigmas, extra_args, callback):
    ones = x.new_ones([len(x)])
    for i in range(len(sigmas) - 1):
        denoised = model(x, sigmas[i] * ones, **extra_args)
        if callback is not None:
            callback(i, denoised, x, len(sigmas) - 1)
        x = x + (x - denoised) / sigmas[i] * (sigmas[i + 1] - sigmas[i])
    return x


def sample_heun(model, x, sigmas, extra_args, callback):
    ones = x.new_ones([len(x)])
    for i in range(len(sigmas) - 1):
        denoised = model(x, sigmas[i] * ones, **extra_args)
        if callback is not None:
            callback(i, denoised, x, len(sigmas) - 1)
        slope, step = (x - denoised) / sigmas[i], sigmas[i + 1] - sigmas[i]
        if sigmas[i + 1] == 0:
            x = x + slope * step
        else:
            ahead = x + slope * step
            second = (ahead - model(ahead, sigmas[i + 1] * ones, **extra_args)) / sigmas[i + 1]
            x = x + (slope + second) / 2 * step
    return x


def sample_euler_cfg_pp(model, x, sigmas, extra_args, callback):
    """Needs the unconditional prediction itself, which it takes from the last function of guidance."""
    seen = []

    def post_cfg(args):
        seen[:] = [args["uncond_denoised"]]
        return args["denoised"]

    options = dict(extra_args["model_options"])
    options["sampler_post_cfg_function"] = [*options.get("sampler_post_cfg_function", []), post_cfg]
    options["disable_cfg1_optimization"] = True
    ones = x.new_ones([len(x)])
    for i in range(len(sigmas) - 1):
        denoised = model(x, sigmas[i] * ones, **{**extra_args, "model_options": options})
        x = denoised + (x - seen[0]) / sigmas[i] * sigmas[i + 1]
        if callback is not None:
            callback(i, denoised, x, len(sigmas) - 1)
    return x


SAMPLERS = {"euler": sample_euler, "heun": sample_heun, "euler_cfg_pp": sample_euler_cfg_pp}


class KSAMPLER:
    def __init__(self, function):
        self.sampler_function = function

    def sample(self, model_wrap, sigmas, extra_args, callback, noise, latent_image, denoise_mask, disable_pbar):
        with torch.no_grad():
            x = noise * sigmas[0] + latent_image
            return self.sampler_function(model_wrap, x, sigmas, extra_args, callback)


def make_sampler(name="euler"):
    return KSAMPLER(SAMPLERS[name])
