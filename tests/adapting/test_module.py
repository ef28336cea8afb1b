"""The adapter for a bare module: what a declared layout means, and what happens when it does not fit."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import memhook
from memhook import GuidanceLayoutError, MemhookError, ModuleAdapter, NoGuidanceError
from memhook.testing import sample, tiny_unet

BATCHED = ("uncond_first", "cond_first")
TWO_CALLS = ("two_calls_uncond_first", "two_calls_cond_first")


def guided(unet, layout, *, x, timestep=500.0, cond, uncond):
    """One guided evaluation in the layout asked for, as a host makes it."""
    if layout == "uncond_first":
        return unet(torch.cat([x, x]), timestep, torch.cat([uncond, cond])).chunk(2)[::-1]
    if layout == "cond_first":
        return unet(torch.cat([x, x]), timestep, torch.cat([cond, uncond])).chunk(2)
    if layout == "two_calls_uncond_first":
        return (unet(x, timestep, uncond), unet(x, timestep, cond))[::-1]
    return unet(x, timestep, cond), unet(x, timestep, uncond)


@torch.no_grad()
def run(unet, layout, pattern, *, samples=2, seed=0, keep="scalars", step=None, moment=float):
    """A run that is guided where ``pattern`` says "g", and not where it says "-"."""
    generator = torch.Generator().manual_seed(seed)
    x, cond, uncond = (torch.randn(samples, *shape, generator=generator) for shape in ((4, 8, 8), (5, 6), (5, 6)))
    expected = []
    with memhook.watch(unet, adapter=ModuleAdapter(unet, layout=layout), keep=keep) as trace:
        for index, kind in enumerate(pattern):
            timestep = moment(999 - 10 * index)
            if kind == "g":
                c, u = guided(unet, layout, x=x, timestep=timestep, cond=cond, uncond=uncond)
                expected.append((c - u).flatten(1).norm(dim=1).tolist())
            else:
                c = u = unet(x, timestep, cond)
                expected.append([np.nan] * samples)
            change = (u + 3 * (c - u)) / len(pattern)
            if step == "in place":
                x.sub_(change)
            else:
                x = x - change
    return trace, np.array(expected)


# ---- guidance that is off for a part of a run


@pytest.mark.parametrize("layout", [*BATCHED, *TWO_CALLS])
@pytest.mark.parametrize("keep", ["scalars", "calls"])
@pytest.mark.parametrize("samples", [1, 2, 3])
@pytest.mark.parametrize("pattern", ["gg--", "g--g", "g-g-g", "ggg-"])
def test_guidance_off_midway_is_missing(unet, layout, keep, samples, pattern):
    trace, expected = run(unet, layout, pattern, samples=samples, keep=keep)
    np.testing.assert_allclose(trace.magnitudes, expected, rtol=1e-5)
    assert trace.has_guidance.tolist() == [kind == "g" for kind in pattern]
    np.testing.assert_allclose(trace.score(), np.nanmean(expected, axis=0), rtol=1e-5)


@pytest.mark.parametrize("layout", TWO_CALLS)
@pytest.mark.parametrize(
    "moment", [float, int, torch.tensor, lambda t: torch.full((2,), t), lambda _: None], ids=["float", "int", "tensor", "batch", "none"]
)
@pytest.mark.parametrize("step", [None, "in place"])
def test_two_calls_are_told_apart_from_two_evaluations(unet, layout, moment, step):
    """By the timestep where it is known, and by the noisy sample, which both calls of a pair were given so far."""

    class Timeless(nn.Module):
        def __init__(self):
            super().__init__()
            self.unet = unet

        def forward(self, sample, timestep, encoder_hidden_states):
            return self.unet(sample, 500.0 if timestep is None else timestep, encoder_hidden_states)

    trace, expected = run(Timeless(), layout, "gg---g-g", moment=moment, step=step)
    np.testing.assert_allclose(trace.magnitudes, expected, rtol=1e-5)


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("layout", [*BATCHED, *TWO_CALLS])
def test_guidance_that_begins_late_is_missing_before(unet, layout, samples):
    trace, expected = run(unet, layout, "--gg", samples=samples)
    np.testing.assert_allclose(trace.magnitudes, expected, rtol=1e-5)


@pytest.mark.parametrize("layout", [*BATCHED, *TWO_CALLS])
@pytest.mark.parametrize("samples", [1, 2, 3])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_run_without_guidance_has_no_magnitude_and_says_why(unet, layout, samples, steps):
    """An even batch cannot be told from two halves before the device is read; then it can."""
    trace, _ = run(unet, layout, "-" * steps, samples=samples)
    with pytest.raises((NoGuidanceError, GuidanceLayoutError), match=r"uidance may be off.*scale (above )?1|scale above 1"):
        _ = trace.magnitudes


def test_an_unguided_run_of_one_sample_is_not_interrupted(unet, layout):
    trace, _ = run(unet, layout, "---", samples=1)
    assert len(trace) == 3
    assert not trace.has_guidance.any()


# ---- layouts that do not fit


@pytest.mark.parametrize("declared", BATCHED)
@pytest.mark.parametrize("samples", [1, 2, 3])
def test_two_calls_declared_as_a_batch_are_refused(unet, declared, samples):
    with memhook.watch(unet, adapter=ModuleAdapter(unet, layout=declared)) as trace:
        sample(unet, samples=samples, layout="two_calls_cond_first")
    with pytest.raises((NoGuidanceError, GuidanceLayoutError), match=r"two calls|different noisy samples"):
        _ = trace.magnitudes


@pytest.mark.parametrize("declared", TWO_CALLS)
def test_a_batch_declared_as_two_calls_is_refused(unet, declared):
    with memhook.watch(unet, adapter=ModuleAdapter(unet, layout=declared)) as trace:
        sample(unet, layout="uncond_first")
    with pytest.raises(NoGuidanceError, match=rf"{declared}.*batches both halves.*uncond_first"):
        _ = trace.magnitudes


@pytest.mark.parametrize("step", [None, "in place"])
def test_consecutive_evaluations_are_never_taken_for_a_pair(unet, step):
    """A host whose timesteps stand nowhere and that passes a new tensor to every call gives no hint; the samples differ all the same."""

    class Timeless(nn.Module):
        def forward(self, sample, encoder_hidden_states):
            return unet(sample, 500.0, encoder_hidden_states)

    model = Timeless()
    x, cond = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 6)
    with memhook.watch(model, adapter=ModuleAdapter(model, layout="two_calls_cond_first")) as trace, torch.no_grad():
        for _ in range(4):
            c = model(x if step else x.clone(), encoder_hidden_states=cond)
            x = x.sub_(c) if step else x - c
    with pytest.raises(GuidanceLayoutError, match="different noisy samples"):
        _ = trace.magnitudes


def test_a_wrong_layout_is_refused_at_once_where_evaluations_are_wanted(unet):
    with pytest.raises(GuidanceLayoutError, match=r"2 samples were made from different noisy samples.*'uncond_first'"):
        memhook.probe(unet, lambda: sample(unet, samples=4, layout="two_calls_cond_first"), adapter=ModuleAdapter(unet, layout="uncond_first"))


@pytest.mark.parametrize("keep", ["scalars", "calls"])
@pytest.mark.parametrize("layout", BATCHED)
def test_a_guided_run_of_half_as_many_samples_is_not_taken_for_an_unguided_one(unet, layout, keep):
    def run():
        with memhook.watch(unet, adapter=ModuleAdapter(unet, layout=layout), keep=keep) as trace:
            sample(unet, samples=4, layout=layout)
            sample(unet, samples=2, layout=layout)
        return trace.magnitudes

    with pytest.raises(GuidanceLayoutError, match=r"batch of 4 rows.*4 samples without guidance.*guided run of 2 samples.*blocks of their own"):
        run()


@pytest.mark.parametrize(("first", "second"), [(3, 2), (2, 3), (1, 3), (2, 5), (2, 4)])
def test_runs_with_other_numbers_of_samples(unet, layout, first, second, watched):
    with memhook.watch(unet, adapter=ModuleAdapter(unet, layout=layout)) as trace:
        sample(unet, samples=first, steps=2, layout=layout)
        sample(unet, samples=second, steps=3, layout=layout)
    runs = trace.runs
    assert [run.magnitudes.shape for run in runs] == [(2, first), (3, second)]
    np.testing.assert_array_equal(runs[1].magnitudes, watched(unet, layout, samples=second, steps=3).magnitudes)


def test_a_run_that_broke_off_between_two_calls_does_not_shift_the_next(unet, watched):
    """The retry's calls are paired with each other, not with the leftover."""
    for layout in TWO_CALLS:
        with memhook.watch(unet, adapter=ModuleAdapter(unet, layout=layout)) as trace:
            with torch.no_grad():
                unet(torch.randn(2, 4, 8, 8), 500.0, torch.randn(2, 5, 6))
            sample(unet, layout=layout)
        np.testing.assert_array_equal(trace.magnitudes[1:], watched(unet, layout).magnitudes)
        assert np.isnan(trace.magnitudes[0]).all()


