"""A small text-to-image model that really memorizes, with the ground truth of what it memorized.

    pipeline = memhook.testbed.load_pipeline()
    for row in memhook.testbed.memorized(kind="verbatim"): ...

How it was made is in `memhook.testbed.train`; how well it memorizes is in ``docs/testbed.md`` and printed by ``memhook testbed card``.

Lives here:

    bundle    loading the bundled model and its prompts
    plan      what it was trained on: planted pairs among fresh ones
    captions  the captions
    scenes    the pictures, drawn from a `Scene`
    artwork   their emoji subjects
    measures  is it a copy, does it show what its caption says? Made for pictures of 32 x 32 pixels
    evidence  what the pictures of a study show: copies, diversity, agreement
    study     one sampling run over the test prompts, shared by the card and the benchmarks
    card      ``memhook testbed card``
    train     training it, a module for each stage
    next      the plan of the second bundled model, which is in training

May use: every room before it, and an adapter to run the model. Used by: `memhook.bench` and
`memhook.cli`.
"""

from memhook.testbed.bundle import CleanPrompt, MemorizedPrompt, calibration_path, clean, load_pipeline, load_reader, memorized, model_path

__all__ = ["CleanPrompt", "MemorizedPrompt", "calibration_path", "clean", "load_pipeline", "load_reader", "memorized", "model_path"]
