"""Ways of turning an evaluation, or the images of a prompt, into a number."""
