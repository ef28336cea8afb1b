"""``memhook adapters``: which adapters are installed."""

from __future__ import annotations

from rich.text import Text

from memhook.plugins import plugin_states
from memhook.report.tables import print_table, shown


def print_adapters() -> None:
    """List adapter plugins with origin and state."""
    rows = [
        (
            shown(state.name),
            shown(state.origin),
            shown(state.module),
            Text("in use", style="green") if state.problem is None else shown(f"left out: {state.problem}"),
        )
        for state in plugin_states()
    ]
    rows.append(
        (Text("module"), Text("memhook itself"), Text("memhook.ModuleAdapter"), Text("pass it: watch(unet, adapter=ModuleAdapter(unet, ...))"))
    )
    print_table("Adapters", [("name", ""), ("from", ""), ("module", ""), ("state", "")], rows)
