"""Watches in several threads and tasks: each sees its own calls, and only those."""

import asyncio
import random
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

import memhook
from memhook import ModuleAdapter, NoGuidanceError
from memhook.testing import sample, tiny_unet


def run(unet, seed, layout="uncond_first", *, keep="scalars", ready=None):
    """One watched run; ``ready`` is waited for once the watch is on."""
    with memhook.watch(unet, adapter=ModuleAdapter(unet, layout=layout), keep=keep) as trace:
        if ready is not None:
            ready.wait(timeout=60)
        output = sample(unet, steps=3, samples=1 + seed % 3, seed=seed, layout=layout)
    return trace, output


def test_two_watches_on_one_module_see_only_their_own_calls(unet, layout):
    barrier = threading.Barrier(2)
    with ThreadPoolExecutor(2) as pool:
        traces = [trace for trace, _ in pool.map(lambda seed: run(unet, seed, layout, ready=barrier), (1, 2))]
    for seed, trace in zip((1, 2), traces, strict=True):
        np.testing.assert_array_equal(trace.magnitudes, run(unet, seed, layout)[0].magnitudes)


CALLS = 200  # a thread


class Light(torch.nn.Module):
    """A denoiser that is cheap enough to be called thousands of times."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.linspace(-1, 1, 6))

    def forward(self, sample, timestep, encoder_hidden_states):
        pull = torch.tanh(encoder_hidden_states @ self.weight).sum(1)
        return torch.sin(sample + pull[:, None, None, None] + timestep)


def two_hundred_calls(unet, seed, ready=None):
    """Watched runs that make `CALLS` calls of the denoiser in all, of different lengths and layouts."""
    choose, traces, made = random.Random(seed), [], 0
    if ready is not None:
        ready.wait(timeout=120)
    while made < CALLS:
        layout = choose.choice(("uncond_first", "cond_first", "two_calls_uncond_first", "two_calls_cond_first"))
        each = 2 if layout.startswith("two_calls") else 1
        steps = min(choose.randint(1, 30), max((CALLS - made) // each, 1))
        samples, keep = choose.randint(1, 3), choose.choice(("scalars", "calls"))
        with memhook.watch(unet, adapter=ModuleAdapter(unet, layout=layout), keep=keep) as trace:
            output = sample(unet, steps=steps, samples=samples, seed=choose.randrange(10**6), layout=layout)
        traces.append((trace.magnitudes, trace.groups, trace.timesteps, output.numpy()))
        made += steps * each
    return traces, made


def test_thirty_two_threads_of_two_hundred_calls_equal_a_serial_run():
    """Number for number, though the threads take turns fifty times as often as usual and watches come and go under each other's calls."""
    unet = Light()
    barrier, patience = threading.Barrier(32), sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    try:
        with ThreadPoolExecutor(32) as pool:
            parallel = list(pool.map(lambda seed: two_hundred_calls(unet, seed, barrier), range(32)))
    finally:
        sys.setswitchinterval(patience)
    assert not unet._forward_hooks
    assert not unet._forward_hooks_with_kwargs
    for seed, (found, made) in enumerate(parallel):
        expected, _ = two_hundred_calls(unet, seed)
        assert made >= CALLS
        assert len(found) == len(expected)
        for traces in zip(found, expected, strict=True):
            for one, other in zip(*traces, strict=True):
                np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("keep", ["scalars", "calls"])
def test_many_threads_equal_a_serial_run_number_for_number(keep):
    """Watches come and go on one module while others run it, in ten threads."""
    unet, layouts = tiny_unet(), ("uncond_first", "two_calls_cond_first")
    jobs = [(seed, layouts[seed % 2]) for seed in range(40)]
    barrier = threading.Barrier(10)
    with ThreadPoolExecutor(10, initializer=barrier.wait) as pool:
        parallel = list(pool.map(lambda job: run(unet, *job, keep=keep), jobs))
    for job, (trace, output) in zip(jobs, parallel, strict=True):
        expected, undisturbed = run(unet, *job, keep=keep)
        np.testing.assert_array_equal(trace.magnitudes, expected.magnitudes)
        np.testing.assert_array_equal(trace.groups, expected.groups)
        np.testing.assert_array_equal(output, undisturbed)
    assert not unet._forward_hooks
    assert not unet._forward_hooks_with_kwargs


def test_a_run_in_a_thread_of_its_own_is_not_seen_and_the_error_says_so(unet):
    with memhook.watch(unet, adapter=ModuleAdapter(unet, layout="uncond_first")) as trace:
        thread = threading.Thread(target=sample, args=(unet,))
        thread.start()
        thread.join()
    with pytest.raises(NoGuidanceError, match="another thread"):
        _ = trace.magnitudes


def test_a_thread_that_inherits_the_context_is_part_of_the_block(unet):
    """`asyncio.to_thread` carries the context along, as a server's request handler expects."""

    async def request():
        with memhook.watch(unet, adapter=ModuleAdapter(unet, layout="uncond_first")) as trace:
            await asyncio.to_thread(sample, unet, steps=2)
        return trace

    assert len(asyncio.run(request())) == 2


def test_tasks_see_only_their_own_calls(unet):
    async def request(seed):
        with memhook.watch(unet, adapter=ModuleAdapter(unet, layout="uncond_first")) as trace:
            for _ in range(2):
                await asyncio.sleep(0)  # gives way to the other task, inside the block
                sample(unet, steps=2, seed=seed)
        return trace

    async def both():
        return await asyncio.gather(request(1), request(2))

    for seed, trace in zip((1, 2), asyncio.run(both()), strict=True):
        alone, _ = run(unet, seed)
        assert [len(part) for part in trace.runs] == [2, 2]
        assert trace.magnitudes.shape == (4, 2)
        np.testing.assert_array_equal(trace.runs[0].magnitudes, trace.runs[1].magnitudes)
        assert alone is not trace


def test_replays_in_several_threads_agree_and_restore_the_parameters(unet):
    trace, _ = run(unet, 1, keep="calls")
    embeddings = [evaluation.embedding + shift for shift in (0.0, 0.5, 1.0) for evaluation in trace.evaluations]

    def objective(index):
        return trace.evaluations[index % 3].objective(embeddings[index]).detach().numpy()

    serial = [objective(index) for index in range(9)]
    with ThreadPoolExecutor(8) as pool:
        parallel = list(pool.map(objective, list(range(9)) * 3))
    for index, values in enumerate(parallel):
        np.testing.assert_array_equal(values, serial[index % 9])
    assert all(parameter.requires_grad and parameter.grad is None for parameter in unet.parameters())
