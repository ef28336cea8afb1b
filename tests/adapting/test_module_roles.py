"""The adapter for a bare module where a batch holds more than two predictions, and where samples have times of their own."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

import memhook
from memhook import GuidanceLayoutError, Intervention, MemhookError, ModuleAdapter, NoGuidanceError
from memhook.testing import tiny_unet

ORDERS = list(itertools.permutations(("uncond", "cond", "perturbed")))
TWO = {
    "uncond_first": ("uncond", "cond"),
    "cond_first": ("cond", "uncond"),
    "two_calls_uncond_first": ("uncond", "cond"),
    "two_calls_cond_first": ("cond", "uncond"),
}


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Nested(nn.Module):
    """A denoiser whose text stands in a list in a dict, and that perturbs rows which it is told to perturb."""

    def __init__(self):
        super().__init__()
        self.unet = tiny_unet(dtype=torch.float64)

    def forward(self, x, times, *, conditioning, perturbed=None):
        text = conditioning["text"][0]
        if perturbed is not None:
            text = torch.where(perturbed[:, None, None], text.flip(1).cumsum(1), text)
        return self.unet(x, times, text)


PATH = ("conditioning", "text", 0)


def run(model, roles, *, samples=2, steps=3, watch=None, pattern=None, times=None):
    """A run with all its predictions in one batch, and what each evaluation's predictions are when they are made one by one."""
    texts = {"cond": randn(samples, 5, 6, seed=1), "uncond": randn(1, 5, 6, seed=2).expand(samples, 5, 6)}
    x, truth = randn(samples, 4, 8, 8, seed=3), []
    for step in range(steps):
        made = pattern[step] if pattern else roles
        time = torch.full((samples,), 900.0 - 100 * step).double() if times is None else times - 50 * step
        text = torch.cat([texts["uncond" if role == "uncond" else "cond"] for role in made])
        perturbed = torch.cat([torch.full((samples,), role == "perturbed") for role in made])
        with torch.no_grad():
            output = model(x.repeat(len(made), 1, 1, 1), time.repeat(len(made)), conditioning={"text": [text], "size": 8}, perturbed=perturbed)
            found = dict(zip(made, output.chunk(len(made)), strict=True))
            alone = {role: model.unet(x, time, texts[role]) for role in texts}
        truth.append((alone["cond"], alone["uncond"] if "uncond" in made else None, x, time))
        c, u = found["cond"], found.get("uncond", found["cond"])
        x = x - (u + 3 * (c - u) + 0.5 * (c - found.get("perturbed", c))) / steps
    return texts, truth


def magnitudes(truth):
    return np.array([[np.nan] * len(c) if u is None else (c - u).flatten(1).norm(dim=1).tolist() for c, u, *_ in truth])


@pytest.mark.parametrize("roles", ORDERS, ids="-".join)
@pytest.mark.parametrize("samples", [1, 2, 3])
def test_three_predictions_in_one_batch(roles, samples):
    model = Nested()
    adapter = ModuleAdapter(model, layout=roles, embedding=PATH)
    with memhook.watch(model, adapter=adapter) as trace:
        run(model, roles, samples=samples)
    with memhook.watch(model, adapter=adapter, keep="calls") as kept:
        texts, truth = run(model, roles, samples=samples)
    np.testing.assert_allclose(trace.magnitudes, magnitudes(truth), rtol=1e-6)
    np.testing.assert_array_equal(kept.magnitudes, trace.magnitudes)
    assert trace.roles == "declared"
    for evaluation, (c, u, x, time) in zip(kept.evaluations, truth, strict=True):
        torch.testing.assert_close(evaluation.pred_cond, c)
        torch.testing.assert_close(evaluation.pred_uncond, u)
        assert torch.equal(evaluation.embedding, texts["cond"])
        assert evaluation.objective(texts["uncond"]).max() < 1e-9
        embedding = texts["cond"].clone().requires_grad_()
        (found,) = torch.autograd.grad(evaluation.objective(embedding).sum(), embedding)
        (expected,) = torch.autograd.grad((model.unet(x, time, embedding) - u).flatten(1).norm(dim=1).sum(), embedding)
        torch.testing.assert_close(found, expected)


def test_swapped_names_are_caught_by_the_unconditional_replay():
    model = Nested()
    adapter = ModuleAdapter(model, layout=("cond", "uncond", "perturbed"), embedding=PATH)
    with memhook.watch(model, adapter=adapter, keep="calls") as trace:
        texts, _ = run(model, ("uncond", "cond", "perturbed"))
    assert trace.evaluations[0].objective(texts["uncond"]).min() > 1e-3


def test_any_name_will_do_for_the_others():
    model = Nested()
    with memhook.watch(model, adapter=ModuleAdapter(model, layout=["uncond", "cond", "skipped layers", "more"])) as trace:
        _, truth = run(model, ("uncond", "cond", "perturbed", "again"))
    np.testing.assert_allclose(trace.magnitudes, magnitudes(truth), rtol=1e-6)