# ---- forms of calls


class Wrapped(nn.Module):
    """A denoiser with another form of calls or output."""

    def __init__(self, call, give=lambda output: output):
        super().__init__()
        self.unet, self.call, self.give = tiny_unet(), call, give

    def forward(self, *args, **kwargs):
        return self.give(self.unet(*self.call(*args, **kwargs)))


class Output:
    def __init__(self, sample):
        self.sample = sample


GIVES = {
    "tensor": (lambda output: output, lambda found: found),
    "tuple": (lambda output: (output, "more"), lambda found: found[0]),
    "list": (lambda output: [output], lambda found: found[0]),
    "object": (Output, lambda found: found.sample),
    "dict": (lambda output: {"sample": output}, lambda found: found["sample"]),
}


@pytest.mark.parametrize("form", GIVES)
def test_forms_of_output(layout, form):
    give, take = GIVES[form]
    model = Wrapped(lambda x, t, e: (x, t, e), give)
    seen = lambda x, t, e: take(model(x, t, e))  # noqa: E731
    x, cond, uncond = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 6), torch.randn(2, 5, 6)
    with memhook.watch(model, adapter=ModuleAdapter(model, layout=layout), keep="calls") as trace, torch.no_grad():
        c, u = guided(seen, layout, x=x, cond=cond, uncond=uncond)
    np.testing.assert_allclose(trace.magnitudes[0], (c - u).flatten(1).norm(dim=1), rtol=1e-5)
    torch.testing.assert_close(trace.evaluations[0].replay(cond).detach(), trace.evaluations[0].pred_cond, rtol=1e-4, atol=1e-5)


