"""A hook sees every call inside its block, and leaves nothing behind."""

import contextlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from memhook.adapting.hooks import hook_calls

TABLES = ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks", "_backward_hooks")


def tables(module):
    return {name: dict(getattr(module, name)) for name in TABLES}


class Doubling(nn.Module):
    def forward(self, x, *, bias=0.0):
        return 2 * x + bias


def test_sees_arguments_and_output():
    module, seen = Doubling(), []
    with hook_calls(module, lambda *call: seen.append(call)):
        module(torch.ones(2), bias=1.0)
    ((called, args, kwargs, output),) = seen
    assert called is module
    assert args[0].tolist() == [1, 1]
    assert kwargs == {"bias": 1.0}
    assert output.tolist() == [3, 3]


def test_the_output_is_the_modules_own_object():
    module = nn.Identity()
    x = torch.ones(2, requires_grad=True)
    with hook_calls(module, lambda *call: "something"):
        assert module(x) is x


def test_runs_without_gradients_and_leaves_those_of_the_call():
    module, enabled = nn.Linear(2, 2), []
    with hook_calls(module, lambda *call: enabled.append(torch.is_grad_enabled())):
        assert module(torch.ones(1, 2)).requires_grad
    assert enabled == [False]


def test_calls_after_the_block_are_not_seen():
    module, seen = Doubling(), []
    with hook_calls(module, lambda *call: seen.append(call)):
        pass
    module(torch.ones(1))
    assert not seen


class Interruption(BaseException):
    pass


KINDS = (ValueError, RuntimeError, KeyboardInterrupt, SystemExit, GeneratorExit, Interruption)


@settings(max_examples=1000)
@given(st.recursive(st.just("call"), lambda inner: st.one_of(st.lists(inner, max_size=3), st.tuples(st.sampled_from(KINDS), inner))))
def test_tables_are_as_before_however_blocks_nest_and_end(plan):
    """A plan is a call, a block around plans, or a plan after which an exception ends all blocks around it."""
    module = Doubling()
    module.register_forward_hook(lambda *call: None)
    module.register_forward_hook(lambda *call: None, with_kwargs=True)
    before, seen = tables(module), []

    def follow(plan, depth):
        if plan == "call":
            seen.clear()
            module(torch.ones(1))
            assert len(seen) == depth
        elif isinstance(plan, tuple):
            follow(plan[1], depth)
            raise plan[0]
        else:
            inside = tables(module)
            with hook_calls(module, lambda *call: seen.append(call)):
                for part in plan:
                    follow(part, depth + 1)
            assert tables(module) == inside

    with contextlib.suppress(*KINDS):
        follow(plan, 0)
    assert tables(module) == before


def test_blocks_may_end_in_another_order_than_they_began():
    module, first, second = Doubling(), [], []
    before = tables(module)
    outer, inner = hook_calls(module, lambda *call: first.append(call)), hook_calls(module, lambda *call: second.append(call))
    outer.__enter__()
    inner.__enter__()
    outer.__exit__(None, None, None)
    module(torch.ones(1))
    inner.__exit__(None, None, None)
    assert (len(first), len(second)) == (0, 1)
    assert tables(module) == before


def test_an_exception_of_the_observer_comes_out_of_the_call():
    module = Doubling()

    def stop(*call):
        raise Interruption

    with pytest.raises(Interruption), hook_calls(module, stop):
        module(torch.ones(1))
    assert not module._forward_hooks


def test_a_failing_call_is_not_seen():
    module, seen = nn.Linear(2, 2), []
    with hook_calls(module, lambda *call: seen.append(call)), pytest.raises(RuntimeError):
        module(torch.ones(1, 3))
    assert not seen


def test_a_block_may_end_while_the_hooks_of_a_call_are_running():
    """torch copies the list of hooks before it runs them, so another thread can end a watch between two hooks of a call.

    The ended one is then called without keywords. Here a hook before it plays the other thread.
    """
    module, seen, block = Doubling(), [], contextlib.ExitStack()
    module.register_forward_hook(lambda *call: block.close())
    block.enter_context(hook_calls(module, lambda *call: seen.append(call)))
    assert module(torch.ones(1)).tolist() == [2]
    assert not seen
    assert len(module._forward_hooks) == 1


def test_the_block_does_not_keep_the_module_alive():
    import gc
    import weakref

    module = Doubling()
    reference = weakref.ref(module)
    with hook_calls(module, lambda *call: None):
        del module
        gc.collect()
        assert reference() is None
