"""What long runs print: tables on a console, and how far they have come.

Lives here: the console that every command and benchmark prints to (`memhook.report.tables`) and progress (`memhook.report.progress`).
May use: the rooms to its left, of which it needs none. Used by: `memhook.testbed` (its card), `memhook.bench` and `memhook.cli`.

What a benchmark computes and what a command asks for are two rooms, and both print. So what prints stands left of both, and a benchmark
needs no command to show its rows. Nothing here decides what is shown.
"""
