"""Processes: the grid, the environment and the only code that communicates."""
