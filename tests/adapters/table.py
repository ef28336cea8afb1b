"""Print the table of ``docs/hosts.md``: ``python -m tests.adapters.table`` runs every family and says what the adapter found."""

from __future__ import annotations

import logging
import warnings

import memhook
from tests.adapters.zoo import FAMILIES, Family

HEADER = ("pipeline", "predictions in a step", "roles", "replay")


def row(family: Family) -> tuple[str, ...]:
    """What watching one run of the family says."""
    host = family.build()
    with memhook.watch(host.pipeline, keep="calls") as trace:
        host.run()
    try:
        _ = trace.magnitudes
    except memhook.NoGuidanceError:
        return family.name, layout(family), "none: `NoGuidanceError`", ""
    evaluation = next(evaluation for evaluation in trace.evaluations if evaluation.pred_uncond is not None)
    try:
        evaluation.objective(evaluation.embedding if evaluation.embedding is not None else evaluation.pred_cond)
    except memhook.ReplayError:
        return family.name, layout(family), str(trace.roles), "no"
    return family.name, layout(family), str(trace.roles), "yes"


def layout(family: Family) -> str:
    """The family's steps, as the table shows them."""
    return " or ".join(f"`{step.replace('|', ' then ')}`" for step in family.layout)


def line(cells: tuple[str, ...]) -> str:
    """One line of a Markdown table."""
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    print(line(HEADER))
    print(line(("---",) * len(HEADER)))
    for name in sorted(FAMILIES):
        print(line(row(FAMILIES[name])), flush=True)
