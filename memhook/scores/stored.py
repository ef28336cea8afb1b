"""Reading the safetensors files that calibrations of every kind are saved in, which may come from anywhere."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memhook.errors import CalibrationError

if TYPE_CHECKING:
    import os

    import numpy as np

LARGEST_FILE = 256 * 2**20  # bytes; ten million prompts at one evaluation are 40 MB


def read_calibration_file(
    path: str | os.PathLike[str], *, form: str, names: Sequence[str], noun: str, made_with: str
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The JSON metadata and the named arrays of a file of the format ``form``. Nothing in the file is executed, nothing in it is checked.

    Args:
        path: The file.
        form: The value of ``format`` in its metadata.
        names: Of the arrays.
        noun: What such a file is, for messages.
        made_with: How one is made, for messages.

    Raises:
        CalibrationError: The file is missing, too large, damaged, or of another format.
    """
    from safetensors import safe_open

    source = Path(path)
    if not source.is_file():
        raise CalibrationError(f"there is no {noun} file {source}; make one with {made_with}")
    size = source.stat().st_size
    if size > LARGEST_FILE:
        raise CalibrationError(f"{source} has {size:,} bytes; a {noun} has at most {LARGEST_FILE:,}")
    try:
        with safe_open(source, framework="numpy") as file:
            about = json.loads((file.metadata() or {}).get("memhook", "null"))
            known = isinstance(about, dict) and about.get("format") == form
            arrays = {name: file.get_tensor(name) for name in names} if known else {}
    except Exception as error:  # an untrusted file: whatever its readers raise, it cannot be read
        raise CalibrationError(f"{source} cannot be read as a {noun}: {type(error).__name__}: {error}") from error
    if not known:
        raise CalibrationError(f"{source} is a safetensors file, but not a {noun} of the format {form}")
    return about, arrays
