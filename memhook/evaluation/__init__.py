"""How well scores separate, and how similar pictures are."""

from memhook.evaluation.roc import Interval, RocCurve, Separation, draw_families, evaluate, one_per_family, roc_auc, roc_curve, tpr_at_fpr

__all__ = ["Interval", "RocCurve", "Separation", "draw_families", "evaluate", "one_per_family", "roc_auc", "roc_curve", "tpr_at_fpr"]
