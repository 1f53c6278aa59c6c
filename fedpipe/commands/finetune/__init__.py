"""``fedpipe finetune``: federated fine-tuning, of whole models or of adapters."""
