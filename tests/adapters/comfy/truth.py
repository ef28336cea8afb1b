"""What the magnitudes should be: the raw network, called with one sample, one conditioning and one piece of the picture at a time."""

import contextlib

import torch

from tests.adapters.comfy.model import CONST, V_PREDICTION


@contextlib.contextmanager
def visited(guider):
    """Every ``(x, sigma)`` at which the guider is asked, in order."""
    seen, own = [], guider.predict_noise

    def predict_noise(x, timestep, model_options, seed=None):
        seen.append((x.clone(), timestep.clone()))
        return own(x, timestep, model_options, seed)

    guider.predict_noise = predict_noise
    try:
        yield seen
    finally:
        del guider.predict_noise


def network(model, x, sigma, text, concat):
    """The raw output for one sample, as noise (as velocity for flow models) up to a term that conditionings share."""
    sampling = model.model_sampling
    given = sampling.calculate_input(sigma, x)
    others = {} if concat is None else {"concat": concat}
    output = model.diffusion_model(given, sampling.timestep(sigma.reshape(1)), context=text, **others)
    return output / (sigma**2 + 1) ** 0.5 if isinstance(sampling, V_PREDICTION) and not isinstance(sampling, CONST) else output


def predicted(model, x, sigma, conditioning):
    """``(b, c, h, w)``, and where anything was predicted."""
    total, weight = torch.zeros_like(x), torch.zeros_like(x)
    for tensor, options in conditioning:
        if "timestep_start" in options and not options["timestep_end"] <= float(sigma[0]) <= options["timestep_start"]:
            continue
        height, width, top, left = options.get("area", (*x.shape[2:], 0, 0))
        for sample in range(len(x)):
            window = (slice(sample, sample + 1), slice(None), slice(top, top + height), slice(left, left + width))
            mask = options["mask"][0][window[2], window[3]] if "mask" in options else 1.0
            concat = options.get("concat_latent_image")
            row = tensor[sample % len(tensor)][None]
            total[window] += network(model, x[window], sigma[sample], row, concat) * mask * options.get("strength", 1.0)
            weight[window] += mask * options.get("strength", 1.0)
    return total / weight.clamp_min(1e-30), weight > 0


@torch.no_grad()
def magnitudes(model, seen, cond, uncond):
    """``(s, b)``."""
    rows = []
    for x, sigma in seen:
        (first, here), (second, there) = (predicted(model, x, sigma, conditioning) for conditioning in (cond, uncond))
        rows.append(((first - second) * (here & there)).flatten(1).norm(dim=1))
    return torch.stack(rows).numpy()
