"""Names of a package that are imported when somebody first asks for them, so that the package itself costs nothing to import."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from pkgutil import iter_modules


def lazy_exports(package: str, names: Mapping[str, Iterable[str]]) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """The functions ``__getattr__`` and ``__dir__`` of a package (PEP 562); its submodules are attributes as well.

    They stand in the ``else`` of the package's ``if TYPE_CHECKING:``, which imports the same names for
    type checkers and editors; these would otherwise take every misspelt name for one that exists.

    Args:
        package: The package's ``__name__``.
        names: The public names, under the module that each is defined in.
    """
    homes = {name: module for module, defined in names.items() for name in defined}

    def submodules() -> set[str]:
        return {module.name for module in iter_modules(sys.modules[package].__path__) if not module.name.startswith("_")}

    def get(name: str) -> object:
        if name in homes:
            value = getattr(import_module(homes[name]), name)
        elif not name.startswith("_") and name in submodules():
            value = import_module(f"{package}.{name}")
        else:
            raise AttributeError(f"module {package!r} has no attribute {name!r}", name=name, obj=sys.modules[package])
        setattr(sys.modules[package], name, value)  # asked once
        return value

    def names_of() -> list[str]:
        return sorted({*vars(sys.modules[package]), *homes, *submodules()})

    return get, names_of
