"""The heart of ComfyUI's sampling: lists of conditionings in, one combined x0 for each out."""

import math

import torch

from tests.adapters.comfy.patching import run_wrapped, wrappers_of


def calc_cond_batch(model, conds, x_in, timestep, model_options):
    return run_wrapped(_calc, None, wrappers_of("calc_cond_batch", model_options), (model, conds, x_in, timestep, model_options))


def _piece(entry, index, x, sigma):
    """Where an entry acts and how strongly; None where its time range has not begun or is over."""
    if "timestep_start" in entry and not entry["timestep_end"] <= float(sigma[0]) <= entry["timestep_start"]:
        return None
    height, width, top, left = entry.get("area", (*x.shape[2:], 0, 0))
    window = (slice(None), slice(None), slice(top, top + height), slice(left, left + width))
    weight = torch.ones_like(x[window]) * entry.get("strength", 1.0)
    if "mask" in entry:
        weight = weight * entry["mask"][:, None][window]
    given = {name: held.rows(len(x)) for name, held in entry["model_conds"].items()}
    return {"list": index, "window": window, "weight": weight, "x": x[window].clone(), "given": given}


def _fits(one, other):
    """Whether two pieces may share a call; texts of unequal length are repeated to a common one, if that is not far."""
    if one["x"].shape != other["x"].shape or one["given"].keys() != other["given"].keys():
        return False
    first, second = one["given"]["c_crossattn"].shape[1], other["given"]["c_crossattn"].shape[1]
    return math.lcm(first, second) // min(first, second) <= 4


def _joined(pieces, name):
    rows = [piece["given"][name] for piece in pieces]
    if name == "c_crossattn":
        length = math.lcm(*(row.shape[1] for row in rows))
        rows = [row.repeat(1, length // row.shape[1], 1) for row in rows]
    return torch.cat(rows)


def _calc(model, conds, x_in, timestep, model_options):
    model.current_patcher.prepare_state(timestep)
    totals = [torch.zeros_like(x_in) for _ in conds]
    weights = [torch.full_like(x_in, 1e-37) for _ in conds]
    todo = [piece for index, entries in enumerate(conds) for entry in entries or [] if (piece := _piece(entry, index, x_in, timestep)) is not None]
    while todo:
        together = [piece for piece in todo if _fits(piece, todo[0])]
        together = together[: max(1, model.free // len(x_in))][::-1]  # the last one first: negative before positive
        todo = [piece for piece in todo if not any(piece is other for other in together)]
        options = {**model_options.get("transformer_options", {}), "cond_or_uncond": [piece["list"] for piece in together]}
        given = {name: _joined(together, name) for name in together[0]["given"]}
        x = torch.cat([piece["x"] for piece in together])
        outputs = model.apply_model(x, torch.cat([timestep] * len(together)), transformer_options=options, **given).chunk(len(together))
        for piece, output in zip(together, outputs, strict=True):
            totals[piece["list"]][piece["window"]] += output * piece["weight"]
            weights[piece["list"]][piece["window"]] += piece["weight"]
    return [total.div_(weight) for total, weight in zip(totals, weights, strict=True)]


def cfg_function(model, cond_pred, uncond_pred, scale, x, timestep, model_options, cond, uncond):
    denoised = uncond_pred + (cond_pred - uncond_pred) * scale
    for function in model_options.get("sampler_post_cfg_function", []):
        args = {"denoised": denoised, "cond": cond, "uncond": uncond, "model": model, "cond_denoised": cond_pred, "uncond_denoised": uncond_pred}
        denoised = function({**args, "cond_scale": scale, "sigma": timestep, "model_options": model_options, "input": x})
    return denoised


def sampling_function(model, x, timestep, uncond, cond, scale, model_options):
    skipped = math.isclose(scale, 1.0) and not model_options.get("disable_cfg1_optimization", False)
    conds = [cond, None if skipped else uncond]
    outputs = calc_cond_batch(model, conds, x, timestep, model_options)
    for function in model_options.get("sampler_pre_cfg_function", []):
        outputs = function({"conds": conds, "conds_out": outputs, "input": x, "sigma": timestep, "model": model, "model_options": model_options})
    return cfg_function(model, outputs[0], outputs[1], scale, x, timestep, model_options, cond, conds[1])
