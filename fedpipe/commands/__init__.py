"""What a user does with fedpipe: a folder per command."""
