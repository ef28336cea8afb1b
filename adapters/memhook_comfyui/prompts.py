"""ComfyUI's lists of conditionings: their text embeddings, read and written."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from memhook.adapting.tensors import row_hash
from memhook.errors import ReplayError
from memhook_comfyui.thaw import thawed, with_tensors

Conds = list[dict[str, Any]]
"""What a guider hands to its model for one role: an entry for each combined prompt, with areas, masks, strengths and time ranges."""

TEXT = "c_crossattn"  # the name under which a model is given its text


def rows_of(tensor: Tensor, batch: int) -> Tensor:
    """One row a sample, as ComfyUI repeats them: from the start again where there are too few, cut off where too many."""
    repeats = -(-batch // tensor.shape[0])
    return tensor.repeat(repeats, *(1,) * (tensor.ndim - 1))[:batch] if tensor.shape[0] != batch else tensor


def text_of(entry: dict[str, Any]) -> Tensor | None:
    """The text embedding ``(rows, l, d)`` of one entry, as the model is given it."""
    held = entry.get("model_conds", {}).get(TEXT)
    text = getattr(held, "cond", None)
    return text if isinstance(text, Tensor) and text.ndim == 3 and text.is_floating_point() else None


def read_embedding(conds: Conds, batch: int) -> Tensor | None:
    """The embeddings of all entries, one after the other along the tokens: ``(b, l, d)``. None where an entry has none, or another width."""
    texts = [text_of(entry) for entry in conds]
    known = [rows_of(thawed(text), batch) for text in texts if text is not None]
    if not known or len(known) < len(texts) or len({text.shape[2] for text in known}) > 1:
        return None
    with torch.inference_mode(mode=False), torch.no_grad():
        return torch.cat(known, dim=1).clone()


def write_embedding(conds: Conds, embedding: Tensor) -> Conds:
    """Copies of the entries with their parts of an embedding ``(b, l, d)`` in the place of their own."""
    changed, start = [], 0
    for entry in conds:
        text = text_of(entry)
        if text is None:
            raise ReplayError("an entry of the conditioning has no text embedding, so it cannot be replaced; use prompts that were encoded from text")
        part = embedding[:, start : start + text.shape[1]]
        start += text.shape[1]
        held = with_tensors(entry["model_conds"][TEXT], lambda _, part=part: part)  # type: ignore[misc]
        changed.append({**entry, "model_conds": {**entry["model_conds"], TEXT: held}})
    if start != embedding.shape[1]:
        raise ReplayError(f"the embedding has {embedding.shape[1]} positions; the conditioning has {start} in {len(conds)} entries")
    return changed


@torch.no_grad()
def fingerprints(conds: Conds, batch: int) -> Tensor | None:
    """``(b,)`` int64: which samples share one conditioning. None where an entry has no text."""
    total: Tensor | None = None
    for number, entry in enumerate(conds):
        text = text_of(entry)
        if text is None:
            return None
        found = row_hash(rows_of(text, batch)) * (2 * number + 1)
        total = found if total is None else total + found.to(total.device)
    return total
