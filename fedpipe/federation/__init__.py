"""Rounds: who trains, what is averaged, what stays with a client."""
