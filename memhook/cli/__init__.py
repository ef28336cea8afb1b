"""The ``memhook`` command."""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point: says what to install where the extra ``cli`` is missing, and turns memhook's errors into one line and exit status 2."""
    try:
        import rich  # noqa: F401
        import typer
    except ImportError as error:
        sys.exit(
            f'memhook: the command line needs {error.name}; install the extra "cli", or "demo" for everything: pip install "memhook-diffusion[demo]"'
        )

    from memhook.cli.app import app
    from memhook.errors import MemhookError

    try:
        app()
    except MemhookError as error:
        typer.echo(f"memhook: {error}", err=True)
        sys.exit(2)
