"""How well scores separate, and how similar pictures are.

Lives here:

    roc         AUC, TPR at a false-positive rate, and their intervals over families of prompts
    similarity  is a picture a copy, does it show its prompt? For models of your own, by networks
                that you name

May use: every room before it. Used by: `memhook.testbed`, whose card prints its figures, and
`memhook.bench`.
"""

from memhook.evaluation.roc import Interval, RocCurve, Separation, draw_families, evaluate, one_per_family, roc_auc, roc_curve, tpr_at_fpr

__all__ = ["Interval", "RocCurve", "Separation", "draw_families", "evaluate", "one_per_family", "roc_auc", "roc_curve", "tpr_at_fpr"]
