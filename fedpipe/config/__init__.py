"""The configuration of a run: schema, loader, model sizes and DeepSpeed's JSON."""
