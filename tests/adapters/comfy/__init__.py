"""A stand-in for the parts of ComfyUI that the adapter and the nodes use: the same calls in the same order, with a tiny network.

Written from the outside view of ComfyUI 0.3.64: what its functions are called, given and return. `tests.adapters.comfy.server.install`
makes it importable under ComfyUI's names.
"""

from tests.adapters.comfy.guiders import BasicGuider, CFGGuider, DualGuider, PerpNegGuider
from tests.adapters.comfy.model import ModelPatcher, make_patcher
from tests.adapters.comfy.prompts import WORDS, encode, with_area, with_mask, with_range
from tests.adapters.comfy.samplers import SAMPLERS, make_sampler

__all__ = [
    "SAMPLERS",
    "WORDS",
    "BasicGuider",
    "CFGGuider",
    "DualGuider",
    "ModelPatcher",
    "PerpNegGuider",
    "encode",
    "make_patcher",
    "make_sampler",
    "with_area",
    "with_mask",
    "with_range",
]
