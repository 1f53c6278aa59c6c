"""fedpipe: federated pre-training of BERT-like models over a pipeline of locally trained stages."""

__version__ = "0.2.0"
