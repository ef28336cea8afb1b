"""``memhook bench detection``: the paper's Table 1 on any model, with its baselines."""
