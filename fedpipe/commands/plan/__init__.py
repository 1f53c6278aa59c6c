"""``fedpipe plan``: processes, stages, costs and messages of a run, and what leaves a client."""
