"""Ways of turning an evaluation, or the pictures of a prompt, into a number: a file for each.

Lives here:

    spectrum    `CleanSpectrum`: the magnitude measured against what clean prompts have at each
                spatial frequency
    density     pictures of a memorized prompt lie close to each other
    stored      reading the files that calibrations are saved in, which may come from anywhere
    dsm         how far the conditional prediction moves from one evaluation to the next
    masked      the magnitude inside a region
    transition  where the magnitude has its first local minimum
    published   the scores that memhook offers by name, as a plugin like any other

May use: `memhook.capture` and `memhook.adapting`. Used by: `memhook.detection`, which judges by
these numbers, and the benchmarks, which compare them.
"""
