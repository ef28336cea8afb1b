"""The plan of the second bundled model, which is being trained; it replaces the first one's files when the run has ended.

What is different, and why, is in `plan` and `train.diffusion`: captions name five things of their picture, trigger phrases are
ordinary words, some pairs fix only a region of the picture, planted captions are never dropped, and hard clean prompts share words
with planted ones. It uses the first model's artwork and training loop; nothing uses it yet.
"""
