"""Guiders: objects that hold the lists of conditionings and combine their predictions."""

import torch

from tests.adapters.comfy.calc import calc_cond_batch, cfg_function, sampling_function
from tests.adapters.comfy.model import merged_tables
from tests.adapters.comfy.patching import merged, run_wrapped, wrappers_of
from tests.adapters.comfy.prompts import converted, opposed, processed


class CFGGuider:
    def __init__(self, patcher):
        self.model_patcher, self.model_options = patcher, patcher.model_options
        self.original_conds, self.cfg = {}, 1.0

    def set_conds(self, positive, negative):
        self.inner_set_conds({"positive": positive, "negative": negative})

    def inner_set_conds(self, conds):
        self.original_conds = {name: converted(conditioning) for name, conditioning in conds.items()}

    def set_cfg(self, cfg):
        self.cfg = cfg

    def __call__(self, x, timestep, model_options, seed=None):
        wrappers = wrappers_of("predict_noise", self.model_options)
        return run_wrapped(self.predict_noise, self, wrappers, (x, timestep, model_options, seed))

    def predict_noise(self, x, timestep, model_options, seed=None):
        negative, positive = self.conds.get("negative"), self.conds.get("positive")
        return sampling_function(self.inner_model, x, timestep, negative, positive, self.cfg, model_options)

    def outer_sample(self, noise, latent_image, sampler, sigmas, denoise_mask=None, callback=None, disable_pbar=False, seed=None):
        self.inner_model = self.model_patcher.model
        try:
            self.model_patcher.pre_run()
            self.conds = opposed({name: processed(conds) for name, conds in self.conds.items()})
            options = merged(self.model_options)
            samples = sampler.sample(
                self, sigmas, {"model_options": options, "seed": seed}, callback, noise, latent_image, denoise_mask, disable_pbar
            )
            output = self.inner_model.process_latent_out(samples.to(torch.float32))
        finally:
            self.model_patcher.cleanup()
        del self.inner_model
        return output

    def sample(self, noise, latent_image, sampler, sigmas, denoise_mask=None, callback=None, disable_pbar=False, seed=None):
        self.conds = {name: [dict(entry) for entry in conds] for name, conds in self.original_conds.items()}
        before = self.model_options
        try:
            self.model_options = merged(before)
            if hasattr(self.model_patcher, "clone"):  # with the patcher extension
                tables = self.model_options.setdefault("transformer_options", {}).setdefault("wrappers", {})
                for kind, table in merged_tables(self.model_patcher.wrappers).items():
                    for key, wrappers in table.items():
                        tables.setdefault(kind, {}).setdefault(key, []).extend(wrappers)
            arguments = (noise, latent_image, sampler, sigmas, denoise_mask, callback, disable_pbar, seed)
            output = run_wrapped(self.outer_sample, self, wrappers_of("outer_sample", self.model_options), arguments)
        finally:
            self.model_options = before
        del self.conds
        return output


class BasicGuider(CFGGuider):
    def set_conds(self, positive):
        self.inner_set_conds({"positive": positive})


class DualGuider(CFGGuider):
    def set_conds(self, positive, middle, negative):
        middle = [[tensor, {**options, "prompt_type": "negative"}] for tensor, options in middle]
        self.inner_set_conds({"positive": positive, "middle": middle, "negative": negative})

    def set_cfg(self, cfg1, cfg2):
        self.cfg1, self.cfg2 = cfg1, cfg2

    def predict_noise(self, x, timestep, model_options, seed=None):
        negative, middle, positive = (self.conds[name] for name in ("negative", "middle", "positive"))
        if self.cfg2 == 1.0:
            negative = None
        out = calc_cond_batch(self.inner_model, [negative, middle, positive], x, timestep, model_options)
        guided = cfg_function(self.inner_model, out[1], out[0], self.cfg2, x, timestep, model_options, middle, negative)
        return guided + (out[2] - out[1]) * self.cfg1


class PerpNegGuider(CFGGuider):
    def set_conds(self, positive, negative, empty):
        self.inner_set_conds({"positive": positive, "empty_negative_prompt": empty, "negative": negative})

    def predict_noise(self, x, timestep, model_options, seed=None):
        conds = [self.conds[name] for name in ("positive", "negative", "empty_negative_prompt")]
        positive, negative, empty = calc_cond_batch(self.inner_model, conds, x, timestep, model_options)
        toward, away = positive - empty, negative - empty
        away = away - (away * toward).sum() / toward.norm() ** 2 * toward
        denoised = empty + self.cfg * (toward - away)
        for function in model_options.get("sampler_post_cfg_function", []):
            args = {"denoised": denoised, "cond": conds[0], "uncond": conds[1], "cond_denoised": positive, "uncond_denoised": negative}
            more = {"empty_cond": conds[2], "empty_cond_denoised": empty, "model": self.inner_model, "cond_scale": self.cfg}
            denoised = function({**args, **more, "sigma": timestep, "model_options": model_options, "input": x})
        return denoised
