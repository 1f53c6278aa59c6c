"""``fedpipe plan``: what a run will be, what it costs, and what leaves a client."""
