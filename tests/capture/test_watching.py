"""watch and probe: what is recorded, and that watching changes nothing."""

import contextlib
import gc
import random
import sys
import types
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import memhook
from memhook import MemhookError, MemorizationDetectedError, ModuleAdapter, NoAdapterError
from memhook.testing import sample, tiny_unet

LAYOUTS = ("uncond_first", "cond_first", "two_calls_uncond_first", "two_calls_cond_first")


class Interruption(BaseException):
    pass


TABLES = ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks", "_backward_hooks")


def tables(unet):
    """The hook tables of a model and all its parts."""
    return {(name, table): dict(getattr(part, table)) for name, part in unet.named_modules() for table in TABLES}


def watch(unet, layout="uncond_first", **options):
    return memhook.watch(unet, adapter=ModuleAdapter(unet, layout=layout), **options)


# ---- what is recorded


def test_magnitudes_are_those_of_the_two_predictions(unet, layout):
    """The trace against the same sampler written out, with the norm taken of its own predictions."""
    cond, uncond, x = torch.randn(3, 5, 6), torch.randn(3, 5, 6), torch.randn(3, 4, 8, 8)
    with watch(unet, layout) as trace:
        sample(unet, steps=5, layout=layout, cond=cond, uncond=uncond, noise=x, guidance_scale=4.0)
    expected = []
    with torch.no_grad():
        for timestep in torch.linspace(999, 1, 5).round():
            c, u = unet(x, timestep, cond), unet(x, timestep, uncond)
            expected.append((c - u).double().flatten(1).norm(dim=1))
            x = x - (u + 4.0 * (c - u)) / 5
    np.testing.assert_allclose(trace.magnitudes, torch.stack(expected), rtol=1e-4)
    assert trace.magnitudes.dtype == np.float32
    assert trace.timesteps.tolist() == [999, 750, 500, 250, 1]
    assert (trace.host, trace.space, trace.roles, trace.shape) == ("module", "eps", "declared", (4, 8, 8))


def test_the_layouts_agree(unet, watched):
    traces = [watched(unet, layout).magnitudes for layout in ("uncond_first", "cond_first", "two_calls_uncond_first", "two_calls_cond_first")]
    for magnitudes in traces[1:]:
        np.testing.assert_allclose(magnitudes, traces[0], rtol=1e-5)


def test_magnitudes_do_not_grow_with_the_guidance_scale(unet, watched):
    """At the first evaluation nothing was guided yet, so the scale cannot matter."""
    first = [watched(unet, guidance_scale=scale).magnitudes[0].tolist() for scale in (1.5, 7.5, 30.0)]
    assert first[0] == first[1] == first[2]


def test_the_trace_fills_while_the_run_goes_on(unet):
    lengths = []
    with watch(unet, on_evaluation=lambda _: lengths.append(len(trace))) as trace:
        sample(unet, steps=3)
    assert lengths == [1, 2, 3]


def test_on_evaluation_sees_both_predictions(unet, layout):
    seen = []
    with watch(unet, layout, on_evaluation=seen.append) as trace:
        sample(unet, steps=3, layout=layout)
    found = torch.stack([memhook.magnitude(evaluation.pred_cond, evaluation.pred_uncond) for evaluation in seen])
    np.testing.assert_array_equal(found, trace.magnitudes)


# ---- watching changes nothing


@pytest.mark.parametrize("keep", ["scalars", "calls"])
def test_outputs_are_identical_to_the_last_bit(unet, layout, keep):
    plain = sample(unet, layout=layout)
    with watch(unet, layout, keep=keep):
        watched = sample(unet, layout=layout)
    assert torch.equal(plain, watched)


def test_the_global_random_state_is_left_alone(unet, layout):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with watch(unet, layout, keep="calls") as trace:
        sample(unet, layout=layout)
        trace.evaluations[0].objective(trace.evaluations[0].embedding)
    assert torch.equal(torch.rand(3), expected)


def test_no_hook_is_left_after_a_run(unet, layout):
    before = tables(unet)
    with watch(unet, layout):
        assert tables(unet) != before
        sample(unet, layout=layout)
    assert tables(unet) == before


ENDS = (None, ValueError, MemhookError, KeyboardInterrupt, SystemExit, Interruption)


