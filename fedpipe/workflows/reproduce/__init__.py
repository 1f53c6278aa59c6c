"""``fedpipe reproduce``: a published experiment, its baselines beside it, from text to figures."""
