"""The fallback for Forge, and for ComfyUI before its patcher extension: what its last function of guidance is given."""

from __future__ import annotations

import contextlib
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from memhook.capture.prediction import Evaluation, magnitude
from memhook.capture.texts import Text
from memhook.capture.trace import Row
from memhook.errors import MemhookError
from memhook_comfyui.noise import covered, space_of, to_noise
from memhook_comfyui.prompts import fingerprints, read_embedding
from memhook_comfyui.roles import NOT_COVERED
from memhook_comfyui.setting import DELETED, describe_model
from memhook_comfyui.thaw import thawed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from memhook.hookspecs import Watcher

_KEY = "sampler_post_cfg_function"


class PostCfgAdapter:
    """Watch by ``sampler_post_cfg_function``: numbers only, no replay, and none where another node rewrites the predictions before.

    Args:
        patcher: A model patcher; not kept alive by the adapter.
    """

    host = "comfyui"

    def __init__(self, patcher: Any) -> None:
        self._patcher = weakref.ref(patcher)

    def describe(self) -> Mapping[str, Any]:
        return self.snapshot()()

    def snapshot(self) -> Callable[[], Mapping[str, Any]]:
        """What `describe` says now, to be read later."""
        patcher = self._patcher()
        if patcher is None:
            raise MemhookError(DELETED)
        return describe_model(patcher)

    @contextlib.contextmanager
    def attach(self, watcher: Watcher) -> Iterator[None]:
        patcher = self._patcher()
        if patcher is None:
            raise MemhookError("the model of this adapter was deleted before it was watched; make an adapter for the model that runs")
        function: Callable[[dict[str, Any]], Any] = _listener(watcher)
        options = patcher.model_options
        others = options.get(_KEY)
        # First among them, and a list of its own: the patcher's other clones may share the old one.
        options[_KEY] = [function, *(others or [])]
        del patcher
        try:
            yield
        finally:
            left = [other for other in options.get(_KEY, []) if other is not function]
            if left or others is not None:
                options[_KEY] = left
            else:
                options.pop(_KEY, None)


def _listener(watcher: Watcher) -> Callable[[dict[str, Any]], Any]:
    # A plain closure: clones of a patcher deep-copy its options (0.3.64), and a bound method would then record into a copy.
    def post_cfg(args: dict[str, Any]) -> Any:
        if watcher.listening:
            _record(watcher, args)
        return args["denoised"]

    return post_cfg


def _record(watcher: Watcher, args: dict[str, Any]) -> None:
    cond, uncond = args["cond_denoised"], args.get("uncond_denoised")
    lists = args.get("cond"), args.get("uncond")
    if "empty_cond" in args:  # PerpNegGuider, which is guided away from it
        uncond, lists = args["empty_cond_denoised"], (lists[0], args["empty_cond"])
    reason = _why_not(args, lists[1])
    with torch.inference_mode(mode=False), torch.no_grad():
        x, sigma, x0_cond = thawed(args["input"]), thawed(args["sigma"]), thawed(cond)
        space, shape = space_of(args["model"]), tuple(cond.shape[1:])
        if reason is not None or not isinstance(uncond, Tensor):
            watcher.missing(reason or _SKIPPED)
            alone = Evaluation(to_noise(x0_cond, x, sigma, None), None, space=space, roles="matched", sigma=sigma)
            watcher.emit(alone, Row(None, sigma=sigma, shape=shape))
            return
        x0_uncond = thawed(uncond)
        where = covered(x0_cond, x0_uncond)
        present = where.flatten(1).any(dim=1).all()
        measured = magnitude(*(torch.where(where, x0, torch.zeros_like(x0)) for x0 in (x0_cond, x0_uncond))) / sigma.reshape(-1)
        hashes = [fingerprints(conds, len(cond)) if conds else None for conds in lists]
        known = torch.stack([hashes[0], hashes[1]]) if hashes[0] is not None and hashes[1] is not None else None

        def settle(row: Row) -> bool:
            if not bool(present):
                row.magnitude = None
                watcher.missing(f"{_SKIPPED}; or {NOT_COVERED}")
            return True

        embedding = read_embedding(lists[1], len(cond)) if lists[1] else None
        unconditional = None if embedding is None else Text.of(embedding)
        row = Row(measured, sigma=sigma, conditioning=known, unconditional=unconditional, shape=shape, roles="matched", settle=settle)
        pred_cond, pred_uncond = (to_noise(x0, x, sigma, where) for x0 in (x0_cond, x0_uncond))
        if watcher.wants_roles and not bool(present):
            settle(row)
            row.settle = None
        pair = Evaluation(pred_cond, pred_uncond if row.magnitude is not None else None, space=space, roles="matched", sigma=sigma)
    watcher.emit(pair, row)


_SKIPPED = "cfg is 1, so the negative prompt is skipped; use a cfg above 1"


def _why_not(args: dict[str, Any], uncond: Any) -> str | None:
    """Why what the function is given is no pair; None where it is one."""
    if (args.get("model_options") or {}).get("sampler_pre_cfg_function"):
        return (
            "another node rewrites the predictions before they can be seen (sampler_pre_cfg_function, such as TCFG or APG), and this version has "
            "no wrappers; remove that node, or update ComfyUI"
        )
    if any(entry.get("prompt_type") == "negative" for entry in args.get("cond") or []):
        return "the guider passes its second prompt for the first (DualCFG), and this version has no wrappers; use KSampler, or update ComfyUI"
    return _SKIPPED if uncond is None else None