class Editing(nn.Module):
    """InstructPix2Pix: the picture to edit stands in more channels of the sample, and is left out of one prediction."""

    def __init__(self):
        super().__init__()
        self.unet, self.mix = tiny_unet(dtype=torch.float64), nn.Conv2d(8, 4, 1).double()

    def forward(self, x, time, text):
        return self.unet(self.mix(x), time, text)


def test_image_and_text_guidance():
    model, x, picture = Editing(), randn(2, 4, 8, 8), randn(2, 4, 8, 8, seed=1)
    cond, uncond = randn(2, 5, 6, seed=2), randn(2, 5, 6, seed=3)
    images = torch.cat([picture, picture, torch.zeros_like(picture)])
    with memhook.watch(model, adapter=ModuleAdapter(model, layout=("cond", "uncond", "neither")), keep="calls") as trace, torch.no_grad():
        c, u, _ = model(torch.cat([x.repeat(3, 1, 1, 1), images], dim=1), 500.0, torch.cat([cond, uncond, uncond])).chunk(3)
    np.testing.assert_allclose(trace.magnitudes[0], (c - u).flatten(1).norm(dim=1), rtol=1e-6)
    assert trace.evaluations[0].objective(uncond).max() < 1e-9


class CutsInThree(nn.Module):
    """Perturbed attention as hosts put it on a model: a layer that takes the last third of whatever batch it is given."""

    def __init__(self):
        super().__init__()
        self.unet = tiny_unet(dtype=torch.float64)

    def forward(self, x, time, text):
        first, second, last = text.chunk(3)
        return self.unet(x, time, torch.cat([first, second, last.flip(1).cumsum(1)]))


@pytest.mark.parametrize("samples", [1, 2, 3])  # three rows can be cut in three as well: then only the numbers tell
def test_a_model_that_looks_at_the_whole_batch_is_replayed_whole(samples):
    model, x = CutsInThree(), randn(samples, 4, 8, 8).repeat(3, 1, 1, 1)
    cond, uncond = randn(samples, 5, 6, seed=2), randn(samples, 5, 6, seed=3)
    with memhook.watch(model, adapter=ModuleAdapter(model, layout=("uncond", "cond", "perturbed")), keep="calls") as trace, torch.no_grad():
        model(x, 500.0, torch.cat([uncond, cond, cond]))
    (evaluation,) = trace.evaluations
    embedding = cond.clone().requires_grad_()
    value = evaluation.objective(embedding)
    np.testing.assert_allclose(value.detach(), trace.magnitudes[0], rtol=1e-6)
    (gradient,) = torch.autograd.grad(value[0], embedding)
    assert gradient[0].abs().max() > 0
    assert samples == 1 or gradient[1:].abs().max() == 0
    assert evaluation.objective(uncond).max() < 1e-9
    one = evaluation.take(torch.tensor([samples - 1]))
    np.testing.assert_allclose(one.objective(one.embedding).detach(), trace.magnitudes[0, -1:], rtol=1e-6)


def test_an_intervention_changes_the_conditional_part_alone():
    model, roles = Nested(), ("uncond", "cond", "perturbed")
    x, text = randn(2, 4, 8, 8).repeat(3, 1, 1, 1), randn(6, 5, 6)
    plain = model(x, 500.0, conditioning={"text": [text]})
    adapter = ModuleAdapter(model, layout=roles, embedding=PATH)
    with memhook.watch(model, adapter=adapter, on_evaluation=lambda evaluation: Intervention(pred_cond=evaluation.pred_cond + 1)):
        changed = model(x, 500.0, conditioning={"text": [text]})
    torch.testing.assert_close(changed - plain, torch.tensor([0.0, 0, 1, 1, 0, 0]).double()[:, None, None, None].expand_as(plain))


# ---- times of one's own


@pytest.mark.parametrize("layout", TWO)
@pytest.mark.parametrize("keep", ["scalars", "calls"])
def test_every_sample_may_have_its_own_time(layout, keep):
    unet, times = tiny_unet(dtype=torch.float64), torch.tensor([900.0, 20.0, 400.0]).double()
    x, texts = randn(3, 4, 8, 8), {"cond": randn(3, 5, 6, seed=1), "uncond": randn(3, 5, 6, seed=2)}
    alone = {role: torch.cat([unet(x[i : i + 1], float(times[i]), text[i : i + 1]) for i in range(3)]).detach() for role, text in texts.items()}
    with memhook.watch(unet, adapter=ModuleAdapter(unet, layout=layout), keep=keep) as trace, torch.no_grad():
        if layout.startswith("two_calls"):
            for role in TWO[layout]:
                unet(x, times, texts[role])
        else:
            unet(torch.cat([x, x]), torch.cat([times, times]), torch.cat([texts[role] for role in TWO[layout]]))
    np.testing.assert_allclose(trace.magnitudes[0], (alone["cond"] - alone["uncond"]).flatten(1).norm(dim=1), rtol=1e-6)
    if keep == "calls":
        evaluation = trace.evaluations[0]
        assert evaluation.objective(texts["uncond"]).max() < 1e-9
        assert torch.autograd.gradcheck(evaluation.objective, texts["cond"].clone().requires_grad_(), eps=1e-6, atol=1e-7, rtol=1e-5)
        last = evaluation.take(torch.tensor([2]))
        torch.testing.assert_close(last.replay(texts["cond"][2:]).detach(), alone["cond"][2:])


