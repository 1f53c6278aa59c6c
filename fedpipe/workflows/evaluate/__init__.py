"""``fedpipe evaluate``: fine-tune encoders on labelled tasks, score them, compare them."""
