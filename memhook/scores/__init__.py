"""Ways of turning an evaluation, or the pictures of a prompt, into a number: a file for each.

Lives here:

    spectrum  `CleanSpectrum`: the magnitude measured against what clean prompts have at each
              spatial frequency
    density   pictures of a memorized prompt lie close to each other
    stored    reading the files that calibrations are saved in, which may come from anywhere

May use: `memhook.capture` and `memhook.adapting`. Used by: `memhook.detection`, which judges by
these numbers, and the benchmarks, which compare them.
"""
