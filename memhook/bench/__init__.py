"""What memhook costs and how well it works, as functions that return rows; `memhook bench` prints them.

Lives here:

    detection           the paper's Table 1 on any model, with its baselines
    attribution         do the scores point at the trigger words, and does changing the top words
                        undo the copy?
    attribution_report  its tables, files and plot
    mitigation          similarity to the training picture against agreement with the prompt (Figure
                        4)
    mitigation_report   its tables, files, plot and sheet of pictures
    guarded             clean prompts under the guard, beside memorized ones in the same batch
    whitening           the plain magnitude against the whitened one
    training            does the training filter stop memorization?
    capture             what watching costs
    gradients           what gradients of the magnitude cost
    startup             how long `import memhook` and the command take to answer
    sampling            the model that runs the prompts, and everything that a calibration depends
                        on
    samples             pictures of the bundled model from changed embeddings, and judging them
    resampling          intervals that draw whole families of prompts
    written             rows as CSV and JSON, and as a table in a page of the documentation

May use: every room but `memhook.cli`. Used by: `memhook.cli`.
"""
