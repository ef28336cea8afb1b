"""Does the training filter stop memorization? A short fine-tune of the bundled model with planted duplicates, once for each way."""
