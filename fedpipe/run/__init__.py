"""The run directory: what it holds, its checkpoints, and the model that it exports."""
