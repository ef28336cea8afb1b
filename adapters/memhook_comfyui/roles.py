"""Which of a guider's lists of conditionings is the prompt, and which stands for no prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from memhook_comfyui.prompts import Conds

_PROMPT = "positive"
_OWN = frozenset(("cross_attn", "pooled_output", "uuid", "model_conds", "prompt_type"))  # what every entry has of its own


@dataclass(frozen=True)
class Names:
    """The names under which a guider keeps the two lists."""

    cond: str
    uncond: str | None


def names_of(conds: dict[str, Conds]) -> Names:
    """Roles by a guider's own names, which its lists are then recognized by.

    * ``positive`` and ``negative``: CFGGuider and KSampler.
    * ``empty_negative_prompt``: PerpNegGuider guides away from it; its ``negative`` is a second prompt.
    * ``middle``: DualCFGGuider. Where only ``middle`` shares what else the prompt has beside its text (the image of
      InstructPix2Pix), it is the prompt without its text. Otherwise it is a second prompt, and ``negative`` is none.
    """
    if "empty_negative_prompt" in conds:
        return Names(_PROMPT, "empty_negative_prompt")
    if "middle" in conds and "negative" in conds:
        shared = _others(conds.get(_PROMPT, []))
        if shared and shared == _others(conds["middle"]) and shared != _others(conds["negative"]):
            return Names(_PROMPT, "middle")
    return Names(_PROMPT, "negative" if "negative" in conds else None)


def _others(conds: Conds) -> frozenset[tuple[str, int]]:
    """What the entries hold beside their text, by name and identity."""
    return frozenset((name, id(value)) for entry in conds for name, value in entry.items() if name not in _OWN and value is not None)


def why_missing(guider: Any, names: Names, options: dict[str, Any]) -> str:
    """Why an evaluation had no unconditional prediction, and what to do about it."""
    kind = type(guider).__name__
    conds = getattr(guider, "conds", {})
    if names.cond not in conds:
        return f"{kind} has no conditioning named {names.cond!r} (it has {', '.join(conds) or 'none'}); use KSampler or CFGGuider"
    if names.uncond is None:
        return f"{kind} has no negative prompt, so nothing is guided; use KSampler or CFGGuider with a cfg above 1"
    if options.get("context_handler") is not None:
        return "the model runs in context windows, whose pieces cannot be told apart; leave the context windows out"
    known = ("cfg1", "cfg2") if hasattr(guider, "cfg2") else ("cfg",)  # DualCFGGuider inherits a cfg, and does not use it
    scales = {name: getattr(guider, name) for name in known if isinstance(getattr(guider, name, None), (int, float))}
    if any(abs(scale - 1.0) < 1e-9 for scale in scales.values()):
        seen = " and ".join(f"{name} is {scale:g}" for name, scale in scales.items())
        return f"{seen}, so ComfyUI skips the {names.uncond.replace('_', ' ')} prompt; use a cfg above 1"
    return (
        f"{kind} did not evaluate its {names.cond} and its {names.uncond.replace('_', ' ')} conditioning on the same noisy latent "
        "(a time range may have ended, or a custom guider makes lists of its own); use KSampler or CFGGuider with a cfg above 1"
    )


NOT_COVERED = (
    "at some evaluations no part of the picture had both a conditional and an unconditional prediction: a prompt's time range, area or mask "
    "leaves nothing; give the prompts the same range, and cover the picture"
)
