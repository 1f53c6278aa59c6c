"""Federated fine-tuning: set up, train, score, write down."""
