"""A call's arguments as they were when it was made, whatever the denoiser does to them."""

import pytest
import torch
from torch import nn

import memhook
from memhook.adapting.arguments import hook_calls_as_made
from memhook.testing.state import changes, snapshot


class Consuming(nn.Module):
    """Pops its residuals, and scales the sample and a table where they are."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 4)

    def forward(self, sample, timestep, embedding, residuals=(), options=None):
        added = sum(residuals.pop(0) for _ in range(len(residuals))) if residuals else 0
        scale = options.pop("scale").mul_(2) if options else 1
        sample.mul_(0.5)
        return (sample + self.layer(embedding.mean(1)) + added) * scale


def arguments(seed=0):
    generator = torch.Generator().manual_seed(seed)
    sample, embedding, residual = (torch.randn(*shape, generator=generator) for shape in ((2, 4), (4, 3, 6), (4, 4)))
    return torch.cat([sample, sample]), embedding, [residual, residual + 1], {"scale": torch.full((4, 1), 3.0)}


@pytest.fixture
def module():
    return Consuming()


def test_arguments_are_those_before_the_call(module):
    sample, embedding, residuals, options = arguments()
    seen = []
    with hook_calls_as_made(module, lambda _, args, kwargs, output: seen.append((args, kwargs)), keep=lambda: True):
        module(sample, 7, embedding, residuals=residuals, options=options)
    assert residuals == []  # the host's own are as the denoiser left them
    assert options == {}
    (args, kwargs), given = *seen, arguments()
    assert torch.equal(args[0], given[0])
    assert not torch.equal(sample, given[0])
    assert args[2] is embedding
    assert [torch.equal(*pair) for pair in zip(kwargs["residuals"], given[2], strict=True)] == [True, True]
    assert torch.equal(kwargs["options"]["scale"], given[3]["scale"])


def test_untouched_arguments_are_the_hosts_own():
    module, nested, seen = nn.Bilinear(2, 2, 1), {"first": [torch.ones(1, 2)]}, []
    module.forward = lambda nested, pair: nested["first"][0] + pair[0]
    pair = (torch.ones(1, 2),)
    with hook_calls_as_made(module, lambda _, args, kwargs, output: seen.append((args[0], kwargs["pair"])), keep=lambda: True):
        module(nested, pair=pair)
    assert seen[0][0] is nested
    assert seen[0][1] is pair


def test_a_call_that_fails_is_not_mixed_up_with_the_next(module):
    sample, embedding, residuals, _options = arguments()
    seen = []
    with hook_calls_as_made(module, lambda _, args, kwargs, output: seen.append(kwargs)):
        with pytest.raises(RuntimeError):
            module(sample, 7, embedding[..., :2], residuals=residuals)
        module(sample, 7, embedding, residuals=[torch.ones(4, 4)])
    assert torch.equal(seen[0]["residuals"][0], torch.ones(4, 4))
    assert len(seen[0]["residuals"]) == 1


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_replay_and_guard_of_a_denoiser_that_consumes_its_inputs(module, mode):
    adapter = memhook.ModuleAdapter(module, layout="uncond_first")

    def run():
        with mode():
            outputs = []
            for timestep in (9, 5, 1):
                sample, embedding, residuals, options = arguments()
                outputs.append(module(sample, timestep, embedding, residuals=residuals, options=options))
            return torch.stack(outputs)

    before, plain = snapshot(module), run()
    with memhook.watch(module, adapter=adapter, keep="calls") as trace:
        assert torch.equal(run(), plain)
    for evaluation in trace.evaluations:
        torch.testing.assert_close(evaluation.objective(evaluation.embedding), torch.from_numpy(trace.magnitudes[0]))
    target = float(0.95 * trace.magnitudes[0].max() + 0.05 * trace.magnitudes[0].min())
    with memhook.mitigate(module, target_magnitude=target, adapter=adapter, fixed_tokens=0) as report:
        changed = run()
    loud = int(trace.magnitudes[0].argmax())
    assert report.flagged.tolist() == [number == loud for number in range(2)]
    u, c = changed[0].chunk(2)
    assert float((c - u).norm(dim=1)[loud]) == pytest.approx(target, rel=0.05)
    assert torch.equal(changed[:, 3 - loud], plain[:, 3 - loud])
    assert changes(before, snapshot(module)) == []
