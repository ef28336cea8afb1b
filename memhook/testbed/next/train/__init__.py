"""Training the second bundled model: ``python -m memhook.testbed.next.train --work DIR --out DIR``, a module per stage."""