@given(st.lists(st.tuples(st.sampled_from(("watch", "calls", "probe", "run", "stop")), st.sampled_from(ENDS)), max_size=6))
def test_no_hook_is_left_whatever_nests_and_however_it_ends(steps):
    """Each step opens a watch around the following ones, or runs the sampler; an exception may end all blocks opened so far."""
    unet = tiny_unet()
    before = tables(unet)

    def stop(_):
        raise Interruption

    def follow(steps):
        if not steps:
            return
        (kind, end), rest = steps[0], steps[1:]
        if kind == "run":
            sample(unet, steps=1)
            follow(rest)
        elif kind == "probe":
            memhook.probe(unet, lambda: sample(unet, steps=2), adapter=ModuleAdapter(unet, layout="uncond_first"))
            follow(rest)
        else:
            inside = tables(unet)
            try:
                with watch(unet, keep="calls" if kind == "calls" else "scalars", on_evaluation=stop if kind == "stop" else None):
                    follow(rest)
                    if end is not None:
                        raise end("planned")
            finally:
                assert tables(unet) == inside

    with contextlib.suppress(*filter(None, ENDS)):
        follow(steps)
    assert tables(unet) == before
    with watch(unet) as trace:  # and no watch believes that it is still inside
        sample(unet, steps=2)
    assert len(trace) == 2


class Plain(torch.nn.Module):
    """The cheapest of denoisers, for tests that make thousands of calls."""

    def forward(self, sample, timestep, encoder_hidden_states):
        return sample + encoder_hidden_states.mean()


X, E = torch.zeros(2, 4), torch.zeros(2, 1, 1)


def test_tables_are_identical_after_a_thousand_random_sequences():
    """Watches and probes enter, nest, overlap, leave and raise in any order; other people's hooks come and go between them."""
    denoiser, choose, calls, entered = Plain(), random.Random(0), 0, 0
    denoiser.register_forward_hook(lambda *call: None)
    start = tables(denoiser)

    def call():
        nonlocal calls
        calls += 1
        denoiser(X, 1.0, E)

    def raising(_):
        raise choose.choice(ENDS[1:])("in a hook")

    for _ in range(1000):
        before, blocks, others = tables(denoiser), [], []
        with contextlib.suppress(*ENDS[1:]):
            for _ in range(choose.randint(1, 8)):
                action = choose.choice(("enter", "enter", "enter calls", "enter raising", "leave any", "call", "hook", "probe", "raise"))
                if action.startswith("enter"):
                    options = {"keep": "calls"} if action == "enter calls" else {"on_evaluation": raising} if action == "enter raising" else {}
                    blocks.append(watch(denoiser, choose.choice(LAYOUTS), **options))
                    blocks[-1].__enter__()
                    entered += 1
                elif action == "leave any" and blocks:
                    blocks.pop(choose.randrange(len(blocks))).__exit__(None, None, None)
                elif action == "hook":
                    others.append(denoiser.register_forward_pre_hook(lambda *call: None))
                elif action == "probe":
                    memhook.probe(denoiser, call, adapter=ModuleAdapter(denoiser, layout="uncond_first"))
                elif action == "call":
                    call()
                elif action == "raise":
                    raise choose.choice(ENDS[1:])("planned")
        error = sys.exc_info()
        for block in choose.sample(blocks, len(blocks)):
            with contextlib.suppress(*ENDS[1:]):
                block.__exit__(*error)
        for handle in others:
            handle.remove()
        assert tables(denoiser) == before == start
    assert entered > 1000
    assert calls > 300
    with watch(denoiser) as trace:
        call()
    assert len(trace) == 1


def test_ten_thousand_watches_leave_no_growth():
    """Neither in the module's tables, nor in what the collector knows, nor in memory."""
    denoiser = Plain()
    adapters = {layout: ModuleAdapter(denoiser, layout=layout) for layout in LAYOUTS}

    def cycles(count):
        for number in range(count):
            layout = LAYOUTS[number % len(LAYOUTS)]
            options = {"keep": "calls"} if number % 3 == 0 else {}
            with contextlib.suppress(Interruption), memhook.watch(denoiser, adapter=adapters[layout], **options):
                if number % 5 == 0:
                    denoiser(X, 1.0, E)
                    denoiser(X, 1.0, E)
                if number % 7 == 0:
                    raise Interruption

    def size():
        gc.collect()
        return len(gc.get_objects()), sys.getallocatedblocks()

    before = tables(denoiser)
    cycles(500)
    objects, blocks = size()
    cycles(10_000)
    more_objects, more_blocks = size()
    assert tables(denoiser) == before
    assert more_objects - objects < 100
    assert more_blocks - blocks < 1000


