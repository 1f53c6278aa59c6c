"""The pipeline: schedules, their simulator, stages, links and the engine."""
