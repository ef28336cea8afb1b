"""An adapter whose hook has a name that memhook does not know."""

from memhook import hookimpl


@hookimpl
def memhook_adopt(target):
    return None
