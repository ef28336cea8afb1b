"""What long runs print: tables on a console, and how far they have come.

Lives here:

    tables    what commands and benchmarks print; text from outside is shown without its control
              characters
    progress  a bar on a terminal, a plain line each half minute elsewhere

May use: the rooms before it, of which it needs none. Used by: `memhook.testbed`, `memhook.bench`
and `memhook.cli`: a benchmark needs no command to show its rows.
"""
