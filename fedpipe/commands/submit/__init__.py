"""``fedpipe submit``: another command as jobs of SLURM."""
