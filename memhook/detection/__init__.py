"""From scores to p-values and verdicts.

Lives here:

    verdict       `detect`: is a prompt's score too high for a prompt that is not memorized?
    calibration   `Calibration`: the scores of clean prompts, and what they say about a new one
    setting       what a calibration holds for, and whether a run was made in it
    stopping      `stop_rule`: several looks at one run at one false-positive rate
    discovery     many prompts: which to report at a given false discovery rate
    prompt_files  reading prompts from text, JSON lines, CSV or Parquet; unusable rows are set aside
                  and named
    asking        what a host would say of other texts, and what a calibration makes of them
    named         the score that a calibration is of, as something that can be computed
    causes        what differs between two settings, in words
    prompt_words  a prompt's words where they stand in its text

May use: `memhook.scores` and the rooms before it. Used by: `memhook.mitigation`, which acts on
verdicts, and `memhook.cli`, which prints them.
"""

from memhook.detection.verdict import Detection, detect

__all__ = ["Detection", "detect"]