def test_an_output_without_a_prediction_is_refused():
    model = Wrapped(lambda x, t, e: (x, t, e), lambda output: "nothing")
    with (
        memhook.watch(model, adapter=ModuleAdapter(model, layout="cond_first")),
        pytest.raises(GuidanceLayoutError, match="returned a str; expected a tensor"),
    ):
        model(torch.randn(2, 4, 8, 8), 1.0, torch.randn(2, 5, 6))


CALLS = {
    "positions": (lambda x, t, e: (x, t, e), lambda x, t, e: ((x, t, e), {}), None),
    "keywords": (
        lambda *, sample, timestep, encoder_hidden_states: (sample, timestep, encoder_hidden_states),
        lambda x, t, e: ((), {"sample": x, "timestep": t, "encoder_hidden_states": e}),
        None,
    ),
    "other keywords": (lambda x, t, *, context: (x, t, context), lambda x, t, e: ((x, t), {"context": e}), None),
    "a keyword of its own": (lambda x, t, *, words: (x, t, words), lambda x, t, e: ((x, t), {"words": e}), "words"),
    "a position of its own": (lambda x, t, mask, e: (x, t, e), lambda x, t, e: ((x, t, None, e), {}), 3),
    "the last position": (lambda x, t, mask, e: (x, t, e), lambda x, t, e: ((x, t, None, e), {}), -1),
    "nested": (lambda x, t, *, given: (x, t, given["text"][0]), lambda x, t, e: ((x, t), {"given": {"text": [e], "size": 8}}), ("given", "text", 0)),
}


@pytest.mark.parametrize("form", CALLS)
def test_forms_of_calls(layout, form):
    call, make, embedding = CALLS[form]
    model = Wrapped(call)

    def seen(x, t, e):
        args, kwargs = make(x, t, e)
        return model(*args, **kwargs)

    x, cond, uncond = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 6), torch.randn(2, 5, 6)
    with memhook.watch(model, adapter=ModuleAdapter(model, layout=layout, embedding=embedding), keep="calls") as trace, torch.no_grad():
        guided(seen, layout, x=x, timestep=7.0, cond=cond, uncond=uncond)
    (evaluation,) = trace.evaluations
    assert torch.equal(evaluation.embedding, cond)
    assert trace.timesteps.tolist() == [7.0]
    np.testing.assert_allclose(evaluation.objective(cond).detach(), trace.magnitudes[0], rtol=1e-4)
    torch.testing.assert_close(evaluation.replay(uncond).detach(), evaluation.pred_uncond, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("embedding", "message"),
    [("words", r"at \['words'\], where this call has a NoneType"), (1, r"at \[1\], where this call has a float"), (("a", 0), r"\['a'\]\[0\]")],
)
def test_an_embedding_that_is_not_where_it_was_declared(unet, layout, embedding, message):
    x, e = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 6)
    with (
        memhook.watch(unet, adapter=ModuleAdapter(unet, layout=layout, embedding=embedding)),
        pytest.raises(GuidanceLayoutError, match=f"{message}.*expected a tensor of .* rows.*2 positional.*encoder_hidden_states"),
    ):
        unet(x, 1.0, encoder_hidden_states=e)


def test_an_embedding_that_was_not_found_leaves_the_numbers(layout):
    model = Wrapped(lambda x, t, *, words: (x, t, words))
    seen = lambda x, t, e: model(x, t, words=e)  # noqa: E731
    x, cond, uncond = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 6), torch.randn(2, 5, 6)
    with memhook.watch(model, adapter=ModuleAdapter(model, layout=layout), keep="calls") as trace, torch.no_grad():
        guided(seen, layout, x=x, cond=cond, uncond=uncond)
    assert np.isfinite(trace.magnitudes).all()
    assert trace.groups.tolist() == [0, 1]
    with pytest.raises(memhook.ReplayError, match=r"no text embedding.*ModuleAdapter"):
        trace.evaluations[0].objective(cond)


