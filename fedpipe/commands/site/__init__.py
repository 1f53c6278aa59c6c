"""``fedpipe site``: an institution in a consortium."""
