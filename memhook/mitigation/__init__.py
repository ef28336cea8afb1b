"""Other embeddings and other prompts, beforehand or while a run goes on."""
