"""Many runs and one table: the cells of a study, run by a local pool or by a job array."""
