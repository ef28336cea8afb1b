"""Other embeddings and other prompts, beforehand or while a run goes on.

Lives here:

    embedding         `optimize_embedding`: until its magnitude is that of a clean prompt
    guard             `guard`: judging a run while it goes on, and repairing or stopping it
    guard_report      what a guard found and did
    in_flight         `mitigate`: some samples of one evaluation, as an answer that repairs the run
    random_additions  random words put in, or noise on the embedding
    edits             `suggest_edits`: what to write instead (`edit_views`: to look at)

May use: `memhook.detection` and the rooms before it. Used by: `memhook.training`, `memhook.bench`
and `memhook.cli`.
"""
