"""A small text-to-image model that really memorizes, with the ground truth of what it memorized.

    pipeline = memhook.testbed.load_pipeline()
    for row in memhook.testbed.memorized(kind="verbatim"): ...

How it was made is in `memhook.testbed.train`; how well it memorizes is in ``docs/testbed.md`` and printed by ``memhook testbed card``.
"""

from memhook.testbed.bundle import CleanPrompt, MemorizedPrompt, calibration_path, clean, load_pipeline, load_reader, memorized, model_path

__all__ = ["CleanPrompt", "MemorizedPrompt", "calibration_path", "clean", "load_pipeline", "load_reader", "memorized", "model_path"]
