"""Tiny random pipelines of every family, made in code, with the layout of their guidance as read in their source.

`families` gives them all; each says in its `layout` what the adapter has to find out by itself.
"""

from tests.adapters.zoo import (  # noqa: F401 -- they register their families
    corners,
    extras,
    forms,
    images,
    loops,
    modular,
    others,
    recent,
    steps,
    texts,
    transformers,
    videos,
)
from tests.adapters.zoo.family import FAMILIES, Family, Host, family

__all__ = ["FAMILIES", "Family", "Host", "family"]
