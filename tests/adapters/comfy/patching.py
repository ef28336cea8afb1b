"""Wrappers: functions around a function, in the order in which they were added."""


def wrappers_of(kind, model_options):
    tables = model_options.get("transformer_options", {}).get("wrappers", {}).get(kind, {})
    return [wrapper for wrappers in tables.values() for wrapper in wrappers]


class Executor:
    """What a wrapper is given: calling it goes on with the next wrapper, and at last with the function itself."""

    def __init__(self, original, owner, wrappers):
        self.original, self.class_obj, self.wrappers = original, owner, wrappers

    def __call__(self, *args, **kwargs):
        return run_wrapped(self.original, self.class_obj, self.wrappers, args, kwargs)


def run_wrapped(original, owner, wrappers, args, kwargs=None):
    if not wrappers:
        return original(*args, **(kwargs or {}))
    first, *others = wrappers
    return first(Executor(original, owner, others), *args, **(kwargs or {}))


def merged(tree):
    """Nested dicts and the lists in them, copied; everything else shared."""
    if isinstance(tree, dict):
        return {key: merged(value) for key, value in tree.items()}
    return list(tree) if isinstance(tree, list) else tree
