"""Labelled tasks that an encoder is scored on: names, files, rows and tokens."""