def test_every_sample_may_have_its_own_time_in_three_parts():
    model, roles = Nested(), ("cond", "perturbed", "uncond")
    with memhook.watch(model, adapter=ModuleAdapter(model, layout=roles, embedding=PATH)) as trace:
        _, truth = run(model, roles, times=torch.tensor([900.0, 200.0]).double())
    np.testing.assert_allclose(trace.magnitudes, magnitudes(truth), rtol=1e-6)


# ---- what does not fit


@pytest.mark.parametrize("keep", ["scalars", "calls"])
@pytest.mark.parametrize("samples", [1, 2, 3])
def test_guidance_off_midway_is_missing(samples, keep):
    model, roles = Nested(), ("uncond", "cond", "perturbed")
    with memhook.watch(model, adapter=ModuleAdapter(model, layout=roles, embedding=PATH), keep=keep) as trace:
        _, truth = run(model, roles, samples=samples, pattern=[roles, ("cond",), roles])
    np.testing.assert_allclose(trace.magnitudes, magnitudes(truth), rtol=1e-6)
    assert trace.has_guidance.tolist() == [True, False, True]


@pytest.mark.parametrize("keep", ["scalars", "calls"])
@pytest.mark.parametrize("samples", [1, 2, 3])
def test_two_of_three_predictions_are_not_guessed(samples, keep):
    model, roles = Nested(), ("uncond", "cond", "perturbed")

    def watched():
        with memhook.watch(model, adapter=ModuleAdapter(model, layout=roles, embedding=PATH), keep=keep) as trace:
            run(model, roles, samples=samples, pattern=[roles, ("uncond", "cond"), roles])
        return trace.magnitudes

    with pytest.raises(
        GuidanceLayoutError, match=r"different noisy samples|batch of \d rows .*shape \(\d, 4, 8, 8\)\) after guided ones.*which does not show"
    ):
        watched()


@pytest.mark.parametrize("rows", [1, 2, 4, 5])
def test_a_batch_that_cannot_be_cut_says_its_shape(rows):
    unet = tiny_unet()
    with memhook.watch(unet, adapter=ModuleAdapter(unet, layout=("uncond", "cond", "perturbed"))) as trace, torch.no_grad():
        unet(torch.zeros(rows, 4, 8, 8), 1.0, torch.zeros(rows, 5, 6))
    with pytest.raises(NoGuidanceError, match=rf"batch of {rows} rows .*\({rows}, 4, 8, 8\).*'uncond', 'cond', 'perturbed'.*expects 3 equal parts"):
        _ = trace.magnitudes


def test_an_odd_batch_says_its_shape(unet):
    with memhook.watch(unet, adapter=ModuleAdapter(unet, layout="uncond_first")) as trace, torch.no_grad():
        unet(torch.zeros(3, 4, 8, 8), 1.0, torch.zeros(3, 5, 6))
    with pytest.raises(NoGuidanceError, match=r"batch of 3 rows .*\(3, 4, 8, 8\).*expects 2 equal parts.*scale above 1.*two calls"):
        _ = trace.magnitudes


def test_two_calls_of_unequal_shapes_say_both(unet):
    with memhook.watch(unet, adapter=ModuleAdapter(unet, layout="two_calls_cond_first")) as trace, torch.no_grad():
        for rows in (2, 3):
            unet(torch.zeros(rows, 4, 8, 8), 1.0, torch.zeros(rows, 5, 6))
        trace_of_first = trace._why_missing
    assert "(2, 4, 8, 8) and (3, 4, 8, 8)" in trace_of_first
    with pytest.raises(NoGuidanceError, match="stood alone"):
        _ = trace.magnitudes


def test_parts_of_different_samples_are_refused_with_their_shapes():
    unet = tiny_unet()
    with (
        memhook.watch(unet, adapter=ModuleAdapter(unet, layout=("uncond", "cond", "perturbed")), keep="calls"),
        pytest.raises(GuidanceLayoutError, match=r"different noisy samples .*\(2, 4, 8, 8\) and \(2, 4, 8, 8\)"),
    ):
        unet(torch.randn(6, 4, 8, 8), 1.0, torch.randn(6, 5, 6))


@pytest.mark.parametrize(
    "layout", [("cond", "perturbed"), ("cond", "uncond", "uncond"), ("cond", "uncond", "p", "p"), ("cond",), (), ("cond", "uncond", 3)], ids=str
)
def test_wrong_roles_are_named(unet, layout):
    with pytest.raises(MemhookError, match=r"layout is .*expected one of uncond_first,.*each once and with 'cond' and 'uncond'"):
        ModuleAdapter(unet, layout=layout)
