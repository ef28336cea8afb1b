"""Evaluations of a run, the trace they leave, and watching one.

Lives here:

    watching      `watch` a run, or `probe` its first evaluations
    prediction    `Evaluation`: one guided evaluation of a denoiser, and the magnitude of its text-
                  conditional prediction
    intervention  what an observer may answer to an evaluation: another prediction, another
                  embedding
    trace         `Trace`: what a watched run leaves behind, a row for each evaluation
    rows          what is kept of one evaluation, on the device until somebody asks
    prompts       from magnitudes of samples to those of prompts
    runs          telling several runs in one trace apart
    objective     a function from an embedding to one magnitude a sample, to differentiate
    unrecorded    calls that no watch may record, since memhook makes them itself
    scoring       scores: functions that turn an evaluation into one number a sample, computed while
                  a run goes on (`needs`: what they can ask for; `score_values`: reading them back)
    described     the setting of a run, asked of the adapter while the block lasts and kept when it
                  ends
    texts         a few numbers of an embedding, by which the same text is recognized in another
                  dtype or on another device
    lifted        a captured embedding as a function of what entered the text encoders, ready for
                  gradients

May use: `memhook.errors`, and the plugin contract at the door. Used by: every other room and every
adapter.
"""

from memhook.capture.watching import probe, watch

__all__ = ["probe", "watch"]
