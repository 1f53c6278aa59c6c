"""What the commands do; each module reads from top to bottom."""
