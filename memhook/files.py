"""Writing files whole or not at all."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from memhook.errors import MemhookError

if TYPE_CHECKING:
    import numpy as np


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, then rename it, so that an interruption leaves what was there.

    Raises:
        MemhookError: The folder cannot be made or written to.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        temporary.replace(path)
    except OSError as error:
        raise MemhookError(f"cannot write {path}: {error.strerror or error}. Choose a folder that can be written to") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text, whole or not at all."""
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def csv_text(rows: Sequence[Mapping[str, object]], *, line_end: str = "\r\n") -> str:
    """Rows as CSV under all of their names, in the order in which these appear; a row that lacks one has nothing there."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, fieldnames=list(dict.fromkeys(name for row in rows for name in row)), restval="", lineterminator=line_end)
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write named arrays as one ``.safetensors`` file, whole or not at all."""
    import numpy as np
    from safetensors.numpy import save_file

    whole = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    replace_file(path, lambda temporary: save_file(whole, temporary))


def read_arrays(path: Path) -> dict[str, np.ndarray] | None:
    """What `write_arrays` wrote; None where there is no file, or a damaged one, which is to be made again."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return dict(load_file(path)) if path.is_file() else None
    except (SafetensorError, OSError):
        return None
