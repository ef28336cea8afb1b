"""A hook sees every call inside its block, and leaves nothing behind."""

import contextlib
import copy
import copyreg
import gc
import io
import itertools
import pickle
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from memhook.adapting.hooks import hook_arguments, hook_calls

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
    import weakref

    module = Doubling()
    reference = weakref.ref(module)
    with hook_calls(module, lambda *call: None):
        del module
        gc.collect()
        assert reference() is None


class Holder:
    """Something that a reference cycle goes through."""


def abandoned(module, on_call, hooks=(hook_calls,)):
    """Blocks around ``module`` that only the collector can end, since they and the module are in one reference cycle."""
    holder = Holder()
    holder.me, holder.module = holder, module
    holder.blocks = [hook(module, on_call) for hook in hooks]
    for block in holder.blocks:
        block.__enter__()


def test_blocks_that_the_collector_ends_leave_nothing():
    module, seen = Doubling(), []
    module.register_forward_hook(lambda *call: None)
    before = tables(module)
    for _ in range(20):
        abandoned(module, lambda *call: seen.append(call), [hook_calls, lambda *_: hook_arguments(module, lambda *given: given)])
    gc.collect()
    assert tables(module) == before
    module(torch.ones(1))
    assert not seen


def test_the_collector_may_end_a_block_after_its_module():
    """torch's handle refers to the tables weakly, and removes nothing once the collector has cleared those references."""
    tables_left = []
    for _ in range(20):
        module = Doubling()
        tables_left.append(module._forward_hooks)
        module.me = module
        abandoned(module, lambda *call: None)
        del module
    gc.collect()
    assert tables_left == [{}] * 20


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="collects between instructions only")
def test_the_collector_may_end_a_block_while_torch_copies_the_hooks():
    """Up to Python 3.11 it runs in the middle of that, and a table that changes there would end the call with an error."""
    module, threshold = Doubling(), gc.get_threshold()
    for _ in range(2000):  # torch's copy makes as many objects as there are hooks
        module.register_forward_hook(nothing)
    before = dict(module._forward_hooks)
    try:
        for _ in range(20):
            abandoned(module, nothing)
            gc.set_threshold(500, 1, 1)
            assert module(torch.ones(1)).tolist() == [2]
            gc.set_threshold(*threshold)
            module(torch.ones(1))
    finally:
        gc.set_threshold(*threshold)
    gc.collect()
    assert dict(module._forward_hooks) == before


def nothing(*_):
    """Picklable, for hooks that copies keep."""


def pickled(module, protocol=None):
    return pickle.loads(pickle.dumps(module, protocol=protocol))  # noqa: S301 -- its own


def saved(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": pickled,
    "protocol 0": lambda module: pickled(module, 0),
    "torch.save": saved,
    "a deep copy of a copy": lambda module: copy.deepcopy(copy.copy(module)),
}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_copies_are_made_without_the_hook(copied):
    module, seen = nn.Linear(2, 2), []
    foreign = module.register_forward_hook(nothing, with_kwargs=True)
    whole, before = nn.Sequential(module, nn.Tanh()), tables(module)
    with hook_calls(module, lambda *call: seen.append(call)), hook_arguments(module, lambda *given: given):
        inside = tables(module)
        copies = [copied(module), copied(whole)[0]]
        assert tables(module) == inside
        for other in copies:
            other(torch.ones(1, 2))
            assert tables(other) == before
            assert torch.equal(other.weight, module.weight)
        assert not seen
        module(torch.ones(1, 2))
        assert len(seen) == 1
    foreign.remove()
    assert copies[0]._forward_hooks
    assert type(module) not in copyreg.dispatch_table


def test_a_shallow_copy_is_clean_when_the_module_is():
    module = nn.Linear(2, 2)
    with hook_calls(module, nothing):
        other = copy.copy(module)
        assert other._forward_hooks is module._forward_hooks
    assert not other._forward_hooks


def test_a_traced_module_that_copies_itself_in_its_own_way_is_not_seen():
    module, seen = torch.fx.symbolic_trace(nn.Sequential(nn.Tanh())), []
    with hook_calls(module, lambda *call: seen.append(call)):
        other = copy.deepcopy(module)
        other(torch.ones(1))
        assert not seen
    other(torch.ones(1))
    assert not other._forward_hooks


def test_blocks_in_many_threads_share_one_hook():
    module = Doubling()
    with contextlib.ExitStack() as stack:
        for _ in range(5):
            stack.enter_context(hook_calls(module, nothing))
            assert len(module._forward_hooks) == 1


@pytest.mark.parametrize("at", range(1, 300, 3))
def test_an_interruption_at_any_moment_leaves_nothing(at):
    """Of entering and of leaving; a trace function stands for the signal."""
    module = Doubling()
    before, count = tables(module), itertools.count(1)

    def interrupt(frame, event, _):
        if event in ("call", "line") and "memhook" in frame.f_code.co_filename and next(count) == at:
            raise Interruption
        return interrupt

    def run():
        with hook_calls(module, nothing):
            module(torch.ones(1))

    previous = sys.gettrace()
    sys.settrace(interrupt)
    try:
        run()
    except Interruption:
        pass
    finally:
        sys.settrace(previous)
    assert tables(module) == before
    assert type(module) not in copyreg.dispatch_table
    assert torch.is_grad_enabled()
