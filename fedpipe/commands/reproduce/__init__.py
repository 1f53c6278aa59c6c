"""``fedpipe reproduce``: a published experiment with its baselines."""
