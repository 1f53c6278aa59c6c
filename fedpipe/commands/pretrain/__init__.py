"""``fedpipe pretrain``: federated pre-training."""
