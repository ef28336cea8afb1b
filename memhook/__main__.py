"""``python -m memhook`` is the command ``memhook``."""

from memhook.cli import main

main()
