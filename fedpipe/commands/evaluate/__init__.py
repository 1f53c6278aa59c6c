"""``fedpipe evaluate``: fine-tune encoders on labelled tasks, score them and compare them."""
