"""How ranks come to life and end: on this machine, under a launcher, or as jobs of SLURM."""
