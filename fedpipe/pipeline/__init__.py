"""The pipeline: schedules and their simulator, stage engines, and links between stages."""
