"""Studies: many runs and one table. A local pool or job arrays run the cells of a study."""
