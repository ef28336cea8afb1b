"""The ``memhook`` command: its words and options, and what it prints.

Lives here:

    app        the commands and their options
    options    options that several commands have
    demo       `memhook demo`, with its prompts (`demo_prompts`), figures (`figures`) and page
               (`page`)
    detect     `memhook detect`, with its journal (`journal`) and what it says of each prompt
               (`verdicts`)
    calibrate  `memhook calibrate`
    attribute  `memhook attribute`
    generate   `memhook generate`
    adapters   `memhook adapters`
    bench_app  the commands `memhook bench ...`
    bench      printing what `memhook.bench` measures
    methods    `memhook methods`

May use: every room; modules with options import their work inside the commands, so that ``--help``
imports no torch. Used by: nothing but the entry point.
"""

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