def test_nested_watches_see_the_same(unet, layout):
    with watch(unet, layout) as outer:
        sample(unet, steps=2, layout=layout)
        with watch(unet, layout, keep="calls") as inner:
            sample(unet, steps=3, layout=layout)
    assert outer.magnitudes.shape == (5, 2)
    np.testing.assert_array_equal(outer.magnitudes[2:], inner.magnitudes)


def test_one_adapter_serves_several_watches(unet):
    adapter = ModuleAdapter(unet, layout="two_calls_cond_first")
    with memhook.watch(unet, adapter=adapter) as outer, memhook.watch(unet, adapter=adapter) as inner:
        sample(unet, layout="two_calls_cond_first")
    np.testing.assert_array_equal(outer.magnitudes, inner.magnitudes)


def test_calls_outside_the_block_are_not_recorded(unet):
    sample(unet)
    with watch(unet) as trace:
        sample(unet, steps=2)
    sample(unet)
    assert len(trace) == 2


def test_a_watch_may_be_entered_and_left_in_different_contexts(unet):
    """As by a fixture, or a generator that an event loop drives."""
    import contextvars

    manager = watch(unet)
    trace = contextvars.copy_context().run(manager.__enter__)
    sample(unet, steps=1)  # this context never entered the block
    contextvars.copy_context().run(manager.__exit__, None, None, None)
    assert len(trace) == 0
    assert not unet._forward_hooks


# ---- what is kept


def kept_storage(root, *, largest):
    """The tensors that can be reached from an object and have more elements than ``largest``."""
    seen, found, todo = set(), [], [root]
    while todo:
        item = todo.pop()
        if id(item) in seen or isinstance(item, (type, torch.nn.Module)) or type(item).__name__ == "module":
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            if item.untyped_storage().nbytes() > largest * item.element_size():
                found.append(item)
            continue
        if isinstance(item, types.FunctionType):
            todo += [item.__closure__, item.__defaults__]
        elif isinstance(item, (dict, list, tuple, set, types.CellType, types.MethodType)) or hasattr(item, "__dict__"):
            todo += gc.get_referents(item)
    return found


def test_the_default_watch_keeps_numbers_only(unet, layout, watched):
    trace = watched(unet, layout, samples=3)
    assert not kept_storage(trace, largest=2 * 3)
    assert kept_storage(watched(unet, layout, samples=3, keep="calls"), largest=2 * 3)


def test_the_default_watch_lets_predictions_go_during_the_run(layout):
    """Weak references to the model's outputs: all but the ones that the sampler itself still holds are dead."""
    unet, outputs = tiny_unet(), []
    unet.register_forward_hook(lambda module, args, output: outputs.append(weakref.ref(output)))
    with watch(unet, layout):
        sample(unet, steps=4, layout=layout)
        gc.collect()
        assert len(outputs) in (4, 8)
        assert sum(output() is not None for output in outputs) == 0


def test_calls_are_kept_on_request(unet, layout, watched):
    trace = watched(unet, layout, keep="calls")
    for index, evaluation in enumerate(trace.evaluations):
        assert evaluation.embedding.shape == (2, 5, 6)
        np.testing.assert_array_equal(memhook.magnitude(evaluation.pred_cond, evaluation.pred_uncond), trace.magnitudes[index])


def test_evaluations_that_were_not_kept_say_so(unet, watched):
    with pytest.raises(MemhookError, match=r'kept only numbers.*keep="calls"'):
        _ = watched(unet).evaluations


def test_a_model_deleted_inside_the_block_is_freed(layout):
    unet = tiny_unet()
    reference = weakref.ref(unet)
    adapter = ModuleAdapter(unet, layout=layout)
    with memhook.watch(unet, adapter=adapter) as trace:
        sample(unet, layout=layout)
        del unet
        gc.collect()
        assert reference() is None
    assert trace.magnitudes.shape == (4, 2)
    with pytest.raises(MemhookError, match="deleted"):
        _ = trace.setting


