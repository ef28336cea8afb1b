"""Training the bundled model: ``python -m memhook.testbed.train --work DIR --out DIR``, a module per stage."""
