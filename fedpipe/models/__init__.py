"""Stages made of transformers' own modules, under their full Hugging Face parameter names."""