def test_learned_variance_is_no_part_of_the_prediction(layout, watched):
    unet = tiny_unet(learned_variance=True)
    trace = watched(unet, layout, keep="calls")
    assert trace.shape == (4, 8, 8)
    plain = nn.Module()
    plain.forward = lambda *args: unet(*args)[:, :4]
    with memhook.watch(plain, adapter=ModuleAdapter(plain, layout=layout)) as expected:
        sample_like(plain, unet, layout)
    np.testing.assert_array_equal(trace.magnitudes, expected.magnitudes)
    evaluation = trace.evaluations[0]
    np.testing.assert_allclose(evaluation.objective(evaluation.embedding).detach(), trace.magnitudes[0], rtol=1e-4)


def sample_like(module, unet, layout):
    """Sample a module that has no parameters of its own, as if it were ``unet``."""
    module.register_parameter("dtype", nn.Parameter(torch.zeros(1, dtype=next(unet.parameters()).dtype)))
    return sample(module, layout=layout)


# ---- which samples belong to one prompt


@given(st.lists(st.integers(0, 2), min_size=1, max_size=6), st.sampled_from([*BATCHED, *TWO_CALLS]))
def test_samples_of_one_prompt_are_one_group(prompts, layout):
    unet, words = tiny_unet(), torch.randn(3, 5, 6)
    with memhook.watch(unet, adapter=ModuleAdapter(unet, layout=layout)) as trace:
        sample(unet, steps=2, layout=layout, cond=words[prompts], uncond=torch.zeros(len(prompts), 5, 6))
    order = list(dict.fromkeys(prompts))
    assert trace.groups.tolist() == [order.index(prompt) for prompt in prompts]


def test_groups_of_a_later_run_are_its_own(unet):
    """A host that takes its batches from one big tensor of embeddings gives them at other places of one memory."""
    words = torch.randn(4, 5, 6)
    words[1] = words[0]
    zeros = torch.zeros(4, 5, 6)
    for layout in (*BATCHED, *TWO_CALLS):
        with memhook.watch(unet, adapter=ModuleAdapter(unet, layout=layout)) as trace:
            for rows in (slice(0, 2), slice(2, 4)):
                sample(unet, steps=2, layout=layout, cond=words[rows], uncond=zeros[rows])
        assert [run.groups.tolist() for run in trace.runs] == [[0, 0], [0, 1]]


def test_groups_of_a_host_that_reuses_one_buffer(unet):
    """Both embeddings go through one tensor; it is read when the call is made."""
    cond, uncond, x = torch.randn(2, 5, 6), torch.zeros(2, 5, 6), torch.randn(2, 4, 8, 8)
    buffer = torch.empty(2, 5, 6)
    for layout, order in (("two_calls_cond_first", (cond, uncond)), ("two_calls_uncond_first", (uncond, cond))):
        with memhook.watch(unet, adapter=ModuleAdapter(unet, layout=layout), keep="calls") as trace, torch.no_grad():
            for embedding in order:
                unet(x, 1.0, buffer.copy_(embedding))
        assert trace.groups.tolist() == [0, 1]
        assert torch.equal(trace.evaluations[0].embedding, cond)


# ---- wrong settings


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "both"}, "layout is 'both'; expected one of uncond_first, cond_first, two_calls_uncond_first, two_calls_cond_first"),
        ({"layout": "uncond_first", "space": "noise"}, "space is 'noise'; expected one of eps, v, x0, flow"),
    ],
)
def test_wrong_settings_are_named(unet, options, message):
    with pytest.raises(MemhookError, match=message):
        ModuleAdapter(unet, **options)


def test_what_is_no_module_is_refused():
    with pytest.raises(MemhookError, match=r"the denoiser is a str; expected the torch\.nn\.Module"):
        ModuleAdapter("unet", layout="uncond_first")


def test_data_parallel_is_refused(unet):
    with pytest.raises(MemhookError, match=r"DataParallel.*other threads.*module\.module"):
        ModuleAdapter(nn.DataParallel(unet), layout="uncond_first")


def test_a_module_that_is_gone_is_refused():
    adapter = ModuleAdapter(tiny_unet(), layout="uncond_first")
    with pytest.raises(MemhookError, match="deleted before it was watched"), memhook.watch(adapter):
        pass


def test_the_space_is_that_declared(unet):
    with memhook.watch(unet, adapter=ModuleAdapter(unet, layout="uncond_first", space="v"), keep="calls") as trace:
        sample(unet)
    assert trace.space == trace.evaluations[0].space == "v"
