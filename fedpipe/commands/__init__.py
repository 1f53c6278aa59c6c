"""The commands of fedpipe, with a folder per command."""
