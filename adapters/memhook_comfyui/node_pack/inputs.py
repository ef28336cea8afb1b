"""Declarations of inputs that several nodes have, in ComfyUI's form: a type, and options with a tooltip."""

from __future__ import annotations

from typing import Any

from .host import comfy

Declared = tuple[Any, dict[str, Any]]


def sampler_inputs() -> dict[str, Declared]:
    """KSampler's own inputs, which have to be set as they are there."""
    samplers = comfy("comfy.samplers").KSampler
    like = "Set it as in your sampler."
    return {
        "seed": ("INT", {"default": 0, "min": 0, "max": 0xFFFFFFFFFFFFFFFF, "control_after_generate": True, "tooltip": "Of the starting noise."}),
        "steps": ("INT", {"default": 20, "min": 1, "max": 10000, "tooltip": like}),
        "cfg": ("FLOAT", {"default": 8.0, "min": 0.0, "max": 100.0, "step": 0.1, "round": 0.01, "tooltip": f"{like} Above 1."}),
        "sampler_name": (samplers.SAMPLERS, {"tooltip": like}),
        "scheduler": (samplers.SCHEDULERS, {"tooltip": like}),
    }


def negative() -> Declared:
    """The unconditional branch's text."""
    return "CONDITIONING", {"tooltip": "The negative prompt that your sampler gets."}


def evaluations(tooltip: str, *, least: int, most: int) -> Declared:
    """Over how many evaluations to score."""
    return "INT", {"default": 1, "min": least, "max": most, "tooltip": tooltip}


def false_alarms() -> Declared:
    """The false-positive rate, by a name that needs no statistics."""
    tooltip = "How often a harmless prompt may be taken for a memorized one: 0.01 is one in a hundred."
    return "FLOAT", {"default": 0.01, "min": 0.0001, "max": 0.5, "step": 0.001, "round": False, "tooltip": tooltip}


def calibration(use: str = "") -> Declared:
    """The scores of harmless prompts."""
    return "MEMHOOK_CALIBRATION", {"tooltip": f"What harmless prompts score, from Memhook Calibrate.{use}"}


def target(tooltip: str) -> Declared:
    """The magnitude that mitigation aims at."""
    return "FLOAT", {"default": 0.0, "min": 0.0, "max": 1000.0, "step": 0.01, "tooltip": tooltip}


def learning_rate() -> Declared:
    """Of mitigation."""
    return "FLOAT", {"default": 0.05, "min": 0.0001, "max": 1.0, "step": 0.001, "round": False, "tooltip": "Larger changes more."}


def max_steps(cost: str = "", *, most: int) -> Declared:
    """Of mitigation."""
    return "INT", {"default": 10, "min": 1, "max": most, "tooltip": f"How many changes at most.{cost}"}
