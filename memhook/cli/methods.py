"""``memhook methods``: which scores are installed."""

from __future__ import annotations

from collections import Counter

from rich.text import Text

from memhook.capture.scoring import as_scored
from memhook.errors import MemhookError
from memhook.plugins import offered_scores
from memhook.report.tables import print_table, shown


def print_methods() -> None:
    """List scores with what they need, where they were published, whose they are and whether they can be used."""
    offered, failures = offered_scores()
    count = Counter(offer.name for offer in offered)
    rows = []
    for offer in offered:
        needs, paper, problem = "-", "", f"left out: {count[offer.name]} plugins have a score of this name" if count[offer.name] > 1 else None
        try:
            scored = as_scored(offer.score, plugin=offer.plugin)
            needs, paper = ", ".join(scored.needs), scored.paper
        except MemhookError as error:
            problem = f"left out: {error}"
        state = Text("in use", style="green") if problem is None else shown(problem)
        rows.append((shown(offer.name), Text("score"), shown(needs), shown(paper), shown(offer.plugin), state))
    rows += [(Text("-"), Text("score"), Text("-"), Text(""), shown(plugin), shown(f"failed: {reason}")) for plugin, reason in failures.items()]
    print_table("Methods", [("name", ""), ("kind", ""), ("needs", ""), ("paper", ""), ("plugin", ""), ("state", "")], rows)
