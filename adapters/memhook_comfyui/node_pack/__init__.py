"""Memhook's nodes for ComfyUI: this folder (or a link to it) goes into ``custom_nodes``, and memhook into ComfyUI's Python."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

try:
    import memhook_comfyui
except ModuleNotFoundError as error:
    # A link into a checkout: what is not installed lies beside this folder.
    _adapters = Path(__file__).resolve().parents[2]
    if error.name != "memhook_comfyui" or not (_adapters.parent / "memhook" / "__init__.py").is_file():
        raise ModuleNotFoundError(
            f"the Memhook nodes need the package memhook, and ComfyUI's Python ({sys.executable}) cannot import {error.name}; install it there: "
            "python -m pip install <folder or wheel of memhook-diffusion>"
        ) from error
    sys.path += [str(_adapters), str(_adapters.parent)]
    import memhook_comfyui

from .attribute import AttributeTokens
from .calibrate import Calibrate, LoadCalibration
from .demo import DemoModel
from .guard import Guard
from .mitigate import Mitigate
from .report import Report
from .watch import Watch

NODE_CLASS_MAPPINGS: dict[str, Any] = {
    "MemhookWatch": Watch,
    "MemhookReport": Report,
    "MemhookAttributeTokens": AttributeTokens,
    "MemhookMitigate": Mitigate,
    "MemhookGuard": Guard,
    "MemhookCalibrate": Calibrate,
    "MemhookLoadCalibration": LoadCalibration,
    "MemhookDemoModel": DemoModel,
}

NODE_DISPLAY_NAME_MAPPINGS = {
    "MemhookWatch": "Memhook Watch",
    "MemhookReport": "Memhook Report",
    "MemhookAttributeTokens": "Memhook Attribute Tokens",
    "MemhookMitigate": "Memhook Mitigate",
    "MemhookGuard": "Memhook Guard",
    "MemhookCalibrate": "Memhook Calibrate",
    "MemhookLoadCalibration": "Memhook Load Calibration",
    "MemhookDemoModel": "Memhook Demo Model",
}

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "memhook_comfyui"]