def test_a_trace_does_not_keep_the_model_alive(watched, layout):
    unet = tiny_unet()
    trace = watched(unet, layout, keep="calls")
    reference = weakref.ref(unet)
    del unet
    gc.collect()
    assert reference() is None
    with pytest.raises(memhook.ReplayError, match="deleted"):
        trace.evaluations[0].objective(trace.evaluations[0].embedding)


# ---- stopping


def evidence():
    return memhook.Detection(np.ones(1), np.ones(1), np.ones(1, bool), np.zeros(1, bool), 0.01, 1.0, np.zeros(2, int), 100)


def test_stop_when_stops_with_its_evidence(unet, layout):
    found = evidence()
    before = tables(unet)
    stopped = pytest.raises(MemorizationDetectedError, match="stopped after 2 evaluations")
    with stopped as caught, watch(unet, layout, stop_when=lambda trace: found if len(trace) == 2 else None) as trace:
        sample(unet, steps=4, layout=layout)
    assert caught.value.trace is trace
    assert caught.value.detection is found
    assert len(trace) == 2
    assert tables(unet) == before


def test_stop_when_that_never_answers_lets_the_run_finish(unet):
    with watch(unet, stop_when=lambda trace: None) as trace:
        sample(unet, steps=4)
    assert len(trace) == 4


# ---- probe


def probe(unet, layout="uncond_first", *, steps=4, **options):
    calls = []
    unet.register_forward_pre_hook(lambda module, args: calls.append(args))
    run = lambda: sample(unet, steps=steps, layout=layout)  # noqa: E731
    return memhook.probe(unet, run, adapter=ModuleAdapter(unet, layout=layout), **options), len(calls)


@pytest.mark.parametrize("evaluations", [1, 2, 3])
def test_probe_runs_no_further_than_it_must(unet, layout, evaluations, watched):
    full = watched(unet, layout).magnitudes
    trace, calls = probe(unet, layout, evaluations=evaluations)
    np.testing.assert_array_equal(trace.magnitudes, full[:evaluations])
    assert calls == evaluations * (2 if layout.startswith("two_calls") else 1)
    assert len(trace.evaluations) == evaluations


def test_probe_of_a_shorter_run_gives_what_there_is(unet):
    trace, _ = probe(unet, steps=2, evaluations=5)
    assert len(trace) == 2


def test_probe_passes_hosts_that_catch_exceptions(unet):
    def run():
        for _ in range(3):
            with contextlib.suppress(Exception):
                sample(unet)

    trace = memhook.probe(unet, run, adapter=ModuleAdapter(unet, layout="uncond_first"))
    assert len(trace) == 1


def test_probe_lets_the_runs_own_exceptions_pass(unet):
    def run():
        raise ValueError("of the host")

    with pytest.raises(ValueError, match="of the host"):
        memhook.probe(unet, run, adapter=ModuleAdapter(unet, layout="uncond_first"))
    assert not unet._forward_hooks


def test_probe_of_an_unguided_run_ends_and_says_why(layout):
    unet = tiny_unet()
    trace = memhook.probe(unet, lambda: sample(unet, samples=1, guidance_scale=1.0), adapter=ModuleAdapter(unet, layout=layout))
    with pytest.raises(memhook.NoGuidanceError, match="scale above 1"):
        _ = trace.magnitudes


# ---- wrong settings


def test_a_wrong_keep_is_named(unet):
    with pytest.raises(MemhookError, match=r"keep is 'tensors'; expected \"scalars\" or \"calls\""), watch(unet, keep="tensors"):
        pass


@pytest.mark.parametrize("evaluations", [0, -1])
def test_probe_of_nothing_is_refused(unet, evaluations):
    with pytest.raises(MemhookError, match=f"evaluations is {evaluations}; expected 1 or more"):
        memhook.probe(unet, lambda: sample(unet), adapter=ModuleAdapter(unet, layout="uncond_first"), evaluations=evaluations)


def test_a_bare_module_needs_its_adapter(unet):
    with pytest.raises(NoAdapterError, match=r'TinyUNet.*ModuleAdapter\(module, layout="uncond_first"\)'), memhook.watch(unet):
        pass


def test_an_adapter_is_a_target(unet):
    with memhook.watch(ModuleAdapter(unet, layout="uncond_first")) as trace:
        sample(unet, steps=2)
    assert len(trace) == 2
